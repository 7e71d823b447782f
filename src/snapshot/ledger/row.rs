//! What the ledger knows about a snapshot, and what it tells others.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::oci::ChainId;

/// Number of a snapshot on this node, never used twice. Names its directory, because keys are not fit to be paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SnapshotId(pub u64);

/// What a snapshot can be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Read-only and mountable.
    View,
    /// Writable and mountable; can be committed.
    Active,
    /// Finished; the only kind that can be a parent.
    Committed,
}

/// A point in time as containerd sends it: seconds and nanoseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Stamp {
    /// Whole seconds since 1970-01-01 UTC.
    pub seconds: i64,
    /// The rest, below one second.
    pub nanos: u32,
}

impl Stamp {
    /// The time now; 1970 if the clock is set before that.
    pub fn now() -> Stamp {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Stamp { seconds: since.as_secs().cast_signed(), nanos: since.subsec_nanos() }
    }
}

/// What a snapshot takes on the local disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Allocated bytes.
    pub size: i64,
    /// Number of inodes.
    pub inodes: i64,
}

/// What the ledger knows about one snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Its number.
    pub id: SnapshotId,
    /// What it can be used for.
    pub kind: Kind,
    /// Key of the snapshot below, empty for none.
    pub parent: String,
    /// containerd's labels, none with an empty value.
    pub labels: BTreeMap<String, String>,
    /// When it was made; for a committed one, when it was committed.
    pub created: Stamp,
    /// When its labels last changed.
    pub updated: Stamp,
    /// Disk usage measured at commit; zero before.
    pub usage: Usage,
    /// Set for a lazy snapshot: its content is the image of this chain, and there is nothing in its directory.
    pub chain: Option<ChainId>,
}

/// What lies below a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lineage {
    /// Plain snapshots, the nearest first.
    pub uppers: Vec<SnapshotId>,
    /// The chain of the nearest lazy snapshot. Its image has everything below it merged in, so nothing below is listed.
    pub lower: Option<ChainId>,
}

/// A snapshot that [`super::Ledger::remove`] took out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Removed {
    /// Whose directory can go.
    pub id: SnapshotId,
    /// The chain it held in use, which may have no other user now.
    pub held: Option<ChainId>,
}

/// What is asked for with [`Ledger::create`](super::Ledger::create).
#[derive(Clone, Debug)]
pub struct NewSnapshot {
    /// [`Kind::Active`] or [`Kind::View`].
    pub kind: Kind,
    /// containerd's key.
    pub key: String,
    /// Key of a committed snapshot, or empty.
    pub parent: String,
    /// Labels; those with an empty value are dropped.
    pub labels: BTreeMap<String, String>,
}
