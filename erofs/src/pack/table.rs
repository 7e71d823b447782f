//! Footer, unit table and chunk table of a pack: bytes to values and back.
//!
//! Everything here is read from a file store that others can write to. The digests say that a table is what its author wrote; the rules
//! checked on top of that say that using it cannot go wrong, whoever the author was.

use super::MAX_PACK_BYTES;
use crate::block::{BLOCK_SIZE, UnitBits};
use crate::digest::Digest;
use crate::meta::PackRef;

/// How a unit is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Codec {
    /// The bytes as they are.
    Raw = 0,
    /// One zstd frame.
    Zstd = 1,
}

/// Where one unit is and what it must hash to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitEntry {
    /// Offset in the pack file, 4 KiB-aligned.
    pub offset: u64,
    /// Bytes stored at `offset`.
    pub stored_len: u32,
    /// How they are stored.
    pub codec: Codec,
    /// BLAKE3 of the uncompressed unit, zero-padded to whole blocks.
    pub digest: Digest,
}

/// One chunk that the pack holds: what converters look up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkEntry {
    /// BLAKE3 of the chunk, zero-padded to whole blocks.
    pub digest: Digest,
    /// First block in the pack's uncompressed space.
    pub block: u32,
    /// Length in blocks.
    pub blocks: u32,
}

/// A pack's tables are not what its name promises, or not what this program reads.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    /// The bytes do not have the digest they must have: the file is damaged or truncated.
    #[error("pack {pack}: {part} is damaged (its BLAKE3 does not match); restore the pack file or convert the image again")]
    Damaged {
        /// Name of the pack.
        pack: Digest,
        /// `footer`, `unit table` or `chunk table`.
        part: &'static str,
    },
    /// Written by a newer Slipway (or with an algorithm this one does not have).
    #[error("pack {pack} has {what} {found}, which this version of Slipway does not read; upgrade Slipway")]
    Unsupported {
        /// Name of the pack.
        pack: Digest,
        /// What is unknown: `format version`, `digest algorithm`, ...
        what: &'static str,
        /// The value found.
        found: u32,
    },
    /// The digests match and yet the content breaks a rule of the format: whoever wrote it was wrong or hostile.
    #[error("pack {pack}: {part} breaks the format: {rule}; do not use this pack")]
    Malformed {
        /// Name of the pack.
        pack: Digest,
        /// `footer`, `unit table` or `chunk table`.
        part: &'static str,
        /// The rule that does not hold.
        rule: &'static str,
    },
}

/// First bytes of a footer.
const MAGIC: [u8; 8] = *b"SLWYPACK";
/// The format this module reads and writes.
const VERSION: u32 = 1;
/// Algorithm id of BLAKE3-256, the only digest so far.
const DIGEST_BLAKE3: u32 = 1;
/// Algorithm id of "units are raw or one zstd frame", the only set of codecs so far.
const CODECS_RAW_ZSTD: u32 = 1;

// Footer, in order:
//  8  magic
//  4  format version
//  4  digest algorithm
//  4  codec set
//  4  log2 of the unit size
//  4  units
//  4  chunks
//  4  blocks: uncompressed length
//  4  zero
//  8  offset of the unit table
//  8  offset of the chunk table
//  8  length of the file
// 32  BLAKE3 of the unit table
// 32  BLAKE3 of the chunk table
//     zeros
const VERSION_OFFSET: usize = MAGIC.len();
const DIGEST_ALGORITHM_OFFSET: usize = VERSION_OFFSET + size_of::<u32>();
const CODECS_OFFSET: usize = DIGEST_ALGORITHM_OFFSET + size_of::<u32>();
const UNIT_BITS_OFFSET: usize = CODECS_OFFSET + size_of::<u32>();
const UNITS_OFFSET: usize = UNIT_BITS_OFFSET + size_of::<u32>();
const CHUNKS_OFFSET: usize = UNITS_OFFSET + size_of::<u32>();
const BLOCKS_OFFSET: usize = CHUNKS_OFFSET + size_of::<u32>();
const ZERO_OFFSET: usize = BLOCKS_OFFSET + size_of::<u32>();
const UNIT_TABLE_OFFSET: usize = ZERO_OFFSET + size_of::<u32>();
const CHUNK_TABLE_OFFSET: usize = UNIT_TABLE_OFFSET + size_of::<u64>();
const FILE_LEN_OFFSET: usize = CHUNK_TABLE_OFFSET + size_of::<u64>();
const UNIT_TABLE_DIGEST_OFFSET: usize = FILE_LEN_OFFSET + size_of::<u64>();
const CHUNK_TABLE_DIGEST_OFFSET: usize = UNIT_TABLE_DIGEST_OFFSET + 32;
const REST_OFFSET: usize = CHUNK_TABLE_DIGEST_OFFSET + 32;

// Unit entry: u64 offset, u32 stored length, u8 codec, 3 zero bytes, 32-byte BLAKE3.
const UNIT_STORED_LEN_OFFSET: usize = size_of::<u64>();
const UNIT_CODEC_OFFSET: usize = UNIT_STORED_LEN_OFFSET + size_of::<u32>();
const UNIT_ZERO_OFFSET: usize = UNIT_CODEC_OFFSET + size_of::<u8>();
const UNIT_DIGEST_OFFSET: usize = UNIT_ZERO_OFFSET + 3;
const UNIT_ENTRY_LEN: usize = UNIT_DIGEST_OFFSET + 32;

// Chunk entry: 32-byte BLAKE3, u32 first block, u32 blocks.
const CHUNK_BLOCK_OFFSET: usize = 32;
const CHUNK_BLOCKS_OFFSET: usize = CHUNK_BLOCK_OFFSET + size_of::<u32>();
const CHUNK_ENTRY_LEN: usize = CHUNK_BLOCKS_OFFSET + size_of::<u32>();

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("eight bytes"))
}

fn digest_at(bytes: &[u8], offset: usize) -> Digest {
    Digest(bytes[offset..offset + 32].try_into().expect("32 bytes"))
}

/// `offset` rounded up to the next block boundary.
pub(super) fn align(offset: u64) -> u64 {
    offset.next_multiple_of(BLOCK_SIZE)
}

/// The footer of a pack, verified against the pack's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footer {
    pack: PackRef,
    units: u32,
    chunks: u32,
    unit_table: u64,
    chunk_table: u64,
    file_len: u64,
    unit_table_digest: Digest,
    chunk_table_digest: Digest,
}

impl Footer {
    /// The pack as trees refer to it.
    pub fn pack_ref(&self) -> PackRef {
        self.pack
    }

    /// Number of units.
    pub fn unit_count(&self) -> u32 {
        self.units
    }

    /// Offset and length in bytes of the unit table in the pack file.
    pub fn unit_table(&self) -> (u64, usize) {
        (self.unit_table, self.units as usize * UNIT_ENTRY_LEN)
    }

    /// Offset and length in bytes of the chunk table in the pack file.
    pub fn chunk_table(&self) -> (u64, usize) {
        (self.chunk_table, self.chunks as usize * CHUNK_ENTRY_LEN)
    }

    /// Length of the whole pack file in bytes.
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    /// Reads the chunk table, for converters that look for data which is stored already, in another layer's or image's packs: `bytes` are those at [`Footer::chunk_table`] of the pack file.
    ///
    /// Chunks come in block order, do not overlap, lie within the pack and never straddle a unit.
    pub fn parse_chunks(&self, bytes: &[u8]) -> Result<Vec<ChunkEntry>, PackError> {
        const PART: &str = "chunk table";
        self.check_table(bytes, self.chunk_table(), self.chunk_table_digest, PART)?;
        let broken = |rule| Err(PackError::Malformed { pack: self.pack.digest, part: PART, rule });
        let unit_blocks = u64::from(self.pack.unit_bits.blocks());
        let mut chunks = Vec::with_capacity(self.chunks as usize);
        let mut free = 0u64;
        for entry in bytes.chunks_exact(CHUNK_ENTRY_LEN) {
            let chunk =
                ChunkEntry { digest: digest_at(entry, 0), block: u32_at(entry, CHUNK_BLOCK_OFFSET), blocks: u32_at(entry, CHUNK_BLOCKS_OFFSET) };
            let (start, end) = (u64::from(chunk.block), u64::from(chunk.block) + u64::from(chunk.blocks));
            if chunk.blocks == 0 || end > u64::from(self.pack.blocks) {
                return broken("a chunk is empty or outside the pack");
            }
            if start < free {
                return broken("chunks overlap or are out of order");
            }
            if start / unit_blocks != (end - 1) / unit_blocks {
                return broken("a chunk straddles two units");
            }
            free = end;
            chunks.push(chunk);
        }
        Ok(chunks)
    }

    fn check_table(&self, bytes: &[u8], (_, len): (u64, usize), digest: Digest, part: &'static str) -> Result<(), PackError> {
        if bytes.len() != len || Digest::of(bytes) != digest {
            return Err(PackError::Damaged { pack: self.pack.digest, part });
        }
        Ok(())
    }

    fn parse(name: &Digest, bytes: &[u8]) -> Result<Footer, PackError> {
        const PART: &str = "footer";
        if bytes.len() as u64 != super::FOOTER_LEN || Digest::of(bytes) != *name {
            return Err(PackError::Damaged { pack: *name, part: PART });
        }
        let broken = |rule| PackError::Malformed { pack: *name, part: PART, rule };
        if bytes[..VERSION_OFFSET] != MAGIC {
            return Err(broken("it does not begin with the magic bytes"));
        }
        for (what, offset, known) in [
            ("format version", VERSION_OFFSET, VERSION),
            ("digest algorithm", DIGEST_ALGORITHM_OFFSET, DIGEST_BLAKE3),
            ("codec set", CODECS_OFFSET, CODECS_RAW_ZSTD),
        ] {
            let found = u32_at(bytes, offset);
            if found != known {
                return Err(PackError::Unsupported { pack: *name, what, found });
            }
        }
        let bits = u32_at(bytes, UNIT_BITS_OFFSET);
        let unit_bits = u8::try_from(bits).ok().and_then(UnitBits::new);
        let unit_bits = unit_bits.ok_or(PackError::Unsupported { pack: *name, what: "unit size 2 to the power of", found: bits })?;
        let footer = Footer {
            pack: PackRef { digest: *name, blocks: u32_at(bytes, BLOCKS_OFFSET), unit_bits },
            units: u32_at(bytes, UNITS_OFFSET),
            chunks: u32_at(bytes, CHUNKS_OFFSET),
            unit_table: u64_at(bytes, UNIT_TABLE_OFFSET),
            chunk_table: u64_at(bytes, CHUNK_TABLE_OFFSET),
            file_len: u64_at(bytes, FILE_LEN_OFFSET),
            unit_table_digest: digest_at(bytes, UNIT_TABLE_DIGEST_OFFSET),
            chunk_table_digest: digest_at(bytes, CHUNK_TABLE_DIGEST_OFFSET),
        };
        if u32_at(bytes, ZERO_OFFSET) != 0 || bytes[REST_OFFSET..].iter().any(|&b| b != 0) {
            return Err(broken("bytes that must be zero are not"));
        }
        footer.check_layout().map_err(broken)?;
        Ok(footer)
    }

    /// The rules that tie counts, offsets and lengths together; what breaks is said as a sentence.
    fn check_layout(&self) -> Result<(), &'static str> {
        let blocks = u64::from(self.pack.blocks);
        if blocks == 0 || blocks * BLOCK_SIZE > MAX_PACK_BYTES {
            return Err("the pack is empty or larger than 1 GiB");
        }
        if u64::from(self.units) != blocks.div_ceil(u64::from(self.pack.unit_bits.blocks())) {
            return Err("the number of units does not match the length");
        }
        if u64::from(self.chunks) > blocks {
            return Err("there are more chunks than blocks");
        }
        // What is not larger uncompressed than 1 GiB is never stored larger: a unit that does not compress is stored raw.
        if !self.unit_table.is_multiple_of(BLOCK_SIZE) || self.unit_table > MAX_PACK_BYTES {
            return Err("the unit table is not where it can be");
        }
        let (unit_table, unit_len) = self.unit_table();
        let (chunk_table, chunk_len) = self.chunk_table();
        if chunk_table != unit_table + unit_len as u64 {
            return Err("the chunk table does not follow the unit table");
        }
        if self.file_len != align(chunk_table + chunk_len as u64) + super::FOOTER_LEN {
            return Err("the file length does not match the tables");
        }
        Ok(())
    }
}

/// Footer and unit table: what a node holds of a pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackTable {
    footer: Footer,
    units: Vec<UnitEntry>,
}

impl PackTable {
    /// Reads a footer: `bytes` are the last [`super::FOOTER_LEN`] bytes of the pack file, `name` is the pack's name.
    pub fn parse_footer(name: &Digest, bytes: &[u8]) -> Result<Footer, PackError> {
        Footer::parse(name, bytes)
    }

    /// Reads the unit table: `bytes` are those at [`Footer::unit_table`] of the pack file.
    ///
    /// Units come in file order, do not overlap, end before the unit table, and none is stored longer than it is.
    pub fn parse(footer: Footer, bytes: &[u8]) -> Result<PackTable, PackError> {
        const PART: &str = "unit table";
        footer.check_table(bytes, footer.unit_table(), footer.unit_table_digest, PART)?;
        let broken = |rule| PackError::Malformed { pack: footer.pack.digest, part: PART, rule };
        let mut table = PackTable { footer, units: Vec::with_capacity(footer.units as usize) };
        let mut free = 0u64;
        for (index, entry) in bytes.chunks_exact(UNIT_ENTRY_LEN).enumerate() {
            let codec = match entry[UNIT_CODEC_OFFSET] {
                0 => Codec::Raw,
                1 => Codec::Zstd,
                _ => return Err(broken("a unit has an unknown codec")),
            };
            if entry[UNIT_ZERO_OFFSET..UNIT_DIGEST_OFFSET] != [0; 3] {
                return Err(broken("bytes that must be zero are not"));
            }
            let unit = UnitEntry {
                offset: u64_at(entry, 0),
                stored_len: u32_at(entry, UNIT_STORED_LEN_OFFSET),
                codec,
                digest: digest_at(entry, UNIT_DIGEST_OFFSET),
            };
            let (len, stored) = (table.unit_len(index as u32), unit.stored_len as usize);
            if stored == 0 || stored > len || (codec == Codec::Raw && stored != len) {
                return Err(broken("a unit's stored length is not possible"));
            }
            if !unit.offset.is_multiple_of(BLOCK_SIZE) || unit.offset < free {
                return Err(broken("units are not block-aligned, overlap or are out of order"));
            }
            free = unit
                .offset
                .checked_add(stored as u64)
                .filter(|end| *end <= footer.unit_table)
                .ok_or_else(|| broken("a unit ends after the unit table begins"))?;
            table.units.push(unit);
        }
        Ok(table)
    }

    /// The footer.
    pub fn footer(&self) -> &Footer {
        &self.footer
    }

    /// The pack as trees refer to it: name, length in blocks, unit size.
    pub fn pack_ref(&self) -> PackRef {
        self.footer.pack
    }

    /// Unit size.
    pub fn unit_bits(&self) -> UnitBits {
        self.footer.pack.unit_bits
    }

    /// Uncompressed length in blocks: the size of the EROFS device.
    pub fn blocks(&self) -> u32 {
        self.footer.pack.blocks
    }

    /// Number of units.
    pub fn unit_count(&self) -> u32 {
        self.footer.units
    }

    /// Unit number `index`, or `None` past the end.
    pub fn unit(&self, index: u32) -> Option<&UnitEntry> {
        self.units.get(index as usize)
    }

    /// Uncompressed bytes of unit `index`: the unit size, except that the last unit may be shorter (whole blocks); 0 past the end.
    pub fn unit_len(&self, index: u32) -> usize {
        let unit = self.unit_bits().bytes();
        let start = u64::from(index) * unit;
        (u64::from(self.blocks()) * BLOCK_SIZE).saturating_sub(start).min(unit) as usize
    }
}

/// Bytes of a unit table.
pub(super) fn encode_units(units: &[UnitEntry]) -> Vec<u8> {
    let mut out = Vec::with_capacity(units.len() * UNIT_ENTRY_LEN);
    for unit in units {
        out.extend_from_slice(&unit.offset.to_le_bytes());
        out.extend_from_slice(&unit.stored_len.to_le_bytes());
        out.extend_from_slice(&[unit.codec as u8, 0, 0, 0]);
        out.extend_from_slice(&unit.digest.0);
    }
    out
}

/// Bytes of a chunk table.
pub(super) fn encode_chunks(chunks: &[ChunkEntry]) -> Vec<u8> {
    let mut out = Vec::with_capacity(chunks.len() * CHUNK_ENTRY_LEN);
    for chunk in chunks {
        out.extend_from_slice(&chunk.digest.0);
        out.extend_from_slice(&chunk.block.to_le_bytes());
        out.extend_from_slice(&chunk.blocks.to_le_bytes());
    }
    out
}

/// Bytes of the footer over these tables, the first of which begins at `unit_table`.
pub(super) fn encode_footer(unit_bits: UnitBits, blocks: u32, unit_table: u64, units: &[u8], chunks: &[u8]) -> Vec<u8> {
    let chunk_table = unit_table + units.len() as u64;
    let file_len = align(chunk_table + chunks.len() as u64) + super::FOOTER_LEN;
    let mut out = Vec::with_capacity(super::FOOTER_LEN as usize);
    out.extend_from_slice(&MAGIC);
    for field in [VERSION, DIGEST_BLAKE3, CODECS_RAW_ZSTD, u32::from(unit_bits.bits())] {
        out.extend_from_slice(&field.to_le_bytes());
    }
    for field in [(units.len() / UNIT_ENTRY_LEN) as u32, (chunks.len() / CHUNK_ENTRY_LEN) as u32, blocks, 0] {
        out.extend_from_slice(&field.to_le_bytes());
    }
    for field in [unit_table, chunk_table, file_len] {
        out.extend_from_slice(&field.to_le_bytes());
    }
    out.extend_from_slice(&Digest::of(units).0);
    out.extend_from_slice(&Digest::of(chunks).0);
    out.resize(super::FOOTER_LEN as usize, 0);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A pack of three 64 KiB units and one of two blocks, as its tables.
    fn sample() -> (Vec<UnitEntry>, Vec<ChunkEntry>) {
        let digest = |n: u8| Digest([n; 32]);
        let unit = |offset, stored_len, codec, n| UnitEntry { offset, stored_len, codec, digest: digest(n) };
        let chunk = |n, block, blocks| ChunkEntry { digest: digest(n), block, blocks };
        (
            vec![unit(0, 5000, Codec::Zstd, 1), unit(8192, 65536, Codec::Raw, 2), unit(73728, 1, Codec::Zstd, 3), unit(77824, 8192, Codec::Raw, 4)],
            vec![chunk(1, 0, 16), chunk(5, 16, 3), chunk(6, 19, 12), chunk(3, 32, 16), chunk(4, 48, 2)],
        )
    }

    /// Footer and tables of these entries, with `blocks` and `unit_table` as given.
    fn encoded(units: &[UnitEntry], chunks: &[ChunkEntry], blocks: u32, unit_table: u64) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
        let (units, chunks) = (encode_units(units), encode_chunks(chunks));
        (encode_footer(UnitBits::MIN, blocks, unit_table, &units, &chunks), units, chunks)
    }

    fn parsed((footer, units, chunks): &(Vec<u8>, Vec<u8>, Vec<u8>)) -> Result<(PackTable, Vec<ChunkEntry>), String> {
        let text = |e: PackError| match e {
            PackError::Malformed { part, rule, .. } => format!("{part}: {rule}"),
            PackError::Unsupported { what, found, .. } => format!("{what} {found}"),
            PackError::Damaged { part, .. } => format!("{part} damaged"),
        };
        let footer = PackTable::parse_footer(&Digest::of(footer), footer).map_err(text)?;
        let table = PackTable::parse(footer, units).map_err(text)?;
        Ok((table, footer.parse_chunks(chunks).map_err(text)?))
    }

    #[test]
    fn what_is_encoded_is_parsed() {
        let (units, chunks) = sample();
        let bytes = encoded(&units, &chunks, 50, 86016);
        let (table, found) = parsed(&bytes).unwrap();
        assert_eq!((&table.units, &found), (&units, &chunks));
        assert_eq!(table.footer().unit_table(), (86016, 4 * 48));
        assert_eq!(table.footer().chunk_table(), (86016 + 192, 5 * 40));
        assert_eq!(table.footer().file_len(), 86016 + 4096 + 4096);
        assert_eq!([0, 1, 2, 3, 4].map(|i| table.unit_len(i)), [65536, 65536, 65536, 8192, 0]);
        assert_eq!(table.unit(4), None);
    }

    #[test]
    fn footer_bytes_are_these() {
        let (units, chunks) = sample();
        let (footer, units, chunks) = encoded(&units, &chunks, 50, 86016);
        let head: Vec<String> = footer[..64].chunks(8).map(|row| row.iter().map(|b| format!("{b:02x}")).collect()).collect();
        assert_eq!(
            head,
            [
                "534c57595041434b", // SLWYPACK
                "0100000001000000", // version 1, BLAKE3
                "0100000010000000", // raw or zstd, 64 KiB units
                "0400000005000000", // 4 units, 5 chunks
                "3200000000000000", // 50 blocks, zero
                "0050010000000000", // unit table
                "c050010000000000", // chunk table
                "0070010000000000", // file length
            ]
        );
        assert_eq!(footer[64..96], Digest::of(&units).0);
        assert_eq!(footer[96..128], Digest::of(&chunks).0);
        assert!(footer[128..].iter().all(|&b| b == 0) && footer.len() == 4096);
        assert_eq!(Digest::of(&footer).to_string(), "4c442571d38622590b8281799efbe196f2b714ee6969004dc8952ab139ea152a");
        assert_eq!(units[48..68], [0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 2, 2, 2, 2], "second unit entry");
        assert_eq!(chunks[40 + 30..40 + 40], [5, 5, 16, 0, 0, 0, 3, 0, 0, 0], "second chunk entry");
    }

    #[test]
    fn tables_that_break_a_rule_are_refused() {
        let check = |change: &dyn Fn(&mut Vec<UnitEntry>, &mut Vec<ChunkEntry>, &mut u32, &mut u64), expected: &str| {
            let ((mut units, mut chunks), mut blocks, mut unit_table) = (sample(), 50, 86016);
            change(&mut units, &mut chunks, &mut blocks, &mut unit_table);
            assert_eq!(parsed(&encoded(&units, &chunks, blocks, unit_table)).err().unwrap_or_default(), expected);
        };
        check(&|_, _, _, _| (), "");
        check(&|_, _, blocks, _| *blocks = 48, "footer: the number of units does not match the length");
        check(&|_, _, blocks, _| *blocks = 65, "footer: the number of units does not match the length");
        check(&|units, _, blocks, _| (units.clear(), *blocks = 0).1, "footer: the pack is empty or larger than 1 GiB");
        check(&|_, _, blocks, _| *blocks = 262_145, "footer: the pack is empty or larger than 1 GiB");
        check(&|_, chunks, _, _| *chunks = vec![chunks[0]; 51], "footer: there are more chunks than blocks");
        check(&|_, _, _, table| *table += 1, "footer: the unit table is not where it can be");
        check(&|_, _, _, table| *table = 1 << 40, "footer: the unit table is not where it can be");
        check(&|units, _, _, _| units[0].stored_len = 0, "unit table: a unit's stored length is not possible");
        check(&|units, _, _, _| units[0].stored_len = 65537, "unit table: a unit's stored length is not possible");
        check(&|units, _, _, _| units[1].stored_len = 65535, "unit table: a unit's stored length is not possible");
        check(&|units, _, _, _| units[1].offset = 4096, "unit table: units are not block-aligned, overlap or are out of order");
        check(&|units, _, _, _| units[1].offset = 8193, "unit table: units are not block-aligned, overlap or are out of order");
        check(&|units, _, _, _| units[3].offset = 81920, "unit table: a unit ends after the unit table begins");
        check(&|units, _, _, _| units[3].offset = u64::MAX - 4095, "unit table: a unit ends after the unit table begins");
        check(&|_, chunks, _, _| chunks[0].blocks = 0, "chunk table: a chunk is empty or outside the pack");
        check(&|_, chunks, _, _| chunks[4].blocks = 3, "chunk table: a chunk is empty or outside the pack");
        check(&|_, chunks, _, _| chunks[4].block = u32::MAX, "chunk table: a chunk is empty or outside the pack");
        check(&|_, chunks, _, _| chunks[2].block = 18, "chunk table: chunks overlap or are out of order");
        check(&|_, chunks, _, _| chunks[2].blocks = 14, "chunk table: a chunk straddles two units");
    }

    #[test]
    fn a_footer_of_another_format_is_refused_by_name() {
        let check = |offset: usize, value: u8, expected: &str| {
            let (units, chunks) = sample();
            let mut bytes = encoded(&units, &chunks, 50, 86016);
            bytes.0[offset] = value;
            assert_eq!(parsed(&bytes).err().unwrap_or_default(), expected, "{offset}");
        };
        check(0, b's', "footer: it does not begin with the magic bytes");
        check(VERSION_OFFSET, 2, "format version 2");
        check(DIGEST_ALGORITHM_OFFSET, 9, "digest algorithm 9");
        check(CODECS_OFFSET, 2, "codec set 2");
        check(UNIT_BITS_OFFSET, 12, "unit size 2 to the power of 12");
        check(ZERO_OFFSET, 1, "footer: bytes that must be zero are not");
        check(REST_OFFSET, 1, "footer: bytes that must be zero are not");
        check(4095, 1, "footer: bytes that must be zero are not");
        check(CHUNK_TABLE_OFFSET, 0, "footer: the chunk table does not follow the unit table");
        check(FILE_LEN_OFFSET, 1, "footer: the file length does not match the tables");
        check(UNIT_TABLE_DIGEST_OFFSET, 0, "unit table damaged");
        check(CHUNK_TABLE_DIGEST_OFFSET, 0, "chunk table damaged");
    }

    #[test]
    fn truncation_at_every_byte_and_flipped_bytes_are_damage() {
        let (units, chunks) = sample();
        let (footer, units, _) = encoded(&units, &chunks, 50, 86016);
        let name = Digest::of(&footer);
        for len in 0..footer.len() {
            assert!(matches!(PackTable::parse_footer(&name, &footer[..len]), Err(PackError::Damaged { .. })), "{len}");
        }
        let parsed = PackTable::parse_footer(&name, &footer).unwrap();
        for len in 0..units.len() {
            assert!(matches!(PackTable::parse(parsed, &units[..len]), Err(PackError::Damaged { .. })), "{len}");
            let mut flipped = units.clone();
            flipped[len] ^= 0x40;
            assert!(matches!(PackTable::parse(parsed, &flipped), Err(PackError::Damaged { .. })), "{len}");
        }
    }

    proptest! {
        /// Whoever writes the store can also make digests match: no bytes may panic or allocate beyond the format's own bounds.
        #[test]
        fn hostile_tables_with_matching_digests_never_panic(
            edits in prop::collection::vec((0usize..136, any::<u8>()), 0..6),
            unit_edits in prop::collection::vec((0usize..192, any::<u8>()), 0..6),
            chunk_edits in prop::collection::vec((0usize..200, any::<u8>()), 0..6),
        ) {
            let (units, chunks) = sample();
            let (mut units, mut chunks) = (encode_units(&units), encode_chunks(&chunks));
            unit_edits.iter().for_each(|&(at, value)| units[at] = value);
            chunk_edits.iter().for_each(|&(at, value)| chunks[at] = value);
            let mut footer = encode_footer(UnitBits::MIN, 50, 86016, &units, &chunks);
            edits.iter().for_each(|&(at, value)| footer[at] = value);
            if let Ok((table, chunks)) = parsed(&(footer, units, chunks)) {
                for index in 0..table.unit_count() {
                    let unit = table.unit(index).unwrap();
                    prop_assert!(unit.offset + u64::from(unit.stored_len) <= table.footer().file_len());
                    prop_assert!(unit.stored_len as usize <= table.unit_len(index));
                }
                prop_assert!(chunks.iter().all(|c| c.block + c.blocks <= table.blocks()));
            }
        }
    }
}
