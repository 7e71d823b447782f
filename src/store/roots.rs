//! Image roots: what `ls` lists and what keeps an image's content alive.

use erofs::digest::Digest;

use super::publish::Published;
use super::record::Sizes;
use super::{Store, StoreError};
use crate::oci::{ChainId, DiffId, Sha256};

/// One converted image of one platform.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    pub metadata: Digest,
    /// The layers, bottom first.
    pub layers: Vec<RootLayer>,
    /// Sizes of the whole image.
    pub sizes: Sizes,
}

/// One layer of an image root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootLayer {
    /// Digest of the layer blob in the registry.
    pub blob: Sha256,
    /// Bytes of that blob.
    pub size: u64,
    /// Diff ID.
    pub diff_id: DiffId,
    /// Layer tree in the store.
    pub tree: Digest,
}

impl Store {
    /// Publishes an image root, replacing what was said of the same source and manifest.
    pub fn put_image(&self, root: &ImageRoot) -> Result<Published, StoreError> {
        let _ = root;
        todo!()
    }

    /// All image roots, ordered by source reference, then manifest. Files that are no image roots come as errors beside them.
    pub fn images(&self) -> Result<Vec<Result<ImageRoot, StoreError>>, StoreError> {
        todo!()
    }
}
