//! One unit: compressed for the pack, decompressed and verified for a reader.

use std::cell::RefCell;

use zstd::bulk::{Compressor, Decompressor};

use super::table::{Codec, UnitEntry};
use crate::block::{BLOCK_SIZE, blocks_for};
use crate::digest::Digest;

/// A unit ready to be written to a pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedUnit {
    /// What is stored.
    pub stored: Vec<u8>,
    /// How it is stored.
    pub codec: Codec,
    /// BLAKE3 of the uncompressed unit.
    pub digest: Digest,
    /// Uncompressed length in blocks.
    pub blocks: u32,
}

/// A stored unit does not decode to the bytes the unit table promises: the pack file is damaged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Wrong number of bytes handed in, or the frame does not decode to the unit's length.
    #[error("unit {digest} does not decode to {len} bytes; the pack is damaged")]
    Undecodable {
        /// What the unit should hash to.
        digest: Digest,
        /// Uncompressed length expected.
        len: usize,
    },
    /// It decodes, to other bytes.
    #[error("unit {digest} decodes to bytes with BLAKE3 {found}; the pack is damaged")]
    Mismatch {
        /// What the unit should hash to.
        digest: Digest,
        /// What it hashes to.
        found: Digest,
    },
}

/// A compressor with its working memory, for threads that encode many units.
pub struct UnitEncoder {
    zstd: Compressor<'static>,
    /// Where zstd writes: zeroed once rather than for every unit.
    out: Vec<u8>,
}

impl UnitEncoder {
    /// An encoder at this zstd level.
    pub fn new(level: i32) -> UnitEncoder {
        UnitEncoder { zstd: Compressor::new(level).expect("zstd takes any level and only fails without memory"), out: Vec::new() }
    }

    /// Compresses a unit whose BLAKE3 is already known (a whole chunk is a unit, so whoever looked for duplicates has hashed it).
    /// `data` is a whole number of blocks, not empty. The unit is stored raw when zstd saves no block: units start on block boundaries,
    /// so anything less would cost every reader a decompression for nothing. Then its bytes are taken out of `data`, which is left alone otherwise.
    pub fn encode(&mut self, data: &mut Vec<u8>, digest: Digest) -> EncodedUnit {
        debug_assert!(!data.is_empty() && (data.len() as u64).is_multiple_of(BLOCK_SIZE));
        let blocks = (data.len() as u64 / BLOCK_SIZE) as u32;
        // A destination one block short makes zstd give up by itself on what would be stored raw.
        let room = data.len() - BLOCK_SIZE as usize;
        if self.out.len() < room {
            self.out.resize(room, 0);
        }
        match self.zstd.compress_to_buffer(&data[..], &mut self.out[..room]) {
            Ok(len) if blocks_for(len as u64) < u64::from(blocks) => {
                EncodedUnit { stored: self.out[..len].to_vec(), codec: Codec::Zstd, digest, blocks }
            }
            _ => EncodedUnit { stored: std::mem::take(data), codec: Codec::Raw, digest, blocks },
        }
    }
}

/// Compresses one unit; who has many keeps a [`UnitEncoder`]. `data` is a whole number of blocks (zero-padded by the caller), not empty; `level` is zstd's. The unit is stored
/// raw when zstd saves no block.
pub fn encode_unit(data: &[u8], level: i32) -> EncodedUnit {
    UnitEncoder::new(level).encode(&mut data.to_vec(), Digest::of(data))
}

thread_local! {
    /// zstd's working memory (about 100 KiB): allocating it for every unit would cost as much as decoding a small one.
    static DECODER: RefCell<Decompressor<'static>> = RefCell::new(Decompressor::new().expect("zstd only fails without memory"));
}

/// Decompresses `stored` (exactly the bytes that `entry` locates) into `out`, whose length is that of the uncompressed unit, and
/// verifies it (invariant 5). On an error the content of `out` is unspecified and must not be used.
pub fn decode_unit(entry: &UnitEntry, stored: &[u8], out: &mut [u8]) -> Result<(), UnitError> {
    let undecodable = UnitError::Undecodable { digest: entry.digest, len: out.len() };
    if stored.len() != entry.stored_len as usize {
        return Err(undecodable);
    }
    match entry.codec {
        Codec::Raw if stored.len() != out.len() => return Err(undecodable),
        Codec::Raw => out.copy_from_slice(stored),
        Codec::Zstd => {
            let len = DECODER.with_borrow_mut(|zstd| zstd.decompress_to_buffer(stored, &mut out[..]));
            if len.ok() != Some(out.len()) {
                return Err(undecodable);
            }
        }
    }
    let found = Digest::of(out);
    if found == entry.digest { Ok(()) } else { Err(UnitError::Mismatch { digest: entry.digest, found }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(unit: &EncodedUnit) -> UnitEntry {
        UnitEntry { offset: 0, stored_len: unit.stored.len() as u32, codec: unit.codec, digest: unit.digest }
    }

    /// Bytes that do not compress, the same on every run.
    fn noise(len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        blake3::Hasher::new().finalize_xof().fill(&mut out);
        out
    }

    #[test]
    fn units_are_compressed_when_that_saves_a_block() {
        let check = |data: Vec<u8>, expected: Codec| {
            let unit = encode_unit(&data, 1);
            assert_eq!((unit.codec, unit.blocks as usize * 4096), (expected, data.len()));
            let mut out = vec![0xaa; data.len()];
            decode_unit(&entry(&unit), &unit.stored, &mut out).unwrap();
            assert_eq!(out, data);
        };
        check(vec![7; 4096], Codec::Raw);
        check(vec![7; 8192], Codec::Zstd);
        check(noise(65536), Codec::Raw);
        check([noise(61440), vec![0; 4096]].concat(), Codec::Raw);
        check([noise(53248), vec![0; 12288]].concat(), Codec::Zstd);
        check(vec![0; 1 << 20], Codec::Zstd);
    }

    #[test]
    fn an_encoder_used_again_gives_the_same_bytes() {
        let mut encoder = UnitEncoder::new(1);
        for data in [vec![1; 65536], noise(8192), [noise(4096), vec![3; 61440]].concat()] {
            let digest = Digest::of(&data);
            let mut given = data.clone();
            let unit = encoder.encode(&mut given, digest);
            assert_eq!(given.is_empty(), unit.codec == Codec::Raw, "what is not stored comes back");
            assert_eq!(unit, encode_unit(&data, 1));
        }
    }

    #[test]
    fn damage_is_told() {
        let data = [noise(4096), vec![1; 61440]].concat();
        let unit = encode_unit(&data, 1);
        let mut out = vec![0; 65536];
        for at in 0..unit.stored.len() {
            let mut stored = unit.stored.clone();
            stored[at] ^= 1;
            assert!(decode_unit(&entry(&unit), &stored, &mut out).is_err(), "flipped {at}");
        }
        let undecodable = Err(UnitError::Undecodable { digest: unit.digest, len: 65536 });
        assert_eq!(decode_unit(&entry(&unit), &unit.stored[1..], &mut out), undecodable);
        let short = UnitEntry { stored_len: unit.stored.len() as u32 - 1, ..entry(&unit) };
        assert_eq!(decode_unit(&short, &unit.stored[..unit.stored.len() - 1], &mut out), undecodable);
        assert!(matches!(decode_unit(&entry(&unit), &unit.stored, &mut out[..61440]), Err(UnitError::Undecodable { .. })), "too little room");
        assert!(matches!(decode_unit(&entry(&unit), &unit.stored, &mut vec![0; 69632]), Err(UnitError::Undecodable { .. })), "too much room");
        let other = UnitEntry { digest: Digest::of(b"other"), ..entry(&unit) };
        assert_eq!(decode_unit(&other, &unit.stored, &mut out), Err(UnitError::Mismatch { digest: other.digest, found: unit.digest }));
    }

    proptest! {
        #[test]
        fn hostile_frames_never_panic(stored in prop::collection::vec(any::<u8>(), 0..200), magic in any::<bool>(), raw in any::<bool>()) {
            let stored = if magic { [&[0x28, 0xb5, 0x2f, 0xfd][..], &stored].concat() } else { stored };
            let codec = if raw { Codec::Raw } else { Codec::Zstd };
            let entry = UnitEntry { offset: 0, stored_len: stored.len() as u32, codec, digest: Digest([0; 32]) };
            prop_assert!(decode_unit(&entry, &stored, &mut [0; 8192]).is_err());
        }
    }
}
