//! Which pieces of a layer are referred to where they are stored already, and which are stored again.
//!
//! A reference saves space in the store, but a node that reads pieces from many packs opens many packs, and reads a whole unit for each piece
//! that lies alone. So pieces that follow each other in the archive and in one pack make a *run*, and only runs worth it are referred to:
//! those of [`RUN`] bytes, and of a pack that the layer does not refer to yet once its runs come to [`FIRST_USE`] bytes.
//!
//! Other pieces may come between those of a run, and a run may leave out a little of what its pack has ([`Cursor::is_next`]): of the versions of an
//! image each has something of its own in place of what the others have, and what the second changed lies together in its pack, though
//! not in the archive of the third. So there is a run for every pack, and it goes on when its pack's next piece comes.
//!
//! The decision is made while the archive streams by: pieces of undecided runs are held back, and new pieces behind them, so that what is stored is
//! stored in the archive's order; together less than [`HELD`] bytes. It depends on the pieces and on what is known of other packs, on
//! nothing else.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;

use erofs::block::BLOCK_SIZE;
use erofs::digest::Digest;

use super::known::{Cursor, Elsewhere, Found};

/// Bytes in a row that are worth a reference: a unit of the default size.
pub const RUN: u64 = 256 << 10;

/// Bytes in runs that are worth one more pack to open.
pub const FIRST_USE: u64 = 1 << 20;

/// Bytes from which on no more is held back: the run that began first is stored again.
pub const HELD: u64 = 1 << 20;

/// A piece, with where it is if it is to be referred to there.
pub(super) type Decided<T> = (T, Option<Found>);

/// Takes pieces in archive order and gives them back decided, those to be stored in that order. `T` is the caller's handle.
pub(super) struct Runs<'k, T> {
    elsewhere: Elsewhere<'k>,
    /// By their packs.
    runs: HashMap<Digest, Run>,
    /// The pack of the piece that came last, if it was in a run.
    latest: Option<Digest>,
    held: VecDeque<Held<T>>,
    held_bytes: u64,
    /// Packs that are referred to.
    used: HashSet<Digest>,
    /// Of other packs, bytes in runs that came by and were stored again.
    missed: HashMap<Digest, u64>,
}

struct Run {
    cursor: Cursor,
    bytes: u64,
    /// Its pieces are referred to. Those of other runs are held back.
    worth: bool,
}

/// A piece that is held back. One that is not found, or not any more, waits to be stored after those before it.
struct Held<T> {
    item: T,
    bytes: u64,
    found: Option<Found>,
}

impl<T> Held<T> {
    fn is_in(&self, pack: &Digest) -> bool {
        self.found.is_some_and(|found| found.pack.digest == *pack)
    }
}

impl<'k, T> Runs<'k, T> {
    pub fn new(elsewhere: Elsewhere<'k>) -> Runs<'k, T> {
        Runs::beside(elsewhere, [])
    }

    /// For a layer that refers to some packs already.
    pub fn beside(elsewhere: Elsewhere<'k>, used: impl IntoIterator<Item = Digest>) -> Runs<'k, T> {
        let used = used.into_iter().collect();
        Runs { elsewhere, runs: HashMap::new(), latest: None, held: VecDeque::new(), held_bytes: 0, used, missed: HashMap::new() }
    }

    /// Takes the next piece; gives to `decided` what is decided now.
    pub fn push(&mut self, item: T, digest: &Digest, blocks: u32, decided: &mut Vec<Decided<T>>) -> io::Result<()> {
        let bytes = u64::from(blocks) * BLOCK_SIZE;
        let candidates = self.elsewhere.known.candidates(digest, &|pack| self.runs.contains_key(pack) || self.used.contains(pack));
        let found = match self.continued(&candidates, digest, blocks)? {
            Some(found) => Some(found),
            None => self.begun(&candidates, digest, blocks)?.inspect(|found| {
                self.give_up(&found.pack.digest);
                self.runs.insert(found.pack.digest, Run { cursor: Cursor::before(found), bytes: 0, worth: false });
            }),
        };
        self.latest = found.map(|found| found.pack.digest);
        if let Some(found) = found
            && self.add(&found, bytes, decided)
        {
            decided.push((item, Some(found)));
        } else {
            self.held.push_back(Held { item, bytes, found });
            self.held_bytes += bytes;
        }
        self.release(decided);
        while self.held_bytes >= HELD {
            let first = self.held.front().and_then(|held| held.found).expect("what is held first is of an undecided run");
            self.give_up(&first.pack.digest);
            self.release(decided);
        }
        Ok(())
    }

    /// There are no more pieces.
    pub fn end(&mut self, decided: &mut Vec<Decided<T>>) {
        self.runs.clear();
        decided.extend(self.held.drain(..).map(|held| (held.item, None)));
        self.held_bytes = 0;
    }

    /// The place of a piece that goes on with a run, with the one that the last piece was in if possible.
    fn continued(&self, candidates: &[(Digest, u32)], digest: &Digest, blocks: u32) -> io::Result<Option<Found>> {
        let of_latest = |yes: bool| candidates.iter().filter(move |(pack, _)| (Some(*pack) == self.latest) == yes);
        for (pack, block) in of_latest(true).chain(of_latest(false)) {
            let Some(run) = self.runs.get(pack) else { continue };
            let found = self.elsewhere.known.table(pack)?.and_then(|table| table.place(*block, digest, blocks));
            if let Some(found) = found.filter(|found| run.cursor.is_next(found)) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// The place of a piece that begins a run: the first that is really there, in a pack that is used or may still be.
    fn begun(&self, candidates: &[(Digest, u32)], digest: &Digest, blocks: u32) -> io::Result<Option<Found>> {
        for (pack, block) in candidates.iter().filter(|(pack, _)| self.may_use(pack)) {
            let table = self.elsewhere.known.table(pack)?;
            if let Some(found) = table.and_then(|table| table.place(*block, digest, blocks)) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn may_use(&self, pack: &Digest) -> bool {
        self.used.contains(pack) || self.used.len() < self.elsewhere.max_packs
    }

    /// Adds a piece to its run. True if it is worth it; then what was held back of the run is decided.
    fn add(&mut self, found: &Found, bytes: u64, decided: &mut Vec<Decided<T>>) -> bool {
        let pack = found.pack.digest;
        let may_use = self.may_use(&pack);
        let run = self.runs.get_mut(&pack).expect("the run goes on or has just begun");
        run.cursor.advance(found);
        run.bytes += bytes;
        let seen = run.bytes + self.missed.get(&pack).copied().unwrap_or(0);
        if !run.worth && run.bytes >= RUN && may_use && (self.used.contains(&pack) || seen >= FIRST_USE) {
            run.worth = true;
            self.used.insert(pack);
            for held in std::mem::take(&mut self.held) {
                if held.is_in(&pack) {
                    self.held_bytes -= held.bytes;
                    decided.push((held.item, held.found));
                } else {
                    self.held.push_back(held);
                }
            }
        }
        run.worth
    }

    /// Ends the run of a pack, if there is one. What is held back of it is stored again.
    fn give_up(&mut self, pack: &Digest) {
        let Some(run) = self.runs.remove(pack) else { return };
        if !run.worth && run.bytes >= RUN {
            *self.missed.entry(*pack).or_default() += run.bytes;
        }
        self.held.iter_mut().filter(|held| held.is_in(pack)).for_each(|held| held.found = None);
    }

    /// Gives what is to be stored, up to the first piece that is undecided.
    fn release(&mut self, decided: &mut Vec<Decided<T>>) {
        while let Some(held) = self.held.pop_front_if(|held| held.found.is_none()) {
            self.held_bytes -= held.bytes;
            decided.push((held.item, None));
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
        fn candidates(&self, wanted: &Digest, _: &dyn Fn(&Digest) -> bool) -> Vec<(Digest, u32)> {
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
            assert!((held as u64 * 65536) < HELD, "{held} pieces are held back");
        }
        runs.end(&mut decided);
        let stored: Vec<usize> = decided.iter().filter(|(_, found)| found.is_none()).map(|(item, _)| *item).collect();
        assert!(stored.is_sorted(), "what is stored keeps its order: {stored:?}");
        decided.sort_by_key(|(item, _)| *item);
        assert!(decided.iter().enumerate().all(|(i, (item, _))| i == *item), "every piece is decided once");
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
    fn a_run_goes_on_after_pieces_that_are_elsewhere_or_new() {
        // What the second version changed is in b, one piece after three of the first; the third has changes of its own.
        let packs = [(b'a', range(0..120)), (b'b', range(200..240))];
        let version = |third: Option<u32>| -> Vec<u32> {
            let changed = (0..30).flat_map(|i| [16 + i * 3, 17 + i * 3, 18 + i * 3, 200 + i].into_iter().chain(third.map(|from| from + i)));
            (0..16).chain(changed).collect()
        };
        check(&packs, 9, &version(None), &format!("{}{}", "a".repeat(16), "aaab".repeat(30)));
        // New pieces take half of what can be held back, so that b is used only when some of its runs have been stored again.
        check(&packs, 9, &version(Some(300)), &format!("{}{}{}", "a".repeat(16), "aaa..".repeat(8), "aaab.".repeat(22)));
        // However much comes between.
        let pieces = [range(0..20), range(300..340), range(20..23), range(340..360), range(23..27)].concat();
        check(&packs, 9, &pieces, &format!("{}{}aaa{}aaaa", "a".repeat(20), ".".repeat(40), ".".repeat(20)));
    }

    #[test]
    fn no_more_packs_are_used_than_may_be() {
        let packs = [(b'a', range(0..20)), (b'b', range(20..40)), (b'c', [range(40..60), range(20..40)].concat())];
        check(&packs, 2, &range(0..60), &format!("{}{}{}", "a".repeat(20), "b".repeat(20), ".".repeat(20)));
        check(&packs, 1, &[range(40..60), range(20..40)].concat(), &"c".repeat(40));
    }
}
