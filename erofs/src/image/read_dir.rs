//! Directory blocks, read.

use super::format::{DIRENT_LEN, RawDirent};
use super::reader::Flat;
use super::{DirEntry, FileKind, ImageError, Nid};

/// A block of a directory: entries, then their names.
#[derive(Clone, Copy)]
pub(super) struct DirBlock<'a> {
    dir: Nid,
    bytes: &'a [u8],
    entries: &'a [[u8; DIRENT_LEN]],
}

impl<'a> DirBlock<'a> {
    /// The first name starts where the entries end, which tells their number (at least one).
    pub fn new(dir: Nid, bytes: &'a [u8]) -> Result<DirBlock<'a>, ImageError> {
        let corrupt = |what| ImageError::Corrupt { nid: dir, what };
        let first = bytes.first_chunk::<DIRENT_LEN>().ok_or_else(|| corrupt("a directory block is too short for an entry"))?;
        let names_at = usize::from(RawDirent::decode(first).name_at);
        let entries = bytes.get(..names_at).map(|entries| entries.as_chunks::<DIRENT_LEN>());
        match entries {
            Some((entries, [])) if !entries.is_empty() => Ok(DirBlock { dir, bytes, entries }),
            _ => Err(corrupt("a directory block has its first name in a wrong place")),
        }
    }

    /// Number of entries, at least one.
    pub fn count(&self) -> usize {
        self.entries.len()
    }

    /// Entry `i`, which must be below `count`.
    pub fn entry(&self, i: usize) -> Result<DirEntry<'a>, ImageError> {
        let corrupt = |what| ImageError::Corrupt { nid: self.dir, what };
        let raw = RawDirent::decode(&self.entries[i]);
        let start = usize::from(raw.name_at);
        let name = match self.entries.get(i + 1) {
            Some(next) => self.bytes.get(start..usize::from(RawDirent::decode(next).name_at)),
            // The last name of a block ends with the block or at the first NUL.
            None => self.bytes.get(start..).and_then(|rest| rest.split(|&b| b == 0).next()),
        };
        let name = name.filter(|name| (1..=255).contains(&name.len()) && start >= size_of_val(self.entries));
        let name = name.ok_or_else(|| corrupt("a directory entry has its name in a wrong place"))?;
        let kind = FileKind::from_dirent_code(raw.kind).ok_or_else(|| corrupt("a directory entry has an unknown type"))?;
        Ok(DirEntry { name, nid: Nid(raw.nid), kind })
    }
}

/// All names of a directory with `.` and `..`, as they are stored. Ends after the first error.
#[derive(Clone)]
pub(super) struct Names<'a> {
    dir: Nid,
    flat: Flat<'a>,
    next_block: usize,
    block: Option<DirBlock<'a>>,
    next_entry: usize,
}

impl<'a> Names<'a> {
    pub fn new(dir: Nid, flat: Flat<'a>) -> Names<'a> {
        Names { dir, flat, next_block: 0, block: None, next_entry: 0 }
    }

    fn advance(&mut self) -> Result<Option<DirEntry<'a>>, ImageError> {
        loop {
            if let Some(block) = self.block.filter(|block| self.next_entry < block.count()) {
                self.next_entry += 1;
                return block.entry(self.next_entry - 1).map(Some);
            }
            if self.next_block >= self.flat.block_count() {
                return Ok(None);
            }
            self.block = Some(DirBlock::new(self.dir, self.flat.block(self.next_block))?);
            self.next_block += 1;
            self.next_entry = 0;
        }
    }
}

impl<'a> Iterator for Names<'a> {
    type Item = Result<DirEntry<'a>, ImageError>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.advance().transpose();
        if matches!(next, Some(Err(_))) {
            self.block = None;
            self.next_block = usize::MAX;
        }
        next
    }
}

/// The names of a directory in byte order, without `.` and `..`. Ends after the first error.
#[derive(Clone)]
pub struct ReadDir<'a>(Names<'a>);

impl<'a> ReadDir<'a> {
    pub(super) fn new(names: Names<'a>) -> ReadDir<'a> {
        ReadDir(names)
    }
}

impl<'a> Iterator for ReadDir<'a> {
    type Item = Result<DirEntry<'a>, ImageError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.find(|entry| !matches!(entry, Ok(DirEntry { name: b"." | b"..", .. })))
    }
}
