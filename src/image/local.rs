//! The node's own copies of metadata images, layer trees and records: whole or absent, verified when first used by this process.
//!
//! ```text
//! <state>/meta/<digest>.erofs        metadata image, as the kernel mounts it
//! <state>/trees/<digest>.tree        layer tree, uncompressed
//! <state>/records/<chain id>.json    signed record last found for the chain
//! ```
//!
//! Digests are those of the store. Files appear by rename and without fsync, since a pull waits for them while a slow disk may be busy: a power
//! cut can lose one or leave it torn, which its digest (a record's signature) tells the next process; it is then removed, and so fetched
//! again. Before an image is mounted its metadata is made durable, as from then on the kernel reads it without verifying: a write that the disk
//! refused would otherwise show as other bytes.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use erofs::digest::Digest;

use crate::oci::ChainId;

const META: &str = "meta";
const TREES: &str = "trees";
const RECORDS: &str = "records";
const DIRECTORIES: [&str; 3] = [META, TREES, RECORDS];

/// Begins the names of files being written, and no others.
const UNFINISHED: &str = ".";

/// Content a node keeps under its digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kept {
    /// A metadata image.
    Meta(Digest),
    /// A layer tree.
    Tree(Digest),
}

impl Kept {
    fn digest(self) -> Digest {
        match self {
            Kept::Meta(digest) | Kept::Tree(digest) => digest,
        }
    }
}

/// Files below the node's state directory.
#[derive(Debug)]
pub(super) struct LocalFiles {
    state: PathBuf,
    /// What this process has seen to match its digest (invariant 5). Never held during I/O.
    verified: Mutex<HashSet<Kept>>,
    /// What this process has seen to be on disk. Never held during I/O.
    durable: Mutex<HashSet<Kept>>,
    /// Makes names of unfinished files differ.
    temp: AtomicU64,
}

impl LocalFiles {
    pub fn new(state: PathBuf) -> LocalFiles {
        LocalFiles { state, verified: Mutex::default(), durable: Mutex::default(), temp: AtomicU64::new(0) }
    }

    /// Removes what killed processes left half written. Nobody else may be writing here.
    pub fn remove_unfinished(&self) {
        for dir in DIRECTORIES.map(|name| self.state.join(name)) {
            // A directory that is not there yet has nothing in it, and one that cannot be read says so when it is needed.
            for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
                if entry.file_name().as_encoded_bytes().starts_with(UNFINISHED.as_bytes())
                    && let Err(error) = fs::remove_file(entry.path())
                {
                    tracing::warn!(path = %entry.path().display(), %error, "a file that was never finished stays");
                }
            }
        }
    }

    /// Where a file lies, or would.
    pub fn path(&self, kept: Kept) -> PathBuf {
        match kept {
            Kept::Meta(digest) => self.state.join(META).join(format!("{digest}.erofs")),
            Kept::Tree(digest) => self.state.join(TREES).join(format!("{digest}.tree")),
        }
    }

    /// Where the record of a chain lies, or would.
    pub fn record_path(&self, chain: &ChainId) -> PathBuf {
        self.state.join(RECORDS).join(format!("{chain}.json"))
    }

    /// Whether the file is there and verified; reads it if this process has not yet.
    pub fn has(&self, kept: Kept) -> io::Result<bool> {
        if self.verified.lock().unwrap_or_else(PoisonError::into_inner).contains(&kept) && self.path(kept).is_file() {
            return Ok(true);
        }
        Ok(self.read(kept)?.is_some())
    }

    /// The file's bytes, verified just now. `None` when it is not there, or was damaged and has been removed.
    pub fn read(&self, kept: Kept) -> io::Result<Option<Vec<u8>>> {
        let path = self.path(kept);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut verified = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        if Digest::of(&bytes) == kept.digest() {
            verified.insert(kept);
            return Ok(Some(bytes));
        }
        verified.remove(&kept);
        drop(verified);
        tracing::warn!(path = %path.display(), "a local file does not match its digest: removing it");
        fs::remove_file(&path)?;
        Ok(None)
    }

    /// Keeps bytes that the caller has verified.
    pub fn put(&self, kept: Kept, bytes: &[u8]) -> io::Result<()> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner).remove(&kept);
        self.write(&self.path(kept), bytes)?;
        self.verified.lock().unwrap_or_else(PoisonError::into_inner).insert(kept);
        Ok(())
    }

    /// Waits until the file is on disk, once in the life of this process. One that the disk refuses is removed.
    pub fn make_durable(&self, kept: Kept) -> io::Result<()> {
        if self.durable.lock().unwrap_or_else(PoisonError::into_inner).contains(&kept) {
            return Ok(());
        }
        let path = self.path(kept);
        if let Err(error) = File::open(&path)?.sync_data() {
            self.verified.lock().unwrap_or_else(PoisonError::into_inner).remove(&kept);
            let _ = fs::remove_file(&path);
            return Err(error);
        }
        self.durable.lock().unwrap_or_else(PoisonError::into_inner).insert(kept);
        Ok(())
    }

    /// The record kept for a chain, unverified.
    pub fn read_record(&self, chain: &ChainId) -> io::Result<Option<Vec<u8>>> {
        match fs::read(self.record_path(chain)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Keeps a chain's record instead of the one before.
    pub fn put_record(&self, chain: &ChainId, record: &[u8]) -> io::Result<()> {
        if self.read_record(chain)?.is_some_and(|kept| kept == record) {
            return Ok(());
        }
        self.write(&self.record_path(chain), record)
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let dir = path.parent().expect("local files lie in directories");
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let temp = dir.join(format!("{UNFINISHED}{}", self.temp.fetch_add(1, Relaxed)));
        let written = fs::write(&temp, bytes).and_then(|()| fs::rename(&temp, path));
        if written.is_err() {
            let _ = fs::remove_file(&temp);
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_whole_or_absent() {
        let state = tempfile::tempdir().unwrap();
        let kept = Kept::Meta(Digest::of(b"image"));
        let files = LocalFiles::new(state.path().join("state"));
        assert!(!files.has(kept).unwrap());
        files.put(kept, b"image").unwrap();
        assert!(files.has(kept).unwrap());
        assert_eq!(files.read(kept).unwrap().unwrap(), b"image");
        assert_eq!(fs::read_dir(state.path().join("state/meta")).unwrap().count(), 1, "no temporary file stays");
        fs::remove_file(files.path(kept)).unwrap();
        assert!(!files.has(kept).unwrap(), "a file that vanished is not remembered");
    }

    #[test]
    fn the_next_process_verifies_and_removes_what_is_damaged() {
        let state = tempfile::tempdir().unwrap();
        let kept = Kept::Tree(Digest::of(b"tree"));
        for damage in [&b"tre"[..], b"", b"tRee", b"tree "] {
            LocalFiles::new(state.path().to_owned()).put(kept, b"tree").unwrap();
            let next = LocalFiles::new(state.path().to_owned());
            assert!(next.has(kept).unwrap());
            let after = LocalFiles::new(state.path().to_owned());
            fs::write(after.path(kept), damage).unwrap();
            assert!(!after.has(kept).unwrap(), "{damage:?}");
            assert!(!after.path(kept).exists(), "{damage:?}");
        }
    }

    #[test]
    fn what_a_killed_process_left_half_written_goes_and_the_rest_stays() {
        let state = tempfile::tempdir().unwrap();
        let kept = [Kept::Tree(Digest::of(b"tree")), Kept::Meta(Digest::of(b"image"))];
        let chain = ChainId(crate::oci::Sha256::of(b"c"));
        let files = LocalFiles::new(state.path().to_owned());
        // Also before there is any directory.
        files.remove_unfinished();
        kept.iter().zip([&b"tree"[..], b"image"]).for_each(|(kept, bytes)| files.put(*kept, bytes).unwrap());
        files.put_record(&chain, b"record").unwrap();
        for path in [files.path(kept[0]), files.path(kept[1]), files.record_path(&chain)] {
            fs::write(path.with_file_name(".4711.0"), b"half").unwrap();
        }
        let next = LocalFiles::new(state.path().to_owned());
        next.remove_unfinished();
        assert!(kept.iter().all(|kept| next.has(*kept).unwrap()) && next.read_record(&chain).unwrap().is_some());
        for dir in DIRECTORIES {
            assert_eq!(fs::read_dir(state.path().join(dir)).unwrap().count(), 1, "{dir}");
        }
    }

    #[test]
    fn what_is_to_be_mounted_is_waited_for() {
        let state = tempfile::tempdir().unwrap();
        let kept = Kept::Meta(Digest::of(b"image"));
        let files = LocalFiles::new(state.path().to_owned());
        assert_eq!(files.make_durable(kept).unwrap_err().kind(), io::ErrorKind::NotFound);
        files.put(kept, b"image").unwrap();
        files.make_durable(kept).unwrap();
        fs::remove_file(files.path(kept)).unwrap();
        assert!(!files.has(kept).unwrap());
        files.put(kept, b"image").unwrap();
        assert!(!files.durable.lock().unwrap().contains(&kept), "a file written again is waited for again");
    }

    #[test]
    fn the_last_record_of_a_chain_is_kept() {
        let state = tempfile::tempdir().unwrap();
        let files = LocalFiles::new(state.path().to_owned());
        let chain = ChainId(crate::oci::Sha256::of(b"c"));
        assert_eq!(files.read_record(&chain).unwrap(), None);
        for record in [b"one", b"one", b"two"] {
            files.put_record(&chain, record).unwrap();
            assert_eq!(files.read_record(&chain).unwrap().unwrap(), record);
        }
    }
}
