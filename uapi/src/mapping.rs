//! Read-only memory maps of files that do not change.
//!
//! A mapped file that shrinks raises SIGBUS and one that is written changes under a `&[u8]`. So only finished files are mapped: regular, with
//! no write permission for anybody, and never a lazily filled cache file or anything on the shared store.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::unix::fs::PermissionsExt;

/// The whole content of a finished file.
#[derive(Debug)]
pub struct Mapping(memmap2::Mmap);

impl Mapping {
    /// `mmap(PROT_READ, MAP_PRIVATE)` of all of `file`. The file must be a regular file with no write permission bit set, which is how
    /// finished files are left by those who write them; anything else is an `InvalidInput` error.
    pub fn of(file: &File) -> io::Result<Mapping> {
        let meta = file.metadata()?;
        if !meta.is_file() || meta.permissions().mode() & 0o222 != 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "only a finished file (regular, no write permission) can be mapped"));
        }
        // SAFETY: a mapping is sound while nobody shrinks or writes the file. It is finished: its mode forbids writing, and Slipway, which
        // owns its directories (0700), replaces such files by rename or link and never opens one for writing again.
        Ok(Mapping(unsafe { memmap2::Mmap::map(file)? }))
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};

    #[test]
    fn only_finished_files_are_mapped() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("file");
        fs::write(&path, b"content").expect("write");
        for (mode, mapped) in [(0o644, false), (0o600, false), (0o444, true), (0o400, true)] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).expect("chmod");
            let file = File::open(&path).expect("open");
            assert_eq!(Mapping::of(&file).is_ok_and(|m| *m == *b"content"), mapped, "{mode:o}");
        }
        assert!(Mapping::of(&File::open(dir.path()).expect("open")).is_err(), "a directory");
    }

    #[test]
    fn an_empty_file_is_an_empty_slice() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("file");
        fs::write(&path, b"").expect("write");
        fs::set_permissions(&path, Permissions::from_mode(0o400)).expect("chmod");
        assert_eq!(Mapping::of(&File::open(&path).expect("open")).expect("map").len(), 0);
    }
}
