//! A whole file system in memory: what layers fold into and what becomes a metadata image.

use std::collections::BTreeMap;

use crate::meta::{Attr, Content, PackRef};

/// Index of an inode in [`Tree::inodes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InodeIndex(pub u32);

/// A file system. Hard links are several names of one inode; every inode is reachable from the root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// Packs the chunks refer to.
    pub packs: Vec<PackRef>,
    /// All inodes; the root is number 0.
    pub inodes: Vec<Inode>,
}

/// One inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    /// Attributes.
    pub attr: Attr,
    /// Directory or anything else.
    pub body: Body,
}

/// What an inode holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// Children by name. `.` and `..` are not listed.
    Dir(BTreeMap<Vec<u8>, InodeIndex>),
    /// Anything that is not a directory.
    Content(Content),
}

impl Tree {
    /// The root directory.
    pub const ROOT: InodeIndex = InodeIndex(0);

    /// The inode with this index. Panics if the index is not of this tree.
    pub fn inode(&self, index: InodeIndex) -> &Inode {
        &self.inodes[index.0 as usize]
    }
}
