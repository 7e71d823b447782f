//! Mount points as the kernel lists them, and getting rid of those below a directory.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::mount::{UnmountFlags, unmount};

/// One line of `/proc/self/mountinfo`.
pub(crate) struct MountPoint {
    pub(crate) at: PathBuf,
    pub(crate) source: String,
}

/// All mount points this process sees, in the order they were made.
pub(crate) fn list() -> Vec<MountPoint> {
    let text = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    text.split(|&byte| byte == b'\n').filter_map(parse_line).collect()
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw`: field 5 is where, the second after the dash is the source.
fn parse_line(line: &[u8]) -> Option<MountPoint> {
    let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
    let dash = fields.iter().position(|field| *field == b"-")?;
    let source = fields.get(dash + 2)?;
    Some(MountPoint {
        at: PathBuf::from(OsString::from_vec(unescape(fields.get(4)?))),
        source: String::from_utf8_lossy(&unescape(source)).into_owned(),
    })
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok()).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) if first == b'\\' => {
                out.push(byte);
                rest = &tail[3..];
            }
            _ => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

/// Whether something is mounted exactly at `path`.
pub fn is_mounted(path: &Path) -> bool {
    list().iter().any(|mount| mount.at == path)
}

/// Whether something is mounted at or below `dir`.
pub fn is_anything_mounted_below(dir: &Path) -> bool {
    list().iter().any(|mount| mount.at.starts_with(dir))
}

/// Unmounts everything mounted at or below `dir`, the newest first. A busy mount, or one whose FUSE server is gone, is detached: it
/// disappears from sight at once and is freed with its last user.
pub fn unmount_below(dir: &Path) {
    for mount in list().into_iter().rev().filter(|mount| mount.at.starts_with(dir)) {
        if unmount(&mount.at, UnmountFlags::empty()).is_err() {
            // Nothing is left to try after this; what stays mounted shows when its directory cannot be removed.
            let _ = unmount(&mount.at, UnmountFlags::DETACH);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_with_odd_names_are_read_as_they_are() {
        let check = |line: &str, at: &str, source: &str| {
            let mount = parse_line(line.as_bytes()).expect("a valid line");
            assert_eq!((mount.at.to_str().expect("UTF-8"), mount.source.as_str()), (at, source));
        };
        check("36 35 98:0 / /mnt rw,noatime - ext3 /dev/root rw", "/mnt", "/dev/root");
        check("36 35 98:0 / /a\\040b\\134c rw shared:1 master:2 - overlay over\\040lay rw", "/a b\\c", "over lay");
        assert!(parse_line(b"").is_none());
        assert!(parse_line(b"36 35 98:0 / /mnt rw").is_none());
    }
}
