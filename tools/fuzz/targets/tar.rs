//! Tar streams: any bytes are converted or refused without panic, and what converts obeys every rule up to the metadata image: it encodes,
//! decodes, folds, passes the gate, and comes back from the image; and framing and packs give back the bytes that converted.
//!
//! Half of the inputs are edits of archives that have something of everything, the others are taken as they are. Checksums are made right
//! in both, so that the fuzzer need not guess them.
#![no_main]

use std::sync::OnceLock;
use std::time::Duration;

use erofs::block::UnitBits;
use erofs::fold::fold;
use erofs::image::{Checked, Image, write};
use erofs::layer::LayerTree;
use libfuzzer_sys::fuzz_target;
use tar_core::{EntryBuilder, EntryType};

// The stage alone: with the whole converter its TLS and HTTP would be built and instrumented.
#[allow(dead_code, unused_imports)]
#[path = "../../erofs-convert/src/layer/mod.rs"]
mod layer;

use layer::{Budget, LayerOptions, MemorySink, convert_layer_framed};

const BLOCK: usize = 512;

/// Small enough that no input takes long, and that nothing within it is too large for an image.
const BUDGET: Budget = Budget { entries: 500, bytes: 4 << 20, metadata: 100 << 10, stream: 16 << 20, time: Duration::from_secs(60) };

/// An entry of this type with bytes of data and PAX records.
fn entry(kind: EntryType, path: &str, link: &str, bytes: &[u8], pax: &[(&str, &[u8])]) -> Vec<u8> {
    let mut entry = EntryBuilder::new_ustar();
    entry.path(path).entry_type(kind).mode(0o4755).expect("it fits").size(bytes.len() as u64).expect("it fits").mtime(1).expect("it fits");
    if !link.is_empty() {
        entry.link_name(link);
    }
    if matches!(kind, EntryType::Char | EntryType::Block) {
        entry.device(8, 1).expect("it fits");
    }
    for (key, value) in pax {
        entry.add_pax(key, value);
    }
    let mut out = entry.finish_bytes();
    out.extend_from_slice(bytes);
    out.resize(out.len().next_multiple_of(BLOCK), 0);
    out
}

/// Two layers with one of everything.
fn everything() -> &'static [Vec<u8>; 2] {
    static LAYERS: OnceLock<[Vec<u8>; 2]> = OnceLock::new();
    LAYERS.get_or_init(|| {
        let acl = [&[2, 0, 0, 0][..], &[1, 0, 7, 0, 0, 0, 0, 0], &[4, 0, 5, 0, 0, 0, 0, 0], &[16, 0, 7, 0, 0, 0, 0, 0], &[32, 0, 0, 0, 0, 0, 0, 0]]
            .concat();
        let xattrs: &[(&str, &[u8])] =
            &[("SCHILY.xattr.user.a", b"1"), ("SCHILY.xattr.security.capability", b"c"), ("SCHILY.xattr.system.posix_acl_access", &acl)];
        let sparse: &[(&str, &[u8])] =
            &[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.name", b"d/sparse"), ("GNU.sparse.realsize", b"70000")];
        let mut map = b"2\n0\n300\n69000\n300\n".to_vec();
        map.resize(BLOCK, 0);
        map.resize(BLOCK + 600, 7);
        let lower = [
            entry(EntryType::Directory, "d/", "", b"", xattrs),
            entry(EntryType::Regular, "d/file", "", &[7; 700], xattrs),
            entry(EntryType::Link, "d/link", "d/file", b"", &[("SCHILY.xattr.user.b", b"2"), ("mtime", b"1.5")]),
            entry(EntryType::Symlink, "soft", "d", b"", &[]),
            entry(EntryType::GnuLongName, "././@LongLink", "", b"soft/a/long/name\0", &[]),
            entry(EntryType::Regular, "short", "", b"tiny", &[]),
            entry(EntryType::Regular, "sparse", "", &map, sparse),
            entry(EntryType::Char, "null", "", b"", &[]),
            entry(EntryType::Fifo, "fifo", "", b"", &[]),
        ];
        let upper = [
            entry(EntryType::Regular, "d/.wh.file", "", b"", &[]),
            entry(EntryType::Regular, "e/.wh..wh..opq", "", b"", &[]),
            entry(EntryType::Link, "e/below", "d/link", b"", &[]),
            entry(EntryType::Regular, ".wh.soft", "", b"", &[]),
            entry(EntryType::Regular, "d/a/long/file", "", b"x", &[("path", b"d/a/longer")]),
        ];
        [lower.concat(), upper.concat()]
    })
}

/// Gives every block that looks like a header the checksum it should have.
fn fix_checksums(tar: &mut [u8]) {
    for header in tar.as_chunks_mut::<BLOCK>().0.iter_mut().filter(|block| block[257..262] == *b"ustar") {
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    }
}

fn convert(mut tar: Vec<u8>) -> Option<LayerTree> {
    fix_checksums(&mut tar);
    let options = LayerOptions { unit_bits: UnitBits::MIN, threads: 1, budget: BUDGET, ..LayerOptions::default() };
    let mut sink = MemorySink::default();
    let layer = convert_layer_framed(&tar[..], &mut sink, Vec::new(), &options).ok()?;
    let (tree, framing) = (layer.tree, layer.framing.finish(&layer.places).expect("a Vec takes everything"));
    assert!(sink.tar(&framing) == tar, "the archive does not come back");
    assert!(LayerTree::decode(&tree.encode()).as_ref() == Ok(&tree), "a layer tree changes when encoded");
    Some(tree)
}

fuzz_target!(|input: &[u8]| {
    let Some((&kind, input)) = input.split_first() else { return };
    let tars = if kind % 2 == 0 {
        let mut tars = everything().clone();
        // Edits: which layer and where in it (16 bits), and the byte to put there.
        for edit in input.chunks_exact(3) {
            let at = usize::from(u16::from_le_bytes([edit[0], edit[1]]));
            let tar = &mut tars[at % 2];
            let len = tar.len();
            tar[at / 2 % len] = edit[2];
        }
        tars
    } else {
        // The first byte says, in blocks, where the input is cut into two layers.
        let cut = input.len().min(usize::from(kind / 2) * BLOCK);
        [input[..cut].to_vec(), input[cut..].to_vec()]
    };
    let layers: Vec<LayerTree> = tars.into_iter().filter_map(convert).collect();
    let Ok(tree) = fold(&layers) else { return };
    let checked = Checked::new(tree).expect("what a layer of this size may hold fits an image");
    let built = write(&checked);
    let again = Image::open(&built.bytes).expect("what was written can be read").to_tree().expect("what was written can be read");
    assert!(again == *checked.tree(), "a folded tree changes when written");
});
