//! The framing of a layer: of its tar stream everything that is not file data kept in packs. Framing and packs together give back the
//! very bytes of the tar, and so the diff ID that the layer had.
//!
//! A framing is a sequence of *items* in the order of the stream: raw bytes (headers, padding, data of tiny files and of entries that were
//! ignored, the end of the archive and what follows it), and references to file data in packs. At its end it says where the chunks are.
//! So all but the end can be written while a layer is read, when a chunk has a number but no place yet; and chunks that move later change
//! the end alone ([`Places::map`]).
//!
//! Its bytes, in this order; numbers are varints (LEB128, shortest form only), signed ones zigzag:
//!
//! - 8 magic bytes, u32 format version, u8 log2 of the unit size: chunk `i` of a file holds its bytes from `i * unit`, one unit at most;
//! - items, each a number that says what follows: `n` ≥ 2: `n - 1` raw bytes, 64 KiB at most, fewer only where no more raw bytes follow;
//!   1: a file; 0: the last item was before this;
//! - of a file, the ranges of it that the stream holds, in order (one for a file that is not sparse): their count, then for each the
//!   distance from the end of the one before and its length; then a number for every chunk that these ranges touch: 0: the chunk numbered
//!   one more than the chunk named before; 1: zeros; else 2 + how far its number (signed) is from that. Chunks are numbered in the
//!   order in which they are first named;
//! - packs, in the order in which the chunks, by their numbers, are first in them: their count, for each its digest and blocks;
//! - for every chunk, by its number: how far the number of its pack, and its first block, are from those of the one before (signed).
//!
//! Stores keep framings zstd-compressed and name them by the BLAKE3 of the uncompressed bytes. A framing needs no trust beyond that: what it
//! gives back either has the layer's diff ID or is thrown away.

mod read;
mod write;

pub use read::{FramingError, FramingReader, Step};
pub use write::FramingWriter;

use std::collections::HashMap;

use crate::digest::Digest;
use crate::meta::PackRef;

/// Ranges of one file at most: the list of them takes 1.6 MB in memory.
pub const MAX_RANGES: usize = 100_000;

/// Chunks of one framing at most: what 256 packs of 1 GiB, the most an image refers to, hold of the smallest chunks. Their places take
/// 512 MiB in memory.
pub const MAX_CHUNKS: u32 = 1 << 26;

const MAGIC: [u8; 8] = *b"SLWYFRAM";
/// Of the encoding.
const VERSION: u32 = 1;

/// Raw bytes in one item.
const MAX_RAW: usize = 64 << 10;

const END: u64 = 0;
const FILE: u64 = 1;

/// Where a chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Index into the list of packs.
    pub pack: u32,
    /// First block in the pack's uncompressed space.
    pub block: u32,
}

/// Where the chunks that a framing names are. A pack list of its own: data of a file that a later entry of the same layer replaced is
/// in packs too, while the layer tree does not name it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// The packs, in the order in which `chunks` are first in them.
    pub packs: Vec<PackRef>,
    /// Every chunk, by its number.
    pub chunks: Vec<Place>,
}

impl Places {
    /// Puts packs into first-use order, and leaves out those that no chunk is in.
    ///
    /// Panics if a chunk is in a pack that is not listed.
    pub fn new(packs: Vec<PackRef>, chunks: Vec<Place>) -> Places {
        let mut places = Places { packs: Vec::new(), chunks };
        places.map(&packs, |place| place);
        places
    }

    /// Follows chunks that moved after the layer was packed: `moved` says for a place in the packs so far which place in `packs` it is
    /// now. This is the only way chunk references of a framing change; the items before them stay as they are.
    ///
    /// Panics if `moved` gives a pack that is not listed.
    pub fn map(&mut self, packs: &[PackRef], mut moved: impl FnMut(Place) -> Place) {
        let mut number: HashMap<Digest, u32> = HashMap::new();
        self.packs.clear();
        for place in &mut self.chunks {
            let Place { pack, block } = moved(*place);
            let pack = &packs[pack as usize];
            let pack = *number.entry(pack.digest).or_insert_with(|| {
                self.packs.push(*pack);
                self.packs.len() as u32 - 1
            });
            *place = Place { pack, block };
        }
    }
}

#[cfg(test)]
mod tests;
