//! Every number of an image: what goes where, in which form. No bytes are made here, and none of this is decided anywhere else.

use std::collections::HashMap;

use super::checked::{Checked, Step};
use super::format::{
    COMPAT, DEVICE_SLOT_LEN, DEVICE_TABLE_AT, Form, INCOMPAT, Layout, MAGIC, NID_SLOT, RawDevice, RawInode, RawXattr, Superblock, UUID_LEN,
    XATTR_ENTRY_LEN, XATTR_HEADER_LEN, XATTR_UNIT, chunk_format, encode_device, split_xattr_name,
};
use super::{FileKind, Nid, dirs};
use crate::block::{BLOCK_BITS, BLOCK_SIZE};
use crate::meta::{Attr, Content, Data, Time, Xattr};
use crate::tree::{Body, Inode};

/// How many xattrs of an inode can be shared: the count has 8 bits. More are kept beside the inode.
const SHARED_MAX: usize = u8::MAX as usize;

/// An image, decided.
pub(super) struct Plan<'t> {
    pub checked: &'t Checked,
    /// With checksum and UUID zero.
    pub superblock: Superblock,
    pub devices: Vec<RawDevice>,
    /// Shared xattrs, as they follow each other from `shared_at`.
    pub shared: Vec<&'t Xattr>,
    pub shared_at: u64,
    /// In the order of their nids.
    pub inodes: Vec<Placed>,
    /// By index in the tree.
    pub nids: Vec<Nid>,
    /// Length of the image in bytes.
    pub len: u64,
    shared_ids: HashMap<&'t Xattr, u32>,
}

/// An inode with its place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placed {
    pub step: Step,
    /// Byte offset of the inode.
    pub at: u64,
    pub raw: RawInode,
    /// Byte offset of what follows inode and xattrs: inline tail or chunk indexes.
    pub rest_at: u64,
}

/// The xattrs of one inode: ids of those that are shared, and the others.
pub(super) struct XattrBody<'t> {
    pub shared: Vec<u32>,
    pub own: Vec<&'t Xattr>,
}

impl XattrBody<'_> {
    /// Bytes it takes, 0 without xattrs.
    fn len(&self) -> usize {
        if self.shared.is_empty() && self.own.is_empty() {
            return 0;
        }
        XATTR_HEADER_LEN + XATTR_UNIT * self.shared.len() + self.own.iter().map(|x| raw_xattr(x).padded_len()).sum::<usize>()
    }
}

/// The header of an xattr.
pub(super) fn raw_xattr(xattr: &Xattr) -> RawXattr {
    let (name_index, rest) = split_xattr_name(&xattr.name).expect("Checked lets only known prefixes through");
    RawXattr { name_len: rest.len() as u8, name_index, value_len: xattr.value.len() as u16 }
}

impl<'t> Plan<'t> {
    pub fn new(checked: &'t Checked) -> Plan<'t> {
        let tree = checked.tree();
        let shared = shared_xattrs(checked);
        let shared_at = (DEVICE_TABLE_AT + DEVICE_SLOT_LEN * tree.packs.len()) as u64;
        let xattr_block = shared_at / BLOCK_SIZE;
        let mut end = shared_at;
        let mut shared_ids = HashMap::with_capacity(shared.len());
        for &xattr in &shared {
            shared_ids.insert(xattr, ((end - xattr_block * BLOCK_SIZE) / XATTR_UNIT as u64) as u32);
            end += raw_xattr(xattr).padded_len() as u64;
        }
        let inodes_at = end.next_multiple_of(NID_SLOT);
        let mut plan = Plan {
            checked,
            superblock: Superblock {
                magic: MAGIC,
                checksum: 0,
                compat: COMPAT,
                block_bits: BLOCK_BITS,
                ext_slots: 0,
                root_nid: 0,
                inodes: checked.steps().len() as u64,
                epoch: 0,
                epoch_nsec: 0,
                blocks: 0,
                meta_block: (inodes_at / BLOCK_SIZE) as u32,
                xattr_block: xattr_block as u32,
                uuid: [0; UUID_LEN],
                incompat: INCOMPAT,
                compression: 0,
                extra_devices: tree.packs.len() as u16,
                device_slot: (DEVICE_TABLE_AT / DEVICE_SLOT_LEN) as u16,
                dir_block_bits: 0,
            },
            devices: Vec::new(),
            shared,
            shared_at,
            inodes: Vec::with_capacity(checked.steps().len()),
            nids: vec![Nid(0); tree.inodes.len()],
            len: 0,
            shared_ids,
        };
        plan.place_inodes(inodes_at);
        plan.place_devices();
        plan
    }

    /// The xattrs of an inode, split.
    pub fn xattrs(&self, attr: &'t Attr) -> XattrBody<'t> {
        let mut body = XattrBody { shared: Vec::new(), own: Vec::new() };
        for xattr in &attr.xattrs {
            match self.shared_ids.get(xattr) {
                Some(&id) if body.shared.len() < SHARED_MAX => body.shared.push(id),
                _ => body.own.push(xattr),
            }
        }
        body
    }

    /// Gives every inode its place from `at` on, then the blocks after them.
    fn place_inodes(&mut self, at: u64) {
        let meta_at = u64::from(self.superblock.meta_block) * BLOCK_SIZE;
        let mut end = at;
        for (i, &step) in self.checked.steps().iter().enumerate() {
            let (placed, next) = self.place(step, i as u32 + 1, end);
            self.nids[step.inode.0 as usize] = Nid((placed.at - meta_at) / NID_SLOT);
            self.inodes.push(placed);
            end = next;
        }
        // Checked: the root is the first, and the inode area starts within one block of `meta_at`.
        self.superblock.root_nid = self.nids[0].0 as u16;
        let mut block = end.div_ceil(BLOCK_SIZE);
        for placed in &mut self.inodes {
            let blocks = match placed.raw.layout {
                Layout::Plain if has_content(placed.raw.mode) => placed.raw.size.div_ceil(BLOCK_SIZE),
                Layout::Inline => placed.raw.size / BLOCK_SIZE,
                _ => 0,
            };
            if blocks > 0 {
                placed.raw.union = block as u32;
                block += blocks;
            }
        }
        self.superblock.blocks = block as u32;
        self.len = block * BLOCK_SIZE;
    }

    /// Places one inode at `end` or after; gives it and where it ends with all that is beside it.
    fn place(&self, step: Step, ino: u32, end: u64) -> (Placed, u64) {
        let tree = self.checked.tree();
        let inode: &'t Inode = tree.inode(step.inode);
        let kind = FileKind::of(&inode.body);
        let xattrs_len = self.xattrs(&inode.attr).len();
        let mut raw = RawInode {
            form: Form::Extended,
            layout: Layout::Plain,
            xattr_count: if xattrs_len == 0 { 0 } else { ((xattrs_len - XATTR_HEADER_LEN) / XATTR_UNIT + 1) as u16 },
            mode: kind.mode_bits() | inode.attr.mode,
            nlink: self.checked.nlink(step.inode),
            size: 0,
            union: 0,
            ino,
            uid: inode.attr.uid,
            gid: inode.attr.gid,
            mtime: inode.attr.mtime,
        };
        let mut chunks = 0;
        match &inode.body {
            Body::Dir(children) => raw.size = dirs::size(&dirs::names(tree, step.inode, step.parent, children)),
            Body::Content(Content::Symlink(target)) => raw.size = target.len() as u64,
            Body::Content(Content::File(Data::Inline(bytes))) => raw.size = bytes.len() as u64,
            Body::Content(Content::File(Data::Chunked { size, unit_bits, chunks: list })) => {
                raw.size = *size;
                raw.layout = Layout::Chunked;
                raw.union = chunk_format(*unit_bits);
                chunks = list.len() as u64;
            }
            Body::Content(Content::Char(device) | Content::Block(device)) => raw.union = encode_device(*device),
            Body::Content(Content::Fifo | Content::Socket) => {}
        }
        if fits_compact(&raw) {
            raw.form = Form::Compact;
        }
        let head = (raw.form.len() + xattrs_len) as u64;
        if raw.layout == Layout::Chunked {
            let at = end.next_multiple_of(NID_SLOT);
            let rest_at = (at + head).next_multiple_of(8);
            return (Placed { step, at, raw, rest_at }, rest_at + 8 * chunks);
        }
        let tail = raw.size % BLOCK_SIZE;
        let place = if kind == FileKind::Symlink { place_in_block(end, head, tail) } else { place_with_tail(end, head, tail) };
        match place {
            Some(at) if tail > 0 => {
                raw.layout = Layout::Inline;
                (Placed { step, at, raw, rest_at: at + head }, at + head + tail)
            }
            _ => {
                let at = end.next_multiple_of(NID_SLOT);
                (Placed { step, at, raw, rest_at: at + head }, at + head)
            }
        }
    }

    /// Fills the device table. As one address space, packs follow the image: kernels that are not given the devices then find nothing
    /// at a chunk's address and say EIO, where an address of 0 would show them bytes of the image itself.
    fn place_devices(&mut self) {
        let mut unified_block = self.superblock.blocks;
        for pack in &self.checked.tree().packs {
            let tag = pack.digest.to_string().into_bytes().try_into().expect("a digest is 64 hex digits");
            self.devices.push(RawDevice { tag, blocks: pack.blocks, unified_block });
            unified_block += pack.blocks;
        }
    }
}

/// Whether an inode of this mode has bytes of its own (others have a device number or nothing where the start block would be).
fn has_content(mode: u16) -> bool {
    matches!(FileKind::from_mode(mode), Some(FileKind::File | FileKind::Dir | FileKind::Symlink))
}

/// Whether a compact inode loses nothing: it has no time, so only the epoch itself will do.
fn fits_compact(raw: &RawInode) -> bool {
    raw.mtime == Time::default() && [raw.uid, raw.gid, raw.nlink].into_iter().all(|n| n <= u32::from(u16::MAX)) && raw.size <= u64::from(u32::MAX)
}

/// Where an inode of `head` bytes (with xattrs) goes, from `end` on, so that the `tail` bytes after it stay in one block: at once, or so
/// that the tail begins the next block. `None` if alignment leaves no such place; then the tail needs a block of its own.
fn place_with_tail(end: u64, head: u64, tail: u64) -> Option<u64> {
    let fits = |at: u64| (at + head) % BLOCK_SIZE + tail <= BLOCK_SIZE;
    let at = end.next_multiple_of(NID_SLOT);
    if fits(at) {
        return Some(at);
    }
    let next_block = (at + head).next_multiple_of(BLOCK_SIZE);
    let at = (next_block - head).next_multiple_of(NID_SLOT);
    fits(at).then_some(at)
}

/// Where an inode goes so that it, its xattrs and the tail all lie in one block. Kernels before 6.12 refuse (EUCLEAN) an inline symbolic link
/// whose target ends in another block than the one its inode starts in, even where the target itself crosses no boundary.
fn place_in_block(end: u64, head: u64, tail: u64) -> Option<u64> {
    let at = end.next_multiple_of(NID_SLOT);
    let len = head + tail;
    if at % BLOCK_SIZE + len <= BLOCK_SIZE { Some(at) } else { (len <= BLOCK_SIZE).then(|| at.next_multiple_of(BLOCK_SIZE)) }
}

/// Xattrs (name and value) that more than one inode has, in first-use order. One that takes no more than its id would is not worth it.
fn shared_xattrs(checked: &Checked) -> Vec<&Xattr> {
    let all = || checked.steps().iter().flat_map(|step| &checked.tree().inode(step.inode).attr.xattrs);
    let mut uses: HashMap<&Xattr, usize> = HashMap::new();
    for xattr in all() {
        *uses.entry(xattr).or_default() += 1;
    }
    // Taking an entry out as it is listed makes its first use the only one that counts.
    all().filter(|xattr| uses.remove(xattr).is_some_and(|n| n > 1) && raw_xattr(xattr).padded_len() > XATTR_ENTRY_LEN).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tails_never_cross_a_block() {
        for (end, head, tail, expected) in [
            (0, 64, 100, Some(0)),
            (1, 64, 100, Some(32)),
            (0, 64, 4032, Some(0)),
            (0, 64, 4033, Some(4032)),
            (32, 64, 4032, Some(4032)),
            (4000, 32, 64, Some(4000)),
            (4000, 32, 65, Some(4064)),
            // 76 bytes of head: the tail can start at byte 12 of a block at best.
            (32, 76, 4084, Some(4032)),
            (32, 76, 4085, None),
            (0, 64, 0, Some(0)),
        ] {
            assert_eq!(place_with_tail(end, head, tail), expected, "{end} {head} {tail}");
        }
    }

    #[test]
    fn symbolic_links_lie_in_one_block_with_their_targets() {
        for (end, head, tail, expected) in [
            (0, 64, 100, Some(0)),
            (1, 64, 100, Some(32)),
            (0, 64, 4032, Some(0)),
            (0, 64, 4033, None),
            (32, 64, 4032, Some(4096)),
            (4032, 64, 1, Some(4096)),
            (4064, 32, 0, Some(4064)),
            (4000, 32, 64, Some(4000)),
            (4000, 32, 65, Some(4096)),
            (4097, 76, 4020, Some(8192)),
            (4096, 76, 4021, None),
        ] {
            assert_eq!(place_in_block(end, head, tail), expected, "{end} {head} {tail}");
        }
    }
}
