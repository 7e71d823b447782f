//! Where images come from: a registry, a layout or an archive, with everything about the manifest verified.

use std::collections::HashSet;
use std::path::Path;

use oci_spec::image::{Descriptor, ImageManifest};
use serde_json::Value;

use super::OciError;
use super::access::Access;
pub use super::blob::BlobStream;
use super::digest::{ChainId, DiffId, Sha256};
use super::docker_archive::DockerArchive;
use super::layout::{self, Layout};
use super::manifest::{self, Document, MAX_CONFIG, MAX_MANIFEST, Purpose};
use super::platform::Platform;
use super::registry::Registry;

/// Indexes that lead to indexes: layout index, image index, and one more for tools that wrap once again.
const MAX_DEPTH: usize = 4;

/// A place to read one image from.
#[derive(Clone, Debug)]
pub enum Source {
    /// An image in a registry.
    Registry(Registry),
    /// An image in a layout, which may be an archive.
    Layout(Layout),
    /// An image in an archive of `docker save`.
    DockerArchive(DockerArchive),
}

/// An image for one platform whose manifest and configuration match their digests. Layers are not read yet.
#[derive(Clone, Debug)]
pub struct SourceImage {
    /// Canonical name: the full reference, or transport, absolute path and what was said of tag or name.
    pub name: String,
    /// Digest of the platform's manifest; for archives of `docker save`, of the one that is made for them.
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

/// Most images that an index may lead to, and most indexes. The largest in use have some twenty platforms; an index has room for 15 000 entries,
/// and indexes may lead to indexes.
const MAX_PLATFORMS: usize = 100;

/// The images of a source for all Linux platforms.
#[derive(Debug)]
pub struct SourceImages {
    /// The index that leads to all of them, as it came. `None`: the source is a single manifest, or several entries of a layout.
    pub index: Option<Vec<u8>>,
    /// The images, in the order of the index.
    pub images: Vec<ListedImage>,
}

/// An image that an index leads to, unread.
#[derive(Debug)]
pub struct ListedImage {
    /// What the index says of the platform, word for word.
    stated: Option<Value>,
    leaf: Leaf,
}

#[derive(Debug)]
enum Leaf {
    /// The source is this manifest.
    Read(Box<ImageManifest>, Vec<u8>),
    /// An index names it.
    Named(Box<Descriptor>),
}

/// One image of a source that may have several.
#[derive(Debug)]
pub struct PlatformImage {
    /// The platform, if it is known.
    pub platform: Option<Platform>,
    /// What the index says of the platform, word for word.
    pub stated: Option<Value>,
    /// The image, or why it cannot be read.
    pub image: Result<SourceImage, OciError>,
}

/// A descriptor from an index, and what that says of the platform.
type Entry = (Descriptor, Option<Value>);

/// What indexes lead to, each once: one index may be named in many places.
#[derive(Default)]
struct Leaves {
    images: Vec<ListedImage>,
    platforms: HashSet<Platform>,
    /// Of images that no index states the platform of, and of indexes.
    digests: HashSet<String>,
    /// Indexes yet to be read.
    indexes: Vec<Entry>,
    indexes_seen: usize,
}

impl Leaves {
    fn add(&mut self, source: &Source, entries: Vec<Entry>) -> Result<(), OciError> {
        for (entry, stated) in entries {
            match manifest::purpose(&entry) {
                Purpose::Image => self.add_image(entry, stated),
                Purpose::Index if self.digests.insert(entry.digest().to_string()) => {
                    self.indexes_seen += 1;
                    self.indexes.push((entry, stated));
                }
                Purpose::Index | Purpose::Other => {}
            }
            if self.images.len().max(self.indexes_seen) > MAX_PLATFORMS {
                let reason = format!("it leads to more than {MAX_PLATFORMS} images or indexes; choose one of them with --platform");
                return Err(OciError::Unsupported { what: source.name(), reason });
            }
        }
        Ok(())
    }

    fn add_image(&mut self, entry: Descriptor, stated: Option<Value>) {
        let is_new = match manifest::platform_of(&entry) {
            Some(platform) => self.platforms.insert(platform),
            None => self.digests.insert(entry.digest().to_string()),
        };
        if is_new {
            self.images.push(ListedImage { stated, leaf: Leaf::Named(Box::new(entry)) });
        }
    }
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
    /// What `text` names, in the words of containers-transports(5): `docker://REFERENCE`, `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]`,
    /// `docker-archive:FILE[:REFERENCE|:@NUMBER]`; also a directory that is an OCI layout (its presence is looked up), or a reference. `access` says how registries are reached.
    pub fn parse(text: &str, access: &Access) -> Result<Source, OciError> {
        let is_layout = |dir: &str| Path::new(dir).join(layout::MARKER).is_file();
        match Spelling::of(text, is_layout, |file| Path::new(file).exists()) {
            Spelling::Layout { dir, tag } => Layout::in_dir(Path::new(dir), tag).map(Source::Layout),
            Spelling::OciArchive { file, tag } => Layout::in_archive(Path::new(file), tag).map(Source::Layout),
            Spelling::DockerArchive { file, name } => DockerArchive::new(Path::new(file), name).map(Source::DockerArchive),
            Spelling::Reference(reference) => Registry::new(reference.parse()?, access).map(Source::Registry),
        }
    }

    /// Canonical name: see [`SourceImage::name`].
    pub fn name(&self) -> String {
        match self {
            Source::Registry(registry) => registry.reference().to_string(),
            Source::Layout(layout) => layout.name(),
            Source::DockerArchive(archive) => archive.name(),
        }
    }

    /// The image for `platform`, with manifest and configuration verified and every layer named.
    pub async fn resolve(&self, platform: &Platform) -> Result<SourceImage, OciError> {
        let name = self.name();
        let missing = |available| OciError::MissingPlatform { reference: name.clone(), wanted: platform.clone(), available };
        let (mut media_type, mut manifest_bytes) = self.root(platform).await?;
        let mut stated = None;
        for _ in 0..MAX_DEPTH {
            match Document::parse(&self.manifest_name(), media_type.as_deref(), &manifest_bytes)? {
                Document::Index(index) => {
                    let entry = manifest::choose(index.manifests(), platform).map_err(missing)?;
                    stated = manifest::platform_of(entry);
                    (media_type, manifest_bytes) = self.manifest(entry).await?;
                }
                Document::Manifest(manifest) => return self.image(&manifest, manifest_bytes, stated, Some(platform)).await,
            }
        }
        Err(self.too_deep())
    }

    /// The images for all Linux platforms, in the order of the index, each platform once; what is no image is left out. Only indexes are read:
    /// the images themselves when their turn comes, see [`Source::resolve_one`].
    pub async fn list_all(&self) -> Result<SourceImages, OciError> {
        let mut leaves = Leaves::default();
        let (mut top, mut is_layout_of_one) = (None, false);
        match self {
            Source::Layout(layout) => {
                let entries: Vec<Entry> = layout.entries().await?.into_iter().map(|entry| (entry, None)).collect();
                is_layout_of_one = entries.len() == 1;
                leaves.add(self, entries)?;
            }
            _ => {
                let (media_type, bytes) = self.root(&Platform::host()).await?;
                match Document::parse(&self.manifest_name(), media_type.as_deref(), &bytes)? {
                    Document::Index(index) => {
                        leaves.add(self, manifest::entries(&index, &bytes))?;
                        top = Some(bytes);
                    }
                    Document::Manifest(manifest) => {
                        let only = ListedImage { stated: None, leaf: Leaf::Read(manifest, bytes) };
                        return Ok(SourceImages { index: None, images: vec![only] });
                    }
                }
            }
        }
        for _ in 1..MAX_DEPTH {
            for (entry, stated) in std::mem::take(&mut leaves.indexes) {
                let (media_type, bytes) = self.manifest(&entry).await?;
                match Document::parse(&self.manifest_name(), media_type.as_deref(), &bytes)? {
                    Document::Index(index) => {
                        leaves.add(self, manifest::entries(&index, &bytes))?;
                        // What leads to it is the layout's own list.
                        top = top.or(is_layout_of_one.then_some(bytes));
                    }
                    Document::Manifest(_) => leaves.add_image(entry, stated),
                }
            }
        }
        if !leaves.indexes.is_empty() {
            return Err(self.too_deep());
        }
        if leaves.images.is_empty() {
            return Err(self.not_for_linux());
        }
        Ok(SourceImages { index: top, images: leaves.images })
    }

    /// One of the images, with manifest and configuration verified and every layer named. `None`: its configuration says that it is not for Linux.
    pub async fn resolve_one(&self, listed: ListedImage) -> Option<PlatformImage> {
        let ListedImage { stated: in_its_words, leaf } = listed;
        let (stated, image) = match leaf {
            Leaf::Read(manifest, bytes) => (None, self.image(&manifest, bytes, None, None).await),
            Leaf::Named(entry) => {
                let stated = manifest::platform_of(&entry);
                let read = async {
                    let (media_type, bytes) = self.manifest(&entry).await?;
                    match Document::parse(&self.manifest_name(), media_type.as_deref(), &bytes)? {
                        Document::Manifest(manifest) => self.image(&manifest, bytes, stated.clone(), None).await,
                        Document::Index(_) => Err(self.too_deep()),
                    }
                };
                let image = read.await;
                let is_other = image.as_ref().is_ok_and(|image| image.platform.os != "linux");
                if is_other {
                    return None;
                }
                (stated, image)
            }
        };
        let platform = image.as_ref().map(|image| image.platform.clone()).ok().or(stated);
        Some(PlatformImage { platform, stated: in_its_words, image })
    }

    /// Fails a search that found no image.
    pub fn not_for_linux(&self) -> OciError {
        OciError::Unsupported { what: self.name(), reason: "it has no image for Linux".to_owned() }
    }

    /// The image of a manifest: for the platform its index states, or `wanted`, or the one its configuration tells.
    async fn image(
        &self,
        manifest: &ImageManifest,
        manifest_bytes: Vec<u8>,
        stated: Option<Platform>,
        wanted: Option<&Platform>,
    ) -> Result<SourceImage, OciError> {
        let name = self.name();
        let config_bytes = self.config(manifest::config_descriptor(&self.manifest_name(), manifest)?).await?;
        let (found, layers) = manifest::describe(&name, manifest, &config_bytes)?;
        // Some tools leave the platform out; where both documents name one, they must agree on what can run at all.
        let silent = found.os.is_empty() || found.architecture.is_empty();
        let expected = wanted.or(stated.as_ref());
        if let Some(expected) = expected.filter(|p| !silent && (&found.os, &found.architecture) != (&p.os, &p.architecture)) {
            return Err(OciError::MissingPlatform { reference: name, wanted: expected.clone(), available: vec![found.to_string()] });
        }
        let told = if silent { wanted.cloned() } else { Some(found) };
        let Some(platform) = stated.or(told) else {
            return Err(OciError::Malformed { what: format!("the configuration of {name}"), reason: "it names no platform".to_owned() });
        };
        Ok(SourceImage { name, manifest_digest: Sha256::of(&manifest_bytes), manifest_bytes, config_bytes, platform, layers })
    }

    fn manifest_name(&self) -> String {
        format!("the manifest of {}", self.name())
    }

    fn too_deep(&self) -> OciError {
        OciError::Malformed { what: self.name(), reason: format!("more than {MAX_DEPTH} indexes lead to one another") }
    }

    /// The blob of a layer from its start. It survives broken connections; whether the bytes are right is for a
    /// [`super::VerifyReader`] to say.
    pub async fn open_layer(&self, layer: &SourceLayer) -> Result<BlobStream, OciError> {
        match self {
            Source::Registry(registry) => registry.open_blob(layer.digest, layer.size).await,
            Source::Layout(layout) => layout.open_blob(layer.digest).await,
            Source::DockerArchive(archive) => archive.open_layer(layer.digest).await,
        }
    }

    /// What a layer's stream gave was not its blob. `true`: opening it again asks another host.
    pub fn was_wrong(&self, layer: &SourceLayer) -> bool {
        match self {
            Source::Registry(registry) => registry.was_wrong(layer.digest),
            Source::Layout(_) | Source::DockerArchive(_) => false,
        }
    }

    /// The host, directory or file, for messages.
    pub fn place(&self) -> String {
        match self {
            Source::Registry(registry) => registry.host().to_owned(),
            Source::Layout(layout) => layout.path().display().to_string(),
            Source::DockerArchive(archive) => archive.path().display().to_string(),
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
            Source::DockerArchive(archive) => Ok((None, archive.image().await?.manifest.clone())),
        }
    }

    /// Manifest or index by descriptor, verified.
    async fn manifest(&self, entry: &Descriptor) -> Result<(Option<String>, Vec<u8>), OciError> {
        let digest = manifest::digest_of(&self.name(), entry)?;
        let what = format!("manifest {} of {}", digest.oci(), self.name());
        let bytes = match self {
            Source::Registry(registry) => registry.manifest(&digest.oci(), Some((digest, Some(entry.size())))).await?.bytes,
            Source::Layout(layout) => layout.blob_bytes(&what, digest, entry.size(), MAX_MANIFEST).await?,
            Source::DockerArchive(archive) => archive.image().await?.manifest.clone(),
        };
        Ok((Some(entry.media_type().to_string()), bytes))
    }

    async fn config(&self, entry: &Descriptor) -> Result<Vec<u8>, OciError> {
        let digest = manifest::digest_of(&self.name(), entry)?;
        let what = format!("configuration {} of {}", digest.oci(), self.name());
        match self {
            Source::Registry(registry) => registry.blob_bytes((digest, Some(entry.size())), MAX_CONFIG).await,
            Source::Layout(layout) => layout.blob_bytes(&what, digest, entry.size(), MAX_CONFIG).await,
            Source::DockerArchive(archive) => Ok(archive.image().await?.config.clone()),
        }
    }
}

/// The ways to write a source.
#[derive(Debug, PartialEq, Eq)]
enum Spelling<'a> {
    Layout { dir: &'a str, tag: Option<&'a str> },
    OciArchive { file: &'a str, tag: Option<&'a str> },
    DockerArchive { file: &'a str, name: Option<&'a str> },
    Reference(&'a str),
}

impl Spelling<'_> {
    fn of(text: &str, is_layout: impl Fn(&str) -> bool, exists: impl Fn(&str) -> bool) -> Spelling<'_> {
        // A name may have colons, and so may a file: the file is what exists.
        let split_file = |text| {
            let colons = || str::match_indices(text, ':').map(|(at, _)| at);
            let at = colons().find(|at| exists(&text[..*at])).or_else(|| colons().next());
            match at.filter(|_| !exists(text)) {
                Some(at) => (&text[..at], Some(&text[at + 1..])),
                None => (text, None),
            }
        };
        // A directory may have a colon in its name; a tag has no slash.
        let split = |text| match str::rsplit_once(text, ':') {
            Some((dir, tag)) if !is_layout(text) && !tag.contains('/') => Spelling::Layout { dir, tag: Some(tag) },
            _ => Spelling::Layout { dir: text, tag: None },
        };
        if let Some(path) = text.strip_prefix("oci:") {
            split(path)
        } else if let Some((file, tag)) = text.strip_prefix("oci-archive:").map(split_file) {
            Spelling::OciArchive { file, tag }
        } else if let Some((file, name)) = text.strip_prefix("docker-archive:").map(split_file) {
            Spelling::DockerArchive { file, name }
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
            ("oci-archive:/a.tar", Spelling::OciArchive { file: "/a.tar", tag: None }),
            ("oci-archive:/a.tar:1", Spelling::OciArchive { file: "/a.tar", tag: Some("1") }),
            ("oci-archive:/f:x", Spelling::OciArchive { file: "/f:x", tag: None }),
            ("docker-archive:/f:x:host:5000/app:1", Spelling::DockerArchive { file: "/f:x", name: Some("host:5000/app:1") }),
            ("docker-archive:/a.tar:app:1", Spelling::DockerArchive { file: "/a.tar", name: Some("app:1") }),
            ("docker-archive:/a.tar:@0", Spelling::DockerArchive { file: "/a.tar", name: Some("@0") }),
            ("docker://here", Spelling::Reference("here")),
            ("debian:12", Spelling::Reference("debian:12")),
            ("host:5000/app", Spelling::Reference("host:5000/app")),
        ] {
            assert_eq!(Spelling::of(text, |dir| dir == "here" || dir == "/has:colon", |file| file == "/f:x"), expected, "{text}");
        }
    }
}
