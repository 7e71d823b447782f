//! A layer tree as bytes.
//!
//! 8 magic bytes, u32 format version, then numbers as varints (LEB128, shortest form only) and byte strings as length and bytes:
//!
//! - packs: count, then for each its digest, blocks, log2 of its unit size;
//! - entries: count, then for each how many bytes of the previous entry's path its own begins with, the rest of its path, a tag, and
//!   what the tag calls for.

use super::{Entry, EntryKind, LayerError, LayerTree, MAX_PATH, room_for_paths};
use crate::block::UnitBits;
use crate::digest::Digest;
use crate::meta::{Attr, Chunk, Content, Data, Device, PackRef, Time, Xattr};
use crate::number::{self, NO_NUMBER};

const MAGIC: [u8; 8] = *b"SLWYTREE";
/// Of the encoding, and of how an archive is read: a tree read by other rules must not be reused as if it were this version's. Whoever
/// changes which tree a layer gives raises it. 2: xattrs, ACLs, capabilities of hard links and PAX records as containerd takes them.
const VERSION: u32 = 2;

const IMPLICIT_DIR: u8 = 0;
const IMPLICIT_OPAQUE_DIR: u8 = 1;
const DIR: u8 = 2;
const OPAQUE_DIR: u8 = 3;
const INLINE_FILE: u8 = 4;
const CHUNKED_FILE: u8 = 5;
const SYMLINK: u8 = 6;
const CHAR: u8 = 7;
const BLOCK: u8 = 8;
const FIFO: u8 = 9;
const SOCKET: u8 = 10;
const LINK: u8 = 11;
const WHITEOUT: u8 = 12;

pub(super) fn encode(tree: &LayerTree) -> Vec<u8> {
    let mut out = Out(MAGIC.to_vec());
    out.0.extend_from_slice(&VERSION.to_le_bytes());
    out.number(tree.packs.len() as u64);
    for pack in &tree.packs {
        out.0.extend_from_slice(&pack.digest.0);
        out.number(pack.blocks.into());
        out.0.push(pack.unit_bits.bits());
    }
    out.number(tree.entries.len() as u64);
    let mut previous: &[u8] = &[];
    for entry in &tree.entries {
        let shared = previous.iter().zip(&entry.path).take_while(|(a, b)| a == b).count();
        out.number(shared as u64);
        out.bytes(&entry.path[shared..]);
        out.kind(&entry.kind);
        previous = &entry.path;
    }
    out.0
}

struct Out(Vec<u8>);

impl Out {
    fn number(&mut self, value: u64) {
        number::put(&mut self.0, value);
    }

    fn signed(&mut self, value: i64) {
        number::put_signed(&mut self.0, value);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn kind(&mut self, kind: &EntryKind) {
        match kind {
            EntryKind::Dir { attr: None, opaque } => self.0.push(if *opaque { IMPLICIT_OPAQUE_DIR } else { IMPLICIT_DIR }),
            EntryKind::Dir { attr: Some(attr), opaque } => {
                self.0.push(if *opaque { OPAQUE_DIR } else { DIR });
                self.attr(attr);
            }
            EntryKind::Node { attr, content } => self.node(attr, content),
            EntryKind::Link { target } => {
                self.0.push(LINK);
                self.bytes(target);
            }
            EntryKind::Whiteout => self.0.push(WHITEOUT),
        }
    }

    fn node(&mut self, attr: &Attr, content: &Content) {
        self.0.push(match content {
            Content::File(Data::Inline(_)) => INLINE_FILE,
            Content::File(Data::Chunked { .. }) => CHUNKED_FILE,
            Content::Symlink(_) => SYMLINK,
            Content::Char(_) => CHAR,
            Content::Block(_) => BLOCK,
            Content::Fifo => FIFO,
            Content::Socket => SOCKET,
        });
        self.attr(attr);
        match content {
            Content::File(Data::Inline(bytes)) => self.bytes(bytes),
            Content::File(Data::Chunked { size, unit_bits, chunks }) => {
                self.number(*size);
                self.0.push(unit_bits.bits());
                let mut expected = 0;
                for chunk in chunks {
                    match *chunk {
                        Chunk::Hole => self.number(0),
                        Chunk::At { pack, block } => {
                            self.number(u64::from(pack) + 1);
                            self.signed(i64::from(block) - expected);
                            expected = i64::from(block) + i64::from(unit_bits.blocks());
                        }
                    }
                }
            }
            Content::Symlink(target) => self.bytes(target),
            Content::Char(device) | Content::Block(device) => {
                self.number(device.major.into());
                self.number(device.minor.into());
            }
            Content::Fifo | Content::Socket => (),
        }
    }

    fn attr(&mut self, attr: &Attr) {
        self.number(attr.mode.into());
        self.number(attr.uid.into());
        self.number(attr.gid.into());
        self.signed(attr.mtime.sec);
        self.number(attr.mtime.nsec.into());
        self.number(attr.xattrs.len() as u64);
        for xattr in &attr.xattrs {
            self.bytes(&xattr.name);
            self.bytes(&xattr.value);
        }
    }
}

pub(super) fn decode(bytes: &[u8]) -> Result<LayerTree, LayerError> {
    let rest = bytes.strip_prefix(&MAGIC).and_then(|rest| rest.strip_prefix(&VERSION.to_le_bytes())).ok_or(LayerError::UnknownFormat)?;
    let mut input = In { rest };
    input.tree().map_err(|rule| LayerError::Malformed { offset: bytes.len() - input.rest.len(), rule })
}

struct In<'a> {
    rest: &'a [u8],
}

type Decoded<T> = Result<T, &'static str>;

impl<'a> In<'a> {
    fn tree(&mut self) -> Decoded<LayerTree> {
        let mut tree = LayerTree::default();
        for _ in 0..self.count(34)? {
            let digest = Digest(self.take(32)?.try_into().expect("32 bytes"));
            tree.packs.push(PackRef { digest, blocks: self.number_32()?, unit_bits: self.unit_bits()? });
        }
        let count = self.count(3)?;
        let mut room = room_for_paths(count as usize);
        let mut path: Vec<u8> = Vec::new();
        for _ in 0..count {
            let shared = self.number()?;
            if shared > path.len() as u64 {
                return Err("a path shares more with the one before than that has");
            }
            let rest = self.bytes()?;
            if rest.first().is_some_and(|first| path.get(shared as usize) == Some(first)) {
                return Err("a path shares more with the one before than it says");
            }
            path.truncate(shared as usize);
            path.extend_from_slice(rest);
            if path.len() > MAX_PATH {
                return Err("a path is longer than 32 KiB");
            }
            room = room.checked_sub(path.len()).ok_or("the paths are too long in all")?;
            tree.entries.push(Entry { path: path.clone(), kind: self.kind()? });
        }
        if self.rest.is_empty() { Ok(tree) } else { Err("something follows the last entry") }
    }

    fn kind(&mut self) -> Decoded<EntryKind> {
        let tag = self.byte()?;
        let content = match tag {
            IMPLICIT_DIR | IMPLICIT_OPAQUE_DIR => return Ok(EntryKind::Dir { attr: None, opaque: tag == IMPLICIT_OPAQUE_DIR }),
            DIR | OPAQUE_DIR => return Ok(EntryKind::Dir { attr: Some(self.attr()?), opaque: tag == OPAQUE_DIR }),
            LINK => return Ok(EntryKind::Link { target: self.bytes()?.to_vec() }),
            WHITEOUT => return Ok(EntryKind::Whiteout),
            INLINE_FILE..=SOCKET => tag,
            _ => return Err("an entry has an unknown tag"),
        };
        let attr = self.attr()?;
        let content = match content {
            INLINE_FILE => Content::File(Data::Inline(self.bytes()?.to_vec())),
            CHUNKED_FILE => Content::File(self.chunked()?),
            SYMLINK => Content::Symlink(self.bytes()?.to_vec()),
            CHAR => Content::Char(self.device()?),
            BLOCK => Content::Block(self.device()?),
            FIFO => Content::Fifo,
            _ => Content::Socket,
        };
        Ok(EntryKind::Node { attr, content })
    }

    fn chunked(&mut self) -> Decoded<Data> {
        let size = self.number()?;
        let unit_bits = self.unit_bits()?;
        let count = size.div_ceil(unit_bits.bytes());
        if count > self.rest.len() as u64 {
            return Err("the file breaks off in a list of chunks");
        }
        let mut chunks = Vec::with_capacity(count as usize);
        let mut expected = 0i64;
        for _ in 0..count {
            chunks.push(match self.number()? {
                0 => Chunk::Hole,
                pack => {
                    let block =
                        self.signed()?.checked_add(expected).and_then(|block| u32::try_from(block).ok()).ok_or("a block number is out of range")?;
                    expected = i64::from(block) + i64::from(unit_bits.blocks());
                    Chunk::At { pack: u32::try_from(pack - 1).map_err(|_| "a pack number is out of range")?, block }
                }
            });
        }
        Ok(Data::Chunked { size, unit_bits, chunks })
    }

    fn attr(&mut self) -> Decoded<Attr> {
        let mode = u16::try_from(self.number()?).map_err(|_| "a mode is out of range")?;
        let (uid, gid) = (self.number_32()?, self.number_32()?);
        let mtime = Time { sec: self.signed()?, nsec: self.number_32()? };
        let mut xattrs = Vec::new();
        for _ in 0..self.count(2)? {
            xattrs.push(Xattr { name: self.bytes()?.to_vec(), value: self.bytes()?.to_vec() });
        }
        Ok(Attr { mode, uid, gid, mtime, xattrs })
    }

    fn device(&mut self) -> Decoded<Device> {
        Ok(Device { major: self.number_32()?, minor: self.number_32()? })
    }

    fn unit_bits(&mut self) -> Decoded<UnitBits> {
        UnitBits::new(self.byte()?).ok_or("a unit size is not one of 64 KiB to 1 MiB")
    }

    /// A count of things that take at least `min_len` bytes each, so that nobody makes room for more than can come.
    fn count(&mut self, min_len: u64) -> Decoded<u64> {
        let count = self.number()?;
        if count > self.rest.len() as u64 / min_len { Err("the file breaks off in a list") } else { Ok(count) }
    }

    fn number(&mut self) -> Decoded<u64> {
        number::read(|| self.byte())?.ok_or(NO_NUMBER)
    }

    fn number_32(&mut self) -> Decoded<u32> {
        u32::try_from(self.number()?).map_err(|_| "a number is out of range")
    }

    fn signed(&mut self) -> Decoded<i64> {
        self.number().map(number::signed)
    }

    fn bytes(&mut self) -> Decoded<&'a [u8]> {
        let len = self.number()?;
        if len > self.rest.len() as u64 { Err("the file breaks off in a byte string") } else { self.take(len as usize) }
    }

    fn byte(&mut self) -> Decoded<u8> {
        Ok(self.take(1)?[0])
    }

    fn take(&mut self, len: usize) -> Decoded<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or("the file breaks off")?;
        self.rest = rest;
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn attr() -> Attr {
        let xattrs = vec![Xattr { name: b"user.note".to_vec(), value: vec![1, 2] }];
        Attr { mode: 0o4755, uid: 1000, gid: u32::MAX, mtime: Time { sec: -1, nsec: 999_999_999 }, xattrs }
    }

    fn sample() -> LayerTree {
        let unit_bits = UnitBits::MIN;
        let pack = |n, blocks| PackRef { digest: Digest([n; 32]), blocks, unit_bits };
        let chunks = vec![Chunk::At { pack: 0, block: 16 }, Chunk::At { pack: 0, block: 32 }, Chunk::Hole, Chunk::At { pack: 1, block: 3 }];
        let node = |content| EntryKind::Node { attr: Attr::default(), content };
        let entries = [
            ("", EntryKind::Dir { attr: Some(attr()), opaque: false }),
            ("dir/b", node(Content::File(Data::Chunked { size: 3 * 65536 + 1, unit_bits, chunks }))),
            ("dir/blk", node(Content::Block(Device { major: 8, minor: 1 }))),
            ("dir/chr", node(Content::Char(Device { major: 4095, minor: 1_048_575 }))),
            ("dir/gone", EntryKind::Whiteout),
            ("dir/hard", EntryKind::Link { target: b"dir/b".to_vec() }),
            ("dir/opaque", EntryKind::Dir { attr: None, opaque: true }),
            ("dir/pipe", node(Content::Fifo)),
            ("dir/sock", node(Content::Socket)),
            ("dir/sub", EntryKind::Dir { attr: Some(Attr::default()), opaque: true }),
            ("dir/sub/link", node(Content::Symlink(b"../b".to_vec()))),
            ("tiny", EntryKind::Node { attr: attr(), content: Content::File(Data::Inline(b"hello".to_vec())) }),
        ];
        let entries = entries.into_iter().map(|(path, kind)| Entry { path: path.into(), kind }).collect();
        LayerTree::new(vec![pack(1, 48), pack(2, 4)], entries).unwrap()
    }

    #[test]
    fn every_kind_of_entry_round_trips() {
        let tree = sample();
        assert_eq!(LayerTree::decode(&tree.encode()), Ok(tree));
        assert_eq!(LayerTree::decode(&LayerTree::default().encode()), Ok(LayerTree::default()));
    }

    #[test]
    fn the_bytes_are_these() {
        let tree = sample();
        let bytes = LayerTree { packs: vec![], entries: vec![tree.entries[11].clone(), tree.entries[12].clone()] }.encode();
        let expected: &[&[u8]] = &[
            b"SLWYTREE\x02\0\0\0", // magic, version 2
            &[0, 2],               // no packs, two entries
            &[0, 12],              // nothing shared, 12 bytes of path
            b"dir/sub/link",
            &[6, 0, 0, 0, 0, 0, 0, 4], // symlink, attributes all zero, target
            b"../b",
            &[0, 4],
            b"tiny",
            &[4, 0xed, 0x13, 0xe8, 7, 0xff, 0xff, 0xff, 0xff, 15], // inline file, mode 04755, uid 1000, gid 2^32 - 1
            &[1, 0xff, 0x93, 0xeb, 0xdc, 3, 1, 9],                 // mtime -1 s 999999999 ns, one xattr
            b"user.note\x02\x01\x02",
            b"\x05hello",
        ];
        assert_eq!(bytes, expected.concat());
        assert_eq!(Digest::of(&tree.encode()).to_string(), "b5f6d741c15fb292c09e18795a7f8a73bf75ac5ff62a3d4053b602e6b4febeeb");
    }

    #[test]
    fn truncation_at_every_byte_is_an_error() {
        let bytes = sample().encode();
        for len in 0..bytes.len() {
            assert!(LayerTree::decode(&bytes[..len]).is_err(), "{len}");
        }
        assert_eq!(LayerTree::decode(b"SLWYTREE\x01\0\0\0\0\0"), Err(LayerError::UnknownFormat));
    }

    #[test]
    fn bytes_that_are_no_layer_tree_are_refused() {
        let check = |body: &[u8], expected: &str| {
            let bytes = [b"SLWYTREE\x02\0\0\0", body].concat();
            let found = LayerTree::decode(&bytes).expect_err(expected).to_string();
            assert!(found.contains(expected), "{found}");
        };
        check(&[0, 0, 0], "something follows");
        check(&[0x80, 0, 0], "shortest form");
        check(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2], "too large");
        check(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0], "breaks off in a list");
        check(&[0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1], "breaks off in a list");
        check(&[0, 1, 1, 1, b'a', 12], "shares more");
        check(&[0, 1, 0, 1, b'a', 13], "unknown tag");
        check(&[0, 1, 0, 1, b'a', 11, 200, 1], "breaks off in a byte string");
        check(&[0, 1, 0, 3, b'a', b'/', b'b', 12], "not a directory");
        check(&[0, 2, 0, 1, b'b', 12, 0, 1, b'a', 12], "out of order");
        check(&[0, 1, 0, 1, b'f', 5, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 16, 0], "list of chunks");
        check(&[0, 1, 0, 1, b'f', 5, 0, 0, 0, 0, 0, 0, 1, 16, 1, 0], "not listed");
        check(&[0, 1, 0, 1, b'f', 5, 0, 0, 0, 0, 0, 0, 1, 16, 1, 1], "block number");
        check(&[0, 1, 0, 1, b'f', 5, 0, 0, 0, 0, 0, 0, 1, 15, 0], "unit size");
    }

    #[test]
    fn few_bytes_cannot_stand_for_much_memory() {
        // Every entry is the 32 KiB path before it with its last byte changed: six bytes each.
        let mut bytes = [&b"SLWYTREE\x02\0\0\0\0"[..], &[0x80, 0x20, 0, 0x80, 0x80, 2], &[b'a'; 32768], &[12]].concat();
        for i in 1..4096 {
            bytes.extend([0xff, 0xff, 1, 1, b'b' + i as u8 % 2, 12]);
        }
        let found = LayerTree::decode(&bytes).expect_err("64 MiB are passed").to_string();
        assert!(found.contains("too long in all"), "{found}");
    }

    #[test]
    fn a_path_has_one_form() {
        let of = |second: &[u8]| [&b"SLWYTREE\x02\0\0\0\0\x02\0\x02ab\x0c"[..], second, &[12]].concat();
        let paths = |bytes: &[u8]| LayerTree::decode(bytes).map(|tree| tree.entries.iter().map(|e| e.path.clone()).collect::<Vec<_>>());
        assert_eq!(paths(&of(&[1, 1, b'c'])), Ok(vec![b"ab".to_vec(), b"ac".to_vec()]));
        let found = paths(&of(&[0, 2, b'a', b'c'])).expect_err("a is shared").to_string();
        assert!(found.contains("shares more"), "{found}");
    }

    proptest! {
        #[test]
        fn edited_bytes_never_panic_and_what_decodes_encodes_to_the_same(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4)) {
            let mut bytes = sample().encode();
            for (at, value) in edits {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Ok(tree) = LayerTree::decode(&bytes) {
                prop_assert_eq!(tree.encode(), bytes);
            }
        }

        #[test]
        fn any_bytes_never_panic(body in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = LayerTree::decode(&body);
            let _ = LayerTree::decode(&[b"SLWYTREE\x02\0\0\0\0", &body[..]].concat());
        }

        #[test]
        fn numbers_round_trip(value in any::<u64>(), signed in any::<i64>(), shift in 0u32..64) {
            let mut out = Out(vec![]);
            out.number(value >> shift);
            out.signed(signed >> shift);
            let mut input = In { rest: &out.0 };
            prop_assert_eq!((input.number(), input.signed()), (Ok(value >> shift), Ok(signed >> shift)));
        }
    }
}
