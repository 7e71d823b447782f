//! Extended attributes: names by prefix index, bodies, entries.

use super::{put, u16_at};
use crate::meta::Xattr;

/// Size of the header before an inode's xattrs: filter, count of shared ids, reserved.
pub const XATTR_HEADER_LEN: usize = 12;
/// Size of a shared xattr's id; also what ids and `xattr_icount` count in.
pub const XATTR_UNIT: usize = 4;
/// Size of the header before an xattr's name.
pub const XATTR_ENTRY_LEN: usize = 4;
/// Length of the xattr body for `i_xattr_icount`, or `None` for 1, which kernels refuse.
pub const fn xattr_body_len(xattr_count: u16) -> Option<usize> {
    match xattr_count {
        0 => Some(0),
        1 => None,
        n => Some(XATTR_HEADER_LEN + XATTR_UNIT * (n as usize - 1)),
    }
}

/// `EROFS_XATTR_INDEX_*` of each of [`Xattr::PREFIXES`].
const XATTR_INDEXES: [u8; Xattr::PREFIXES.len()] = [1, 2, 3, 4, 6];

/// Splits a full xattr name into prefix index and rest, or `None` when EROFS has no index for it.
pub fn split_xattr_name(name: &[u8]) -> Option<(u8, &[u8])> {
    Xattr::split_name(name).map(|(i, rest)| (XATTR_INDEXES[i], rest))
}

/// The full name for a prefix index and the rest; `None` when there is no such xattr.
pub fn join_xattr_name(index: u8, rest: &[u8]) -> Option<Vec<u8>> {
    let prefix = Xattr::PREFIXES[XATTR_INDEXES.iter().position(|i| *i == index)?];
    (prefix.ends_with(b".") != rest.is_empty()).then(|| [prefix, rest].concat())
}

/// Offsets in the header of an xattr body.
mod xattr_header {
    pub const FILTER: usize = 0;
    pub const SHARED_COUNT: usize = FILTER + size_of::<u32>();
}

/// The header of an xattr body. The name filter stays zero, which says nothing, as the feature bit is off.
pub fn encode_xattr_header(shared_count: u8) -> [u8; XATTR_HEADER_LEN] {
    let mut out = [0; XATTR_HEADER_LEN];
    put(&mut out, xattr_header::SHARED_COUNT, [shared_count]);
    out
}

/// The number of shared ids that follow the header.
pub fn decode_xattr_header(raw: &[u8; XATTR_HEADER_LEN]) -> u8 {
    raw[xattr_header::SHARED_COUNT]
}

/// Offsets in the header of an xattr.
mod xattr_entry {
    pub const NAME_LEN: usize = 0;
    pub const NAME_INDEX: usize = NAME_LEN + size_of::<u8>();
    pub const VALUE_LEN: usize = NAME_INDEX + size_of::<u8>();
}

/// The header of an xattr: length of the name's rest, prefix index, length of the value. The rest and the value follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawXattr {
    pub name_len: u8,
    pub name_index: u8,
    pub value_len: u16,
}

impl RawXattr {
    pub fn encode(&self) -> [u8; XATTR_ENTRY_LEN] {
        let mut out = [0; XATTR_ENTRY_LEN];
        put(&mut out, xattr_entry::NAME_LEN, [self.name_len]);
        put(&mut out, xattr_entry::NAME_INDEX, [self.name_index]);
        put(&mut out, xattr_entry::VALUE_LEN, self.value_len.to_le_bytes());
        out
    }

    pub fn decode(raw: &[u8; XATTR_ENTRY_LEN]) -> RawXattr {
        RawXattr { name_len: raw[xattr_entry::NAME_LEN], name_index: raw[xattr_entry::NAME_INDEX], value_len: u16_at(raw, xattr_entry::VALUE_LEN) }
    }

    /// Bytes of header, name and value, padded to [`XATTR_UNIT`].
    pub fn padded_len(&self) -> usize {
        (XATTR_ENTRY_LEN + usize::from(self.name_len) + usize::from(self.value_len)).next_multiple_of(XATTR_UNIT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xattr_names_split_and_join() {
        for (name, expected) in [
            (&b"user.a"[..], Some((1, &b"a"[..]))),
            (b"system.posix_acl_access", Some((2, b""))),
            (b"system.posix_acl_default", Some((3, b""))),
            (b"trusted.overlay.opaque", Some((4, b"overlay.opaque"))),
            (b"security.capability", Some((6, b"capability"))),
            (b"user.", None),
            (b"system.posix_acl_access.x", None),
            (b"system.nfs4_acl", None),
            (b"btrfs.compression", None),
            (b"", None),
        ] {
            assert_eq!(split_xattr_name(name), expected, "{}", name.escape_ascii());
            if let Some((index, rest)) = expected {
                assert_eq!(join_xattr_name(index, rest).as_deref(), Some(name));
            }
        }
        assert_eq!(join_xattr_name(5, b"x"), None);
        assert_eq!(join_xattr_name(2, b"x"), None);
    }
}
