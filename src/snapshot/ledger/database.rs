//! The database file: opened, checked for its format, and opened again after an I/O error.
//!
//! redb refuses every further call once a read or write of its file has failed. A disk that was full for a moment must not end the
//! snapshotter, so the next call opens the file again, which brings back what was committed last.

use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use redb::{Database, ReadTransaction, ReadableDatabase, TableError, WriteTransaction};

use super::error::{damaged, open_error, storage_error, table_error};
use super::tables::{FORMAT_ROW, NUMBERS, Tables};
use super::{FORMAT, LedgerError};

/// The file and what it takes to use it.
#[derive(Debug)]
pub(super) struct LedgerFile {
    path: PathBuf,
    /// `None` after an I/O error, until the next call.
    database: RwLock<Option<Database>>,
}

impl LedgerFile {
    /// Opens the file, or makes one with empty tables.
    pub(super) fn open(path: &Path) -> Result<LedgerFile, LedgerError> {
        let database = open(path)?;
        Ok(LedgerFile { path: path.to_owned(), database: RwLock::new(Some(database)) })
    }

    /// What errors name.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Calls `look` with what was committed last.
    pub(super) fn read<T>(&self, look: impl FnOnce(&ReadTransaction) -> Result<T, LedgerError>) -> Result<T, LedgerError> {
        self.with(|database| look(&database.begin_read().map_err(|error| storage_error(&self.path, error))?))
    }

    /// Calls `change` while no one else can change anything, and commits unless it fails.
    pub(super) fn write<T>(&self, change: impl FnOnce(&WriteTransaction) -> Result<T, LedgerError>) -> Result<T, LedgerError> {
        self.with(|database| {
            let transaction = database.begin_write().map_err(|error| storage_error(&self.path, error))?;
            // An error drops the transaction, which undoes what was done so far.
            let done = change(&transaction)?;
            transaction.commit().map_err(|error| storage_error(&self.path, error))?;
            Ok(done)
        })
    }

    fn with<T>(&self, work: impl FnOnce(&Database) -> Result<T, LedgerError>) -> Result<T, LedgerError> {
        let done = loop {
            if let Some(database) = &*self.database.read().unwrap_or_else(PoisonError::into_inner) {
                break work(database);
            }
            let mut database = self.database.write().unwrap_or_else(PoisonError::into_inner);
            if database.is_none() {
                tracing::info!(path = %self.path.display(), "opening the ledger again after an I/O error");
                *database = Some(open(&self.path)?);
            }
        };
        if let Err(LedgerError::Storage { .. }) = done {
            *self.database.write().unwrap_or_else(PoisonError::into_inner) = None;
        }
        done
    }
}

fn open(path: &Path) -> Result<Database, LedgerError> {
    let database = Database::create(path).map_err(|error| open_error(path, error))?;
    let found = found_format(path, &database)?;
    match found {
        Some(FORMAT) => {}
        Some(found) if found > FORMAT => return Err(LedgerError::Newer { path: path.to_owned(), found }),
        Some(found) => return Err(damaged(path, format!("format {found} was never written"))),
        None => {
            let transaction = database.begin_write().map_err(|error| storage_error(path, error))?;
            Tables::open(path, &transaction)?.set_format()?;
            transaction.commit().map_err(|error| storage_error(path, error))?;
        }
    }
    Ok(database)
}

/// The format the file is in, `None` for a new one. Looks at nothing else, since another format may have other tables, and writes nothing,
/// since the disk may be full.
fn found_format(path: &Path, database: &Database) -> Result<Option<u64>, LedgerError> {
    let transaction = database.begin_read().map_err(|error| storage_error(path, error))?;
    match transaction.open_table(NUMBERS) {
        Ok(numbers) => Ok(numbers.get(FORMAT_ROW).map_err(|error| storage_error(path, error))?.map(|number| number.value())),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(table_error(path, error)),
    }
}
