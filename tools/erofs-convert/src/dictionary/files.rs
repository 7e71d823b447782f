//! Segments in the state directory: found, added, merged.
//!
//! They spare work and are never needed: a file that is damaged, of another program or of a newer version is thrown away, and when a segment
//! cannot be written it is used from memory for this once. One converter at a time has the directory, who holds the lock; another waits, and finds
//! then what the first has read from the store. Files are never changed: they get their name when they are complete and lose it when their content is
//! in another, and who has one mapped goes on with it.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use erofs::digest::Digest;
use tokio_util::sync::CancellationToken;
use uapi::mapping::Mapping;

use super::segment::{Bytes, MAX_ENTRIES, Segment, write};

/// A segment is merged with those that come after it when they have more than one in so many of its entries. So an entry is copied a
/// few times at most while a store grows a thousandfold, and there are not more segments than a look-up may ask.
const RATIO: u64 = 4;

/// A lock that is waited for is tried this often: the kernel's own wait would not end when the user wants to stop.
const LOCK_EVERY: Duration = Duration::from_millis(50);

const SUFFIX: &str = "segment";
const UNFINISHED: &str = "unfinished";

/// The segments of a store.
pub(super) struct Files {
    dir: PathBuf,
    /// Held as long as this lives; without it the directory is not changed.
    lock: Option<File>,
    /// The largest first; those without a file are in memory only.
    segments: Vec<(Option<PathBuf>, Segment)>,
}

impl Files {
    /// The segments in `dir`, which is made if need be. Says so when it has to wait for another converter, and does not wait once told to `stop`.
    pub fn open(dir: &Path, stop: &CancellationToken, say_waiting: impl FnOnce()) -> Files {
        let lock = take_lock(dir, stop, say_waiting).unwrap_or_else(|error| {
            tracing::warn!(dir = %dir.display(), %error, "what is learned about the store's chunks cannot be kept");
            None
        });
        let mut files = Files { dir: dir.to_owned(), lock, segments: Vec::new() };
        let names = fs::read_dir(dir).map(|entries| entries.flatten().map(|entry| entry.path()).collect::<BTreeSet<_>>()).unwrap_or_default();
        for path in names {
            match path.extension().and_then(|extension| extension.to_str()) {
                Some(SUFFIX) => match map(&path) {
                    Some(segment) => files.segments.push((Some(path), segment)),
                    None => files.remove(&path),
                },
                // Who wrote it is gone, or the lock would be held.
                Some(UNFINISHED) => files.remove(&path),
                _ => {}
            }
        }
        files.sort();
        files
    }

    pub fn segments(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().map(|(_, segment)| segment)
    }

    pub fn into_segments(self) -> Vec<Segment> {
        self.segments.into_iter().map(|(_, segment)| segment).collect()
    }

    /// Adds a segment, as a file if possible.
    pub fn add(&mut self, segment: Segment) {
        let kept = self.lock.as_ref().and_then(|_| self.keep(|out| out.write_all(segment.bytes())));
        self.segments.push(kept.map_or((None, segment), |(path, segment)| (Some(path), segment)));
        self.sort();
    }

    /// Puts small segments together. What is not `wanted` any more is left out.
    pub fn merge(&mut self, wanted: impl Fn(&Digest) -> bool) {
        let sizes: Vec<u64> = self.segments.iter().map(|(_, segment)| segment.len() as u64).collect();
        let first = first_to_merge(&sizes);
        if self.lock.is_none() || self.segments.len() - first < 2 {
            return;
        }
        let parts: Vec<&Segment> = self.segments[first..].iter().map(|(_, segment)| segment).collect();
        let Some((path, merged)) = self.keep(|out| write_merged(out, &parts, &wanted)) else { return };
        for (old, _) in self.segments.split_off(first) {
            // Two segments that merge to one of them have its name.
            old.filter(|old| *old != path).iter().for_each(|old| self.remove(old));
        }
        self.segments.push((Some(path), merged));
        self.sort();
    }

    fn sort(&mut self) {
        self.segments.sort_by_key(|(_, segment)| Reverse(segment.len()));
    }

    /// Makes a file of what `content` writes. If that fails, it is said and there is none.
    fn keep(&self, content: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>) -> Option<(PathBuf, Segment)> {
        let unfinished = self.dir.join(format!("new.{UNFINISHED}"));
        let keep = || {
            let file = OpenOptions::new().create_new(true).read(true).write(true).open(&unfinished)?;
            let mut out = BufWriter::new(&file);
            content(&mut out)?;
            out.flush()?;
            drop(out);
            // Only what nobody can write is mapped.
            file.set_permissions(Permissions::from_mode(0o400))?;
            let damaged = || io::Error::other("it does not read back as it was written");
            let segment = Segment::of(Bytes::Mapped(Mapping::of(&file)?)).ok_or_else(damaged)?;
            // Named by its content: the same segment made twice is one file.
            let path = self.dir.join(format!("{}.{SUFFIX}", Digest::of(segment.bytes())));
            fs::rename(&unfinished, &path)?;
            Ok((path, segment))
        };
        keep()
            .map_err(|error: io::Error| {
                tracing::warn!(dir = %self.dir.display(), %error, "what is learned about the store's chunks cannot be kept");
                let _ = fs::remove_file(&unfinished);
            })
            .ok()
    }

    fn remove(&self, path: &Path) {
        if self.lock.is_some() {
            // If it stays, it is tried again next time.
            let _ = fs::remove_file(path);
        }
    }
}

/// Makes the directory and takes its lock; `None` if another converter has it and this one is told to stop.
fn take_lock(dir: &Path, stop: &CancellationToken, say_waiting: impl FnOnce()) -> io::Result<Option<File>> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let lock = OpenOptions::new().create(true).append(true).open(dir.join("lock"))?;
    let mut say_waiting = Some(say_waiting);
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(Some(lock)),
            Err(fs::TryLockError::WouldBlock) if stop.is_cancelled() => return Ok(None),
            Err(fs::TryLockError::WouldBlock) => {
                say_waiting.take().into_iter().for_each(|say| say());
                thread::sleep(LOCK_EVERY);
            }
            Err(fs::TryLockError::Error(error)) => return Err(error),
        }
    }
}

/// The segment in a file, if it is one.
fn map(path: &Path) -> Option<Segment> {
    Segment::of(Bytes::Mapped(Mapping::of(&File::open(path).ok()?).ok()?))
}

/// Number of the first segment, of segments of these sizes from the largest down, from which on all should be one.
fn first_to_merge(sizes: &[u64]) -> usize {
    let (mut first, mut after) = (sizes.len(), 0);
    for (number, size) in sizes.iter().enumerate().rev() {
        if after + size > MAX_ENTRIES {
            break;
        }
        if *size < RATIO * after {
            first = number;
        }
        after += size;
    }
    first
}

/// Writes the entries of all parts, each once, but for those of packs that are not wanted.
fn write_merged(out: &mut impl Write, parts: &[&Segment], wanted: impl Fn(&Digest) -> bool) -> io::Result<()> {
    let packs: Vec<Digest> = parts.iter().flat_map(|part| part.packs()).filter(wanted).collect::<BTreeSet<_>>().into_iter().collect();
    // Packs are in byte order in every segment, so numbering them anew keeps the order of entries.
    let numbers: Vec<Vec<Option<u32>>> =
        parts.iter().map(|part| part.packs().map(|pack| packs.binary_search(&pack).ok().map(|number| number as u32)).collect()).collect();
    let total = parts.iter().map(|part| part.len() as u64).sum();
    let mut next = vec![0; parts.len()];
    // The next entry of a part whose pack is wanted.
    let peek = |part: usize, next: &mut Vec<usize>| {
        while next[part] < parts[part].len() {
            let entry = parts[part].entry(next[part]);
            if let Some(Some(pack)) = numbers[part].get(entry.pack as usize) {
                return Some(entry.of(*pack));
            }
            next[part] += 1;
        }
        None
    };
    let mut heads: BinaryHeap<_> = (0..parts.len()).filter_map(|part| Some(Reverse((peek(part, &mut next)?, part)))).collect();
    let mut last = None;
    let entries = std::iter::from_fn(|| {
        loop {
            let Reverse((entry, part)) = heads.pop()?;
            next[part] += 1;
            heads.extend(peek(part, &mut next).map(|entry| Reverse((entry, part))));
            if last.replace(entry) != Some(entry) {
                return Some(entry);
            }
        }
    });
    write(out, &packs, total, entries)
}

#[cfg(test)]
mod tests {
    use erofs::pack::ChunkEntry;

    use super::*;

    fn segment(pack: u8, chunks: std::ops::Range<u32>) -> Segment {
        let chunks = chunks.map(|i| ChunkEntry { digest: Digest::of(&i.to_le_bytes()), block: i, blocks: 1 });
        Segment::build(vec![(Digest([pack; 32]), chunks.collect())])
    }

    fn open(dir: &Path) -> Files {
        Files::open(dir, &CancellationToken::new(), || unreachable!("nobody else has it"))
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name != "lock");
        names.sort();
        names
    }

    /// Places of a chunk in all segments.
    fn places(files: &Files, chunk: u32) -> Vec<u8> {
        let mut found = Vec::new();
        for segment in files.segments() {
            segment.look_up(&Digest::of(&chunk.to_le_bytes()), &mut |pack, block| {
                assert_eq!(block, chunk);
                found.push(pack.0[0]);
            });
        }
        found.sort_unstable();
        found
    }

    #[test]
    fn segments_are_there_again_and_merged_only_when_it_is_worth_it() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("a/b");
        for (pack, chunks, expected) in
            [(1, 0..10_000, vec![10_000]), (2, 0..100, vec![10_000, 100]), (3, 50..200, vec![10_000, 250]), (4, 0..3000, vec![13_250])]
        {
            let mut files = open(&dir);
            files.add(segment(pack, chunks));
            files.merge(|_| true);
            assert_eq!(files.segments().map(Segment::len).collect::<Vec<_>>(), expected);
            assert_eq!(names(&dir).len(), expected.len());
        }
        let files = open(&dir);
        for (chunk, expected) in [(0, vec![1, 2, 4]), (60, vec![1, 2, 3, 4]), (199, vec![1, 3, 4]), (5000, vec![1]), (10_000, vec![])] {
            assert_eq!(places(&files, chunk), expected, "{chunk}");
        }
    }

    #[test]
    fn packs_that_are_not_wanted_any_more_go_with_the_next_merge() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = open(dir.path());
        for pack in 1..4 {
            files.add(segment(pack, 0..100));
        }
        // As if two converters had added it.
        files.add(segment(3, 0..100));
        files.merge(|pack| pack.0[0] != 2);
        assert_eq!(files.segments().map(Segment::len).collect::<Vec<_>>(), [200]);
        assert_eq!(places(&files, 7), [1, 3]);
    }

    #[test]
    fn what_is_no_segment_is_thrown_away_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path()).add(segment(1, 0..100));
        let good = names(dir.path());
        let write = |name: &str, bytes: &[u8]| {
            fs::write(dir.path().join(name), bytes).unwrap();
            fs::set_permissions(dir.path().join(name), Permissions::from_mode(0o400)).unwrap();
        };
        let whole = fs::read(dir.path().join(&good[0])).unwrap();
        write("short.segment", &whole[..whole.len() - 1]);
        write("empty.segment", b"");
        write("foreign.segment", b"what another program wrote here, longer than any footer is");
        write("new.unfinished", &whole[..9]);
        write("notes", b"of the administrator");
        // One that could still be written is not mapped.
        fs::write(dir.path().join("open.segment"), &whole).unwrap();
        let files = open(dir.path());
        assert_eq!(files.segments().count(), 1);
        assert_eq!(names(dir.path()), [&good[..], &["notes".to_owned()]].concat());
    }

    #[test]
    fn who_does_not_wait_for_the_lock_keeps_to_itself_and_both_have_everything() {
        let dir = tempfile::tempdir().unwrap();
        let mut one = open(dir.path());
        one.add(segment(1, 0..100));
        let stop = CancellationToken::new();
        stop.cancel();
        let mut two = Files::open(dir.path(), &stop, || unreachable!("it does not wait"));
        two.add(segment(2, 0..100));
        two.merge(|_| true);
        assert_eq!(names(dir.path()).len(), 1);
        assert_eq!(places(&two, 7), [1, 2]);
        one.add(segment(3, 0..100));
        one.merge(|_| true);
        drop(one);
        assert_eq!(places(&two, 7), [1, 2], "a segment goes on to be used when its file is gone");
        assert_eq!(places(&open(dir.path()), 7), [1, 3]);
    }

    #[test]
    fn who_comes_second_waits_and_finds_what_the_first_added() {
        let dir = tempfile::tempdir().unwrap();
        let mut one = open(dir.path());
        let (waits, waiting) = std::sync::mpsc::channel();
        thread::scope(|scope| {
            let two = scope.spawn(|| Files::open(dir.path(), &CancellationToken::new(), move || waits.send(()).unwrap()));
            waiting.recv().unwrap();
            one.add(segment(1, 0..100));
            drop(one);
            let mut two = two.join().unwrap();
            assert_eq!(places(&two, 7), [1]);
            two.add(segment(2, 0..100));
        });
        assert_eq!(names(dir.path()).len(), 2);
    }

    #[test]
    fn a_directory_that_cannot_be_used_costs_only_what_it_would_have_spared() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), b"").unwrap();
        let mut files = open(&dir.path().join("file/dir"));
        files.add(segment(1, 0..100));
        files.add(segment(2, 0..100));
        files.merge(|_| true);
        assert_eq!(places(&files, 7), [1, 2]);
    }
}
