//! Which pieces of a layer are referred to where they are stored already, and which are stored again.
//!
//! A reference saves space in the store, but a node that reads pieces from many packs opens many packs, and reads a whole unit for each piece
//! that lies alone. So pieces that follow each other in the archive and in one pack make a *run*, and only runs worth it are referred to:
//! those of [`RUN`] bytes, and of a pack that the layer does not refer to yet once its runs come to [`FIRST_USE`] bytes.
//!
//! The decision is made while the archive streams by: a run is held back until it is decided, which is less than [`FIRST_USE`] bytes. It depends on the
//! pieces and on what is known of other packs, on nothing else.

use std::collections::{HashMap, HashSet};
use std::io;

use erofs::block::BLOCK_SIZE;
use erofs::digest::Digest;

use super::known::{Cursor, Elsewhere, Found};

/// Bytes in a row that are worth a reference: a unit of the default size.
pub const RUN: u64 = 256 << 10;

/// Bytes in runs that are worth one more pack to open.
pub const FIRST_USE: u64 = 1 << 20;

/// A piece, with where it is if it is to be referred to there.
pub(super) type Decided<T> = (T, Option<Found>);

/// Takes pieces in archive order and gives them back in that order, decided. `T` is the caller's handle.
pub(super) struct Runs<'k, T> {
    elsewhere: Elsewhere<'k>,
    run: Option<Run<T>>,
    /// Packs that are referred to.
    used: HashSet<Digest>,
    /// Of other packs, bytes in runs that came by and were stored again.
    missed: HashMap<Digest, u64>,
}

struct Run<T> {
    cursor: Cursor,
    bytes: u64,
    /// Its pieces until it is decided; then there are none, and those that follow are referred to.
    held: Vec<(T, Found)>,
    worth: bool,
}

impl<'k, T> Runs<'k, T> {
    pub fn new(elsewhere: Elsewhere<'k>) -> Runs<'k, T> {
        Runs::beside(elsewhere, [])
    }

    /// For a layer that refers to some packs already.
    pub fn beside(elsewhere: Elsewhere<'k>, used: impl IntoIterator<Item = Digest>) -> Runs<'k, T> {
        Runs { elsewhere, run: None, used: used.into_iter().collect(), missed: HashMap::new() }
    }

    /// Takes the next piece; gives to `decided` what is decided now.
    pub fn push(&mut self, item: T, digest: &Digest, blocks: u32, decided: &mut Vec<Decided<T>>) -> io::Result<()> {
        let candidates = self.elsewhere.known.candidates(digest);
        if let Some(place) = self.continued(&candidates, digest, blocks)? {
            self.add(item, place, blocks, decided);
            return Ok(());
        }
        self.end(decided);
        match self.begun(&candidates, digest, blocks)? {
            Some(place) => {
                self.run = Some(Run { cursor: Cursor::at(&place), bytes: 0, held: Vec::new(), worth: false });
                self.add(item, place, blocks, decided);
            }
            None => decided.push((item, None)),
        }
        Ok(())
    }

    /// There are no more pieces for now, or a piece that has nothing to do with this comes between: the run ends.
    pub fn end(&mut self, decided: &mut Vec<Decided<T>>) {
        let Some(run) = self.run.take() else { return };
        if !run.worth && run.bytes >= RUN {
            *self.missed.entry(run.cursor.pack).or_default() += run.bytes;
        }
        decided.extend(run.held.into_iter().map(|(item, _)| (item, None)));
    }

    /// The place of a piece that goes on with the run.
    fn continued(&self, candidates: &[(Digest, u32)], digest: &Digest, blocks: u32) -> io::Result<Option<Found>> {
        let Some(Run { cursor, .. }) = &self.run else { return Ok(None) };
        let mut candidates = candidates.iter().filter(|(pack, _)| *pack == cursor.pack).peekable();
        if candidates.peek().is_none() {
            return Ok(None);
        }
        let Some(table) = self.elsewhere.known.table(&cursor.pack)? else { return Ok(None) };
        Ok(candidates.filter_map(|(_, block)| table.place(*block, digest, blocks)).find(|place| cursor.is_next(place)))
    }

    /// The place of a piece that begins a run: the first that is really there, in a pack that is used or may still be.
    fn begun(&self, candidates: &[(Digest, u32)], digest: &Digest, blocks: u32) -> io::Result<Option<Found>> {
        let full = self.used.len() >= self.elsewhere.max_packs;
        for (pack, block) in candidates.iter().filter(|(pack, _)| !full || self.used.contains(pack)) {
            let table = self.elsewhere.known.table(pack)?;
            if let Some(place) = table.and_then(|table| table.place(*block, digest, blocks)) {
                return Ok(Some(place));
            }
        }
        Ok(None)
    }

    fn add(&mut self, item: T, place: Found, blocks: u32, decided: &mut Vec<Decided<T>>) {
        let run = self.run.as_mut().expect("a run has begun");
        run.cursor.advance(&place);
        run.bytes += u64::from(blocks) * BLOCK_SIZE;
        if run.worth {
            decided.push((item, Some(place)));
            return;
        }
        run.held.push((item, place));
        let pack = run.cursor.pack;
        let missed = self.missed.get(&pack).copied().unwrap_or(0);
        if run.bytes >= RUN && (self.used.contains(&pack) || missed + run.bytes >= FIRST_USE) {
            run.worth = true;
            self.used.insert(pack);
            decided.extend(run.held.drain(..).map(|(item, place)| (item, Some(place))));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use erofs::block::UnitBits;
    use erofs::meta::PackRef;
    use erofs::pack::ChunkEntry;

    use super::super::known::{ChunkTable, Known};
    use super::*;

    /// Packs of whole 64 KiB chunks; a chunk is known by a number.
    struct Packs(Vec<(u8, Vec<u32>)>);

    fn digest(chunk: u32) -> Digest {
        Digest::of(&chunk.to_le_bytes())
    }

    impl Known for Packs {
        fn candidates(&self, wanted: &Digest) -> Vec<(Digest, u32)> {
            let at = |(pack, chunks): &(u8, Vec<u32>)| {
                let found = chunks.iter().enumerate().filter(|(_, chunk)| digest(**chunk) == *wanted);
                found.map(|(i, _)| (Digest([*pack; 32]), i as u32 * 16)).collect::<Vec<_>>()
            };
            self.0.iter().flat_map(at).collect()
        }

        fn table(&self, pack: &Digest) -> io::Result<Option<Arc<ChunkTable>>> {
            let Some((_, chunks)) = self.0.iter().find(|(name, _)| *pack == Digest([*name; 32])) else { return Ok(None) };
            let entries = chunks.iter().enumerate().map(|(i, c)| ChunkEntry { digest: digest(*c), block: i as u32 * 16, blocks: 16 }).collect();
            let pack = PackRef { digest: *pack, blocks: chunks.len() as u32 * 16, unit_bits: UnitBits::MIN };
            Ok(Some(Arc::new(ChunkTable::new(pack, entries))))
        }
    }

    /// Pushes the chunks; what became of each, `.` for one that is stored again and else the pack it is referred to in.
    fn check(packs: &[(u8, Vec<u32>)], max_packs: usize, pieces: &[u32], expected: &str) {
        let known = Packs(packs.to_vec());
        let mut runs = Runs::new(Elsewhere { known: &known, max_packs });
        let mut decided = Vec::new();
        for (i, piece) in pieces.iter().enumerate() {
            runs.push(i, &digest(*piece), 16, &mut decided).unwrap();
            let held = i + 1 - decided.len();
            assert!(held as u64 * 65536 < FIRST_USE, "{held} pieces are held back");
        }
        runs.end(&mut decided);
        assert!(decided.iter().enumerate().all(|(i, (item, _))| i == *item), "the order stays");
        let text: String = decided.iter().map(|(_, place)| place.map_or('.', |place| char::from(place.pack.digest.0[0]))).collect();
        assert_eq!(text, expected, "{pieces:?}");
    }

    fn range(range: std::ops::Range<u32>) -> Vec<u32> {
        range.collect()
    }

    #[test]
    fn a_pack_is_worth_it_from_a_mebibyte() {
        let packs = [(b'a', range(0..100))];
        check(&packs, 9, &range(0..15), &".".repeat(15));
        check(&packs, 9, &range(10..26), &"a".repeat(16));
        check(&packs, 9, &range(10..30), &"a".repeat(20));
        check(&packs, 9, &range(90..110), &".".repeat(20));
        check(&packs, 0, &range(10..30), &".".repeat(20));
    }

    #[test]
    fn of_a_pack_that_is_used_runs_of_256_kib_are_worth_it() {
        let packs = [(b'a', range(0..100))];
        let pieces = [range(0..16), range(50..54), range(60..63), vec![200], range(70..74)].concat();
        check(&packs, 9, &pieces, &format!("{}aaaa....aaaa", "a".repeat(16)));
    }

    #[test]
    fn runs_that_were_stored_again_count_towards_the_first_use() {
        let packs = [(b'a', range(0..100))];
        // Three runs of 4 and then one of 4; shorter ones do not count.
        let pieces = [range(0..4), range(10..14), range(20..24), range(30..34)].concat();
        check(&packs, 9, &pieces, &format!("{}aaaa", ".".repeat(12)));
        let pieces = [range(0..3), range(10..14), range(20..24), range(30..34)].concat();
        check(&packs, 9, &pieces, &".".repeat(15));
    }

    #[test]
    fn a_run_goes_on_where_it_can_and_else_begins_in_the_first_pack() {
        let packs = [(b'a', [range(40..41), range(0..8)].concat()), (b'b', range(0..60))];
        // 0..8 are in both; after 8 only b goes on, but the run was in a.
        check(&packs, 9, &range(0..40), &format!("{}{}", ".".repeat(8), "b".repeat(32)));
        // Begun in b, it stays there although a has 40 as well.
        check(&packs, 9, &range(20..45), &"b".repeat(25));
    }

    #[test]
    fn no_more_packs_are_used_than_may_be() {
        let packs = [(b'a', range(0..20)), (b'b', range(20..40)), (b'c', [range(40..60), range(20..40)].concat())];
        check(&packs, 2, &range(0..60), &format!("{}{}{}", "a".repeat(20), "b".repeat(20), ".".repeat(20)));
        check(&packs, 1, &[range(40..60), range(20..40)].concat(), &"c".repeat(40));
    }
}
