//! The ledger: which snapshots exist, what each is built on, and which images they hold in use. One redb database.
//!
//! The rules (what may be the parent of what, which error which mistake gets) are those of containerd's own snapshotters
//! (`core/snapshots/storage/bolt.go`), so that containerd cannot tell the difference. Every change is one transaction that is
//! on disk when the call returns; a write transaction excludes all others, which is what makes requests for one key take turns.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;

use redb::{ReadOnlyTable, ReadableTable};

use crate::oci::{ChainId, Sha256};

mod database;
mod error;
mod row;
mod tables;
#[cfg(test)]
mod model;

pub use error::LedgerError;
pub use row::{Kind, Lineage, NewSnapshot, Removed, Row, SnapshotId, Stamp, Usage};

use database::LedgerFile;
use error::{storage_error, table_error};
use tables::{Rows, SNAPSHOTS, Tables, USERS, without_empty};

/// Version of what the tables hold. A reader refuses any other.
pub const FORMAT: u64 = 1;

/// The open ledger.
#[derive(Debug)]
pub struct Ledger {
    file: LedgerFile,
}

impl Ledger {
    /// Opens the database at `path`, or makes an empty one there.
    pub fn open(path: &Path) -> Result<Ledger, LedgerError> {
        Ok(Ledger { file: LedgerFile::open(path)? })
    }

    /// The row of `key`.
    pub fn get(&self, key: &str) -> Result<Row, LedgerError> {
        self.read(|rows| rows.get(key))
    }

    /// The row of `key` and what lies below it.
    pub fn get_with_lineage(&self, key: &str) -> Result<(Row, Lineage), LedgerError> {
        self.read(|rows| {
            let row = rows.get(key)?;
            let lineage = rows.lineage(&row.parent)?;
            Ok((row, lineage))
        })
    }

    /// Every snapshot with its key, in byte order of keys.
    pub fn list(&self) -> Result<Vec<(String, Row)>, LedgerError> {
        self.read(|rows| rows.all())
    }

    /// Adds an active snapshot or a view. `make_directory` makes the directory of
    /// the new snapshot while nothing else can change the ledger.
    pub fn create(
        &self,
        new: NewSnapshot,
        now: Stamp,
        make_directory: impl FnOnce(SnapshotId, &Lineage) -> io::Result<()>,
    ) -> Result<(Row, Lineage), LedgerError> {
        let NewSnapshot { kind, key, parent, labels } = new;
        self.write(|tables| {
            tables.check_parent("create", &key, &parent)?;
            if tables.rows.find(&key)?.is_some() {
                return Err(LedgerError::AlreadyExists { key });
            }
            let id = tables.next_id()?;
            let lineage = tables.rows.lineage(&parent)?;
            make_directory(id, &lineage).map_err(|source| LedgerError::Directory { key: key.clone(), source })?;
            let labels = without_empty(labels);
            let row = Row { id, kind, parent, labels, created: now, updated: now, usage: Usage::default(), chain: None };
            tables.put(&key, &row)?;
            tables.set_user(&lineage, id, true)?;
            Ok((row, lineage))
        })
    }

    /// Adds a committed snapshot whose content is the image of `chain`.
    pub fn commit_lazy(&self, name: &str, parent: &str, chain: ChainId, labels: BTreeMap<String, String>, now: Stamp) -> Result<(), LedgerError> {
        self.write(|tables| {
            tables.check_parent("commit", name, parent)?;
            if tables.rows.find(name)?.is_some() {
                return Err(LedgerError::AlreadyExists { key: name.to_owned() });
            }
            let row = Row {
                id: tables.next_id()?,
                kind: Kind::Committed,
                parent: parent.to_owned(),
                labels: without_empty(labels),
                created: now,
                updated: now,
                usage: Usage::default(),
                chain: Some(chain),
            };
            tables.put(name, &row)
        })
    }

    /// Turns the active snapshot `key` into the committed one `name`, with new labels. Its number stays. A snapshot prepared without
    /// a parent may get `parent` now. Returns the chain it held in use, which may have no other user now.
    pub fn commit(
        &self,
        key: &str,
        name: &str,
        parent: &str,
        labels: BTreeMap<String, String>,
        usage: Usage,
        now: Stamp,
    ) -> Result<Option<ChainId>, LedgerError> {
        self.write(|tables| {
            if tables.rows.find(name)?.is_some() {
                return Err(LedgerError::AlreadyExists { key: name.to_owned() });
            }
            let mut row = tables.rows.get(key)?;
            if row.kind != Kind::Active {
                return Err(LedgerError::FailedPrecondition { what: "commit", key: key.to_owned(), reason: "it is not active" });
            }
            let lineage = tables.rows.lineage(&row.parent)?;
            tables.take(key, &row)?;
            tables.set_user(&lineage, row.id, false)?;
            if row.parent.is_empty() && !parent.is_empty() {
                if tables.rows.get(parent)?.kind != Kind::Committed {
                    let reason = "the parent it shall get is not committed";
                    return Err(LedgerError::FailedPrecondition { what: "commit", key: key.to_owned(), reason });
                }
                row.parent = parent.to_owned();
            } else if !parent.is_empty() && parent != row.parent {
                let reason = format!("it was prepared on {:?} and cannot move to {parent:?}", row.parent);
                return Err(LedgerError::InvalidArgument { what: "commit", key: key.to_owned(), reason });
            }
            row = Row { kind: Kind::Committed, labels: without_empty(labels), created: now, updated: now, usage, ..row };
            tables.put(name, &row)?;
            Ok(lineage.lower)
        })
    }

    /// Takes out a snapshot nothing is built on. With `only`, a snapshot of another number is not the one meant and counts as not there.
    pub fn remove(&self, key: &str, only: Option<SnapshotId>) -> Result<Removed, LedgerError> {
        self.write(|tables| {
            let row = tables.rows.get(key)?;
            if only.is_some_and(|id| id != row.id) {
                return Err(LedgerError::NotFound { key: key.to_owned() });
            }
            if tables.has_children(row.id)? {
                let reason = "other snapshots are built on it, remove those first";
                return Err(LedgerError::FailedPrecondition { what: "remove", key: key.to_owned(), reason });
            }
            let lineage = tables.rows.lineage(&row.parent)?;
            tables.take(key, &row)?;
            if row.kind == Kind::Committed {
                return Ok(Removed { id: row.id, held: None });
            }
            tables.set_user(&lineage, row.id, false)?;
            Ok(Removed { id: row.id, held: lineage.lower })
        })
    }

    /// Sets labels of `key`: all of them when `paths` is empty or names `labels`, else those named as `labels.<name>`. Nothing else can change.
    pub fn update(&self, key: &str, labels: &BTreeMap<String, String>, paths: &[String], now: Stamp) -> Result<Row, LedgerError> {
        self.write(|tables| {
            let mut row = tables.rows.get(key)?;
            if paths.is_empty() {
                row.labels = labels.clone();
            }
            for path in paths {
                if path == "labels" {
                    row.labels = labels.clone();
                } else if let Some(name) = path.strip_prefix("labels.") {
                    row.labels.insert(name.to_owned(), labels.get(name).cloned().unwrap_or_default());
                } else {
                    let reason = format!("{path:?} cannot be changed, only labels can");
                    return Err(LedgerError::InvalidArgument { what: "update", key: key.to_owned(), reason });
                }
            }
            row.labels = without_empty(row.labels);
            row.updated = now;
            tables.put(key, &row)?;
            Ok(row)
        })
    }

    /// Whether any active snapshot or view needs the image of `chain`.
    pub fn has_users(&self, chain: &ChainId) -> Result<bool, LedgerError> {
        self.read_users(|users| {
            let mut range = users.range((chain.0.0, 0)..=(chain.0.0, u64::MAX)).map_err(|error| self.failed(error))?;
            Ok(range.next().is_some())
        })
    }

    /// The chains whose images active snapshots and views need.
    pub fn chains_in_use(&self) -> Result<BTreeSet<ChainId>, LedgerError> {
        self.read_users(|users| {
            let mut chains = BTreeSet::new();
            for entry in users.iter().map_err(|error| self.failed(error))? {
                let (key, _) = entry.map_err(|error| self.failed(error))?;
                chains.insert(ChainId(Sha256(key.value().0)));
            }
            Ok(chains)
        })
    }

    /// Calls `with` with the numbers of all snapshots while nothing can change the ledger.
    pub fn hold_ids<T>(&self, with: impl FnOnce(&BTreeSet<SnapshotId>) -> T) -> Result<T, LedgerError> {
        self.write(|tables| {
            let ids = tables.rows.all()?.into_iter().map(|(_, row)| row.id).collect();
            Ok(with(&ids))
        })
    }

    fn read<T>(&self, look: impl FnOnce(&Rows<'_, ReadOnlyTable<&'static str, &'static [u8]>>) -> Result<T, LedgerError>) -> Result<T, LedgerError> {
        self.file.read(|transaction| {
            let table = transaction.open_table(SNAPSHOTS).map_err(|error| table_error(self.file.path(), error))?;
            look(&Rows { path: self.file.path(), table })
        })
    }

    fn read_users<T>(&self, look: impl FnOnce(&ReadOnlyTable<([u8; 32], u64), ()>) -> Result<T, LedgerError>) -> Result<T, LedgerError> {
        self.file.read(|transaction| look(&transaction.open_table(USERS).map_err(|error| table_error(self.file.path(), error))?))
    }

    fn write<T>(&self, change: impl FnOnce(&mut Tables<'_, '_>) -> Result<T, LedgerError>) -> Result<T, LedgerError> {
        self.file.write(|transaction| change(&mut Tables::open(self.file.path(), transaction)?))
    }

    fn failed(&self, error: impl Into<redb::Error>) -> LedgerError {
        storage_error(self.file.path(), error)
    }
}
