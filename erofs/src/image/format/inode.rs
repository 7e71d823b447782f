//! Inodes: both forms, types, device numbers, chunk formats.

use super::{put, take, u16_at, u32_at, u64_at};
use crate::block::{BLOCK_BITS, UnitBits};
use crate::image::FileKind;
use crate::meta::{Device, Time};

/// What nids count in, and what inodes are aligned to.
pub const NID_SLOT: u64 = 32;
/// Size of a compact inode.
pub const COMPACT_LEN: usize = 32;
/// Size of an extended inode.
pub const EXTENDED_LEN: usize = 64;
/// `EROFS_INODE_LAYOUT_*`: the two inode forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// 32 bytes: 16-bit owner and link count, 32-bit size, the superblock's time.
    Compact,
    /// 64 bytes.
    Extended,
}

impl Form {
    /// Bytes the inode takes.
    pub const fn len(self) -> usize {
        match self {
            Form::Compact => COMPACT_LEN,
            Form::Extended => EXTENDED_LEN,
        }
    }
}

/// `EROFS_INODE_*`: where an inode's data is. The numbers are those of `i_format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// In whole blocks from `i_u`.
    Plain = 0,
    /// Full blocks from `i_u`, the rest right after the inode.
    Inline = 2,
    /// In chunks, whose indexes follow the inode.
    Chunked = 4,
}

/// Bit 0 of `i_format`.
const FORMAT_EXTENDED: u16 = 1;
/// Where the layout starts in `i_format`.
const FORMAT_LAYOUT_SHIFT: u16 = 1;

/// Offsets in an inode: first those both forms share, then each form's own.
mod offset {
    pub const FORMAT: usize = 0;
    pub const XATTR_COUNT: usize = FORMAT + size_of::<u16>();
    pub const MODE: usize = XATTR_COUNT + size_of::<u16>();
    pub const COMPACT_NLINK: usize = MODE + size_of::<u16>();
    pub const SIZE: usize = COMPACT_NLINK + size_of::<u16>();
    pub const UNION: usize = 16;
    pub const INO: usize = UNION + size_of::<u32>();
    pub mod compact {
        pub const MTIME: usize = super::SIZE + size_of::<u32>();
        pub const UID: usize = super::INO + size_of::<u32>();
        pub const GID: usize = UID + size_of::<u16>();
    }
    pub mod extended {
        pub const UID: usize = super::INO + size_of::<u32>();
        pub const GID: usize = UID + size_of::<u32>();
        pub const MTIME: usize = GID + size_of::<u32>();
        pub const MTIME_NSEC: usize = MTIME + size_of::<u64>();
        pub const NLINK: usize = MTIME_NSEC + size_of::<u32>();
    }
}

/// An inode as stored, either form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawInode {
    pub form: Form,
    pub layout: Layout,
    /// `i_xattr_icount`: 0, or the xattr body's length is [`super::xattr::xattr_body_len`].
    pub xattr_count: u16,
    /// Type and permission bits.
    pub mode: u16,
    pub nlink: u32,
    pub size: u64,
    /// `i_u`: start block, device number or chunk format.
    pub union: u32,
    /// `i_ino`: what 32-bit `stat` shows.
    pub ino: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Time,
}

impl RawInode {
    /// Writes the inode at the start of `out`. A compact one must fit (the plan sees to that): it holds no time at all.
    pub fn encode(&self, out: &mut [u8]) {
        let form = if self.form == Form::Extended { FORMAT_EXTENDED } else { 0 };
        put(out, offset::FORMAT, (form | (self.layout as u16) << FORMAT_LAYOUT_SHIFT).to_le_bytes());
        put(out, offset::XATTR_COUNT, self.xattr_count.to_le_bytes());
        put(out, offset::MODE, self.mode.to_le_bytes());
        put(out, offset::UNION, self.union.to_le_bytes());
        put(out, offset::INO, self.ino.to_le_bytes());
        match self.form {
            Form::Compact => {
                put(out, offset::COMPACT_NLINK, (self.nlink as u16).to_le_bytes());
                put(out, offset::SIZE, (self.size as u32).to_le_bytes());
                put(out, offset::compact::UID, (self.uid as u16).to_le_bytes());
                put(out, offset::compact::GID, (self.gid as u16).to_le_bytes());
            }
            Form::Extended => {
                put(out, offset::SIZE, self.size.to_le_bytes());
                put(out, offset::extended::UID, self.uid.to_le_bytes());
                put(out, offset::extended::GID, self.gid.to_le_bytes());
                put(out, offset::extended::MTIME, self.mtime.sec.to_le_bytes());
                put(out, offset::extended::MTIME_NSEC, self.mtime.nsec.to_le_bytes());
                put(out, offset::extended::NLINK, self.nlink.to_le_bytes());
            }
        }
    }

    /// The form, given the first bytes of an inode.
    pub fn form(raw: &[u8; COMPACT_LEN]) -> Form {
        if u16_at(raw, offset::FORMAT) & FORMAT_EXTENDED == 0 { Form::Compact } else { Form::Extended }
    }

    /// Reads a compact inode; says what is wrong with it.
    pub fn decode_compact(raw: &[u8; COMPACT_LEN]) -> Result<RawInode, &'static str> {
        // Kernels before 6.15 ignore this field, later ones add it to the epoch: only zero means the same to both.
        if u32_at(raw, offset::compact::MTIME) != 0 {
            return Err("a compact inode has a time");
        }
        Ok(RawInode {
            form: Form::Compact,
            layout: Self::layout(raw)?,
            xattr_count: u16_at(raw, offset::XATTR_COUNT),
            mode: u16_at(raw, offset::MODE),
            nlink: u32::from(u16_at(raw, offset::COMPACT_NLINK)),
            size: u64::from(u32_at(raw, offset::SIZE)),
            union: u32_at(raw, offset::UNION),
            ino: u32_at(raw, offset::INO),
            uid: u32::from(u16_at(raw, offset::compact::UID)),
            gid: u32::from(u16_at(raw, offset::compact::GID)),
            mtime: Time::default(),
        })
    }

    /// Reads an extended inode; says what is wrong with it.
    pub fn decode_extended(raw: &[u8; EXTENDED_LEN]) -> Result<RawInode, &'static str> {
        Ok(RawInode {
            form: Form::Extended,
            layout: Self::layout(raw)?,
            xattr_count: u16_at(raw, offset::XATTR_COUNT),
            mode: u16_at(raw, offset::MODE),
            nlink: u32_at(raw, offset::extended::NLINK),
            size: u64_at(raw, offset::SIZE),
            union: u32_at(raw, offset::UNION),
            ino: u32_at(raw, offset::INO),
            uid: u32_at(raw, offset::extended::UID),
            gid: u32_at(raw, offset::extended::GID),
            mtime: Time { sec: i64::from_le_bytes(take(raw, offset::extended::MTIME)), nsec: u32_at(raw, offset::extended::MTIME_NSEC) },
        })
    }

    fn layout(raw: &[u8]) -> Result<Layout, &'static str> {
        match u16_at(raw, offset::FORMAT) >> FORMAT_LAYOUT_SHIFT {
            0 => Ok(Layout::Plain),
            2 => Ok(Layout::Inline),
            4 => Ok(Layout::Chunked),
            _ => Err("its data layout is unknown"),
        }
    }
}

/// `EROFS_CHUNK_FORMAT_INDEXES`: 8-byte indexes rather than 4-byte block numbers.
const CHUNK_FORMAT_INDEXES: u32 = 0x20;
/// `EROFS_CHUNK_FORMAT_BLKBITS_MASK`.
const CHUNK_FORMAT_BITS: u32 = 0x1f;

/// `i_u` of a chunk-based file.
pub fn chunk_format(unit: UnitBits) -> u32 {
    CHUNK_FORMAT_INDEXES | u32::from(unit.bits() - BLOCK_BITS)
}

/// The chunk size that `i_u` tells, if it is one of ours.
pub fn chunk_size(union: u32) -> Option<UnitBits> {
    if union & !CHUNK_FORMAT_BITS != CHUNK_FORMAT_INDEXES {
        return None;
    }
    UnitBits::new((union & CHUNK_FORMAT_BITS) as u8 + BLOCK_BITS)
}

impl FileKind {
    /// `S_IF*`, `EROFS_FT_*` and the kind.
    const TABLE: [(u16, u8, FileKind); 7] = [
        (0o100_000, 1, FileKind::File),
        (0o040_000, 2, FileKind::Dir),
        (0o020_000, 3, FileKind::Char),
        (0o060_000, 4, FileKind::Block),
        (0o010_000, 5, FileKind::Fifo),
        (0o140_000, 6, FileKind::Socket),
        (0o120_000, 7, FileKind::Symlink),
    ];
    /// `S_IFMT`.
    const MODE_MASK: u16 = 0o170_000;

    /// The type bits of `st_mode`.
    pub fn mode_bits(self) -> u16 {
        self.row().0
    }

    /// The type byte of a directory entry.
    pub(in crate::image) fn dirent_code(self) -> u8 {
        self.row().1
    }

    pub(in crate::image) fn from_mode(mode: u16) -> Option<FileKind> {
        Self::TABLE.iter().find(|row| row.0 == mode & Self::MODE_MASK).map(|row| row.2)
    }

    pub(in crate::image) fn from_dirent_code(code: u8) -> Option<FileKind> {
        Self::TABLE.iter().find(|row| row.1 == code).map(|row| row.2)
    }

    fn row(self) -> (u16, u8, FileKind) {
        *Self::TABLE.iter().find(|row| row.2 == self).expect("the table has every kind")
    }
}

/// `new_encode_dev` of `include/linux/kdev_t.h`.
pub fn encode_device(device: Device) -> u32 {
    (device.minor & 0xff) | device.major << 8 | (device.minor & !0xff) << 12
}

/// `new_decode_dev`.
pub fn decode_device(raw: u32) -> Device {
    Device { major: (raw & 0xf_ff00) >> 8, minor: (raw & 0xff) | ((raw >> 12) & 0xf_ff00) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_those_of_the_kernel_header() {
        use offset::{compact, extended};
        for (name, ours, theirs) in [
            ("i_size", offset::SIZE, 8),
            ("i_u", offset::UNION, 16),
            ("i_ino", offset::INO, 20),
            ("compact i_mtime", compact::MTIME, 12),
            ("compact i_uid", compact::UID, 24),
            ("compact i_gid", compact::GID, 26),
            ("extended i_uid", extended::UID, 24),
            ("extended i_gid", extended::GID, 28),
            ("extended i_mtime", extended::MTIME, 32),
            ("extended i_mtime_nsec", extended::MTIME_NSEC, 40),
            ("extended i_nlink", extended::NLINK, 44),
        ] {
            assert_eq!(ours, theirs, "{name}");
        }
    }

    #[test]
    fn device_numbers_are_the_kernels() {
        for (major, minor, raw) in [(1, 3, 0x103), (8, 0, 0x800), (4095, 1_048_575, 0xFFFF_FFFF), (259, 256, 0x11_0300)] {
            let device = Device { major, minor };
            assert_eq!(encode_device(device), raw, "{device:?}");
            assert_eq!(decode_device(raw), device, "{device:?}");
        }
    }
}
