//! Whole archives through the stage, with packs in memory.

use std::io::Cursor;

use erofs::layer::{Entry, EntryKind};
use erofs::meta::{Chunk, Data};
use erofs::pack::{PackTable, decode_unit};
use proptest::prelude::*;
use tar_core::{EntryBuilder, EntryType};

use super::*;

mod beside;

fn options(threads: usize) -> LayerOptions {
    LayerOptions { unit_bits: UnitBits::MIN, threads, ..LayerOptions::default() }
}

/// A tar of files with these contents.
fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out: Vec<u8> = files.iter().flat_map(|(name, bytes)| member_bytes(name, EntryType::Regular, bytes)).collect();
    out.resize(out.len() + 1024, 0);
    out
}

fn member_bytes(name: &str, kind: EntryType, bytes: &[u8]) -> Vec<u8> {
    let mut entry = EntryBuilder::new_ustar();
    entry.path(name).entry_type(kind).mode(0o644).unwrap().size(bytes.len() as u64).unwrap().mtime(1).unwrap();
    let mut out = entry.finish_bytes();
    out.extend_from_slice(bytes);
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

fn convert(tar: &[u8]) -> (LayerTree, MemorySink) {
    let mut sink = MemorySink::default();
    let tree = convert_layer(tar, &mut sink, &options(2)).unwrap();
    (tree, sink)
}

fn error(tar: &[u8]) -> String {
    convert_layer(tar, &mut MemorySink::default(), &options(1)).unwrap_err().to_string()
}

/// Bytes that do not compress and differ between seeds.
fn noise(seed: u8, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    let digest = erofs::digest::Digest::of(&[seed]);
    for (index, piece) in out.chunks_mut(32).enumerate() {
        let next = erofs::digest::Digest::of(&[&digest.0[..], &index.to_le_bytes()].concat());
        piece.copy_from_slice(&next.0[..piece.len()]);
    }
    out
}

/// A file's bytes, read back from the packs and verified.
fn read_back(tree: &LayerTree, sink: &MemorySink, path: &str) -> Vec<u8> {
    let entry = tree.entries.iter().find(|e| e.path == path.as_bytes()).unwrap();
    let EntryKind::Node { content: Content::File(data), .. } = &entry.kind else { panic!("{path} is no file") };
    let (size, chunks) = match data {
        Data::Inline(bytes) => return bytes.clone(),
        Data::Chunked { size, chunks, .. } => (*size as usize, chunks),
    };
    let mut out = Vec::new();
    for chunk in chunks {
        match *chunk {
            Chunk::Hole => out.resize(out.len() + 65536, 0),
            Chunk::At { pack, block } => {
                let name = tree.packs[pack as usize].digest;
                let file = &sink.packs[&name];
                let footer = PackTable::parse_footer(&name, &file[file.len() - 4096..]).unwrap();
                let (at, len) = footer.unit_table();
                let table = PackTable::parse(footer, &file[at as usize..at as usize + len]).unwrap();
                let unit = table.unit(block / 16).unwrap();
                let mut bytes = vec![0; table.unit_len(block / 16)];
                decode_unit(unit, &file[unit.offset as usize..][..unit.stored_len as usize], &mut bytes).unwrap();
                let rest = &bytes[block as usize % 16 * 4096..];
                out.extend_from_slice(&rest[..rest.len().min(65536)]);
            }
        }
        // The last chunk is followed by what else its unit holds.
        out.truncate(size);
    }
    out
}

#[test]
fn data_is_inline_or_chunked_and_reads_back() {
    let contents = [vec![], vec![1; 256], vec![2; 257], noise(1, 4096), noise(2, 65536), noise(3, 65537), noise(4, 300_000)];
    let names: Vec<String> = (0..contents.len()).map(|i| format!("f{i}")).collect();
    let files: Vec<_> = names.iter().zip(&contents).map(|(name, bytes)| (&name[..], &bytes[..])).collect();
    let (tree, sink) = convert(&tar(&files));
    for (name, bytes) in &files {
        assert!(read_back(&tree, &sink, name) == *bytes, "{name}");
    }
    let inline = |e: &Entry| matches!(&e.kind, EntryKind::Node { content: Content::File(Data::Inline(_)), .. });
    assert_eq!(tree.entries.iter().map(inline).collect::<Vec<_>>(), [true, true, false, false, false, false, false]);
    assert_eq!(tree.packs.len(), 1);
}

#[test]
fn equal_chunks_are_stored_once_and_zeros_never() {
    let big = noise(1, 200_000);
    let zeros = vec![0; 200_000];
    let (tree, sink) = convert(&tar(&[("a", &big), ("b", &big), ("c", &zeros), ("d", &big[65536..])]));
    // Four chunks of `a`; `d` begins with its second chunk, so it adds nothing.
    assert_eq!(tree.packs[0].blocks, 16 * 3 + 1);
    assert!(read_back(&tree, &sink, "b") == big && read_back(&tree, &sink, "c") == zeros && read_back(&tree, &sink, "d") == big[65536..]);
    let (tree, sink) = convert(&tar(&[("c", &zeros)]));
    assert!(tree.packs.is_empty() && sink.packs.is_empty());
}

#[test]
fn the_result_does_not_depend_on_threads_or_on_how_the_reader_reads() {
    let contents: Vec<Vec<u8>> = (0..40).map(|i| noise(i, usize::from(i) * 9000)).collect();
    let names: Vec<String> = (0..40).map(|i| format!("dir{}/f{i}", i % 3)).collect();
    let files: Vec<_> = names.iter().zip(&contents).map(|(name, bytes)| (&name[..], &bytes[..])).collect();
    let tar = tar(&files);
    let (tree, sink) = convert(&tar);
    for threads in [1, 5] {
        let mut other = MemorySink::default();
        assert_eq!(convert_layer(&tar[..], &mut other, &options(threads)).unwrap(), tree);
        assert!(other.packs == sink.packs);
    }
    /// Gives 1 to 700 bytes at a time.
    struct Drip<'a>(&'a [u8], usize);
    impl Read for Drip<'_> {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            self.1 = self.1 % 700 + 1;
            let len = self.1.min(out.len());
            self.0.read(&mut out[..len])
        }
    }
    let mut other = MemorySink::default();
    assert_eq!(convert_layer(Drip(&tar, 0), &mut other, &options(2)).unwrap(), tree);
    assert!(other.packs == sink.packs);
}

#[test]
fn whiteouts_keep_no_data_and_data_of_ignored_entries_is_skipped() {
    let (tree, sink) = convert(&tar(&[(".wh.a", &noise(1, 5000)), ("./", b""), ("d/.wh..wh.x", &noise(2, 5000)), ("b", b"text")]));
    assert!(sink.packs.is_empty());
    let paths: Vec<_> = tree.entries.iter().map(|e| e.path.escape_ascii().to_string()).collect();
    assert_eq!(paths, ["a", "b", "d"]);
    assert_eq!(read_back(&tree, &sink, "b"), b"text");
}

#[test]
fn the_stream_is_read_to_its_end() {
    let mut bytes = tar(&[("a", b"text")]);
    bytes.extend_from_slice(&noise(1, 300_000));
    let mut reader = Cursor::new(&bytes);
    let tree = convert_layer(&mut reader, &mut MemorySink::default(), &options(1)).unwrap();
    assert_eq!((reader.position(), tree.entries.len()), (bytes.len() as u64, 1), "what follows the archive is nothing");
    /// Fails at its end, as a reader that verifies a digest does.
    struct Unverified<'a>(&'a [u8]);
    impl Read for Unverified<'_> {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            match self.0.read(out)? {
                0 => Err(io::Error::other("wrong digest")),
                len => Ok(len),
            }
        }
    }
    let found = convert_layer(Unverified(&bytes), &mut MemorySink::default(), &options(1)).unwrap_err();
    assert!(matches!(&found, ConvertError::Read { offset, .. } if *offset == bytes.len() as u64), "{found}");
}

#[test]
fn archives_end_where_go_says() {
    let file = member_bytes("a", EntryType::Regular, b"text");
    let zeros = [0; 512];
    let check = |bytes: &[u8], entries: usize| assert_eq!(convert(bytes).0.entries.len(), entries);
    check(&[], 0);
    check(&zeros, 0);
    check(&file, 1);
    check(&[&file[..], &zeros].concat(), 1);
    check(&[&file[..], &zeros, &zeros, &file].concat(), 1);
    let found = error(&[&file[..], &zeros, &file].concat());
    assert_eq!(found, "tar entry \"\" at byte 1024: a lone block of zeros stands before an entry; the layer is damaged, build the image again");
}

#[test]
fn a_truncated_archive_is_an_error_that_names_entry_and_offset() {
    let bytes = [member_bytes("a", EntryType::Regular, b"text"), member_bytes("dir/b", EntryType::Regular, &noise(1, 70_000))].concat();
    for len in (513..516).chain(1025..1536) {
        assert!(error(&bytes[..len]).contains("the archive breaks off"), "{len}");
    }
    // Padding after the last entry may be missing.
    for len in 516..1024 {
        assert_eq!(read_back(&convert(&bytes[..len]).0, &MemorySink::default(), "a"), b"text", "{len}");
    }
    let data = "tar entry \"dir/b\" at byte 1024: the archive breaks off in its data; the layer is damaged, build the image again";
    assert_eq!(error(&bytes[..40_000]), data);
    let mut bytes = bytes;
    bytes[1030] ^= 1;
    assert!(
        error(&bytes).starts_with("tar entry \"dir/bA\" at byte 1024: header error: checksum mismatch") || error(&bytes).contains("checksum"),
        "{}",
        error(&bytes)
    );
}

#[test]
fn global_headers_change_nothing() {
    let global = member_bytes("pax_global_header", EntryType::XGlobalHeader, b"16 comment=text\n13 path=other\n");
    let (tree, _) = convert(&[global, member_bytes("a", EntryType::Regular, b"x")].concat());
    assert_eq!(tree.entries[0].path, b"a");
}

#[test]
fn budgets_end_a_layer_with_their_figure() {
    let check = |files: &[(&str, &[u8])], change: &dyn Fn(&mut Budget), expected: &str| {
        let mut options = options(1);
        change(&mut options.budget);
        let result = convert_layer(&tar(files)[..], &mut MemorySink::default(), &options);
        assert_eq!(result.map_or_else(|e| e.to_string(), |_| String::new()), expected);
    };
    let files: [(&str, &[u8]); 2] = [("a", b"1"), ("b", &[2; 1000])];
    let advice = "build the image with this layer split into several";
    check(&files, &|b| *b = Budget { entries: 2, bytes: 1001, metadata: 3, ..*b }, "");
    check(&files, &|b| b.entries = 1, &format!("tar entry \"b\" at byte 1024: the layer takes more than 1 entries; {advice}"));
    check(&files, &|b| b.bytes = 1000, &format!("tar entry \"b\" at byte 1024: the layer takes more than 1000 bytes of file data; {advice}"));
    check(&files, &|b| b.metadata = 0, &format!("tar entry \"a\" at byte 0: the layer takes more than 0 bytes of metadata; {advice}"));
    // Names that no entry lists count as well.
    check(
        &[("a/b/c/d", b""), ("e", b"")],
        &|b| b.entries = 3,
        &format!("tar entry \"e\" at byte 512: the layer takes more than 3 entries; {advice}"),
    );
}

/// Zeros, which gzip packs a thousandfold: as data, and after the archive's end, where no entry counts them.
#[test]
fn what_a_few_bytes_unpack_to_ends_at_the_budget() {
    let budget = Budget { stream: 10 << 20, ..Budget::default() };
    let options = LayerOptions { budget, ..options(1) };
    let told = |bytes: &[u8]| {
        let endless = bytes.chain(io::repeat(0));
        convert_layer(endless, &mut MemorySink::default(), &options).unwrap_err().to_string()
    };
    let limit = "the layer takes more than 10485760 bytes of tar; build the image with this layer split into several";
    assert_eq!(told(&[]), format!("tar entry \"\" at byte 0: {limit}"));
    let mut header = EntryBuilder::new_ustar();
    header.path("big").entry_type(EntryType::Regular).mode(0o644).unwrap().size(1 << 33).unwrap().mtime(1).unwrap();
    assert_eq!(told(&header.finish_bytes()), format!("tar entry \"big\" at byte 0: {limit}"));
}

#[test]
fn a_layer_that_takes_too_long_ends_with_the_time_it_had() {
    /// Gives a byte every few milliseconds.
    struct Slow;
    impl Read for Slow {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            std::thread::sleep(Duration::from_millis(5));
            out[0] = 0;
            Ok(1)
        }
    }
    let options = LayerOptions { budget: Budget { time: Duration::from_secs(1), ..Budget::default() }, ..options(1) };
    let error = convert_layer(Slow, &mut MemorySink::default(), &options).unwrap_err().to_string();
    assert!(error.contains("the layer takes more than 1 seconds to convert"), "{error}");
}

#[test]
fn a_sink_that_fails_ends_the_conversion_with_its_error() {
    struct Broken(bool);
    impl PackSink for Broken {
        type Temp = io::Empty;
        fn create(&mut self) -> io::Result<io::Empty> {
            if self.0 { Ok(io::empty()) } else { Err(io::Error::other("no space")) }
        }
        fn publish(&mut self, _: io::Empty, _: erofs::digest::Digest) -> io::Result<()> {
            Err(io::Error::other("no space"))
        }
    }
    let bytes = tar(&[("a", &noise(1, 3_000_000))]);
    for at_publish in [false, true] {
        match convert_layer(&bytes[..], &mut Broken(at_publish), &options(2)) {
            Err(ConvertError::Store { source }) => assert_eq!(source.to_string(), "no space"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_layer_that_fails_publishes_no_unfinished_pack() {
    let bytes = tar(&[("a", &noise(1, 1_000_000))]);
    let mut sink = MemorySink::default();
    assert!(convert_layer(&bytes[..900_000], &mut sink, &options(2)).is_err());
    assert!(sink.packs.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn edited_archives_never_panic_and_what_converts_decodes(edits in prop::collection::vec((0usize..4096, any::<u8>()), 0..8), fix in any::<bool>()) {
        let mut bytes = [
            member_bytes("././@PaxHeader", EntryType::XHeader, b"14 path=d/file\n30 mtime=1700000000.123456789\n"),
            member_bytes("x", EntryType::Regular, &[7; 600]),
            member_bytes("././@LongLink", EntryType::GnuLongName, b"long/name\0"),
            member_bytes("y", EntryType::Directory, b""),
        ].concat();
        for (at, value) in edits {
            let len = bytes.len();
            bytes[at % len] = value;
        }
        if fix {
            // With checksums that fit, or few edits get past the first check.
            for at in (0..bytes.len()).step_by(512) {
                let sum: u32 = bytes[at..at + 512].iter().enumerate().map(|(i, b)| if (148..156).contains(&i) { 32 } else { u32::from(*b) }).sum();
                if bytes[at + 257..at + 262] == *b"ustar" {
                    bytes[at + 148..at + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
                }
            }
        }
        if let Ok(tree) = convert_layer(&bytes[..], &mut MemorySink::default(), &options(1)) {
            prop_assert_eq!(LayerTree::decode(&tree.encode()), Ok(tree));
        }
    }
}
