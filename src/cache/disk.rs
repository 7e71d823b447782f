//! The seam to the cache's file system: reads, writes and syncs of packs' local files. Real ones go through io_uring.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;

use tokio_uring::fs::File;
use uapi::buffer::Buffer;

use super::{Pack, PackFile, PackId, Verified};

/// What the data path does to a pack's local file. One value per data thread; futures may be dropped at any await without harm, the
/// operation then ends on its own.
#[allow(async_fn_in_trait, reason = "used with static dispatch on one thread only")]
pub trait Disk {
    /// Fills `buffer` from `offset` of the pack's uncompressed space. A short read is an error.
    async fn read(&self, pack: &Pack, offset: u64, buffer: Buffer) -> io::Result<Buffer>;

    /// Writes a unit where it belongs. When it returns, a read of the file gives these bytes; durable they are after [`Disk::sync`].
    async fn write(&self, pack: &Pack, unit: &Verified) -> io::Result<()>;

    /// Makes every write that returned before this call durable.
    async fn sync(&self, pack: &Pack) -> io::Result<()>;

    /// Writes a slot of the pack's presence map at `offset` and makes it durable.
    async fn write_map(&self, pack: &Pack, offset: u64, slot: Vec<u8>) -> io::Result<()>;

    /// Closes what is kept open of a pack that is not used any more.
    fn forget(&self, pack: PackId);
}

/// The cache's file system through this thread's ring.
#[derive(Default)]
pub struct RingDisk {
    /// tokio-uring's files belong to one thread, so each thread works on its own duplicates.
    files: RefCell<HashMap<PackId, Rc<Open>>>,
}

struct Open {
    data: File,
    /// `None` where the kernel keeps the map.
    map: Option<File>,
}

impl RingDisk {
    fn open(&self, pack: &Pack) -> io::Result<Rc<Open>> {
        if let Some(open) = self.files.borrow().get(&pack.id()) {
            return Ok(Rc::clone(open));
        }
        let own = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().map(|fd| File::from_std(fd.into()));
        let open = Rc::new(match pack.file() {
            PackFile::Local { data, map } => Open { data: own(data.as_fd())?, map: Some(own(map.as_fd())?) },
            PackFile::Kernel { data } => Open { data: own(data.as_fd())?, map: None },
            PackFile::Elsewhere => return Err(io::ErrorKind::Unsupported.into()),
        });
        // What is under way for a pack when it is forgotten may get here afterwards, and nobody would close what it keeps.
        if !pack.is_forgotten() {
            self.files.borrow_mut().insert(pack.id(), Rc::clone(&open));
        }
        Ok(open)
    }
}

impl Disk for RingDisk {
    async fn read(&self, pack: &Pack, offset: u64, buffer: Buffer) -> io::Result<Buffer> {
        let open = self.open(pack)?;
        let (result, buffer) = open.data.read_exact_at(buffer, offset).await;
        result.map(|()| buffer)
    }

    async fn write(&self, pack: &Pack, unit: &Verified) -> io::Result<()> {
        let open = self.open(pack)?;
        let (bytes, offset) = (unit.bytes().clone(), pack.unit_start(unit.unit()));
        match pack.file() {
            // Not `write_all_at`: it would go on after a short write, perhaps within a page, and Linux 6.1 rounds the offset of such a write
            // down. The kernel would trust wrong bytes. What a short write did write is right.
            PackFile::Kernel { .. } => match open.data.write_at(bytes, offset).submit().await {
                (Ok(written), bytes) if written == bytes.len() => Ok(()),
                (Ok(_), _) => Err(io::ErrorKind::WriteZero.into()),
                (Err(error), _) => Err(error),
            },
            PackFile::Local { .. } | PackFile::Elsewhere => open.data.write_all_at(bytes, offset).await.0,
        }
    }

    async fn sync(&self, pack: &Pack) -> io::Result<()> {
        self.open(pack)?.data.sync_data().await
    }

    async fn write_map(&self, pack: &Pack, offset: u64, slot: Vec<u8>) -> io::Result<()> {
        let open = self.open(pack)?;
        let map = open.map.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let (result, _) = map.write_all_at(slot, offset).await;
        result?;
        map.sync_data().await
    }

    fn forget(&self, pack: PackId) {
        self.files.borrow_mut().remove(&pack);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::UnitIndex;
    use crate::cache::fake::Sample;
    use crate::cache::local::LocalCache;

    #[test]
    fn a_forgotten_pack_can_be_used_and_nothing_of_it_stays_open() {
        let dir = tempfile::tempdir().unwrap();
        let sample = Sample::mixed(1, 65_536);
        let pack = LocalCache::open(dir.path()).unwrap().pack(sample.pack().table().clone()).unwrap();
        let mut bytes = Buffer::new(65_536);
        bytes.copy_from_slice(&sample.bytes);
        let unit = Verified::check(pack.table(), UnitIndex(0), bytes).expect("the unit's own bytes");
        tokio_uring::start(async {
            let disk = RingDisk::default();
            disk.write(&pack, &unit).await.unwrap();
            assert_eq!(disk.files.borrow().len(), 1);
            pack.forget();
            disk.forget(pack.id());
            assert_eq!(disk.files.borrow().len(), 0);
            disk.write(&pack, &unit).await.unwrap();
            assert!(*disk.read(&pack, 0, Buffer::new(65_536)).await.unwrap() == *sample.bytes);
            assert_eq!(disk.files.borrow().len(), 0);
        });
    }
}
