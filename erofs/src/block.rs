//! The 4 KiB block and the unit: the two granules of the format.

/// Bytes in a block: EROFS block size, pack alignment and the smallest thing a chunk index can address.
pub const BLOCK_SIZE: u64 = 4096;
/// log2 of [`BLOCK_SIZE`].
pub const BLOCK_BITS: u8 = 12;

/// Rounds `bytes` up to whole blocks; gives the number of blocks.
pub const fn blocks_for(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_SIZE)
}

/// Size of a unit (and so of a chunk): a power of two from 64 KiB to 1 MiB, one per pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnitBits(u8);

impl UnitBits {
    /// The smallest unit the format allows, 64 KiB.
    pub const MIN: UnitBits = UnitBits(16);
    /// The largest unit the format allows, 1 MiB.
    pub const MAX: UnitBits = UnitBits(20);
    /// What the converter writes: 256 KiB.
    pub const DEFAULT: UnitBits = UnitBits(18);

    /// `bits` as a unit size, or `None` outside 16..=20.
    pub const fn new(bits: u8) -> Option<UnitBits> {
        if bits >= 16 && bits <= 20 { Some(UnitBits(bits)) } else { None }
    }

    /// log2 of the unit size in bytes.
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// Unit size in bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.0
    }

    /// Unit size in blocks.
    pub const fn blocks(self) -> u32 {
        1 << (self.0 - BLOCK_BITS)
    }
}

impl Default for UnitBits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unit_sizes_run_from_64_kib_to_1_mib() {
        for (bits, expected) in [(15, None), (16, Some((65536, 16))), (18, Some((262_144, 64))), (20, Some((1 << 20, 256))), (21, None)] {
            assert_eq!(UnitBits::new(bits).map(|u| (u.bytes(), u.blocks())), expected, "{bits}");
        }
    }

    #[test]
    fn bytes_round_up_to_blocks() {
        for (bytes, blocks) in [(0, 0), (1, 1), (4096, 1), (4097, 2)] {
            assert_eq!(blocks_for(bytes), blocks, "{bytes}");
        }
    }
}
