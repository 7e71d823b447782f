//! The on-disk structures, both ways: offsets, flags, encodings.
//!
//! All integers are little-endian. Names and numbers are those of `fs/erofs/erofs_fs.h` (Linux 6.12); only what the baseline uses is
//! here. Decoders take arrays of the exact size and so cannot fail on length; what a value means is judged where it is used.

mod inode;
mod xattr;

pub use inode::*;
pub use xattr::*;

use crate::block::BLOCK_SIZE;
use crate::meta::Chunk;

/// `EROFS_SUPER_OFFSET`: where the superblock is.
pub const SUPERBLOCK_AT: usize = 1024;
/// Size of the superblock without extension slots.
pub const SUPERBLOCK_LEN: usize = 128;
/// `EROFS_SUPER_MAGIC_V1`.
pub const MAGIC: u32 = 0xE0F5_E1E2;
/// `EROFS_FEATURE_COMPAT_SB_CHKSUM | EROFS_FEATURE_COMPAT_MTIME`.
pub const COMPAT: u32 = 0x3;
/// `EROFS_FEATURE_INCOMPAT_CHUNKED_FILE | EROFS_FEATURE_INCOMPAT_DEVICE_TABLE`.
pub const INCOMPAT: u32 = 0xC;
/// Size of a device slot; also what `devt_slotoff` counts in.
pub const DEVICE_SLOT_LEN: usize = 128;
/// The device table follows the superblock.
pub const DEVICE_TABLE_AT: usize = SUPERBLOCK_AT + SUPERBLOCK_LEN;
/// Size of a chunk index.
pub const CHUNK_INDEX_LEN: usize = 8;
/// `EROFS_NULL_ADDR`: a chunk that is all zeros.
pub const HOLE: u32 = u32::MAX;
/// Size of a directory entry without its name.
pub const DIRENT_LEN: usize = 12;

/// Offsets in the superblock.
mod superblock {
    pub const MAGIC: usize = 0;
    pub const CHECKSUM: usize = MAGIC + size_of::<u32>();
    pub const COMPAT: usize = CHECKSUM + size_of::<u32>();
    pub const BLOCK_BITS: usize = COMPAT + size_of::<u32>();
    pub const EXT_SLOTS: usize = BLOCK_BITS + size_of::<u8>();
    pub const ROOT_NID: usize = EXT_SLOTS + size_of::<u8>();
    pub const INODES: usize = ROOT_NID + size_of::<u16>();
    pub const EPOCH: usize = INODES + size_of::<u64>();
    pub const EPOCH_NSEC: usize = EPOCH + size_of::<u64>();
    pub const BLOCKS: usize = EPOCH_NSEC + size_of::<u32>();
    pub const META_BLOCK: usize = BLOCKS + size_of::<u32>();
    pub const XATTR_BLOCK: usize = META_BLOCK + size_of::<u32>();
    pub const UUID: usize = XATTR_BLOCK + size_of::<u32>();
    pub const VOLUME_NAME: usize = UUID + 16;
    pub const INCOMPAT: usize = VOLUME_NAME + 16;
    pub const COMPRESSION: usize = INCOMPAT + size_of::<u32>();
    pub const EXTRA_DEVICES: usize = COMPRESSION + size_of::<u16>();
    pub const DEVICE_SLOT: usize = EXTRA_DEVICES + size_of::<u16>();
    pub const DIR_BLOCK_BITS: usize = DEVICE_SLOT + size_of::<u16>();
}

/// Where the checksum is in the image.
pub const CHECKSUM_AT: usize = SUPERBLOCK_AT + superblock::CHECKSUM;
/// Where the UUID is in the image.
pub const UUID_AT: usize = SUPERBLOCK_AT + superblock::UUID;
/// Length of the UUID.
pub const UUID_LEN: usize = 16;

/// The parts of the superblock that vary, and those a reader has to look at. Written: everything else zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    pub magic: u32,
    pub checksum: u32,
    pub compat: u32,
    pub block_bits: u8,
    pub ext_slots: u8,
    pub root_nid: u16,
    pub inodes: u64,
    pub epoch: u64,
    pub epoch_nsec: u32,
    pub blocks: u32,
    pub meta_block: u32,
    pub xattr_block: u32,
    pub uuid: [u8; UUID_LEN],
    pub incompat: u32,
    pub compression: u16,
    pub extra_devices: u16,
    pub device_slot: u16,
    pub dir_block_bits: u8,
}

impl Superblock {
    pub fn encode(&self) -> [u8; SUPERBLOCK_LEN] {
        let mut out = [0; SUPERBLOCK_LEN];
        put(&mut out, superblock::MAGIC, self.magic.to_le_bytes());
        put(&mut out, superblock::CHECKSUM, self.checksum.to_le_bytes());
        put(&mut out, superblock::COMPAT, self.compat.to_le_bytes());
        put(&mut out, superblock::BLOCK_BITS, [self.block_bits]);
        put(&mut out, superblock::EXT_SLOTS, [self.ext_slots]);
        put(&mut out, superblock::ROOT_NID, self.root_nid.to_le_bytes());
        put(&mut out, superblock::INODES, self.inodes.to_le_bytes());
        put(&mut out, superblock::EPOCH, self.epoch.to_le_bytes());
        put(&mut out, superblock::EPOCH_NSEC, self.epoch_nsec.to_le_bytes());
        put(&mut out, superblock::BLOCKS, self.blocks.to_le_bytes());
        put(&mut out, superblock::META_BLOCK, self.meta_block.to_le_bytes());
        put(&mut out, superblock::XATTR_BLOCK, self.xattr_block.to_le_bytes());
        put(&mut out, superblock::UUID, self.uuid);
        put(&mut out, superblock::INCOMPAT, self.incompat.to_le_bytes());
        put(&mut out, superblock::COMPRESSION, self.compression.to_le_bytes());
        put(&mut out, superblock::EXTRA_DEVICES, self.extra_devices.to_le_bytes());
        put(&mut out, superblock::DEVICE_SLOT, self.device_slot.to_le_bytes());
        put(&mut out, superblock::DIR_BLOCK_BITS, [self.dir_block_bits]);
        out
    }

    pub fn decode(raw: &[u8; SUPERBLOCK_LEN]) -> Superblock {
        Superblock {
            magic: u32_at(raw, superblock::MAGIC),
            checksum: u32_at(raw, superblock::CHECKSUM),
            compat: u32_at(raw, superblock::COMPAT),
            block_bits: raw[superblock::BLOCK_BITS],
            ext_slots: raw[superblock::EXT_SLOTS],
            root_nid: u16_at(raw, superblock::ROOT_NID),
            inodes: u64_at(raw, superblock::INODES),
            epoch: u64_at(raw, superblock::EPOCH),
            epoch_nsec: u32_at(raw, superblock::EPOCH_NSEC),
            blocks: u32_at(raw, superblock::BLOCKS),
            meta_block: u32_at(raw, superblock::META_BLOCK),
            xattr_block: u32_at(raw, superblock::XATTR_BLOCK),
            uuid: take(raw, superblock::UUID),
            incompat: u32_at(raw, superblock::INCOMPAT),
            compression: u16_at(raw, superblock::COMPRESSION),
            extra_devices: u16_at(raw, superblock::EXTRA_DEVICES),
            device_slot: u16_at(raw, superblock::DEVICE_SLOT),
            dir_block_bits: raw[superblock::DIR_BLOCK_BITS],
        }
    }
}

/// The superblock's checksum, given the first block of the image: CRC-32C from the superblock to the end of the block with the checksum
/// field as zeros, seeded with ones and not inverted at the end (`erofs_superblock_csum_verify` in `fs/erofs/super.c`).
pub fn checksum(first_block: &[u8; BLOCK_SIZE as usize]) -> u32 {
    let crc = crc32c::crc32c(&first_block[SUPERBLOCK_AT..CHECKSUM_AT]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    !crc32c::crc32c_append(crc, &first_block[CHECKSUM_AT + 4..])
}

/// Offsets in a device slot.
mod device_slot {
    pub const TAG: usize = 0;
    pub const BLOCKS: usize = TAG + super::DEVICE_TAG_LEN;
    pub const UNIFIED_BLOCK: usize = BLOCKS + size_of::<u32>();
}

/// Length of a device tag: the hex digits of a pack's digest fill it exactly.
pub const DEVICE_TAG_LEN: usize = 64;

/// A device slot: tag, size, and where the device would be if all were one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawDevice {
    pub tag: [u8; DEVICE_TAG_LEN],
    pub blocks: u32,
    pub unified_block: u32,
}

impl RawDevice {
    pub fn encode(&self) -> [u8; DEVICE_SLOT_LEN] {
        let mut out = [0; DEVICE_SLOT_LEN];
        put(&mut out, device_slot::TAG, self.tag);
        put(&mut out, device_slot::BLOCKS, self.blocks.to_le_bytes());
        put(&mut out, device_slot::UNIFIED_BLOCK, self.unified_block.to_le_bytes());
        out
    }

    pub fn decode(raw: &[u8; DEVICE_SLOT_LEN]) -> RawDevice {
        RawDevice {
            tag: take(raw, device_slot::TAG),
            blocks: u32_at(raw, device_slot::BLOCKS),
            unified_block: u32_at(raw, device_slot::UNIFIED_BLOCK),
        }
    }
}

/// Offsets in a chunk index; its first two bytes are zero.
mod chunk_index {
    pub const DEVICE: usize = size_of::<u16>();
    pub const BLOCK: usize = DEVICE + size_of::<u16>();
}

/// A chunk index. Device 0 would be the image itself, pack `i` is device `i + 1`.
pub fn encode_chunk(chunk: Chunk) -> [u8; CHUNK_INDEX_LEN] {
    let (device, block) = match chunk {
        Chunk::Hole => (0, HOLE),
        Chunk::At { pack, block } => ((pack + 1) as u16, block),
    };
    let mut out = [0; CHUNK_INDEX_LEN];
    put(&mut out, chunk_index::DEVICE, device.to_le_bytes());
    put(&mut out, chunk_index::BLOCK, block.to_le_bytes());
    out
}

/// Reads a chunk index; `None` when it points into the image itself.
pub fn decode_chunk(raw: &[u8; CHUNK_INDEX_LEN]) -> Option<Chunk> {
    match (u16_at(raw, chunk_index::DEVICE), u32_at(raw, chunk_index::BLOCK)) {
        (_, HOLE) => Some(Chunk::Hole),
        (0, _) => None,
        (device, block) => Some(Chunk::At { pack: u32::from(device) - 1, block }),
    }
}

/// Offsets in a directory entry.
mod dirent {
    pub const NID: usize = 0;
    pub const NAME_AT: usize = NID + size_of::<u64>();
    pub const KIND: usize = NAME_AT + size_of::<u16>();
}

/// A directory entry: inode, where in its block the name starts, type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawDirent {
    pub nid: u64,
    pub name_at: u16,
    pub kind: u8,
}

impl RawDirent {
    pub fn encode(&self) -> [u8; DIRENT_LEN] {
        let mut out = [0; DIRENT_LEN];
        put(&mut out, dirent::NID, self.nid.to_le_bytes());
        put(&mut out, dirent::NAME_AT, self.name_at.to_le_bytes());
        put(&mut out, dirent::KIND, [self.kind]);
        out
    }

    pub fn decode(raw: &[u8; DIRENT_LEN]) -> RawDirent {
        RawDirent { nid: u64_at(raw, dirent::NID), name_at: u16_at(raw, dirent::NAME_AT), kind: raw[dirent::KIND] }
    }
}

fn put<const N: usize>(out: &mut [u8], at: usize, bytes: [u8; N]) {
    out[at..at + N].copy_from_slice(&bytes);
}

/// `N` bytes at `at`; callers pass arrays and offsets of this file, so the range is always inside.
fn take<const N: usize>(raw: &[u8], at: usize) -> [u8; N] {
    raw[at..at + N].try_into().expect("N bytes")
}

fn u16_at(raw: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(take(raw, at))
}

/// The little-endian u32 at `at`, which must lie inside.
pub fn u32_at(raw: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(take(raw, at))
}

fn u64_at(raw: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(take(raw, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_those_of_the_kernel_header() {
        for (name, ours, theirs) in [
            ("sb.inos", superblock::INODES, 16),
            ("sb.build_time", superblock::EPOCH, 24),
            ("sb.blocks", superblock::BLOCKS, 36),
            ("sb.uuid", superblock::UUID, 48),
            ("sb.volume_name", superblock::VOLUME_NAME, 64),
            ("sb.feature_incompat", superblock::INCOMPAT, 80),
            ("sb.extra_devices", superblock::EXTRA_DEVICES, 86),
            ("sb.devt_slotoff", superblock::DEVICE_SLOT, 88),
            ("sb.dirblkbits", superblock::DIR_BLOCK_BITS, 90),
            ("mapped_blkaddr", device_slot::UNIFIED_BLOCK, 68),
            ("index blkaddr", chunk_index::BLOCK, 4),
            ("dirent file_type", dirent::KIND, 10),
        ] {
            assert_eq!(ours, theirs, "{name}");
        }
    }

    #[test]
    fn checksum_is_the_kernels() {
        // mkfs.erofs writes the same: seed 0x5045B54A over what follows the checksum field of an otherwise standard superblock.
        let mut block = [0; BLOCK_SIZE as usize];
        block[SUPERBLOCK_AT..SUPERBLOCK_AT + 4].copy_from_slice(&MAGIC.to_le_bytes());
        let seed = !crc32c::crc32c_append(crc32c::crc32c(&MAGIC.to_le_bytes()), &[0; 4]);
        assert_eq!(seed, 0x5045_B54A);
        assert_eq!(checksum(&block), !crc32c::crc32c_append(!0x5045_B54A, &block[CHECKSUM_AT + 4..]));
        block[CHECKSUM_AT] = 7;
        assert_eq!(checksum(&block), !crc32c::crc32c_append(!0x5045_B54A, &block[CHECKSUM_AT + 4..]), "the field itself does not count");
    }

    #[test]
    fn chunk_indexes_round_trip() {
        for chunk in [Chunk::Hole, Chunk::At { pack: 0, block: 0 }, Chunk::At { pack: 65534, block: u32::MAX - 1 }] {
            assert_eq!(decode_chunk(&encode_chunk(chunk)), Some(chunk));
        }
        assert_eq!(decode_chunk(&[0; 8]), None, "device 0 is the image itself");
    }
}
