//! One verified pass over all names of an image, depth first, bounded by the image's length; and the tree it amounts to.

use std::collections::{BTreeMap, HashMap};

use super::checked::{Checked, XATTR_TOTAL_MAX};
use super::format::{CHUNK_INDEX_LEN, Layout, NID_SLOT, chunk_size};
use super::read_dir::Names;
use super::reader::{Image, Located};
use super::{DataView, FileKind, ImageError, InodeView, Nid};
use crate::block::UnitBits;
use crate::meta::{Attr, Chunk, Content, Data, PackRef, Xattr};
use crate::tree::{Body, Inode, InodeIndex, Tree};

/// A name in the image.
pub(super) struct Visit<'a> {
    /// How many names above it: 0 is the root.
    pub depth: usize,
    /// Its directory, by order of first visit; the root is its own.
    pub parent: InodeIndex,
    /// Empty for the root.
    pub name: &'a [u8],
    pub inode: InodeView,
    /// The inode by order of first visit.
    pub index: InodeIndex,
    /// The inode has not been seen before.
    pub first: bool,
    /// Its xattrs, at the first visit.
    pub xattrs: Vec<Xattr>,
}

/// The pass. Verifies directories: order, `.` and `..`, one name for each directory, types. Ends after the first error.
pub(super) struct Walk<'a> {
    image: Image<'a>,
    stack: Vec<Frame<'a>>,
    seen: HashMap<Nid, InodeIndex>,
    /// Bytes that inodes not yet visited may still have. In our images no byte belongs to two inodes, so all together have no more than
    /// the image: without this a small image could describe petabytes by having every inode claim the same blocks.
    budget: u64,
    /// Bytes of xattrs, shared ones counted each time, that inodes not yet visited may still have.
    xattr_budget: u64,
    started: bool,
}

/// A directory being passed over.
struct Frame<'a> {
    nid: Nid,
    index: InodeIndex,
    parent: Nid,
    names: Names<'a>,
    last: Option<&'a [u8]>,
    /// `.` and `..` still to come.
    dots: u8,
}

impl<'a> Walk<'a> {
    pub fn new(image: Image<'a>) -> Walk<'a> {
        Walk { image, stack: Vec::new(), seen: HashMap::new(), budget: image.len(), xattr_budget: XATTR_TOTAL_MAX, started: false }
    }

    fn advance(&mut self) -> Result<Option<Visit<'a>>, ImageError> {
        if !std::mem::replace(&mut self.started, true) {
            let root = self.image.root();
            let visit = self.visit(root, b"", InodeIndex(0), root)?;
            if visit.inode.kind != FileKind::Dir {
                return Err(ImageError::NotADirectory { nid: root });
            }
            return Ok(Some(visit));
        }
        while let Some(frame) = self.stack.last_mut() {
            let corrupt = |what| Err(ImageError::Corrupt { nid: frame.nid, what });
            let Some(entry) = frame.names.next() else {
                if frame.dots > 0 {
                    return corrupt("the directory lacks . or ..");
                }
                self.stack.pop();
                continue;
            };
            let entry = entry?;
            if frame.last.is_some_and(|last| last >= entry.name) {
                return corrupt("the directory is not sorted");
            }
            frame.last = Some(entry.name);
            let expected = match entry.name {
                b"." => frame.nid,
                b".." => frame.parent,
                name => {
                    let (dir, parent) = (frame.nid, frame.index);
                    let visit = self.visit(entry.nid, name, parent, dir)?;
                    if visit.inode.kind != entry.kind {
                        return Err(ImageError::Corrupt { nid: entry.nid, what: "its directory says another type than itself" });
                    }
                    return Ok(Some(visit));
                }
            };
            if entry.nid != expected || entry.kind != FileKind::Dir {
                return corrupt("the directory has a wrong . or ..");
            }
            frame.dots -= 1;
        }
        Ok(None)
    }

    /// A name for `nid` in directory `parent` (number `dir`); descends if it is a directory.
    fn visit(&mut self, nid: Nid, name: &'a [u8], parent: InodeIndex, dir: Nid) -> Result<Visit<'a>, ImageError> {
        let corrupt = |what| Err(ImageError::Corrupt { nid, what });
        let inode = self.image.inode(nid)?;
        let depth = self.stack.len();
        if let Some(&index) = self.seen.get(&nid) {
            if inode.kind == FileKind::Dir {
                return corrupt("a directory has a second name");
            }
            return Ok(Visit { depth, parent, name, inode, index, first: false, xattrs: Vec::new() });
        }
        match self.budget.checked_sub(claimed(&self.image.locate(nid)?)) {
            Some(budget) => self.budget = budget,
            None => return corrupt("it claims bytes that belong to other inodes"),
        }
        let xattrs = self.image.xattrs(nid)?;
        match self.xattr_budget.checked_sub(xattrs.iter().map(|x| (x.name.len() + x.value.len()) as u64).sum()) {
            Some(budget) => self.xattr_budget = budget,
            None => return corrupt("xattrs of the image up to it exceed 256 MiB"),
        }
        // An inode takes 32 bytes, and no image has 2^32 blocks.
        let index = InodeIndex(self.seen.len() as u32);
        self.seen.insert(nid, index);
        if inode.kind == FileKind::Dir {
            self.stack.push(Frame { nid, index, parent: dir, names: self.image.names(nid)?, last: None, dots: 2 });
        }
        Ok(Visit { depth, parent, name, inode, index, first: true, xattrs })
    }
}

impl<'a> Iterator for Walk<'a> {
    type Item = Result<Visit<'a>, ImageError>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.advance().transpose();
        if matches!(next, Some(Err(_))) {
            self.stack.clear();
        }
        next
    }
}

/// Bytes of the image that an inode says are its own.
fn claimed(inode: &Located) -> u64 {
    let data = match (inode.kind, inode.raw.layout) {
        (FileKind::File, Layout::Chunked) => {
            chunk_size(inode.raw.union).map_or(0, |unit| inode.raw.size.div_ceil(unit.bytes()) * CHUNK_INDEX_LEN as u64)
        }
        (FileKind::File | FileKind::Dir | FileKind::Symlink, _) => inode.raw.size,
        _ => 0,
    };
    NID_SLOT.saturating_add(inode.xattrs_len).saturating_add(data)
}

impl Image<'_> {
    /// The tree this image was written from, with everything in it verified: it obeys every rule of [`Checked`], link counts and the number
    /// of inodes are right, and packs follow the image. (Times, names and bytes are what they are; who needs them authentic compares the
    /// image's digest.) Inodes are numbered depth first by name.
    pub fn to_tree(&self) -> Result<Tree, ImageError> {
        let mut builder = Builder { image: *self, inodes: Vec::new(), links: Vec::new(), units: vec![None; self.devices().len()] };
        for visit in Walk::new(*self) {
            builder.add(visit?)?;
        }
        builder.finish()
    }
}

/// A tree being put together from visits.
struct Builder<'a> {
    image: Image<'a>,
    inodes: Vec<Inode>,
    /// Of each inode: its number, the link count it claims, and that seen so far.
    links: Vec<(Nid, u32, u32)>,
    /// Unit size of each pack, known once a chunk is seen in it.
    units: Vec<Option<UnitBits>>,
}

impl Builder<'_> {
    fn add(&mut self, visit: Visit<'_>) -> Result<(), ImageError> {
        let is_dir = visit.inode.kind == FileKind::Dir;
        if visit.first {
            let inode = self.inode(&visit.inode, visit.xattrs)?;
            self.inodes.push(inode);
            self.links.push((visit.inode.nid, visit.inode.nlink, if is_dir { 2 } else { 0 }));
        }
        if visit.depth == 0 {
            return Ok(());
        }
        let counted = if is_dir { visit.parent } else { visit.index };
        self.links[counted.0 as usize].2 += 1;
        let Body::Dir(children) = &mut self.inodes[visit.parent.0 as usize].body else { unreachable!("only directories are descended into") };
        children.insert(visit.name.to_vec(), visit.index);
        Ok(())
    }

    fn inode(&mut self, view: &InodeView, xattrs: Vec<Xattr>) -> Result<Inode, ImageError> {
        let nid = view.nid;
        let body = match view.kind {
            FileKind::Dir => Body::Dir(BTreeMap::new()),
            FileKind::File => Body::Content(Content::File(self.data(nid, view.size)?)),
            FileKind::Symlink => match self.image.data(nid)? {
                DataView::Inline(flat) => Body::Content(Content::Symlink(flat.to_vec())),
                DataView::Chunks(_) => return Err(ImageError::Corrupt { nid, what: "only regular files have chunks" }),
            },
            FileKind::Char => Body::Content(Content::Char(view.device)),
            FileKind::Block => Body::Content(Content::Block(view.device)),
            FileKind::Fifo => Body::Content(Content::Fifo),
            FileKind::Socket => Body::Content(Content::Socket),
        };
        Ok(Inode { attr: Attr { mode: view.mode, uid: view.uid, gid: view.gid, mtime: view.mtime, xattrs }, body })
    }

    fn data(&mut self, nid: Nid, size: u64) -> Result<Data, ImageError> {
        let list = match self.image.data(nid)? {
            DataView::Inline(flat) => return Ok(Data::Inline(flat.to_vec())),
            DataView::Chunks(list) => list,
        };
        let unit_bits = list.unit_bits();
        let chunks = (0..list.count()).map(|i| list.get(i)).collect::<Result<Vec<_>, _>>()?;
        for chunk in &chunks {
            if let Chunk::At { pack, .. } = chunk {
                // Checked refuses files that do not agree on a pack's unit size.
                self.units[*pack as usize].get_or_insert(unit_bits);
            }
        }
        Ok(Data::Chunked { size, unit_bits, chunks })
    }

    fn finish(self) -> Result<Tree, ImageError> {
        for &(nid, claimed, counted) in &self.links {
            if claimed != counted {
                return Err(ImageError::Corrupt { nid, what: "its link count is not the number of its names" });
            }
        }
        let corrupt = |what| Err(ImageError::Corrupt { nid: self.image.root(), what });
        if self.inodes.len() as u64 != self.image.inode_count() {
            return corrupt("the inodes reached from it are not as many as the superblock says");
        }
        if !self.image.packs_follow() {
            return corrupt("a device of the file system does not begin where the one before it ends");
        }
        let devices = self.image.devices();
        // A pack without chunks has no unit size; Checked refuses it.
        let packs = devices.iter().zip(&self.units).map(|(slot, unit)| PackRef {
            digest: slot.digest,
            blocks: slot.blocks,
            unit_bits: unit.unwrap_or_default(),
        });
        let tree = Tree { packs: packs.collect(), inodes: self.inodes };
        Checked::new(tree).map(Checked::into_tree).map_err(ImageError::Tree)
    }
}
