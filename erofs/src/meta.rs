//! What a file is, apart from its place in a tree: attributes and content.

use crate::block::UnitBits;
use crate::digest::Digest;

/// Permission bits, owner, modification time and extended attributes of one inode.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attr {
    /// Permission bits with setuid, setgid and sticky: 0o7777 at most. The file type is [`Content`]'s.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Time,
    /// Extended attributes, sorted by name, each name once.
    pub xattrs: Vec<Xattr>,
}

/// A point in time: seconds since 1970 (may be negative) and nanoseconds 0..1 000 000 000 after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time {
    /// Seconds since 1970-01-01T00:00:00Z.
    pub sec: i64,
    /// Nanoseconds after `sec`.
    pub nsec: u32,
}

/// One extended attribute with its full name (`security.capability`, `user.note`, `system.posix_acl_access`).
/// ACLs are in the kernel's binary form (`include/uapi/linux/posix_acl_xattr.h`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Xattr {
    /// Full name.
    pub name: Vec<u8>,
    /// Value.
    pub value: Vec<u8>,
}

impl Xattr {
    /// Longest name (`XATTR_NAME_MAX`).
    pub const MAX_NAME: usize = 255;
    /// Longest value: EROFS keeps its length in 16 bits, one less than Linux allows.
    pub const MAX_VALUE: usize = u16::MAX as usize;
    /// What names begin with; the ACLs are whole names. EROFS has a number for each and can store no other.
    pub(crate) const PREFIXES: [&[u8]; 5] = [b"user.", b"system.posix_acl_access", b"system.posix_acl_default", b"trusted.", b"security."];

    /// Whether an image can hold an attribute of this name.
    pub fn is_name(name: &[u8]) -> bool {
        name.len() <= Xattr::MAX_NAME && !name.contains(&0) && Xattr::split_name(name).is_some()
    }

    /// The name's place among [`Xattr::PREFIXES`], and the rest of it.
    pub(crate) fn split_name(name: &[u8]) -> Option<(usize, &[u8])> {
        Xattr::PREFIXES.iter().enumerate().find_map(|(i, prefix)| {
            let rest = name.strip_prefix(*prefix)?;
            (prefix.ends_with(b".") != rest.is_empty()).then_some((i, rest))
        })
    }
}

/// A pack as trees and images refer to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackRef {
    /// The pack's name.
    pub digest: Digest,
    /// Uncompressed length in blocks: the size of the EROFS device it becomes.
    pub blocks: u32,
    /// Unit size, which is the chunk size of every file that has chunks in this pack.
    pub unit_bits: UnitBits,
}

/// Where one chunk of a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Chunk {
    /// All zeros; stored nowhere.
    Hole,
    /// In pack number `pack` of the list that goes with the tree, from block `block` of its uncompressed space.
    At {
        /// Index into the tree's list of packs.
        pack: u32,
        /// First block in the pack's uncompressed space.
        block: u32,
    },
}

/// The bytes of a regular file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    /// The bytes themselves, kept in the metadata image: for tiny files (and empty ones).
    Inline(Vec<u8>),
    /// Chunk `i` holds bytes `i * unit .. min((i + 1) * unit, size)`, zero-padded to whole blocks.
    Chunked {
        /// File size in bytes.
        size: u64,
        /// Chunk size. All packs the chunks are in have this unit size.
        unit_bits: UnitBits,
        /// `size.div_ceil(unit)` chunks.
        chunks: Vec<Chunk>,
    },
}

impl Data {
    /// File size in bytes.
    pub fn size(&self) -> u64 {
        match self {
            Data::Inline(bytes) => bytes.len() as u64,
            Data::Chunked { size, .. } => *size,
        }
    }
}

/// Device number of a character or block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Device {
    /// Major number, 12 bits (`include/linux/kdev_t.h`).
    pub major: u32,
    /// Minor number, 20 bits.
    pub minor: u32,
}

/// A file that is not a directory: its type and what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Regular file.
    File(Data),
    /// Symbolic link with its target, 1..=4095 bytes.
    Symlink(Vec<u8>),
    /// Character device.
    Char(Device),
    /// Block device.
    Block(Device),
    /// Named pipe.
    Fifo,
    /// Socket. Archives cannot carry one; the type exists for completeness of what EROFS can.
    Socket,
}
