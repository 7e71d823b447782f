//! Chunks that are stored already, outside of the layer: what is asked about them, and the order that a pack's chunks came in.

use std::io;
use std::sync::Arc;

use erofs::digest::Digest;
use erofs::meta::PackRef;
use erofs::pack::ChunkEntry;

/// Knows chunks of packs that exist. What it says must not change while a layer is converted, or the result would depend on the moment.
pub trait Known: Sync {
    /// Places where the chunk may be: names of packs and first blocks, in that order; all those in packs that are preferred, and some others. A hint: only
    /// the pack's own table counts.
    fn candidates(&self, digest: &Digest, is_preferred: &dyn Fn(&Digest) -> bool) -> Vec<(Digest, u32)>;

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
    fn candidates(&self, _: &Digest, _: &dyn Fn(&Digest) -> bool) -> Vec<(Digest, u32)> {
        Vec::new()
    }

    fn table(&self, _: &Digest) -> io::Result<Option<Arc<ChunkTable>>> {
        Ok(None)
    }
}

/// A pack's chunk table with each chunk's step: 56 bytes per chunk.
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
    /// Blocks of its sequence before it, and with it.
    start: u32,
    end: u32,
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
        let (mut ends, mut turn, mut last_shared) = ([0u32; 2], 0u32, None);
        let entries = chunks.into_iter().map(|chunk| {
            let whole = chunk.blocks == unit_blocks;
            let unit = Some(chunk.block / unit_blocks);
            if !whole && last_shared != unit {
                turn += u32::from(last_shared.is_some());
                last_shared = unit;
            }
            let end = &mut ends[usize::from(whole)];
            let start = *end;
            *end += chunk.blocks;
            // A whole unit after a shared one came while the next shared one was being filled.
            let turn = turn + u32::from(whole && last_shared.is_some());
            (chunk, Step { whole, start, end: *end, turn })
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
    /// Where the last chunk of each sequence ends.
    ends: [Option<u32>; 2],
    turn: u32,
    /// Blocks in the run, and blocks that it left out.
    taken: u32,
    skipped: u32,
}

impl Cursor {
    /// Of a run that begins at `found`, before that is taken.
    pub fn before(found: &Found) -> Cursor {
        Cursor { ends: [None; 2], turn: found.step.turn, taken: 0, skipped: 0 }
    }

    /// Whether `found`, which is in the run's pack, goes on with the run. In its sequence it comes right after the last one, or a unit at most is left
    /// out, as what another version of a file has taken the place of, and all that is left out is no more than what is taken: the units of a run
    /// are read for half of their content at least. If it is the first of its sequence in this run, it is from about the same time as the last
    /// of the other.
    pub fn is_next(&self, found: &Found) -> bool {
        let step = found.step;
        match self.ends[usize::from(step.whole)] {
            Some(end) => step.start.checked_sub(end).is_some_and(|gap| gap <= found.pack.unit_bits.blocks() && self.skipped + gap <= self.taken),
            None => step.turn == self.turn || step.turn == self.turn + 1,
        }
    }

    pub fn advance(&mut self, found: &Found) {
        let step = found.step;
        let end = self.ends[usize::from(step.whole)].replace(step.end);
        self.skipped += end.map_or(0, |end| step.start - end);
        self.taken += step.end - step.start;
        self.turn = step.turn;
    }
}

#[cfg(test)]
mod tests {
    use erofs::block::UnitBits;
    use erofs::pack::Placer;

    use super::*;

    fn after(found: &Found) -> Cursor {
        let mut cursor = Cursor::before(found);
        cursor.advance(found);
        cursor
    }

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
                let mut cursor = after(&place(from));
                for to in from + 1..blocks.len() {
                    assert!(cursor.is_next(&place(to)), "{blocks:?}: {to} after {from}..");
                    cursor.advance(&place(to));
                }
            }
        }
    }

    #[test]
    fn what_lies_elsewhere_in_the_pack_does_not_follow() {
        let blocks = [16, 16, 16, 16, 9, 9, 9, 9, 16];
        let (table, first) = pack_of(&blocks);
        let place = |i: usize| table.place(first[i], &Digest([i as u8; 32]), blocks[i]).unwrap();
        for (from, to) in [(0, 3), (1, 0), (4, 7), (5, 4), (0, 6), (4, 4), (3, 3)] {
            assert!(!after(&place(from)).is_next(&place(to)), "{to} after {from}");
        }
    }

    #[test]
    fn a_unit_may_be_left_out_but_not_more_than_is_taken() {
        let (table, first) = pack_of(&[16; 20]);
        let place = |i: usize| table.place(first[i], &Digest([i as u8; 32]), 16).unwrap();
        let mut cursor = after(&place(0));
        for next in [2, 4, 6] {
            assert!(cursor.is_next(&place(next)) && !cursor.is_next(&place(next + 1)), "{next}");
            cursor.advance(&place(next));
        }
        let mut cursor = after(&place(0));
        cursor.advance(&place(2));
        cursor.advance(&place(3));
        assert!(cursor.is_next(&place(5)));
        let (table, first) = pack_of(&[2, 1, 3, 2, 9, 9]);
        let place = |i: usize, blocks| table.place(first[i], &Digest([i as u8; 32]), blocks).unwrap();
        assert!(after(&place(0, 2)).is_next(&place(2, 3)), "1 left out, 2 taken");
        assert!(!after(&place(0, 2)).is_next(&place(3, 2)), "4 left out, 2 taken");
        assert!(after(&place(3, 2)).is_next(&place(4, 9)));
        assert!(!after(&place(3, 2)).is_next(&place(5, 9)));
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
