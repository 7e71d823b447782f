//! Units to a pack file.

use std::io::{self, Write};

use super::table::{ChunkEntry, UnitEntry};
use super::unit::EncodedUnit;
use crate::block::UnitBits;
use crate::digest::Digest;
use crate::meta::PackRef;

/// Writes a pack front to back.
#[derive(Debug)]
pub struct PackWriter<W: Write> {
    out: W,
    unit_bits: UnitBits,
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
    /// The pack holds [`super::MAX_PACK_BYTES`]: finish it and start another.
    #[error("the pack is full; finish it and start another")]
    Full,
    /// The output refused the bytes.
    #[error("cannot write the pack")]
    Io(#[from] io::Error),
}

#[allow(clippy::todo)]
impl<W: Write> PackWriter<W> {
    /// A pack of units of this size, written to `out` from its current position, which must be its start.
    pub fn new(out: W, unit_bits: UnitBits) -> PackWriter<W> {
        PackWriter { out, unit_bits, units: Vec::new(), chunks: Vec::new() }
    }

    /// Units that still fit.
    pub fn room(&self) -> u32 {
        todo!()
    }

    /// Appends a unit; `chunks` are the chunks in it as (digest, first block within the unit, blocks). Gives the unit's first block in the
    /// pack. Every unit but the last must be a whole one.
    pub fn push(&mut self, unit: &EncodedUnit, chunks: &[(Digest, u32, u32)]) -> Result<u32, WriteError> {
        let _ = (unit, chunks, &mut self.out, self.unit_bits, &self.units, &self.chunks);
        todo!()
    }

    /// Writes tables and footer.
    pub fn finish(self) -> Result<FinishedPack<W>, WriteError> {
        todo!()
    }
}
