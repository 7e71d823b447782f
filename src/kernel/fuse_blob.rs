//! Backend `fuse-blob`: a flat, read-only FUSE directory of packs by digest, whose files are `device=` files of EROFS mounts.
//!
//! Stored units are answered in the reader thread that got the request, from the local file through the thread's own buffer: no other
//! thread, no allocation. Everything else becomes an [`Ask`](super::Ask). When the process dies while another keeps /dev/fuse open,
//! readers wait; the successor attaches the same packs (a pack's node is the first 8 bytes of its digest, so nodes mean the same) and
//! asks the kernel for the unanswered requests again.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use erofs::digest::Digest;
use uapi::fuse::{Errno, Negotiated, NodeId};

use super::Serve;
use crate::cache::Pack;

/// A FUSE connection being served. Dropping it stops the reader threads; the mount stays for whoever else holds the descriptor.
pub struct FuseBlob {}

/// The directory cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum FuseBlobError {
    /// The descriptor does not behave like /dev/fuse.
    #[error("cannot {action} on the FUSE device; check that /dev/fuse is the kernel's own and that the process may use it")]
    Device {
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: Errno,
    },
    /// Another attached pack has the same first 8 bytes.
    #[error("pack {pack} cannot be served beside pack {other}: both would be FUSE node {:#x}; convert one of the images again with another unit size", node.0)]
    SameNode {
        /// The pack to attach.
        pack: Digest,
        /// The pack already there.
        other: Digest,
        /// The node of both.
        node: NodeId,
    },
}

/// How the connection began.
pub enum Begin {
    /// A new mount: the kernel's INIT is to be answered. The function gets what was agreed, once, before the answer goes out; whoever keeps the
    /// descriptor keeps this with it.
    New(Box<dyn FnOnce(&Negotiated) + Send>),
    /// A connection taken over: what was agreed at its start. Unanswered requests are asked for again when serving starts.
    TakenOver(Negotiated),
}

#[allow(clippy::todo, unused_variables)]
impl FuseBlob {
    /// Prepares to serve the connection `device`. Nothing is read from it before [`FuseBlob::serve`], so packs can be attached first.
    pub fn new(device: OwnedFd, serve: Arc<dyn Serve>) -> Result<FuseBlob, FuseBlobError> {
        todo!()
    }

    /// Starts `threads` reader threads.
    pub fn serve(&self, begin: Begin, threads: usize) -> Result<(), FuseBlobError> {
        todo!()
    }

    /// Makes a pack appear under its digest.
    pub fn attach(&self, pack: &Arc<Pack>) -> Result<(), FuseBlobError> {
        todo!()
    }

    /// Makes a pack disappear. Reads through files that are still open fail.
    pub fn detach(&self, pack: &Digest) {
        todo!()
    }

    /// Stops the reader threads and waits for them. Requests not yet read wait in the kernel, for a successor or for the end of the mount.
    pub fn stop(&self) {
        todo!()
    }
}
