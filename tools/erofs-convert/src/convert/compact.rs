//! Compact targets: images of one tiny layer without files, for registries that should not keep the data.
//!
//! The layer is an archive with the metadata image in it, so its diff ID is the image's chain and changes with what the image holds. Nodes
//! start it lazily because a signed record of that chain stands for the source's: see [`Payload::stands_for`]. What manifest and layer say
//! of the source is for people, and for nodes that find no such record: see [`COMPACT_CHAIN`].
//!
//! Everything here depends on source and metadata image only.

use std::io::Write;

use erofs::digest::Digest;
use erofs::layer::LayerTree;
use flate2::{Compression, GzBuilder};
use serde_json::{Value, json};
use slipway::oci::{ChainId, DiffId, OciError, Sha256, Source, SourceImage};
use slipway::snapshot::{COMPACT_CHAIN, COMPACT_FILE};
use slipway::store::{Payload, SigningKey, Store};

use super::lone_file;
use super::target::{self, Documents};
use crate::failure::Failure;

/// Annotation of a compact image's layer: the digest of the metadata image in it.
const METADATA: &str = "containerd.io/snapshot/slipway.metadata";
/// What the operating system of a gzip file's maker is when nobody shall know (RFC 1952, 2.3.1).
const UNKNOWN_SYSTEM: u8 = 255;
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// The layer of a compact image.
#[derive(Debug)]
pub(super) struct CompactLayer {
    pub blob: Vec<u8>,
    pub digest: Sha256,
    pub diff_id: DiffId,
    /// The chain it stands for.
    stands_for: ChainId,
    /// The metadata image in it.
    metadata: Digest,
}

impl CompactLayer {
    /// The layer of a compact image of `top`'s, whose metadata image these bytes are.
    fn new(top: &Payload, metadata: &[u8]) -> CompactLayer {
        let archive = lone_file::archive(COMPACT_FILE.as_bytes(), 0o444, metadata);
        let header = GzBuilder::new().mtime(0).operating_system(UNKNOWN_SYSTEM);
        let mut packed = header.write(Vec::new(), Compression::default());
        // At once: where pieces end may change what comes of them.
        let blob = packed.write_all(&archive).and_then(|()| packed.finish()).expect("memory takes what is written to it");
        let diff_id = DiffId(Sha256::of(&archive));
        CompactLayer { digest: Sha256::of(&blob), blob, diff_id, stands_for: top.chain, metadata: top.metadata }
    }

    /// Makes the layer of an image that is in the store, and lets nodes find the image by the layer's chain.
    pub fn publish(store: &Store, key: &SigningKey, top: &Payload) -> Result<CompactLayer, Failure> {
        let layer = CompactLayer::new(top, &store.read_metadata(&top.metadata)?);
        store.put_record(&layer.record(top), key)?;
        Ok(layer)
    }

    /// Chain of the image that has this layer and no other.
    pub fn chain(&self) -> ChainId {
        ChainId(self.diff_id.0)
    }

    /// What nodes believe of the chain.
    fn record(&self, top: &Payload) -> Payload {
        Payload {
            chain: self.chain(),
            parent: None,
            diff_ids: vec![self.diff_id],
            trees: Vec::new(),
            framings: Vec::new(),
            stands_for: Some(self.stands_for),
            ..top.clone()
        }
    }

    /// Configuration and manifest of the compact image.
    pub fn documents(&self, source: &Source, image: &SourceImage) -> Result<Documents, OciError> {
        let config = self.config(source, image)?;
        let original = target::original(image)?;
        let layer = json!({
            "mediaType": LAYER_TYPE,
            "digest": self.digest.oci(),
            "size": self.blob.len(),
            "annotations": {COMPACT_CHAIN: self.stands_for.oci(), METADATA: self.metadata.to_string()},
        });
        let subject = json!({
            "mediaType": original["mediaType"].as_str().unwrap_or(target::OCI_MANIFEST),
            "digest": image.manifest_digest.oci(),
            "size": image.manifest_bytes.len(),
        });
        let mut manifest = target::manifest(source, image, &original, &config, vec![layer]);
        manifest["subject"] = subject;
        Ok(Documents { config, manifest: manifest.to_string().into_bytes() })
    }

    /// The source's configuration, of one layer.
    fn config(&self, source: &Source, image: &SourceImage) -> Result<Vec<u8>, OciError> {
        let malformed = |reason: String| OciError::Malformed { what: format!("the configuration of {}", image.name), reason };
        let mut config: Value = serde_json::from_slice(&image.config_bytes).map_err(|e| malformed(e.to_string()))?;
        let Some(fields) = config.as_object_mut() else { return Err(malformed("it is no JSON object".to_owned())) };
        let mut step = json!({"created_by": "erofs-convert", "comment": format!("metadata of {}", target::made_from(source, image.manifest_digest))});
        if let Some(created) = fields.get("created") {
            step["created"] = created.clone();
        }
        fields.insert("rootfs".to_owned(), json!({"type": "layers", "diff_ids": [self.diff_id.oci()]}));
        fields.insert("history".to_owned(), json!([step]));
        Ok(config.to_string().into_bytes())
    }
}

/// Fails if the image says that it is a compact one: there is nothing in it to convert.
pub(crate) fn refuse(image: &SourceImage) -> Result<(), Failure> {
    let original = target::original(image)?;
    let says = |layer: &Value| layer["annotations"].get(COMPACT_CHAIN).is_some();
    if original["layers"].as_array().is_some_and(|layers| layers.iter().any(says)) { Err(is_compact(image, &original)) } else { Ok(()) }
}

/// Fails if a layer of the image is a compact image's, whatever the image says: besides being of no use, it would give that layer's chain a
/// record of a single file, and nodes could take either for it.
pub(super) fn refuse_layers<'a>(image: &SourceImage, trees: impl IntoIterator<Item = &'a LayerTree>) -> Result<(), Failure> {
    let is_compact_layer = |tree: &LayerTree| matches!(&tree.entries[..], [only] if only.path == COMPACT_FILE.as_bytes());
    if trees.into_iter().any(is_compact_layer) { Err(is_compact(image, &target::original(image)?)) } else { Ok(()) }
}

fn is_compact(image: &SourceImage, manifest: &Value) -> Failure {
    let made_from = manifest["annotations"][target::SOURCE].as_str().or(manifest["subject"]["digest"].as_str());
    let made_from = made_from.map_or_else(|| "the image it was made from".to_owned(), str::to_owned);
    Failure::Compact { image: image.name.clone(), made_from }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use erofs::layer::{Entry, EntryKind};
    use erofs::meta::{Attr, Content, Data};
    use flate2::read::GzDecoder;
    use slipway::oci::{Access, Platform, SourceLayer};
    use slipway::store::{KeyId, Sizes};

    use super::*;

    fn top() -> Payload {
        let [one, two] = [b"1", b"2"].map(|text| DiffId(Sha256::of(text)));
        let chains = slipway::oci::chain_ids(&[one, two]);
        Payload {
            chain: chains[1],
            parent: Some(chains[0]),
            diff_ids: vec![one, two],
            trees: vec![Digest::of(b"1"), Digest::of(b"2")],
            framings: vec![Digest::of(b"3"), Digest::of(b"4")],
            metadata: Digest::of(b"metadata"),
            fold_version: 1,
            packs: Vec::new(),
            sizes: Sizes::default(),
            top: true,
            stands_for: None,
            tool: "test".to_owned(),
            key: KeyId([0; 8]),
        }
    }

    fn image(manifest: &Value, config: &Value) -> SourceImage {
        let (layer, manifest_bytes) = (Sha256::of(b"layer"), manifest.to_string().into_bytes());
        SourceImage {
            name: "example.com/team/app:1".to_owned(),
            manifest_digest: Sha256::of(&manifest_bytes),
            manifest_bytes,
            config_bytes: config.to_string().into_bytes(),
            platform: Platform::host(),
            layers: vec![SourceLayer { digest: layer, size: 5, media_type: LAYER_TYPE.to_owned(), diff_id: DiffId(layer), chain_id: ChainId(layer) }],
        }
    }

    #[test]
    fn a_layer_is_one_file_that_nobody_can_run_and_always_the_same_bytes() {
        let layer = CompactLayer::new(&top(), b"metadata");
        let again = CompactLayer::new(&top(), b"metadata");
        assert_eq!((&layer.blob, layer.digest, layer.diff_id), (&again.blob, Sha256::of(&again.blob), again.diff_id));
        assert_eq!(layer.blob[..10], [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255], "no name, no time, no system");
        let mut archive = Vec::new();
        GzDecoder::new(&layer.blob[..]).read_to_end(&mut archive).unwrap();
        assert_eq!(layer.chain().0, Sha256::of(&archive));
        assert_eq!(archive.len(), 4 * 512, "header, file, end");
        let field = |at: usize, len: usize| std::str::from_utf8(&archive[at..at + len]).unwrap().trim_end_matches('\0').to_owned();
        assert_eq!(
            (field(0, 100), field(100, 8), field(108, 8), field(116, 8), field(136, 12), field(156, 1)),
            (COMPACT_FILE.into(), "0000444".into(), "0000000".into(), "0000000".into(), "00000000000".into(), "0".into())
        );
        assert_eq!((&archive[512..520], &archive[1024..]), (&b"metadata"[..], &[0; 1024][..]));
        assert_ne!(CompactLayer::new(&top(), b"other").diff_id, layer.diff_id);
    }

    #[test]
    fn documents_depend_on_source_and_metadata_alone() {
        let original = json!({"layers": [{"annotations": {"a": "1"}}], "annotations": {"b": "3"}, "mediaType": "application/vnd.docker.x"});
        let config = json!({
            "created": "2020-01-01T00:00:00Z", "os": "linux", "architecture": "amd64", "config": {"Env": ["A=1"]},
            "rootfs": {"type": "layers", "diff_ids": ["sha256:1", "sha256:2"]}, "history": [{"created_by": "x"}, {"created_by": "y"}],
        });
        let (image, layer) = (image(&original, &config), CompactLayer::new(&top(), b"metadata"));
        let source = |text: &str| Source::parse(text, &Access::default()).unwrap();
        let Documents { config, manifest } = layer.documents(&source("example.com/team/app:1"), &image).unwrap();
        let (source_digest, diff_id) = (image.manifest_digest.oci(), layer.diff_id.oci());
        let expected = format!(
            "{{\"architecture\":\"amd64\",\"config\":{{\"Env\":[\"A=1\"]}},\"created\":\"2020-01-01T00:00:00Z\",\"history\":[\
             {{\"comment\":\"metadata of example.com/team/app@{source_digest}\",\"created\":\"2020-01-01T00:00:00Z\",\
             \"created_by\":\"erofs-convert\"}}],\"os\":\"linux\",\"rootfs\":{{\"diff_ids\":[\"{diff_id}\"],\"type\":\"layers\"}}}}"
        );
        assert_eq!(String::from_utf8(config.clone()).unwrap(), expected);
        let expected = format!(
            "{{\"annotations\":{{\"b\":\"3\",\"containerd.io/snapshot/slipway.source\":\"example.com/team/app@{source_digest}\"}},\
             \"config\":{{\"digest\":\"{}\",\"mediaType\":\"application/vnd.oci.image.config.v1+json\",\"size\":{}}},\
             \"layers\":[{{\"annotations\":{{\"containerd.io/snapshot/slipway.chain\":\"{}\",\"containerd.io/snapshot/slipway.metadata\":\"{}\"}},\
             \"digest\":\"{}\",\"mediaType\":\"{LAYER_TYPE}\",\"size\":{}}}],\"mediaType\":\"application/vnd.oci.image.manifest.v1+json\",\
             \"schemaVersion\":2,\"subject\":{{\"digest\":\"{source_digest}\",\"mediaType\":\"application/vnd.docker.x\",\"size\":{}}}}}",
            Sha256::of(&config).oci(),
            config.len(),
            top().chain.oci(),
            top().metadata,
            layer.digest.oci(),
            layer.blob.len(),
            image.manifest_bytes.len(),
        );
        assert_eq!(String::from_utf8(manifest.clone()).unwrap(), expected);
        assert_eq!(layer.documents(&source("example.com/team/app:other-tag"), &image).unwrap().manifest, manifest);
    }

    #[test]
    fn a_record_stands_for_the_sources_chain() {
        let layer = CompactLayer::new(&top(), b"metadata");
        let record = layer.record(&top());
        assert_eq!((record.chain, record.parent, &record.diff_ids[..]), (layer.chain(), None, &[layer.diff_id][..]));
        assert_eq!((record.stands_for, record.metadata, record.trees.len()), (Some(top().chain), top().metadata, 0));
    }

    #[test]
    fn compact_images_are_known_by_what_they_say_and_by_what_they_hold() {
        let file = |path: &str| Entry {
            path: path.as_bytes().to_vec(),
            kind: EntryKind::Node { attr: Attr::default(), content: Content::File(Data::Inline(b"x".to_vec())) },
        };
        let tree = |paths: &[&str]| LayerTree::new(Vec::new(), paths.iter().map(|path| file(path)).collect()).unwrap();
        let plain = image(&json!({"layers": [{"annotations": {"a": "1"}}, {}]}), &json!({}));
        assert!(refuse(&plain).is_ok());
        assert!(refuse_layers(&plain, [&tree(&["a"]), &tree(&[COMPACT_FILE, "a"]), &tree(&[])]).is_ok());
        let text = refuse_layers(&plain, [&tree(&["a"]), &tree(&[COMPACT_FILE])]).unwrap_err().report();
        assert!(text.contains("example.com/team/app:1") && text.contains("convert the image it was made from"), "{text}");
        let says = |document: Value| refuse(&image(&document, &json!({}))).unwrap_err().report();
        let layers = json!([{}, {"annotations": {COMPACT_CHAIN: "x"}}]);
        let text = says(json!({"layers": layers, "annotations": {target::SOURCE: "example.com/a@sha256:1"}}));
        assert!(text.contains("convert example.com/a@sha256:1"), "{text}");
        assert!(says(json!({"layers": layers, "subject": {"digest": "sha256:2"}})).contains("convert sha256:2"));
    }
}
