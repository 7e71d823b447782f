//! The gate: every rule the writer relies on is checked here, so that writing cannot fail.

use std::collections::btree_map;
use std::fmt;

use super::FileKind;
use super::format::{RawXattr, XATTR_HEADER_LEN, XATTR_UNIT, split_xattr_name};
use crate::block::{UnitBits, blocks_for};
use crate::digest::Digest;
use crate::meta::{Attr, Chunk, Content, Data, Device, PackRef, Xattr};
use crate::tree::{Body, InodeIndex, Tree};

/// Longest file name (`NAME_MAX`).
const NAME_MAX: usize = 255;
/// Longest symbolic link target: `PATH_MAX` less the NUL.
const TARGET_MAX: usize = 4095;
/// What the xattrs of one inode may take if none is shared: `i_xattr_icount` counts [`XATTR_UNIT`]s in 16 bits.
const XATTR_BODY_MAX: usize = XATTR_HEADER_LEN + XATTR_UNIT * (u16::MAX as usize - 1);
/// Names and values of all xattrs together, counted once per inode. A tree in memory holds them all, shared or not; a limit here lets
/// the reader refuse an image that makes gigabytes out of one shared value. Real images have a few MiB at most.
pub(super) const XATTR_TOTAL_MAX: u64 = 256 << 20;
/// Number of packs: devices are counted in 16 bits and number 0 is the image.
const PACKS_MAX: usize = u16::MAX as usize - 1;
/// Blocks of all packs together, 8 TiB: as one address space with the image in front they must fit 32 bits.
const PACK_BLOCKS_MAX: u64 = 1 << 31;
/// Number of inodes: `i_ino` has 32 bits.
const INODES_MAX: usize = u32::MAX as usize - 1;

/// A tree that obeys every rule of the format. The writer takes nothing else.
#[derive(Clone, Debug)]
pub struct Checked {
    tree: Tree,
    steps: Vec<Step>,
    nlinks: Vec<u32>,
}

/// An inode at its first name, depth first by name: its place in the image.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub inode: InodeIndex,
    pub parent: InodeIndex,
}

/// A tree that cannot become an image. Its producer has to change what is at `path`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {fault}")]
pub struct TreeError {
    /// Where: `/` is the root, bytes that are not printable ASCII are escaped. A pack's digest when the fault is a pack's.
    pub path: String,
    /// The rule that is broken.
    pub fault: TreeFault,
}

/// The rules of a tree.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TreeFault {
    /// There is no inode 0, or it is not a directory.
    #[error("the root is not a directory")]
    Root,
    /// A directory names an inode that the tree does not have.
    #[error("names inode {0}, which does not exist")]
    NoSuchInode(u32),
    /// A directory has two names, one perhaps inside itself.
    #[error("a directory has a second name")]
    DirectoryLinked,
    /// No directory names an inode.
    #[error("inode {0} has no name")]
    Unreachable(u32),
    /// More inodes than fit.
    #[error("{0} inodes are too many")]
    TooManyInodes(usize),
    /// A name is empty, `.`, `..`, too long, or has a slash or NUL in it.
    #[error("not a file name: must be 1 to 255 bytes without slash and NUL, not . or ..")]
    Name,
    /// Permission bits have more than 0o7777.
    #[error("mode {0:#o} has more than permission bits")]
    Mode(u16),
    /// Nanoseconds make a second or more.
    #[error("{0} nanoseconds are not less than a second")]
    Nanoseconds(u32),
    /// A symbolic link's target is empty, too long or has a NUL in it.
    #[error("symbolic link target of {0} bytes: must be 1 to 4095 bytes without NUL")]
    Target(usize),
    /// A device number does not fit 12 + 20 bits.
    #[error("device number {}:{} is larger than 4095:1048575", .0.major, .0.minor)]
    Device(Device),
    /// EROFS knows the prefixes `user.`, `trusted.`, `security.` and the two POSIX ACL names only.
    #[error("xattr {0}: EROFS stores only user.*, trusted.*, security.* and system.posix_acl_{{access,default}}")]
    XattrName(String),
    /// An xattr's name is too long or has a NUL in it.
    #[error("xattr {0}: names have at most 255 bytes and no NUL")]
    XattrNameForm(String),
    /// Xattrs are not sorted by name, or one is there twice.
    #[error("xattr {0} is out of order or there twice")]
    XattrOrder(String),
    /// An xattr's value is too long.
    #[error("xattr {name} has a value of {len} bytes, more than 65535")]
    XattrValue {
        /// Its name.
        name: String,
        /// Length of its value.
        len: usize,
    },
    /// One inode's xattrs are too large together.
    #[error("xattrs of {0} bytes, more than 262148 for one inode")]
    XattrBody(usize),
    /// All xattrs together are too large.
    #[error("xattrs of the tree up to here exceed 256 MiB")]
    XattrTotal,
    /// The number of chunks does not fit the file size.
    #[error("{got} chunks for {size} bytes in units of {unit}")]
    ChunkCount {
        /// Chunks given.
        got: usize,
        /// File size.
        size: u64,
        /// Chunk size.
        unit: u64,
    },
    /// A chunk is in a pack the tree does not list.
    #[error("chunk {chunk} is in pack number {pack}, which does not exist")]
    ChunkPack {
        /// Which chunk.
        chunk: usize,
        /// Which pack.
        pack: u32,
    },
    /// A chunk reaches past the end of its pack.
    #[error("chunk {chunk} at block {block} reaches past the end of pack {pack}")]
    ChunkRange {
        /// Which chunk.
        chunk: usize,
        /// Where it starts.
        block: u32,
        /// The pack.
        pack: Digest,
    },
    /// A file's chunk size is not its pack's unit size.
    #[error("chunk {chunk} is {unit} bytes, but units of pack {pack} are not")]
    ChunkUnit {
        /// Which chunk.
        chunk: usize,
        /// The file's chunk size.
        unit: u64,
        /// The pack.
        pack: Digest,
    },
    /// A pack is listed twice.
    #[error("pack is listed twice")]
    PackTwice,
    /// No chunk is in a pack.
    #[error("pack is listed but no file has data in it")]
    PackUnused,
    /// More packs than fit.
    #[error("{0} packs are too many, 65534 fit")]
    TooManyPacks(usize),
    /// Packs are too large together.
    #[error("packs up to this one exceed 8 TiB")]
    PacksTooBig,
}

impl Checked {
    /// Checks `tree` against every rule; the first broken one in tree order is the error.
    pub fn new(tree: Tree) -> Result<Checked, TreeError> {
        check_packs(&tree.packs)?;
        let mut check = Check {
            tree: &tree,
            stack: Vec::new(),
            steps: Vec::with_capacity(tree.inodes.len()),
            nlinks: vec![0; tree.inodes.len()],
            used: vec![false; tree.packs.len()],
            xattr_bytes: 0,
        };
        check.run()?;
        let Check { steps, nlinks, used, .. } = check;
        if let Some(i) = nlinks.iter().position(|&n| n == 0) {
            return Err(TreeError { path: "/".to_owned(), fault: TreeFault::Unreachable(i as u32) });
        }
        if let Some(i) = used.iter().position(|used| !used) {
            return Err(pack_error(&tree.packs[i], TreeFault::PackUnused));
        }
        Ok(Checked { tree, steps, nlinks })
    }

    /// The tree.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Gives the tree back.
    pub(super) fn into_tree(self) -> Tree {
        self.tree
    }

    /// Every inode once, at its first name, depth first by name; the root first, its own parent.
    pub(super) fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Link count: names of a file, 2 plus subdirectories of a directory.
    pub(super) fn nlink(&self, inode: InodeIndex) -> u32 {
        self.nlinks[inode.0 as usize]
    }
}

fn pack_error(pack: &PackRef, fault: TreeFault) -> TreeError {
    TreeError { path: format!("pack {}", pack.digest), fault }
}

fn check_packs(packs: &[PackRef]) -> Result<(), TreeError> {
    if packs.len() > PACKS_MAX {
        return Err(pack_error(&packs[PACKS_MAX], TreeFault::TooManyPacks(packs.len())));
    }
    let mut seen = std::collections::HashSet::new();
    let mut blocks = 0;
    for pack in packs {
        blocks += u64::from(pack.blocks);
        if !seen.insert(pack.digest) {
            return Err(pack_error(pack, TreeFault::PackTwice));
        }
        if blocks > PACK_BLOCKS_MAX {
            return Err(pack_error(pack, TreeFault::PacksTooBig));
        }
    }
    Ok(())
}

/// A pass over a tree that may be anything: iterative, every inode visited once.
struct Check<'t> {
    tree: &'t Tree,
    stack: Vec<Frame<'t>>,
    steps: Vec<Step>,
    nlinks: Vec<u32>,
    used: Vec<bool>,
    xattr_bytes: u64,
}

/// A directory that is being passed over.
struct Frame<'t> {
    dir: InodeIndex,
    rest: btree_map::Iter<'t, Vec<u8>, InodeIndex>,
    /// The name being looked at.
    name: &'t [u8],
}

impl<'t> Check<'t> {
    fn run(&mut self) -> Result<(), TreeError> {
        if self.tree.inodes.len() > INODES_MAX {
            return Err(self.fault(TreeFault::TooManyInodes(self.tree.inodes.len())));
        }
        match self.tree.inodes.first().map(|root| &root.body) {
            Some(Body::Dir(_)) => self.visit(Tree::ROOT, Tree::ROOT)?,
            _ => return Err(self.fault(TreeFault::Root)),
        }
        while let Some(frame) = self.stack.last_mut() {
            match frame.rest.next() {
                None => drop(self.stack.pop()),
                Some((name, &child)) => {
                    frame.name = name;
                    let parent = frame.dir;
                    self.visit(child, parent)?;
                }
            }
        }
        Ok(())
    }

    /// One name: counts it, and checks the inode if it is the first name of it.
    fn visit(&mut self, index: InodeIndex, parent: InodeIndex) -> Result<(), TreeError> {
        let i = index.0 as usize;
        let Some(inode) = self.tree.inodes.get(i) else { return Err(self.fault(TreeFault::NoSuchInode(index.0))) };
        if let Some(frame) = self.stack.last() {
            check_name(frame.name).map_err(|fault| self.fault(fault))?;
        }
        let first = self.nlinks[i] == 0;
        match &inode.body {
            Body::Dir(_) if !first => return Err(self.fault(TreeFault::DirectoryLinked)),
            Body::Dir(_) => {
                self.nlinks[i] = 2;
                if index != parent {
                    self.nlinks[parent.0 as usize] += 1;
                }
            }
            Body::Content(_) => self.nlinks[i] += 1,
        }
        if !first {
            return Ok(());
        }
        self.steps.push(Step { inode: index, parent });
        self.xattr_bytes += check_attr(&inode.attr).map_err(|fault| self.fault(fault))?;
        if self.xattr_bytes > XATTR_TOTAL_MAX {
            return Err(self.fault(TreeFault::XattrTotal));
        }
        match &inode.body {
            Body::Dir(children) => self.stack.push(Frame { dir: index, rest: children.iter(), name: b"" }),
            Body::Content(content) => check_content(content, &self.tree.packs, &mut self.used).map_err(|fault| self.fault(fault))?,
        }
        Ok(())
    }

    fn fault(&self, fault: TreeFault) -> TreeError {
        let mut path = String::new();
        for frame in &self.stack {
            path.push('/');
            path.push_str(&frame.name.escape_ascii().to_string());
        }
        if path.is_empty() {
            path.push('/');
        }
        TreeError { path, fault }
    }
}

/// Whether `name` can be a directory entry.
pub(super) fn check_name(name: &[u8]) -> Result<(), TreeFault> {
    let bad = name.is_empty() || name.len() > NAME_MAX || name == b"." || name == b".." || name.iter().any(|&b| b == b'/' || b == 0);
    if bad { Err(TreeFault::Name) } else { Ok(()) }
}

/// Checks attributes; gives the bytes of xattr names and values.
fn check_attr(attr: &Attr) -> Result<u64, TreeFault> {
    if attr.mode > 0o7777 {
        return Err(TreeFault::Mode(attr.mode));
    }
    if attr.mtime.nsec >= 1_000_000_000 {
        return Err(TreeFault::Nanoseconds(attr.mtime.nsec));
    }
    let mut bytes = 0;
    let mut body = XATTR_HEADER_LEN;
    for (i, xattr) in attr.xattrs.iter().enumerate() {
        let name = || xattr.name.escape_ascii().to_string();
        if xattr.name.len() > Xattr::MAX_NAME || xattr.name.contains(&0) {
            return Err(TreeFault::XattrNameForm(name()));
        }
        let Some((name_index, rest)) = split_xattr_name(&xattr.name) else { return Err(TreeFault::XattrName(name())) };
        if xattr.value.len() > Xattr::MAX_VALUE {
            return Err(TreeFault::XattrValue { name: name(), len: xattr.value.len() });
        }
        if i > 0 && attr.xattrs[i - 1].name >= xattr.name {
            return Err(TreeFault::XattrOrder(name()));
        }
        body += RawXattr { name_len: rest.len() as u8, name_index, value_len: xattr.value.len() as u16 }.padded_len();
        bytes += (xattr.name.len() + xattr.value.len()) as u64;
    }
    if body > XATTR_BODY_MAX {
        return Err(TreeFault::XattrBody(body));
    }
    Ok(bytes)
}

fn check_content(content: &Content, packs: &[PackRef], used: &mut [bool]) -> Result<(), TreeFault> {
    match content {
        Content::Symlink(target) if target.is_empty() || target.len() > TARGET_MAX || target.contains(&0) => Err(TreeFault::Target(target.len())),
        Content::Char(device) | Content::Block(device) if device.major > 0xfff || device.minor > 0xf_ffff => Err(TreeFault::Device(*device)),
        Content::File(Data::Chunked { size, unit_bits, chunks }) => check_chunks(*size, *unit_bits, chunks, packs, used),
        _ => Ok(()),
    }
}

fn check_chunks(size: u64, unit: UnitBits, chunks: &[Chunk], packs: &[PackRef], used: &mut [bool]) -> Result<(), TreeFault> {
    if chunks.len() as u64 != size.div_ceil(unit.bytes()) || i64::try_from(size).is_err() {
        return Err(TreeFault::ChunkCount { got: chunks.len(), size, unit: unit.bytes() });
    }
    for (chunk, place) in chunks.iter().enumerate() {
        let Chunk::At { pack: number, block } = *place else { continue };
        let Some(pack) = packs.get(number as usize) else { return Err(TreeFault::ChunkPack { chunk, pack: number }) };
        used[number as usize] = true;
        let len = (size - chunk as u64 * unit.bytes()).min(unit.bytes());
        if u64::from(block) + blocks_for(len) > u64::from(pack.blocks) {
            return Err(TreeFault::ChunkRange { chunk, block, pack: pack.digest });
        }
        if pack.unit_bits != unit {
            return Err(TreeFault::ChunkUnit { chunk, unit: unit.bytes(), pack: pack.digest });
        }
    }
    Ok(())
}

impl FileKind {
    /// The type of what an inode holds.
    pub fn of(body: &Body) -> FileKind {
        match body {
            Body::Dir(_) => FileKind::Dir,
            Body::Content(Content::File(_)) => FileKind::File,
            Body::Content(Content::Symlink(_)) => FileKind::Symlink,
            Body::Content(Content::Char(_)) => FileKind::Char,
            Body::Content(Content::Block(_)) => FileKind::Block,
            Body::Content(Content::Fifo) => FileKind::Fifo,
            Body::Content(Content::Socket) => FileKind::Socket,
        }
    }
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FileKind::File => "file",
            FileKind::Dir => "dir",
            FileKind::Char => "char",
            FileKind::Block => "block",
            FileKind::Fifo => "fifo",
            FileKind::Socket => "socket",
            FileKind::Symlink => "symlink",
        })
    }
}
