//! Trees to test with: a small builder, the order in which images number inodes, and random trees.
#![allow(dead_code, reason = "each test program uses its part")]

use std::collections::BTreeMap;

use erofs::block::{UnitBits, blocks_for};
use erofs::digest::Digest;
use erofs::meta::{Attr, Chunk, Content, Data, Device, PackRef, Time, Xattr};
use erofs::tree::{Body, Inode, InodeIndex, Tree};
use proptest::prelude::*;

/// A tree that grows by names.
pub struct Builder {
    pub tree: Tree,
}

impl Builder {
    pub fn new(root: Attr) -> Builder {
        Builder { tree: Tree { packs: Vec::new(), inodes: vec![Inode { attr: root, body: Body::Dir(BTreeMap::new()) }] } }
    }

    /// Adds a directory; gives its index.
    pub fn dir(&mut self, parent: InodeIndex, name: &[u8], attr: Attr) -> InodeIndex {
        self.push(parent, name, attr, Body::Dir(BTreeMap::new()))
    }

    /// Adds anything else.
    pub fn add(&mut self, parent: InodeIndex, name: &[u8], attr: Attr, content: Content) -> InodeIndex {
        self.push(parent, name, attr, Body::Content(content))
    }

    /// Gives an inode one more name.
    pub fn link(&mut self, parent: InodeIndex, name: &[u8], inode: InodeIndex) {
        let previous = self.children(parent).insert(name.to_vec(), inode);
        assert_eq!(previous, None, "{} is there twice", name.escape_ascii());
    }

    pub fn children(&mut self, dir: InodeIndex) -> &mut BTreeMap<Vec<u8>, InodeIndex> {
        match &mut self.tree.inodes[dir.0 as usize].body {
            Body::Dir(children) => children,
            Body::Content(_) => panic!("not a directory"),
        }
    }

    fn push(&mut self, parent: InodeIndex, name: &[u8], attr: Attr, body: Body) -> InodeIndex {
        let index = InodeIndex(self.tree.inodes.len() as u32);
        self.tree.inodes.push(Inode { attr, body });
        self.link(parent, name, index);
        index
    }
}

pub fn attr(mode: u16) -> Attr {
    Attr { mode, ..Attr::default() }
}

pub fn xattr(name: &str, value: &[u8]) -> Xattr {
    Xattr { name: name.as_bytes().to_vec(), value: value.to_vec() }
}

/// Bytes of a whole pack, different in every block.
pub fn pack_bytes(seed: u8, blocks: u32) -> Vec<u8> {
    (0..blocks).flat_map(|block| blake3_block(seed, block)).collect()
}

fn blake3_block(seed: u8, block: u32) -> [u8; 4096] {
    let mut out = [seed; 4096];
    let digest = Digest::of(&[&[seed][..], &block.to_le_bytes()].concat());
    for part in out.chunks_mut(64) {
        part[..32].copy_from_slice(&digest.0);
    }
    out
}

/// The same tree as images number it: inodes depth first by name, packs that no chunk uses left out.
pub fn canonical(tree: &Tree) -> Tree {
    let mut numbers: BTreeMap<InodeIndex, InodeIndex> = BTreeMap::new();
    let mut order = Vec::new();
    let mut stack = vec![Tree::ROOT];
    while let Some(index) = stack.pop() {
        if numbers.contains_key(&index) {
            continue;
        }
        numbers.insert(index, InodeIndex(order.len() as u32));
        order.push(index);
        if let Body::Dir(children) = &tree.inode(index).body {
            stack.extend(children.values().rev());
        }
    }
    let mut used: BTreeMap<u32, u32> = BTreeMap::new();
    for inode in &tree.inodes {
        if let Body::Content(Content::File(Data::Chunked { chunks, .. })) = &inode.body {
            used.extend(chunks.iter().filter_map(|chunk| match chunk {
                Chunk::At { pack, .. } => Some((*pack, 0)),
                Chunk::Hole => None,
            }));
        }
    }
    for (i, number) in used.values_mut().enumerate() {
        *number = i as u32;
    }
    let renumber = |index: InodeIndex| {
        let mut inode = tree.inode(index).clone();
        match &mut inode.body {
            Body::Dir(children) => children.values_mut().for_each(|child| *child = numbers[child]),
            Body::Content(Content::File(Data::Chunked { chunks, .. })) => {
                for chunk in chunks {
                    if let Chunk::At { pack, .. } = chunk {
                        *pack = used[pack];
                    }
                }
            }
            Body::Content(_) => {}
        }
        inode
    };
    Tree { packs: used.keys().map(|&i| tree.packs[i as usize]).collect(), inodes: order.into_iter().map(renumber).collect() }
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let byte = (1u8..=255).prop_map(|b| if b == b'/' { b'!' } else { b });
    prop_oneof![
        6 => proptest::collection::vec(proptest::sample::select(b"abcxyz".as_slice()), 1..6),
        1 => proptest::sample::select(vec![&b"!"[..], b"-", b"...", b".a", b".-", b"..a", b"+x"]).prop_map(<[u8]>::to_vec),
        1 => proptest::collection::vec(byte.clone(), 1..20),
        1 => proptest::collection::vec(byte, 200..=255),
    ]
    .prop_filter("dots are no names", |name| name != b"." && name != b"..")
}

fn time() -> impl Strategy<Value = Time> {
    prop_oneof![
        2 => Just(Time::default()),
        2 => (0i64..2_000_000_000, 0u32..1_000_000_000).prop_map(|(sec, nsec)| Time { sec, nsec }),
        1 => (any::<i64>(), 0u32..1_000_000_000).prop_map(|(sec, nsec)| Time { sec, nsec }),
    ]
}

fn xattrs() -> impl Strategy<Value = Vec<Xattr>> {
    let name = prop_oneof![
        4 => proptest::sample::select(vec!["user.a", "user.b", "trusted.c", "security.selinux", "system.posix_acl_access", "system.posix_acl_default"])
            .prop_map(|name| name.as_bytes().to_vec()),
        1 => proptest::collection::vec(1u8..=255, 1..=250).prop_map(|rest| [&b"user."[..], &rest].concat()),
    ];
    let value = prop_oneof![
        4 => proptest::sample::select(vec![&b""[..], b"1", b"shared by many"]).prop_map(<[u8]>::to_vec),
        2 => proptest::collection::vec(any::<u8>(), 0..60),
        1 => (any::<u8>(), 4000usize..9000).prop_map(|(b, n)| vec![b; n]),
    ];
    let few = proptest::collection::btree_map(name, value, 1..5)
        .prop_map(|map| map.into_iter().map(|(name, value)| Xattr { name, value }).collect::<Vec<_>>());
    prop_oneof![3 => Just(Vec::new()), 2 => few, 1 => many_xattrs()]
}

/// More shared xattrs than an inode can refer to.
fn many_xattrs() -> impl Strategy<Value = Vec<Xattr>> {
    (250u32..300).prop_map(|n| (0..n).map(|i| xattr(&format!("user.{i:04}"), b"many")).collect())
}

fn any_attr() -> impl Strategy<Value = Attr> {
    let id = prop_oneof![3 => 0u32..2000, 1 => any::<u32>(), 1 => 65535u32..65537];
    (0u16..=0o7777, id.clone(), id, time(), xattrs()).prop_map(|(mode, uid, gid, mtime, xattrs)| Attr { mode, uid, gid, mtime, xattrs })
}

/// Packs that random chunks are in.
fn packs() -> Vec<PackRef> {
    [16, 18, 20]
        .into_iter()
        .map(|bits| PackRef { digest: Digest::of(&[bits]), blocks: 512, unit_bits: UnitBits::new(bits).expect("a unit size") })
        .collect()
}

fn chunked() -> impl Strategy<Value = Data> {
    let chunk = prop_oneof![1 => Just(None), 4 => (0u32..512 - 256).prop_map(Some)];
    (0usize..3, proptest::collection::vec(chunk, 0..40), any::<u64>()).prop_map(|(pack, blocks, last)| {
        let unit_bits = packs()[pack].unit_bits;
        let size = match blocks.len() as u64 {
            0 => 0,
            n => (n - 1) * unit_bits.bytes() + 1 + last % unit_bits.bytes(),
        };
        let chunks = blocks.into_iter().map(|b| b.map_or(Chunk::Hole, |block| Chunk::At { pack: pack as u32, block }));
        Data::Chunked { size, unit_bits, chunks: chunks.collect() }
    })
}

fn content() -> impl Strategy<Value = Content> {
    let device = || (0u32..=0xfff, 0u32..=0xf_ffff).prop_map(|(major, minor)| Device { major, minor });
    prop_oneof![
        4 => chunked().prop_map(Content::File),
        3 => proptest::collection::vec(any::<u8>(), 0..300).prop_map(|bytes| Content::File(Data::Inline(bytes))),
        1 => (any::<u8>(), 0usize..20_000).prop_map(|(b, n)| Content::File(Data::Inline(vec![b; n]))),
        2 => proptest::collection::vec(1u8..=255, 1..100).prop_map(Content::Symlink),
        1 => (1u8..=255, 1usize..=4095).prop_map(|(b, n)| Content::Symlink(vec![b; n])),
        1 => device().prop_map(Content::Char),
        1 => device().prop_map(Content::Block),
        1 => Just(Content::Fifo),
        1 => Just(Content::Socket),
    ]
}

#[derive(Clone, Debug)]
enum What {
    Dir,
    Content(Content),
    Link(usize),
}

/// Random trees, inodes numbered in order of creation, with packs that may be unused: pass them through [`canonical`].
pub fn any_tree() -> impl Strategy<Value = Tree> {
    let what = prop_oneof![2 => Just(What::Dir), 5 => content().prop_map(What::Content), 1 => any::<usize>().prop_map(What::Link)];
    let step = (any::<usize>(), name(), any_attr(), what);
    (any_attr(), proptest::collection::vec(step, 0..60)).prop_map(|(root, steps)| {
        let mut builder = Builder::new(root);
        builder.tree.packs = packs();
        let (mut dirs, mut others) = (vec![Tree::ROOT], Vec::new());
        for (parent, name, attr, what) in steps {
            let parent = dirs[parent % dirs.len()];
            if builder.children(parent).contains_key(&name) {
                continue;
            }
            match what {
                What::Dir => dirs.push(builder.dir(parent, &name, attr)),
                What::Content(content) => others.push(builder.add(parent, &name, attr, content)),
                What::Link(_) if others.is_empty() => {}
                What::Link(i) => builder.link(parent, &name, others[i % others.len()]),
            }
        }
        builder.tree
    })
}

/// A file whose chunks lie one after the other in pack number `pack`, from `block` on.
pub fn file_at(packs: &[PackRef], pack: u32, block: u32, size: u64) -> Content {
    let unit_bits = packs[pack as usize].unit_bits;
    let chunks = (0..size.div_ceil(unit_bits.bytes())).map(|i| Chunk::At { pack, block: block + i as u32 * unit_bits.blocks() }).collect();
    assert!(u64::from(block) + blocks_for(size) <= u64::from(packs[pack as usize].blocks));
    Content::File(Data::Chunked { size, unit_bits, chunks })
}
