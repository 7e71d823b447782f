//! Archives converted and given back by framing and packs, byte for byte.

use erofs::framing::FramingReader;
use proptest::prelude::*;
use tar_core::{EntryBuilder, EntryType, SparseEntry};

use super::*;

const UNIT: usize = 65536;

fn options(threads: usize) -> LayerOptions {
    LayerOptions { unit_bits: UnitBits::MIN, threads, ..LayerOptions::default() }
}

/// The framing of a tar, and its packs.
fn framed(tar: &[u8], threads: usize) -> (Vec<u8>, MemorySink) {
    let mut sink = MemorySink::default();
    let Converted { framing, places, .. } = convert_layer_framed(tar, &mut sink, Vec::new(), &options(threads)).unwrap();
    (framing.finish(&places).unwrap(), sink)
}

/// Fails unless the tar comes back; gives the length of its framing.
fn check(tar: &[u8], what: &str) -> usize {
    let (framing, sink) = framed(tar, 2);
    let back = sink.tar(&framing);
    let differs = back.iter().zip(tar).position(|(a, b)| a != b);
    assert!(back == tar, "{what}: {} bytes are {}, first other at {differs:?}", tar.len(), back.len());
    framing.len()
}

fn member(name: &str, kind: EntryType, bytes: &[u8]) -> Vec<u8> {
    let mut entry = EntryBuilder::new_ustar();
    entry.path(name).entry_type(kind).mode(0o644).unwrap().size(bytes.len() as u64).unwrap().mtime(1).unwrap();
    with_data(entry, bytes)
}

fn with_data(mut entry: EntryBuilder, bytes: &[u8]) -> Vec<u8> {
    let mut out = entry.finish_bytes();
    out.extend_from_slice(bytes);
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

fn file(name: &str, bytes: &[u8]) -> Vec<u8> {
    member(name, EntryType::Regular, bytes)
}

fn link(name: &str, target: &str) -> Vec<u8> {
    let mut entry = EntryBuilder::new_ustar();
    entry.path(name).entry_type(EntryType::Link).mode(0o644).unwrap().size(0).unwrap().mtime(1).unwrap();
    entry.link_name(target);
    with_data(entry, b"")
}

/// Bytes that do not compress and differ between seeds.
fn noise(seed: u8, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new_derive_key("noise").update(&[seed]).finalize_xof().fill(&mut out);
    out
}

/// A PAX sparse file of version 1.0: the map, in blocks of its own, is before the data.
fn pax_sparse(regions: &[(usize, usize)], size: usize, seed: u8) -> Vec<u8> {
    let mut entry = EntryBuilder::new_ustar();
    let data = noise(seed, regions.iter().map(|(_, len)| len).sum());
    let map: Vec<SparseEntry> = regions.iter().map(|&(at, len)| SparseEntry { offset: at as u64, length: len as u64 }).collect();
    entry.path("sparse").entry_type(EntryType::Regular).mode(0o644).unwrap().size(data.len() as u64).unwrap().mtime(1).unwrap();
    entry.sparse(&map, size as u64);
    with_data(entry, &data)
}

/// GNU's old sparse file: four regions in its header, more in a block after it.
fn gnu_sparse(regions: &[(usize, usize)], size: usize, seed: u8) -> Vec<u8> {
    let data = noise(seed, regions.iter().map(|(_, len)| len).sum());
    let mut header = member("old", EntryType::Regular, b"");
    header.truncate(512);
    let octal = |value: usize| format!("{value:011o}\0").into_bytes();
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(124, &octal(data.len()));
    put(156, b"S");
    put(257, b"ustar  \0");
    put(329, &[0; 16]);
    put(345, &[0; 41]);
    put(483, &octal(size));
    let mut more = [0; 512];
    for (index, (at, len)) in regions.iter().enumerate() {
        let entry = [octal(*at), octal(*len)].concat();
        match index {
            0..4 => put(386 + 24 * index, &entry),
            _ => more[24 * (index - 4)..][..24].copy_from_slice(&entry),
        }
    }
    put(482, &[u8::from(regions.len() > 4)]);
    put(148, b"        ");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let map: &[u8] = if regions.len() > 4 { &more } else { &[] };
    let mut out = [&header[..], map, &data].concat();
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

const END: [u8; 1024] = [0; 1024];

#[test]
fn archives_come_back_whatever_is_in_them() {
    let long = format!("{}/name", "deep/".repeat(60));
    let pax = b"15 path=d/file\n30 mtime=1700000000.123456789\n";
    let big = noise(1, 5 * UNIT + 77);
    let table: &[(&str, Vec<u8>)] = &[
        ("nothing", vec![]),
        ("an end alone", END.to_vec()),
        ("half an end", END[..512].to_vec()),
        ("no end", file("a", b"text")),
        ("no padding at the end", file("a", b"text")[..516].to_vec()),
        ("part of the padding at the end", file("a", &big)[..512 + big.len() + 3].to_vec()),
        ("data after the end", [file("a", &big), END.to_vec(), noise(2, 300_001)].concat()),
        ("entries after the end", [file("a", &big), END.to_vec(), file("b", &big)].concat()),
        ("garbage for padding", {
            let mut tar = file("a", &big);
            let len = tar.len();
            tar[512 + big.len()..].copy_from_slice(&noise(3, len - 512 - big.len()));
            [tar, END.to_vec()].concat()
        }),
        (
            "sizes around those that matter",
            [1, 256, 257, 4095, 4096, 4097, UNIT - 1, UNIT, UNIT + 1, 3 * UNIT].map(|len| file(&format!("f{len}"), &noise(4, len))).concat(),
        ),
        ("zeros", [file("a", &vec![0; 3 * UNIT + 9]), file("b", &[&vec![0; UNIT][..], b"x"].concat()), END.to_vec()].concat()),
        ("a file that is replaced by another", [file("a", &big), file("a", &noise(5, 2 * UNIT)), END.to_vec()].concat()),
        ("a file that is replaced by a directory", [file("a", &big), member("a", EntryType::Directory, b""), file("a/b", &big[UNIT..])].concat()),
        ("a file that is removed again", [file("a", &big), file(".wh.a", b""), END.to_vec()].concat()),
        (
            "ignored entries with data",
            [file("./", b""), file("d/.wh..wh.x", &noise(6, 70_000)), file(".wh.gone", &noise(7, 300)), END.to_vec()].concat(),
        ),
        ("a root with data", [file(".", &noise(6, 70_000)), file("a", b"x")].concat()),
        ("global headers", [member("g", EntryType::XGlobalHeader, b"16 comment=text\n"), file("a", b"x"), END.to_vec()].concat()),
        (
            "extension headers",
            [
                member("x", EntryType::XHeader, pax),
                file("y", &big),
                member("l", EntryType::GnuLongName, format!("{long}\0").as_bytes()),
                file("z", &big),
            ]
            .concat(),
        ),
        ("hard links", [file("a", &big), link("b", "a"), link("c", "b"), file("a", b"new"), END.to_vec()].concat()),
        ("a sparse file", pax_sparse(&[(1000, 5000), (UNIT + 7, 2 * UNIT), (10 * UNIT, 1)], 20 * UNIT, 8)),
        ("a sparse file all of data", pax_sparse(&[(0, 3 * UNIT)], 3 * UNIT, 8)),
        (
            "a sparse file of touching and empty regions",
            pax_sparse(&[(0, 700), (700, UNIT), (UNIT + 700, 0), (2 * UNIT, 9), (5 * UNIT, 0)], 5 * UNIT, 9),
        ),
        ("a sparse file of one region in a tebibyte", pax_sparse(&[(20_000_000_000, 1000)], 30_000_000_000, 8)),
        ("a tiny sparse file", pax_sparse(&[(3, 5), (100, 20)], 200, 10)),
        ("a sparse file without data", pax_sparse(&[], 300_000, 10)),
        ("GNU's old sparse file", gnu_sparse(&[(512, 5000), (UNIT, 700)], 2 * UNIT, 11)),
        (
            "GNU's old sparse file with more regions",
            [gnu_sparse(&[(0, 9), (512, 512), (4096, 600), (9000, 1), (UNIT, UNIT), (4 * UNIT, 3)], 5 * UNIT, 12), END.to_vec()].concat(),
        ),
    ];
    for (what, tar) in table {
        check(tar, what);
    }
}

#[test]
fn headers_of_plain_files_are_nearly_all_of_a_framing() {
    let tar = [file("a", &noise(1, 10 * UNIT)), file("b", &noise(2, 9000)), END.to_vec()].concat();
    // 13 bytes to begin with, two headers and the rest (with lengths), items for 11 + 1 chunks, a pack, places.
    assert!(check(&tar, "two files") < 13 + 2 * 512 + 240 + 1024 + 12 + 60 + 40, "data of files is in the framing");
}

#[test]
fn the_framing_does_not_depend_on_threads_or_on_how_the_reader_reads() {
    /// Gives 1 to 700 bytes at a time.
    struct Drip<'a>(&'a [u8], usize);
    impl Read for Drip<'_> {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            self.1 = self.1 % 700 + 1;
            let len = self.1.min(out.len());
            self.0.read(&mut out[..len])
        }
    }
    let files: Vec<Vec<u8>> = (0..60).map(|i| file(&format!("dir{}/f{i}", i % 3), &noise(i % 50, usize::from(i) * 7000))).collect();
    let tar = [files.concat(), END.to_vec(), noise(1, 5000)].concat();
    let (framing, _) = framed(&tar, 1);
    for threads in [2, 8] {
        assert!(framed(&tar, threads).0 == framing, "{threads} threads");
    }
    let mut sink = MemorySink::default();
    let Converted { framing: writer, places, .. } = convert_layer_framed(Drip(&tar, 0), &mut sink, Vec::new(), &options(3)).unwrap();
    assert!(writer.finish(&places).unwrap() == framing);
}

#[test]
fn packs_that_only_replaced_files_are_in_are_named_by_the_framing() {
    let tar = [file("a", &noise(1, 2 * UNIT)), file("a", b"small"), END.to_vec()].concat();
    let mut sink = MemorySink::default();
    let converted = convert_layer_framed(&tar[..], &mut sink, Vec::new(), &options(1)).unwrap();
    assert!(converted.tree.packs.is_empty());
    assert_eq!(converted.places.packs.iter().map(|pack| pack.digest).collect::<Vec<_>>(), sink.packs.keys().copied().collect::<Vec<_>>());
}

#[test]
fn a_framing_that_cannot_be_written_ends_the_conversion_with_its_error() {
    /// Takes so many bytes.
    struct Full(usize);
    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 = self.0.checked_sub(bytes.len()).ok_or_else(|| io::Error::other("no space"))?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let tar = [file("a", &noise(1, UNIT)), END.to_vec(), noise(2, 1_000_000)].concat();
    for room in [0, 20, 300_000] {
        match convert_layer_framed(&tar[..], &mut MemorySink::default(), Full(room), &options(1)) {
            Err(ConvertError::Store { source }) => assert_eq!(source.to_string(), "no space"),
            other => panic!("{room}: {:?}", other.map(|converted| converted.tree)),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_converts_comes_back(
        files in prop::collection::vec((0u8..6, prop_oneof![0usize..300, 0usize..9000, 0usize..3 * UNIT], 0u8..4), 0..8),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        tail in 0usize..2000,
        end: bool,
    ) {
        let mut tar: Vec<u8> = files.iter().flat_map(|(name, len, seed)| file(&format!("f{name}"), &noise(*seed, *len))).collect();
        tar.extend_from_slice(if end { &END } else { &[] });
        for (at, value) in edits.iter().filter(|_| !tar.is_empty()).collect::<Vec<_>>() {
            let at = at.index(tar.len());
            tar[at] = *value;
        }
        tar.extend_from_slice(&noise(9, if end { tail } else { 0 }));
        let mut sink = MemorySink::default();
        if let Ok(Converted { framing, places, .. }) = convert_layer_framed(&tar[..], &mut sink, Vec::new(), &options(1)) {
            let framing = framing.finish(&places).unwrap();
            prop_assert!(sink.tar(&framing) == tar);
            prop_assert_eq!(FramingReader::new(&framing[..]).unwrap().places().unwrap(), places);
        }
    }
}
