//! Placement: chunks of files in, full units out. Pure.

use crate::block::{BLOCK_SIZE, UnitBits, blocks_for};

/// Puts chunks into units: a whole chunk is its own unit at once; smaller pieces share an open unit, each on its own blocks, in the
/// order they come, never straddling two units. `T` is the caller's handle of a chunk, given back when the chunk's unit is full.
///
/// Order is all that locality has: files that lie next to each other in the layer are likely to be read together, so they go next to
/// each other into the pack.
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

impl<T> Placer<T> {
    /// A placer for units of this size.
    pub fn new(unit_bits: UnitBits) -> Placer<T> {
        Placer { unit_bits, open: Vec::new(), pieces: Vec::new() }
    }

    /// Takes a buffer for the unit that pieces will share next, if it has none: whatever is in it, it is emptied.
    pub fn lend(&mut self, buffer: impl FnOnce() -> Vec<u8>) {
        if self.open.capacity() == 0 {
            self.open = buffer();
            self.open.clear();
        }
    }

    /// Places one chunk of 1 ..= unit-size bytes. Gives the unit that this filled or closed, if any.
    pub fn push(&mut self, mut chunk: Vec<u8>, handle: T) -> Option<PlacedUnit<T>> {
        let unit = self.unit_bits.bytes() as usize;
        debug_assert!(!chunk.is_empty() && chunk.len() <= unit);
        let blocks = blocks_for(chunk.len() as u64) as u32;
        chunk.resize(blocks as usize * BLOCK_SIZE as usize, 0);
        if chunk.len() == unit {
            return Some(PlacedUnit { data: chunk, pieces: vec![Piece { handle, block: 0, blocks }] });
        }
        let closed = if self.open.len() + chunk.len() > unit { self.close() } else { None };
        if self.open.capacity() == 0 {
            self.open.reserve_exact(unit);
        }
        let block = (self.open.len() as u64 / BLOCK_SIZE) as u32;
        self.open.extend_from_slice(&chunk);
        self.pieces.push(Piece { handle, block, blocks });
        // At most one of the two happens: what did not fit an open unit does not fill a fresh one.
        if self.open.len() == unit { self.close() } else { closed }
    }

    /// The last, possibly short unit, if anything is in it.
    pub fn finish(self) -> Option<PlacedUnit<T>> {
        if self.pieces.is_empty() { None } else { Some(PlacedUnit { data: self.open, pieces: self.pieces }) }
    }

    fn close(&mut self) -> Option<PlacedUnit<T>> {
        if self.pieces.is_empty() {
            return None;
        }
        let mut data = std::mem::take(&mut self.open);
        data.resize(self.unit_bits.bytes() as usize, 0);
        Some(PlacedUnit { data, pieces: std::mem::take(&mut self.pieces) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCK: usize = BLOCK_SIZE as usize;
    const UNIT: usize = 65536;

    /// Pushes chunks of these lengths into 64 KiB units; what comes out, as one line per unit: `handle@block+blocks ...: blocks`.
    fn check(lengths: &[usize], expected: &[&str]) {
        let mut placer = Placer::new(UnitBits::MIN);
        let mut units: Vec<_> = lengths.iter().enumerate().filter_map(|(i, &len)| placer.push(vec![i as u8 + 1; len], i)).collect();
        units.extend(placer.finish());
        let lines: Vec<String> = units
            .iter()
            .map(|unit| {
                let pieces: Vec<String> = unit.pieces.iter().map(|p| format!("{}@{}+{}", p.handle, p.block, p.blocks)).collect();
                format!("{}: {}", pieces.join(" "), unit.data.len() / BLOCK)
            })
            .collect();
        assert_eq!(lines, expected, "{lengths:?}");
    }

    #[test]
    fn chunks_go_where_they_should() {
        check(&[], &[]);
        check(&[1], &["0@0+1: 1"]);
        check(&[UNIT], &["0@0+16: 16"]);
        check(&[UNIT - BLOCK + 1], &["0@0+16: 16"]);
        check(&[UNIT - BLOCK], &["0@0+15: 15"]);
        check(&[1, BLOCK, BLOCK + 1], &["0@0+1 1@1+1 2@2+2: 4"]);
        // A whole chunk does not close the open unit.
        check(&[1, UNIT, 1], &["1@0+16: 16", "0@0+1 2@1+1: 2"]);
        // What does not fit closes it, padded; what fills it exactly closes it at once.
        check(&[UNIT / 2, UNIT / 2 + 1, 1], &["0@0+8: 16", "1@0+9 2@9+1: 10"]);
        check(&[UNIT / 2, UNIT / 2, 1], &["0@0+8 1@8+8: 16", "2@0+1: 1"]);
    }

    proptest! {
        #[test]
        fn every_chunk_is_found_whole_on_its_own_blocks(lengths in prop::collection::vec(prop_oneof![1usize..9000, 1usize..=UNIT], 0..60)) {
            let mut placer = Placer::new(UnitBits::MIN);
            let mut units: Vec<_> = lengths.iter().enumerate().filter_map(|(i, &len)| placer.push(vec![i as u8 | 1; len], i)).collect();
            prop_assert!(units.iter().all(|u| u.data.len() == UNIT));
            units.extend(placer.finish());
            let mut seen = vec![false; lengths.len()];
            for unit in &units {
                let mut free = 0;
                for piece in &unit.pieces {
                    prop_assert!(piece.block >= free);
                    free = piece.block + piece.blocks;
                    let bytes = &unit.data[piece.block as usize * BLOCK..free as usize * BLOCK];
                    let (chunk, padding) = bytes.split_at(lengths[piece.handle]);
                    prop_assert!(chunk.iter().all(|&b| b == piece.handle as u8 | 1) && padding.iter().all(|&b| b == 0) && padding.len() < BLOCK);
                    prop_assert!(!std::mem::replace(&mut seen[piece.handle], true));
                }
                prop_assert!(unit.data[free as usize * BLOCK..].iter().all(|&b| b == 0));
            }
            prop_assert!(seen.into_iter().all(|s| s));
        }
    }
}
