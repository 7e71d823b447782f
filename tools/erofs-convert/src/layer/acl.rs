//! POSIX ACLs in the kernel's binary form, as archives carry them (`include/uapi/linux/posix_acl_xattr.h`).
//!
//! containerd sets an ACL and then the mode, and chmod(2) rewrites the entries that the mode stands for (`fs/posix_acl.c`).

use erofs::meta::Attr;

use super::header::Refusal;

/// The ACL that access to a file is decided by.
pub(super) const ACCESS: &[u8] = b"system.posix_acl_access";
/// The ACL that what is made in a directory begins with.
pub(super) const DEFAULT: &[u8] = b"system.posix_acl_default";

const VERSION: [u8; 4] = [2, 0, 0, 0];
const ENTRY_LEN: usize = 8;

/// Tags of entries. The file's owner and group, and everybody else, have one entry each; named users and groups any number.
const OWNER: u16 = 0x01;
const USER: u16 = 0x02;
const OWNING_GROUP: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// Tag of an entry: two bytes before permissions and ID.
fn tag(entry: &[u8; ENTRY_LEN]) -> u16 {
    u16::from_le_bytes([entry[0], entry[1]])
}

/// Whether the kernel takes it for an ACL that has entries. Refuses what the kernel, and so containerd, fails on.
pub(super) fn says_something(acl: &[u8]) -> Result<bool, Refusal> {
    let Some(entries) = acl.strip_prefix(&VERSION) else {
        // Another version is "not supported", which containerd passes over.
        return if acl.len() < VERSION.len() { Err(broken()) } else { Ok(false) };
    };
    let (entries, rest) = entries.as_chunks::<ENTRY_LEN>();
    if !rest.is_empty() || !entries.is_empty() && !is_valid(entries) { Err(broken()) } else { Ok(!entries.is_empty()) }
}

fn broken() -> Refusal {
    Refusal::Malformed("an ACL of it is malformed".into())
}

/// The kernel's rules (posix_acl_valid): owner, users, group, groups, mask, others, of which only users and groups may come more or less
/// often than once; with any of those there must be a mask.
fn is_valid(entries: &[[u8; ENTRY_LEN]]) -> bool {
    let mut last = 0;
    let mut named = false;
    for entry in entries {
        let tag = tag(entry);
        let again = matches!(tag, USER | GROUP) && tag == last;
        let expected = match last {
            0 => tag == OWNER,
            OWNER | USER => matches!(tag, USER | OWNING_GROUP),
            OWNING_GROUP | GROUP => matches!(tag, GROUP | MASK) || tag == OTHER && !named,
            MASK => tag == OTHER,
            _ => false,
        };
        let is_named = matches!(tag, USER | GROUP);
        if !(expected || again) || entry[2] > 7 || entry[3] != 0 || is_named && entry[4..] == [0xff; 4] {
            return false;
        }
        named |= is_named;
        last = tag;
    }
    last == OTHER
}

/// Does to the access ACL what chmod(2) to the attributes' mode does: owner and others get the mode's permissions, and so does the mask, or
/// the group if there is none. An ACL that then says no more than the mode is none. Takes valid ACLs only.
pub(super) fn chmod(attr: &mut Attr) {
    let mode = attr.mode;
    attr.xattrs.retain_mut(|xattr| {
        if xattr.name != ACCESS {
            return true;
        }
        let entries = xattr.value[VERSION.len()..].as_chunks_mut::<ENTRY_LEN>().0;
        let class = if entries.iter().any(|entry| tag(entry) == MASK) { MASK } else { OWNING_GROUP };
        let mut minimal = true;
        for entry in entries {
            let tag = tag(entry);
            minimal &= matches!(tag, OWNER | OWNING_GROUP | OTHER);
            match tag {
                OWNER => entry[2] = (mode >> 6 & 7) as u8,
                OTHER => entry[2] = (mode & 7) as u8,
                tag if tag == class => entry[2] = (mode >> 3 & 7) as u8,
                _ => (),
            }
        }
        !minimal
    });
}

#[cfg(test)]
pub(super) mod tests {
    use erofs::meta::Xattr;

    use super::*;

    /// An ACL of entries `tag:permissions`, with the tags `u g m o` and, of ID 5, `U` and `G`.
    pub fn acl(text: &str) -> Vec<u8> {
        let mut out = VERSION.to_vec();
        for entry in text.split(' ').filter(|entry| !entry.is_empty()) {
            let (tag, perm) = entry.split_once(':').unwrap();
            let (tag, id) = match tag {
                "u" => (OWNER, u32::MAX),
                "U" => (USER, 5),
                "g" => (OWNING_GROUP, u32::MAX),
                "G" => (GROUP, 5),
                "m" => (MASK, u32::MAX),
                _ => (OTHER, u32::MAX),
            };
            out.extend([tag.to_le_bytes(), perm.parse::<u16>().unwrap().to_le_bytes()].concat());
            out.extend(id.to_le_bytes());
        }
        out
    }

    #[test]
    fn only_what_the_kernel_takes_is_an_acl() {
        let check = |bytes: &[u8], expected: Option<bool>| assert_eq!(says_something(bytes).ok(), expected, "{}", bytes.escape_ascii());
        for (text, expected) in [
            ("", Some(false)),
            ("u:7 g:5 o:4", Some(true)),
            ("u:7 g:5 m:5 o:4", Some(true)),
            ("u:7 U:6 U:5 g:5 G:1 G:2 m:7 o:0", Some(true)),
            ("u:7 U:6 g:5 o:4", None),
            ("u:7 g:5 G:5 o:4", None),
            ("u:7 u:7 g:5 o:4", None),
            ("U:7 g:5 m:7 o:4", None),
            ("u:7 g:5 g:5 o:4", None),
            ("u:7 g:5 U:5 m:7 o:4", None),
            ("u:7 g:5", None),
            ("u:7 g:5 o:4 o:4", None),
            ("u:8 g:5 o:4", None),
            ("u:256 g:5 o:4", None),
        ] {
            check(&acl(text), expected);
        }
        check(b"", None);
        check(b"\x02\0\0", None);
        check(b"\x01\0\0\0", Some(false));
        check(&acl("u:7 g:5 o:4")[..20], None);
        let mut nobody = acl("u:7 U:6 g:5 m:7 o:4");
        nobody[16..20].fill(0xff);
        check(&nobody, None);
    }

    #[test]
    fn the_mode_is_set_after_the_acl() {
        let check = |text: &str, mode: u16, expected: Option<&str>| {
            let xattr = |name: &[u8]| Xattr { name: name.to_vec(), value: acl(text) };
            let mut attr = Attr { mode, xattrs: vec![xattr(ACCESS), xattr(DEFAULT)], ..Attr::default() };
            chmod(&mut attr);
            let default = attr.xattrs.pop().unwrap();
            assert_eq!(default, xattr(DEFAULT), "chmod leaves it alone");
            assert_eq!(attr.xattrs.pop().map(|x| x.value), expected.map(acl), "{text} {mode:o}");
        };
        check("u:7 g:5 o:4", 0o640, None);
        check("u:7 U:6 g:5 m:7 o:4", 0o640, Some("u:6 U:6 g:5 m:4 o:0"));
        check("u:7 g:5 G:3 m:7 o:4", 0o4751, Some("u:7 g:5 G:3 m:5 o:1"));
        check("u:0 g:5 m:7 o:4", 0o777, Some("u:7 g:5 m:7 o:7"));
    }
}
