//! File data as the store gives it back: from packs, every unit verified.

use erofs::block::BLOCK_SIZE;
use erofs::digest::Digest;
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
    /// `packs` are those of the tree, in its order.
    pub fn new(packs: &'a [PackFile]) -> DataReader<'a> {
        DataReader { packs, units: Vec::new() }
    }

    /// BLAKE3 of all bytes of a file, holes as zeros; or what is wrong with them.
    pub fn digest(&mut self, data: &Data) -> Result<Digest, String> {
        let (size, unit_bits, chunks) = match data {
            Data::Inline(bytes) => return Ok(Digest::of(bytes)),
            Data::Chunked { size, unit_bits, chunks } => (*size, *unit_bits, chunks),
        };
        let mut hasher = blake3::Hasher::new();
        let zeros = vec![0; unit_bits.bytes() as usize];
        let mut left = size;
        for chunk in chunks {
            let len = left.min(unit_bits.bytes()) as usize;
            match *chunk {
                Chunk::Hole => {
                    hasher.update(&zeros[..len]);
                }
                Chunk::At { pack, block } => {
                    let from = (u64::from(block % unit_bits.blocks()) * BLOCK_SIZE) as usize;
                    let unit = self.unit(pack, block / unit_bits.blocks())?;
                    hasher.update(unit.get(from..from + len).ok_or("a chunk reaches past its unit")?);
                }
            }
            left -= len as u64;
        }
        if left > 0 {
            return Err("it has too few chunks".to_owned());
        }
        Ok(Digest(*hasher.finalize().as_bytes()))
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
