//! OCI image layout directories (image-spec `image-layout.md`).

use std::io;
use std::path::{Path, PathBuf};

use oci_spec::image::{Descriptor, ImageIndex};
use tokio::io::AsyncReadExt;

use super::OciError;
use super::digest::Sha256;
use super::manifest::{self, MAX_MANIFEST};
use super::platform::Platform;
use super::verify;

/// The annotation that holds an image's tag in `index.json`.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The file that makes a directory a layout.
pub const MARKER: &str = "oci-layout";

/// One image of a layout directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    dir: PathBuf,
    tag: Option<String>,
}

impl Layout {
    /// The image called `tag` (or the only one) in `dir`, made absolute. Nothing is read yet.
    pub fn new(dir: &Path, tag: Option<&str>) -> Result<Layout, OciError> {
        let dir = std::path::absolute(dir).map_err(|source| OciError::Layout { path: dir.to_owned(), source })?;
        Ok(Layout { dir, tag: tag.map(str::to_owned) })
    }

    /// `oci:<absolute directory>[:<tag>]`
    pub fn name(&self) -> String {
        let tag = self.tag.as_ref().map(|tag| format!(":{tag}")).unwrap_or_default();
        format!("oci:{}{tag}", self.dir.display())
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The entry of `index.json` for the tag and, where one tag has several entries, for `platform`.
    pub async fn entry(&self, platform: &Platform) -> Result<Descriptor, OciError> {
        #[derive(serde::Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Marker {
            image_layout_version: String,
        }
        let marker = self.read(&self.dir.join(MARKER), MAX_MANIFEST).await?;
        let marker: Marker = self.parse(MARKER, &marker)?;
        if !marker.image_layout_version.starts_with("1.") {
            let reason = format!("its layout version is {}; supported is 1", marker.image_layout_version);
            return Err(OciError::Unsupported { what: self.name(), reason });
        }
        let index: ImageIndex = self.parse("index.json", &self.read(&self.dir.join("index.json"), MAX_MANIFEST).await?)?;
        self.choose(index.manifests(), platform)
    }

    fn choose(&self, entries: &[Descriptor], platform: &Platform) -> Result<Descriptor, OciError> {
        let tag_of = |entry: &Descriptor| entry.annotations().as_ref().and_then(|a| a.get(REF_NAME)).cloned();
        let matching: Vec<&Descriptor> = match &self.tag {
            Some(tag) => entries.iter().filter(|entry| tag_of(entry).as_ref() == Some(tag)).collect(),
            None => entries.iter().collect(),
        };
        let mut tags: Vec<String> = entries.iter().filter_map(tag_of).collect();
        tags.sort();
        tags.dedup();
        let place = || self.dir.display().to_string();
        match (&matching[..], &self.tag) {
            ([], Some(tag)) => {
                let what = format!("tag {tag} (it has: {})", if tags.is_empty() { "none".to_owned() } else { tags.join(", ") });
                Err(OciError::NotFound { place: place(), what })
            }
            ([], None) => Err(OciError::NotFound { place: place(), what: "image in its index.json".to_owned() }),
            ([only], _) => Ok((*only).clone()),
            (_, None) if tags.len() > 1 => {
                let reason =
                    format!("the layout has several images; name one as oci:{}:TAG, TAG being one of {}", self.dir.display(), tags.join(", "));
                Err(OciError::BadReference { text: self.name(), reason })
            }
            (several, _) => manifest::choose(several.iter().copied(), platform).cloned().map_err(|available| OciError::MissingPlatform {
                reference: self.name(),
                wanted: platform.clone(),
                available,
            }),
        }
    }

    fn parse<T: serde::de::DeserializeOwned>(&self, file: &str, bytes: &[u8]) -> Result<T, OciError> {
        serde_json::from_slice(bytes).map_err(|e| OciError::Malformed { what: self.dir.join(file).display().to_string(), reason: e.to_string() })
    }

    /// Path of a blob.
    pub fn blob_path(&self, digest: Sha256) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.to_string())
    }

    /// The whole blob, of at most `limit` bytes, matching its digest and `size`.
    pub async fn blob_bytes(&self, what: &str, digest: Sha256, size: u64, limit: u64) -> Result<Vec<u8>, OciError> {
        let bytes = self.read(&self.blob_path(digest), limit).await?;
        let damaged = |source| OciError::Damaged { place: self.dir.display().to_string(), what: what.to_owned(), source: Box::new(source) };
        verify::verify_bytes(what, digest, Some(size), &bytes).map_err(damaged)?;
        Ok(bytes)
    }

    /// The blob as a stream, unverified.
    pub async fn open_blob(&self, digest: Sha256) -> Result<tokio::fs::File, OciError> {
        open_regular(&self.blob_path(digest)).await
    }

    async fn read(&self, path: &Path, limit: u64) -> Result<Vec<u8>, OciError> {
        let failed = |source| OciError::Layout { path: path.to_owned(), source };
        let mut bytes = Vec::new();
        open_regular(path).await?.take(limit + 1).read_to_end(&mut bytes).await.map_err(failed)?;
        if bytes.len() as u64 > limit {
            let reason = format!("it is larger than {limit} bytes, the most that is read of one");
            return Err(OciError::Unsupported { what: path.display().to_string(), reason });
        }
        Ok(bytes)
    }
}

/// A pipe or a device among the blobs would hang or lie.
async fn open_regular(path: &Path) -> Result<tokio::fs::File, OciError> {
    let failed = |source| OciError::Layout { path: path.to_owned(), source };
    if !tokio::fs::metadata(path).await.map_err(failed)?.is_file() {
        return Err(failed(io::Error::other("not a regular file")));
    }
    tokio::fs::File::open(path).await.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn chosen(entries: &[(Option<&str>, Option<&str>)], tag: Option<&str>) -> Result<usize, String> {
        let entries: Vec<Descriptor> = entries
            .iter()
            .enumerate()
            .map(|(i, (tag, architecture))| {
                let mut value = json!({"mediaType": "m", "digest": Sha256::of(&[i as u8]).oci(), "size": i});
                if let Some(tag) = tag {
                    value["annotations"] = json!({REF_NAME: tag});
                }
                if let Some(architecture) = architecture {
                    value["platform"] = json!({"os": "linux", "architecture": architecture});
                }
                serde_json::from_value(value).unwrap()
            })
            .collect();
        let layout = Layout::new(Path::new("/img"), tag).unwrap();
        layout.choose(&entries, &"linux/amd64".parse().unwrap()).map(|d| d.size() as usize).map_err(|e| e.to_string())
    }

    #[test]
    fn the_tag_or_the_only_image_is_chosen() {
        let (amd, arm) = (Some("amd64"), Some("arm64"));
        for (entries, tag, expected) in [
            (&[(Some("1"), None)][..], None, Ok(0)),
            (&[(None, None)], None, Ok(0)),
            (&[(Some("1"), None), (Some("2"), None)], Some("2"), Ok(1)),
            (&[(Some("1"), arm), (Some("1"), amd)], Some("1"), Ok(1)),
            (&[(None, arm), (None, amd)], None, Ok(1)),
            (&[(Some("1"), None), (Some("2"), None)], None, Err("one of 1, 2")),
            (&[(Some("1"), None)], Some("3"), Err("tag 3 (it has: 1)")),
            (&[], Some("3"), Err("none")),
            (&[], None, Err("no image in its index.json")),
            (&[(Some("1"), arm), (Some("1"), arm)], Some("1"), Err("linux/arm64")),
        ] {
            match (chosen(entries, tag), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{entries:?} {tag:?}"),
                (Err(message), Err(part)) => assert!(message.contains(part), "{message}"),
                (found, expected) => panic!("{entries:?} {tag:?}: {found:?}, expected {expected:?}"),
            }
        }
    }

    #[test]
    fn names_are_absolute() {
        assert_eq!(Layout::new(Path::new("/a/b"), Some("1")).unwrap().name(), "oci:/a/b:1");
        let relative = Layout::new(Path::new("b"), None).unwrap().name();
        assert!(relative.starts_with("oci:/") && relative.ends_with("/b"), "{relative}");
    }
}
