//! Where images come from: a registry or a layout directory, with everything about the manifest verified.

use std::path::Path;

use oci_spec::image::Descriptor;

use super::OciError;
use super::access::Access;
pub use super::blob::BlobStream;
use super::digest::{ChainId, DiffId, Sha256};
use super::layout::{self, Layout};
use super::manifest::{self, Document, MAX_CONFIG, MAX_MANIFEST};
use super::platform::Platform;
use super::registry::Registry;

/// Indexes that lead to indexes: layout index, image index, and one more for tools that wrap once again.
const MAX_DEPTH: usize = 4;

/// A place to read one image from.
#[derive(Clone, Debug)]
pub enum Source {
    /// An image in a registry.
    Registry(Registry),
    /// An image in a layout directory.
    Layout(Layout),
}

/// An image for one platform whose manifest and configuration match their digests. Layers are not read yet.
#[derive(Clone, Debug)]
pub struct SourceImage {
    /// Canonical name: the full reference, or `oci:<absolute directory>[:<tag>]`.
    pub name: String,
    /// Digest of the platform's manifest.
    pub manifest_digest: Sha256,
    /// The platform's manifest, as it came.
    pub manifest_bytes: Vec<u8>,
    /// The configuration, as it came.
    pub config_bytes: Vec<u8>,
    /// The platform it is for.
    pub platform: Platform,
    /// Layers, lowest first.
    pub layers: Vec<SourceLayer>,
}

/// One layer as manifest and configuration describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceLayer {
    /// SHA-256 of the blob.
    pub digest: Sha256,
    /// Bytes of the blob.
    pub size: u64,
    /// Media type, one of the tar layers known.
    pub media_type: String,
    /// SHA-256 of the uncompressed tar.
    pub diff_id: DiffId,
    /// Chain ID of this layer and all below it.
    pub chain_id: ChainId,
}

impl Source {
    /// What `text` names: `oci:DIR[:TAG]`, `docker://REFERENCE`, a directory that is an OCI layout (its presence is looked up),
    /// or a reference. `access` says how registries are reached.
    pub fn parse(text: &str, access: &Access) -> Result<Source, OciError> {
        let is_layout = |dir: &str| Path::new(dir).join(layout::MARKER).is_file();
        match Spelling::of(text, is_layout) {
            Spelling::Layout { dir, tag } => Layout::new(Path::new(dir), tag).map(Source::Layout),
            Spelling::Reference(reference) => Registry::new(reference.parse()?, access).map(Source::Registry),
        }
    }

    /// Canonical name: the full reference, or `oci:<absolute directory>[:<tag>]`.
    pub fn name(&self) -> String {
        match self {
            Source::Registry(registry) => registry.reference().to_string(),
            Source::Layout(layout) => layout.name(),
        }
    }

    /// The image for `platform`, with manifest and configuration verified and every layer named.
    pub async fn resolve(&self, platform: &Platform) -> Result<SourceImage, OciError> {
        let name = self.name();
        let missing = |available| OciError::MissingPlatform { reference: name.clone(), wanted: platform.clone(), available };
        let (mut media_type, mut manifest_bytes) = self.root(platform).await?;
        let mut stated = None;
        for _ in 0..MAX_DEPTH {
            let what = format!("the manifest of {name}");
            let manifest = match Document::parse(&what, media_type.as_deref(), &manifest_bytes)? {
                Document::Index(index) => {
                    let entry = manifest::choose(index.manifests(), platform).map_err(missing)?;
                    stated = manifest::platform_of(entry);
                    (media_type, manifest_bytes) = self.manifest(entry).await?;
                    continue;
                }
                Document::Manifest(manifest) => manifest,
            };
            let config_bytes = self.config(manifest::config_descriptor(&what, &manifest)?).await?;
            let (found, layers) = manifest::describe(&name, &manifest, &config_bytes)?;
            // Some tools leave the platform out; where both documents name one, they must agree on what can run at all.
            let silent = found.os.is_empty() || found.architecture.is_empty();
            if !silent && (&found.os, &found.architecture) != (&platform.os, &platform.architecture) {
                return Err(missing(vec![found.to_string()]));
            }
            let platform = stated.unwrap_or(if silent { platform.clone() } else { found });
            return Ok(SourceImage { name, manifest_digest: Sha256::of(&manifest_bytes), manifest_bytes, config_bytes, platform, layers });
        }
        Err(OciError::Malformed { what: name, reason: format!("more than {MAX_DEPTH} indexes lead to one another") })
    }

    /// The blob of a layer from its start. It survives broken connections; whether the bytes are right is for a
    /// [`super::VerifyReader`] to say.
    pub async fn open_layer(&self, layer: &SourceLayer) -> Result<BlobStream, OciError> {
        match self {
            Source::Registry(registry) => registry.open_blob(layer.digest, layer.size).await,
            Source::Layout(layout) => Ok(Box::new(layout.open_blob(layer.digest).await?)),
        }
    }

    /// What a layer's stream gave was not its blob. `true`: opening it again asks another host.
    pub fn was_wrong(&self, layer: &SourceLayer) -> bool {
        match self {
            Source::Registry(registry) => registry.was_wrong(layer.digest),
            Source::Layout(_) => false,
        }
    }

    /// The host or directory, for messages.
    pub fn place(&self) -> String {
        match self {
            Source::Registry(registry) => registry.host().to_owned(),
            Source::Layout(layout) => layout.dir().display().to_string(),
        }
    }

    async fn root(&self, platform: &Platform) -> Result<(Option<String>, Vec<u8>), OciError> {
        match self {
            Source::Registry(registry) => {
                let reference = registry.reference();
                let fetched = registry.manifest(&reference.target(), reference.digest().map(|digest| (digest, None))).await?;
                Ok((fetched.media_type, fetched.bytes))
            }
            Source::Layout(layout) => self.manifest(&layout.entry(platform).await?).await,
        }
    }

    /// Manifest or index by descriptor, verified.
    async fn manifest(&self, entry: &Descriptor) -> Result<(Option<String>, Vec<u8>), OciError> {
        let digest = manifest::digest_of(&self.name(), entry)?;
        let what = format!("manifest {} of {}", digest.oci(), self.name());
        let bytes = match self {
            Source::Registry(registry) => registry.manifest(&digest.oci(), Some((digest, Some(entry.size())))).await?.bytes,
            Source::Layout(layout) => layout.blob_bytes(&what, digest, entry.size(), MAX_MANIFEST).await?,
        };
        Ok((Some(entry.media_type().to_string()), bytes))
    }

    async fn config(&self, entry: &Descriptor) -> Result<Vec<u8>, OciError> {
        let digest = manifest::digest_of(&self.name(), entry)?;
        let what = format!("configuration {} of {}", digest.oci(), self.name());
        match self {
            Source::Registry(registry) => registry.blob_bytes((digest, Some(entry.size())), MAX_CONFIG).await,
            Source::Layout(layout) => layout.blob_bytes(&what, digest, entry.size(), MAX_CONFIG).await,
        }
    }
}

/// The ways to write a source.
#[derive(Debug, PartialEq, Eq)]
enum Spelling<'a> {
    Layout { dir: &'a str, tag: Option<&'a str> },
    Reference(&'a str),
}

impl Spelling<'_> {
    fn of(text: &str, is_layout: impl Fn(&str) -> bool) -> Spelling<'_> {
        // A directory may have a colon in its name; a tag has no slash.
        let split = |text| match str::rsplit_once(text, ':') {
            Some((dir, tag)) if !is_layout(text) && !tag.contains('/') => Spelling::Layout { dir, tag: Some(tag) },
            _ => Spelling::Layout { dir: text, tag: None },
        };
        if let Some(path) = text.strip_prefix("oci:") {
            split(path)
        } else if let Some(reference) = text.strip_prefix("docker://") {
            Spelling::Reference(reference)
        } else if is_layout(text) || text.starts_with('/') || text.starts_with("./") || text.starts_with("../") {
            split(text)
        } else {
            Spelling::Reference(text)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_told_apart() {
        let layout = |dir, tag| Spelling::Layout { dir, tag };
        for (text, expected) in [
            ("oci:/img", layout("/img", None)),
            ("oci:/img:1.2", layout("/img", Some("1.2"))),
            ("oci:img:1", layout("img", Some("1"))),
            ("oci:/has:colon", layout("/has:colon", None)),
            ("oci:/has:colon:1", layout("/has:colon", Some("1"))),
            ("oci:/a:b/c", layout("/a:b/c", None)),
            ("here", layout("here", None)),
            ("/absent", layout("/absent", None)),
            ("./absent:1", layout("./absent", Some("1"))),
            ("docker://here", Spelling::Reference("here")),
            ("debian:12", Spelling::Reference("debian:12")),
            ("host:5000/app", Spelling::Reference("host:5000/app")),
        ] {
            assert_eq!(Spelling::of(text, |dir| dir == "here" || dir == "/has:colon"), expected, "{text}");
        }
    }
}
