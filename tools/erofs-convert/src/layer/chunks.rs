//! File data to chunks: cut, compared with zeros, with what the layer already has and with what is stored elsewhere, placed into units.

use std::collections::HashMap;
use std::io::{Read, Write};

use erofs::block::{BLOCK_SIZE, UnitBits, blocks_for};
use erofs::digest::Digest;
use erofs::framing::Place;
use erofs::meta::{Chunk, Data, PackRef};
use erofs::pack::{MAX_PACK_BYTES, PlacedUnit, Placer};

use super::ConvertError;
use super::compress::{Feeder, Unit};
use super::intake::Archive;
use super::known::{Elsewhere, Found};
use super::runs::{Decided, Runs};

/// Files up to this size are kept in the metadata image itself. In a pack even one byte takes a 4 KiB block of a unit and 8 bytes of chunk
/// index, and a request of its own to read; in the image it comes along with the inode, whose block (of 4 KiB, with dozens of inodes) is
/// read anyway. Beyond a few hundred bytes the image, which must be local before a container starts, would grow for data nobody may want.
pub const INLINE_LIMIT: u64 = 256;

/// Number of a chunk in the order the layer first has them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct ChunkId(u32);

/// All zeros.
const HOLE: ChunkId = ChunkId(u32::MAX);

/// The data of one file.
pub(super) enum FileData {
    Inline(Vec<u8>),
    Chunked { size: u64, ids: Vec<ChunkId> },
}

/// Takes files' data and feeds units to the compressors. Per distinct chunk it remembers some 70 bytes.
pub(super) struct Chunker<'f> {
    unit_bits: UnitBits,
    placer: Placer<(ChunkId, Digest)>,
    seen: HashMap<Digest, ChunkId>,
    places: Vec<Placed>,
    units: u32,
    feeder: &'f Feeder,
    runs: Runs<'f, NewChunk>,
    decided: Vec<Decided<NewChunk>>,
    /// Packs of others that chunks are in, and their numbers.
    others: Vec<PackRef>,
    other_numbers: HashMap<Digest, u32>,
}

/// A chunk that the layer has for the first time.
struct NewChunk {
    id: ChunkId,
    digest: Digest,
    bytes: Vec<u8>,
}

/// Where a chunk is.
#[derive(Clone, Copy)]
enum Placed {
    /// In this unit of the layer, at this block of the unit.
    Own { unit: u32, block: u32 },
    /// In this one of the packs of others, at this block.
    Elsewhere { other: u32, block: u32 },
}

/// Where every chunk of a layer is.
pub(super) struct Places {
    unit_bits: UnitBits,
    units: u32,
    places: Vec<Placed>,
    /// Packs of others that chunks are in.
    pub others: Vec<PackRef>,
}

impl<'f> Chunker<'f> {
    pub fn new(unit_bits: UnitBits, feeder: &'f Feeder, elsewhere: Elsewhere<'f>) -> Chunker<'f> {
        Chunker {
            unit_bits,
            placer: Placer::new(unit_bits),
            seen: HashMap::new(),
            places: Vec::new(),
            units: 0,
            feeder,
            runs: Runs::new(elsewhere),
            decided: Vec::new(),
            others: Vec::new(),
            other_numbers: HashMap::new(),
        }
    }

    /// Takes the data of a regular file, all of what the archive has for it.
    pub fn file(
        &mut self,
        archive: &mut Archive<impl Read, impl Write>,
        size: u64,
        sparse: Option<&[tar_core::SparseEntry]>,
    ) -> Result<FileData, ConvertError> {
        let mut regions = Regions { map: sparse, next: 0, raw: size <= INLINE_LIMIT };
        if size <= INLINE_LIMIT {
            let bytes = regions.read(archive, 0, size as usize)?;
            return Ok(FileData::Inline(bytes.unwrap_or_else(|| vec![0; size as usize])));
        }
        let ranges = regions.ranges(size);
        if !ranges.is_empty() {
            archive.file(&ranges)?;
        }
        let unit = self.unit_bits.bytes();
        let mut ids = Vec::with_capacity(size.div_ceil(unit) as usize);
        let mut at = 0;
        while at < size {
            let len = unit.min(size - at);
            ids.push(match regions.read(archive, at, len as usize)? {
                Some(bytes) => {
                    let id = self.chunk(bytes)?;
                    archive.chunk((id != HOLE).then_some(id.0))?;
                    id
                }
                None => HOLE,
            });
            at += len;
        }
        Ok(FileData::Chunked { size, ids })
    }

    fn chunk(&mut self, bytes: Vec<u8>) -> Result<ChunkId, ConvertError> {
        if is_zero(&bytes) {
            return Ok(HOLE);
        }
        let blocks = blocks_for(bytes.len() as u64);
        let digest = Digest::of_padded(&bytes, blocks * BLOCK_SIZE);
        if let Some(id) = self.seen.get(&digest) {
            return Ok(*id);
        }
        let id = ChunkId(self.places.len() as u32);
        self.seen.insert(digest, id);
        self.places.push(Placed::Own { unit: u32::MAX, block: 0 });
        let pushed = self.runs.push(NewChunk { id, digest, bytes }, &digest, blocks as u32, &mut self.decided);
        pushed.map_err(|source| ConvertError::Store { source })?;
        self.place()?;
        Ok(id)
    }

    /// Gives the chunks that are decided their places.
    fn place(&mut self) -> Result<(), ConvertError> {
        let mut decided = std::mem::take(&mut self.decided);
        for (NewChunk { id, digest, bytes }, place) in decided.drain(..) {
            match place {
                Some(Found { pack, block, .. }) => {
                    let other = *self.other_numbers.entry(pack.digest).or_insert_with(|| {
                        self.others.push(pack);
                        self.others.len() as u32 - 1
                    });
                    self.places[id.0 as usize] = Placed::Elsewhere { other, block };
                }
                None => {
                    if let Some(unit) = self.placer.push(bytes, (id, digest)) {
                        self.send(unit)?;
                    }
                }
            }
        }
        self.decided = decided;
        Ok(())
    }

    fn send(&mut self, unit: PlacedUnit<(ChunkId, Digest)>) -> Result<(), ConvertError> {
        for piece in &unit.pieces {
            self.places[piece.handle.0.0 as usize] = Placed::Own { unit: self.units, block: piece.block };
        }
        self.units += 1;
        // A chunk that fills its unit has the unit's digest.
        let digest = match unit.pieces[..] {
            [piece] if piece.blocks as u64 * BLOCK_SIZE == unit.data.len() as u64 => Some(piece.handle.1),
            _ => None,
        };
        let chunks = unit.pieces.iter().map(|p| (p.handle.1, p.block, p.blocks)).collect();
        self.feeder.send(Unit { data: unit.data, digest, chunks })
    }

    /// Sends what is left; from then on every chunk has its place.
    pub fn finish(mut self) -> Result<Places, ConvertError> {
        self.runs.end(&mut self.decided);
        self.place()?;
        let last = std::mem::replace(&mut self.placer, Placer::new(self.unit_bits)).finish();
        if let Some(unit) = last {
            self.send(unit)?;
        }
        Ok(Places { unit_bits: self.unit_bits, units: self.units, places: self.places, others: self.others })
    }
}

impl Places {
    /// A file's data with its chunks in packs.
    pub fn data(&self, data: FileData) -> Data {
        let chunk = |id: ChunkId| match self.places.get(id.0 as usize) {
            Some(placed) => {
                let Place { pack, block } = self.place(*placed);
                Chunk::At { pack, block }
            }
            None => Chunk::Hole,
        };
        match data {
            FileData::Inline(bytes) => Data::Inline(bytes),
            FileData::Chunked { size, ids } => Data::Chunked { size, unit_bits: self.unit_bits, chunks: ids.into_iter().map(chunk).collect() },
        }
    }

    /// Where every chunk is, by its number, as a framing has it.
    pub fn of_chunks(&self) -> Vec<Place> {
        self.places.iter().map(|placed| self.place(*placed)).collect()
    }

    /// First come the layer's own packs, of which every one but the last is full, then those of others.
    fn place(&self, placed: Placed) -> Place {
        let units_per_pack = (MAX_PACK_BYTES / self.unit_bits.bytes()) as u32;
        match placed {
            Placed::Own { unit, block } => Place { pack: unit / units_per_pack, block: unit % units_per_pack * self.unit_bits.blocks() + block },
            Placed::Elsewhere { other, block } => Place { pack: self.units.div_ceil(units_per_pack) + other, block },
        }
    }
}

/// The data of a file, read front to back; of a sparse one the archive has only some regions.
struct Regions<'a> {
    map: Option<&'a [tar_core::SparseEntry]>,
    next: usize,
    /// The data goes to no pack, but as it is into the framing.
    raw: bool,
}

impl Regions<'_> {
    /// The regions as (first byte, length), without empty ones and such as touch.
    fn ranges(&self, size: u64) -> Vec<(u64, u64)> {
        let Some(map) = self.map else { return vec![(0, size)] };
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for region in map.iter().filter(|region| region.length > 0) {
            match ranges.last_mut() {
                Some((start, len)) if *start + *len == region.offset => *len += region.length,
                _ => ranges.push((region.offset, region.length)),
            }
        }
        ranges
    }

    /// The `len` bytes at `at`; `None` when no region touches them.
    fn read(&mut self, archive: &mut Archive<impl Read, impl Write>, at: u64, len: usize) -> Result<Option<Vec<u8>>, ConvertError> {
        let Some(map) = self.map else {
            let mut bytes = vec![0; len];
            self.take(archive, &mut bytes)?;
            return Ok(Some(bytes));
        };
        let end = at + len as u64;
        let mut bytes = None;
        while let Some(region) = map.get(self.next).filter(|region| region.offset < end) {
            let region_end = region.offset + region.length;
            let (from, to) = (region.offset.max(at), region_end.min(end));
            if from < to {
                let bytes = bytes.get_or_insert_with(|| vec![0; len]);
                self.take(archive, &mut bytes[(from - at) as usize..(to - at) as usize])?;
            }
            if region_end > end {
                break;
            }
            self.next += 1;
        }
        Ok(bytes)
    }

    fn take(&self, archive: &mut Archive<impl Read, impl Write>, out: &mut [u8]) -> Result<(), ConvertError> {
        if self.raw { archive.read_raw(out) } else { archive.read(out) }
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    // In pieces, so that the compiler can use wide registers and other data is told at its first piece.
    bytes.chunks(256).all(|piece| piece.iter().fold(0, |sum, byte| sum | byte) == 0)
}
