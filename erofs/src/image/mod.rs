//! A tree as EROFS metadata: tree → [`Checked`] → plan → bytes, and bytes → [`Image`] → views, tree, text.
//!
//! The image holds superblock, inodes, directories, xattrs and chunk indexes; file data lives in packs, which are its extra devices.
//! It keeps to what every kernel from 5.16 mounts: 4 KiB blocks, chunk-based files with 8-byte indexes, a device table, nothing
//! compressed. The same tree gives the same bytes.
//!
//! Layout, in file order, without gaps other than alignment:
//!
//! ```text
//! 0      zeros                 1024  superblock          1152  device table, 128 bytes per pack
//! then   shared xattrs         values that more than one inode has, in first-use order, 4-byte aligned
//! then   inodes                depth first by name, 32-byte aligned; each followed by its own xattrs and its inline tail or chunk index
//! then   blocks                whole blocks of large directories (and of long inline files), block aligned, in the order of their inodes
//! ```
//!
//! Files here: `format` constants and encodings, `checked` the gate, `plan` every number, `dirs` how directories are cut into blocks,
//! `emit` the bytes, `reader` and `read_dir` the views, `walk` a verified pass over all names and the tree it gives, `dump` the text.

mod checked;
mod dirs;
mod dump;
mod emit;
mod format;
mod plan;
mod read_dir;
mod reader;
mod walk;

use std::fmt;

pub use checked::{Checked, TreeError, TreeFault};
pub use dump::dump;
pub use read_dir::ReadDir;
pub use reader::{Chunks, Flat, Image};

use crate::digest::Digest;
use crate::meta::{Device, Time};

/// Number of an inode: its distance from the start of the inode area in slots of 32 bytes.
///
/// Not a FUSE node id (there the root is 1) and not a position in [`crate::tree::Tree::inodes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nid(pub u64);

impl fmt::Display for Nid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// A finished image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Built {
    /// The whole file, a multiple of 4 KiB.
    pub bytes: Vec<u8>,
    /// BLAKE3 of `bytes`: the image's name.
    pub digest: Digest,
}

/// Turns a checked tree into an image. Cannot fail: [`Checked`] has refused whatever could go wrong.
pub fn write(checked: &Checked) -> Built {
    let plan = plan::Plan::new(checked);
    let bytes = emit::emit(&plan);
    Built { digest: Digest::of(&bytes), bytes }
}

/// An entry of the device table: a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceSlot {
    /// The pack's name, which is the device's tag.
    pub digest: Digest,
    /// Size in blocks.
    pub blocks: u32,
}

/// Type of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FileKind {
    /// Regular file.
    File,
    /// Directory.
    Dir,
    /// Character device.
    Char,
    /// Block device.
    Block,
    /// Named pipe.
    Fifo,
    /// Socket.
    Socket,
    /// Symbolic link.
    Symlink,
}

/// An inode as `stat` sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InodeView {
    /// Its number.
    pub nid: Nid,
    /// Its type.
    pub kind: FileKind,
    /// Permission bits with setuid, setgid and sticky (0o7777 at most).
    pub mode: u16,
    /// Number of names; of a directory 2 plus its subdirectories.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Time,
    /// Size in bytes: of a file its content, of a symbolic link its target, of a directory its on-disk entries.
    pub size: u64,
    /// Device number of a character or block device, else zeros.
    pub device: Device,
}

/// A name in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// The name.
    pub name: &'a [u8],
    /// The inode it names.
    pub nid: Nid,
    /// The inode's type, as the directory says.
    pub kind: FileKind,
}

/// Where the bytes of an inode are.
#[derive(Clone, Copy, Debug)]
pub enum DataView<'a> {
    /// In the image: directories, symbolic links, tiny files. Empty for devices, pipes and sockets.
    Inline(Flat<'a>),
    /// In packs.
    Chunks(Chunks<'a>),
}

/// Why bytes cannot be read as one of our images. Nothing here can be retried: fetch the image again or convert anew.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// Not EROFS at all.
    #[error("not a metadata image: no EROFS superblock")]
    NotErofs,
    /// EROFS, but not as Slipway writes it (or a later Slipway's).
    #[error("metadata image has {field} {value:#x}, which this version does not read; use the version that wrote it")]
    Unsupported {
        /// Superblock field.
        field: &'static str,
        /// What it says.
        value: u64,
    },
    /// The superblock's CRC-32C is not that of the first block.
    #[error("metadata image is damaged: its superblock checksum does not match; fetch it again")]
    Checksum,
    /// Something reaches past the end.
    #[error("metadata image is damaged: {what} at byte {offset} with {len} bytes reaches past the end; fetch it again")]
    Truncated {
        /// What is there.
        what: &'static str,
        /// Where it starts.
        offset: u64,
        /// How long it claims to be.
        len: u64,
    },
    /// An inode or what belongs to it contradicts itself or the rest.
    #[error("metadata image is damaged: inode {nid}: {what}; fetch it again")]
    Corrupt {
        /// The inode.
        nid: Nid,
        /// What is wrong.
        what: &'static str,
    },
    /// A directory was asked for.
    #[error("inode {nid} is not a directory")]
    NotADirectory {
        /// The inode.
        nid: Nid,
    },
    /// The image can be read, but what it describes breaks a rule.
    #[error("metadata image describes a tree that cannot be; fetch it again")]
    Tree(#[source] TreeError),
}
