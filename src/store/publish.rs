//! Files of the store come into being here: temporary first, named when whole (invariant 2).
//!
//! The order, and what a crash after each step leaves:
//!
//! 1. write `tmp/<random>`: a temporary file, which [`Store::create`] removes a day later;
//! 2. `fsync` it: the same;
//! 3. `link(2)` it to its name: whole and visible, durable or not there after a power cut;
//! 4. `fsync` the directories on the name's path: durable;
//! 5. `unlink` the temporary name: a crash before it leaves a second name of a good file, removed as in 1.
//!
//! `link` because it never overwrites and works on NFS, which refuses the flags of `renameat2(2)`.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, Mode, fsync, linkat, mkdirat, renameat, statat, unlinkat};
use rustix::io::Errno;

use super::error::Doing;
use super::{Name, Store, StoreError, content, framing, open};

/// Age at which a temporary file belongs to no running conversion: a pack of 1 GiB is written in minutes.
const STALE: Duration = Duration::from_secs(24 * 60 * 60);

/// The kernel is asked to begin writing a file back whenever so much more of it was written. Left alone it begins when a tenth of the memory is
/// dirty, and publishing packs waits for the disk while nothing computes: for four of 300 MB, 0.55 s on a disk of 1.6 GB/s; like this 0.05 s.
const WRITE_BACK: u64 = 8 << 20;

/// Bytes compared at a time when a name is already taken.
const COMPARE: usize = 1 << 20;

/// A file in the store's `tmp/`, removed when dropped unpublished. Write to it, then [`Store::publish`] it.
#[derive(Debug)]
pub struct Temp {
    file: File,
    dir: OwnedFd,
    name: String,
    path: PathBuf,
    /// The temporary name is there and ours to remove.
    named: bool,
    /// Bytes written, and how many of them the kernel was asked to write back.
    written: u64,
    written_back: u64,
}

impl Temp {
    /// The open file (read and write), for reading back or for writers that need a `File`.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it lies, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl io::Write for Temp {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.file.write(bytes)?;
        self.written += len as u64;
        let waiting = self.written - self.written_back;
        if waiting >= WRITE_BACK {
            // It only saves time, so what it says does not matter: `fsync` reports what goes wrong with the bytes.
            let _ = uapi::writeback::begin(&self.file, self.written_back, waiting);
            self.written_back = self.written;
        }
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        if self.named {
            // A name that stays is removed with the stale ones.
            let _ = unlinkat(&self.dir, &self.name, AtFlags::empty());
        }
    }
}

/// How a name came to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    /// The file is new.
    New,
    /// The name was there and whole; the temporary file was dropped.
    Present,
    /// The name was there but damaged (or, for an image root, said something else) and has been replaced.
    Replaced,
}

impl Store {
    /// A new temporary file. Errors: [`StoreError::NotWritable`], [`StoreError::Full`], [`StoreError::Unreachable`].
    pub fn temp(&self) -> Result<Temp, StoreError> {
        let tmp = self.shown(Path::new("tmp"));
        let dir = open::directory(&self.root, Path::new("tmp"), &tmp, Doing::Writing)?;
        let name = super::random_hex();
        let path = tmp.join(&name);
        Ok(Temp { file: open::create(&dir, &name, &path)?, dir, name, path, named: true, written: 0, written_back: 0 })
    }

    /// Gives `temp` its name. When this returns, the file is whole, durable and visible under `name`.
    ///
    /// The caller vouches that the bytes are those `name` promises. A taken name is checked: bytes like ours, or a compressed file
    /// that verifies, stay; anything else is damaged and is replaced by rename (for an image root: is what was said before).
    pub fn publish(&self, mut temp: Temp, name: &Name) -> Result<Published, StoreError> {
        let path = name.path();
        let shown = self.shown(&path);
        let writing = |errno: Errno| StoreError::from_errno(Doing::Writing, &shown, errno);
        temp.file.sync_all().map_err(|error| StoreError::from_io(Doing::Writing, &shown, error))?;
        let (parent, file_name) = (path.parent().expect("names lie in directories"), path.file_name().expect("names end in a file"));
        let dirs = self.make_dirs(parent)?;
        let dir = dirs.last().expect("names lie in directories");
        let published = match linkat(&temp.dir, &temp.name, dir, file_name, AtFlags::empty()) {
            Ok(()) => Published::New,
            Err(Errno::EXIST) => match self.is_whole(&temp, name, &path)? {
                Taken::ByUs => Published::New,
                Taken::Whole => Published::Present,
                Taken::Damaged => {
                    renameat(&temp.dir, &temp.name, dir, file_name).map_err(writing)?;
                    temp.named = false;
                    Published::Replaced
                }
            },
            Err(errno) => return Err(writing(errno)),
        };
        // Every directory on the way, also for a name found present: who made it may not have come this far, or may crash before.
        for dir in dirs.iter().rev() {
            fsync(dir).map_err(writing)?;
        }
        Ok(published)
    }

    /// Compares what has our name with what we wanted to put there.
    fn is_whole(&self, temp: &Temp, name: &Name, path: &Path) -> Result<Taken, StoreError> {
        let shown = self.shown(path);
        let mut there = match open::regular(&self.root, path, &shown) {
            Ok(file) => file,
            Err(error) if error.is_about_content() => return Ok(Taken::Damaged),
            Err(error) => return Err(error),
        };
        let reading = |error: io::Error| StoreError::from_io(Doing::Reading, &shown, error);
        let (ours, theirs) = (temp.file.metadata().map_err(reading)?, there.metadata().map_err(reading)?);
        // NFS may send a link twice when the first answer is lost; the second then finds the name taken by ourselves.
        if (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()) {
            return Ok(Taken::ByUs);
        }
        if same_bytes(&temp.file, &there).map_err(reading)? {
            return Ok(Taken::Whole);
        }
        there.rewind().map_err(reading)?;
        // Another zstd may have compressed the same bytes differently: that is whole, too. The other kinds have one form only; of a
        // pack the footer fixes every offset and stored length, so ours is as good wherever the two differ.
        match name {
            Name::Tree { digest, .. } | Name::Meta(digest) => match content::decompress(there, digest, &shown) {
                Ok(_) => Ok(Taken::Whole),
                Err(error) if error.is_about_content() => Ok(Taken::Damaged),
                Err(error) => Err(error),
            },
            Name::Framing { digest, .. } => match framing::verify(&there, digest, &shown) {
                Ok(()) => Ok(Taken::Whole),
                Err(error) if error.is_about_content() => Ok(Taken::Damaged),
                Err(error) => Err(error),
            },
            Name::Pack(_) | Name::Record { .. } | Name::Image { .. } | Name::Compact { .. } | Name::Target { .. } => Ok(Taken::Damaged),
        }
    }

    /// Opens the directory `path` below the store, making what is missing of it. Gives every directory on the way, outermost first.
    pub(super) fn make_dirs(&self, path: &Path) -> Result<Vec<OwnedFd>, StoreError> {
        let mut dirs: Vec<OwnedFd> = Vec::new();
        let mut below = PathBuf::new();
        for part in path {
            below.push(part);
            let shown = self.shown(&below);
            let parent = dirs.last().unwrap_or(&self.root).as_fd();
            match mkdirat(parent, part, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(StoreError::from_errno(Doing::Writing, &shown, errno)),
            }
            let dir = open::directory(parent, Path::new(part), &shown, Doing::Writing)?;
            dirs.push(dir);
        }
        Ok(dirs)
    }

    /// Removes the file `path` if it is there, durably.
    pub(super) fn remove(&self, path: &Path) -> Result<(), StoreError> {
        let (parent, file_name) = (path.parent().expect("a file lies in a directory"), path.file_name().expect("a file has a name"));
        let writing = |errno: Errno| StoreError::from_errno(Doing::Writing, &self.shown(path), errno);
        let dir = open::directory(&self.root, parent, &self.shown(parent), Doing::Writing)?;
        match unlinkat(&dir, file_name, AtFlags::empty()) {
            Ok(()) => fsync(&dir).map_err(writing),
            Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(writing(errno)),
        }
    }

    /// Removes temporary files that no conversion can still be writing. `now` is a file made just now: ages are judged by the clock
    /// that stamps the files, the store's own.
    pub(super) fn remove_stale_temps(&self, now: &Temp) -> Result<usize, StoreError> {
        let tmp = self.shown(Path::new("tmp"));
        let reading = |error: io::Error| StoreError::from_io(Doing::Reading, &tmp, error);
        let now = now.file.metadata().and_then(|meta| meta.modified()).map_err(reading)?;
        let dir = open::directory(&self.root, Path::new("tmp"), &tmp, Doing::Reading)?;
        let mut removed = 0;
        for name in open::names(&self.root, Path::new("tmp"), &tmp)? {
            // One that vanished meanwhile was published or dropped by its owner.
            let Ok(stat) = statat(&dir, &name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(stat.st_mtime).unwrap_or(0));
            if now.duration_since(modified).is_ok_and(|age| age > STALE) && unlinkat(&dir, &name, AtFlags::empty()).is_ok() {
                removed += 1;
            }
        }
        Ok(removed)
    }
}

enum Taken {
    ByUs,
    Whole,
    Damaged,
}

fn same_bytes(ours: &File, there: &File) -> io::Result<bool> {
    if ours.metadata()?.len() != there.metadata()?.len() {
        return Ok(false);
    }
    let mut there = there;
    let (mut left, mut right) = (vec![0; COMPARE], vec![0; COMPARE]);
    let mut at = 0;
    loop {
        let got = there.read(&mut right)?;
        if got == 0 {
            return Ok(true);
        }
        match ours.read_exact_at(&mut left[..got], at) {
            Ok(()) if left[..got] == right[..got] => at += got as u64,
            Ok(()) => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write as _;
    use std::os::unix::fs::symlink;

    use erofs::digest::Digest;

    use super::*;
    use crate::store::sample::Sample;

    fn temps(store: &Store) -> usize {
        fs::read_dir(store.dir().join("tmp")).unwrap().count()
    }

    fn publish(store: &Store, name: &Name, bytes: &[u8]) -> Result<Published, StoreError> {
        let mut temp = store.temp().unwrap();
        temp.write_all(bytes).unwrap();
        store.publish(temp, name)
    }

    #[test]
    fn a_taken_name_is_kept_when_whole_and_replaced_when_not() {
        let image = vec![7; 100_000];
        let digest = Digest::of(&image);
        let compressed = |level| zstd::bulk::compress(&image, level).unwrap();
        let check = |there: Option<&[u8]>, expected: Published| {
            let Sample { dir: _dir, store, .. } = Sample::new();
            let path = store.dir().join(Name::Meta(digest).path());
            if let Some(there) = there {
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(&path, there).unwrap();
            }
            assert_eq!(store.put_metadata(&image).unwrap(), (digest, expected), "{} bytes there", there.map_or(0, <[u8]>::len));
            assert_eq!(store.read_metadata(&digest).unwrap(), image);
            assert_eq!(temps(&store), 0);
            if expected == Published::Present {
                assert_eq!(fs::read(&path).unwrap(), there.unwrap(), "what is whole is not touched");
            }
        };
        let mut flipped = compressed(3);
        *flipped.last_mut().unwrap() ^= 1;
        let other = zstd::bulk::compress(b"another image", 3).unwrap();
        check(None, Published::New);
        check(Some(&compressed(3)), Published::Present);
        check(Some(&compressed(19)), Published::Present);
        check(Some(&compressed(3)[..20]), Published::Replaced);
        check(Some(b""), Published::Replaced);
        check(Some(&flipped), Published::Replaced);
        check(Some(&other), Published::Replaced);
    }

    #[test]
    fn a_pack_is_kept_when_every_byte_agrees() {
        let name = Name::Pack(Digest::of(b"footer"));
        for (there, expected) in
            [(&b"units"[..], Published::Present), (b"unitZ", Published::Replaced), (b"unit", Published::Replaced), (b"units+", Published::Replaced)]
        {
            let sample = Sample::new();
            assert_eq!(publish(&sample.store, &name, there).unwrap(), Published::New);
            assert_eq!(publish(&sample.store, &name, b"units").unwrap(), expected, "{there:?}");
            assert_eq!(fs::read(sample.store.dir().join(name.path())).unwrap(), b"units");
        }
    }

    #[test]
    fn a_link_in_place_of_a_file_is_replaced_and_one_in_place_of_a_directory_refused() {
        let sample = Sample::new();
        let outside = sample.dir.path().join("outside");
        fs::write(&outside, b"mine").unwrap();
        let name = Name::Pack(Digest::of(b"footer"));
        let path = sample.store.dir().join(name.path());
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(&outside, &path).unwrap();
        assert_eq!(publish(&sample.store, &name, b"units").unwrap(), Published::Replaced);
        assert_eq!((fs::read(&path).unwrap(), fs::read(&outside).unwrap()), (b"units".to_vec(), b"mine".to_vec()));

        fs::remove_dir_all(sample.store.dir().join("packs")).unwrap();
        symlink(sample.dir.path(), sample.store.dir().join("packs")).unwrap();
        assert!(matches!(publish(&sample.store, &name, b"units"), Err(StoreError::Foreign { .. })));
        assert!(matches!(sample.store.open_file(&name), Err(StoreError::Foreign { .. })));
        assert_eq!(temps(&sample.store), 0);
    }

    #[test]
    fn a_crash_before_the_link_shows_nothing_and_one_after_it_everything() {
        let Sample { dir: _dir, store, .. } = Sample::new();
        let name = Name::Pack(Digest::of(b"footer"));
        let path = store.dir().join(name.path());
        // Killed while writing: the destructor does not run.
        let mut temp = store.temp().unwrap();
        temp.write_all(b"uni").unwrap();
        std::mem::forget(temp);
        assert_eq!(store.file_len(&name).unwrap(), None);
        // Killed between link and unlink.
        assert_eq!(publish(&store, &name, b"units").unwrap(), Published::New);
        fs::hard_link(&path, store.dir().join("tmp/killed")).unwrap();
        assert_eq!(store.file_len(&name).unwrap(), Some(5));
        assert_eq!(publish(&store, &name, b"units").unwrap(), Published::Present);
        assert_eq!(temps(&store), 2);
        // A day later a converter starts: what it removes is only the second name.
        let day = STALE + Duration::from_secs(60);
        for entry in fs::read_dir(store.dir().join("tmp")).unwrap() {
            let file = File::options().write(true).open(entry.unwrap().path()).unwrap();
            file.set_modified(SystemTime::now() - day).unwrap();
        }
        let young = store.temp().unwrap();
        Store::create(store.dir()).unwrap();
        assert_eq!(temps(&store), 1, "the young one stays");
        drop(young);
        assert_eq!(fs::read(&path).unwrap(), b"units");
    }

    #[test]
    fn a_second_link_of_the_same_file_is_ours() {
        // What NFS makes of a link whose first answer was lost.
        let Sample { dir: _dir, store, .. } = Sample::new();
        let name = Name::Pack(Digest::of(b"footer"));
        let mut temp = store.temp().unwrap();
        temp.write_all(b"units").unwrap();
        let path = store.dir().join(name.path());
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::hard_link(temp.path(), &path).unwrap();
        assert_eq!(store.publish(temp, &name).unwrap(), Published::New);
        assert_eq!((fs::read(&path).unwrap(), temps(&store)), (b"units".to_vec(), 0));
    }

    #[test]
    fn of_publishers_that_race_one_comes_first_and_all_succeed() {
        let sample = Sample::new();
        let store = &sample.store;
        let image = &vec![3; 300_000];
        let outcomes: Vec<Published> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(move || store.put_metadata(image).unwrap().1)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(outcomes.iter().filter(|outcome| **outcome == Published::New).count(), 1, "{outcomes:?}");
        assert_eq!(outcomes.iter().filter(|outcome| **outcome == Published::Present).count(), 7, "{outcomes:?}");
        assert_eq!(temps(store), 0);
    }
}
