//! The node's side of the store: from a chain ID to verified local files.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use erofs::digest::Digest;
use erofs::meta::PackRef;

use crate::oci::ChainId;
use crate::store::{Payload, Sizes, StoreError, TrustFiles};

/// Answers "is chain X usable here?" and "where are its files?".
#[derive(Debug)]
pub struct Catalog {}

/// A chain's metadata image, local and verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalImage {
    /// Digest of the metadata image.
    pub digest: Digest,
    /// The image file, complete and read-only.
    pub meta: PathBuf,
    /// Packs, in the order of the image's device table.
    pub packs: Vec<PackRef>,
}

/// A chain's image cannot be made local.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// placeholder
    #[error("placeholder")]
    Store(#[source] StoreError),
}

impl Catalog {
    /// A catalog over the store in `store` with its local files below `state`. Touches neither: a store that is missing, broken or hung
    /// now is tried again with each question (invariant 4).
    pub fn new(store: PathBuf, state: PathBuf, trust: TrustFiles) -> Catalog {
        let _ = (store, state, trust);
        todo!()
    }

    /// Whether `chain` can be committed: its record is trusted and, local and verified, its metadata image (a top) or layer trees (a
    /// prefix) are here. Returns by `deadline` whatever the store does (invariant 3); the fetch goes on in the background.
    pub fn known(&self, chain: &ChainId, deadline: Instant) -> Option<Arc<Payload>> {
        let _ = (chain, deadline);
        todo!()
    }

    /// The local files of a chain that was found before, also by an earlier process. Blocks: folds a prefix on first use, fetches
    /// again what has been lost locally.
    pub fn local(&self, chain: &ChainId) -> Result<LocalImage, CatalogError> {
        let _ = chain;
        todo!()
    }

    /// Sizes of a chain that was found before, from its record. Never touches the store.
    pub fn sizes(&self, chain: &ChainId) -> Option<Sizes> {
        let _ = chain;
        todo!()
    }
}
