//! Chunks that are stored already, outside of the layer: what is asked about them, and the order that a pack's chunks came in.

use std::io;
use std::sync::Arc;

use erofs::digest::Digest;
use erofs::meta::PackRef;
use erofs::pack::ChunkEntry;

/// Knows chunks of packs that exist. What it says must not change while a layer is converted, or the result would depend on the moment.
pub trait Known: Sync {
    /// Places where the chunk may be: names of packs and first blocks, in that order. A hint: only the pack's own table counts.
    fn candidates(&self, digest: &Digest) -> Vec<(Digest, u32)>;

    /// The verified chunk table of a pack that was given as a candidate; `None` if it cannot be used.
    fn table(&self, pack: &Digest) -> io::Result<Option<Arc<ChunkTable>>>;
}

/// What is stored elsewhere and may be referred to.
#[derive(Clone, Copy)]
pub struct Elsewhere<'a> {
    /// The chunks.
    pub known: &'a dyn Known,
    /// Packs that the layer may refer to besides its own.
    pub max_packs: usize,
}

impl Elsewhere<'static> {
    /// Nothing is.
    pub const NOTHING: Elsewhere<'static> = Elsewhere { known: &Nothing, max_packs: 0 };
}

/// No chunk at all.
struct Nothing;

impl Known for Nothing {
    fn candidates(&self, _: &Digest) -> Vec<(Digest, u32)> {
        Vec::new()
    }

    fn table(&self, _: &Digest) -> io::Result<Option<Arc<ChunkTable>>> {
        Ok(None)
    }
}

/// A pack's chunk table with each chunk's step: 52 bytes per chunk.
#[derive(Debug)]
pub struct ChunkTable {
    pack: PackRef,
    entries: Vec<(ChunkEntry, Step)>,
}

/// Where a chunk comes among those of its pack. Chunks that fill a unit are placed at once, smaller ones when the unit they share is full, so
/// a layer's chunks are in a pack as two sequences, each in the order of the archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    /// It fills a unit.
    whole: bool,
    /// Number in its sequence.
    rank: u32,
    /// Number of the shared unit that it is in, or that was being filled when it came.
    turn: u32,
}

/// Where a chunk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub pack: PackRef,
    pub block: u32,
    pub step: Step,
}

impl ChunkTable {
    /// The table of `pack`; `chunks` are as its footer vouches for them, in block order.
    pub fn new(pack: PackRef, chunks: Vec<ChunkEntry>) -> ChunkTable {
        let unit_blocks = pack.unit_bits.blocks();
        let (mut ranks, mut turn, mut last_shared) = ([0u32; 2], 0u32, None);
        let entries = chunks.into_iter().map(|chunk| {
            let whole = chunk.blocks == unit_blocks;
            let unit = Some(chunk.block / unit_blocks);
            if !whole && last_shared != unit {
                turn += u32::from(last_shared.is_some());
                last_shared = unit;
            }
            let rank = &mut ranks[usize::from(whole)];
            *rank += 1;
            // A whole unit after a shared one came while the next shared one was being filled.
            let turn = turn + u32::from(whole && last_shared.is_some());
            (chunk, Step { whole, rank: *rank, turn })
        });
        ChunkTable { pack, entries: entries.collect() }
    }

    /// The chunk at `block`, if it is the one with this digest and length.
    pub(super) fn place(&self, block: u32, digest: &Digest, blocks: u32) -> Option<Found> {
        let at = self.entries.binary_search_by_key(&block, |(chunk, _)| chunk.block).ok()?;
        let (chunk, step) = &self.entries[at];
        (chunk.digest == *digest && chunk.blocks == blocks).then_some(Found { pack: self.pack, block, step: *step })
    }

    /// The chunks, in block order.
    pub fn chunks(&self) -> impl Iterator<Item = &ChunkEntry> {
        self.entries.iter().map(|(chunk, _)| chunk)
    }
}

/// How far a run of chunks has come in a pack.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cursor {
    pub pack: Digest,
    /// Ranks of the last shared and the last whole chunk.
    ranks: [Option<u32>; 2],
    turn: u32,
}

impl Cursor {
    /// Of a run that begins at `place`.
    pub fn at(place: &Found) -> Cursor {
        let mut cursor = Cursor { pack: place.pack.digest, ranks: [None; 2], turn: place.step.turn };
        cursor.advance(place);
        cursor
    }

    /// Whether `place` comes next: right after the last one of its sequence; or, if it is the first of its sequence in this run, from about
    /// the same time as the last of the other.
    pub fn is_next(&self, place: &Found) -> bool {
        let step = place.step;
        place.pack.digest == self.pack
            && match self.ranks[usize::from(step.whole)] {
                Some(last) => step.rank == last + 1,
                None => step.turn == self.turn || step.turn == self.turn + 1,
            }
    }

    pub fn advance(&mut self, place: &Found) {
        self.ranks[usize::from(place.step.whole)] = Some(place.step.rank);
        self.turn = place.step.turn;
    }
}

#[cfg(test)]
mod tests {
    use erofs::block::UnitBits;
    use erofs::pack::Placer;

    use super::*;

    /// The table of a pack that pieces of so many blocks make, 16 being a unit; and the first block of each piece.
    fn pack_of(blocks: &[u32]) -> (ChunkTable, Vec<u32>) {
        let mut placer = Placer::new(UnitBits::MIN);
        let mut units: Vec<_> = blocks.iter().enumerate().filter_map(|(i, &n)| placer.push(vec![1; n as usize * 4096], i)).collect();
        units.extend(placer.finish());
        let mut first = vec![0; blocks.len()];
        let mut chunks = Vec::new();
        for (number, unit) in units.iter().enumerate() {
            for piece in &unit.pieces {
                first[piece.handle] = number as u32 * 16 + piece.block;
                chunks.push(ChunkEntry { digest: Digest([piece.handle as u8; 32]), block: first[piece.handle], blocks: piece.blocks });
            }
        }
        let pack = PackRef { digest: Digest([255; 32]), blocks: units.len() as u32 * 16, unit_bits: UnitBits::MIN };
        (ChunkTable::new(pack, chunks), first)
    }

    #[test]
    fn the_chunks_of_an_archive_follow_each_other_however_they_were_placed() {
        for blocks in [
            &[16, 16, 16][..],
            &[1, 2, 3],
            &[16, 3, 16, 3, 16, 3, 16, 3, 16, 3, 16, 3, 16, 3],
            &[9, 16, 9, 16, 16, 9, 9, 16, 1, 16],
            &[16, 16, 16, 16, 1, 16, 16, 16, 15, 16, 16, 2, 16],
        ] {
            let (table, first) = pack_of(blocks);
            let place = |i: usize| table.place(first[i], &Digest([i as u8; 32]), blocks[i]).unwrap();
            for from in 0..blocks.len() {
                let mut cursor = Cursor::at(&place(from));
                for to in from + 1..blocks.len() {
                    assert!(cursor.is_next(&place(to)), "{blocks:?}: {to} after {from}..");
                    cursor.advance(&place(to));
                }
            }
        }
    }

    #[test]
    fn what_lies_elsewhere_in_the_pack_does_not_follow() {
        let blocks = [16, 16, 16, 9, 9, 9, 9, 16];
        let (table, first) = pack_of(&blocks);
        let place = |i: usize| table.place(first[i], &Digest([i as u8; 32]), blocks[i]).unwrap();
        for (from, to) in [(0, 2), (1, 0), (3, 5), (4, 3), (0, 5), (3, 3)] {
            assert!(!Cursor::at(&place(from)).is_next(&place(to)), "{to} after {from}");
        }
    }

    #[test]
    fn only_what_the_table_says_is_a_place() {
        let (table, first) = pack_of(&[16, 3]);
        assert!(table.place(first[1], &Digest([1; 32]), 3).is_some());
        for (block, digest, blocks) in [(first[1], 1, 2), (first[1], 0, 3), (first[1] + 1, 1, 3), (99, 1, 3)] {
            assert!(table.place(block, &Digest([digest; 32]), blocks).is_none());
        }
    }
}
