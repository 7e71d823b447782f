//! A tar file whose parts are read where they lie: indexed once by seeking over the data, never unpacked.
//!
//! What a name means follows `docker load`, which unpacks: of several entries with a name the last counts, symlinks are followed within
//! the archive, and an entry that leads out of it spoils the whole.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream;
use tar_core::EntryType;
use tar_core::parse::{Limits, ParseEvent, Parser};
use tokio::sync::OnceCell;
use tokio_util::io::StreamReader;

use super::OciError;
use super::blob::BlobStream;

/// Entries of one archive: images have a handful per layer. The index is kept in memory.
const MAX_ENTRIES: usize = 100_000;
/// Symlinks on the way to one file, as in Linux.
const MAX_LINKS: usize = 40;
/// Read at once for the headers of an entry: without extensions one block of 512 bytes is all of them.
const HEADER_READ: usize = 4096;
/// Read at once of a part: enough that a trip to the thread that reads costs nothing beside it.
const DATA_READ: u64 = 256 << 10;

/// Beginnings of compressed files, and the programs that undo them.
const COMPRESSED: [(&[u8], &str); 4] = [(b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"\xfd7zXZ\0", "xz"), (b"BZh", "bzip2")];

/// A tar file, opened and indexed when first used. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Archive {
    path: PathBuf,
    index: Arc<OnceCell<Index>>,
}

/// Where a file's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    offset: u64,
    /// How many there are.
    pub len: u64,
}

#[derive(Debug)]
struct Index {
    file: Arc<File>,
    entries: HashMap<String, Entry>,
}

#[derive(Clone, Debug)]
enum Entry {
    File(Part),
    Link(String),
    /// Something without bytes.
    Other,
}

impl Archive {
    /// The archive at `path`, made absolute. Nothing is read yet.
    pub fn new(path: &Path) -> Result<Archive, OciError> {
        let absolute = std::path::absolute(path).map_err(|e| OciError::Archive { path: path.to_owned(), reason: e.to_string() })?;
        Ok(Archive { path: absolute, index: Arc::default() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file called `name`, if there is one.
    pub async fn find(&self, name: &str) -> Result<Option<Part>, OciError> {
        self.index().await?.find(name).map_err(|reason| self.unusable(reason))
    }

    /// The file called `name`, which must be there.
    pub async fn part(&self, name: &str) -> Result<Part, OciError> {
        self.find(name).await?.ok_or_else(|| self.unusable(format!("there is no {name:?} in it")))
    }

    /// All bytes of `part`, at most `limit`; `what` is for the error of larger ones.
    pub async fn read(&self, what: &str, part: Part, limit: u64) -> Result<Vec<u8>, OciError> {
        if part.len > limit {
            return Err(self.unusable(format!("{what} is larger than {limit} bytes, the most that is read of one")));
        }
        self.piece(part).await
    }

    /// The bytes of `part` as a stream.
    pub async fn stream(&self, part: Part) -> Result<BlobStream, OciError> {
        self.index().await?;
        let pieces = stream::try_unfold((self.clone(), part), |(archive, rest)| async move {
            let len = rest.len.min(DATA_READ);
            if len == 0 {
                return Ok(None);
            }
            let bytes = archive.piece(Part { len, ..rest }).await.map_err(io::Error::other)?;
            Ok::<_, io::Error>(Some((Bytes::from(bytes), (archive, Part { offset: rest.offset + len, len: rest.len - len }))))
        });
        Ok(Box::new(StreamReader::new(Box::pin(pieces))))
    }

    async fn piece(&self, part: Part) -> Result<Vec<u8>, OciError> {
        let file = self.index().await?.file.clone();
        let read = move || {
            let mut bytes = vec![0; part.len as usize];
            file.read_exact_at(&mut bytes, part.offset).map(|()| bytes)
        };
        let read = tokio::task::spawn_blocking(read).await.expect("reading does not panic");
        read.map_err(|e| self.unusable(format!("it cannot be read at byte {}: {e}", part.offset)))
    }

    async fn index(&self) -> Result<&Index, OciError> {
        let build = async || {
            let path = self.path.clone();
            let built = tokio::task::spawn_blocking(move || Index::build(&path)).await.expect("indexing does not panic");
            built.map_err(|reason| self.unusable(reason))
        };
        self.index.get_or_try_init(build).await
    }

    /// The error that says so.
    pub fn unusable(&self, reason: String) -> OciError {
        OciError::Archive { path: self.path.clone(), reason }
    }
}

impl Index {
    fn build(path: &Path) -> Result<Index, String> {
        // A pipe would hang, and nothing can be read from it twice.
        let metadata = std::fs::metadata(path).map_err(|e| e.to_string())?;
        if !metadata.is_file() {
            return Err("it is not a regular file".to_owned());
        }
        let file = File::open(path).map_err(|e| e.to_string())?;
        let mut index = Index { file: Arc::new(file), entries: HashMap::new() };
        index.refuse_compressed(path)?;
        index.read_entries(metadata.len())?;
        Ok(index)
    }

    fn refuse_compressed(&self, path: &Path) -> Result<(), String> {
        let mut start = Vec::new();
        fill(&self.file, &mut start, 0, 8)?;
        match COMPRESSED.iter().find(|(magic, _)| start.starts_with(magic)) {
            Some((_, program)) => {
                Err(format!("it is compressed, so its parts cannot be read where they lie: decompress it first, `{program} -dk {}`", path.display()))
            }
            None => Ok(()),
        }
    }

    fn read_entries(&mut self, file_len: u64) -> Result<(), String> {
        let mut parser = Parser::new(Limits::default());
        parser.set_allow_empty_path(true);
        let mut at = 0;
        let mut buffer = Vec::new();
        let mut seen = 0;
        loop {
            if buffer.is_empty() {
                fill(&self.file, &mut buffer, at, HEADER_READ)?;
                // Some writers leave the two blocks of zeros out.
                if buffer.is_empty() {
                    return Ok(());
                }
            }
            let broken = |what: String| format!("it is no tar archive, or a damaged one: at byte {at}: {what}");
            let (consumed, entry) = match parser.parse(&buffer).map_err(|e| broken(e.to_string()))? {
                ParseEvent::NeedData { min_bytes } => {
                    fill(&self.file, &mut buffer, at, min_bytes)?;
                    if buffer.len() < min_bytes {
                        return Err(broken("it breaks off in a header".to_owned()));
                    }
                    continue;
                }
                ParseEvent::End { .. } => return Ok(()),
                ParseEvent::GlobalExtensions { consumed, .. } => (consumed, None),
                ParseEvent::SparseEntry { .. } => return Err(broken("a sparse entry, which no tool writes for images".to_owned())),
                ParseEvent::Entry { consumed, entry } => (consumed, Some(entry)),
            };
            at += consumed as u64;
            if let Some(entry) = entry {
                let name = String::from_utf8_lossy(&entry.path).into_owned();
                let target = entry.link_target.as_ref().map(|target| String::from_utf8_lossy(target).into_owned()).unwrap_or_default();
                // Only files have data, whatever a size says (Go's archive/tar, isHeaderOnly).
                let len = if has_data(entry.entry_type) && !name.ends_with('/') { entry.size } else { 0 };
                let end = len.checked_next_multiple_of(512).and_then(|padded| at.checked_add(padded));
                if at.checked_add(len).is_none_or(|end| end > file_len) {
                    return Err(format!("it is cut short: {name:?} should have {len} bytes, and the file ends before"));
                }
                self.add(&name, entry.entry_type, &target, Part { offset: at, len })?;
                at = end.unwrap_or(u64::MAX);
                seen += 1;
            }
            if seen > MAX_ENTRIES {
                return Err(format!("it has more than {MAX_ENTRIES} entries, so it is no archive of an image"));
            }
            buffer.clear();
        }
    }

    fn add(&mut self, name: &str, kind: EntryType, target: &str, part: Part) -> Result<(), String> {
        let mut clean = Vec::new();
        for component in name.split('/') {
            match component {
                "" | "." => {}
                ".." => {
                    clean.pop().ok_or_else(|| format!("the entry {name:?} leads out of it"))?;
                }
                _ => clean.push(component),
            }
        }
        let entry = match kind {
            EntryType::Symlink => Entry::Link(target.to_owned()),
            // What the name stands for now: a later entry with that name does not change it.
            EntryType::Link => self.find(target)?.map_or(Entry::Other, Entry::File),
            _ if has_data(kind) && !name.ends_with('/') => Entry::File(part),
            _ => Entry::Other,
        };
        self.entries.insert(clean.join("/"), entry);
        Ok(())
    }

    /// Follows symlinks, also in the middle; `..` stays within the archive.
    fn find(&self, name: &str) -> Result<Option<Part>, String> {
        let mut todo: Vec<&str> = name.split('/').rev().collect();
        let mut at: Vec<&str> = Vec::new();
        let mut links = 0;
        while let Some(component) = todo.pop() {
            match component {
                "" | "." => {}
                ".." => {
                    at.pop();
                }
                _ => {
                    at.push(component);
                    let Some(Entry::Link(target)) = self.entries.get(&at.join("/")) else { continue };
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(format!("{name:?} is a symlink that leads in a circle"));
                    }
                    at.pop();
                    if target.starts_with('/') {
                        at.clear();
                    }
                    todo.extend(target.split('/').rev());
                }
            }
        }
        match self.entries.get(&at.join("/")) {
            Some(Entry::File(part)) => Ok(Some(*part)),
            _ => Ok(None),
        }
    }
}

fn has_data(kind: EntryType) -> bool {
    !matches!(kind, EntryType::Link | EntryType::Symlink | EntryType::Char | EntryType::Block | EntryType::Directory | EntryType::Fifo)
}

/// Reads on from `at` until `buffer` has `len` bytes or the file ends.
fn fill(file: &File, buffer: &mut Vec<u8>, at: u64, len: usize) -> Result<(), String> {
    let mut have = buffer.len();
    buffer.resize(len.max(have), 0);
    while have < len {
        match file.read_at(&mut buffer[have..], at + have as u64) {
            Ok(0) => break,
            Ok(more) => have += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(format!("it cannot be read at byte {}: {error}", at + have as u64)),
        }
    }
    buffer.truncate(have);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A block of a header: name, kind (`0` file, `1` hard link, `2` symlink, `5` directory), link target, size of the data.
    fn header(name: &str, kind: u8, link: &str, size: usize) -> Vec<u8> {
        let mut block = vec![0; 512];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[100..107].copy_from_slice(b"0000644");
        block[108..115].copy_from_slice(b"0000000");
        block[116..123].copy_from_slice(b"0000000");
        block[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
        block[136..147].copy_from_slice(b"00000000000");
        block[156] = kind;
        block[157..157 + link.len()].copy_from_slice(link.as_bytes());
        block[257..265].copy_from_slice(b"ustar\x0000");
        block[148..156].copy_from_slice(b"        ");
        let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        block
    }

    fn file(name: &str, data: &str) -> Vec<u8> {
        let mut bytes = header(name, b'0', "", data.len());
        bytes.extend(data.bytes());
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes
    }

    fn link(name: &str, target: &str) -> Vec<u8> {
        header(name, b'2', target, 0)
    }

    fn tar(entries: &[Vec<u8>]) -> Vec<u8> {
        [entries.concat(), vec![0; 1024]].concat()
    }

    async fn read(bytes: &[u8], name: &str) -> Result<Option<String>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tar");
        std::fs::write(&path, bytes).unwrap();
        let archive = Archive::new(&path).unwrap();
        let found = async {
            let Some(part) = archive.find(name).await? else { return Ok(None) };
            archive.read(name, part, 1000).await.map(Some)
        };
        found.await.map(|bytes| bytes.map(|bytes| String::from_utf8(bytes).unwrap())).map_err(|e| e.to_string())
    }

    #[tokio::test]
    async fn names_mean_what_they_mean_after_unpacking() {
        let entries = tar(&[
            file("a", "first"),
            header("hard", b'1', "a", 0),
            file("./a", "last"),
            file("/dir/../b", "b"),
            link("to-a", "a"),
            link("x/layer.tar", "../b"),
            link("d", "x"),
            link("up", "../../../b"),
            link("abs", "/x/layer.tar"),
            link("nowhere", "gone"),
            header("gone-link", b'1', "gone", 0),
            file("dir", "was a file"),
            header("dir/", b'5', "", 0),
        ]);
        for (name, expected) in [
            ("a", Some("last")),
            ("hard", Some("first")),
            ("b", Some("b")),
            ("to-a", Some("last")),
            ("x/layer.tar", Some("b")),
            ("d/layer.tar", Some("b")),
            ("./d//layer.tar", Some("b")),
            ("up", Some("b")),
            ("abs", Some("b")),
            ("../../a", Some("last")),
            ("nowhere", None),
            ("gone-link", None),
            ("dir", None),
            ("", None),
        ] {
            assert_eq!(read(&entries, name).await.unwrap().as_deref(), expected, "{name}");
        }
    }

    #[tokio::test]
    async fn hostile_and_broken_archives_are_refused() {
        let whole = tar(&[file("a", "0123456789"), file("b", "x")]);
        for (bytes, name, part) in [
            (tar(&[link("a", "b"), link("b", "a")]), "a", "leads in a circle"),
            (tar(&[link("a", "a/a")]), "a", "leads in a circle"),
            (tar(&[file("../a", "x")]), "a", "leads out of it"),
            (tar(&[file("a/../../b", "x")]), "b", "leads out of it"),
            (tar(&[header("a", b'0', "", 1 << 32)]), "a", "cut short"),
            (whole[..515].to_vec(), "a", "cut short"),
            (whole[..1300].to_vec(), "a", "breaks off in a header"),
            (vec![b'x'; 2000], "a", "no tar archive"),
            (b"\x1f\x8b\x08\0\0\0\0\0\0".to_vec(), "a", "decompress it first, `gzip -dk"),
            (b"\x28\xb5\x2f\xfd\0\0\0".to_vec(), "a", "`zstd -dk"),
            (tar(&[file("a", &"x".repeat(1001))]), "a", "larger than 1000 bytes"),
        ] {
            let message = read(&bytes, name).await.unwrap_err();
            assert!(message.contains(part) && message.contains("a.tar"), "{message:?} lacks {part:?}");
        }
        // Complete up to a boundary between entries: as other readers, it is taken as it is.
        assert_eq!(read(&whole[..1024], "a").await.unwrap().as_deref(), Some("0123456789"));
    }

    #[tokio::test]
    async fn what_is_no_file_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        for (path, part) in [(dir.path().to_owned(), "not a regular file"), (dir.path().join("absent"), "No such file")] {
            let message = Archive::new(&path).unwrap().find("a").await.unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_indexed_or_not_without_panic(
            damage in proptest::collection::vec((0usize..4000, any::<u8>()), 0..6),
            cut in 0usize..4000,
        ) {
            let mut bytes = tar(&[file("a", "0123456789"), link("b", "a"), header("c", b'1', "a", 0), file("d", &"y".repeat(600))]);
            for (at, byte) in damage {
                if let Some(old) = bytes.get_mut(at) {
                    *old = byte;
                }
            }
            bytes.truncate(cut.max(1));
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a.tar");
            std::fs::write(&path, bytes).unwrap();
            if let Ok(index) = Index::build(&path) {
                for name in ["a", "b", "c", "d"] {
                    let _ = index.find(name);
                }
            }
        }
    }
}
