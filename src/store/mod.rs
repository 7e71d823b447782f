//! The store on the shared file system: one directory tree of immutable, digest-named files.
//!
//! ```text
//! slipway.json                                              what makes the directory a store
//! packs/<aa>/<digest>.pack                                  file data: units, tables, footer; see `erofs::pack`
//! layers/<aa>/<diff id>.<digest>.tree.zst                   one layer's entries; see `erofs::layer`
//! meta/<aa>/<digest>.erofs.zst                              EROFS metadata of a whole image; see `erofs::image`
//! chains/<aa>/<chain id>/<digest>.json                      signed records; see [`record`]
//! chains/<aa>/<chain id>/<digest>.tomb                      the record beside it is out of use
//! images/<aa>/<sha256 of source>/<manifest digest>.json     converted images; see [`roots`]
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
//! **Compressed files** (`.zst`): zstd frames (RFC 8878) of the encoded tree or image, window at most 128 MiB, at most 1 GiB
//! uncompressed. Their digest is that of the uncompressed bytes, so two zstd versions may write different files of one name; either
//! verifies.
//!
//! **Named means whole** (invariant 2): [`publish`] tells how a file gets its name, and what is done when the name is taken. Files are
//! never changed in place. Who reads a file verifies it, whatever its name says.
//!
//! Low to high: [`error`], [`layout`], `open`, `text`, [`key`], [`trust`], `content`, [`publish`], [`record`], [`roots`], [`chunks`].

pub mod error;
pub mod layout;
mod open;
mod text;
pub mod key;
pub mod trust;
mod content;
pub mod publish;
pub mod record;
pub mod roots;
pub mod chunks;

pub use content::MAX_UNCOMPRESSED;
pub use error::StoreError;
pub use key::{KeyError, KeyId, PublicKey, SigningKey};
pub use layout::Name;
pub use publish::{Published, Temp};
pub use record::{Found, Payload, Sizes};
pub use roots::{ImageRoot, RootLayer};
pub use trust::{Trust, TrustFiles};

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, fsync, linkat, mkdirat, openat, unlinkat};
use rustix::io::Errno;

use error::Doing;
use layout::{DESCRIPTOR, Descriptor, DescriptorFault};

/// Longest `slipway.json`, record or image root that is read. Ours take a few hundred bytes per layer and pack.
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
    /// Opens the store in `dir`, or makes one if `dir` is empty (or does not exist but its parent does). For converters: sees to it
    /// that the store can be written, and removes what long-dead conversions left in `tmp/`.
    pub fn create(dir: &Path) -> Result<Store, StoreError> {
        match mkdirat(CWD, dir, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            // Whether this matters shows when the directory is opened.
            Err(_) => tracing::debug!(dir = %dir.display(), "the store's directory cannot be made"),
        }
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

    /// Reads a small file whole.
    fn read_small(&self, path: &Path) -> Result<Vec<u8>, StoreError> {
        let shown = self.shown(path);
        read_bounded(open::regular(&self.root, path, &shown)?, MAX_JSON, &shown)
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
    let linked = written.map_err(|error| StoreError::writing(&path, error)).and_then(|()| {
        match linkat(&root, &name, &root, DESCRIPTOR, AtFlags::empty()) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(errno) => Err(StoreError::from_errno(Doing::Writing, &dir.join(DESCRIPTOR), errno)),
        }
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
