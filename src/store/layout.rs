//! Names of the store's files and where they lie.

use std::path::PathBuf;

use erofs::digest::Digest;

use crate::oci::{ChainId, DiffId, Sha256};

/// A file of the store, by what it is. [`Name::path`] says where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Name {
    /// File data: `packs/<aa>/<digest>.pack`, the digest being the BLAKE3 of the pack's footer.
    Pack(Digest),
    /// A layer tree, zstd: `layers/<aa>/<diff id>.<digest>.tree.zst`, the digest being the BLAKE3 of the uncompressed bytes.
    Tree {
        /// Diff ID of the layer the tree was made from.
        diff_id: DiffId,
        /// BLAKE3 of the uncompressed tree.
        digest: Digest,
    },
    /// A metadata image, zstd: `meta/<aa>/<digest>.erofs.zst`, the digest being the BLAKE3 of the uncompressed bytes.
    Meta(Digest),
    /// A signed record: `chains/<aa>/<chain id>/<digest>.json`, the digest being the BLAKE3 of the payload.
    Record {
        /// The chain the record is about.
        chain: ChainId,
        /// BLAKE3 of the payload.
        digest: Digest,
    },
    /// An image root: `images/<aa>/<sha256 of the source reference>/<manifest digest>.json`.
    Image {
        /// SHA-256 of the canonical source reference.
        source: Sha256,
        /// Digest of the platform manifest.
        manifest: Sha256,
    },
}

impl Name {
    /// Path below the store's directory. `<aa>` is the first two hex digits of the part that follows it.
    pub fn path(&self) -> PathBuf {
        todo!()
    }
}
