//! Whether what was written into snapshots has reached the disk.
//!
//! The kernel tells of a failed write-back once to each open file, and one opened later is told nothing if another was told before. So one file
//! stays open from the start on and is the only one asked; and as it cannot be said whose writes were lost, no snapshot that was there at that
//! time is good any more.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::ledger::SnapshotId;

/// The file system that snapshots are written to.
#[derive(Debug)]
pub(super) struct Durable {
    /// Held while the disk is waited for: of two who ask at once, one would get the other's error.
    file_system: Mutex<File>,
    losses: Mutex<Losses>,
}

/// What is known of lost writes. Never held during I/O.
#[derive(Debug, Default)]
struct Losses {
    /// How often writes were lost.
    count: u64,
    /// How many of these were before a snapshot was made, if any.
    before: BTreeMap<SnapshotId, u64>,
}

impl Durable {
    /// Watches the file system that this directory is on.
    pub fn new(directory: File) -> Durable {
        Durable { file_system: Mutex::new(directory), losses: Mutex::default() }
    }

    /// A new snapshot is about to be made: losses so far are not its own.
    pub fn made(&self, id: SnapshotId) {
        let mut losses = lock(&self.losses);
        let count = losses.count;
        if count > 0 {
            losses.before.insert(id, count);
        }
    }

    /// A snapshot is removed.
    pub fn gone(&self, id: SnapshotId) {
        lock(&self.losses).before.remove(&id);
    }

    /// Waits until everything is on disk, which `sync` does. An error if anything was lost since the snapshot was made.
    pub fn sync(&self, id: SnapshotId, sync: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
        let file_system = lock(&self.file_system);
        let synced = sync(&file_system);
        let mut losses = lock(&self.losses);
        if synced.is_err() {
            losses.count += 1;
        }
        synced?;
        if losses.before.get(&id).copied().unwrap_or(0) < losses.count {
            return Err(io::Error::other("the disk lost writes after this snapshot was made: remove it and make it again"));
        }
        Ok(())
    }
}

/// What these locks guard is changed in single steps, so a panic elsewhere leaves it whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel tells of a loss once. It may be of any snapshot there was.
    #[test]
    fn a_loss_told_once_spoils_every_snapshot_there_was() {
        let durable = Durable::new(File::open("/").expect("a directory"));
        let [old, one, two, new] = [1, 2, 3, 4].map(SnapshotId);
        let (works, fails) = (|_: &File| Ok(()), |_: &File| Err(io::ErrorKind::StorageFull.into()));
        durable.made(one);
        durable.made(two);
        durable.sync(one, works).expect("nothing was lost yet");
        durable.sync(one, fails).expect_err("lost");
        for spoiled in [old, one, two] {
            durable.sync(spoiled, works).expect_err("what it lost may be of this one");
        }
        durable.made(new);
        durable.sync(new, works).expect("made after the loss");
        durable.gone(two);
        durable.made(two);
        durable.sync(two, works).expect("made again after the loss");
        durable.sync(new, fails).expect_err("lost again");
        durable.sync(two, works).expect_err("a second loss counts too");
    }
}
