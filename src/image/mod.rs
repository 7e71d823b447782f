//! From a chain ID to a mounted image: what the snapshotter asks for.
//!
//! [`Images`] joins three things: the catalog (which chains the store has, and their verified local files), the engine that serves packs,
//! and the mount tree. Its methods block: call them from a thread that may wait, never from an async one.
//!
//! A mount is keyed by the digest of its metadata image and a generation: when all packs of an image have become complete, the next
//! container gets a new `direct` mount while earlier ones stay on the mount they started with.

pub mod catalog;

use std::path::PathBuf;

use crate::oci::ChainId;

/// Why a chain could not be mounted. Variants are what the caller can do about it.
#[derive(Debug, thiserror::Error)]
pub enum ImageMountError {
    /// The chain's data is not on this node, and could not be had from the store. Nothing that a retry at once would cure.
    #[error("the data of chain {chain} is gone: neither this node nor the store has it; remove the image and pull it again")]
    Gone {
        /// The chain asked for.
        chain: ChainId,
        /// What was tried.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No way of mounting works on this machine.
    #[error("chain {chain} cannot be mounted on this machine: {reasons}")]
    NoBackend {
        /// The chain asked for.
        chain: ChainId,
        /// For each backend why not.
        reasons: String,
    },
    /// A backend should work, and the kernel or the disk refused.
    #[error("mounting chain {chain} at {} failed", at.display())]
    Refused {
        /// The chain asked for.
        chain: ChainId,
        /// Mount point.
        at: PathBuf,
        /// The refusal.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The images of this node. One per worker; share it as `Arc<Images>`.
#[derive(Debug)]
pub struct Images {}

#[allow(clippy::todo)]
impl Images {
    /// Whether a snapshot of this chain may be committed without its layers: its metadata (or, for a prefix, its layer trees) are local and
    /// verified. Answers within 300 ms: a store that takes longer is a "no" (invariant 3), and the fetch goes on for the next time.
    pub fn known(&self, chain: &ChainId) -> bool {
        let _ = chain;
        todo!()
    }

    /// Mounts the chain's file system read-only, unless it is mounted already, and gives the directory it is mounted at: an overlay lower
    /// layer. The chain counts as used until [`Images::release`]. Two calls may give different directories of the same content.
    pub fn mount(&self, chain: &ChainId) -> Result<PathBuf, ImageMountError> {
        let _ = chain;
        todo!()
    }

    /// The last snapshot that used this chain's mount is gone. Returns at once; unmounting happens in the background. A chain that is not
    /// mounted is no error.
    pub fn release(&self, chain: &ChainId) {
        let _ = chain;
        todo!()
    }

    /// To be called once, when the ledger has been read: `in_use` are the chains whose mounts live snapshots refer to. Mounts found from an
    /// earlier worker stay if one of these uses them and are released otherwise; chains in use that are not mounted (after a reboot) are
    /// mounted at their next [`Images::mount`].
    pub fn recover(&self, in_use: Vec<ChainId>) {
        let _ = in_use;
        todo!()
    }
}
