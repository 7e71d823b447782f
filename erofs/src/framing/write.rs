//! Items to the bytes of a framing, as they come.

use std::io::{self, Write};

use super::{END, FILE, MAGIC, MAX_CHUNKS, MAX_RANGES, MAX_RAW, Places, VERSION};
use crate::block::UnitBits;
use crate::number;

/// Writes a framing. In memory it has 64 KiB, whatever the length of the stream. The same calls give the same bytes, and so does it when
/// raw bytes come in other pieces.
#[derive(Debug)]
pub struct FramingWriter<W: Write> {
    out: W,
    /// Bytes of raw items not written yet.
    raw: Vec<u8>,
    /// Anything else before it is written.
    pending: Vec<u8>,
    /// Chunks named so far, and the one that is expected next.
    seen: u32,
    expected: u32,
}

impl<W: Write> FramingWriter<W> {
    /// A framing of files cut into chunks of this size.
    pub fn new(mut out: W, unit_bits: UnitBits) -> io::Result<FramingWriter<W>> {
        out.write_all(&MAGIC)?;
        out.write_all(&VERSION.to_le_bytes())?;
        out.write_all(&[unit_bits.bits()])?;
        Ok(FramingWriter { out, raw: Vec::with_capacity(MAX_RAW), pending: Vec::new(), seen: 0, expected: 0 })
    }

    /// The stream goes on with these bytes.
    pub fn raw(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(MAX_RAW - self.raw.len()));
            self.raw.extend_from_slice(now);
            if self.raw.len() == MAX_RAW {
                self.end_raw()?;
            }
            bytes = later;
        }
        Ok(())
    }

    /// The stream goes on with these ranges of a file, given as (first byte, length): in order, apart from each other, none of them empty.
    /// [`FramingWriter::chunk`] must follow for every chunk that they touch.
    pub fn file(&mut self, ranges: &[(u64, u64)]) -> io::Result<()> {
        debug_assert!(ranges.len() <= MAX_RANGES);
        self.end_raw()?;
        number::put(&mut self.pending, FILE);
        number::put(&mut self.pending, ranges.len() as u64);
        let mut end = 0;
        for &(start, len) in ranges {
            number::put(&mut self.pending, start - end);
            number::put(&mut self.pending, len);
            end = start + len;
        }
        self.flush()
    }

    /// The next chunk of the file: its number, or `None` for zeros.
    pub fn chunk(&mut self, id: Option<u32>) -> io::Result<()> {
        match id {
            None => number::put(&mut self.pending, 1),
            Some(id) => {
                debug_assert!(id <= self.seen);
                if id >= MAX_CHUNKS {
                    return Err(io::Error::other(format!("a layer has more than {MAX_CHUNKS} chunks")));
                }
                match i64::from(id) - i64::from(self.expected) {
                    0 => number::put(&mut self.pending, 0),
                    distance => number::put(&mut self.pending, 2 + number::unsigned(distance)),
                }
                self.seen = self.seen.max(id + 1);
                self.expected = id + 1;
            }
        }
        self.flush()
    }

    /// Ends the stream and says where the chunks are; there is a place for each that was named.
    pub fn finish(mut self, places: &Places) -> io::Result<W> {
        debug_assert_eq!(places.chunks.len(), self.seen as usize);
        self.end_raw()?;
        number::put(&mut self.pending, END);
        number::put(&mut self.pending, places.packs.len() as u64);
        for pack in &places.packs {
            self.pending.extend_from_slice(&pack.digest.0);
            number::put(&mut self.pending, pack.blocks.into());
        }
        let (mut pack, mut block) = (0, 0);
        for place in &places.chunks {
            number::put_signed(&mut self.pending, i64::from(place.pack) - pack);
            number::put_signed(&mut self.pending, i64::from(place.block) - block);
            (pack, block) = (place.pack.into(), place.block.into());
            self.flush()?;
        }
        self.out.write_all(&self.pending)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn end_raw(&mut self) -> io::Result<()> {
        if self.raw.is_empty() {
            return Ok(());
        }
        number::put(&mut self.pending, self.raw.len() as u64 + 1);
        self.out.write_all(&self.pending)?;
        self.out.write_all(&self.raw)?;
        self.pending.clear();
        self.raw.clear();
        Ok(())
    }

    /// Writes what is pending once it is worth a call.
    fn flush(&mut self) -> io::Result<()> {
        if self.pending.len() >= MAX_RAW {
            self.out.write_all(&self.pending)?;
            self.pending.clear();
        }
        Ok(())
    }
}
