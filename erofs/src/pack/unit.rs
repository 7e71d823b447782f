//! One unit: compressed for the pack, decompressed and verified for a reader.

use super::table::{Codec, UnitEntry};
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
    #[error("unit {digest} does not decode to {len} bytes")]
    Undecodable {
        /// What the unit should hash to.
        digest: Digest,
        /// Uncompressed length expected.
        len: usize,
    },
    /// It decodes, to other bytes.
    #[error("unit {digest} decodes to bytes with BLAKE3 {found}")]
    Mismatch {
        /// What the unit should hash to.
        digest: Digest,
        /// What it hashes to.
        found: Digest,
    },
}

/// Compresses a unit. `data` is a whole number of blocks (zero-padded by the caller), not empty; `level` is zstd's. The unit is stored
/// raw when zstd saves no block.
#[allow(clippy::todo)]
pub fn encode_unit(data: &[u8], level: i32) -> EncodedUnit {
    let _ = (data, level);
    todo!()
}

/// Decompresses `stored` (exactly the bytes that `entry` locates) into `out`, whose length is that of the uncompressed unit, and
/// verifies it (invariant 5). On an error the content of `out` is unspecified and must not be used.
#[allow(clippy::todo)]
pub fn decode_unit(entry: &UnitEntry, stored: &[u8], out: &mut [u8]) -> Result<(), UnitError> {
    let _ = (entry, stored, out);
    todo!()
}
