//! The cache directory: where packs' local files, maps and tables are.
//!
//! ```text
//! serve/<digest>   uncompressed bytes of the pack, sparse; what the kernel may open
//! fill/<digest>    hard link to the same file, for us: under fanotify only serve/ is marked, so our own reads and writes raise nothing
//! map/<digest>     presence map
//! table/<digest>   unit table, then footer, as in the pack file
//! ```
//!
//! A served file is never renamed and never replaced while it is whole: a mount may have it open.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use erofs::digest::Digest;
use erofs::pack::{FOOTER_LEN, PackTable};

use super::presence::{self, SLOT, Saved};
use super::{Pack, PackFile};

/// The cache directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}; check that the cache directory is on a healthy local disk with space and is writable", path.display())]
pub struct CacheError {
    /// What was tried.
    pub action: &'static str,
    /// On what.
    pub path: PathBuf,
    /// Why it did not work.
    #[source]
    pub source: io::Error,
}

/// An open cache directory.
#[derive(Debug)]
pub struct LocalCache {
    dir: PathBuf,
    /// Makes names of temporary files differ within this process.
    temp: AtomicU64,
}

impl LocalCache {
    /// Opens `dir`, making what is missing.
    pub fn open(dir: &Path) -> Result<LocalCache, CacheError> {
        for sub in ["serve", "fill", "map", "table"] {
            let path = dir.join(sub);
            fs::create_dir_all(&path).map_err(|source| CacheError { action: "make directory", path, source })?;
        }
        Ok(LocalCache { dir: dir.to_owned(), temp: AtomicU64::new(0) })
    }

    /// The file of a pack that the kernel may open.
    pub fn served(&self, pack: &Digest) -> PathBuf {
        self.path("serve", pack)
    }

    /// Opens a pack's local files, making them if there are none. What the map says counts only if the data file is as it should be.
    pub fn pack(&self, table: PackTable) -> Result<Pack, CacheError> {
        let digest = table.pack_ref().digest;
        let len = u64::from(table.blocks()) * erofs::block::BLOCK_SIZE;
        let (serve, fill, map_path) = (self.path("serve", &digest), self.path("fill", &digest), self.path("map", &digest));
        let map = at(&map_path, "open", open_or_create(&map_path))?;
        let saved = if is_whole(&serve, &fill, len) {
            let mut slots = Vec::with_capacity(2 * SLOT);
            at(&map_path, "read", (&map).take(2 * SLOT as u64).read_to_end(&mut slots))?;
            presence::decode(&digest, table.unit_count(), &slots)
        } else {
            // The map first, and durably: after a power cut it must not speak of a file that is only as long as it should be.
            at(&map_path, "empty", map.set_len(0).and_then(|()| map.sync_data()))?;
            for path in [&serve, &fill] {
                at(path, "remove", removed(path))?;
            }
            Saved::nothing(table.unit_count())
        };
        let data = at(&fill, "open", open_or_create(&fill))?;
        at(&fill, "set the length of", data.set_len(len))?;
        match fs::hard_link(&fill, &serve) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => Err(CacheError { action: "link", path: serve, source }),
            _ => Ok(Pack::new(table, PackFile::Local { data, map }, &saved)),
        }
    }

    /// The local copy of a pack's tables: (footer, unit table), unverified. `None` if there is none, or none that can be read.
    pub fn tables(&self, pack: &Digest) -> Option<(Vec<u8>, Vec<u8>)> {
        let mut unit_table = fs::read(self.path("table", pack)).ok()?;
        let footer = unit_table.split_off(unit_table.len().checked_sub(FOOTER_LEN as usize)?);
        Some((footer, unit_table))
    }

    /// Keeps a copy of a pack's tables. Need not be durable: whoever reads it verifies it.
    pub fn keep_tables(&self, pack: &Digest, footer: &[u8], unit_table: &[u8]) -> Result<(), CacheError> {
        let path = self.path("table", pack);
        let new = path.with_extension(format!("{}.new", self.temp.fetch_add(1, Ordering::Relaxed)));
        let kept = at(&new, "write", fs::write(&new, [unit_table, footer].concat()));
        kept.and_then(|()| at(&path, "rename a file to", fs::rename(&new, &path))).inspect_err(|_| {
            // It is in nobody's way: a later process uses the name again.
            let _ = fs::remove_file(&new);
        })
    }

    fn path(&self, sub: &str, pack: &Digest) -> PathBuf {
        self.dir.join(sub).join(pack.to_string())
    }
}

/// Reads a stored unit's bytes of a pack's local file into `out`, blocking. For readers of Ready units.
pub fn read_ready(pack: &Pack, offset: u64, out: &mut [u8]) -> io::Result<()> {
    match pack.file() {
        PackFile::Local { data, .. } => data.read_exact_at(out, offset),
        PackFile::Kernel { .. } | PackFile::Elsewhere => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// Both names are there, are one file, and it has the right length.
fn is_whole(serve: &Path, fill: &Path, len: u64) -> bool {
    let stat = |path| fs::symlink_metadata(path).ok();
    match (stat(serve), stat(fill)) {
        (Some(a), Some(b)) => a.is_file() && a.len() == len && (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

fn open_or_create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

fn removed(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err),
        _ => Ok(()),
    }
}

fn at<T>(path: &Path, action: &'static str, result: io::Result<T>) -> Result<T, CacheError> {
    result.map_err(|source| CacheError { action, path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::UnitIndex;
    use crate::cache::fake::Sample;

    /// A cache in which the pack's unit 1 is stored and saved.
    fn cache_with_a_unit() -> (tempfile::TempDir, LocalCache, Sample) {
        let (dir, sample) = (tempfile::tempdir().unwrap(), Sample::mixed(1, 3 * 65_536));
        let cache = LocalCache::open(dir.path()).unwrap();
        cache.pack(sample.pack().table().clone()).unwrap();
        save(&cache, &sample);
        (dir, cache, sample)
    }

    fn save(cache: &LocalCache, sample: &Sample) {
        let mut saved = Saved { generation: 1, ..Saved::nothing(3) };
        saved.present.insert(UnitIndex(1));
        let (at, slot) = presence::encode(&sample.digest(), &saved);
        open_or_create(&cache.path("map", &sample.digest())).unwrap().write_all_at(&slot, at).unwrap();
    }

    fn counts(cache: &LocalCache, sample: &Sample) -> bool {
        cache.pack(sample.pack().table().clone()).unwrap().units().is_saved(UnitIndex(1))
    }

    #[test]
    fn a_new_pack_is_a_sparse_file_under_two_names() {
        let dir = tempfile::tempdir().unwrap();
        let cache = LocalCache::open(dir.path()).unwrap();
        let sample = Sample::mixed(2, 3 * 65_536);
        cache.pack(sample.pack().table().clone()).unwrap();
        let served = fs::metadata(cache.served(&sample.digest())).unwrap();
        assert_eq!((served.len(), served.blocks(), served.nlink()), (3 * 65_536, 0, 2));
    }

    #[test]
    fn what_was_saved_counts_as_long_as_the_file_is_as_it_was() {
        let (_dir, cache, sample) = cache_with_a_unit();
        assert!(counts(&cache, &sample));
        let (serve, fill) = (cache.path("serve", &sample.digest()), cache.path("fill", &sample.digest()));
        type Spoil<'a> = (&'a str, &'a dyn Fn());
        let spoils: [Spoil<'_>; 5] = [
            ("shortened", &|| File::options().write(true).open(&fill).unwrap().set_len(4096).unwrap()),
            ("lengthened", &|| File::options().write(true).open(&fill).unwrap().set_len(1 << 20).unwrap()),
            ("without its served name", &|| fs::remove_file(&serve).unwrap()),
            ("without our name", &|| fs::remove_file(&fill).unwrap()),
            ("two files", &|| {
                fs::remove_file(&fill).unwrap();
                fs::copy(&serve, &fill).unwrap();
            }),
        ];
        for (what, spoil) in spoils {
            spoil();
            assert!(!counts(&cache, &sample), "{what}");
            assert_eq!(fs::metadata(&serve).unwrap().len(), 3 * 65_536, "{what}");
            assert!(!counts(&cache, &sample), "{what}: the map is empty on disk as well");
            save(&cache, &sample);
            assert!(counts(&cache, &sample), "{what}, saved again");
        }
    }

    #[test]
    fn kept_tables_come_back_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let cache = LocalCache::open(dir.path()).unwrap();
        let pack = Digest::of(b"pack");
        assert_eq!(cache.tables(&pack), None);
        let footer = vec![7; 4096];
        cache.keep_tables(&pack, &footer, b"table").unwrap();
        assert_eq!(cache.tables(&pack), Some((footer, b"table".to_vec())));
        fs::write(cache.path("table", &pack), b"short").unwrap();
        assert_eq!(cache.tables(&pack), None);
    }

    #[test]
    fn two_mounts_that_share_a_new_pack_keep_its_tables_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let cache = LocalCache::open(dir.path()).unwrap();
        let (pack, footer, unit_table) = (Digest::of(b"pack"), vec![7; 4096], vec![8; 100_000]);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        cache.keep_tables(&pack, &footer, &unit_table).unwrap();
                        assert_eq!(cache.tables(&pack), Some((footer.clone(), unit_table.clone())));
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(dir.path().join("table")).unwrap().count(), 1, "nothing else is left");
    }
}
