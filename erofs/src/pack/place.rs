//! Placement: chunks of files in, full units out. Pure.

use crate::block::UnitBits;

/// Puts chunks into units: a whole chunk is its own unit at once; smaller pieces share an open unit, each on its own blocks, in the
/// order they come, never straddling two units. `T` is the caller's handle of a chunk, given back when the chunk's unit is full.
#[derive(Debug)]
pub struct Placer<T> {
    unit_bits: UnitBits,
    open: Vec<u8>,
    pieces: Vec<Piece<T>>,
}

/// A unit with what is in it. `data` is a whole unit, zero-padded; only the one [`Placer::finish`] gives may be shorter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedUnit<T> {
    /// Uncompressed bytes, whole blocks.
    pub data: Vec<u8>,
    /// The chunks in it, in block order.
    pub pieces: Vec<Piece<T>>,
}

/// One chunk's place in its unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<T> {
    /// What the caller gave with the chunk.
    pub handle: T,
    /// First block within the unit.
    pub block: u32,
    /// Length in blocks.
    pub blocks: u32,
}

#[allow(clippy::todo)]
impl<T> Placer<T> {
    /// A placer for units of this size.
    pub fn new(unit_bits: UnitBits) -> Placer<T> {
        Placer { unit_bits, open: Vec::new(), pieces: Vec::new() }
    }

    /// Places one chunk of 1 ..= unit-size bytes. Gives the unit that this filled or closed, if any.
    pub fn push(&mut self, chunk: Vec<u8>, handle: T) -> Option<PlacedUnit<T>> {
        let _ = (chunk, handle, &self.open, &self.pieces, self.unit_bits);
        todo!()
    }

    /// The last, possibly short unit, if anything is in it.
    pub fn finish(self) -> Option<PlacedUnit<T>> {
        todo!()
    }
}
