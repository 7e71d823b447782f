//! Why the ledger refuses or fails, and how the database's errors are sorted.

use std::io;
use std::path::{Path, PathBuf};

use redb::{DatabaseError, StorageError, TableError};

use super::FORMAT;

/// Why the ledger did not do what was asked. The first four are containerd's error classes of the same names.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// There is no such snapshot.
    #[error("snapshot {key:?} does not exist")]
    NotFound {
        /// The key asked for.
        key: String,
    },
    /// The key is taken.
    #[error("snapshot {key:?} already exists")]
    AlreadyExists {
        /// The key in question.
        key: String,
    },
    /// The snapshot is in a state that does not allow this.
    #[error("cannot {what} snapshot {key:?}: {reason}")]
    FailedPrecondition {
        /// What was asked for, as a verb.
        what: &'static str,
        /// The key in question.
        key: String,
        /// What stands in the way.
        reason: &'static str,
    },
    /// The request makes no sense whatever the state.
    #[error("cannot {what} snapshot {key:?}: {reason}")]
    InvalidArgument {
        /// What was asked for, as a verb.
        what: &'static str,
        /// The key in question.
        key: String,
        /// Which rule it breaks.
        reason: String,
    },
    /// Written by a newer version of this program.
    #[error("{}: written in format {found}, this version reads {FORMAT}: start the newer slipwayd again", .path.display())]
    Newer {
        /// The database file.
        path: PathBuf,
        /// The format found.
        found: u64,
    },
    /// Another process has it open.
    #[error("{}: another process holds it open: stop the other slipwayd, or give this one its own state directory", .path.display())]
    InUse {
        /// The database file.
        path: PathBuf,
    },
    /// The content cannot be what this program wrote.
    #[error("{}: damaged ({reason}): move it and the directory of snapshots beside it away, then remove and pull the images of this snapshotter again", .path.display())]
    Damaged {
        /// The database file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The database could not be read or written.
    #[error("{}: reading or writing the ledger failed: look at the disk and its free space", .path.display())]
    Storage {
        /// The database file.
        path: PathBuf,
        /// What the database says.
        #[source]
        source: Box<redb::Error>,
    },
    /// The directory that belongs to a new snapshot could not be made.
    #[error("no directory for snapshot {key:?}")]
    Directory {
        /// The key of the new snapshot.
        key: String,
        /// What the file system says.
        #[source]
        source: io::Error,
    },
}

pub(super) fn damaged(path: &Path, reason: String) -> LedgerError {
    LedgerError::Damaged { path: path.to_owned(), reason }
}

pub(super) fn open_error(path: &Path, error: DatabaseError) -> LedgerError {
    match error {
        DatabaseError::DatabaseAlreadyOpen => LedgerError::InUse { path: path.to_owned() },
        // The database tells a file it did not write by this error kind.
        DatabaseError::Storage(StorageError::Io(error)) if error.kind() == io::ErrorKind::InvalidData => damaged(path, error.to_string()),
        other => storage_error(path, other),
    }
}

pub(super) fn table_error(path: &Path, error: TableError) -> LedgerError {
    match error {
        TableError::Storage(error) => storage_error(path, error),
        other => damaged(path, other.to_string()),
    }
}

pub(super) fn storage_error(path: &Path, error: impl Into<redb::Error>) -> LedgerError {
    match error.into() {
        redb::Error::Corrupted(reason) => damaged(path, reason),
        error => LedgerError::Storage { path: path.to_owned(), source: Box::new(error) },
    }
}
