//! What can go wrong with a store, by what the caller does next.

use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::key::KeyId;

/// An operation on a store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The directory exists but holds no store. Point at another directory.
    #[error("{} is no Slipway store (it has no slipway.json): give the directory of a store, or an empty one to make a new store in", dir.display())]
    NotAStore {
        /// The directory.
        dir: PathBuf,
    },
    /// A newer Slipway made the store. Upgrade this one.
    #[error("the store {} has format version {found}, this program knows {known}: use a newer Slipway", dir.display())]
    NewerFormat {
        /// The store's directory.
        dir: PathBuf,
        /// Version in `slipway.json`.
        found: u64,
        /// Newest version this program knows.
        known: u64,
    },
    /// `slipway.json` cannot be understood. An administrator has to look.
    #[error("{}: {reason}; restore the file from another copy of the store, or start a new store", path.display())]
    BadDescriptor {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The store does not answer as a file system should: no directory there, not mounted, stale, or an I/O error. Trying again later may help.
    #[error("cannot reach {}: check that the store is mounted and its server answers", path.display())]
    Unreachable {
        /// What was being reached.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The store may not be written (read-only mount or permissions).
    #[error("cannot write {}: the store must be writable for the user that converts", path.display())]
    NotWritable {
        /// What was to be written.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No space or quota is left.
    #[error("no room to write {}: free space on the store, then run again; nothing of this file has been published", path.display())]
    Full {
        /// What was to be written.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file of the store is not there.
    #[error("{} is not in the store", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A file's bytes are not what its name promises. Converting the image again makes it again; removed it must be first, since a conversion
    /// goes by a finished layer's footers and does not read all of its data.
    #[error("{} is damaged ({reason}): remove it, then convert the image again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// An image root that no trusted key signed. The user decides whom to trust.
    #[error("{} is signed by key {key}, which is not trusted here: convert the image again, or trust the key of who did", path.display())]
    Untrusted {
        /// The file.
        path: PathBuf,
        /// The key it says.
        key: KeyId,
    },
    /// An image root as older programs wrote them. Converting the image again signs it.
    #[error("{} is not signed, so nothing vouches for what it says: convert the image again", path.display())]
    Unsigned {
        /// The file.
        path: PathBuf,
    },
    /// What was to be published exceeds what readers accept. The image cannot be converted.
    #[error("{} cannot be published: {reason}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Which limit.
        reason: String,
    },
    /// A symbolic link, or something that is no regular file, stands where the store keeps its own: someone tampered with it.
    #[error("{} is not a plain file inside the store: remove what was put there", path.display())]
    Foreign {
        /// The path.
        path: PathBuf,
    },
    /// The kernel (before 5.6, or a seccomp filter) does not offer `openat2`, without which paths of a shared store cannot be trusted.
    #[error("cannot open {}: this kernel or sandbox lacks openat2(2), which Slipway needs to stay inside the store", path.display())]
    NoOpenat2 {
        /// The path.
        path: PathBuf,
    },
}

/// What an operation was doing, which decides what its errno means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doing {
    Reading,
    Writing,
}

impl StoreError {
    /// What a failed write of `path` (a [`super::Temp`], or a writer on top of one) means.
    pub fn writing(path: &Path, source: io::Error) -> StoreError {
        Self::from_io(Doing::Writing, path, source)
    }

    /// What a failed read of a file of the store, which is open, means: only one that ends early is damaged, whatever else happens is trouble in
    /// reaching it.
    pub fn reading(path: &Path, source: io::Error) -> StoreError {
        match source.kind() {
            io::ErrorKind::UnexpectedEof => StoreError::Damaged { path: path.to_owned(), reason: "it ends early".to_owned() },
            _ => Self::from_io(Doing::Reading, path, source),
        }
    }

    pub(super) fn from_errno(doing: Doing, path: &Path, errno: Errno) -> StoreError {
        Self::from_io(doing, path, errno.into())
    }

    pub(super) fn from_io(doing: Doing, path: &Path, source: io::Error) -> StoreError {
        let path = path.to_owned();
        match (source.raw_os_error().map(Errno::from_raw_os_error), doing) {
            (Some(Errno::NOSYS), _) => StoreError::NoOpenat2 { path },
            (Some(Errno::LOOP | Errno::XDEV | Errno::NOTDIR | Errno::ISDIR | Errno::NXIO), _) => StoreError::Foreign { path },
            (Some(Errno::NOENT), Doing::Reading) => StoreError::Missing { path },
            (Some(Errno::NOSPC | Errno::DQUOT | Errno::FBIG), Doing::Writing) => StoreError::Full { path, source },
            (Some(Errno::ROFS | Errno::ACCESS | Errno::PERM), Doing::Writing) => StoreError::NotWritable { path, source },
            _ => StoreError::Unreachable { path, source },
        }
    }

    /// Whether the answer is final for this store as it is now (missing or damaged data), rather than trouble in reaching it.
    pub fn is_about_content(&self) -> bool {
        matches!(self, StoreError::Missing { .. } | StoreError::Damaged { .. } | StoreError::Foreign { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errno_means_what_the_caller_does_next() {
        let check = |doing, errno: Errno, expected: &str| {
            let error = StoreError::from_errno(doing, Path::new("/store/packs/x"), errno);
            assert!(format!("{error:?}").starts_with(expected), "{errno:?}: {error:?}");
            assert!(error.to_string().contains("/store/packs/x"), "{error}");
            if let Some(source) = std::error::Error::source(&error) {
                assert!(!error.to_string().contains(&source.to_string()), "{error} repeats its source");
            }
        };
        for (errno, reading, writing) in [
            (Errno::NOENT, "Missing", "Unreachable"),
            (Errno::NOSPC, "Unreachable", "Full"),
            (Errno::DQUOT, "Unreachable", "Full"),
            (Errno::ROFS, "Unreachable", "NotWritable"),
            (Errno::ACCESS, "Unreachable", "NotWritable"),
            (Errno::LOOP, "Foreign", "Foreign"),
            (Errno::XDEV, "Foreign", "Foreign"),
            (Errno::NOTDIR, "Foreign", "Foreign"),
            (Errno::STALE, "Unreachable", "Unreachable"),
            (Errno::IO, "Unreachable", "Unreachable"),
            (Errno::TIMEDOUT, "Unreachable", "Unreachable"),
            (Errno::NOSYS, "NoOpenat2", "NoOpenat2"),
        ] {
            check(Doing::Reading, errno, reading);
            check(Doing::Writing, errno, writing);
        }
    }

    #[test]
    fn only_a_file_that_ends_early_is_damaged_by_a_failed_read() {
        let path = Path::new("/store/packs/x");
        assert!(StoreError::reading(path, io::ErrorKind::UnexpectedEof.into()).is_about_content());
        for errno in [Errno::IO, Errno::STALE, Errno::TIMEDOUT, Errno::NOMEM] {
            let error = StoreError::reading(path, errno.into());
            assert!(matches!(error, StoreError::Unreachable { .. }) && !error.is_about_content(), "{error:?}");
        }
    }
}
