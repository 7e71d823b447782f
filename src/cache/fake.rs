//! A fake cache disk that knows what a power cut would leave, and sample packs to fill it with.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use erofs::block::{BLOCK_SIZE, UnitBits, blocks_for};
use erofs::digest::Digest;
use erofs::pack::{FOOTER_LEN, PackTable, PackWriter, encode_unit};
use uapi::buffer::Buffer;

use super::disk::Disk;
use super::presence::{SLOT, Saved, decode};
use super::{Pack, PackFile, PackId, Verified};

const BLOCK: usize = BLOCK_SIZE as usize;

/// A pack for tests: its content and its pack file.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Uncompressed bytes.
    pub bytes: Vec<u8>,
    /// The pack file.
    pub file: Vec<u8>,
    table: PackTable,
}

impl Sample {
    /// `len` bytes (whole blocks) that do not compress, in units of 64 KiB. The same for the same seed.
    pub fn noise(seed: u64, len: usize) -> Sample {
        let mut bytes = vec![0; len];
        fill_noise(seed, &mut bytes);
        Sample::of(bytes, UnitBits::MIN)
    }

    /// As [`Sample::noise`], but every second block repeats one byte, so units compress.
    pub fn mixed(seed: u64, len: usize) -> Sample {
        let mut sample = vec![0; len];
        fill_noise(seed, &mut sample);
        sample.chunks_mut(2 * BLOCK).flat_map(|pair| pair.chunks_mut(BLOCK).skip(1)).for_each(|block| block.fill(seed as u8));
        Sample::of(sample, UnitBits::MIN)
    }

    /// A pack of `bytes` (whole blocks).
    pub fn of(bytes: Vec<u8>, unit_bits: UnitBits) -> Sample {
        let mut writer = PackWriter::new(Vec::new(), unit_bits);
        for unit in bytes.chunks(unit_bits.bytes() as usize) {
            writer.push(&encode_unit(unit, 1), &[]).expect("writing to memory works, and samples are smaller than a pack may be");
        }
        let finished = writer.finish().expect("writing to memory works");
        let file = finished.out;
        let footer_at = file.len() - FOOTER_LEN as usize;
        let footer = PackTable::parse_footer(&finished.pack.digest, &file[footer_at..]).expect("a footer just written can be read");
        let (at, len) = footer.unit_table();
        let table = PackTable::parse(footer, &file[at as usize..][..len]).expect("a table just written can be read");
        Sample { bytes, file, table }
    }

    /// The pack's name.
    pub fn digest(&self) -> Digest {
        self.table.pack_ref().digest
    }

    /// The pack with nothing of it cached.
    pub fn pack(&self) -> Arc<Pack> {
        self.pack_with(&Saved::nothing(self.table.unit_count()))
    }

    /// The pack as a process finds it that reads this map.
    pub fn pack_with(&self, saved: &Saved) -> Arc<Pack> {
        Arc::new(Pack::new(self.table.clone(), PackFile::Elsewhere, saved))
    }
}

/// Deterministic bytes that do not compress.
fn fill_noise(seed: u64, out: &mut [u8]) {
    let mut state = seed;
    for word in out.chunks_mut(8) {
        let random = split_mix(&mut state).to_le_bytes();
        word.copy_from_slice(&random[..word.len()]);
    }
}

/// Next number of Vigna's SplitMix64.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// A disk in memory, shared by its clones. It holds what a reader sees (live) and what a power cut leaves (durable): a cut keeps an
/// arbitrary choice of the 4 KiB blocks written since the last sync, and tears the map slot being written.
#[derive(Clone, Default)]
pub struct FakeDisk {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    images: HashMap<Digest, Image>,
    syncs: usize,
    crash_at: Option<(usize, u64)>,
    crashed: bool,
    lose_at_next_sync: bool,
    fail_next_read: bool,
    hold_maps: bool,
    refuse_writes: Option<io::ErrorKind>,
    writes: usize,
    overwrites: usize,
}

#[derive(Default)]
struct Image {
    live: Vec<u8>,
    durable: Vec<u8>,
    unsynced: BTreeSet<usize>,
    /// Blocks that a failed sync left in memory only.
    lost: BTreeSet<usize>,
    map: Vec<u8>,
    /// The slot of the map that is being written.
    map_under_way: Option<Vec<u8>>,
}

impl FakeDisk {
    /// The power fails at sync number `at` (0 is the first; map writes count, as they sync). `seed` chooses what survives.
    pub fn crash_at(&self, at: usize, seed: u64) {
        self.lock().crash_at = Some((at, seed));
    }

    /// The next sync fails as the kernel's do: nothing gets onto the disk, later syncs work and do not try those blocks again, and readers see
    /// them until [`FakeDisk::evict`].
    pub fn lose_at_next_sync(&self) {
        self.lock().lose_at_next_sync = true;
    }

    /// Memory is needed: what a failed sync left there only is gone.
    pub fn evict(&self) {
        for image in self.lock().images.values_mut() {
            for block in std::mem::take(&mut image.lost) {
                let range = block * BLOCK..(block + 1) * BLOCK;
                image.live[range.clone()].copy_from_slice(&image.durable[range]);
            }
        }
    }

    /// The next read fails.
    pub fn fail_next_read(&self) {
        self.lock().fail_next_read = true;
    }

    /// Writes of maps do not end before this is taken back.
    pub fn hold_maps(&self, hold: bool) {
        self.lock().hold_maps = hold;
    }

    /// Whether a map is being written.
    pub fn map_under_way(&self) -> bool {
        self.lock().images.values().any(|image| image.map_under_way.is_some())
    }

    /// Units written so far.
    pub fn writes(&self) -> usize {
        self.lock().writes
    }

    /// Those among them that the map said were there, or may have said: it would have told lies had the power failed (invariant 6).
    pub fn overwrites(&self) -> usize {
        self.lock().overwrites
    }

    /// From now on writes fail like this (or work again).
    pub fn refuse_writes(&self, kind: Option<io::ErrorKind>) {
        self.lock().refuse_writes = kind;
    }

    /// Power is back: what is durable is what there is.
    pub fn restart(&self) {
        let mut inner = self.lock();
        inner.crash_at = None;
        inner.crashed = false;
        for image in inner.images.values_mut() {
            image.live = image.durable.clone();
            image.unsynced.clear();
            image.lost.clear();
            image.map_under_way = None;
        }
    }

    /// Flips the bits of `mask` in byte `at` of a pack's local file, as rot would.
    pub fn rot(&self, pack: &Digest, at: usize, mask: u8) {
        let mut inner = self.lock();
        let image = inner.images.entry(*pack).or_default();
        for bytes in [&mut image.live, &mut image.durable] {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= mask;
            }
        }
    }

    /// Whether a reader of the local file gets `expected` from `offset`.
    pub fn holds(&self, pack: &Digest, offset: usize, expected: &[u8]) -> bool {
        self.lock().images.get(pack).and_then(|image| image.live.get(offset..offset + expected.len())) == Some(expected)
    }

    /// What a power cut now would leave of a pack's local file.
    pub fn durable(&self, pack: &Digest) -> Vec<u8> {
        self.lock().images.get(pack).map(|image| image.durable.clone()).unwrap_or_default()
    }

    /// The map of a pack with `units` units as the next process would read it.
    pub fn map(&self, pack: &Digest, units: u32) -> Saved {
        let inner = self.lock();
        decode(pack, units, inner.images.get(pack).map_or(&[], |image| &image.map))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn image(&mut self, pack: &Pack) -> io::Result<&mut Image> {
        if self.crashed {
            return Err(io::Error::other("the power is off"));
        }
        let len = pack.len() as usize;
        Ok(self.images.entry(pack.digest()).or_insert_with(|| Image { live: vec![0; len], durable: vec![0; len], ..Image::default() }))
    }

    /// Counts a sync; at the fatal one gives the random state that chooses what survives.
    fn count_sync(&mut self) -> Option<u64> {
        let number = self.syncs;
        self.syncs += 1;
        self.crash_at.filter(|&(at, _)| at == number).map(|(_, seed)| seed)
    }

    fn crash(&mut self, mut state: u64) -> io::Error {
        self.crashed = true;
        for image in self.images.values_mut() {
            for block in std::mem::take(&mut image.unsynced) {
                if split_mix(&mut state).is_multiple_of(2) {
                    let range = block * BLOCK..(block + 1) * BLOCK;
                    image.durable[range.clone()].copy_from_slice(&image.live[range]);
                }
            }
        }
        io::Error::other("the power failed")
    }
}

impl Disk for FakeDisk {
    async fn read(&self, pack: &Pack, offset: u64, mut buffer: Buffer) -> io::Result<Buffer> {
        tokio::task::yield_now().await;
        let mut inner = self.lock();
        if std::mem::take(&mut inner.fail_next_read) {
            return Err(io::Error::other("the disk gives nothing here"));
        }
        let image = inner.image(pack)?;
        let bytes = image.live.get(offset as usize..offset as usize + buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(bytes);
        Ok(buffer)
    }

    async fn write(&self, pack: &Pack, unit: &Verified) -> io::Result<()> {
        // The bytes are there when the call returns, and not a moment earlier: whoever relies on them before is found out.
        tokio::task::yield_now().await;
        let mut inner = self.lock();
        if let Some(kind) = inner.refuse_writes {
            return Err(kind.into());
        }
        let at = pack.unit_start(unit.unit()) as usize;
        let image = inner.image(pack)?;
        image.live[at..at + unit.bytes().len()].copy_from_slice(unit.bytes());
        let blocks = at / BLOCK..at / BLOCK + blocks_for(unit.bytes().len() as u64) as usize;
        image.unsynced.extend(blocks.clone());
        image.lost.retain(|block| !blocks.contains(block));
        let maps = [Some(&image.map), image.map_under_way.as_ref()];
        let named = maps.into_iter().flatten().any(|map| decode(&pack.digest(), pack.table().unit_count(), map).present.has(unit.unit()));
        inner.overwrites += usize::from(named);
        inner.writes += 1;
        Ok(())
    }

    async fn sync(&self, pack: &Pack) -> io::Result<()> {
        tokio::task::yield_now().await;
        let mut inner = self.lock();
        inner.image(pack)?;
        if let Some(seed) = inner.count_sync() {
            return Err(inner.crash(seed));
        }
        if std::mem::take(&mut inner.lose_at_next_sync) {
            let image = inner.image(pack)?;
            let mut lost = std::mem::take(&mut image.unsynced);
            image.lost.append(&mut lost);
            return Err(io::Error::other("the disk took nothing"));
        }
        let image = inner.image(pack)?;
        for block in std::mem::take(&mut image.unsynced) {
            let range = block * BLOCK..(block + 1) * BLOCK;
            image.durable[range.clone()].copy_from_slice(&image.live[range]);
        }
        Ok(())
    }

    async fn write_map(&self, pack: &Pack, offset: u64, slot: Vec<u8>) -> io::Result<()> {
        self.lock().image(pack)?.map_under_way = Some(slot.clone());
        tokio::task::yield_now().await;
        while self.lock().hold_maps {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let mut inner = self.lock();
        let fatal = inner.image(pack).map(drop).map(|()| inner.count_sync())?;
        let image = inner.image(pack)?;
        image.map_under_way = None;
        image.map.resize(2 * SLOT, 0);
        // Disks write sectors of 512 bytes whole.
        let torn = fatal.map_or(slot.len(), |seed| seed as usize % (slot.len() / 512 + 1) * 512);
        image.map[offset as usize..][..torn].copy_from_slice(&slot[..torn]);
        fatal.map_or(Ok(()), |seed| Err(inner.crash(seed)))
    }

    fn forget(&self, _pack: PackId) {}
}
