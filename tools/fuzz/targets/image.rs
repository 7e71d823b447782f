//! Metadata images: any bytes are read without panic, and what can be read as a tree is written and read as the same tree again.
//!
//! Half of the inputs are images whose superblock is made right, so that the fuzzer need not guess a CRC; the others are edits of an image
//! that has everything in it.
#![no_main]

use std::collections::BTreeMap;
use std::sync::OnceLock;

use erofs::block::UnitBits;
use erofs::digest::Digest;
use erofs::image::{Checked, DataView, Image, Nid, dump, write};
use erofs::meta::{Attr, Chunk, Content, Data, Device, PackRef, Time, Xattr};
use erofs::tree::{Body, Inode, InodeIndex, Tree};
use libfuzzer_sys::fuzz_target;

const BLOCK: usize = 4096;
/// The superblock in the image, and the fields of it that are made right: checksum, block count, device count.
const SUPERBLOCK: usize = 1024;
const CHECKSUM: usize = SUPERBLOCK + 4;
const INODES: usize = SUPERBLOCK + 16;
const BLOCKS: usize = SUPERBLOCK + 36;
const META_BLOCK: usize = SUPERBLOCK + 40;
const EXTRA_DEVICES: usize = SUPERBLOCK + 86;

fn attr(mode: u16, xattrs: &[(&str, &[u8])]) -> Attr {
    let xattr = |(name, value): &(&str, &[u8])| Xattr { name: name.as_bytes().to_vec(), value: value.to_vec() };
    Attr { mode, uid: 0, gid: 70_000, mtime: Time { sec: 1, nsec: 2 }, xattrs: xattrs.iter().map(xattr).collect() }
}

/// An image with one of everything, three blocks long or so.
fn everything() -> &'static [u8] {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let packs = vec![PackRef { digest: Digest::of(b"pack"), blocks: 64, unit_bits: UnitBits::MIN }];
        let chunks = vec![Chunk::Hole, Chunk::At { pack: 0, block: 16 }, Chunk::At { pack: 0, block: 32 }];
        let shared: &[(&str, &[u8])] = &[("security.selinux", b"label"), ("user.own", b"1")];
        let contents = [
            Content::File(Data::Inline(b"tiny".to_vec())),
            Content::File(Data::Inline(vec![1; 5000])),
            Content::File(Data::Chunked { size: 150_000, unit_bits: UnitBits::MIN, chunks }),
            Content::Symlink(b"target".to_vec()),
            Content::Char(Device { major: 1, minor: 3 }),
            Content::Fifo,
        ];
        let mut inodes = vec![Inode { attr: Attr { mode: 0o755, ..Attr::default() }, body: Body::Dir(BTreeMap::new()) }];
        let mut root = BTreeMap::new();
        for (i, content) in contents.into_iter().enumerate() {
            root.insert(vec![b'a' + i as u8], InodeIndex(inodes.len() as u32));
            inodes.push(Inode { attr: attr(0o644, shared), body: Body::Content(content) });
        }
        root.insert(b"again".to_vec(), InodeIndex(1));
        root.insert(b"dir".to_vec(), InodeIndex(inodes.len() as u32));
        // More than one block of names, but few of them: every input pays for each.
        let many = (b'A'..b'Z').map(|first| ([&[first][..], &[b'x'; 200]].concat(), InodeIndex(1))).collect();
        inodes.push(Inode { attr: attr(0o700, &[]), body: Body::Dir(many) });
        inodes[0].body = Body::Dir(root);
        write(&Checked::new(Tree { packs, inodes }).expect("the tree obeys the rules")).bytes
    })
}

/// Turns the fuzzer's input into an image.
fn image_from(input: &[u8]) -> Vec<u8> {
    let Some((&kind, input)) = input.split_first() else { return Vec::new() };
    let mut bytes = everything().to_vec();
    if kind % 2 == 0 {
        // Edits: where (16 bits), and the byte to put there.
        for edit in input.chunks_exact(3) {
            let at = usize::from(u16::from_le_bytes([edit[0], edit[1]])) % bytes.len();
            bytes[at] = edit[2];
        }
    } else {
        // The first byte says how many inodes there are. Everything after the superblock is the rest of the input, padded to blocks. Without
        // devices, as their tags are hard to guess.
        let Some((&inodes, input)) = input.split_first() else { return Vec::new() };
        bytes.truncate(SUPERBLOCK + 128);
        bytes.extend_from_slice(input);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        bytes[EXTRA_DEVICES..EXTRA_DEVICES + 2].fill(0);
        bytes[META_BLOCK..META_BLOCK + 4].fill(0);
        bytes[INODES..INODES + 8].copy_from_slice(&u64::from(inodes).to_le_bytes());
        let blocks = (bytes.len() / BLOCK) as u32;
        bytes[BLOCKS..BLOCKS + 4].copy_from_slice(&blocks.to_le_bytes());
    }
    bytes[CHECKSUM..CHECKSUM + 4].fill(0);
    let sum = !crc32c::crc32c(&bytes[SUPERBLOCK..BLOCK]);
    bytes[CHECKSUM..CHECKSUM + 4].copy_from_slice(&sum.to_le_bytes());
    bytes
}

fuzz_target!(|input: &[u8]| {
    let _ = Image::open(input);
    let bytes = image_from(input);
    let Ok(image) = Image::open(&bytes) else { return };
    let mut text = String::new();
    dump(&image, &mut text).expect("a String takes everything");
    for nid in (0..16).map(|i| i * 13).chain([image.root().0, u64::MAX]).map(Nid) {
        let _ = (image.inode(nid), image.xattrs(nid), image.lookup(nid, b"dir"), image.lookup(nid, b".."));
        let _ = image.read_dir(nid).map(Iterator::count);
        if let Ok(DataView::Chunks(chunks)) = image.data(nid) {
            let _ = (chunks.get(0), chunks.get(chunks.count()), chunks.get(u64::MAX));
        }
    }
    if let Ok(tree) = image.to_tree() {
        let built = write(&Checked::new(tree.clone()).expect("to_tree gives only trees that obey the rules"));
        let again = Image::open(&built.bytes).expect("what was written can be read").to_tree().expect("what was written can be read");
        assert!(again == tree, "a tree changes when written");
    }
});
