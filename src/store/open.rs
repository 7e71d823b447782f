//! Opening what is in the store: beneath its directory, through no symbolic link, regular files only.
//!
//! Whoever can write the shared file system could put a link, a fifo or a device where a file belongs. `openat2(2)` refuses links and
//! escapes for every component of a path in one call, so there is no moment between a check and its use.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags, fcntl_setfl, fstat, openat2};
use rustix::io::Errno;

use super::StoreError;
use super::error::Doing;

const RESOLVE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// Names a directory of the store is read to at most. A directory of records or image roots holds a handful; more than this is
/// someone filling memory.
const MAX_NAMES: usize = 65_536;

/// Opens the regular file `path` below `root` for reading. `shown` is the whole path, for messages.
pub(super) fn regular(root: impl AsFd, path: &Path, shown: &Path) -> Result<File, StoreError> {
    let error = |errno| StoreError::from_errno(Doing::Reading, shown, errno);
    // O_NONBLOCK: opening a fifo that someone put here must not wait for a writer.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    let fd = openat2(root, path, flags, Mode::empty(), RESOLVE).map_err(error)?;
    if FileType::from_raw_mode(fstat(&fd).map_err(error)?.st_mode) != FileType::RegularFile {
        return Err(StoreError::Foreign { path: shown.to_owned() });
    }
    // io_uring takes a file for something else with it than without (`io_file_supports_nowait`, io_uring/rw.c): from here on it is a file
    // like any other.
    fcntl_setfl(&fd, OFlags::empty()).map_err(error)?;
    Ok(File::from(fd))
}

/// Length of the regular file `path` below `root`, or `None` when it is not there. Does not open it as far as a file server is concerned.
pub(super) fn file_len(root: impl AsFd, path: &Path, shown: &Path) -> Result<Option<u64>, StoreError> {
    let stat = openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), RESOLVE).and_then(fstat);
    match stat {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => Ok(u64::try_from(stat.st_size).ok()),
        Ok(_) => Err(StoreError::Foreign { path: shown.to_owned() }),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(StoreError::from_errno(Doing::Reading, shown, errno)),
    }
}

/// Opens the directory `path` below `root`.
pub(super) fn directory(root: impl AsFd, path: &Path, shown: &Path, doing: Doing) -> Result<OwnedFd, StoreError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat2(root, path, flags, Mode::empty(), RESOLVE).map_err(|errno| StoreError::from_errno(doing, shown, errno))
}

/// Creates the file `name` in the directory `dir`; it must not exist.
pub(super) fn create(dir: impl AsFd, name: &str, shown: &Path) -> Result<File, StoreError> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let fd = openat2(dir, name, flags, Mode::from_raw_mode(0o644), RESOLVE).map_err(|errno| StoreError::from_errno(Doing::Writing, shown, errno))?;
    Ok(File::from(fd))
}

/// The names in the directory `path` below `root`, in byte order, without `.` and `..` and without names that are not UTF-8 (none of
/// ours are). A directory that is not there has none.
pub(super) fn names(root: impl AsFd, path: &Path, shown: &Path) -> Result<Vec<String>, StoreError> {
    let fd = match directory(root, path, shown, Doing::Reading) {
        Ok(fd) => fd,
        Err(StoreError::Missing { .. }) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let error = |errno| StoreError::from_errno(Doing::Reading, shown, errno);
    let mut names = Vec::new();
    for entry in Dir::read_from(&fd).map_err(error)? {
        let entry = entry.map_err(error)?;
        match entry.file_name().to_str() {
            Ok("." | "..") | Err(_) => {}
            Ok(name) => names.push(name.to_owned()),
        }
        if names.len() > MAX_NAMES {
            return Err(StoreError::Damaged { path: shown.to_owned(), reason: format!("holds more than {MAX_NAMES} names") });
        }
    }
    names.sort_unstable();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::fs::{CWD, fcntl_getfl, mknodat};

    use super::*;

    #[test]
    fn only_regular_files_inside_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("d")).unwrap();
        std::fs::write(at("d/file"), b"x").unwrap();
        symlink("file", at("d/link")).unwrap();
        symlink("d", at("dirlink")).unwrap();
        symlink("/etc", at("out")).unwrap();
        mknodat(CWD, at("d/fifo"), FileType::Fifo, Mode::from_raw_mode(0o644), 0).unwrap();
        let root = File::open(dir.path()).unwrap();
        let check = |path: &str, expected: &str| {
            let found = match regular(&root, Path::new(path), Path::new(path)) {
                Ok(_) => "ok",
                Err(StoreError::Missing { .. }) => "missing",
                Err(StoreError::Foreign { .. }) => "foreign",
                Err(error) => panic!("{path}: {error}"),
            };
            assert_eq!(found, expected, "{path}");
            let len = match file_len(&root, Path::new(path), Path::new(path)) {
                Ok(Some(1)) => "ok",
                Ok(None) => "missing",
                Err(StoreError::Foreign { .. }) => "foreign",
                other => panic!("{path}: {other:?}"),
            };
            assert_eq!(len, expected, "{path}");
        };
        check("d/file", "ok");
        check("d/other", "missing");
        check("d/link", "foreign");
        check("dirlink/file", "foreign");
        check("out/passwd", "foreign");
        check("../d/file", "foreign");
        check("/etc/passwd", "foreign");
        check("d/file/x", "foreign");
        check("d", "foreign");
        check("d/fifo", "foreign");
    }

    #[test]
    fn an_opened_file_blocks_as_files_do() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("f"), b"x").unwrap();
        let file = regular(File::open(dir.path()).unwrap(), Path::new("f"), Path::new("f")).unwrap();
        assert!(!fcntl_getfl(&file).unwrap().contains(OFlags::NONBLOCK));
    }

    #[test]
    fn names_come_sorted_and_a_missing_directory_has_none() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b", "a", "B"] {
            std::fs::write(dir.path().join(name), b"").unwrap();
        }
        let root = File::open(dir.path()).unwrap();
        assert_eq!(names(&root, Path::new("."), dir.path()).unwrap(), ["B", "a", "b"]);
        assert!(names(&root, Path::new("none"), dir.path()).unwrap().is_empty());
    }
}
