//! Mounting through the new mount API (`fsopen`, `fsconfig`, `fsmount`, `move_mount`; Linux 5.2) and reading `/proc/self/mountinfo`.
//!
//! Options go in one by one, so nothing has to be escaped and a mount may have any number of devices (each value at most 255 bytes,
//! `fs/fsopen.c`). What the kernel says about a refusal is read back from the file system context and becomes part of the error.
//!
//! Facts: `kernel-notes.md`, "Mount API", "EROFS mounts" and "overlayfs".

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags};

/// Attributes of every mount that only overlayfs or EROFS reads: nothing in it can be written, is a device, or changes privilege, and no path
/// is followed through a symlink in it.
const SEALED: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_RDONLY
    .union(MountAttrFlags::MOUNT_ATTR_NODEV)
    .union(MountAttrFlags::MOUNT_ATTR_NOSUID)
    .union(MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW);

/// A mount was not made or not undone.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// This kernel does not have the file system, or not what was asked of it: another way must be taken.
    #[error("this kernel cannot mount {fs}{}", detail(kernel))]
    Unsupported {
        /// File system type.
        fs: &'static str,
        /// The kernel's own words, if it had any.
        kernel: String,
        /// `ENODEV` or `EOPNOTSUPP`.
        #[source]
        source: io::Error,
    },
    /// Something is in use: a mount that is to be undone, or an object that can be mounted once only.
    #[error("{} is busy{}", at.display(), detail(kernel))]
    Busy {
        /// Mount point.
        at: PathBuf,
        /// The kernel's own words, if it had any.
        kernel: String,
        /// `EBUSY` or `EEXIST`.
        #[source]
        source: io::Error,
    },
    /// Any other refusal.
    #[error("{step} of {fs} at {} failed{}", at.display(), detail(kernel))]
    Refused {
        /// File system type.
        fs: &'static str,
        /// The system call, with the option it was about.
        step: String,
        /// Mount point.
        at: PathBuf,
        /// The kernel's own words, if it had any.
        kernel: String,
        /// The errno.
        #[source]
        source: io::Error,
    },
}

fn detail(kernel: &str) -> String {
    if kernel.is_empty() { String::new() } else { format!(" (the kernel says: {kernel})") }
}

impl MountError {
    fn new(fs: &'static str, step: impl Into<String>, at: &Path, kernel: String, errno: rustix::io::Errno) -> MountError {
        use rustix::io::Errno;
        let (at, source) = (at.to_owned(), errno.into());
        match errno {
            Errno::NODEV | Errno::OPNOTSUPP | Errno::NOSYS => MountError::Unsupported { fs, kernel, source },
            Errno::BUSY | Errno::EXIST => MountError::Busy { at, kernel, source },
            _ => MountError::Refused { fs, step: step.into(), at, kernel, source },
        }
    }
}

/// A file system context: options in, a mount out.
struct Context<'a> {
    fd: OwnedFd,
    fs: &'static str,
    at: &'a Path,
}

impl<'a> Context<'a> {
    fn open(fs: &'static str, at: &'a Path) -> Result<Self, MountError> {
        let fd = rustix::mount::fsopen(fs, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|e| MountError::new(fs, "fsopen", at, String::new(), e))?;
        Ok(Context { fd, fs, at })
    }

    fn set(&self, key: &str, value: impl AsRef<OsStr>) -> Result<(), MountError> {
        let value = value.as_ref();
        rustix::mount::fsconfig_set_string(&self.fd, key, value).map_err(|e| self.error(format!("option {key}={}", value.to_string_lossy()), e))
    }

    fn set_flag(&self, key: &str) -> Result<(), MountError> {
        rustix::mount::fsconfig_set_flag(&self.fd, key).map_err(|e| self.error(format!("option {key}"), e))
    }

    fn mount(self, attributes: MountAttrFlags) -> Result<(), MountError> {
        rustix::mount::fsconfig_create(&self.fd).map_err(|e| self.error("mount", e))?;
        let mount = rustix::mount::fsmount(&self.fd, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(|e| self.error("fsmount", e))?;
        rustix::mount::move_mount(mount, "", CWD, self.at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(|e| self.error("move_mount", e))
    }

    fn error(&self, step: impl Into<String>, errno: rustix::io::Errno) -> MountError {
        MountError::new(self.fs, step, self.at, kernel_words(self.fd.as_fd()), errno)
    }
}

/// Reads the messages of a file system context (`fscontext_read`, `fs/fsopen.c`): one per read, each with a letter for its level and a space
/// before it; `ENODATA` after the last.
fn kernel_words(context: BorrowedFd<'_>) -> String {
    /// Enough for the longest message the kernel formats.
    const MESSAGE: usize = 1024;
    /// The kernel keeps eight messages (`struct fc_log`).
    const MESSAGES: usize = 8;
    let mut words: Vec<String> = Vec::new();
    let mut buffer = [0; MESSAGE];
    for _ in 0..MESSAGES {
        let Ok(len @ 1..) = rustix::io::read(context, &mut buffer) else { break };
        let text = String::from_utf8_lossy(&buffer[..len]);
        words.push(text.trim_end().trim_start_matches(|c: char| "wei".contains(c)).trim_start().to_owned());
    }
    words.join("; ")
}

/// Mounts the EROFS image in the file `metadata` at `at`, with `devices` as its extra devices in the order of its device table (Linux 6.12).
/// `ro,nodev,nosuid,nosymfollow`. `Unsupported` also where EROFS exists but wants a block device.
pub fn erofs_file_backed<P: AsRef<Path>>(metadata: &Path, devices: &[P], at: &Path) -> Result<(), MountError> {
    let context = Context::open("erofs", at)?;
    context.set("source", metadata)?;
    for device in devices {
        context.set("device", device.as_ref())?;
    }
    context.mount(SEALED).map_err(|error| match error {
        // Without file-backed mounts the kernel looks for a block device and says ENOTBLK (`fs/super.c`, get_tree_bdev).
        MountError::Refused { fs, kernel, source, .. } if source.raw_os_error() == Some(libc::ENOTBLK) => {
            MountError::Unsupported { fs, kernel, source }
        }
        other => other,
    })
}

/// Mounts the EROFS image that `/dev/cachefiles` gives under `fsid` (Linux 5.19 … 7.1). Extra devices are cookies named by their tags in the
/// image; with `domain` they are shared among mounts of that domain (6.1). `Busy` when this fsid is mounted already.
pub fn erofs_fscache(fsid: &str, domain: Option<&str>, at: &Path) -> Result<(), MountError> {
    let context = Context::open("erofs", at)?;
    context.set("source", fsid)?;
    context.set("fsid", fsid)?;
    if let Some(domain) = domain {
        context.set("domain_id", domain)?;
    }
    context.mount(SEALED)
}

/// What a FUSE mount is made with.
#[derive(Clone, Copy, Debug)]
pub struct FuseOptions<'a> {
    /// First column of the mount table.
    pub source: &'a str,
    /// The mount shows as `fuse.<subtype>`.
    pub subtype: &'a str,
    /// Largest read in bytes that the kernel sends.
    pub max_read: u32,
}

/// Opens `/dev/fuse` and mounts a file system that is served through it at `at`, its root a directory, readable for everybody,
/// `ro,nodev,nosuid,nosymfollow`. Gives the descriptor to serve; the kernel's `FUSE_INIT` is the first request on it.
pub fn fuse_open(at: &Path, options: FuseOptions<'_>) -> Result<OwnedFd, MountError> {
    use rustix::fs::{Mode, OFlags};
    let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|e| {
        let e = if e == rustix::io::Errno::NOENT { rustix::io::Errno::NODEV } else { e };
        MountError::new("fuse", "opening /dev/fuse", at, String::new(), e)
    })?;
    let context = Context::open("fuse", at)?;
    context.set("source", options.source)?;
    context.set("subtype", options.subtype)?;
    context.set("fd", device.as_raw_fd().to_string())?;
    context.set("rootmode", "40000")?;
    context.set("user_id", "0")?;
    context.set("group_id", "0")?;
    context.set_flag("allow_other")?;
    context.set("max_read", options.max_read.to_string())?;
    context.mount(SEALED)?;
    Ok(device)
}

/// `mount(2)` with options as words, as containerd hands mounts over: words that are flags become flags, the others go to the file system.
/// For overlays, whose list of lower layers may be longer than `fsconfig` takes (the kernel allows a page). `bind` with `ro` is two calls.
pub fn mount_with_options(fs: &str, source: &str, at: &Path, options: &[String]) -> io::Result<()> {
    let (flags, data) = split_options(options);
    if fs == "bind" {
        rustix::mount::mount(source, at, "", flags & (MountFlags::BIND | MountFlags::REC) | MountFlags::BIND, None)?;
        return Ok(rustix::mount::mount_remount(at, (flags - MountFlags::REC) | MountFlags::BIND, c"")?);
    }
    let data = std::ffi::CString::new(data)?;
    Ok(rustix::mount::mount(source, at, fs, flags, Some(data.as_c_str()))?)
}

fn split_options(options: &[String]) -> (MountFlags, String) {
    let mut flags = MountFlags::empty();
    let mut data: Vec<&str> = Vec::new();
    for option in options {
        match option.as_str() {
            "ro" => flags |= MountFlags::RDONLY,
            "rw" => flags -= MountFlags::RDONLY,
            "bind" => flags |= MountFlags::BIND,
            "rbind" => flags |= MountFlags::BIND | MountFlags::REC,
            "nodev" => flags |= MountFlags::NODEV,
            "nosuid" => flags |= MountFlags::NOSUID,
            "noexec" => flags |= MountFlags::NOEXEC,
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

/// How a mount is undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmount {
    /// Only if nothing uses it; else `Busy`.
    IfUnused,
    /// It disappears from the tree now and goes away when its last user does (`MNT_DETACH`). For mounts whose server is gone.
    Detach,
}

/// `umount2(at, UMOUNT_NOFOLLOW)`: undoes the topmost mount at `at`. Nothing mounted there is no error.
pub fn unmount(at: &Path, how: Unmount) -> Result<(), MountError> {
    let flags = match how {
        Unmount::IfUnused => UnmountFlags::NOFOLLOW,
        Unmount::Detach => UnmountFlags::NOFOLLOW | UnmountFlags::DETACH,
    };
    match rustix::mount::unmount(at, flags) {
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(()),
        Err(errno) => Err(MountError::new("the file system", "unmount", at, String::new(), errno)),
    }
}

/// One line of `/proc/<pid>/mountinfo` (`proc_pid_mountinfo(5)`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// Unique id of the mount.
    pub id: u32,
    /// The mount it is mounted on.
    pub parent: u32,
    /// Device number of the file system: major, minor.
    pub device: (u32, u32),
    /// The directory of the file system that is the root of this mount.
    pub root: PathBuf,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// Options of this mount, separated by commas.
    pub options: String,
    /// File system type, with subtype.
    pub fs_type: String,
    /// File system specific source.
    pub source: OsString,
    /// Options of the file system, separated by commas.
    pub fs_options: String,
}

/// What is mounted in this process's mount namespace, in mount order (a later line at the same place covers an earlier one).
pub fn mounts() -> io::Result<Vec<MountEntry>> {
    Ok(parse_mountinfo(&std::fs::read("/proc/self/mountinfo")?))
}

/// Whether something is mounted at exactly `at`, an absolute path without symlinks. Looks at the mount table only, so it works for mounts
/// whose server is gone.
pub fn is_mount_point(at: &Path) -> io::Result<bool> {
    Ok(mounts()?.iter().any(|entry| entry.mount_point == at))
}

/// Parses the text of a mountinfo file. Lines that do not have its form are left out.
pub fn parse_mountinfo(text: &[u8]) -> Vec<MountEntry> {
    text.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let mut device = fields.next()?.splitn(2, |byte| *byte == b':');
    let device = (number(device.next()?)?, number(device.next()?)?);
    let root = PathBuf::from(unescape(fields.next()?));
    let mount_point = PathBuf::from(unescape(fields.next()?));
    let options = text(fields.next()?);
    fields.by_ref().find(|field| *field == b"-")?;
    let fs_type = text(fields.next()?);
    let source = unescape(fields.next()?);
    let fs_options = text(fields.next()?);
    Some(MountEntry { id, parent, device, root, mount_point, options, fs_type, source, fs_options })
}

fn number(field: &[u8]) -> Option<u32> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn text(field: &[u8]) -> String {
    unescape(field).to_string_lossy().into_owned()
}

/// Undoes `mangle` of `fs/proc_namespace.c`: space, tab, newline, backslash and `#` are written as `\` and three octal digits.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let octal = |at: usize| tail.get(at).filter(|digit| (b'0'..=b'7').contains(digit)).map(|digit| u32::from(digit - b'0'));
        rest = tail;
        match (octal(0), octal(1), octal(2)) {
            (Some(high), Some(middle), Some(low)) if *first == b'\\' => {
                out.push((high << 6 | middle << 3 | low) as u8);
                rest = &tail[3..];
            }
            _ => out.push(*first),
        }
    }
    OsString::from_vec(out)
}

/// The inverse of the escaping, for tests and for whoever compares with raw text.
#[cfg(test)]
fn escape(path: &OsStr) -> Vec<u8> {
    let mut out = Vec::new();
    for byte in std::os::unix::ffi::OsStrExt::as_bytes(path) {
        match byte {
            b' ' | b'\t' | b'\n' | b'\\' | b'#' => out.extend_from_slice(format!("\\{byte:03o}").as_bytes()),
            _ => out.push(*byte),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn mount_lines_are_understood() {
        let check = |line: &str, expected: Option<(u32, &str, &str, &str, &str)>| {
            let parsed = parse_mountinfo(line.as_bytes());
            let got = parsed
                .first()
                .map(|e| (e.id, e.mount_point.to_str().expect("text"), e.fs_type.as_str(), e.source.to_str().expect("text"), e.fs_options.as_str()));
            assert_eq!(got, expected, "{line}");
        };
        check(
            "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue",
            Some((36, "/mnt2", "ext3", "/dev/root", "rw,errors=continue")),
        );
        check("36 35 0:5 / /a\\040b rw - erofs /x\\134y ro", Some((36, "/a b", "erofs", "/x\\y", "ro")));
        check(
            "36 35 0:5 / /many rw shared:1 master:2 propagate_from:3 unbindable - fuse.slipway slipway ro",
            Some((36, "/many", "fuse.slipway", "slipway", "ro")),
        );
        check("36 35 0:5 / /cut\\04 rw - tmpfs none rw", Some((36, "/cut\\04", "tmpfs", "none", "rw")));
        check("", None);
        check("36 35 0:5 / /no-separator rw shared:1", None);
        check("36 35 05 / /x rw - tmpfs none rw", None);
        check("x 35 0:5 / /x rw - tmpfs none rw", None);
    }

    #[test]
    fn bad_lines_do_not_hide_good_ones() {
        let text = b"rubbish\n36 35 0:5 / /x rw - tmpfs none rw\n\n1 1 0:6 / /y rw - proc proc rw\n";
        let points: Vec<_> = parse_mountinfo(text).into_iter().map(|entry| entry.mount_point).collect();
        assert_eq!(points, [Path::new("/x"), Path::new("/y")]);
    }

    #[test]
    fn this_process_sees_its_root_mounted() {
        assert!(is_mount_point(Path::new("/")).expect("mountinfo"));
        assert!(!is_mount_point(Path::new("/proc/self/nothing")).expect("mountinfo"));
    }

    #[test]
    fn unmounting_nothing_is_no_error() {
        let dir = tempfile::tempdir().expect("temporary directory");
        match unmount(dir.path(), Unmount::IfUnused) {
            Ok(()) => {}
            Err(MountError::Refused { source, .. }) if source.raw_os_error() == Some(libc::EPERM) => {}
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn refusals_tell_the_kernels_words_once() {
        let refused = |kernel: &str| MountError::new("erofs", "option device=/x", Path::new("/m"), kernel.to_owned(), rustix::io::Errno::INVAL);
        assert_eq!(refused("").to_string(), "option device=/x of erofs at /m failed");
        assert_eq!(refused("erofs: no magic").to_string(), "option device=/x of erofs at /m failed (the kernel says: erofs: no magic)");
        let source = std::error::Error::source(&refused("")).map(ToString::to_string);
        assert_eq!(source, Some("Invalid argument (os error 22)".to_owned()));
    }

    #[test]
    fn option_words_are_flags_or_the_file_systems() {
        let check = |options: &[&str], flags, data: &str| {
            let options: Vec<String> = options.iter().map(ToString::to_string).collect();
            assert_eq!(split_options(&options), (flags, data.to_owned()), "{options:?}");
        };
        check(&[], MountFlags::empty(), "");
        check(&["ro", "lowerdir=/a:/b", "userxattr"], MountFlags::RDONLY, "lowerdir=/a:/b,userxattr");
        check(&["rbind", "ro", "rw", "nodev"], MountFlags::BIND | MountFlags::REC | MountFlags::NODEV, "");
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in proptest::collection::vec(any::<u8>(), 0..300)) {
            parse_mountinfo(&text);
        }

        #[test]
        fn parsing_never_panics_on_words(text in "[0-9a-z:,/ \\\\\\-\n]{0,200}") {
            parse_mountinfo(text.as_bytes());
        }

        #[test]
        fn any_path_round_trips(path in proptest::collection::vec(1u8.., 1..60)) {
            let path = OsString::from_vec(path);
            let mut line = b"36 35 98:0 / ".to_vec();
            line.extend(escape(&path));
            line.extend(b" rw - ext4 /dev/x rw");
            let parsed = parse_mountinfo(&line);
            prop_assert_eq!(parsed.len(), 1);
            prop_assert_eq!(parsed[0].mount_point.as_os_str(), &path);
        }
    }
}
