//! One OCI layer as a flat list of entries in path order: the unit of resume and reuse, and its file form.
//!
//! The file form is `encode`'s; stores keep it zstd-compressed and name it by the BLAKE3 of the *uncompressed* bytes.
//!
//! A layer tree says what the directory of the layer would hold if containerd applied the layer for overlayfs: entries, whiteouts and
//! opaque markers, with everything that depends on the archive's own order already decided. What depends on the layers below is decided
//! when layers are folded.

mod check;
mod codec;

use std::cmp::Ordering;

use crate::meta::{Attr, Content, PackRef};

/// A layer. Build it with entries in any order and call [`LayerTree::new`], which sorts, completes and checks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerTree {
    /// Packs that chunks of this layer refer to, in first-use order.
    pub packs: Vec<PackRef>,
    /// Entries sorted by path components (so a directory comes before what is in it), each path once, each with its parents.
    pub entries: Vec<Entry>,
}

/// What a layer says about one path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Path relative to the root, components joined by `/`, no leading or trailing slash; the root is empty.
    pub path: Vec<u8>,
    /// What is there.
    pub kind: EntryKind,
}

/// The kinds of entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A directory. `opaque`: nothing of lower layers shows through it.
    Dir {
        /// Attributes; `None` for a parent that the archive does not list, which never overrides a lower layer's.
        attr: Option<Attr>,
        /// Lower layers' children are hidden.
        opaque: bool,
    },
    /// Anything that is not a directory.
    Node {
        /// Attributes.
        attr: Attr,
        /// Type and content.
        content: Content,
    },
    /// A hard link. When the same layer has a [`EntryKind::Node`] at `target`, this is another name of it; otherwise `target` is looked
    /// up in the layers below as they are before this layer is applied, through symbolic links in its parents.
    Link {
        /// Path of the target, same form as [`Entry::path`].
        target: Vec<u8>,
    },
    /// What layers below have at this path is removed.
    Whiteout,
}

/// The longest path of an entry. The kernel takes 4095 bytes at once, but deeper trees can be made and walked step by step.
pub const MAX_PATH: usize = 32 << 10;

/// The longest name, as everywhere in Linux (`NAME_MAX`).
pub const MAX_NAME: usize = 255;

/// What all paths together may take in a tree of so many entries. Paths share their beginnings, so few bytes of an archive or a file can
/// ask for very many of them: 64 MiB are enough for a tree as deep as [`MAX_PATH`] allows several times over, and 1 KiB per entry for
/// anything that is large because it has many entries.
fn room_for_paths(entries: usize) -> usize {
    (64 << 20) + (entries << 10)
}

/// A layer tree that breaks a rule, or bytes that are not one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayerError {
    /// Not a layer tree at all, or one of a newer format.
    #[error("not a layer tree this version of Slipway reads; upgrade Slipway or convert the layer again")]
    UnknownFormat,
    /// The bytes break off or break a rule of the encoding.
    #[error("layer tree is damaged at byte {offset}: {rule}; convert the layer again")]
    Malformed {
        /// Where in the file.
        offset: usize,
        /// The rule.
        rule: &'static str,
    },
    /// An entry that no tree may hold.
    #[error("layer entry \"{}\" cannot be converted: {rule}", path.escape_ascii())]
    Entry {
        /// The entry's path.
        path: Vec<u8>,
        /// The rule it breaks.
        rule: &'static str,
    },
    /// The packs do not fit the entries.
    #[error("layer tree names {count} packs, but they are not the ones its chunks use in the order they use them; convert the layer again")]
    Packs {
        /// Packs named.
        count: usize,
    },
}

impl LayerTree {
    /// Sorts entries, adds parents that are not listed as implicit directories, puts packs into first-use order (dropping unused ones),
    /// and checks every rule that [`crate::fold`] relies on.
    pub fn new(packs: Vec<PackRef>, mut entries: Vec<Entry>) -> Result<LayerTree, LayerError> {
        entries.sort_by(|a, b| path_order(&a.path, &b.path));
        let mut tree = LayerTree { packs, entries: check::with_parents(entries)? };
        check::order_packs(&mut tree)?;
        check::check(&tree)?;
        Ok(tree)
    }

    /// Whether this layer tree is as [`LayerTree::new`] leaves one.
    pub fn check(&self) -> Result<(), LayerError> {
        check::check(self)
    }

    /// The file form, uncompressed. The layer tree's name is the BLAKE3 of these bytes.
    pub fn encode(&self) -> Vec<u8> {
        codec::encode(self)
    }

    /// Reads the file form. Takes any bytes without panicking, and needs memory in proportion to their length.
    pub fn decode(bytes: &[u8]) -> Result<LayerTree, LayerError> {
        let tree = codec::decode(bytes)?;
        check::check(&tree)?;
        Ok(tree)
    }
}

/// The order of entries: by components, so that a directory comes right before what is in it (`a`, `a/b`, `a-b`).
fn path_order(a: &[u8], b: &[u8]) -> Ordering {
    // No name contains NUL, so the separator can take its place below every byte of a name.
    let key = |byte: &u8| if *byte == b'/' { 0 } else { *byte };
    a.iter().map(key).cmp(b.iter().map(key))
}

/// The directory that `path` is in, and its name there. `None` for the root.
pub(crate) fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    match path.iter().rposition(|&b| b == b'/') {
        Some(at) => Some((&path[..at], &path[at + 1..])),
        None if path.is_empty() => None,
        None => Some((&[], path)),
    }
}
