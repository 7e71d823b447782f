//! The directory of packs: a FUSE mount whose files are the devices of `fuse-blob` mounts, kept across workers.
//!
//! Its connection must outlive every image mounted through it. So the descriptor goes to a [`Keeper`] before the kernel's INIT is answered: no
//! image can be mounted earlier, and a worker that dies after that has a successor which continues the same connection.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use erofs::digest::Digest;
use uapi::fuse::Negotiated;
use uapi::mount::{FuseOptions, MountError, Unmount, fuse_open, is_mount_point, unmount};

use super::{Lazy, PrepareError, Source, Way};
use crate::cache::Pack;
use crate::kernel::Serve;
use crate::kernel::fuse_blob::{Begin, FuseBlob, FuseBlobError};

/// Readers of /dev/fuse. Each answers cached data itself, so this bounds how many cached reads run at once, not how many may wait for the store.
const READER_THREADS: usize = 4;

/// More mounts than this on top of each other at the directory means that unmounting does not work.
const STACKED_MOUNTS_MAX: usize = 16;

/// Keeps a descriptor and some bytes for the next worker.
pub type Keeper = Box<dyn FnMut(BorrowedFd<'_>, &[u8]) -> std::io::Result<()> + Send>;

/// The directory of packs could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum PackDirError {
    /// FUSE does not work here.
    #[error("the FUSE directory of packs cannot be mounted")]
    Mount(#[from] MountError),
    /// The connection does not work.
    #[error("the FUSE directory of packs at {} cannot be served", at.display())]
    Serve {
        /// Mount point.
        at: PathBuf,
        /// Why.
        #[source]
        source: FuseBlobError,
    },
    /// What was kept beside the connection is nothing this version knows.
    #[error("the kept connection of the directory of packs at {} was agreed on by another version of slipwayd: install one that knows it", at.display())]
    Unknown {
        /// Mount point.
        at: PathBuf,
    },
    /// The file system refuses.
    #[error("the directory of packs cannot be made at {}", at.display())]
    Io {
        /// Mount point.
        at: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// The mounted and served directory.
pub struct PackDir {
    at: PathBuf,
    connection: FuseBlob,
}

impl PackDir {
    /// Continues a kept connection, with what was kept beside it. Nothing is served before [`PackDir::serve`].
    pub fn take_over(at: &Path, kept: OwnedFd, payload: &[u8], engine: Arc<dyn Serve>) -> Result<(PackDir, Start), PackDirError> {
        let negotiated = Negotiated::from_bytes(payload).ok_or_else(|| PackDirError::Unknown { at: at.to_owned() })?;
        let connection = FuseBlob::new(kept, engine).map_err(|source| PackDirError::Serve { at: at.to_owned(), source })?;
        Ok((PackDir { at: at.to_owned(), connection }, Start(Begin::TakenOver(negotiated))))
    }

    /// Mounts a new directory at `at`, instead of a dead one if there is. Nothing is served before [`PackDir::serve`].
    pub fn mount(at: &Path, engine: Arc<dyn Serve>, mut keep: Keeper) -> Result<(PackDir, Start), PackDirError> {
        let io = |source| PackDirError::Io { at: at.to_owned(), source };
        clear(at)?;
        std::fs::create_dir_all(at).map_err(io)?;
        let device = fuse_open(at, FuseOptions { source: "slipway", subtype: "slipway", max_read: uapi::fuse::READ_MAX as u32 })?;
        let copy = device.try_clone().map_err(io)?;
        let connection = FuseBlob::new(device, engine).map_err(|source| PackDirError::Serve { at: at.to_owned(), source })?;
        let begin = Begin::New(Box::new(move |negotiated: &Negotiated| {
            if let Err(error) = keep(copy.as_fd(), &negotiated.to_bytes()) {
                // Readers are no worse off than without a holder: EIO when this process ends.
                tracing::error!(%error, "the FUSE connection will not survive this worker");
            }
        }));
        Ok((PackDir { at: at.to_owned(), connection }, Start(begin)))
    }

    /// Unmounts the directory unless anything reads through it, which the kernel knows. True when it is gone.
    pub fn unmount_unused(&self) -> bool {
        unmount(&self.at, Unmount::IfUnused).inspect_err(|error| tracing::debug!(%error, "the directory of packs stays")).is_ok()
    }

    /// Makes a pack readable. To be done for the packs of all images mounted through a taken-over connection before [`PackDir::serve`].
    pub fn attach(&self, pack: &Arc<Pack>) -> Result<(), FuseBlobError> {
        self.connection.attach(pack)
    }

    /// Starts to serve; requests that an earlier worker read but did not answer come first.
    pub fn serve(&self, start: Start) -> Result<(), PackDirError> {
        self.connection.serve(start.0, READER_THREADS).map_err(|source| PackDirError::Serve { at: self.at.clone(), source })
    }

    /// Stops serving and waits until no thread does. The mount stays; its requests wait in the kernel.
    pub fn stop(&self) {
        self.connection.stop();
    }
}

/// How [`PackDir::serve`] is to begin.
pub struct Start(Begin);

impl Lazy for PackDir {
    fn way(&self) -> Way {
        Way::FuseBlob
    }

    fn prepare(&self, _digest: &Digest, _metadata: &Path, packs: &[Arc<Pack>]) -> Result<Source, PrepareError> {
        for pack in packs {
            self.attach(pack).map_err(|error| PrepareError { way: Way::FuseBlob, source: error.into() })?;
        }
        Ok(Source::Files(packs.iter().map(|pack| self.at.join(pack.digest().to_string())).collect()))
    }

    fn release(&self, packs: &[Digest]) {
        for pack in packs {
            self.connection.detach(pack);
        }
    }
}

/// Takes away what is mounted at `at`. Its server is gone, so it is detached: whoever reads through it gets errors already.
fn clear(at: &Path) -> Result<(), PackDirError> {
    for _ in 0..STACKED_MOUNTS_MAX {
        if !is_mount_point(at).map_err(|source| PackDirError::Io { at: at.to_owned(), source })? {
            return Ok(());
        }
        unmount(at, Unmount::Detach)?;
    }
    Err(PackDirError::Io { at: at.to_owned(), source: std::io::Error::other("old mounts cannot be taken away") })
}
