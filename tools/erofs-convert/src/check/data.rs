//! File data as the store gives it back: from packs, every unit verified.

use std::fs::File;
use std::os::unix::fs::FileExt;

use erofs::block::BLOCK_SIZE;
use erofs::digest::Digest;
use erofs::meta::{Chunk, Data, PackRef};
use erofs::pack::{PackTable, decode_unit};
use slipway::store::{Name, Store, StoreError};

use crate::failure::Failure;

/// Decoded units kept. Files are read in path order and layers are packed in archive order, which is nearly the same; small files
/// share units with their neighbours.
const UNITS_KEPT: usize = 32;

/// A pack of the store, opened.
pub struct Pack {
    file: File,
    table: PackTable,
    digest: Digest,
}

impl Pack {
    /// Opens a pack and verifies its tables.
    pub fn open(store: &Store, pack: &PackRef) -> Result<Pack, Failure> {
        let name = Name::Pack(pack.digest);
        let damaged = |reason: String| Failure::Store(StoreError::Damaged { path: store.dir().join(name.path()), reason });
        let file = store.open_file(&name)?;
        let read = |at: u64, len: usize| {
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, at).map(|()| bytes).map_err(|e| damaged(e.to_string()))
        };
        let len = file.metadata().map_err(|e| damaged(e.to_string()))?.len();
        let footer_at = len.checked_sub(PackTable::FOOTER_LEN).ok_or_else(|| damaged("shorter than its footer".to_owned()))?;
        let footer = PackTable::parse_footer(&pack.digest, &read(footer_at, PackTable::FOOTER_LEN as usize)?);
        let footer = footer.map_err(|e| damaged(e.to_string()))?;
        let (at, table_len) = footer.unit_table();
        let table = PackTable::parse(footer, &read(at, table_len)?).map_err(|e| damaged(e.to_string()))?;
        if table.pack_ref() != *pack {
            return Err(damaged("the metadata image says another size of it than its footer".to_owned()));
        }
        Ok(Pack { file, table, digest: pack.digest })
    }

    fn unit(&self, index: u32) -> Result<Vec<u8>, String> {
        let entry = self.table.unit(index).ok_or_else(|| format!("pack {} has no unit {index}", self.digest))?;
        let failed = |error: &dyn std::fmt::Display| format!("unit {index} of pack {}: {error}", self.digest);
        let mut stored = vec![0; entry.stored_len as usize];
        self.file.read_exact_at(&mut stored, entry.offset).map_err(|e| failed(&e))?;
        let mut unit = vec![0; self.table.unit_len(index)];
        decode_unit(entry, &stored, &mut unit).map_err(|e| failed(&e))?;
        Ok(unit)
    }
}

/// Reads files out of packs.
pub struct DataReader<'a> {
    packs: &'a [Pack],
    /// Most recently used last.
    units: Vec<((u32, u32), Vec<u8>)>,
}

impl<'a> DataReader<'a> {
    /// `packs` are those of the tree, in its order.
    pub fn new(packs: &'a [Pack]) -> DataReader<'a> {
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
