//! The objects of `fscache` mounts: /dev/cachefiles bound to a directory of the cache, kept across workers.
//!
//! The kernel trusts what lies in that directory, and after a crash of the machine a file may have the right length and zeros in it. So the
//! directory is used again only if the last worker ended in order after everything was on disk: it then leaves a mark beside the directory,
//! which the next one takes away. Without the mark the directory is emptied (invariant 1).

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use erofs::digest::Digest;
use uapi::cachefiles::Device;

use super::pack_dir::Keeper;
use super::{Lazy, PrepareError, Source, Way};
use crate::cache::Pack;
use crate::kernel::Serve;
use crate::kernel::fscache::{Fscache, FscacheError};

/// Name of the cache: unique on a machine (`fs/cachefiles/bind.c`).
const TAG: &str = "slipway";

/// All images share one domain, so that a pack is one object however many images use it.
const DOMAIN: &str = "slipway";

/// The cache objects could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum CacheObjectsError {
    /// The device does not work.
    #[error(transparent)]
    Device(#[from] FscacheError),
    /// The cache directory.
    #[error("the kernel's cache directory {} cannot be prepared", path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The bound device and its directory.
pub struct CacheObjects {
    dir: PathBuf,
    fscache: Fscache,
    taken_over: bool,
}

impl CacheObjects {
    /// Continues the kept device, or binds it to `dir`. Nothing is served before [`CacheObjects::serve`].
    pub fn open(dir: &Path, kept: Option<Device>, engine: Arc<dyn Serve>, mut keep: Keeper) -> Result<CacheObjects, CacheObjectsError> {
        let taken_over = kept.is_some();
        let device = match kept {
            Some(device) => device,
            None => {
                prepare(dir)?;
                let device = Fscache::bind(dir, TAG)?;
                let copy = device.try_clone_fd().map_err(failed(dir))?;
                if let Err(error) = keep(copy.as_fd(), &[]) {
                    // Readers are no worse off than without a holder: EIO when this process ends.
                    tracing::error!(%error, "the cachefiles device will not survive this worker");
                }
                device
            }
        };
        let mark = mark(dir);
        remove_if_there(&mark).and_then(|()| sync_parent(&mark)).map_err(failed(&mark))?;
        Ok(CacheObjects { dir: dir.to_owned(), fscache: Fscache::new(device, engine), taken_over })
    }

    /// Whether images mounted by an earlier worker still work.
    pub fn taken_over(&self) -> bool {
        self.taken_over
    }

    /// Makes an image's objects known: its metadata, a verified file, and its packs.
    pub fn attach(&self, digest: &Digest, metadata: &Path, packs: &[Arc<Pack>]) -> io::Result<()> {
        packs.iter().for_each(|pack| self.fscache.attach(pack.table()));
        self.fscache.attach_metadata(*digest, metadata)
    }

    /// Starts to serve; requests that an earlier worker read but did not answer come first.
    pub fn serve(&self) -> Result<(), FscacheError> {
        self.fscache.serve(self.taken_over)
    }

    /// To be called when nothing is filled any more: makes what the kernel has durable and leaves the mark that it is.
    pub fn stop(&self) {
        let mark = mark(&self.dir);
        let settled = File::open(&self.dir)
            .and_then(|dir| rustix::fs::syncfs(&dir).map_err(io::Error::from))
            .and_then(|()| File::create(&mark)?.sync_all())
            .and_then(|()| sync_parent(&mark));
        if let Err(error) = settled {
            tracing::warn!(dir = %self.dir.display(), %error, "the kernel's cache will be emptied at the next start");
        }
    }
}

impl Lazy for CacheObjects {
    fn way(&self) -> Way {
        Way::Fscache
    }

    fn prepare(&self, digest: &Digest, metadata: &Path, packs: &[Arc<Pack>]) -> Result<Source, PrepareError> {
        self.attach(digest, metadata, packs).map_err(|error| PrepareError { way: Way::Fscache, source: error.into() })?;
        Ok(Source::Fscache { fsid: digest.to_string(), domain: Some(DOMAIN.to_owned()) })
    }

    fn release(&self, packs: &[Digest]) {
        packs.iter().for_each(|pack| self.fscache.detach(pack));
    }
}

/// The file beside `dir` that says that what is in it is durable.
fn mark(dir: &Path) -> PathBuf {
    dir.with_added_extension("settled")
}

/// Makes `dir`, and empties it unless it is marked. The mark goes first: a crash in between empties it once more.
fn prepare(dir: &Path) -> Result<(), CacheObjectsError> {
    if !mark(dir).exists() {
        match fs::remove_dir_all(dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(dir)(error)),
            _ => {}
        }
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed(dir))
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> CacheObjectsError {
    let path = path.to_owned();
    move |source| CacheObjectsError::Io { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_marked_as_durable_is_emptied() {
        for (marked, kept) in [(false, false), (true, true)] {
            let temp = tempfile::tempdir().expect("a temporary directory");
            let dir = temp.path().join("fscache");
            fs::create_dir_all(dir.join("cache/Ierofs")).expect("a cache");
            if marked {
                File::create(mark(&dir)).expect("a mark");
            }
            prepare(&dir).expect("prepared");
            assert_eq!(dir.join("cache/Ierofs").exists(), kept, "marked: {marked}");
            assert!(dir.is_dir());
        }
    }
}
