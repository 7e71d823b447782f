//! Dictionaries of real packs in a store.

use std::fs;
use std::io::Write as _;

use erofs::pack::{PackWriter, encode_unit};
use slipway::store::Name;

use super::*;

/// A store with packs of whole 64 KiB chunks, each of one number.
struct Shelf {
    dir: tempfile::TempDir,
    store: Store,
}

fn chunk(number: u8) -> Vec<u8> {
    vec![number; 65536]
}

impl Shelf {
    fn new() -> Shelf {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(dir.path()).unwrap();
        Shelf { dir, store }
    }

    fn put(&self, chunks: &[u8]) -> PackRef {
        self.put_sized(chunks, UnitBits::MIN)
    }

    fn put_sized(&self, chunks: &[u8], unit_bits: UnitBits) -> PackRef {
        let mut writer = PackWriter::new(Vec::new(), unit_bits);
        for number in chunks {
            let unit = encode_unit(&vec![*number; unit_bits.bytes() as usize], 1);
            writer.push(&unit, &[(Digest::of(&chunk(*number)), 0, 16)]).unwrap();
        }
        let pack = writer.finish().unwrap();
        let mut temp = self.store.temp().unwrap();
        temp.write_all(&pack.out).unwrap();
        self.store.publish(temp, &Name::Pack(pack.pack.digest)).unwrap();
        pack.pack
    }

    fn path(&self, pack: &PackRef) -> std::path::PathBuf {
        self.dir.path().join(Name::Pack(pack.digest).path())
    }
}

#[test]
fn chunks_are_found_in_every_pack_that_was_added() {
    let shelf = Shelf::new();
    let (a, b, other) = (shelf.put(&[1, 2, 3]), shelf.put(&[3, 4]), shelf.put(&[1]));
    let mut dictionary = Dictionary::empty(&shelf.store, UnitBits::MIN);
    dictionary.add(&[a, b], &CancellationToken::new()).unwrap();
    dictionary.add(&[b], &CancellationToken::new()).unwrap();
    let mut expected = [(a.digest, 32), (b.digest, 0)];
    expected.sort_unstable();
    assert_eq!(dictionary.candidates(&Digest::of(&chunk(3)), &|_| false), expected);
    assert_eq!(dictionary.candidates(&Digest::of(&chunk(1)), &|_| false), [(a.digest, 0)]);
    assert_eq!(dictionary.candidates(&Digest::of(&chunk(9)), &|_| false), []);
    assert_eq!(dictionary.table(&a.digest).unwrap().unwrap().chunks().count(), 3);
    assert!(dictionary.table(&other.digest).unwrap().is_none(), "nobody vouched for it");
}

#[test]
fn a_pack_that_cannot_be_used_is_not_referred_to() {
    let shelf = Shelf::new();
    let packs = [shelf.put(&[1]), shelf.put(&[2]), shelf.put(&[3])];
    let mut dictionary = Dictionary::empty(&shelf.store, UnitBits::MIN);
    fs::remove_file(shelf.path(&packs[0])).unwrap();
    dictionary.add(&packs, &CancellationToken::new()).unwrap();
    assert_eq!(dictionary.candidates(&Digest::of(&chunk(1)), &|_| false), []);
    // Damaged since it was looked at: the table in the pack counts.
    let mut bytes = fs::read(shelf.path(&packs[1])).unwrap();
    let table = bytes.len() - 8192;
    bytes[table] ^= 1;
    fs::write(shelf.path(&packs[1]), bytes).unwrap();
    assert_eq!(dictionary.candidates(&Digest::of(&chunk(2)), &|_| false).len(), 1);
    assert!(dictionary.table(&packs[1].digest).unwrap().is_none());
    assert!(dictionary.table(&packs[2].digest).unwrap().is_some());
}

#[test]
fn packs_of_another_unit_size_are_of_no_use() {
    let shelf = Shelf::new();
    let (small, large) = (shelf.put(&[1]), shelf.put_sized(&[1, 2], UnitBits::MAX));
    for (unit_bits, expected) in [(UnitBits::MIN, [Some(small), None]), (UnitBits::MAX, [Some(large), Some(large)]), (UnitBits::DEFAULT, [None; 2])] {
        let mut dictionary = Dictionary::empty(&shelf.store, unit_bits);
        dictionary.add(&[small, large], &CancellationToken::new()).unwrap();
        let found = [1, 2].map(|number| dictionary.candidates(&Digest::of(&chunk(number)), &|_| false).first().map(|(pack, _)| *pack));
        assert_eq!(found, expected.map(|pack| pack.map(|pack| pack.digest)));
    }
}

#[test]
fn tables_that_came_first_make_room_for_others() {
    let table = |number: u8, chunks: u32| {
        let pack = PackRef { digest: Digest([number; 32]), blocks: chunks, unit_bits: UnitBits::MIN };
        let entry = |block| ChunkEntry { digest: Digest([0; 32]), block, blocks: 1 };
        (pack.digest, Some(Arc::new(ChunkTable::new(pack, (0..chunks).map(entry).collect()))))
    };
    let mut tables = Tables::default();
    for (number, chunks, expected) in [(1, 4, &[1][..]), (2, 5, &[1, 2]), (2, 5, &[1, 2]), (3, 2, &[2, 3]), (4, 99, &[4]), (5, 1, &[5])] {
        let (pack, of_pack) = table(number, chunks);
        tables.keep(pack, of_pack, 10);
        assert_eq!(tables.order, expected.iter().map(|number| Digest([*number; 32])).collect::<Vec<_>>());
        assert_eq!(tables.chunks, tables.open.values().flatten().map(|table| table.chunks().count()).sum::<usize>());
    }
}

#[test]
fn of_many_packs_with_a_chunk_the_first_are_offered_and_those_that_are_preferred() {
    let shelf = Shelf::new();
    let mut packs: Vec<PackRef> = (10..30).map(|number| shelf.put(&[1, number])).collect();
    let mut dictionary = Dictionary::empty(&shelf.store, UnitBits::MIN);
    for some in packs.chunks(7) {
        dictionary.add(some, &CancellationToken::new()).unwrap();
    }
    packs.sort_unstable_by_key(|pack| pack.digest);
    let offered = |preferred: &[usize]| {
        let found = dictionary.candidates(&Digest::of(&chunk(1)), &|pack| preferred.iter().any(|at| packs[*at].digest == *pack));
        found.iter().map(|(pack, _)| packs.iter().position(|of| of.digest == *pack).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(offered(&[]), (0..MAX_OTHERS).collect::<Vec<_>>());
    assert_eq!(offered(&[19, 3]), (0..MAX_OTHERS + 1).chain([19]).collect::<Vec<_>>());
}
