//! OCI image layouts (image-spec `image-layout.md`), in a directory or in a tar file.

use std::io;
use std::path::{Path, PathBuf};

use oci_spec::image::{Descriptor, ImageIndex};
use tokio::io::AsyncReadExt;

use super::OciError;
use super::archive::Archive;
use super::blob::BlobStream;
use super::digest::Sha256;
use super::manifest::{self, MAX_MANIFEST};
use super::platform::Platform;
use super::verify;

/// The annotation that holds an image's tag in `index.json`.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The file that makes a directory a layout.
pub const MARKER: &str = "oci-layout";

/// One image of a layout. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Layout {
    files: Files,
    tag: Option<String>,
}

/// Where a layout's files are.
#[derive(Clone, Debug)]
enum Files {
    Dir(PathBuf),
    Archive(Archive),
}

impl Layout {
    /// The image called `tag` (or the only one) in `dir`, made absolute. Nothing is read yet.
    pub fn in_dir(dir: &Path, tag: Option<&str>) -> Result<Layout, OciError> {
        let dir = std::path::absolute(dir).map_err(|source| OciError::Layout { path: dir.to_owned(), source })?;
        Ok(Layout { files: Files::Dir(dir), tag: tag.map(str::to_owned) })
    }

    /// The same for a tar file.
    pub fn in_archive(file: &Path, tag: Option<&str>) -> Result<Layout, OciError> {
        Ok(Layout { files: Files::Archive(Archive::new(file)?), tag: tag.map(str::to_owned) })
    }

    /// `oci:<absolute directory>[:<tag>]` or `oci-archive:<absolute file>[:<tag>]`
    pub fn name(&self) -> String {
        let tag = self.tag.as_ref().map(|tag| format!(":{tag}")).unwrap_or_default();
        format!("{}:{}{tag}", self.transport(), self.path().display())
    }

    fn transport(&self) -> &'static str {
        match self.files {
            Files::Dir(_) => "oci",
            Files::Archive(_) => "oci-archive",
        }
    }

    /// The directory or file.
    pub fn path(&self) -> &Path {
        match &self.files {
            Files::Dir(dir) => dir,
            Files::Archive(archive) => archive.path(),
        }
    }

    /// The entry of `index.json` for the tag and, where one tag has several entries, for `platform`.
    pub async fn entry(&self, platform: &Platform) -> Result<Descriptor, OciError> {
        self.choose(self.index().await?.manifests(), platform)
    }

    /// All entries of `index.json` for the tag.
    pub async fn entries(&self) -> Result<Vec<Descriptor>, OciError> {
        let index = self.index().await?;
        let matching = self.matching(index.manifests())?;
        Ok(matching.into_iter().cloned().collect())
    }

    async fn index(&self) -> Result<ImageIndex, OciError> {
        #[derive(serde::Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Marker {
            image_layout_version: String,
        }
        if let Files::Archive(archive) = &self.files
            && archive.find(MARKER).await?.is_none()
            && archive.find("manifest.json").await?.is_some()
        {
            let reason = format!("it is of `docker save`, no OCI layout: write docker-archive:{}", archive.path().display());
            return Err(archive.unusable(reason));
        }
        let marker = self.read(MARKER, MAX_MANIFEST).await?;
        let marker: Marker = self.parse(MARKER, &marker)?;
        if !marker.image_layout_version.starts_with("1.") {
            let reason = format!("its layout version is {}; supported is 1", marker.image_layout_version);
            return Err(OciError::Unsupported { what: self.name(), reason });
        }
        self.parse("index.json", &self.read("index.json", MAX_MANIFEST).await?)
    }

    fn choose(&self, entries: &[Descriptor], platform: &Platform) -> Result<Descriptor, OciError> {
        match &self.matching(entries)?[..] {
            [only] => Ok((*only).clone()),
            several => manifest::choose(several.iter().copied(), platform).cloned().map_err(|available| OciError::MissingPlatform {
                reference: self.name(),
                wanted: platform.clone(),
                available,
            }),
        }
    }

    /// The entries for the tag, at least one.
    fn matching<'a>(&self, entries: &'a [Descriptor]) -> Result<Vec<&'a Descriptor>, OciError> {
        let tag_of = |entry: &Descriptor| entry.annotations().as_ref().and_then(|a| a.get(REF_NAME)).cloned();
        let matching: Vec<&Descriptor> = match &self.tag {
            Some(tag) => entries.iter().filter(|entry| tag_of(entry).as_ref() == Some(tag)).collect(),
            None => entries.iter().collect(),
        };
        let mut tags: Vec<String> = entries.iter().filter_map(tag_of).collect();
        tags.sort();
        tags.dedup();
        let place = || self.path().display().to_string();
        match (&matching[..], &self.tag) {
            ([], Some(tag)) => {
                let what = format!("tag {tag} (it has: {})", if tags.is_empty() { "none".to_owned() } else { tags.join(", ") });
                Err(OciError::NotFound { place: place(), what })
            }
            ([], None) => Err(OciError::NotFound { place: place(), what: "image in its index.json".to_owned() }),
            ([_, _, ..], None) if tags.len() > 1 => {
                let (transport, path) = (self.transport(), self.path().display());
                let reason = format!("the layout has several images; name one as {transport}:{path}:TAG, TAG being one of {}", tags.join(", "));
                Err(OciError::BadReference { text: self.name(), reason })
            }
            _ => Ok(matching),
        }
    }

    fn parse<T: serde::de::DeserializeOwned>(&self, file: &str, bytes: &[u8]) -> Result<T, OciError> {
        let what = || self.path().join(file).display().to_string();
        serde_json::from_slice(bytes).map_err(|e| OciError::Malformed { what: what(), reason: e.to_string() })
    }

    /// The whole blob, of at most `limit` bytes, matching its digest and `size`.
    pub async fn blob_bytes(&self, what: &str, digest: Sha256, size: u64, limit: u64) -> Result<Vec<u8>, OciError> {
        let bytes = self.read(&blob_name(digest), limit).await?;
        let damaged = |source| OciError::Damaged { place: self.path().display().to_string(), what: what.to_owned(), source: Box::new(source) };
        verify::verify_bytes(what, digest, Some(size), &bytes).map_err(damaged)?;
        Ok(bytes)
    }

    /// The blob as a stream, unverified.
    pub async fn open_blob(&self, digest: Sha256) -> Result<BlobStream, OciError> {
        let name = blob_name(digest);
        match &self.files {
            Files::Dir(dir) => Ok(Box::new(open_regular(&dir.join(name)).await?)),
            Files::Archive(archive) => archive.stream(archive.part(&name).await?).await,
        }
    }

    async fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, OciError> {
        let dir = match &self.files {
            Files::Dir(dir) => dir,
            Files::Archive(archive) => return archive.read(name, archive.part(name).await?, limit).await,
        };
        let path = dir.join(name);
        let failed = |source| OciError::Layout { path: path.clone(), source };
        let mut bytes = Vec::new();
        open_regular(&path).await?.take(limit + 1).read_to_end(&mut bytes).await.map_err(failed)?;
        if bytes.len() as u64 > limit {
            let reason = format!("it is larger than {limit} bytes, the most that is read of one");
            return Err(OciError::Unsupported { what: path.display().to_string(), reason });
        }
        Ok(bytes)
    }
}

fn blob_name(digest: Sha256) -> String {
    format!("blobs/sha256/{digest}")
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
        let layout = Layout::in_dir(Path::new("/img"), tag).unwrap();
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
        assert_eq!(Layout::in_dir(Path::new("/a/b"), Some("1")).unwrap().name(), "oci:/a/b:1");
        let relative = Layout::in_dir(Path::new("b"), None).unwrap().name();
        assert!(relative.starts_with("oci:/") && relative.ends_with("/b"), "{relative}");
    }
}
