//! Images: what is written is read back, hostile bytes are harmless, and the bytes do not change unnoticed.

mod trees;

use std::fmt::Write;
use std::io::Write as _;
use std::process::Command;
use std::time::Instant;

use erofs::block::UnitBits;
use erofs::digest::Digest;
use erofs::image::{Checked, DataView, FileKind, Image, ImageError, Nid, dump, write};
use erofs::meta::{Attr, Chunk, Content, Data, Device, PackRef, Time};
use erofs::tree::{Body, Tree};
use proptest::prelude::*;
use trees::{Builder, any_tree, attr, canonical, file_at, xattr};

fn build(tree: &Tree) -> Vec<u8> {
    let built = write(&Checked::new(tree.clone()).expect("the tree obeys the rules"));
    assert_eq!(built.digest, Digest::of(&built.bytes));
    built.bytes
}

fn read(bytes: &[u8]) -> Result<Tree, ImageError> {
    Image::open(bytes)?.to_tree()
}

/// Compares without printing both trees whole.
fn assert_same(got: &Tree, expected: &Tree) {
    assert_eq!(got.packs, expected.packs);
    for (i, (got, expected)) in got.inodes.iter().zip(&expected.inodes).enumerate() {
        assert_eq!(got, expected, "inode {i}");
    }
    assert_eq!(got.inodes.len(), expected.inodes.len());
}

/// Everything that can be asked of an image, asked. What comes back does not matter, that it does matters.
fn exercise(bytes: &[u8]) {
    let Ok(image) = Image::open(bytes) else { return };
    let mut text = String::new();
    dump(&image, &mut text).expect("a String takes everything");
    for nid in (0..bytes.len() as u64 / 32).step_by(7).chain([u64::MAX, 1 << 59, image.root().0]).map(Nid) {
        let _ = image.inode(nid);
        let _ = image.xattrs(nid);
        for name in [&b"."[..], b"..", b"a", b"\xff"] {
            let _ = image.lookup(nid, name);
        }
        if let Ok(names) = image.read_dir(nid) {
            for entry in names.flatten() {
                let _ = image.inode(entry.nid);
            }
        }
        if let Ok(DataView::Chunks(chunks)) = image.data(nid) {
            for i in [0, 1, chunks.count(), u64::MAX] {
                let _ = chunks.get(i);
            }
        }
    }
    if let Ok(tree) = image.to_tree() {
        let again = build(&tree);
        assert_same(&read(&again).expect("what was written is readable"), &tree);
    }
}

/// Makes the superblock's checksum right again, so that damage gets past it.
fn repair_checksum(bytes: &mut [u8]) {
    if bytes.len() >= 4096 {
        bytes[1028..1032].fill(0);
        let sum = !crc32c::crc32c(&bytes[1024..4096]);
        bytes[1028..1032].copy_from_slice(&sum.to_le_bytes());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn trees_come_back_as_they_were(tree in any_tree()) {
        let mut expected = canonical(&tree);
        let numbered_otherwise = Tree { packs: expected.packs.clone(), inodes: tree.inodes };
        let bytes = build(&expected);
        if numbered_otherwise.packs == tree.packs {
            prop_assert!(build(&numbered_otherwise) == bytes, "numbers of inodes in memory must not matter");
        }
        assert_same(&read(&bytes).expect("what was written is readable"), &expected);
        // Every name is found, and its neighbours are not.
        let image = Image::open(&bytes).expect("what was written is readable");
        let mut dirs = vec![(Tree::ROOT, image.root())];
        while let Some((index, nid)) = dirs.pop() {
            let Body::Dir(children) = &mut expected.inodes[index.0 as usize].body else { unreachable!() };
            let children = std::mem::take(children);
            for (name, child) in &children {
                let entry = image.lookup(nid, name).expect("readable").expect("the name is there");
                if entry.kind == FileKind::Dir {
                    dirs.push((*child, entry.nid));
                }
                let next = [name.as_slice(), b"\x01"].concat();
                prop_assert_eq!(image.lookup(nid, &next).expect("readable").is_some(), children.contains_key(&next));
            }
            prop_assert_eq!(image.read_dir(nid).expect("readable").count(), children.len());
            prop_assert!(image.lookup(nid, b"\x01").expect("readable").is_none() || children.contains_key(&b"\x01"[..]));
        }
    }

    /// Before 6.12 the kernel reads such a target from the block that the inode starts in, and refuses one that does not end there.
    #[test]
    fn inline_symbolic_links_lie_in_one_block(tree in any_tree()) {
        let bytes = build(&canonical(&tree));
        let image = Image::open(&bytes).expect("what was written is readable");
        let meta_at = u64::from(u32::from_le_bytes(bytes[1064..1068].try_into().expect("four bytes"))) * 4096;
        let mut dirs = vec![image.root()];
        while let Some(dir) = dirs.pop() {
            for entry in image.read_dir(dir).expect("readable") {
                let entry = entry.expect("readable");
                match (entry.kind, image.data(entry.nid).expect("readable")) {
                    (FileKind::Dir, _) => dirs.push(entry.nid),
                    (FileKind::Symlink, DataView::Inline(flat)) if !flat.tail.is_empty() => {
                        let end = flat.tail.as_ptr() as usize - bytes.as_ptr() as usize + flat.tail.len();
                        prop_assert_eq!((meta_at + entry.nid.0 * 32) / 4096, (end as u64 - 1) / 4096, "{}", entry.name.escape_ascii());
                    }
                    _ => {}
                }
            }
        }
    }

    #[test]
    fn damaged_images_are_harmless(tree in any_tree(), damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..12), cut in any::<Option<u16>>()) {
        let mut bytes = build(&canonical(&tree));
        for (at, value) in &damage {
            let at = at.index(bytes.len());
            bytes[at] = *value;
        }
        if let Some(cut) = cut {
            bytes.truncate(bytes.len() - usize::from(cut) % bytes.len());
        }
        exercise(&bytes);
        repair_checksum(&mut bytes);
        exercise(&bytes);
    }

    #[test]
    fn random_bytes_are_harmless(head in any_tree(), noise in proptest::collection::vec(any::<u8>(), 0..20_000)) {
        exercise(&noise);
        // A true superblock before noise: everything after it is random.
        let mut bytes = build(&canonical(&head));
        let end = bytes.len();
        for (byte, noise) in bytes[1152.min(end)..].iter_mut().zip(&noise) {
            *byte = *noise;
        }
        repair_checksum(&mut bytes);
        exercise(&bytes);
    }
}

/// A tree with one of everything, small enough to read.
fn example() -> Tree {
    let packs = vec![
        PackRef { digest: Digest::of(b"first"), blocks: 256, unit_bits: UnitBits::DEFAULT },
        PackRef { digest: Digest::of(b"second"), blocks: 64, unit_bits: UnitBits::MIN },
    ];
    let mut b = Builder::new(attr(0o755));
    b.tree.packs.clone_from(&packs);
    let root = Tree::ROOT;
    let label = || vec![xattr("security.selinux", b"system_u:object_r:usr_t:s0\0")];
    let then = Time { sec: 1_600_000_000, nsec: 123_456_789 };
    let etc = b.dir(root, b"etc", Attr { mtime: then, xattrs: label(), ..attr(0o755) });
    let file = b.add(etc, b"hostname", Attr { uid: 70_000, xattrs: label(), ..attr(0o644) }, Content::File(Data::Inline(b"slip\n".to_vec())));
    b.link(root, b"again", file);
    b.add(etc, b"empty", attr(0), Content::File(Data::Inline(Vec::new())));
    b.add(root, b"big", Attr { mtime: then, ..attr(0o755) }, file_at(&packs, 0, 0, 700_000));
    let sparse = vec![Chunk::Hole, Chunk::At { pack: 1, block: 3 }, Chunk::At { pack: 1, block: 40 }, Chunk::Hole, Chunk::Hole];
    b.add(root, b"sparse", attr(0o600), Content::File(Data::Chunked { size: 300_000, unit_bits: UnitBits::MIN, chunks: sparse }));
    b.add(root, b"!first", attr(0o777), Content::Symlink(b"etc/hostname".to_vec()));
    let own = vec![xattr("trusted.note", &[0xab; 40]), xattr("user.empty", b"")];
    b.add(root, b"null", Attr { xattrs: own, ..attr(0o666) }, Content::Char(Device { major: 1, minor: 3 }));
    b.add(root, b"disk", attr(0o660), Content::Block(Device { major: 259, minor: 65_537 }));
    b.add(root, b"pipe", Attr { mtime: Time { sec: -1, nsec: 5 }, ..attr(0o600) }, Content::Fifo);
    b.add(root, b"socket", attr(0o4755), Content::Socket);
    canonical(&b.tree)
}

/// Metadata images are named by their bytes, and records sign those names: if this test fails, every image already converted is built
/// differently by the next version, and the fold version has to change with it.
#[test]
fn the_bytes_of_a_known_tree_stay_the_same() {
    let bytes = build(&example());
    let mut text = String::new();
    dump(&Image::open(&bytes).expect("what was written is readable"), &mut text).expect("a String takes everything");
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/example.dump");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(golden, &text).expect("the golden file can be written");
    }
    let expected = std::fs::read_to_string(golden).expect("the golden file is there");
    let differing: String = text.lines().zip(expected.lines()).filter(|(a, b)| a != b).fold(String::new(), |mut out, (a, b)| {
        writeln!(out, "- {b}\n+ {a}").expect("a String takes everything");
        out
    });
    assert!(text == expected, "{differing}(UPDATE_GOLDEN=1 writes the new text)");
}

#[test]
fn a_hundred_thousand_files_take_less_than_140_bytes_each() {
    let packs = vec![PackRef { digest: Digest::of(b"pack"), blocks: 1 << 20, unit_bits: UnitBits::DEFAULT }];
    let mut b = Builder::new(attr(0o755));
    b.tree.packs.clone_from(&packs);
    let mut names = 0;
    for d in 0..5_000u32 {
        let dir = b.dir(Tree::ROOT, format!("directory-{d:05}").as_bytes(), attr(0o755));
        for f in 0..20u32 {
            let name = format!("some-file-name-{f:03}.py");
            names += name.len() + 1;
            let attr = Attr { mtime: Time { sec: 1_700_000_000 + i64::from(f), nsec: 0 }, ..attr(0o644) };
            b.add(dir, name.as_bytes(), attr, file_at(&packs, 0, d * 20 + f, 4000));
        }
    }
    let inodes = b.tree.inodes.len();
    let checked = Checked::new(b.tree).expect("the tree obeys the rules");
    let start = Instant::now();
    let built = write(&checked);
    let wrote = start.elapsed();
    let tree = read(&built.bytes).expect("what was written is readable");
    let each = (built.bytes.len() - names) as f64 / inodes as f64;
    println!("{inodes} inodes: written in {wrote:?}, read in {:?}, {each:.1} bytes each beyond names", start.elapsed() - wrote);
    assert!(tree == *checked.tree() || canonical(checked.tree()) == tree);
    assert!(each < 140.0, "{each} bytes of metadata per inode");
}

/// fsck.erofs (1.5 and later) as a second opinion: it walks all directories, inodes and xattrs, and with `--extract` reads all data. It
/// does not compare the data with anything: that is the kernel test's part.
#[test]
fn fsck_agrees() {
    if Command::new("fsck.erofs").arg("-V").output().is_err() {
        assert!(std::env::var_os("CI").is_none() && std::env::var_os("SLIPWAY_NO_SKIP").is_none(), "fsck.erofs is not installed");
        println!("skipped: fsck.erofs is not installed");
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let check = |name: &str, tree: &Tree| {
        let path = dir.path().join(name);
        std::fs::File::create(&path).and_then(|mut file| file.write_all(&build(tree))).expect("the image can be written");
        let mut command = Command::new("fsck.erofs");
        for (i, pack) in tree.packs.iter().enumerate() {
            let device = dir.path().join(format!("{name}.{i}"));
            std::fs::write(&device, trees::pack_bytes(i as u8, pack.blocks)).expect("a pack can be written");
            command.arg(format!("--device={}", device.display()));
        }
        let output = command.args(["-d3", "--extract"]).arg(&path).output().expect("fsck.erofs runs");
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("No errors found"), "{name}: {said}");
    };
    check("example", &example());
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    for i in 0..20 {
        use proptest::strategy::ValueTree;
        let tree = any_tree().new_tree(&mut runner).expect("a tree").current();
        check(&format!("random {i}"), &canonical(&tree));
    }
}

#[test]
fn what_breaks_a_rule_is_refused_with_its_path() {
    let file = || Content::File(Data::Inline(Vec::new()));
    let one = |attr: Attr, content: Content| {
        let mut b = Builder::new(self::attr(0o755));
        let dir = b.dir(Tree::ROOT, b"a", self::attr(0o755));
        b.add(dir, b"b\n", attr, content);
        b.tree
    };
    let with_xattrs = |xattrs| one(Attr { xattrs, ..attr(0o644) }, file());
    let pack = PackRef { digest: Digest::of(b"p"), blocks: 16, unit_bits: UnitBits::MIN };
    let chunked = |size, chunks| Tree { packs: vec![pack], ..one(attr(0), Content::File(Data::Chunked { size, unit_bits: UnitBits::MIN, chunks })) };
    let at = |block| vec![Chunk::At { pack: 0, block }];
    let name = |name: &[u8]| {
        let mut b = Builder::new(attr(0o755));
        b.add(Tree::ROOT, name, attr(0), file());
        b.tree
    };
    let mut twice = Builder::new(attr(0));
    let dir = twice.dir(Tree::ROOT, b"a", attr(0));
    twice.link(dir, b"b", dir);
    let mut unnamed = Builder::new(attr(0)).tree;
    unnamed.inodes.push(unnamed.inodes[0].clone());
    for (tree, expected) in [
        (one(attr(0o10000), file()), "/a/b\\n: mode 0o10000"),
        (one(Attr { mtime: Time { sec: 0, nsec: 1_000_000_000 }, ..attr(0) }, file()), "/a/b\\n: 1000000000 nanoseconds"),
        (with_xattrs(vec![xattr("system.nfs4_acl", b"")]), "/a/b\\n: xattr system.nfs4_acl: EROFS stores only"),
        (with_xattrs(vec![xattr("user.", b"")]), "/a/b\\n: xattr user.: EROFS stores only"),
        (with_xattrs(vec![xattr("user.b", b""), xattr("user.a", b"")]), "/a/b\\n: xattr user.a is out of order"),
        (with_xattrs(vec![xattr("user.a", b""), xattr("user.a", b"")]), "/a/b\\n: xattr user.a is out of order"),
        (with_xattrs(vec![xattr("user.a", &[0; 65536])]), "/a/b\\n: xattr user.a has a value of 65536 bytes"),
        (with_xattrs((0..5).map(|i| xattr(&format!("user.{i}"), &[0; 65535])).collect()), "/a/b\\n: xattrs of 327"),
        (one(attr(0), Content::Symlink(Vec::new())), "/a/b\\n: symbolic link target of 0 bytes"),
        (one(attr(0), Content::Symlink(vec![b'x'; 4096])), "/a/b\\n: symbolic link target of 4096 bytes"),
        (one(attr(0), Content::Char(Device { major: 4096, minor: 0 })), "/a/b\\n: device number 4096:0"),
        (chunked(65536, Vec::new()), "/a/b\\n: 0 chunks for 65536 bytes"),
        (chunked(65536, at(1)), "/a/b\\n: chunk 0 at block 1 reaches past the end"),
        (chunked(1, vec![Chunk::At { pack: 1, block: 0 }]), "/a/b\\n: chunk 0 is in pack number 1"),
        (chunked(1, vec![Chunk::Hole]), "pack is listed but"),
        (Tree { packs: vec![pack, pack], ..chunked(1, at(0)) }, "pack is listed twice"),
        (name(b""), "/: not a file name"),
        (name(b"a/b"), "/a/b: not a file name"),
        (name(b".."), "/..: not a file name"),
        (name(&[b'x'; 256]), "not a file name"),
        (twice.tree, "/a/b: a directory has a second name"),
        (unnamed, "inode 1 has no name"),
        (Tree { packs: Vec::new(), inodes: Vec::new() }, "/: the root is not a directory"),
    ] {
        let error = Checked::new(tree).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error:?} should say {expected:?}");
    }
    assert!(Checked::new(chunked(65536, at(0))).is_ok());
}

/// Bytes of the example from which `edit` can find inodes: it gets the bytes and where inodes are, by path.
fn damaged(tree: &Tree, edit: impl FnOnce(&mut [u8], &dyn Fn(&[&[u8]]) -> usize)) -> String {
    let whole = build(tree);
    let image = Image::open(&whole).expect("what was written is readable");
    let place = |path: &[&[u8]]| {
        let nid = path.iter().fold(image.root(), |nid, name| image.lookup(nid, name).expect("readable").expect("there").nid);
        // The device table of these trees ends in the first block, so inodes are counted from the start of the image.
        nid.0 as usize * 32
    };
    let mut bytes = whole.clone();
    edit(&mut bytes, &place);
    repair_checksum(&mut bytes);
    let error = read(&bytes).expect_err("damage is found");
    match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

#[test]
fn damage_is_named() {
    let tree = example();
    let find = |bytes: &[u8], what: &[u8]| bytes.windows(what.len()).position(|window| window == what).expect("it is there");
    let check = |expected: &str, error: String| assert!(error.contains(expected), "{error:?} should say {expected:?}");
    // The example's inodes: /again, /big, /null and the root are 64, 64, 32 and 32 bytes; offsets are those of the kernel's structures.
    check("not as many as the superblock says", damaged(&tree, |bytes, _| bytes[1024 + 16] += 1));
    check("does not begin where", damaged(&tree, |bytes, _| bytes[1152 + 128 + 68] += 1));
    check("its link count is not", damaged(&tree, |bytes, at| bytes[at(&[b"again"]) + 44] = 3));
    check("its xattrs are shorter", damaged(&tree, |bytes, at| bytes[at(&[b"again"]) + 2] = 1));
    check("a compact inode has a time", damaged(&tree, |bytes, at| bytes[at(&[b"null"]) + 12] = 1));
    check("its data layout is unknown", damaged(&tree, |bytes, at| bytes[at(&[b"null"])] = 2));
    check("its type is unknown", damaged(&tree, |bytes, at| bytes[at(&[b"null"]) + 5] = 0x70));
    check("its directory says another type", damaged(&tree, |bytes, at| bytes[at(&[b"pipe"]) + 5] = 0xc0 | bytes[at(&[b"pipe"]) + 5] & 0xf));
    check("chunk format", damaged(&tree, |bytes, at| bytes[at(&[b"big"]) + 16] = 0x3f));
    check("device that does not exist", damaged(&tree, |bytes, at| bytes[at(&[b"big"]) + 64 + 2] = 9));
    check("the image itself", damaged(&tree, |bytes, at| bytes[at(&[b"big"]) + 64 + 2] = 0));
    check("past the end of its device", damaged(&tree, |bytes, at| bytes[at(&[b"big"]) + 64 + 5] = 9));
    check("units of pack", damaged(&tree, |bytes, at| bytes[at(&[b"sparse"]) + 32 + 8 + 2] = 1));
    check("belong to other inodes", damaged(&tree, |bytes, at| bytes[at(&[b"big"]) + 15] = 0x7f));
    check(
        "not sorted",
        damaged(&tree, |bytes, _| {
            let at = find(bytes, b"againbig");
            bytes[at] = b'z';
        }),
    );
    check(
        "a directory has a second name",
        damaged(&tree, |bytes, at| {
            // /etc becomes the root, so that the tree has a cycle.
            let (etc, root) = (at(&[b"etc"]) as u64 / 32, at(&[]) as u64 / 32);
            let at = at(&[]) + find(&bytes[at(&[])..], &[&etc.to_le_bytes()[..]].concat());
            bytes[at..at + 8].copy_from_slice(&root.to_le_bytes());
        }),
    );
    check(
        "wrong . or ..",
        damaged(&tree, |bytes, at| {
            let dot = at(&[b"etc"]) + 64 + bytes_of_shared_xattr();
            bytes[dot] += 1;
        }),
    );
}

/// Header and one id.
fn bytes_of_shared_xattr() -> usize {
    12 + 4
}

/// A small image must not become a large tree: without a limit, every inode could claim all blocks there are.
#[test]
fn inodes_cannot_all_claim_the_same_blocks() {
    let mut b = Builder::new(attr(0o755));
    for i in 0..8u8 {
        b.add(Tree::ROOT, &[b'a' + i], attr(0), Content::File(Data::Inline(vec![i; 8192])));
    }
    let error = damaged(&canonical(&b.tree), |bytes, at| {
        let blocks = bytes.len() as u32 / 4096;
        for i in 0..8u8 {
            let at = at(&[&[b'a' + i]]);
            bytes[at + 8..at + 12].copy_from_slice(&((blocks - 1) * 4096).to_le_bytes());
            bytes[at + 16..at + 20].copy_from_slice(&1u32.to_le_bytes());
        }
    });
    assert!(error.contains("belong to other inodes"), "{error}");
}
