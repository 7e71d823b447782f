//! Framings written, read back, damaged.

use proptest::prelude::*;

use super::*;
use crate::block::UnitBits;

const UNIT: u64 = 65536;

/// What a stream is made of.
#[derive(Clone, Debug)]
enum Item {
    Raw(Vec<u8>),
    /// Ranges, and the chunks they touch.
    File(Vec<(u64, u64)>, Vec<Option<u32>>),
}

/// A step that owns its bytes; raw ones put together.
#[derive(Debug, PartialEq, Eq)]
enum Piece {
    Raw(Vec<u8>),
    Data(Option<u32>, u32, u32),
}

fn pack(number: u8, blocks: u32) -> PackRef {
    PackRef { digest: Digest([number; 32]), blocks, unit_bits: UnitBits::MIN }
}

fn place(pack: u32, block: u32) -> Place {
    Place { pack, block }
}

fn write(items: &[Item], places: &Places) -> Vec<u8> {
    let mut writer = FramingWriter::new(Vec::new(), UnitBits::MIN).unwrap();
    for item in items {
        match item {
            Item::Raw(bytes) => writer.raw(bytes).unwrap(),
            Item::File(ranges, chunks) => {
                writer.file(ranges).unwrap();
                chunks.iter().for_each(|id| writer.chunk(*id).unwrap());
            }
        }
    }
    writer.finish(places).unwrap()
}

fn read(bytes: &[u8]) -> Result<(Vec<Piece>, Places), FramingError> {
    let mut reader = FramingReader::new(bytes)?;
    let mut pieces = Vec::new();
    while let Some(step) = reader.next()? {
        match (step, pieces.last_mut()) {
            (Step::Raw(more), Some(Piece::Raw(raw))) => raw.extend_from_slice(more),
            (Step::Raw(raw), _) => pieces.push(Piece::Raw(raw.to_vec())),
            (Step::Data { chunk, from, len }, _) => pieces.push(Piece::Data(chunk, from, len)),
        }
    }
    Ok((pieces, reader.places()?))
}

fn error(bytes: &[u8]) -> String {
    read(bytes).expect_err("it is not refused").to_string()
}

/// Something of everything: a file in two chunks, zeros, a chunk of before, a sparse file.
fn sample() -> (Vec<Item>, Places) {
    let items = vec![
        Item::Raw(b"header".to_vec()),
        Item::File(vec![(0, UNIT + 5)], vec![Some(0), Some(1)]),
        Item::Raw(vec![0; 3]),
        Item::File(vec![(0, UNIT), (UNIT + 7, 1), (5 * UNIT - 1, 2)], vec![Some(0), None, Some(2), Some(1)]),
        Item::Raw(vec![7; 200_000]),
    ];
    (items, Places::new(vec![pack(1, 40), pack(2, 9)], vec![place(0, 0), place(1, 8), place(0, 16)]))
}

#[test]
fn a_stream_comes_back_with_the_places_of_its_chunks() {
    let (items, places) = sample();
    let (pieces, found) = read(&write(&items, &places)).unwrap();
    let unit = UNIT as u32;
    let expected = [
        Piece::Raw(b"header".to_vec()),
        Piece::Data(Some(0), 0, unit),
        Piece::Data(Some(1), 0, 5),
        Piece::Raw(vec![0; 3]),
        Piece::Data(Some(0), 0, unit),
        Piece::Data(None, 7, 1),
        Piece::Data(Some(2), unit - 1, 1),
        Piece::Data(Some(1), 0, 1),
        Piece::Raw(vec![7; 200_000]),
    ];
    assert!(pieces == expected, "{pieces:?}");
    assert_eq!(found, places);
    assert_eq!(read(&write(&[], &Places::default())).unwrap(), (vec![], Places::default()));
}

#[test]
fn the_bytes_are_these() {
    let (items, places) = sample();
    let bytes = write(&items[..4], &places);
    let expected: &[&[u8]] = &[
        b"SLWYFRAM\x01\0\0\0\x10", // magic, version 1, units of 2^16
        b"\x07header",
        &[1, 1, 0, 0x85, 0x80, 4], // a file: one range, from 0, 65541 bytes
        &[0, 0],                   // the chunks expected
        &[4, 0, 0, 0],             // three zeros
        &[1, 3, 0, 0x80, 0x80, 4, 7, 1, 0xf7, 0xff, 15, 2],
        &[5, 1, 4, 5], // two back, zeros, one further than expected, two back
        &[0, 2],       // the end; packs
        &[1; 32],
        &[40],
        &[2; 32],
        &[9],
        &[0, 0, 2, 16, 1, 16], // pack and block: 0 and 0, +1 and +8, -1 and +8
    ];
    assert_eq!(bytes, expected.concat());
}

#[test]
fn raw_bytes_may_come_in_any_pieces() {
    let bytes: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    let whole = write(&[Item::Raw(bytes.clone())], &Places::default());
    for len in [1, 1000, 65535, 65536, 65537] {
        let pieces: Vec<Item> = bytes.chunks(len).map(|piece| Item::Raw(piece.to_vec())).collect();
        assert!(write(&pieces, &Places::default()) == whole, "{len}");
    }
}

#[test]
fn the_common_case_costs_a_byte_for_a_chunk_and_two_for_its_place() {
    // A file of 1000 chunks, stored one after the other.
    let chunks = (0..1000).map(Some).collect();
    let places = Places::new(vec![pack(1, 1 << 18)], (0..1000).map(|i| place(0, i * 16)).collect());
    let bytes = write(&[Item::File(vec![(0, 1000 * UNIT)], chunks)], &places);
    assert_eq!(bytes.len(), 13 + 7 + 1000 + 2 + 35 + 2 * 1000);
}

#[test]
fn chunks_that_moved_are_followed_and_nothing_else_changes() {
    let (items, mut places) = sample();
    let before = write(&items, &places);
    // The second pack's chunk was found in another image's pack; the others stay.
    let (old, foreign) = (places.packs.clone(), pack(9, 100));
    places.map(&[old[0], foreign], |at| if at.pack == 1 { place(1, 77) } else { at });
    assert_eq!(places, Places { packs: vec![pack(1, 40), foreign], chunks: vec![place(0, 0), place(1, 77), place(0, 16)] });
    let after = write(&items, &places);
    let (end, same) = (before.len() - 66 - 4 - 6, before.iter().zip(&after).take_while(|(a, b)| a == b).count());
    assert!(same >= end && read(&after).unwrap().0 == read(&before).unwrap().0);
    // All of them in one foreign pack, listed twice: it is one pack, and the old ones are gone.
    places.map(&[foreign, foreign], |at| place(at.pack.min(1), at.block));
    assert_eq!(places.packs, [foreign]);
    assert_eq!(read(&write(&items, &places)).unwrap().1, places);
}

#[test]
fn truncation_at_every_byte_is_an_error() {
    let (items, places) = sample();
    let bytes = write(&items[..4], &places);
    for len in 0..bytes.len() {
        assert!(read(&bytes[..len]).is_err(), "{len}");
    }
    assert!(error(&[&bytes[..], b"x"].concat()).contains("something follows"));
}

#[test]
fn bytes_that_are_no_framing_are_refused() {
    let head = b"SLWYFRAM\x01\0\0\0\x10";
    let check = |body: &[u8], expected: &str| {
        let found = error(&[head, body].concat());
        assert!(found.contains(expected), "{body:?}: {found}");
    };
    assert!(matches!(read(b"SLWYFRAM\x02\0\0\0\x10\0\0"), Err(FramingError::UnknownFormat)));
    assert!(matches!(read(b"SLWYTREE\x01\0\0\0\x10\0\0"), Err(FramingError::UnknownFormat)));
    assert!(error(b"SLWYFRAM\x01\0\0\0\x0f\0\0").contains("unit size"));
    let number = |mut value: u64| {
        let mut out = Vec::new();
        while value > 127 {
            out.push(value as u8 | 128);
            value >>= 7;
        }
        [out, vec![value as u8]].concat()
    };
    check(&[0x80, 0], "shortest form");
    check(&number(65536 + 2), "raw bytes are cut");
    check(&[2, b'a', 2, b'b', 0, 0], "raw bytes are cut");
    check(&[5, b'a'], "breaks off in raw bytes");
    check(&[1, 0], "no ranges");
    check(&[&[1][..], &number(100_001)].concat(), "too many");
    check(&[1, 1, 0, 0, 0], "a range of a file is empty");
    check(&[1, 2, 0, 1, 0, 1], "touches the one before");
    check(&[&[1, 1][..], &number(u64::MAX), &[1]].concat(), "out of range");
    check(&[1, 1, 0, 1, 2], "shortest form");
    check(&[1, 1, 0, 1, 3], "out of order"); // -1
    check(&[1, 1, 0, 1, 4], "out of order"); // 1, while 0 was not named
    let named = [1, 1, 0, 1, 0, 0];
    let end = |packs: u8, list: &[&[u8]]| [&named[..], &[packs], &list.concat()].concat();
    check(&end(0, &[&[0, 0]]), "in a pack that is not listed");
    check(&end(1, &[&[7; 32], &[5], &[2, 0]]), "in order of first use");
    check(&end(1, &[&[7; 32], &[5], &[1, 0]]), "in order of first use");
    check(&end(1, &[&[7; 32], &[5], &[0, 10]]), "outside its pack");
    check(&end(1, &[&[7; 32], &[5], &[0, 1]]), "outside its pack");
    let two = [&named[..5], &named].concat();
    check(&[&two[..], &[2], &[7; 32], &[5], &[7; 32], &[5]].concat(), "listed twice");
    check(&[&two[..], &[2], &[7; 32], &[5], &[8; 32], &[5], &[0, 0, 0, 0]].concat(), "that no chunk is in");
    // Refused by its length, whatever follows.
    check(&end(2, &[&[7; 32], &[5], &[8; 32], &[5], &[0, 0]]), "that no chunk is in");
    check(&[&named[..], &number(u64::MAX)].concat(), "that no chunk is in");
    check(&end(1, &[&[7; 32], &number(1 << 32), &[0, 0]]), "too long");
}

/// Fails as a disk does, in the middle.
#[test]
fn an_error_of_the_reader_is_not_taken_for_damage() {
    struct Broken;
    impl std::io::Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Err(std::io::Error::other("gone"))
        }
    }
    use std::io::Read as _;
    let (items, places) = sample();
    let bytes = write(&items, &places);
    for len in [0, 5, 13, 40, bytes.len() - 3] {
        let mut reader = match FramingReader::new(std::io::BufReader::new(bytes[..len].chain(Broken))) {
            Ok(reader) => reader,
            Err(error) => {
                assert!(matches!(error, FramingError::Read(_)) && len < 13, "{len}");
                continue;
            }
        };
        let end = loop {
            match reader.next() {
                Ok(Some(_)) => (),
                Ok(None) => break reader.places().map(drop),
                Err(error) => break Err(error),
            }
        };
        assert!(matches!(end, Err(FramingError::Read(_))), "{len}");
    }
}

/// Streams of files whose chunks are new, named before, or zeros.
fn items() -> impl Strategy<Value = (Vec<Item>, u32)> {
    let ranges = prop::collection::vec((0u64..3 * UNIT, 1u64..2 * UNIT), 1..5);
    let item = prop_oneof![prop::collection::vec(any::<u8>(), 0..500).prop_map(Err), (ranges, any::<u64>()).prop_map(Ok)];
    prop::collection::vec(item, 0..12).prop_map(|items| {
        let mut seen = 0u32;
        let file = |(gaps, mut choice): (Vec<(u64, u64)>, u64), seen: &mut u32| {
            let (mut ranges, mut end) = (Vec::new(), 0);
            for (index, (gap, len)) in gaps.into_iter().enumerate() {
                let start = end + if index > 0 { gap.max(1) } else { gap };
                ranges.push((start, len));
                end = start + len;
            }
            let mut touched: Vec<u64> = ranges.iter().flat_map(|(start, len)| start / UNIT..=(start + len - 1) / UNIT).collect();
            touched.dedup();
            let id = |_| {
                choice = choice.rotate_left(7).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                match choice % 4 {
                    0 => None,
                    1 if *seen > 0 => Some((choice >> 8) as u32 % *seen),
                    _ => {
                        *seen += 1;
                        Some(*seen - 1)
                    }
                }
            };
            let chunks = touched.iter().map(id).collect();
            Item::File(ranges, chunks)
        };
        let items = items.into_iter().map(|item| item.map_or_else(Item::Raw, |of| file(of, &mut seen))).collect();
        (items, seen)
    })
}

proptest! {
    #[test]
    fn any_stream_comes_back((items, count) in items(), blocks in prop::collection::vec((0u32..3, 0u32..1000), 100)) {
        let places = (0..count as usize).map(|i| place(blocks[i % 100].0, blocks[i % 100].1)).collect();
        let places = Places::new(vec![pack(1, 1000), pack(2, 1000), pack(3, 1000)], places);
        let (pieces, found) = read(&write(&items, &places)).unwrap();
        let mut expected: Vec<Piece> = Vec::new();
        for item in &items {
            match (item, expected.last_mut()) {
                (Item::Raw(bytes), _) if bytes.is_empty() => (),
                (Item::Raw(bytes), Some(Piece::Raw(raw))) => raw.extend_from_slice(bytes),
                (Item::Raw(bytes), _) => expected.push(Piece::Raw(bytes.clone())),
                (Item::File(ranges, chunks), _) => {
                    let mut chunks = chunks.iter();
                    let mut last = (u64::MAX, None);
                    for &(start, len) in ranges {
                        for index in start / UNIT..=(start + len - 1) / UNIT {
                            let (from, to) = (start.max(index * UNIT), (start + len).min((index + 1) * UNIT));
                            if last.0 != index {
                                last = (index, *chunks.next().unwrap());
                            }
                            expected.push(Piece::Data(last.1, (from - index * UNIT) as u32, (to - from) as u32));
                        }
                    }
                }
            }
        }
        prop_assert!(pieces == expected);
        prop_assert_eq!(found, places);
    }

    #[test]
    fn edited_bytes_never_panic(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let (items, places) = sample();
        let mut bytes = write(&items[..4], &places);
        for (at, value) in edits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let _ = read(&bytes);
    }

    #[test]
    fn any_bytes_never_panic(body in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = read(&body);
        let _ = read(&[b"SLWYFRAM\x01\0\0\0\x10", &body[..]].concat());
    }
}
