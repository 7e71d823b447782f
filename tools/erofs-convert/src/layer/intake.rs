//! A tar stream as a sequence of entries and their data; all but the data that goes to packs is written to the layer's framing.

use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use erofs::block::UnitBits;
use erofs::framing::{FramingWriter, MAX_RANGES};
use tar_core::parse::{Limits, ParseEvent, Parser};
use tar_core::{HEADER_SIZE, Header};

use super::header::{Member, Refusal, member};
use super::{Budget, ConvertError};

/// Bytes asked of the reader at once: large enough that a system call or a decompressor's round costs nothing beside the bytes, small
/// enough to stay in the second-level cache until they are copied on.
const READ_SIZE: usize = 128 << 10;

/// What precedes one entry at most: Go's bound for a PAX header or long name (`maxSpecialFileSize`), enough for several extended
/// attributes of the kernel's 64 KiB.
const MAX_HEADERS: u32 = 1 << 20;

/// A tar stream being read, with a buffer of at least [`READ_SIZE`] and what one entry's headers need.
pub(super) struct Archive<R, W: Write> {
    reader: R,
    /// Gets everything that is read, but for [`Archive::read`].
    framing: FramingWriter<W>,
    parser: Parser,
    buffer: Vec<u8>,
    /// What of the buffer is read from the stream and not used yet.
    unread: std::ops::Range<usize>,
    /// Offset in the stream of the first unread byte.
    offset: u64,
    /// Data of the current entry not taken yet, and the padding after it.
    data_left: u64,
    padding: u64,
    /// Path of the current entry and where its headers begin, for errors.
    path: Vec<u8>,
    entry_offset: u64,
    /// What is left of the budgets for reading, and the budgets.
    stream_left: u64,
    stream: u64,
    start: Instant,
    time: Duration,
}

impl<R: Read, W: Write> Archive<R, W> {
    pub fn new(reader: R, framing: W, unit_bits: UnitBits, budget: &Budget) -> Result<Archive<R, W>, ConvertError> {
        let limits = Limits {
            max_metadata_size: MAX_HEADERS,
            // Paths are measured where they are put together.
            max_path_len: None,
            max_pending_entries: 16,
            max_sparse_entries: MAX_RANGES,
        };
        let mut parser = Parser::new(limits);
        // Empty paths and odd PAX values have a meaning in Go; `header` gives them that or refuses them.
        parser.set_allow_empty_path(true);
        parser.set_ignore_pax_errors(true);
        Ok(Archive {
            reader,
            framing: FramingWriter::new(framing, unit_bits).map_err(not_written)?,
            parser,
            buffer: vec![0; READ_SIZE],
            unread: 0..0,
            offset: 0,
            data_left: 0,
            padding: 0,
            path: Vec::new(),
            entry_offset: 0,
            stream_left: budget.stream,
            stream: budget.stream,
            start: Instant::now(),
            time: budget.time,
        })
    }

    /// The next entry, skipping what was not taken of the one before. `None` at the end of the archive.
    pub fn next(&mut self) -> Result<Option<Member>, ConvertError> {
        let (rest, padding) = (std::mem::take(&mut self.data_left), std::mem::take(&mut self.padding));
        if self.skip(rest)? > 0 {
            return Err(self.malformed("the archive breaks off in its data"));
        }
        // Without all of its padding the last entry is complete, as in Go.
        self.skip(padding)?;
        self.path.clear();
        loop {
            self.entry_offset = self.offset;
            if self.at_end()? {
                return Ok(None);
            }
            let input = &self.buffer[self.unread.clone()];
            if let Some(block) = input.first_chunk() {
                // The name to call it by if it turns out to be unreadable.
                self.path.clear();
                self.path.extend_from_slice(Header::from_bytes(block).path_bytes());
            }
            let (consumed, sparse) = match self.parser.parse(input) {
                Ok(ParseEvent::NeedData { min_bytes }) => {
                    if self.fill(min_bytes)? < min_bytes {
                        return Err(self.malformed("the archive breaks off in its headers"));
                    }
                    continue;
                }
                Ok(ParseEvent::Entry { consumed, .. }) => (consumed, None),
                Ok(ParseEvent::SparseEntry { consumed, sparse_map, real_size, .. }) => (consumed, Some((sparse_map, real_size))),
                // containerd ignores them (createTarFile, TypeXGlobalHeader).
                Ok(ParseEvent::GlobalExtensions { consumed, .. }) => {
                    self.advance(consumed)?;
                    continue;
                }
                Ok(ParseEvent::End { .. }) => return Ok(None),
                Err(error) => {
                    let rule = error.to_string();
                    return Err(self.malformed(rule));
                }
            };
            let found = member(&input[..consumed], sparse);
            self.advance(consumed)?;
            let found = found.map_err(|refusal| self.refused(refusal))?;
            self.path.clone_from(&found.path);
            self.data_left = found.data_len;
            self.padding = found.data_len.wrapping_neg() % HEADER_SIZE as u64;
            return Ok(Some(found));
        }
    }

    /// Says which ranges of a file the data about to be read holds; [`Archive::chunk`] must follow for every chunk that they touch.
    pub fn file(&mut self, ranges: &[(u64, u64)]) -> Result<(), ConvertError> {
        self.framing.file(ranges).map_err(not_written)
    }

    /// Says which chunk the data read just now is in; `None`: it is zeros.
    pub fn chunk(&mut self, id: Option<u32>) -> Result<(), ConvertError> {
        self.framing.chunk(id).map_err(not_written)
    }

    /// Fills `out` as [`Archive::read`] does, for data that goes to no pack.
    pub fn read_raw(&mut self, out: &mut [u8]) -> Result<(), ConvertError> {
        self.read(out)?;
        self.framing.raw(out).map_err(not_written)
    }

    /// Fills `out` from the current entry's data, which has that much left.
    pub fn read(&mut self, out: &mut [u8]) -> Result<(), ConvertError> {
        debug_assert!(out.len() as u64 <= self.data_left);
        self.data_left -= out.len() as u64;
        let from_buffer = out.len().min(self.unread.len());
        out[..from_buffer].copy_from_slice(&self.buffer[self.unread.start..][..from_buffer]);
        self.unread.start += from_buffer;
        self.offset += from_buffer as u64;
        // What is not buffered yet goes straight to where it is wanted.
        let mut rest = &mut out[from_buffer..];
        while !rest.is_empty() {
            match self.reader.read(rest) {
                Ok(0) => return Err(self.malformed("the archive breaks off in its data")),
                Ok(len) => {
                    self.offset += len as u64;
                    rest = &mut rest[len..];
                    self.came(len)?;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => (),
                Err(source) => return Err(ConvertError::Read { offset: self.offset, source }),
            }
        }
        Ok(())
    }

    /// Reads on to the end of the stream, whatever follows the archive: a reader that verifies a digest does so at its end. Gives the framing, of which
    /// only the places of the chunks are missing.
    pub fn drain(mut self) -> Result<FramingWriter<W>, ConvertError> {
        loop {
            self.advance(self.unread.len())?;
            if self.fill(1)? == 0 {
                return Ok(self.framing);
            }
        }
    }

    /// An error about the current entry.
    pub fn malformed(&self, rule: impl Into<std::borrow::Cow<'static, str>>) -> ConvertError {
        self.refused(Refusal::Malformed(rule.into()))
    }

    /// An error about the current entry.
    pub fn refused(&self, refusal: Refusal) -> ConvertError {
        let (path, offset) = (self.path.escape_ascii().to_string(), self.entry_offset);
        match refusal {
            Refusal::Malformed(rule) => ConvertError::Malformed { path, offset, rule },
            Refusal::Unsupported(what) => ConvertError::Unsupported { path, offset, what },
        }
    }

    /// A budget passed at the current entry.
    pub fn over_budget(&self, what: &'static str, limit: u64) -> ConvertError {
        ConvertError::Budget { path: self.path.escape_ascii().to_string(), offset: self.entry_offset, what, limit }
    }

    /// Whether the stream or the archive ends here. Two blocks of zeros end an archive, and so does the end of the stream.
    fn at_end(&mut self) -> Result<bool, ConvertError> {
        if self.fill(HEADER_SIZE)? == 0 {
            return Ok(true);
        }
        let zeros = |bytes: &[u8]| bytes.iter().all(|&b| b == 0);
        if self.unread.len() < HEADER_SIZE || !zeros(&self.buffer[self.unread.start..][..HEADER_SIZE]) {
            return Ok(false);
        }
        let len = self.fill(2 * HEADER_SIZE)?.min(2 * HEADER_SIZE);
        if zeros(&self.buffer[self.unread.start..][..len]) {
            return Ok(true);
        }
        // GNU tar and libarchive read on after one block of zeros, Go refuses.
        Err(self.malformed("a lone block of zeros stands before an entry"))
    }

    /// Has at least `wanted` unread bytes in the buffer, unless the stream ends before; gives how many there are.
    fn fill(&mut self, wanted: usize) -> Result<usize, ConvertError> {
        if self.unread.len() >= wanted {
            return Ok(self.unread.len());
        }
        self.buffer.copy_within(self.unread.clone(), 0);
        self.unread = 0..self.unread.len();
        if wanted > self.buffer.len() {
            // Twice, so that headers that turn out longer and longer are not parsed again for every few bytes.
            self.buffer.resize(2 * wanted, 0);
        }
        while self.unread.len() < wanted {
            match self.reader.read(&mut self.buffer[self.unread.end..]) {
                Ok(0) => break,
                Ok(len) => {
                    self.unread.end += len;
                    self.came(len)?;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => (),
                Err(source) => return Err(ConvertError::Read { offset: self.offset + self.unread.len() as u64, source }),
            }
        }
        Ok(self.unread.len())
    }

    /// Counts what the reader gave and looks at the clock.
    fn came(&mut self, len: usize) -> Result<(), ConvertError> {
        let left = self.stream_left.checked_sub(len as u64);
        self.stream_left = left.ok_or_else(|| self.over_budget("bytes of tar", self.stream))?;
        if self.start.elapsed() > self.time { Err(self.over_budget("seconds to convert", self.time.as_secs())) } else { Ok(()) }
    }

    /// Passes over so many of the buffered bytes.
    fn advance(&mut self, len: usize) -> Result<(), ConvertError> {
        self.framing.raw(&self.buffer[self.unread.start..][..len]).map_err(not_written)?;
        self.unread.start += len;
        self.offset += len as u64;
        Ok(())
    }

    /// Passes over so many bytes; gives how many of them the stream lacks.
    fn skip(&mut self, mut len: u64) -> Result<u64, ConvertError> {
        loop {
            let step = len.min(self.unread.len() as u64);
            self.advance(step as usize)?;
            len -= step;
            if len == 0 || self.fill(1)? == 0 {
                return Ok(len);
            }
        }
    }
}

fn not_written(source: std::io::Error) -> ConvertError {
    ConvertError::Store { source }
}
