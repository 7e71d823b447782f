//! The image that is pushed after a conversion, for those who want a name of its own for what starts lazily.
//!
//! A portable one has the source's configuration and layers, so it runs anywhere, and its chains are the source's, so it starts lazily where
//! the source does. A compact one (`compact.rs`) has no data. Either's manifest says which image it was made from, which also gives it a digest of its
//! own: deleting one by digest leaves the other. Documents are written with sorted keys and depend on the source only.

use std::sync::OnceLock;

use serde_json::{Map, Value, json};
use slipway::oci::push::{Content, Pushed, Sent};
use slipway::oci::{Access, OciError, Reference, Sha256, Source, SourceImage, SourceLayer, Target};

use super::Context;
use super::compact::CompactLayer;
use crate::failure::Failure;
use crate::progress::{bytes, push_title};
use crate::stop;

pub(super) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Annotation of a target's manifest: the image it was made from, as `repository@digest`, or the digest alone of one from no registry.
pub(super) const SOURCE: &str = "containerd.io/snapshot/slipway.source";

/// The documents of a target.
pub(super) struct Documents {
    pub config: Vec<u8>,
    pub manifest: Vec<u8>,
}

/// Where a target goes.
#[derive(Clone, Debug)]
pub struct TargetOptions {
    /// Its name, with a tag.
    pub reference: Reference,
    /// How its registry is reached.
    pub access: Access,
    /// What is in it.
    pub kind: TargetKind,
}

/// The kinds of target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TargetKind {
    /// All layers of the source: it runs anywhere.
    #[default]
    Portable,
    /// No data: it runs only on nodes that have the store.
    Compact,
}

impl TargetKind {
    /// In a word, for messages.
    pub fn word(self) -> &'static str {
        match self {
            TargetKind::Portable => "portable",
            TargetKind::Compact => "compact",
        }
    }
}

/// The name a manifest is pushed under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Under {
    /// The target's tag.
    Tag,
    /// Its own digest: the tag will be an index's.
    Digest,
}

/// A target that was pushed.
#[derive(Clone, Debug)]
pub struct PushedTarget {
    /// Its name; of one of several platforms, its repository.
    pub reference: String,
    /// What is in it.
    pub kind: TargetKind,
    /// Digest of its manifest.
    pub digest: Sha256,
    /// Bytes of its manifest.
    pub size: u64,
    /// Of one of several platforms: the digest of the index that has the tag, once it is there.
    pub index: Option<Sha256>,
    /// How each blob came there, with its length: layers from the lowest, the configuration last.
    pub blobs: Vec<(Pushed, u64)>,
}

impl TargetOptions {
    /// A target called `text` for an image of `source`; it must not be the source itself.
    pub fn parse(text: &str, kind: TargetKind, access: &Access, source: &Source) -> Result<TargetOptions, Failure> {
        let reference: Reference = text.strip_prefix("docker://").unwrap_or(text).parse()?;
        let bad = |reason: &str| OciError::BadReference { text: text.to_owned(), reason: reason.to_owned() };
        if reference.digest().is_some() {
            return Err(bad("a target is pushed under a tag, and its digest is made by pushing it").into());
        }
        if let Source::Registry(registry) = source {
            let from = registry.reference();
            if (from.domain(), from.path(), from.tag()) == (reference.domain(), reference.path(), reference.tag()) {
                return Err(bad("that is the source, which the target would replace; give it another tag or repository").into());
            }
        }
        Ok(TargetOptions { reference, access: access.clone(), kind })
    }
}

/// Pushes the target of a converted image: with this layer, or with those of the source.
pub(super) fn push(
    context: &Context<'_>,
    options: &TargetOptions,
    source: &Source,
    image: &SourceImage,
    compact: Option<&CompactLayer>,
    under: Under,
) -> Result<PushedTarget, Failure> {
    let target = Target::new(options.reference.clone(), &options.access, source)?;
    let failed = |error: OciError| Failure::Push { image: image.name.clone(), target: options.reference.to_string(), source: Box::new(error) };
    let (documents, layers) = match compact {
        Some(layer) => (layer.documents(source, image), vec![(layer.digest, layer.blob.len() as u64, Content::Bytes(&layer.blob))]),
        None => (portable(source, image), image.layers.iter().map(|layer| (layer.digest, layer.size, Content::Layer(source, layer))).collect()),
    };
    let Documents { config, manifest } = documents.map_err(failed)?;
    let mut blobs = Vec::new();
    let mut send = |title: String, digest, size, content, sent: Sent<'_>| {
        let pushed = stop::wait(context.runtime, context.stop, target.push_blob(digest, size, content, sent))?.map_err(failed)?;
        match pushed {
            Pushed::Present => context.progress.say(&format!("{title}: is there")),
            Pushed::Mounted => context.progress.say(&format!("{title}: taken over from the source's repository")),
            Pushed::Sent => {}
        }
        blobs.push((pushed, size));
        Ok::<_, Failure>(pushed)
    };
    let count = layers.len();
    for (number, (digest, size, content)) in (1..).zip(layers) {
        // Nothing is shown of a layer that need not be sent.
        let shown = OnceLock::new();
        let sent = |done| shown.get_or_init(|| context.progress.push(number, count, digest, size)).reach(done);
        let pushed = send(push_title(number, count, digest), digest, size, content, &sent)?;
        if let Some(shown) = shown.into_inner().filter(|_| pushed == Pushed::Sent) {
            shown.finish_push();
        }
    }
    let title = "pushing the configuration".to_owned();
    if send(title.clone(), Sha256::of(&config), config.len() as u64, Content::Bytes(&config), &|_| ())? == Pushed::Sent {
        context.progress.say(&format!("{title}: {} sent", bytes(config.len() as u64)));
    }
    let push = async {
        match under {
            Under::Tag => target.push_manifest(OCI_MANIFEST, &manifest).await,
            Under::Digest => target.push_untagged(OCI_MANIFEST, &manifest).await,
        }
    };
    let digest = stop::wait(context.runtime, context.stop, push)?.map_err(failed)?;
    let reference = match under {
        Under::Tag => options.reference.to_string(),
        Under::Digest => format!("{}/{}", options.reference.domain(), options.reference.path()),
    };
    Ok(PushedTarget { reference, kind: options.kind, digest, size: manifest.len() as u64, index: None, blobs })
}

/// The source's manifest, as JSON.
pub(super) fn original(image: &SourceImage) -> Result<Value, OciError> {
    let malformed = |reason: String| OciError::Malformed { what: format!("the manifest of {}", image.name), reason };
    serde_json::from_slice(&image.manifest_bytes).map_err(|e| malformed(e.to_string()))
}

/// What a target says it was made from.
pub(super) fn made_from(source: &Source, digest: Sha256) -> String {
    match source {
        Source::Registry(registry) => format!("{}/{}@{}", registry.reference().domain(), registry.reference().path(), digest.oci()),
        _ => digest.oci(),
    }
}

/// A target's manifest: with the annotations of the source's, and what it was made from.
pub(super) fn manifest(source: &Source, image: &SourceImage, original: &Value, config: &[u8], layers: Vec<Value>) -> Value {
    let mut annotations = annotations_of(original);
    annotations.insert(SOURCE.to_owned(), made_from(source, image.manifest_digest).into());
    let config = json!({
        "mediaType": "application/vnd.oci.image.config.v1+json",
        "digest": Sha256::of(config).oci(),
        "size": config.len(),
    });
    json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers, "annotations": annotations})
}

/// The documents of a target that runs anywhere.
fn portable(source: &Source, image: &SourceImage) -> Result<Documents, OciError> {
    let original = original(image)?;
    let layers: Vec<Value> = image
        .layers
        .iter()
        .enumerate()
        .map(|(i, layer)| {
            let mut descriptor = layer_descriptor(layer);
            let given = annotations_of(&original["layers"][i]);
            if !given.is_empty() {
                descriptor["annotations"] = given.into();
            }
            descriptor
        })
        .collect();
    let manifest = manifest(source, image, &original, &image.config_bytes, layers);
    Ok(Documents { config: image.config_bytes.clone(), manifest: manifest.to_string().into_bytes() })
}

pub(super) fn annotations_of(document: &Value) -> Map<String, Value> {
    document["annotations"].as_object().cloned().unwrap_or_default()
}

fn layer_descriptor(layer: &SourceLayer) -> Value {
    json!({"mediaType": oci_layer_type(&layer.media_type), "digest": layer.digest.oci(), "size": layer.size})
}

/// What OCI calls a layer type of Docker's.
fn oci_layer_type(media_type: &str) -> String {
    let Some(form) = media_type.strip_prefix("application/vnd.docker.image.rootfs.") else { return media_type.to_owned() };
    let (kind, form) = match form.strip_prefix("foreign.") {
        Some(form) => ("layer.nondistributable.v1", form),
        None => ("layer.v1", form),
    };
    let form = form.strip_prefix("diff.").unwrap_or(form).replace('.', "+");
    format!("application/vnd.oci.image.{kind}.{form}")
}

#[cfg(test)]
mod tests {
    use slipway::oci::{ChainId, DiffId, Platform};

    use super::*;

    fn image(manifest: &Value, media_type: &str) -> SourceImage {
        let (layer, manifest_bytes) = (Sha256::of(b"layer"), manifest.to_string().into_bytes());
        SourceImage {
            name: "example.com/team/app:1".to_owned(),
            manifest_digest: Sha256::of(&manifest_bytes),
            manifest_bytes,
            config_bytes: b"{}".to_vec(),
            platform: Platform::host(),
            layers: vec![SourceLayer { digest: layer, size: 5, media_type: media_type.to_owned(), diff_id: DiffId(layer), chain_id: ChainId(layer) }],
        }
    }

    fn source(text: &str) -> Source {
        Source::parse(text, &Access::default()).unwrap()
    }

    #[test]
    fn a_manifest_depends_on_the_source_alone() {
        let original = json!({"layers": [{"annotations": {"z": "1", "a": "2"}}], "annotations": {"org.opencontainers.image.title": "t", "b": "3"}});
        let image = image(&original, "application/vnd.docker.image.rootfs.diff.tar.gzip");
        let manifest = portable(&source("example.com/team/app:1"), &image).unwrap().manifest;
        let expected = format!(
            "{{\"annotations\":{{\"b\":\"3\",\"containerd.io/snapshot/slipway.source\":\"example.com/team/app@{}\",\
             \"org.opencontainers.image.title\":\"t\"}},\"config\":{{\"digest\":\"{}\",\"mediaType\":\"application/vnd.oci.image.config.v1+json\",\
             \"size\":2}},\"layers\":[{{\"annotations\":{{\"a\":\"2\",\"z\":\"1\"}},\"digest\":\"{}\",\
             \"mediaType\":\"application/vnd.oci.image.layer.v1.tar+gzip\",\"size\":5}}],\
             \"mediaType\":\"application/vnd.oci.image.manifest.v1+json\",\"schemaVersion\":2}}",
            image.manifest_digest.oci(),
            Sha256::of(b"{}").oci(),
            Sha256::of(b"layer").oci(),
        );
        assert_eq!(String::from_utf8(manifest.clone()).unwrap(), expected);
        assert_eq!(portable(&source("example.com/team/app:other-tag"), &image).unwrap().manifest, manifest, "a tag of the source does not matter");
        let from_layout = portable(&source("oci:/some/dir:1"), &image).unwrap().manifest;
        assert!(!String::from_utf8(from_layout).unwrap().contains("/some/dir"), "a machine's paths stay on it");
    }

    #[test]
    fn layer_types_become_those_of_oci() {
        for (given, expected) in [
            ("application/vnd.docker.image.rootfs.diff.tar", "application/vnd.oci.image.layer.v1.tar"),
            ("application/vnd.docker.image.rootfs.diff.tar.zstd", "application/vnd.oci.image.layer.v1.tar+zstd"),
            ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"),
            ("application/vnd.oci.image.layer.v1.tar+gzip", "application/vnd.oci.image.layer.v1.tar+gzip"),
        ] {
            assert_eq!(oci_layer_type(given), expected);
        }
    }

    #[test]
    fn a_target_is_another_tag() {
        let parse = |text: &str, from: &str| {
            TargetOptions::parse(text, TargetKind::Portable, &Access::default(), &source(from)).map(|t| t.reference.to_string())
        };
        assert_eq!(parse("docker://example.com/app:acc", "example.com/app:1").unwrap(), "example.com/app:acc");
        assert_eq!(parse("debian", "example.com/debian").unwrap(), "docker.io/library/debian:latest");
        for (text, part) in [("example.com/app", "replace"), (&*format!("example.com/app:x@{}", Sha256::of(b"").oci()), "under a tag")] {
            let failure = parse(text, "example.com/app:latest").unwrap_err();
            assert_eq!(failure.exit_code(), 2);
            assert!(failure.to_string().contains(part), "{failure}");
        }
    }
}
