//! Manifests, indexes and configurations: what is accepted, which entry of an index fits, and what of them a conversion needs.
//!
//! Pure: bytes in, facts out. Labels, annotations and history are never looked at: an image's author does not set our policy.

use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};
use serde_json::Value;

use super::OciError;
use super::digest::{DiffId, Sha256, chain_ids};
use super::platform::Platform;
use super::source::SourceLayer;

/// Largest manifest or index: what registries accept and containerd reads (`core/remotes/docker`, `MaxManifestSize` 4 MiB).
pub const MAX_MANIFEST: u64 = 4 << 20;
/// Largest image configuration, as containerd (8 MiB).
pub const MAX_CONFIG: u64 = 8 << 20;

/// Most layers of an image. Overlayfs stacks 500 at most (`OVL_MAX_STACK` in `fs/overlayfs/params.h`), so an image of more runs nowhere;
/// Docker makes none of more than 127. A manifest has room for 27 000, and every prefix of the layers takes a record.
pub const MAX_LAYERS: usize = 500;

const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(super) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// For the `Accept` header of a manifest request: everything [`Document::parse`] understands.
pub const ACCEPT_MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// The annotation of BuildKit's attestations, which are filed among images.
const ATTESTS: &str = "vnd.docker.reference.type";

pub(super) const CONFIG_TYPES: [&str; 2] = ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
/// Layers are tars, plain or compressed by gzip or zstd. Which of the three is read off the bytes, as containerd does; the
/// diff ID proves the result.
const LAYER_TYPES: [&str; 11] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
];

/// A manifest or an index.
#[derive(Clone, Debug)]
pub enum Document {
    /// Leads to manifests, one per platform.
    Index(Box<ImageIndex>),
    /// One platform's image.
    Manifest(Box<ImageManifest>),
}

/// Fields that tell the kinds apart. A document with the fields of both is refused: two readers could see two images in it
/// (CVE-2021-41190).
#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Shape {
    schema_version: u32,
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
    config: Option<serde::de::IgnoredAny>,
}

impl Document {
    /// Parses a document; `media_type` is what the descriptor or the registry said it is, if anything. `what` is for errors.
    pub fn parse(what: &str, media_type: Option<&str>, bytes: &[u8]) -> Result<Document, OciError> {
        let malformed = |reason: String| OciError::Malformed { what: what.to_owned(), reason };
        let unsupported = |reason: String| OciError::Unsupported { what: what.to_owned(), reason };
        let shape: Shape = serde_json::from_slice(bytes).map_err(|e| malformed(e.to_string()))?;
        if shape.schema_version != 2 {
            return Err(unsupported(format!("its schema version is {}; push the image again with a current tool (version 2)", shape.schema_version)));
        }
        let stated = [media_type.filter(|t| is_manifest_type(t)), shape.media_type.as_deref()];
        let kinds: Vec<bool> = stated
            .into_iter()
            .flatten()
            .map(|stated| match stated {
                OCI_INDEX | DOCKER_LIST => Ok(true),
                OCI_MANIFEST | DOCKER_MANIFEST => Ok(false),
                other => Err(unsupported(format!("its media type is {other}; expected an image manifest or index"))),
            })
            .collect::<Result<_, _>>()?;
        let index = match kinds[..] {
            [] => shape.manifests.is_some(),
            [kind] => kind,
            _ if kinds[0] == kinds[1] => kinds[0],
            _ => return Err(malformed("it is announced as one of manifest and index and says it is the other".to_owned())),
        };
        let other_kind = if index { shape.layers.is_some() || shape.config.is_some() } else { shape.manifests.is_some() };
        if other_kind {
            return Err(malformed("it has the fields of a manifest and of an index".to_owned()));
        }
        if index {
            serde_json::from_slice(bytes).map(Document::Index).map_err(|e| malformed(e.to_string()))
        } else {
            serde_json::from_slice(bytes).map(Document::Manifest).map_err(|e| malformed(e.to_string()))
        }
    }
}

/// Registries may answer with a generic content type; only these say something.
fn is_manifest_type(media_type: &str) -> bool {
    [OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST].contains(&media_type)
}

/// The entries of an index, each with its platform as it stands in the document.
pub fn entries(index: &ImageIndex, bytes: &[u8]) -> Vec<(Descriptor, Option<Value>)> {
    #[derive(serde::Deserialize)]
    struct Platforms {
        manifests: Vec<Stated>,
    }
    #[derive(serde::Deserialize)]
    struct Stated {
        platform: Option<Value>,
    }
    let stated = serde_json::from_slice::<Platforms>(bytes).map(|document| document.manifests).unwrap_or_default();
    let stated = stated.into_iter().map(|entry| entry.platform).chain(std::iter::repeat(None));
    index.manifests().iter().cloned().zip(stated).collect()
}

/// The platform a descriptor states.
pub fn platform_of(descriptor: &Descriptor) -> Option<Platform> {
    let stated = descriptor.platform().as_ref()?;
    Some(Platform::new(&stated.os().to_string(), &stated.architecture().to_string(), stated.variant().as_deref()))
}

/// The entry that fits `wanted` best. A single entry that does not say its platform is taken when none fits: its configuration
/// will tell. `Err` lists the platforms there are.
pub fn choose<'a>(entries: impl IntoIterator<Item = &'a Descriptor>, wanted: &Platform) -> Result<&'a Descriptor, Vec<String>> {
    let mut best: Option<(u32, &Descriptor)> = None;
    let mut silent = Vec::new();
    let mut available = Vec::new();
    for entry in entries {
        match platform_of(entry) {
            // BuildKit files attestations this way; they are no images.
            Some(platform) if platform.os == "unknown" => {}
            Some(platform) => {
                let distance = wanted.distance(&platform);
                if let Some(distance) = distance.filter(|&d| best.is_none_or(|(least, _)| d < least)) {
                    best = Some((distance, entry));
                }
                available.push(platform.to_string());
            }
            None => silent.push(entry),
        }
    }
    match (best, &silent[..]) {
        (Some((_, entry)), _) => Ok(entry),
        (None, [only]) => Ok(only),
        _ => {
            available.sort();
            available.dedup();
            Err(available)
        }
    }
}

/// What the entries of an index are for, for one who wants all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// An image for Linux, or for a platform that only its configuration tells.
    Image,
    /// Another index.
    Index,
    /// No image, or none for Linux.
    Other,
}

/// What an entry of an index is for.
pub fn purpose(entry: &Descriptor) -> Purpose {
    let media_type = entry.media_type().to_string();
    let attests = entry.annotations().as_ref().is_some_and(|a| a.contains_key(ATTESTS));
    match platform_of(entry) {
        _ if attests => Purpose::Other,
        _ if [OCI_INDEX, DOCKER_LIST].contains(&media_type.as_str()) => Purpose::Index,
        Some(platform) if platform.os != "linux" => Purpose::Other,
        _ => Purpose::Image,
    }
}

/// Digest of a descriptor.
pub fn digest_of(what: &str, descriptor: &Descriptor) -> Result<Sha256, OciError> {
    let text = descriptor.digest().to_string();
    text.parse().map_err(|_| OciError::Unsupported { what: what.to_owned(), reason: format!("digest {text}: only sha256 is supported") })
}

/// What the converter needs of a configuration. The rest may be of any form.
#[derive(serde::Deserialize)]
struct Config {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    variant: Option<String>,
    rootfs: RootFs,
}

#[derive(serde::Deserialize)]
struct RootFs {
    #[serde(rename = "type")]
    kind: String,
    diff_ids: Option<Vec<String>>,
}

/// The configuration's descriptor, if the manifest is a container image's.
pub fn config_descriptor<'a>(what: &str, manifest: &'a ImageManifest) -> Result<&'a Descriptor, OciError> {
    let config = manifest.config();
    if CONFIG_TYPES.contains(&config.media_type().as_ref()) {
        return Ok(config);
    }
    let reason = format!("its configuration is of type {}, so it is no container image", config.media_type());
    Err(OciError::Unsupported { what: what.to_owned(), reason })
}

/// The diff IDs in a configuration.
pub fn diff_ids(what: &str, config_bytes: &[u8]) -> Result<Vec<DiffId>, OciError> {
    read_config(what, config_bytes).map(|(_, diff_ids)| diff_ids)
}

fn read_config(what: &str, bytes: &[u8]) -> Result<(Config, Vec<DiffId>), OciError> {
    let malformed = |reason: String| OciError::Malformed { what: format!("the configuration of {what}"), reason };
    let config: Config = serde_json::from_slice(bytes).map_err(|e| malformed(e.to_string()))?;
    if config.rootfs.kind != "layers" {
        return Err(malformed(format!("rootfs.type is {:?}, not \"layers\"", config.rootfs.kind)));
    }
    let parsed = |text: &String| text.parse().map_err(|_| malformed(format!("diff ID {text:?} is no sha256 digest")));
    let diff_ids = config.rootfs.diff_ids.iter().flatten().map(parsed).collect::<Result<_, _>>()?;
    Ok((config, diff_ids))
}

/// Platform and layers of an image from its manifest and configuration.
pub fn describe(what: &str, manifest: &ImageManifest, config_bytes: &[u8]) -> Result<(Platform, Vec<SourceLayer>), OciError> {
    let malformed = |reason: String| OciError::Malformed { what: format!("the configuration of {what}"), reason };
    let (config, diff_ids) = read_config(what, config_bytes)?;
    if manifest.layers().len() != diff_ids.len() {
        return Err(malformed(format!("it has {} diff IDs for the manifest's {} layers", diff_ids.len(), manifest.layers().len())));
    }
    if diff_ids.len() > MAX_LAYERS {
        let reason = format!("it has {} layers, and no image of more than {MAX_LAYERS} can be run; build it with fewer", diff_ids.len());
        return Err(OciError::Unsupported { what: what.to_owned(), reason });
    }
    let chains = chain_ids(&diff_ids);
    let layer = |((descriptor, diff_id), chain_id): ((&Descriptor, DiffId), _)| {
        let media_type = descriptor.media_type().to_string();
        if !LAYER_TYPES.contains(&media_type.as_str()) {
            let reason = format!("a layer is of type {media_type}; supported are tar layers, plain or compressed by gzip or zstd");
            return Err(OciError::Unsupported { what: what.to_owned(), reason });
        }
        Ok(SourceLayer { digest: digest_of(what, descriptor)?, size: descriptor.size(), media_type, diff_id, chain_id })
    };
    let layers = manifest.layers().iter().zip(diff_ids).zip(chains).map(layer).collect::<Result<Vec<_>, _>>()?;
    Ok((Platform::new(&config.os, &config.architecture, config.variant.as_deref()), layers))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn descriptor(media_type: &str, platform: Option<serde_json::Value>) -> serde_json::Value {
        let mut value = json!({"mediaType": media_type, "digest": Sha256::of(media_type.as_bytes()).oci(), "size": 7});
        if let Some(platform) = platform {
            value["platform"] = platform;
        }
        value
    }

    fn manifest(layers: &[&str]) -> serde_json::Value {
        let layers: Vec<_> = layers.iter().map(|t| descriptor(t, None)).collect();
        json!({"schemaVersion": 2, "config": descriptor(CONFIG_TYPES[0], None), "layers": layers})
    }

    #[test]
    fn documents_are_told_apart_by_announcement_type_and_shape() {
        let both = json!({"schemaVersion": 2, "manifests": [], "layers": [], "config": descriptor(CONFIG_TYPES[0], None)});
        let typed = |mut v: serde_json::Value, t: &str| {
            v["mediaType"] = json!(t);
            v
        };
        let index = json!({"schemaVersion": 2, "manifests": []});
        for (announced, document, expected) in [
            (None, index.clone(), Ok("index")),
            (Some(OCI_INDEX), index.clone(), Ok("index")),
            (Some("text/plain"), index.clone(), Ok("index")),
            (None, typed(index.clone(), DOCKER_LIST), Ok("index")),
            (None, manifest(&[]), Ok("manifest")),
            (Some(DOCKER_MANIFEST), typed(manifest(&[]), OCI_MANIFEST), Ok("manifest")),
            (Some(OCI_MANIFEST), typed(index.clone(), OCI_INDEX), Err("announced")),
            (Some(OCI_MANIFEST), index.clone(), Err("fields of a manifest and of an index")),
            (None, both, Err("fields of a manifest and of an index")),
            (None, typed(index, "application/x"), Err("application/x")),
            (None, json!({"schemaVersion": 1}), Err("schema version is 1")),
            (None, json!([]), Err("malformed")),
        ] {
            let found = match Document::parse("the manifest", announced, document.to_string().as_bytes()) {
                Ok(Document::Index(_)) => Ok("index"),
                Ok(Document::Manifest(_)) => Ok("manifest"),
                Err(e) => Err(e.to_string()),
            };
            match (&found, expected) {
                (Ok(kind), Ok(expected)) => assert_eq!(*kind, expected, "{document}"),
                (Err(message), Err(part)) => assert!(message.contains(part) && message.contains("the manifest"), "{message}"),
                _ => panic!("{document}: {found:?}, expected {expected:?}"),
            }
        }
    }

    #[test]
    fn what_an_index_says_of_platforms_is_kept_word_for_word() {
        let odd = json!({"os": "linux", "architecture": "arm64", "variant": "v8", "os.version": "1", "more": [1]});
        let index = json!({"schemaVersion": 2, "manifests": [descriptor(OCI_MANIFEST, Some(odd.clone())), descriptor(OCI_MANIFEST, None)]});
        let bytes = index.to_string().into_bytes();
        let Ok(Document::Index(index)) = Document::parse("x", None, &bytes) else { panic!("an index") };
        let stated: Vec<Option<serde_json::Value>> = entries(&index, &bytes).into_iter().map(|(_, stated)| stated).collect();
        assert_eq!(stated, [Some(odd), None]);
    }

    #[test]
    fn the_best_platform_is_chosen_or_all_are_listed() {
        let p = |architecture: &str, variant: Option<&str>| Some(json!({"os": "linux", "architecture": architecture, "variant": variant}));
        let attestation = Some(json!({"os": "unknown", "architecture": "unknown"}));
        let many = [p("amd64", None), p("arm", Some("v5")), p("arm", Some("v6")), p("arm64", Some("v8")), attestation.clone()];
        for (entries, wanted, expected) in [
            (&many[..], "linux/amd64", Ok(0)),
            (&many, "linux/arm/v7", Ok(2)),
            (&many, "linux/arm/v5", Ok(1)),
            (&many, "linux/arm64", Ok(3)),
            (&many, "linux/s390x", Err(vec!["linux/amd64", "linux/arm/v5", "linux/arm/v6", "linux/arm64"])),
            (&[None, attestation], "linux/amd64", Ok(0)),
            (&[None, None], "linux/amd64", Err(vec![])),
            (&[], "linux/amd64", Err(vec![])),
        ] {
            let entries: Vec<Descriptor> = entries.iter().map(|e| serde_json::from_value(descriptor(OCI_MANIFEST, e.clone())).unwrap()).collect();
            let found = choose(&entries, &wanted.parse().unwrap());
            let found = found.map(|d| entries.iter().position(|e| std::ptr::eq(e, d)).unwrap());
            assert_eq!(found, expected.map_err(|l| l.into_iter().map(str::to_owned).collect()), "{wanted}");
        }
    }

    fn described(layers: &[&str], config: serde_json::Value) -> Result<(Platform, Vec<SourceLayer>), String> {
        let manifest: ImageManifest = serde_json::from_value(manifest(layers)).unwrap();
        describe("app:1", &manifest, config.to_string().as_bytes()).map_err(|e| e.to_string())
    }

    #[test]
    fn layers_get_their_diff_and_chain_ids() {
        let ids = [Sha256::of(b"1"), Sha256::of(b"2")];
        let config = json!({"os": "linux", "architecture": "arm64", "variant": "v8", "config": 7,
            "rootfs": {"type": "layers", "diff_ids": [ids[0].oci(), ids[1].oci()]}});
        let (platform, layers) = described(&[LAYER_TYPES[1], LAYER_TYPES[6]], config).unwrap();
        assert_eq!(platform.to_string(), "linux/arm64");
        assert_eq!(layers[0].chain_id.0, ids[0]);
        assert_eq!(layers[1].chain_id, chain_ids(&ids.map(DiffId))[1]);
        assert_eq!(layers[1].media_type, LAYER_TYPES[6]);
        assert_eq!((layers[1].digest, layers[1].size), (Sha256::of(LAYER_TYPES[6].as_bytes()), 7));
    }

    #[test]
    fn images_that_contradict_themselves_are_refused() {
        let id = Sha256::of(b"1").oci();
        for (layers, config, part) in [
            (&[LAYER_TYPES[0]][..], json!({"rootfs": {"type": "layers", "diff_ids": []}}), "0 diff IDs for the manifest's 1 layers"),
            (&[LAYER_TYPES[0]], json!({"rootfs": {"type": "layers", "diff_ids": null}}), "0 diff IDs"),
            (&[], json!({"rootfs": {"type": "layers", "diff_ids": [id]}}), "1 diff IDs for the manifest's 0 layers"),
            (&[LAYER_TYPES[0]], json!({"rootfs": {"type": "layers", "diff_ids": ["sha256:12"]}}), "\"sha256:12\""),
            (&[], json!({"rootfs": {"type": "windows", "diff_ids": []}}), "windows"),
            (&[], json!({}), "rootfs"),
            (&["application/x+encrypted"], json!({"rootfs": {"type": "layers", "diff_ids": [id]}}), "application/x+encrypted"),
        ] {
            let message = described(layers, config).unwrap_err();
            assert!(message.contains(part) && message.contains("app:1"), "{message}");
        }
    }

    #[test]
    fn an_image_of_more_layers_than_can_be_stacked_is_refused() {
        let described = |count: usize| {
            let ids: Vec<String> = (0..count).map(|number| Sha256::of(&number.to_le_bytes()).oci()).collect();
            described(&vec![LAYER_TYPES[0]; count], json!({"rootfs": {"type": "layers", "diff_ids": ids}}))
        };
        assert_eq!(described(MAX_LAYERS).map(|(_, layers)| layers.len()), Ok(MAX_LAYERS));
        let message = described(MAX_LAYERS + 1).unwrap_err();
        assert!(["app:1", "501 layers", "more than 500", "build it with fewer"].iter().all(|part| message.contains(part)), "{message}");
    }

    #[test]
    fn artifacts_are_no_images() {
        let mut chart = manifest(&[]);
        chart["config"]["mediaType"] = json!("application/vnd.cncf.helm.config.v1+json");
        let message = config_descriptor("chart:1", &serde_json::from_value(chart).unwrap()).unwrap_err().to_string();
        assert!(message.contains("helm") && message.contains("no container image"), "{message}");
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_not_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Document::parse("x", None, &bytes);
        }
    }
}
