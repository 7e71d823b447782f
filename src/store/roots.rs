//! Image roots: what `ls` lists and what keeps an image's content alive.
//!
//! `images/<aa>/<sha256 of source reference>/<manifest digest>.json` holds the JSON of an [`ImageRoot`], fields in the order of the
//! struct, indented. It is not signed: it says what to keep, never what to believe.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use erofs::digest::Digest;
use serde::{Deserialize, Serialize};

use super::publish::Published;
use super::record::Sizes;
use super::{Name, Store, StoreError, open, text};
use crate::oci::{ChainId, DiffId, Sha256};

/// One converted image of one platform.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageRoot {
    /// Canonical reference of the source.
    pub source: String,
    /// Reference of the accelerated target, when one was pushed.
    pub target: Option<String>,
    /// Platform, as `os/arch[/variant]`.
    pub platform: String,
    /// Digest of the source's platform manifest.
    pub manifest: Sha256,
    /// Chain of all its layers.
    pub chain: ChainId,
    /// Digest of the metadata image.
    #[serde(with = "text::one")]
    pub metadata: Digest,
    /// The layers, bottom first.
    pub layers: Vec<RootLayer>,
    /// Sizes of the whole image.
    pub sizes: Sizes,
}

/// One layer of an image root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RootLayer {
    /// Digest of the layer blob in the registry.
    pub blob: Sha256,
    /// Bytes of that blob.
    pub size: u64,
    /// Diff ID.
    pub diff_id: DiffId,
    /// Layer tree in the store.
    #[serde(with = "text::one")]
    pub tree: Digest,
}

impl ImageRoot {
    /// Name of its file.
    pub fn name(&self) -> Name {
        Name::Image { source: Sha256::of(self.source.as_bytes()), manifest: self.manifest }
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("a struct of strings, numbers and lists is JSON");
        bytes.push(b'\n');
        bytes
    }
}

impl Store {
    /// Publishes an image root, replacing what was said of the same source and manifest. It comes last in a conversion: everything it
    /// names must have been published before (invariant 2).
    pub fn put_image(&self, root: &ImageRoot) -> Result<Published, StoreError> {
        let mut temp = self.temp()?;
        temp.write_all(&root.encode()).map_err(|error| StoreError::writing(temp.path(), error))?;
        self.publish(temp, &root.name())
    }

    /// All image roots, ordered by source reference, then manifest; then, as errors, the files there that are no image roots.
    pub fn images(&self) -> Result<Vec<Result<ImageRoot, StoreError>>, StoreError> {
        let (mut roots, mut errors) = (Vec::new(), Vec::new());
        for path in self.files_below(Path::new("images"), 2)? {
            match self.read_root(&path) {
                Ok(root) => roots.push(root),
                Err(error) if error.is_about_content() => errors.push(Err(error)),
                Err(error) => return Err(error),
            }
        }
        roots.sort_by(|a, b| (&a.source, a.manifest).cmp(&(&b.source, b.manifest)));
        Ok(roots.into_iter().map(Ok).chain(errors).collect())
    }

    fn read_root(&self, path: &Path) -> Result<ImageRoot, StoreError> {
        let damaged = |reason: String| StoreError::Damaged { path: self.shown(path), reason };
        let root: ImageRoot = serde_json::from_slice(&self.read_small(path)?).map_err(|error| damaged(error.to_string()))?;
        if root.name().path() != path {
            return Err(damaged("it is the root of another image than its name says".to_owned()));
        }
        Ok(root)
    }

    /// Paths of what lies `depth` directories below `dir`. What is no directory on the way down is passed over.
    fn files_below(&self, dir: &Path, depth: usize) -> Result<Vec<PathBuf>, StoreError> {
        let mut dirs = vec![dir.to_owned()];
        for _ in 0..=depth {
            let mut next = Vec::new();
            for dir in &dirs {
                match open::names(&self.root, dir, &self.shown(dir)) {
                    Ok(names) => next.extend(names.iter().map(|name| dir.join(name))),
                    Err(StoreError::Foreign { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            dirs = next;
        }
        Ok(dirs)
    }
}
