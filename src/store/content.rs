//! Layer trees and metadata images: zstd on the store, verified by the BLAKE3 of their uncompressed bytes.

use erofs::digest::Digest;
use erofs::layer::LayerTree;

use super::publish::Published;
use super::{Store, StoreError};
use crate::oci::DiffId;

impl Store {
    /// The layer tree of this name, its bytes verified against `digest`. Errors: [`StoreError::Missing`], [`StoreError::Damaged`], trouble reaching it.
    pub fn read_tree(&self, diff_id: &DiffId, digest: &Digest) -> Result<LayerTree, StoreError> {
        let _ = (diff_id, digest);
        todo!()
    }

    /// The same as [`Store::read_tree`], as the encoded bytes.
    pub fn read_tree_bytes(&self, diff_id: &DiffId, digest: &Digest) -> Result<Vec<u8>, StoreError> {
        let _ = (diff_id, digest);
        todo!()
    }

    /// Publishes a layer tree; gives its digest.
    pub fn put_tree(&self, diff_id: &DiffId, tree: &LayerTree) -> Result<(Digest, Published), StoreError> {
        let _ = (diff_id, tree);
        todo!()
    }

    /// The metadata image of this name: its uncompressed bytes, verified. Errors as for [`Store::read_tree`].
    pub fn read_metadata(&self, digest: &Digest) -> Result<Vec<u8>, StoreError> {
        let _ = digest;
        todo!()
    }

    /// Publishes a metadata image; gives its digest.
    pub fn put_metadata(&self, bytes: &[u8]) -> Result<(Digest, Published), StoreError> {
        let _ = bytes;
        todo!()
    }
}
