//! Archives of `docker save`: `manifest.json` names configuration and layers, which lie beside it (moby `image/tarexport`; since
//! Docker 25 as the blobs of an OCI layout).
//!
//! Such an archive has no manifest in OCI's sense, so one is made of it: configuration and layers as they lie in the archive, keys
//! sorted, no spaces. Its digest is the image's manifest digest; the same archive always gives the same.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::sync::OnceCell;

use super::OciError;
use super::archive::{Archive, Part};
use super::blob::BlobStream;
use super::digest::{Hasher, Sha256};
use super::layout;
use super::manifest::{self, MAX_CONFIG, MAX_MANIFEST};
use super::reference::Reference;
use super::verify;

/// The file that lists the images.
const LIST: &str = "manifest.json";
/// Where archives that are layouts have their blobs.
const BLOBS: &str = "blobs/sha256/";
/// Hashed at once.
const HASH_READ: usize = 256 << 10;

/// One image of an archive. Cheap to clone.
#[derive(Clone, Debug)]
pub struct DockerArchive {
    archive: Archive,
    wanted: Option<Wanted>,
    image: Arc<OnceCell<Image>>,
}

/// Which image of several.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wanted {
    Name(Reference),
    Number(usize),
}

/// What the archive has of an image.
#[derive(Debug)]
pub(super) struct Image {
    /// The manifest made for it.
    pub manifest: Vec<u8>,
    /// Its configuration.
    pub config: Vec<u8>,
    layers: HashMap<Sha256, Part>,
}

/// An image in [`LIST`].
#[derive(serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Listed {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Option<Vec<String>>,
}

impl DockerArchive {
    /// The image called `wanted` (a name, or `@` and its number from 0), or the only one. Nothing is read yet.
    pub fn new(path: &Path, wanted: Option<&str>) -> Result<DockerArchive, OciError> {
        let number = |text: &str| {
            let reason = "after @ expected the number of an image in the archive, from 0".to_owned();
            text.parse().map(Wanted::Number).map_err(|_| OciError::BadReference { text: format!("@{text}"), reason })
        };
        let wanted = wanted.map(|text| match text.strip_prefix('@') {
            Some(text) => number(text),
            None => text.parse().map(Wanted::Name),
        });
        Ok(DockerArchive { archive: Archive::new(path)?, wanted: wanted.transpose()?, image: Arc::default() })
    }

    /// `docker-archive:<absolute file>[:<full reference>|:@<number>]`
    pub fn name(&self) -> String {
        let wanted = match &self.wanted {
            None => String::new(),
            Some(Wanted::Name(name)) => format!(":{name}"),
            Some(Wanted::Number(number)) => format!(":@{number}"),
        };
        format!("docker-archive:{}{wanted}", self.archive.path().display())
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.archive.path()
    }

    /// The image's documents.
    pub(super) async fn image(&self) -> Result<&Image, OciError> {
        self.image.get_or_try_init(|| self.read()).await
    }

    /// The layer with this digest as a stream, unverified.
    pub async fn open_layer(&self, digest: Sha256) -> Result<BlobStream, OciError> {
        let part = self.image().await?.layers.get(&digest).copied();
        self.archive.stream(part.ok_or_else(|| self.archive.unusable(format!("it has no layer {}", digest.oci())))?).await
    }

    async fn read(&self) -> Result<Image, OciError> {
        let Some(list) = self.archive.find(LIST).await? else {
            let hint = match self.archive.find(layout::MARKER).await? {
                Some(_) => format!("it is an OCI layout, so write oci-archive:{}", self.path().display()),
                None => "is it made by `docker save`?".to_owned(),
            };
            return Err(self.archive.unusable(format!("there is no {LIST} in it: {hint}")));
        };
        let list = self.archive.read(LIST, list, MAX_MANIFEST).await?;
        let list: Vec<Listed> = serde_json::from_slice(&list).map_err(|e| self.archive.unusable(format!("{LIST} is malformed: {e}")))?;
        let listed = self.choose(&list)?;
        let config = self.archive.read(&listed.config, self.archive.part(&listed.config).await?, MAX_CONFIG).await?;
        let config_digest = Sha256::of(&config);
        if let Some(expected) = digest_in(&listed.config) {
            let damaged =
                |source| OciError::Damaged { place: self.path().display().to_string(), what: listed.config.clone(), source: Box::new(source) };
            verify::verify_bytes(&listed.config, expected, None, &config).map_err(damaged)?;
        }
        let diff_ids = manifest::diff_ids(&self.name(), &config)?;
        let mut layers = HashMap::new();
        let mut descriptors = Vec::new();
        for (i, name) in listed.layers.iter().flatten().enumerate() {
            let part = self.archive.part(name).await?;
            let (suffix, plain) = self.compression(part).await?;
            let digest = match (name.strip_prefix(BLOBS).and_then(digest_in), diff_ids.get(i)) {
                (Some(digest), _) => digest,
                (None, Some(diff_id)) if plain => diff_id.0,
                _ => self.hash(part).await?,
            };
            layers.insert(digest, part);
            let media_type = format!("application/vnd.oci.image.layer.v1.tar{suffix}");
            descriptors.push(json!({"mediaType": media_type, "digest": digest.oci(), "size": part.len}));
        }
        let config_descriptor = json!({"mediaType": manifest::CONFIG_TYPES[0], "digest": config_digest.oci(), "size": config.len()});
        let manifest = json!({"schemaVersion": 2, "mediaType": manifest::OCI_MANIFEST, "config": config_descriptor, "layers": descriptors});
        Ok(Image { manifest: manifest.to_string().into_bytes(), config, layers })
    }

    fn choose<'a>(&self, list: &'a [Listed]) -> Result<&'a Listed, OciError> {
        let tags = |listed: &Listed| listed.repo_tags.clone().unwrap_or_default();
        let has = |listed: &Listed, name: &Reference| tags(listed).iter().any(|tag| tag.parse().is_ok_and(|tag: Reference| tag == *name));
        let found = match &self.wanted {
            Some(Wanted::Number(number)) => list.get(*number),
            // Of several with one name the last counts, as when they are loaded one after the other.
            Some(Wanted::Name(name)) => list.iter().rev().find(|listed| has(listed, name)),
            None if list.len() > 1 => None,
            None => list.first(),
        };
        found.ok_or_else(|| {
            let choices = list.iter().enumerate().map(|(i, listed)| format!("@{i} {}", tags(listed).join(" ")).trim().to_owned());
            let choices = if list.is_empty() { "nothing".to_owned() } else { choices.collect::<Vec<_>>().join(", ") };
            match &self.wanted {
                Some(_) => {
                    OciError::NotFound { place: self.path().display().to_string(), what: format!("image {} (it has: {choices})", self.name()) }
                }
                None => {
                    let reason = format!("the archive has: {choices}; name one as docker-archive:FILE:NAME or docker-archive:FILE:@NUMBER");
                    OciError::BadReference { text: self.name(), reason }
                }
            }
        })
    }

    /// The suffix of the media type for the layer's compression, and whether there is none.
    async fn compression(&self, part: Part) -> Result<(&'static str, bool), OciError> {
        let mut start = Vec::new();
        let failed = |e: std::io::Error| self.archive.unusable(e.to_string());
        self.archive.stream(part).await?.take(4).read_to_end(&mut start).await.map_err(failed)?;
        Ok(match start[..] {
            [0x1f, 0x8b, ..] => ("+gzip", false),
            [0x28, 0xb5, 0x2f, 0xfd] => ("+zstd", false),
            _ => ("", true),
        })
    }

    async fn hash(&self, part: Part) -> Result<Sha256, OciError> {
        let mut stream = self.archive.stream(part).await?;
        let mut hasher = Hasher::new();
        let mut buffer = vec![0; HASH_READ];
        loop {
            match stream.read(&mut buffer).await.map_err(|e| self.archive.unusable(e.to_string()))? {
                0 => return Ok(hasher.finish()),
                len => hasher.update(&buffer[..len]),
            }
        }
    }
}

/// The digest that a file is named by: `<hex>`, `<hex>.json`, `blobs/sha256/<hex>`.
fn digest_in(name: &str) -> Option<Sha256> {
    let file = name.rsplit('/').next().unwrap_or(name);
    file.strip_suffix(".json").unwrap_or(file).parse().ok()
}
