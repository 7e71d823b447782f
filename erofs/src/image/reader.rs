//! Views of an image.
//!
//! Whatever the bytes are, nothing here panics, and no call takes time or memory out of proportion to what it returns (a call on one inode)
//! or to the image's length ([`Image::to_tree`], [`super::dump()`]): every offset is computed with checked arithmetic and every range is taken
//! from the bytes by [`Image::slice`]. Only images of our own baseline are read.

use super::format::{
    CHUNK_INDEX_LEN, COMPACT_LEN, COMPAT, DEVICE_SLOT_LEN, DEVICE_TABLE_AT, EXTENDED_LEN, Form, INCOMPAT, Layout, MAGIC, NID_SLOT, RawDevice,
    RawInode, RawXattr, SUPERBLOCK_AT, SUPERBLOCK_LEN, Superblock, XATTR_ENTRY_LEN, XATTR_HEADER_LEN, XATTR_UNIT, checksum, chunk_size, decode_chunk,
    decode_device, decode_xattr_header, join_xattr_name, u32_at, xattr_body_len,
};
use super::read_dir::{DirBlock, Names, ReadDir};
use super::{DataView, DeviceSlot, DirEntry, FileKind, ImageError, InodeView, Nid};
use crate::block::{BLOCK_BITS, BLOCK_SIZE, UnitBits, blocks_for};
use crate::digest::Digest;
use crate::meta::{Chunk, Device, Xattr};

/// An image in memory.
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    bytes: &'a [u8],
    root: Nid,
    inodes: u64,
    meta_at: u64,
    xattrs_at: u64,
    device_table: &'a [u8],
}

/// Bytes kept in the image: whole blocks, then a tail beside the inode. Either may be empty.
#[derive(Clone, Copy, Debug)]
pub struct Flat<'a> {
    /// First part; the last block may be partly used when there is no tail.
    pub blocks: &'a [u8],
    /// The rest.
    pub tail: &'a [u8],
}

impl<'a> Flat<'a> {
    /// Both parts in one.
    pub fn to_vec(&self) -> Vec<u8> {
        [self.blocks, self.tail].concat()
    }

    /// Number of blocks, the tail being one.
    pub(super) fn block_count(&self) -> usize {
        self.blocks.len().div_ceil(BLOCK_SIZE as usize) + usize::from(!self.tail.is_empty())
    }

    /// Block `i`, which may be short when it is the last; the tail for every number past the blocks.
    pub(super) fn block(&self, i: usize) -> &'a [u8] {
        self.blocks.chunks(BLOCK_SIZE as usize).nth(i).unwrap_or(self.tail)
    }
}

/// Chunk indexes of a file.
#[derive(Clone, Copy, Debug)]
pub struct Chunks<'a> {
    nid: Nid,
    size: u64,
    unit: UnitBits,
    indexes: &'a [u8],
    device_table: &'a [u8],
}

impl Chunks<'_> {
    /// Chunk size.
    pub fn unit_bits(&self) -> UnitBits {
        self.unit
    }

    /// Number of chunks.
    pub fn count(&self) -> u64 {
        (self.indexes.len() / CHUNK_INDEX_LEN) as u64
    }

    /// Where chunk `i` is: the pack counts in [`Image::devices`] and the whole chunk lies inside it. A hole past the last chunk.
    pub fn get(&self, i: u64) -> Result<Chunk, ImageError> {
        let corrupt = |what| ImageError::Corrupt { nid: self.nid, what };
        let index = usize::try_from(i).ok().and_then(|i| self.indexes.as_chunks::<CHUNK_INDEX_LEN>().0.get(i));
        let Some(index) = index else { return Ok(Chunk::Hole) };
        let chunk = decode_chunk(index).ok_or_else(|| corrupt("a chunk is in the image itself"))?;
        if let Chunk::At { pack, block } = chunk {
            let slot = self.device_table.as_chunks::<DEVICE_SLOT_LEN>().0.get(pack as usize);
            let device = RawDevice::decode(slot.ok_or_else(|| corrupt("a chunk is in a device that does not exist"))?);
            let len = self.size.saturating_sub(i.saturating_mul(self.unit.bytes())).min(self.unit.bytes());
            if u64::from(block) + blocks_for(len) > u64::from(device.blocks) {
                return Err(corrupt("a chunk reaches past the end of its device"));
            }
        }
        Ok(chunk)
    }
}

/// An inode with where it is.
pub(super) struct Located {
    pub raw: RawInode,
    pub kind: FileKind,
    pub at: u64,
    /// Length of the xattr body.
    pub xattrs_len: u64,
}

impl Located {
    fn xattrs_at(&self) -> u64 {
        self.at + self.raw.form.len() as u64
    }

    fn rest_at(&self) -> u64 {
        self.xattrs_at() + self.xattrs_len
    }
}

impl<'a> Image<'a> {
    /// Checks the superblock, its checksum and the device table. `bytes` is the whole image, no more and no less.
    pub fn open(bytes: &'a [u8]) -> Result<Image<'a>, ImageError> {
        let first_block = bytes.first_chunk::<{ BLOCK_SIZE as usize }>().ok_or(ImageError::NotErofs)?;
        let sb = first_block[SUPERBLOCK_AT..].first_chunk::<SUPERBLOCK_LEN>().expect("the first block holds the superblock");
        let sb = Superblock::decode(sb);
        if sb.magic != MAGIC {
            return Err(ImageError::NotErofs);
        }
        for (field, value, expected) in [
            ("feature_compat", u64::from(sb.compat), u64::from(COMPAT)),
            ("feature_incompat", u64::from(sb.incompat), u64::from(INCOMPAT)),
            ("blkszbits", u64::from(sb.block_bits), u64::from(BLOCK_BITS)),
            ("sb_extslots", u64::from(sb.ext_slots), 0),
            ("epoch", sb.epoch, 0),
            ("fixed_nsec", u64::from(sb.epoch_nsec), 0),
            ("available_compr_algs", u64::from(sb.compression), 0),
            ("dirblkbits", u64::from(sb.dir_block_bits), 0),
            ("devt_slotoff", u64::from(sb.device_slot), (DEVICE_TABLE_AT / DEVICE_SLOT_LEN) as u64),
        ] {
            if value != expected {
                return Err(ImageError::Unsupported { field, value });
            }
        }
        if sb.checksum != checksum(first_block) {
            return Err(ImageError::Checksum);
        }
        let len = u64::from(sb.blocks) * BLOCK_SIZE;
        if len != bytes.len() as u64 {
            return Err(ImageError::Truncated { what: "the file system", offset: 0, len });
        }
        let image = Image {
            bytes,
            root: Nid(u64::from(sb.root_nid)),
            inodes: sb.inodes,
            meta_at: u64::from(sb.meta_block) * BLOCK_SIZE,
            xattrs_at: u64::from(sb.xattr_block) * BLOCK_SIZE,
            device_table: &[],
        };
        let table_len = u64::from(sb.extra_devices) * DEVICE_SLOT_LEN as u64;
        let device_table = image.slice("the device table", DEVICE_TABLE_AT as u64, table_len)?;
        let image = Image { device_table, ..image };
        if image.slots().any(|slot| slot.is_none()) {
            return Err(ImageError::Corrupt { nid: image.root, what: "a device of the file system has no digest for a tag" });
        }
        Ok(image)
    }

    /// The packs, in the order of the device table; [`Chunk::At`] counts in it.
    pub fn devices(&self) -> Vec<DeviceSlot> {
        self.slots().flatten().collect()
    }

    fn slots(&self) -> impl Iterator<Item = Option<DeviceSlot>> + 'a {
        self.device_table.as_chunks::<DEVICE_SLOT_LEN>().0.iter().map(|slot| {
            let RawDevice { tag, blocks, .. } = RawDevice::decode(slot);
            let digest: Digest = std::str::from_utf8(&tag).ok()?.parse().ok()?;
            Some(DeviceSlot { digest, blocks })
        })
    }

    /// The root directory.
    pub fn root(&self) -> Nid {
        self.root
    }

    /// Number of inodes, as the superblock says.
    pub(super) fn inode_count(&self) -> u64 {
        self.inodes
    }

    /// Length of the image in bytes.
    pub(super) fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// The whole image.
    pub(super) fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// What `stat` shows of an inode.
    pub fn inode(&self, nid: Nid) -> Result<InodeView, ImageError> {
        let Located { raw, kind, .. } = self.locate(nid)?;
        let device = if matches!(kind, FileKind::Char | FileKind::Block) { decode_device(raw.union) } else { Device { major: 0, minor: 0 } };
        let RawInode { nlink, uid, gid, mtime, size, .. } = raw;
        Ok(InodeView { nid, kind, mode: raw.mode & 0o7777, nlink, uid, gid, mtime, size, device })
    }

    /// Whether in the one address space of image and packs each pack begins where what is before it ends.
    pub(super) fn packs_follow(&self) -> bool {
        let mut end = self.len() / BLOCK_SIZE;
        self.device_table.as_chunks::<DEVICE_SLOT_LEN>().0.iter().map(RawDevice::decode).all(|device| {
            let start = end;
            end += u64::from(device.blocks);
            u64::from(device.unified_block) == start
        })
    }

    /// The entry `name` (may be `.` or `..`) of a directory, or `None`. Takes logarithmic time. For who serves names one by one, as a FUSE
    /// file system over an image would; [`Image::to_tree`] does without.
    pub fn lookup(&self, dir: Nid, name: &[u8]) -> Result<Option<DirEntry<'a>>, ImageError> {
        let flat = self.directory(dir)?;
        // The first names of blocks [..low] are at most `name`, those of blocks [high..] are greater.
        let (mut low, mut high) = (0, flat.block_count());
        while low < high {
            let middle = low + (high - low) / 2;
            if DirBlock::new(dir, flat.block(middle))?.entry(0)?.name <= name { low = middle + 1 } else { high = middle }
        }
        let Some(i) = low.checked_sub(1) else { return Ok(None) };
        let block = DirBlock::new(dir, flat.block(i))?;
        let (mut low, mut high) = (0, block.count());
        while low < high {
            let middle = low + (high - low) / 2;
            let entry = block.entry(middle)?;
            match entry.name.cmp(name) {
                std::cmp::Ordering::Equal => return Ok(Some(entry)),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }

    /// The names of a directory, as [`Image::lookup`] for a file system of our own.
    pub fn read_dir(&self, dir: Nid) -> Result<ReadDir<'a>, ImageError> {
        Ok(ReadDir::new(self.names(dir)?))
    }

    /// The names of a directory with `.` and `..`.
    pub(super) fn names(&self, dir: Nid) -> Result<Names<'a>, ImageError> {
        Ok(Names::new(dir, self.directory(dir)?))
    }

    fn directory(&self, dir: Nid) -> Result<Flat<'a>, ImageError> {
        let inode = self.locate(dir)?;
        if inode.kind != FileKind::Dir {
            return Err(ImageError::NotADirectory { nid: dir });
        }
        self.flat(dir, &inode)
    }

    /// The xattrs of an inode, sorted by name.
    pub fn xattrs(&self, nid: Nid) -> Result<Vec<Xattr>, ImageError> {
        let corrupt = |what| ImageError::Corrupt { nid, what };
        let inode = self.locate(nid)?;
        let body = self.slice("xattrs", inode.xattrs_at(), inode.xattrs_len)?;
        let Some((header, mut rest)) = body.split_first_chunk::<XATTR_HEADER_LEN>() else { return Ok(Vec::new()) };
        let mut xattrs = Vec::new();
        for _ in 0..decode_xattr_header(header) {
            let (id, after) = rest.split_first_chunk::<XATTR_UNIT>().ok_or_else(|| corrupt("more shared xattrs than fit its xattrs"))?;
            let at = self.xattrs_at + u64::from(u32_at(id, 0)) * XATTR_UNIT as u64;
            xattrs.push(self.xattr(nid, at)?.0);
            rest = after;
        }
        let end = inode.rest_at();
        let mut at = end - rest.len() as u64;
        while at < end {
            let (xattr, len) = self.xattr(nid, at)?;
            at += len;
            if at > end {
                return Err(corrupt("an xattr is longer than all its xattrs"));
            }
            xattrs.push(xattr);
        }
        xattrs.sort();
        if xattrs.windows(2).any(|pair| pair[0].name == pair[1].name) {
            return Err(corrupt("an xattr is there twice"));
        }
        Ok(xattrs)
    }

    /// The xattr at byte `at` and the bytes it takes with padding.
    fn xattr(&self, nid: Nid, at: u64) -> Result<(Xattr, u64), ImageError> {
        let header = self.array::<XATTR_ENTRY_LEN>("an xattr", at)?;
        let raw = RawXattr::decode(header);
        let (name_len, value_len) = (u64::from(raw.name_len), u64::from(raw.value_len));
        let rest = self.slice("an xattr", at + XATTR_ENTRY_LEN as u64, name_len + value_len)?;
        let (name, value) = rest.split_at(usize::from(raw.name_len));
        let name = join_xattr_name(raw.name_index, name).ok_or(ImageError::Corrupt { nid, what: "an xattr has an unknown prefix or no name" })?;
        Ok((Xattr { name, value: value.to_vec() }, raw.padded_len() as u64))
    }

    /// Where the bytes of an inode are.
    pub fn data(&self, nid: Nid) -> Result<DataView<'a>, ImageError> {
        let inode = self.locate(nid)?;
        match (inode.kind, inode.raw.layout) {
            (FileKind::File, Layout::Chunked) => self.chunks(nid, &inode).map(DataView::Chunks),
            (FileKind::File | FileKind::Symlink | FileKind::Dir, _) => self.flat(nid, &inode).map(DataView::Inline),
            _ => Ok(DataView::Inline(Flat { blocks: &[], tail: &[] })),
        }
    }

    fn chunks(&self, nid: Nid, inode: &Located) -> Result<Chunks<'a>, ImageError> {
        let size = inode.raw.size;
        let unit = chunk_size(inode.raw.union).ok_or(ImageError::Corrupt { nid, what: "its chunk format is not one Slipway writes" })?;
        let at = inode.rest_at().next_multiple_of(CHUNK_INDEX_LEN as u64);
        // At most 2^48 chunks of 8 bytes.
        let indexes = self.slice("chunk indexes", at, size.div_ceil(unit.bytes()) * CHUNK_INDEX_LEN as u64)?;
        Ok(Chunks { nid, size, unit, indexes, device_table: self.device_table })
    }

    fn flat(&self, nid: Nid, inode: &Located) -> Result<Flat<'a>, ImageError> {
        let size = inode.raw.size;
        let tail_len = match inode.raw.layout {
            Layout::Plain => 0,
            Layout::Inline => size % BLOCK_SIZE,
            Layout::Chunked => return Err(ImageError::Corrupt { nid, what: "only regular files have chunks" }),
        };
        if tail_len > 0 && inode.rest_at() % BLOCK_SIZE + tail_len > BLOCK_SIZE {
            return Err(ImageError::Corrupt { nid, what: "its tail crosses a block boundary" });
        }
        let blocks = match size - tail_len {
            0 => &[],
            len => self.slice("blocks", u64::from(inode.raw.union) * BLOCK_SIZE, len)?,
        };
        Ok(Flat { blocks, tail: self.slice("an inline tail", inode.rest_at(), tail_len)? })
    }

    pub(super) fn locate(&self, nid: Nid) -> Result<Located, ImageError> {
        let corrupt = |what| ImageError::Corrupt { nid, what };
        let at = nid.0.checked_mul(NID_SLOT).and_then(|at| at.checked_add(self.meta_at)).ok_or_else(|| corrupt("its number is out of range"))?;
        let first = self.array::<COMPACT_LEN>("an inode", at)?;
        let raw = match RawInode::form(first) {
            Form::Compact => RawInode::decode_compact(first),
            Form::Extended => RawInode::decode_extended(self.array::<EXTENDED_LEN>("an inode", at)?),
        }
        .map_err(corrupt)?;
        let kind = FileKind::from_mode(raw.mode).ok_or_else(|| corrupt("its type is unknown"))?;
        let xattrs_len = xattr_body_len(raw.xattr_count).ok_or_else(|| corrupt("its xattrs are shorter than their header"))? as u64;
        if raw.mtime.nsec >= 1_000_000_000 {
            return Err(corrupt("its time has more nanoseconds than a second"));
        }
        Ok(Located { raw, kind, at, xattrs_len })
    }

    fn array<const N: usize>(&self, what: &'static str, at: u64) -> Result<&'a [u8; N], ImageError> {
        let slice = self.slice(what, at, N as u64)?;
        Ok(slice.first_chunk().expect("slice gives exactly N bytes"))
    }

    /// `len` bytes from `offset`.
    fn slice(&self, what: &'static str, offset: u64, len: u64) -> Result<&'a [u8], ImageError> {
        let range = || {
            let start = usize::try_from(offset).ok()?;
            self.bytes.get(start..start.checked_add(usize::try_from(len).ok()?)?)
        };
        range().ok_or(ImageError::Truncated { what, offset, len })
    }
}
