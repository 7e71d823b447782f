//! The local cache: packs as sparse local files, what is in them, and who is filling what.
//!
//! A [`Pack`] is one pack as this node holds it. Each of its units is in one state, moved only here:
//!
//! ```text
//!            claim                     stored
//!  Absent ───────────► Filling ─────────────────► Ready        bytes verified in this process and in the local file
//!  Unchecked ────────►    │                                    an earlier process stored it; re-verified before it is used
//!                         └─ failed or dropped ─► Absent
//! ```
//!
//! The one who claims a unit gets a [`Fill`] guard, everyone else a [`Wait`] on it: one fill per unit however many ask, and a filler
//! that fails or dies frees those who wait. Ready units cost a reader one atomic load.
//!
//! - [`verify`]: the only way from bytes to [`Verified`] bytes (invariant 5);
//! - [`claim`]: states, guards and waiters;
//! - [`ahead`]: recognises readers that go through a pack in order;
//! - [`presence`]: the map of stored units, to bytes and back;
//! - [`local`]: the cache directory;
//! - [`disk`]: the seam to the cache's file system, [`fake`] its fake.

pub mod ahead;
pub mod claim;
pub mod disk;
pub mod fake;
pub mod local;
pub mod presence;
pub mod verify;

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use erofs::block::BLOCK_SIZE;
use erofs::digest::Digest;
use erofs::pack::PackTable;

pub use claim::{Claim, Fill, Wait, Wants};
pub use presence::{Presence, Saved};
pub use verify::Verified;

use ahead::Streams;
use claim::Units;

/// Number of a unit in its pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnitIndex(pub u32);

/// Tells packs of one process apart, also two of the same digest (one dropped, one opened later).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PackId(u64);

/// Where a pack's uncompressed bytes are kept on this node.
#[derive(Debug)]
pub enum PackFile {
    /// A sparse file of ours, as long as the pack from the start.
    Local {
        /// The data, open for reading and writing.
        data: File,
        /// Which units are durable: see [`presence`].
        map: File,
    },
    /// The kernel's own cache file (fscache): can be written with aligned buffers, neither read nor synced, and the kernel itself knows
    /// what is in it.
    Kernel {
        /// The anonymous descriptor of /dev/cachefiles.
        data: OwnedFd,
    },
    /// No file: whoever tests brings a [`disk::Disk`] that does not need one.
    Elsewhere,
}

/// One pack as this node holds it. Shared by everyone who reads or fills it.
#[derive(Debug)]
pub struct Pack {
    id: PackId,
    table: PackTable,
    file: PackFile,
    units: Units,
    /// Taken on misses and look-ahead only, never by readers of stored units, never across I/O.
    streams: Mutex<Streams>,
    forgotten: AtomicBool,
}

impl Pack {
    /// A pack whose units in `saved` were stored by someone earlier. A local file's are checked before they are used; the kernel's
    /// cannot be.
    pub fn new(table: PackTable, file: PackFile, saved: &Saved) -> Pack {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let trusted = matches!(file, PackFile::Kernel { .. });
        let units = Units::new(table.unit_count(), saved, trusted);
        let streams = Mutex::new(Streams::new(table.unit_count(), table.unit_bits()));
        Pack { id: PackId(NEXT.fetch_add(1, Ordering::Relaxed)), table, file, units, streams, forgotten: AtomicBool::new(false) }
    }

    /// This pack among all of the process.
    pub fn id(&self) -> PackId {
        self.id
    }

    /// The pack's name.
    pub fn digest(&self) -> Digest {
        self.table.pack_ref().digest
    }

    /// Footer and unit table.
    pub fn table(&self) -> &PackTable {
        &self.table
    }

    /// Where its bytes are.
    pub fn file(&self) -> &PackFile {
        &self.file
    }

    /// Uncompressed length in bytes.
    pub fn len(&self) -> u64 {
        u64::from(self.table.blocks()) * BLOCK_SIZE
    }

    /// Whether the pack holds nothing. (The format has no such packs.)
    pub fn is_empty(&self) -> bool {
        self.table.blocks() == 0
    }

    /// First byte of a unit in the pack's uncompressed space.
    pub fn unit_start(&self, unit: UnitIndex) -> u64 {
        u64::from(unit.0) << self.table.unit_bits().bits()
    }

    /// Bytes of a unit; the last may be shorter than the others.
    pub fn unit_len(&self, unit: UnitIndex) -> usize {
        self.table.unit_len(unit.0)
    }

    /// The unit that byte `offset` is in.
    pub fn unit_at(&self, offset: u64) -> UnitIndex {
        UnitIndex((offset >> self.table.unit_bits().bits()) as u32)
    }

    /// The units that `len` bytes from `offset` touch; `None` if that is no byte, or if the range leaves the pack.
    pub fn units_in(&self, offset: u64, len: u32) -> Option<Range<u32>> {
        let end = offset.checked_add(u64::from(len)).filter(|&end| len > 0 && end <= self.len())?;
        Some(self.unit_at(offset).0..self.unit_at(end - 1).0 + 1)
    }

    /// Nobody uses the pack any more. What is still under way for it ends, and keeps nothing open from now on.
    pub fn forget(&self) {
        self.forgotten.store(true, Ordering::Relaxed);
    }

    /// Whether [`Pack::forget`] was called.
    pub fn is_forgotten(&self) -> bool {
        self.forgotten.load(Ordering::Relaxed)
    }

    /// What is known of the pack's readers.
    pub fn streams(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// States of the units.
    pub fn units(&self) -> &Units {
        &self.units
    }
}

#[cfg(test)]
mod tests {
    use super::fake::Sample;

    #[test]
    fn a_range_touches_whole_units() {
        // 2 units of 64 KiB and one of 8 KiB.
        let pack = Sample::mixed(1, 139_264).pack();
        for (offset, len, expected) in [
            (0, 1, Some(0..1)),
            (0, 65_536, Some(0..1)),
            (65_535, 2, Some(0..2)),
            (65_536, 65_536, Some(1..2)),
            (0, 139_264, Some(0..3)),
            (139_263, 1, Some(2..3)),
            (139_263, 2, None),
            (0, 0, None),
            (u64::MAX, 2, None),
        ] {
            assert_eq!(pack.units_in(offset, len), expected, "{len} from {offset}");
        }
    }
}
