//! File data as the store gives it back: from packs, every unit verified.

use erofs::block::{BLOCK_SIZE, UnitBits};
use erofs::digest::{Digest, Hasher};
use erofs::meta::{Chunk, Data};

use crate::pack_file::PackFile;

/// Decoded units kept. Files are read in path order and layers are packed in archive order, which is nearly the same; small files
/// share units with their neighbours.
const UNITS_KEPT: usize = 32;

/// Reads files out of packs.
pub struct DataReader<'a> {
    packs: &'a [PackFile],
    /// Most recently used last.
    units: Vec<((u32, u32), Vec<u8>)>,
}

impl<'a> DataReader<'a> {
    /// `packs` are those of the tree or framing, in its order.
    pub fn new(packs: &'a [PackFile]) -> DataReader<'a> {
        DataReader { packs, units: Vec::new() }
    }

    /// BLAKE3 of all bytes of a file, holes as zeros; or what is wrong with them.
    pub fn digest(&mut self, data: &Data) -> Result<Digest, String> {
        let mut hasher = Hasher::new();
        let (size, unit_bits, chunks) = match data {
            Data::Inline(bytes) => return Ok(Digest::of(bytes)),
            Data::Chunked { size, unit_bits, chunks } => (*size, *unit_bits, chunks),
        };
        let zeros = vec![0; unit_bits.bytes() as usize];
        let mut left = size;
        for chunk in chunks {
            let len = left.min(unit_bits.bytes()) as usize;
            hasher.update(match *chunk {
                Chunk::Hole => &zeros[..len],
                Chunk::At { pack, block } => self.piece(pack, block, unit_bits, 0, len)?,
            });
            left -= len as u64;
        }
        if left > 0 {
            return Err("it has too few chunks".to_owned());
        }
        Ok(hasher.finish())
    }

    /// `len` bytes, from byte `from`, of the chunk that begins at `block` of a pack; or what is wrong with them.
    pub fn piece(&mut self, pack: u32, block: u32, unit_bits: UnitBits, from: usize, len: usize) -> Result<&[u8], String> {
        let from = (u64::from(block % unit_bits.blocks()) * BLOCK_SIZE) as usize + from;
        let unit = self.unit(pack, block / unit_bits.blocks())?;
        unit.get(from..from + len).ok_or_else(|| "a chunk reaches past its unit".to_owned())
    }

    fn unit(&mut self, pack: u32, index: u32) -> Result<&[u8], String> {
        let key = (pack, index);
        let unit = match self.units.iter().position(|(kept, _)| *kept == key) {
            Some(at) => self.units.remove(at).1,
            None => self.packs.get(pack as usize).ok_or("it is in a pack that the image does not have")?.unit(index)?,
        };
        if self.units.len() == UNITS_KEPT {
            self.units.remove(0);
        }
        self.units.push((key, unit));
        Ok(self.units.last().map_or(&[], |(_, unit)| unit))
    }
}
