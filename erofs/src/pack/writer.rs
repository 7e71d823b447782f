//! Units to a pack file.

use std::io::{self, Write};

use super::table::{ChunkEntry, UnitEntry, align, encode_chunks, encode_footer, encode_units};
use super::unit::EncodedUnit;
use super::{FOOTER_LEN, MAX_PACK_BYTES};
use crate::block::{BLOCK_SIZE, UnitBits};
use crate::digest::Digest;
use crate::meta::PackRef;

/// Writes a pack front to back. It holds the tables in memory (40 bytes per chunk, at most 10 MiB) and no data.
#[derive(Debug)]
pub struct PackWriter<W: Write> {
    out: W,
    unit_bits: UnitBits,
    /// Uncompressed length so far.
    blocks: u32,
    /// Bytes written so far.
    offset: u64,
    units: Vec<UnitEntry>,
    chunks: Vec<ChunkEntry>,
}

/// A pack completely written (not yet flushed to disk: that is for whoever owns `out`).
#[derive(Debug)]
pub struct FinishedPack<W> {
    /// Where it went.
    pub out: W,
    /// Name, length, unit size.
    pub pack: PackRef,
    /// Length of the pack file in bytes.
    pub file_len: u64,
}

/// Why a pack could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The pack holds [`MAX_PACK_BYTES`], or its last unit was a short one: finish it and start another.
    #[error("the pack is full; finish it and start another")]
    Full,
    /// The output refused the bytes.
    #[error("cannot write the pack")]
    Io(#[from] io::Error),
}

impl<W: Write> PackWriter<W> {
    /// A pack of units of this size, written to `out` from its current position, which must be its start.
    pub fn new(out: W, unit_bits: UnitBits) -> PackWriter<W> {
        PackWriter { out, unit_bits, blocks: 0, offset: 0, units: Vec::new(), chunks: Vec::new() }
    }

    /// Units that still fit.
    pub fn room(&self) -> u32 {
        if !self.blocks.is_multiple_of(self.unit_bits.blocks()) {
            return 0;
        }
        (MAX_PACK_BYTES / self.unit_bits.bytes()) as u32 - self.units.len() as u32
    }

    /// Appends a unit; `chunks` are the chunks in it as (digest, first block within the unit, blocks), in block order. Gives the unit's
    /// first block in the pack. Every unit but the last must be a whole one.
    pub fn push(&mut self, unit: &EncodedUnit, chunks: &[(Digest, u32, u32)]) -> Result<u32, WriteError> {
        if self.room() == 0 {
            return Err(WriteError::Full);
        }
        debug_assert!(unit.blocks <= self.unit_bits.blocks());
        let offset = self.pad()?;
        self.write(&unit.stored)?;
        let first = self.blocks;
        self.units.push(UnitEntry { offset, stored_len: unit.stored.len() as u32, codec: unit.codec, digest: unit.digest });
        self.chunks.extend(chunks.iter().map(|&(digest, block, blocks)| ChunkEntry { digest, block: first + block, blocks }));
        self.blocks += unit.blocks;
        Ok(first)
    }

    /// Writes tables and footer. A pack without a unit is no pack: push at least one.
    pub fn finish(mut self) -> Result<FinishedPack<W>, WriteError> {
        debug_assert!(!self.units.is_empty());
        let unit_table = self.pad()?;
        let (units, chunks) = (encode_units(&self.units), encode_chunks(&self.chunks));
        self.write(&units)?;
        self.write(&chunks)?;
        self.pad()?;
        let footer = encode_footer(self.unit_bits, self.blocks, unit_table, &units, &chunks);
        debug_assert_eq!(footer.len() as u64, FOOTER_LEN);
        self.write(&footer)?;
        self.out.flush()?;
        let pack = PackRef { digest: Digest::of(&footer), blocks: self.blocks, unit_bits: self.unit_bits };
        Ok(FinishedPack { out: self.out, pack, file_len: self.offset })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        self.out.write_all(bytes)?;
        self.offset += bytes.len() as u64;
        Ok(())
    }

    /// Zeros up to the next block boundary; gives its offset.
    fn pad(&mut self) -> Result<u64, WriteError> {
        const ZEROS: [u8; BLOCK_SIZE as usize] = [0; BLOCK_SIZE as usize];
        let missing = align(self.offset) - self.offset;
        self.write(&ZEROS[..missing as usize])?;
        Ok(self.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::{PackTable, Placer, decode_unit, encode_unit};
    use proptest::prelude::*;

    /// Reads a whole pack back the way a node does, verifying everything: units and chunks.
    fn read_back(name: &Digest, file: &[u8]) -> (Vec<Vec<u8>>, Vec<ChunkEntry>) {
        let footer = PackTable::parse_footer(name, &file[file.len() - FOOTER_LEN as usize..]).unwrap();
        assert_eq!(footer.file_len(), file.len() as u64);
        let at = |(offset, len): (u64, usize)| &file[offset as usize..offset as usize + len];
        let table = PackTable::parse(footer, at(footer.unit_table())).unwrap();
        let units = (0..table.unit_count()).map(|index| {
            let unit = table.unit(index).unwrap();
            let mut out = vec![0; table.unit_len(index)];
            decode_unit(unit, at((unit.offset, unit.stored_len as usize)), &mut out).unwrap();
            out
        });
        (units.collect(), footer.parse_chunks(at(footer.chunk_table())).unwrap())
    }

    #[test]
    fn a_pack_reads_back_and_its_bytes_are_the_same_each_time() {
        let unit = encode_unit(&[5; 65536], 1);
        let short = encode_unit(&[6; 8192], 1);
        let write = || {
            let mut writer = PackWriter::new(Vec::new(), UnitBits::MIN);
            assert_eq!(writer.push(&unit, &[(unit.digest, 0, 16)]).unwrap(), 0);
            assert_eq!(writer.push(&short, &[(Digest([1; 32]), 0, 1), (Digest([2; 32]), 1, 1)]).unwrap(), 16);
            assert!(matches!(writer.push(&unit, &[]), Err(WriteError::Full)), "nothing follows a short unit");
            writer.finish().unwrap()
        };
        let pack = write();
        assert_eq!((pack.file_len, pack.pack.blocks), (pack.out.len() as u64, 18));
        let (units, chunks) = read_back(&pack.pack.digest, &pack.out);
        assert_eq!(units, [vec![5; 65536], vec![6; 8192]]);
        assert_eq!(chunks.iter().map(|c| (c.block, c.blocks)).collect::<Vec<_>>(), [(0, 16), (16, 1), (17, 1)]);
        assert_eq!(write().out, pack.out);
    }

    #[test]
    fn a_pack_is_full_at_one_gibibyte() {
        let mut writer = PackWriter::new(io::sink(), UnitBits::MAX);
        let unit = encode_unit(&vec![0; 1 << 20], 1);
        for _ in 0..1024 {
            writer.push(&unit, &[]).unwrap();
        }
        assert!(matches!(writer.push(&unit, &[]), Err(WriteError::Full)));
        assert_eq!(u64::from(writer.finish().unwrap().pack.blocks) * BLOCK_SIZE, MAX_PACK_BYTES);
    }

    #[test]
    fn an_output_that_fails_is_an_error() {
        let unit = encode_unit(&[5; 65536], 1);
        let mut room = [0; 10];
        let mut writer = PackWriter::new(&mut room[..], UnitBits::MIN);
        assert!(matches!(writer.push(&unit, &[]), Err(WriteError::Io(_))));
    }

    proptest! {
        #[test]
        fn chunks_placed_and_written_are_found_by_their_table(lengths in prop::collection::vec(prop_oneof![1usize..9000, 1usize..=65536], 1..40)) {
            let chunk = |i: usize| vec![i as u8 | 1; lengths[i]];
            let (mut placer, mut writer) = (Placer::new(UnitBits::MIN), PackWriter::new(Vec::new(), UnitBits::MIN));
            let mut units: Vec<_> = (0..lengths.len()).filter_map(|i| placer.push(chunk(i), i)).collect();
            units.extend(placer.finish());
            for unit in units {
                let name = |i| Digest::of_padded(&chunk(i), lengths[i].next_multiple_of(4096) as u64);
                let chunks: Vec<_> = unit.pieces.iter().map(|p| (name(p.handle), p.block, p.blocks)).collect();
                writer.push(&encode_unit(&unit.data, 1), &chunks).unwrap();
            }
            let pack = writer.finish().unwrap();
            let (units, chunks) = read_back(&pack.pack.digest, &pack.out);
            let space = units.concat();
            prop_assert_eq!(space.len(), pack.pack.blocks as usize * 4096);
            prop_assert_eq!(chunks.len(), lengths.len());
            for c in chunks {
                prop_assert_eq!(Digest::of(&space[c.block as usize * 4096..(c.block + c.blocks) as usize * 4096]), c.digest);
            }
        }
    }
}
