//! The bytes of a framing to what they say, front to back.

use std::collections::HashSet;
use std::io::{self, BufRead, Read};

use super::{END, FILE, MAGIC, MAX_CHUNKS, MAX_RANGES, MAX_RAW, Place, Places, VERSION};
use crate::block::UnitBits;
use crate::digest::Digest;
use crate::meta::PackRef;
use crate::number::{self, NO_NUMBER};

/// Bytes that are no framing, or cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum FramingError {
    /// Not a framing at all, or one of a newer format.
    #[error("not a framing this version of Slipway reads; upgrade Slipway or convert the layer again")]
    UnknownFormat,
    /// The bytes break off or break a rule of the encoding.
    #[error("framing is damaged at byte {offset}: {rule}; convert the layer again")]
    Malformed {
        /// Where in the uncompressed framing.
        offset: u64,
        /// The rule.
        rule: &'static str,
    },
    /// The reader failed.
    #[error("cannot read the framing")]
    Read(#[from] io::Error),
}

/// What comes next in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// These bytes.
    Raw(&'a [u8]),
    /// `len` bytes, from byte `from`, of the chunk with this number, or as many zeros.
    Data {
        /// Index into [`Places::chunks`]; `None`: zeros.
        chunk: Option<u32>,
        /// First byte in the chunk.
        from: u32,
        /// Number of bytes; with `from` a unit at most.
        len: u32,
    },
}

/// Reads a framing. Takes any bytes without panicking; in memory it has 64 KiB, at most 1.6 MB for the ranges of one file, and at the end
/// the packs and places in proportion to their bytes, for at most [`MAX_CHUNKS`].
#[derive(Debug)]
pub struct FramingReader<R> {
    input: R,
    /// Bytes read so far.
    offset: u64,
    unit_bits: UnitBits,
    raw: Vec<u8>,
    /// Raw bytes must not go on after a raw item that was not full.
    raw_ended: bool,
    /// Chunks named so far, and the one that is expected next.
    seen: u32,
    expected: u32,
    /// What is left of the current file: first and last (exclusive) byte of its ranges, the next one last.
    ranges: Vec<(u64, u64)>,
    /// The chunk of the file that was named last, and what it is.
    chunk: (u64, Option<u32>),
    /// All items were read.
    ended: bool,
}

/// No chunk of a file: more than the longest file has.
const NO_CHUNK: u64 = u64::MAX;

impl<R: BufRead> FramingReader<R> {
    /// Reads the beginning.
    pub fn new(mut input: R) -> Result<FramingReader<R>, FramingError> {
        let mut head = [0; MAGIC.len() + 5];
        let read = input.read_exact(&mut head);
        let known = head.strip_prefix(&MAGIC).and_then(|rest| rest.strip_prefix(&VERSION.to_le_bytes()));
        let unit_bits = match (read, known) {
            (Err(error), _) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(error.into()),
            (Ok(()), Some(&[bits])) => UnitBits::new(bits).ok_or(FramingError::Malformed { offset: 12, rule: "there is no such unit size" })?,
            _ => return Err(FramingError::UnknownFormat),
        };
        Ok(FramingReader {
            input,
            offset: head.len() as u64,
            unit_bits,
            raw: Vec::new(),
            raw_ended: false,
            seen: 0,
            expected: 0,
            ranges: Vec::new(),
            chunk: (NO_CHUNK, None),
            ended: false,
        })
    }

    /// Size of the chunks, and of the units they are in.
    pub fn unit_bits(&self) -> UnitBits {
        self.unit_bits
    }

    /// What comes next; `None` at the end of the stream.
    #[allow(clippy::should_implement_trait, reason = "an iterator cannot lend its buffer")]
    pub fn next(&mut self) -> Result<Option<Step<'_>>, FramingError> {
        while self.ranges.is_empty() && !self.ended {
            match self.number()? {
                END => self.ended = true,
                FILE => self.file()?,
                len => {
                    self.raw(len - 1)?;
                    return Ok(Some(Step::Raw(&self.raw)));
                }
            }
        }
        if self.ranges.is_empty() { Ok(None) } else { self.data().map(Some) }
    }

    /// Where the chunks are; what is left of the stream before that is passed over.
    pub fn places(mut self) -> Result<Places, FramingError> {
        while self.next()?.is_some() {}
        let mut packs: Vec<PackRef> = Vec::new();
        let mut names = HashSet::new();
        let count = self.number()?;
        // Every pack is of use to some chunk: so what is kept of the list is not more than what came before it accounts for.
        if count > u64::from(self.seen) {
            return Err(self.malformed("a pack is listed that no chunk is in"));
        }
        for _ in 0..count {
            let digest = Digest(self.array()?);
            let blocks = u32::try_from(self.number()?).map_err(|_| self.malformed("a pack is too long"))?;
            if !names.insert(digest) {
                return Err(self.malformed("a pack is listed twice"));
            }
            packs.push(PackRef { digest, blocks, unit_bits: self.unit_bits });
        }
        let mut chunks: Vec<Place> = Vec::new();
        let (mut used, mut last) = (0, Place { pack: 0, block: 0 });
        for _ in 0..self.seen {
            let pack =
                self.signed(last.pack)?.filter(|pack| *pack <= used).ok_or_else(|| self.malformed("a pack is not listed in order of first use"))?;
            let Some(of) = packs.get(pack as usize) else { return Err(self.malformed("a chunk is in a pack that is not listed")) };
            let block = self.signed(last.block)?.filter(|block| *block < of.blocks).ok_or_else(|| self.malformed("a chunk lies outside its pack"))?;
            used = used.max(pack + 1);
            last = Place { pack, block };
            chunks.push(last);
        }
        if used as usize != packs.len() {
            return Err(self.malformed("a pack is listed that no chunk is in"));
        }
        if self.input.fill_buf()?.is_empty() { Ok(Places { packs, chunks }) } else { Err(self.malformed("something follows the last chunk")) }
    }

    fn raw(&mut self, len: u64) -> Result<(), FramingError> {
        if len > MAX_RAW as u64 || self.raw_ended {
            return Err(self.malformed("raw bytes are cut where they are not cut"));
        }
        self.raw_ended = len < MAX_RAW as u64;
        self.raw.clear();
        let read = (&mut self.input).take(len).read_to_end(&mut self.raw)?;
        self.offset += read as u64;
        if (read as u64) < len { Err(self.malformed("it breaks off in raw bytes")) } else { Ok(()) }
    }

    /// Begins a file.
    fn file(&mut self) -> Result<(), FramingError> {
        let count = self.number()?;
        if count == 0 || count > MAX_RANGES as u64 {
            return Err(self.malformed("a file has no ranges or too many"));
        }
        let mut end = 0u64;
        for index in 0..count {
            let (gap, len) = (self.number()?, self.number()?);
            let start = end.checked_add(gap).filter(|_| index == 0 || gap > 0);
            let range = start.and_then(|start| Some((start, start.checked_add(len)?))).filter(|_| len > 0);
            let Some(range) = range else { return Err(self.malformed("a range of a file is empty, touches the one before or is out of range")) };
            self.ranges.push(range);
            end = range.1;
        }
        self.ranges.reverse();
        self.raw_ended = false;
        self.chunk = (NO_CHUNK, None);
        Ok(())
    }

    /// The next piece of the current file.
    fn data(&mut self) -> Result<Step<'static>, FramingError> {
        let unit = self.unit_bits.bytes();
        let Some(&(start, end)) = self.ranges.last() else { return Err(self.malformed("a file has no ranges or too many")) };
        let index = start / unit;
        if self.chunk.0 != index {
            self.chunk = (index, self.chunk_number()?);
        }
        let from = start % unit;
        let len = (end - start).min(unit - from);
        match self.ranges.last_mut() {
            Some(range) if start + len < end => range.0 += len,
            _ => _ = self.ranges.pop(),
        }
        Ok(Step::Data { chunk: self.chunk.1, from: from as u32, len: len as u32 })
    }

    fn chunk_number(&mut self) -> Result<Option<u32>, FramingError> {
        let distance = match self.number()? {
            0 => 0,
            1 => return Ok(None),
            2 => return Err(self.malformed("a chunk number is not in its shortest form")),
            code => number::signed(code - 2),
        };
        let id = i64::from(self.expected).checked_add(distance).and_then(|id| u32::try_from(id).ok());
        let Some(id) = id.filter(|id| *id <= self.seen && *id < MAX_CHUNKS) else { return Err(self.malformed("a chunk number is out of order")) };
        self.seen = self.seen.max(id + 1);
        self.expected = id + 1;
        Ok(Some(id))
    }

    fn malformed(&self, rule: &'static str) -> FramingError {
        FramingError::Malformed { offset: self.offset, rule }
    }

    fn number(&mut self) -> Result<u64, FramingError> {
        let mut byte = || self.array().map(|[byte]| byte);
        match number::read(&mut byte)? {
            Some(number) => Ok(number),
            None => Err(self.malformed(NO_NUMBER)),
        }
    }

    /// A number said as its distance from `last`; `None` if it is none of 32 bits.
    fn signed(&mut self, last: u32) -> Result<Option<u32>, FramingError> {
        let distance = self.number().map(number::signed)?;
        Ok(i64::from(last).checked_add(distance).and_then(|value| u32::try_from(value).ok()))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], FramingError> {
        let mut bytes = [0; N];
        match self.input.read_exact(&mut bytes) {
            Ok(()) => {
                self.offset += N as u64;
                Ok(bytes)
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(self.malformed("it breaks off")),
            Err(error) => Err(error.into()),
        }
    }
}
