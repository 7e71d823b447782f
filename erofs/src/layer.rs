//! One OCI layer as a flat list of entries in path order: the unit of resume and reuse, and its file form.
//!
//! The file form is `encode`'s; stores keep it zstd-compressed and name it by the BLAKE3 of the *uncompressed* bytes.

use crate::meta::{Attr, Content, PackRef};

/// A layer. Build it with entries in any order and call [`LayerTree::new`], which sorts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerTree {
    /// Packs that chunks of this layer refer to, in first-use order.
    pub packs: Vec<PackRef>,
    /// Entries sorted by path components (so a directory comes before what is in it), each path once.
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
    /// A hard link to another path, resolved at fold against the tree as it then is.
    Link {
        /// Path of the target, same form as [`Entry::path`].
        target: Vec<u8>,
    },
    /// The path of lower layers is removed.
    Whiteout,
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
    #[error("layer entry {}: {rule}", path.escape_ascii())]
    Entry {
        /// The entry's path.
        path: Vec<u8>,
        /// The rule it breaks.
        rule: &'static str,
    },
}

#[allow(clippy::todo)]
impl LayerTree {
    /// Sorts entries, adds parents that are not listed as implicit directories and checks every rule [`decode`](Self::decode) relies on.
    pub fn new(packs: Vec<PackRef>, entries: Vec<Entry>) -> Result<LayerTree, LayerError> {
        let _ = (packs, entries);
        todo!()
    }

    /// The file form, uncompressed. The layer tree's name is the BLAKE3 of these bytes.
    pub fn encode(&self) -> Vec<u8> {
        todo!()
    }

    /// Reads the file form. Takes any bytes without panicking, and needs memory in proportion to their length.
    pub fn decode(bytes: &[u8]) -> Result<LayerTree, LayerError> {
        let _ = bytes;
        todo!()
    }
}
