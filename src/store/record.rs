//! Signed records: what a chain of layers became, in a form one signature covers.

use erofs::digest::Digest;
use erofs::meta::PackRef;

use super::key::{KeyId, SigningKey};
use super::publish::Published;
use super::trust::Trust;
use super::{Store, StoreError};
use crate::oci::{ChainId, DiffId};

/// What a record says about a chain. Its JSON is deterministic: the same payload gives the same bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Payload {
    /// The chain of layers 1..=n this is about.
    pub chain: ChainId,
    /// The chain of layers 1..=n-1; `None` for a first layer.
    pub parent: Option<ChainId>,
    /// Diff IDs of the layers, bottom first.
    pub diff_ids: Vec<DiffId>,
    /// Layer trees, bottom first, one per layer.
    pub trees: Vec<Digest>,
    /// Digest of the metadata image that folding the trees gives.
    pub metadata: Digest,
    /// [`erofs::fold`]'s version that gave it.
    pub fold_version: u32,
    /// Packs the metadata image refers to, in device order.
    pub packs: Vec<PackRef>,
    /// How much there is of it.
    pub sizes: Sizes,
    /// The chain is a whole image: its metadata image lies in the store ready-made. Otherwise it is a prefix, folded on the node.
    pub top: bool,
    /// Name and version of the program that wrote the record.
    pub tool: String,
    /// Key that signs this payload: records of one content by two keys have different names.
    pub key: KeyId,
}

/// Sizes of what a chain or an image holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sizes {
    /// Bytes of the metadata image, uncompressed.
    pub metadata: u64,
    /// Bytes of all regular files, every inode counted once: what the image is worth unpacked.
    pub content: u64,
    /// Inodes.
    pub inodes: u64,
    /// Bytes of the packs' files in the store.
    pub stored: u64,
}

/// Name of the program that writes a payload, as [`Payload::tool`] wants it.
pub fn tool() -> String {
    format!("slipway {}", env!("CARGO_PKG_VERSION"))
}

impl Payload {
    /// The payload's JSON: what is signed, and whose BLAKE3 names the record.
    pub fn encode(&self) -> Vec<u8> {
        todo!()
    }
}

impl Store {
    /// Signs and publishes a record. Everything the payload names must have been published before (invariant 2).
    pub fn put_record(&self, payload: &Payload, key: &SigningKey) -> Result<Published, StoreError> {
        let _ = (payload, key);
        todo!()
    }

    /// The first record of `chain`, names in byte order, that `trust` vouches for, whose fold version is known, that is not tombstoned and
    /// of which nothing is missing: its packs, the metadata image of a top, the trees of a prefix. `None`: the store has no such record.
    pub fn find(&self, chain: &ChainId, trust: &Trust) -> Result<Option<Payload>, StoreError> {
        let _ = (chain, trust);
        todo!()
    }
}
