//! The tables inside a transaction: rows, links from parent to child, and who uses which image.

use std::collections::BTreeMap;
use std::path::Path;

use redb::{ReadableTable, Table, TableDefinition, WriteTransaction};

use super::error::{damaged, storage_error, table_error};
use super::{FORMAT, Kind, LedgerError, Lineage, Row, SnapshotId};

/// Name of the row in [`NUMBERS`] that holds [`FORMAT`].
pub(super) const FORMAT_ROW: &str = "format";
/// Name of the row in [`NUMBERS`] that holds the next free [`SnapshotId`].
const NEXT_ID_ROW: &str = "next id";

pub(super) const NUMBERS: TableDefinition<&str, u64> = TableDefinition::new("numbers");
/// containerd's key → the row as JSON.
pub(super) const SNAPSHOTS: TableDefinition<&str, &[u8]> = TableDefinition::new("snapshots");
/// (parent, child): present when the child is built on the parent.
const CHILDREN: TableDefinition<(u64, u64), ()> = TableDefinition::new("children");
/// (chain, snapshot): present when an active snapshot or view needs the chain's image mounted.
pub(super) const USERS: TableDefinition<([u8; 32], u64), ()> = TableDefinition::new("users");

/// The rows as one transaction sees them.
pub(super) struct Rows<'a, T> {
    pub(super) path: &'a Path,
    pub(super) table: T,
}

impl<T: ReadableTable<&'static str, &'static [u8]>> Rows<'_, T> {
    pub(super) fn find(&self, key: &str) -> Result<Option<Row>, LedgerError> {
        let found = self.table.get(key).map_err(|error| storage_error(self.path, error))?;
        found.map(|bytes| self.decode(key, bytes.value())).transpose()
    }

    pub(super) fn get(&self, key: &str) -> Result<Row, LedgerError> {
        self.find(key)?.ok_or_else(|| LedgerError::NotFound { key: key.to_owned() })
    }

    pub(super) fn all(&self) -> Result<Vec<(String, Row)>, LedgerError> {
        let entries = self.table.iter().map_err(|error| storage_error(self.path, error))?;
        let decoded = entries.map(|entry| {
            let (key, bytes) = entry.map_err(|error| storage_error(self.path, error))?;
            Ok((key.value().to_owned(), self.decode(key.value(), bytes.value())?))
        });
        decoded.collect()
    }

    /// What lies from `parent` downwards.
    pub(super) fn lineage(&self, parent: &str) -> Result<Lineage, LedgerError> {
        let mut lineage = Lineage::default();
        let mut next = parent.to_owned();
        while !next.is_empty() {
            let missing = || damaged(self.path, format!("{next:?} is a parent but has no row"));
            let row = self.find(&next)?.ok_or_else(missing)?;
            if row.chain.is_some() {
                lineage.lower = row.chain;
                break;
            }
            lineage.uppers.push(row.id);
            next = row.parent;
        }
        Ok(lineage)
    }

    fn decode(&self, key: &str, bytes: &[u8]) -> Result<Row, LedgerError> {
        serde_json::from_slice(bytes).map_err(|error| damaged(self.path, format!("row of {key:?}: {error}")))
    }
}

/// The tables inside one write transaction.
pub(super) struct Tables<'p, 'txn> {
    numbers: Table<'txn, &'static str, u64>,
    pub(super) rows: Rows<'p, Table<'txn, &'static str, &'static [u8]>>,
    children: Table<'txn, (u64, u64), ()>,
    users: Table<'txn, ([u8; 32], u64), ()>,
}

impl<'p, 'txn> Tables<'p, 'txn> {
    /// Opens the tables in `transaction`, and makes those that are missing.
    pub(super) fn open(path: &'p Path, transaction: &'txn WriteTransaction) -> Result<Tables<'p, 'txn>, LedgerError> {
        let opened = |error| table_error(path, error);
        Ok(Tables {
            numbers: transaction.open_table(NUMBERS).map_err(opened)?,
            rows: Rows { path, table: transaction.open_table(SNAPSHOTS).map_err(opened)? },
            children: transaction.open_table(CHILDREN).map_err(opened)?,
            users: transaction.open_table(USERS).map_err(opened)?,
        })
    }

    pub(super) fn set_format(&mut self) -> Result<(), LedgerError> {
        self.numbers.insert(FORMAT_ROW, FORMAT).map(drop).map_err(|error| storage_error(self.rows.path, error))
    }

    /// Numbers start at 1 and never come back, also not after a removal.
    pub(super) fn next_id(&mut self) -> Result<SnapshotId, LedgerError> {
        let id = self.numbers.get(NEXT_ID_ROW).map_err(|error| self.failed(error))?.map_or(1, |number| number.value());
        self.numbers.insert(NEXT_ID_ROW, id + 1).map_err(|error| storage_error(self.rows.path, error))?;
        Ok(SnapshotId(id))
    }

    pub(super) fn check_parent(&self, what: &'static str, key: &str, parent: &str) -> Result<(), LedgerError> {
        if parent.is_empty() || self.rows.get(parent)?.kind == Kind::Committed {
            return Ok(());
        }
        Err(LedgerError::InvalidArgument { what, key: key.to_owned(), reason: format!("its parent {parent:?} is not committed") })
    }

    /// Writes a row and the link to its parent.
    pub(super) fn put(&mut self, key: &str, row: &Row) -> Result<(), LedgerError> {
        let bytes = serde_json::to_vec(row).expect("a row has only strings as map keys, so it can be written as JSON");
        self.rows.table.insert(key, bytes.as_slice()).map_err(|error| storage_error(self.rows.path, error))?;
        if !row.parent.is_empty() {
            let parent = self.rows.get(&row.parent)?.id;
            self.children.insert((parent.0, row.id.0), ()).map_err(|error| storage_error(self.rows.path, error))?;
        }
        Ok(())
    }

    /// Deletes a row and the link to its parent.
    pub(super) fn take(&mut self, key: &str, row: &Row) -> Result<(), LedgerError> {
        self.rows.table.remove(key).map_err(|error| storage_error(self.rows.path, error))?;
        if !row.parent.is_empty() {
            let parent = self.rows.get(&row.parent)?.id;
            self.children.remove((parent.0, row.id.0)).map_err(|error| storage_error(self.rows.path, error))?;
        }
        Ok(())
    }

    pub(super) fn has_children(&self, id: SnapshotId) -> Result<bool, LedgerError> {
        let mut range = self.children.range((id.0, 0)..=(id.0, u64::MAX)).map_err(|error| self.failed(error))?;
        Ok(range.next().is_some())
    }

    pub(super) fn set_user(&mut self, lineage: &Lineage, id: SnapshotId, uses: bool) -> Result<(), LedgerError> {
        let Some(chain) = lineage.lower else { return Ok(()) };
        let key = (chain.0.0, id.0);
        let changed = if uses { self.users.insert(key, ()).map(drop) } else { self.users.remove(key).map(drop) };
        changed.map_err(|error| storage_error(self.rows.path, error))
    }

    fn failed(&self, error: impl Into<redb::Error>) -> LedgerError {
        storage_error(self.rows.path, error)
    }
}

/// containerd's stores never keep a label with an empty value: setting one is how a label is deleted.
pub(super) fn without_empty(mut labels: BTreeMap<String, String>) -> BTreeMap<String, String> {
    labels.retain(|_, value| !value.is_empty());
    labels
}
