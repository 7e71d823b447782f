//! Views of an image: never panics, whatever the bytes are.
#![allow(clippy::todo)]

use super::{DataView, DeviceSlot, DirEntry, ImageError, InodeView, Nid};
use crate::meta::{Chunk, Xattr};
use crate::tree::Tree;

/// An image in memory.
#[derive(Clone, Debug)]
pub struct Image<'a> {
    bytes: &'a [u8],
}

/// Bytes kept in the image: whole blocks, then a tail beside the inode. Either may be empty.
#[derive(Clone, Copy, Debug)]
pub struct Flat<'a> {
    /// First part.
    pub blocks: &'a [u8],
    /// The rest.
    pub tail: &'a [u8],
}

/// Chunk indexes of a file.
#[derive(Clone, Copy, Debug)]
pub struct Chunks<'a> {
    indexes: &'a [u8],
}

impl Chunks<'_> {
    /// Chunk size.
    pub fn unit_bits(&self) -> crate::block::UnitBits {
        todo!()
    }
    /// Number of chunks.
    pub fn count(&self) -> u64 {
        self.indexes.len() as u64 / 8
    }
    /// Where chunk `i` (below `count`) is.
    pub fn get(&self, _i: u64) -> Result<Chunk, ImageError> {
        todo!()
    }
}

/// Iterator over the names of a directory, in byte order, without `.` and `..`. Ends after the first error.
pub struct ReadDir<'a> {
    flat: Flat<'a>,
}

impl<'a> Iterator for ReadDir<'a> {
    type Item = Result<DirEntry<'a>, ImageError>;
    fn next(&mut self) -> Option<Self::Item> {
        let _ = self.flat;
        todo!()
    }
}

impl<'a> Image<'a> {
    /// Checks the superblock, its checksum and the device table.
    pub fn open(bytes: &'a [u8]) -> Result<Image<'a>, ImageError> {
        Ok(Image { bytes })
    }
    /// The packs, in the order of the device table; [`Chunk::At`] counts in it.
    pub fn devices(&self) -> Vec<DeviceSlot> {
        let _ = self.bytes;
        todo!()
    }
    /// The root directory.
    pub fn root(&self) -> Nid {
        todo!()
    }
    /// What `stat` shows of an inode.
    pub fn inode(&self, _nid: Nid) -> Result<InodeView, ImageError> {
        todo!()
    }
    /// The entry `name` (may be `.` or `..`) of a directory, or `None`.
    pub fn lookup(&self, _dir: Nid, _name: &[u8]) -> Result<Option<DirEntry<'a>>, ImageError> {
        todo!()
    }
    /// The names of a directory.
    pub fn read_dir(&self, _dir: Nid) -> Result<ReadDir<'a>, ImageError> {
        todo!()
    }
    /// The xattrs of an inode, sorted by name.
    pub fn xattrs(&self, _nid: Nid) -> Result<Vec<Xattr>, ImageError> {
        todo!()
    }
    /// Where the bytes of an inode are.
    pub fn data(&self, _nid: Nid) -> Result<DataView<'a>, ImageError> {
        todo!()
    }
    /// The tree this image was written from, with everything in it verified. Inodes are numbered depth first by name.
    pub fn to_tree(&self) -> Result<Tree, ImageError> {
        todo!()
    }
}
