//! Footer, unit table and chunk table of a pack: bytes to values and back.

use crate::block::UnitBits;
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

/// The footer of a pack, verified against the pack's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footer {
    pack: PackRef,
}

/// Footer and unit table: what a node holds of a pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackTable {
    footer: Footer,
    units: Vec<UnitEntry>,
}

#[allow(clippy::todo)]
impl PackTable {
    /// See [`crate::pack::FOOTER_LEN`].
    pub const FOOTER_LEN: u64 = super::FOOTER_LEN;

    /// Reads a footer: `bytes` are the last [`Self::FOOTER_LEN`] bytes of the pack file, `name` is the pack's name.
    pub fn parse_footer(name: &Digest, bytes: &[u8]) -> Result<Footer, PackError> {
        let _ = (name, bytes);
        todo!()
    }

    /// Reads the unit table: `bytes` are those at [`Footer::unit_table`] of the pack file.
    pub fn parse(footer: Footer, bytes: &[u8]) -> Result<PackTable, PackError> {
        let _ = (footer, bytes);
        todo!()
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
        self.units.len() as u32
    }

    /// Unit number `index`, or `None` past the end.
    pub fn unit(&self, index: u32) -> Option<&UnitEntry> {
        self.units.get(index as usize)
    }

    /// Uncompressed bytes of unit `index`: the unit size, except that the last unit may be shorter (whole blocks); 0 past the end.
    pub fn unit_len(&self, index: u32) -> usize {
        let _ = index;
        todo!()
    }
}

#[allow(clippy::todo)]
impl Footer {
    /// The pack as trees refer to it.
    pub fn pack_ref(&self) -> PackRef {
        self.pack
    }

    /// Offset and length in bytes of the unit table in the pack file.
    pub fn unit_table(&self) -> (u64, usize) {
        todo!()
    }

    /// Offset and length in bytes of the chunk table in the pack file.
    pub fn chunk_table(&self) -> (u64, usize) {
        todo!()
    }

    /// Length of the whole pack file in bytes.
    pub fn file_len(&self) -> u64 {
        todo!()
    }

    /// Reads the chunk table: `bytes` are those at [`Footer::chunk_table`] of the pack file.
    pub fn parse_chunks(&self, bytes: &[u8]) -> Result<Vec<ChunkEntry>, PackError> {
        let _ = bytes;
        todo!()
    }
}
