//! File data as the store gives it back: from packs, every unit verified.

use std::io;

use erofs::block::BLOCK_SIZE;
use erofs::digest::Digest;
use erofs::meta::{Chunk, Data};

use crate::pack_file::PackFile;

/// Decoded units kept. Files are read in path order and layers are packed in archive order, which is nearly the same; small files
/// share units with their neighbours.
const UNITS_KEPT: usize = 32;

/// Why a file was not read to its end.
pub enum ReadError {
    /// The store does not give its bytes.
    Data(String),
    /// Whoever wanted them failed.
    Sink(io::Error),
}

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
        let mut hasher = blake3::Hasher::new();
        let read = self.read(data, |piece| {
            hasher.update(piece);
            Ok(())
        });
        match read {
            Ok(()) => Ok(Digest(*hasher.finalize().as_bytes())),
            Err(ReadError::Data(what)) => Err(what),
            Err(ReadError::Sink(error)) => Err(error.to_string()),
        }
    }

    /// Gives all bytes of a file to `sink`, holes as zeros.
    pub fn read(&mut self, data: &Data, mut sink: impl FnMut(&[u8]) -> io::Result<()>) -> Result<(), ReadError> {
        let (size, unit_bits, chunks) = match data {
            Data::Inline(bytes) => return sink(bytes).map_err(ReadError::Sink),
            Data::Chunked { size, unit_bits, chunks } => (*size, *unit_bits, chunks),
        };
        let zeros = vec![0; unit_bits.bytes() as usize];
        let mut left = size;
        for chunk in chunks {
            let len = left.min(unit_bits.bytes()) as usize;
            let piece = match *chunk {
                Chunk::Hole => &zeros[..len],
                Chunk::At { pack, block } => {
                    let from = (u64::from(block % unit_bits.blocks()) * BLOCK_SIZE) as usize;
                    let unit = self.unit(pack, block / unit_bits.blocks()).map_err(ReadError::Data)?;
                    unit.get(from..from + len).ok_or_else(|| ReadError::Data("a chunk reaches past its unit".to_owned()))?
                }
            };
            sink(piece).map_err(ReadError::Sink)?;
            left -= len as u64;
        }
        if left > 0 {
            return Err(ReadError::Data("it has too few chunks".to_owned()));
        }
        Ok(())
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
