//! File data to chunks: cut, compared with zeros, with what the layer already has and with what is stored elsewhere.

use std::collections::HashMap;
use std::io::{Read, Write};

use erofs::block::{BLOCK_SIZE, UnitBits, blocks_for};
use erofs::digest::Digest;
use erofs::framing::Place;
use erofs::meta::{Chunk, Data, PackRef};

use super::ConvertError;
use super::compress::Feeder;
use super::intake::Archive;
use super::known::Elsewhere;
use super::packing::{ChunkId, Packed, Packing};
use super::runs::{Decided, Runs};

/// Files up to this size are kept in the metadata image itself. In a pack even one byte takes a 4 KiB block of a unit and 8 bytes of chunk
/// index, and a request of its own to read; in the image it comes along with the inode, whose block (of 4 KiB, with dozens of inodes) is
/// read anyway. Beyond a few hundred bytes the image, which must be local before a container starts, would grow for data nobody may want.
pub const INLINE_LIMIT: u64 = 256;

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
    feeder: &'f Feeder,
    seen: HashMap<Digest, (ChunkId, u32)>,
    runs: Runs<'f, NewChunk>,
    decided: Vec<Decided<NewChunk>>,
    packing: Packing<'f>,
}

/// A chunk that the layer has for the first time.
struct NewChunk {
    id: ChunkId,
    digest: Digest,
    bytes: Vec<u8>,
}

/// The chunks of a layer.
pub(super) struct Chunked {
    unit_bits: UnitBits,
    packed: Packed,
    /// Digest and blocks of every chunk, by its number.
    pub chunks: Vec<(Digest, u32)>,
}

impl<'f> Chunker<'f> {
    pub fn new(unit_bits: UnitBits, feeder: &'f Feeder, elsewhere: Elsewhere<'f>) -> Chunker<'f> {
        let (runs, packing) = (Runs::new(elsewhere), Packing::new(unit_bits, feeder));
        Chunker { unit_bits, feeder, seen: HashMap::new(), runs, decided: Vec::new(), packing }
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
            let bytes = regions.read(archive, 0, size as usize, || vec![0; size as usize])?;
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
            let buffer = || if len == unit { self.feeder.buffer() } else { vec![0; len as usize] };
            ids.push(match regions.read(archive, at, len as usize, buffer)? {
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
            self.feeder.give_back(bytes);
            return Ok(HOLE);
        }
        let blocks = blocks_for(bytes.len() as u64);
        let digest = Digest::of_padded(&bytes, blocks * BLOCK_SIZE);
        if let Some((id, _)) = self.seen.get(&digest) {
            self.feeder.give_back(bytes);
            return Ok(*id);
        }
        let id = self.packing.number();
        self.seen.insert(digest, (id, blocks as u32));
        let pushed = self.runs.push(NewChunk { id, digest, bytes }, &digest, blocks as u32, &mut self.decided);
        pushed.map_err(|source| ConvertError::Store { source })?;
        self.place()?;
        Ok(id)
    }

    /// Gives the chunks that are decided their places.
    fn place(&mut self) -> Result<(), ConvertError> {
        for (NewChunk { id, digest, bytes }, found) in self.decided.drain(..) {
            match found {
                Some(found) => {
                    self.packing.refer(id, &found.pack, found.block);
                    self.feeder.give_back(bytes);
                }
                None => self.packing.store(id, digest, bytes)?,
            }
        }
        Ok(())
    }

    /// Sends what is left; from then on every chunk has its place.
    pub fn finish(mut self) -> Result<Chunked, ConvertError> {
        self.runs.end(&mut self.decided);
        self.place()?;
        let mut chunks = vec![(Digest([0; 32]), 0); self.seen.len()];
        for (digest, (id, blocks)) in self.seen {
            chunks[id.0 as usize] = (digest, blocks);
        }
        Ok(Chunked { unit_bits: self.unit_bits, packed: self.packing.finish()?, chunks })
    }
}

impl Chunked {
    /// A file's data with its chunks in packs.
    pub fn data(&self, data: FileData) -> Data {
        let chunk = |id: ChunkId| match self.packed.get(id) {
            Some(Place { pack, block }) => Chunk::At { pack, block },
            None => Chunk::Hole,
        };
        match data {
            FileData::Inline(bytes) => Data::Inline(bytes),
            FileData::Chunked { size, ids } => Data::Chunked { size, unit_bits: self.unit_bits, chunks: ids.into_iter().map(chunk).collect() },
        }
    }

    /// Where every chunk is, by its number, as a framing has it.
    pub fn places(&self) -> Vec<Place> {
        self.packed.of_chunks()
    }

    /// Packs of others that chunks are in.
    pub fn others(&self) -> &[PackRef] {
        &self.packed.others
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

    /// The `len` bytes at `at`; `None` when no region touches them. `buffer` gives memory of that length with anything in it.
    fn read(
        &mut self,
        archive: &mut Archive<impl Read, impl Write>,
        at: u64,
        len: usize,
        buffer: impl FnOnce() -> Vec<u8>,
    ) -> Result<Option<Vec<u8>>, ConvertError> {
        let Some(map) = self.map else {
            let mut bytes = buffer();
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
