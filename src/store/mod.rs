//! The store on the shared file system: one directory tree of immutable, digest-named files.
//!
//! ```text
//! slipway.json                                              what makes the directory a store
//! packs/<aa>/<digest>.pack                                  file data: units, tables, footer; see `erofs::pack`
//! layers/<aa>/<diff id>.<digest>.tree.zst                   one layer's entries; see `erofs::layer`
//! layers/<aa>/<diff id>.<digest>.framing.zst                the rest of its tar; see `erofs::framing`
//! meta/<aa>/<digest>.erofs.zst                              EROFS metadata of a whole image; see `erofs::image`
//! chains/<aa>/<chain id>/<digest>.json                      signed records; see [`record`]
//! chains/<aa>/<chain id>/<digest>.tomb                      the record beside it is out of use
//! images/<aa>/<sha256 of source>/<manifest digest>.json     converted images, signed; see [`roots`]
//! images/<aa>/<sha256 of source>/<manifest digest>.*        what was made of them; see `targets`
//! nodes/  converters/                                       leases of nodes and converters
//! tmp/<32 hex digits>                                       files being written
//! trash/                                                    files taken out of use, until their grace is over
//! ```
//!
//! Digests are 64 lowercase hex digits without prefix: BLAKE3 for what Slipway makes, SHA-256 for what OCI makes (diff ID, chain ID,
//! manifest, source reference). `<aa>` is the first two digits of the path part that follows.
//!
//! **`slipway.json`**, format 1, exactly these fields:
//!
//! ```json
//! {
//!   "format": 1,
//!   "id": "<32 random hex digits>",
//!   "algorithms": { "content": "blake3", "source": "sha256", "compression": "zstd", "signature": "ed25519" }
//! }
//! ```
//!
//! A reader that meets a higher `format` touches nothing else.
//!
//! **Compressed files** (`.zst`): zstd frames (RFC 8878) of the encoded tree, framing or image, window at most 128 MiB, at most 1 GiB
//! uncompressed (a framing, which is read as a stream: 320 GiB). Their digest is that of the uncompressed bytes, so two zstd versions may write different files of one name; either
//! verifies.
//!
//! **Named means whole** (invariant 2): [`publish`] tells how a file gets its name, and what is done when the name is taken. Files are
//! never changed in place. Who reads a file verifies it, whatever its name says.
//!
//! Low to high: [`error`], [`layout`], `open`, `text`, [`key`], [`trust`], `envelope`, `content`, `framing`, [`publish`], [`record`], [`roots`], `targets`, `reach`, [`chunks`].

pub mod error;
pub mod layout;
mod open;
mod text;
pub mod key;
pub mod trust;
pub(crate) mod envelope;
mod content;
mod framing;
pub mod publish;
pub mod record;
pub mod roots;
mod targets;
mod reach;
pub mod chunks;

pub use content::MAX_UNCOMPRESSED;
pub use error::StoreError;
pub use framing::{Framing, FramingTemp};
pub use key::{KeyError, KeyId, PublicKey, SigningKey};
pub use layout::Name;
pub use publish::{Published, Temp};
pub use reach::Reach;
pub use record::{Found, LayerFiles, Payload, Sizes};
pub use roots::{ImageRoot, RootConfig, RootLayer, TrustedRoot};
pub use trust::{Trust, TrustFiles};

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, fsync, linkat, openat, unlinkat};
use rustix::io::Errno;

use error::Doing;
use layout::{DESCRIPTOR, Descriptor, DescriptorFault};

/// Longest `slipway.json` or record that is read. Ours take a few hundred bytes per layer and pack.
const MAX_JSON: u64 = 1 << 20;

/// An open store: its directory is held open, and everything is reached beneath it.
///
/// After [`StoreError::Unreachable`] open the store anew: the directory may have been mounted again meanwhile.
#[derive(Debug)]
pub struct Store {
    root: OwnedFd,
    dir: PathBuf,
    descriptor: Descriptor,
}

impl Store {
    /// Opens the store in `dir`, or makes one if `dir` is empty. For converters: sees to it that the store can be written, and removes what
    /// long-dead conversions left in `tmp/`. A missing directory is never made: more often than not its file system is not mounted.
    pub fn create(dir: &Path) -> Result<Store, StoreError> {
        let store = match Store::open(dir) {
            Err(StoreError::NotAStore { .. }) => {
                found_in(dir)?;
                Store::open(dir)?
            }
            opened => opened?,
        };
        for name in layout::DIRECTORIES {
            store.make_dirs(Path::new(name))?;
        }
        fsync(&store.root).map_err(|errno| StoreError::from_errno(Doing::Writing, dir, errno))?;
        let probe = store.temp()?;
        let stale = store.remove_stale_temps(&probe)?;
        if stale > 0 {
            tracing::info!(stale, dir = %dir.display(), "removed what earlier conversions left behind");
        }
        Ok(store)
    }

    /// Opens the store in `dir`. For nodes and readers; writes nothing.
    pub fn open(dir: &Path) -> Result<Store, StoreError> {
        // Absolute, because paths in messages and lists of temporary files outlive the working directory.
        let dir = &std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
        let root = open_root(dir)?;
        let path = dir.join(DESCRIPTOR);
        let bytes = match open::regular(&root, Path::new(DESCRIPTOR), &path) {
            Ok(file) => read_bounded(file, MAX_JSON, &path)?,
            Err(StoreError::Missing { .. }) => return Err(StoreError::NotAStore { dir: dir.to_owned() }),
            Err(error) => return Err(error),
        };
        let descriptor = Descriptor::parse(&bytes).map_err(|fault| match fault {
            DescriptorFault::Newer(found) => StoreError::NewerFormat { dir: dir.to_owned(), found, known: layout::FORMAT },
            DescriptorFault::Bad(reason) => StoreError::BadDescriptor { path, reason },
        })?;
        Ok(Store { root, dir: dir.to_owned(), descriptor })
    }

    /// The directory it was opened with, for messages.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The store's random id, 32 hex digits, made with the store.
    pub fn id(&self) -> &str {
        &self.descriptor.id
    }

    /// Opens a file of the store for reading. Never follows a symbolic link, never leaves the store, gives regular files only.
    pub fn open_file(&self, name: &Name) -> Result<File, StoreError> {
        let path = name.path();
        open::regular(&self.root, &path, &self.shown(&path))
    }

    /// How long the file of this name is, or `None` when it is not there.
    pub fn file_len(&self, name: &Name) -> Result<Option<u64>, StoreError> {
        let path = name.path();
        open::file_len(&self.root, &path, &self.shown(&path))
    }

    /// Fails if what is to be published is longer than readers take.
    fn check_size(&self, name: &Name, bytes: &[u8], max: u64) -> Result<(), StoreError> {
        if bytes.len() as u64 <= max {
            return Ok(());
        }
        let reason =
            format!("it takes {} bytes, and nobody reads more than {max}; the image has too many layers or too large a configuration", bytes.len());
        Err(StoreError::TooLarge { path: self.shown(&name.path()), reason })
    }

    /// Reads a small file whole.
    fn read_small(&self, path: &Path, max: u64) -> Result<Vec<u8>, StoreError> {
        let shown = self.shown(path);
        read_bounded(open::regular(&self.root, path, &shown)?, max, &shown)
    }

    /// The names in a directory, see [`open::names`]; none, with a warning, if something else is in its place or it holds far too many.
    fn names_passing_over(&self, dir: &Path) -> Result<Vec<String>, StoreError> {
        match open::names(&self.root, dir, &self.shown(dir)) {
            Err(error) if error.is_about_content() => {
                tracing::warn!(%error, "passing over what is no directory of the store's");
                Ok(Vec::new())
            }
            names => names,
        }
    }

    /// `path` with the store's directory before it, for messages.
    fn shown(&self, path: &Path) -> PathBuf {
        self.dir.join(path)
    }
}

/// The store's own directory may be reached over symbolic links: it comes from a command line or configuration, not from the store.
fn open_root(dir: &Path) -> Result<OwnedFd, StoreError> {
    openat(CWD, dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| match errno {
        Errno::NOTDIR => StoreError::NotAStore { dir: dir.to_owned() },
        errno => StoreError::Unreachable { path: dir.to_owned(), source: errno.into() },
    })
}

/// Writes `slipway.json` into an empty directory. It comes first, by link: of two converters that start at once, one founds the store.
fn found_in(dir: &Path) -> Result<(), StoreError> {
    const UNFINISHED: &str = ".slipway.json.";
    let root = open_root(dir)?;
    for name in open::names(&root, Path::new("."), dir)? {
        // What mkfs makes, and what a founder that was killed left.
        let harmless = name == "lost+found" || name.starts_with(UNFINISHED) || name == DESCRIPTOR;
        if !harmless {
            return Err(StoreError::NotAStore { dir: dir.to_owned() });
        }
    }
    let name = format!("{UNFINISHED}{}", random_hex());
    let path = dir.join(&name);
    let mut file = open::create(&root, &name, &path)?;
    let written = file.write_all(&Descriptor::new(random_hex()).encode()).and_then(|()| file.sync_all());
    let linked =
        written.map_err(|error| StoreError::writing(&path, error)).and_then(|()| match linkat(&root, &name, &root, DESCRIPTOR, AtFlags::empty()) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(errno) => Err(StoreError::from_errno(Doing::Writing, &dir.join(DESCRIPTOR), errno)),
        });
    // Left behind it would do no harm.
    let _ = unlinkat(&root, &name, AtFlags::empty());
    linked?;
    fsync(&root).map_err(|errno| StoreError::from_errno(Doing::Writing, dir, errno))
}

fn read_bounded(file: File, max: u64, shown: &Path) -> Result<Vec<u8>, StoreError> {
    let mut bytes = Vec::new();
    file.take(max + 1).read_to_end(&mut bytes).map_err(|error: io::Error| StoreError::from_io(Doing::Reading, shown, error))?;
    if bytes.len() as u64 > max {
        return Err(StoreError::Damaged { path: shown.to_owned(), reason: format!("it is longer than {max} bytes") });
    }
    Ok(bytes)
}

/// 128 random bits as 32 hex digits.
fn random_hex() -> String {
    let mut bytes = [0u8; 16];
    aws_lc_rs::rand::fill(&mut bytes).expect("the kernel's random number generator never fails once seeded");
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
pub(crate) mod sample;

#[cfg(test)]
mod tests {
    use std::fs;

    use testbed::{need, require};
    use uapi::mount::{Unmount, mount_with_options, unmount};

    use super::*;

    #[test]
    fn a_directory_becomes_a_store_or_is_refused() {
        let descriptor = |format: u64| {
            String::from_utf8(Descriptor::new("0123456789abcdef0123456789abcdef".into()).encode()).unwrap().replace(": 1", &format!(": {format}"))
        };
        let check = |files: &[(&str, &str)], expected: &str| {
            let dir = tempfile::tempdir().unwrap();
            for (name, text) in files {
                match name.strip_suffix('/') {
                    Some(name) => fs::create_dir(dir.path().join(name)).unwrap(),
                    None => fs::write(dir.path().join(name), text).unwrap(),
                }
            }
            let outcome = match Store::create(dir.path()) {
                Ok(store) => {
                    assert_eq!(Store::open(dir.path()).unwrap().id(), store.id());
                    assert!(layout::DIRECTORIES.iter().all(|name| dir.path().join(name).is_dir()));
                    assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
                    "store".to_owned()
                }
                Err(error) => {
                    assert!(error.to_string().contains(dir.path().to_str().unwrap()), "{error}");
                    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), files.len(), "a refused directory is left as it was");
                    error.to_string()
                }
            };
            assert!(outcome.contains(expected), "{files:?}: {outcome}");
        };
        check(&[], "store");
        check(&[("lost+found/", "")], "store");
        check(&[(".slipway.json.0123", "{\"form")], "store");
        check(&[("slipway.json", &descriptor(1))], "store");
        check(&[("slipway.json", &descriptor(1)), ("notes.txt", "")], "store");
        check(&[("notes.txt", "")], "is no Slipway store");
        check(&[("packs/", "")], "is no Slipway store");
        check(&[("slipway.json", &descriptor(2))], "format version 2, this program knows 1: use a newer Slipway");
        check(&[("slipway.json", "")], "not what Slipway writes");
        check(&[("slipway.json", &descriptor(1).replace("zstd", "lz4"))], "lz4");
    }

    #[test]
    fn a_path_that_is_no_directory_is_no_store() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), b"").unwrap();
        assert!(matches!(Store::create(&dir.path().join("file")), Err(StoreError::NotAStore { .. })));
        assert!(matches!(Store::open(&dir.path().join("none")), Err(StoreError::Unreachable { .. })));
        assert!(matches!(Store::create(&dir.path().join("none/deeper")), Err(StoreError::Unreachable { .. })));
        assert!(matches!(Store::create(&dir.path().join("none")), Err(StoreError::Unreachable { .. })));
        assert!(!dir.path().join("none").exists(), "it may be where a share is to be mounted");
        assert!(matches!(Store::open(dir.path()), Err(StoreError::NotAStore { .. })));
    }

    #[test]
    fn converters_that_start_at_once_found_one_store() {
        let dir = &tempfile::tempdir().unwrap();
        let ids: Vec<String> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| Store::create(dir.path()).unwrap().id().to_owned())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), layout::DIRECTORIES.len() + 1);
    }

    /// A tmpfs that goes away with the test.
    struct Tmpfs(tempfile::TempDir);

    impl Tmpfs {
        fn new(options: &str) -> Tmpfs {
            let dir = tempfile::tempdir().unwrap();
            mount_with_options("tmpfs", "tmpfs", dir.path(), &[options.to_owned()]).unwrap();
            Tmpfs(dir)
        }
    }

    impl Drop for Tmpfs {
        fn drop(&mut self) {
            let _ = unmount(self.0.path(), Unmount::Detach);
        }
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        aws_lc_rs::rand::fill(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_full_store_takes_nothing_and_shows_nothing() {
        require!(need::root());
        let disk = Tmpfs::new("size=256k");
        let store = Store::create(disk.0.path()).unwrap();
        let image = noise(1 << 20);
        let error = store.put_metadata(&image).unwrap_err();
        assert!(matches!(error, StoreError::Full { .. }), "{error}");
        assert!(matches!(store.read_metadata(&erofs::digest::Digest::of(&image)), Err(StoreError::Missing { .. })));
        assert_eq!(fs::read_dir(disk.0.path().join("tmp")).unwrap().count(), 0, "the space is free again");
        assert!(!disk.0.path().join("meta").read_dir().unwrap().any(|_| true));
        let small = noise(100 << 10);
        let (digest, _) = store.put_metadata(&small).unwrap();
        assert_eq!(store.read_metadata(&digest).unwrap(), small);
    }

    #[test]
    fn a_read_only_store_is_read_and_refuses_converters() {
        require!(need::root());
        let disk = Tmpfs::new("size=1m");
        let store = Store::create(disk.0.path()).unwrap();
        let (digest, _) = store.put_metadata(b"image").unwrap();
        rustix::mount::mount_remount(disk.0.path(), rustix::mount::MountFlags::RDONLY, "").unwrap();
        let error = Store::create(disk.0.path()).unwrap_err();
        assert!(matches!(error, StoreError::NotWritable { .. }), "{error}");
        assert!(matches!(store.put_metadata(b"other"), Err(StoreError::NotWritable { .. })));
        assert_eq!(Store::open(disk.0.path()).unwrap().read_metadata(&digest).unwrap(), b"image");
        let empty = Tmpfs::new("ro");
        assert!(matches!(Store::create(empty.0.path()), Err(StoreError::NotWritable { .. })));
    }
}
