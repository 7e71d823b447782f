//! The objects of `fscache` mounts: /dev/cachefiles bound to a directory of the cache, kept across workers.
//!
//! The kernel trusts what lies in that directory, and after a crash of the machine a file may have the right length and zeros in it. So the
//! directory is used again only if the last worker ended in order after everything was on disk: it then leaves a mark beside the directory,
//! which the next one takes away. Without the mark the directory is emptied (invariant 1).

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use erofs::digest::Digest;
use erofs::pack::PackTable;
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
    /// Of a device bound here, until it is served.
    keep: Mutex<Option<Keeper>>,
    /// Whether no mark of an earlier end is left, so that a new one says what it is to say.
    unmarked: bool,
}

impl CacheObjects {
    /// Continues a kept device. `payload` was kept beside it: the directory an earlier worker bound it to, which need not be the one the
    /// configuration names now. Nothing is served before [`CacheObjects::serve`].
    pub fn take_over(kept: Device, payload: &[u8], engine: Arc<dyn Serve>) -> CacheObjects {
        let dir = Path::new(OsStr::from_bytes(payload));
        // Readers wait for this device, so a cache disk that has become read-only or fails is no reason not to serve it.
        let unmarked = remove_mark(dir).inspect_err(|error| {
            tracing::error!(error = error as &dyn std::error::Error, "serving on; if the machine crashes, remove the directory and its mark by hand");
        });
        CacheObjects { unmarked: unmarked.is_ok(), ..CacheObjects::new(dir, kept, engine, None) }
    }

    /// Opens the device and binds it to `dir`. Nothing is served before [`CacheObjects::serve`].
    pub fn bind(dir: &Path, engine: Arc<dyn Serve>, keep: Keeper) -> Result<CacheObjects, CacheObjectsError> {
        // First of all: while it is open nobody else has a cache bound, so emptying the directory takes nothing from anybody.
        let device = Fscache::open()?;
        prepare(dir)?;
        Fscache::bind(&device, dir, TAG)?;
        remove_mark(dir)?;
        Ok(CacheObjects::new(dir, device, engine, Some(keep)))
    }

    fn new(dir: &Path, device: Device, engine: Arc<dyn Serve>, keep: Option<Keeper>) -> CacheObjects {
        CacheObjects { dir: dir.to_owned(), fscache: Fscache::new(device, engine), keep: Mutex::new(keep), unmarked: true }
    }

    /// Makes a pack known.
    pub fn attach(&self, table: &PackTable) {
        self.fscache.attach(table);
    }

    /// Makes an image's metadata known, a local file.
    pub fn attach_metadata(&self, digest: &Digest, metadata: &Path) -> io::Result<()> {
        self.fscache.attach_metadata(*digest, metadata)
    }

    /// Starts to serve; of a device taken over, requests that an earlier worker read but did not answer come first.
    pub fn serve(&self) -> Result<(), FscacheError> {
        let Some(mut keep) = self.keep.lock().unwrap_or_else(PoisonError::into_inner).take() else { return self.fscache.serve(true) };
        let survives = self.fscache.restore().and_then(|()| self.fscache.device());
        self.fscache.serve(false)?;
        // Kept only where a successor can have it: with a kernel that cannot `restore`, readers would wait for ever in place of getting EIO.
        // No image is mounted before this returns, so none is mounted on a device that is not kept.
        if let Err(error) = survives.and_then(|copy| keep(copy.as_fd(), self.dir.as_os_str().as_bytes())) {
            tracing::error!(%error, "the cachefiles device will not survive this worker; readers get EIO when it ends");
        }
        Ok(())
    }

    /// Reads no more requests and refuses none of those under way. Waits until nothing of metadata is being written.
    pub fn stop(&self) {
        self.fscache.stop();
    }

    /// To be called when nothing is filled any more: makes what the kernel has durable and leaves the mark that it is.
    pub fn settle(&self) {
        if !self.unmarked {
            return tracing::warn!(dir = %self.dir.display(), "the kernel's cache is not marked as durable: its earlier mark could not be removed");
        }
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
        packs.iter().for_each(|pack| self.attach(pack.table()));
        self.attach_metadata(digest, metadata).map_err(|error| PrepareError { way: Way::Fscache, source: error.into() })?;
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

/// From then on the directory is not as it was left, whatever happens.
fn remove_mark(dir: &Path) -> Result<(), CacheObjectsError> {
    let mark = mark(dir);
    remove_if_there(&mark).and_then(|()| sync_parent(&mark)).map_err(failed(&mark))
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
    use crate::cache::UnitIndex;
    use crate::kernel::Ask;
    use crate::metrics::Metrics;

    struct Nobody;

    impl Serve for Nobody {
        fn submit(&self, _: Ask) {
            unreachable!("nothing is read");
        }

        fn look_ahead(&self, _: &Arc<Pack>, _: UnitIndex) {}

        fn forget(&self, _: &Arc<Pack>) {}

        fn metrics(&self) -> &Arc<Metrics> {
            unreachable!("nothing is counted");
        }
    }

    #[test]
    fn a_device_whose_old_mark_stays_is_taken_over_and_never_marked() {
        let temp = tempfile::tempdir().expect("a temporary directory");
        let dir = temp.path().join("fscache");
        fs::create_dir(&dir).expect("a cache");
        let taken_over = || {
            let device = Device::from_kept(File::open("/dev/null").expect("a file").into());
            CacheObjects::take_over(device, dir.as_os_str().as_bytes(), Arc::new(Nobody))
        };
        // What cannot be removed as a file.
        fs::create_dir(mark(&dir)).expect("a mark");
        let objects = taken_over();
        fs::remove_dir(mark(&dir)).expect("removed");
        objects.settle();
        assert!(!mark(&dir).exists());
        taken_over().settle();
        assert!(mark(&dir).is_file());
    }

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
