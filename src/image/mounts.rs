//! Which images are mounted where: the mount points, a record beside each, and what is left of them after a restart.
//!
//! ```text
//! <state>/mounts/<metadata digest>.<generation>        mount point
//! <state>/mounts/<metadata digest>.<generation>.json   its record: way, packs, chains
//! ```
//!
//! A record is written before its mount is made and removed after it is undone, so every mount of ours has one. A record without a mount is left
//! over and dropped; a mount without a record is not ours to reason about and is detached. The kernel's mount table decides what is mounted. Whatever
//! else is found there is cleared away as far as that can be done without losing anything, and never keeps a worker from starting.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use erofs::digest::Digest;
use serde::{Deserialize, Serialize};
use uapi::mount::{MountEntry, Unmount, unmount};

use crate::mount::Way;
use crate::oci::ChainId;

/// Version of the record file. Another version is treated as no record.
const RECORD_VERSION: u32 = 1;

/// End of the name of a record that is being written. One that is found was left by a worker that was killed over it.
const UNFINISHED: &str = ".json-new";

/// The mount points cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum MountsError {
    /// The directory or a record in it.
    #[error("{} cannot be {what}", path.display())]
    Io {
        /// What was tried, as a participle.
        what: &'static str,
        /// File or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A mounted image has one or more of these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// Distinguishes the mounts of one image.
    pub number: u32,
    /// How it is mounted.
    pub way: Way,
    /// Where.
    pub at: PathBuf,
}

/// One image with its mounts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mounted {
    /// Its verified metadata.
    pub metadata: PathBuf,
    /// The packs of its device table, in order.
    pub packs: Vec<Digest>,
    /// Chains that it was mounted for and that are in use.
    pub chains: BTreeSet<ChainId>,
    /// Its mounts, by number.
    pub generations: Vec<Generation>,
}

/// The record beside a mount point.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: u32,
    way: Way,
    metadata: PathBuf,
    packs: Vec<String>,
    chains: Vec<String>,
}

/// The directory of mount points.
#[derive(Clone, Debug)]
pub struct MountDir(PathBuf);

impl MountDir {
    /// The directory `dir`, made if missing, for its owner only. `dir` is absolute and has no symlinks in it, as the mount table shows it.
    pub fn open(dir: &Path) -> Result<MountDir, MountsError> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed("made", dir))?;
        Ok(MountDir(dir.to_owned()))
    }

    /// What an earlier process left here, by metadata digest. `alive` says whether mounts of a way can still work; those that cannot are
    /// detached, as are mounts without a record. What cannot be cleared away stays, with a warning. `mounts` is the mount table.
    pub fn recover(&self, mounts: &[MountEntry], alive: impl Fn(Way) -> bool) -> Result<BTreeMap<Digest, Mounted>, MountsError> {
        let mut found: BTreeMap<Digest, Mounted> = BTreeMap::new();
        for name in self.names()? {
            let at = self.0.join(&name);
            let known = parse_name(&name).zip(self.read_record(&at)).filter(|(_, record)| alive(record.way));
            match known.filter(|_| is_mounted(mounts, &at)) {
                Some(((digest, number), record)) => {
                    let Record { way, metadata, packs, chains, .. } = record;
                    let image = found.entry(digest).or_default();
                    image.metadata = metadata;
                    image.packs = packs.iter().filter_map(|pack| pack.parse().ok()).collect();
                    image.chains.extend(chains.iter().filter_map(|chain| chain.parse::<ChainId>().ok()));
                    image.generations.push(Generation { number, way, at });
                }
                None => self.clear_away(mounts, &at),
            }
        }
        for image in found.values_mut() {
            image.generations.sort_by_key(|generation| generation.number);
        }
        Ok(found)
    }

    /// Takes away what lies at `at` and its record: an old mount, an empty directory, a file.
    fn clear_away(&self, mounts: &[MountEntry], at: &Path) {
        let warn =
            |error: &(dyn std::error::Error + 'static)| tracing::warn!(path = %at.display(), error, "what was found among the mount points stays");
        for _ in mounts.iter().filter(|entry| entry.mount_point == at) {
            if let Err(error) = unmount(at, Unmount::Detach) {
                return warn(&error);
            }
        }
        // Never recursive: whatever is in there is not ours.
        let remove = |path: &Path| if path.symlink_metadata()?.is_dir() { fs::remove_dir(path) } else { fs::remove_file(path) };
        for path in [at, &record_path(at)] {
            match remove(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => warn(&error),
                _ => {}
            }
        }
    }

    /// Makes the mount point of a further generation of `image` and its record. To be followed by the mount, or by [`MountDir::discard`].
    pub fn prepare(&self, digest: &Digest, image: &Mounted, way: Way) -> Result<Generation, MountsError> {
        let number = image.generations.last().map_or(0, |last| last.number + 1);
        let at = self.0.join(format!("{digest}.{number}"));
        let generation = Generation { number, way, at };
        self.write_record(image, &generation)?;
        let at = &generation.at;
        match fs::DirBuilder::new().mode(0o700).create(at) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed("made", at)(error)),
            _ => Ok(generation),
        }
    }

    /// Writes the records of all generations again, for `image` has got another chain.
    pub fn update(&self, image: &Mounted) -> Result<(), MountsError> {
        image.generations.iter().try_for_each(|generation| self.write_record(image, generation))
    }

    /// Removes a mount point where nothing is mounted, and its record.
    pub fn discard(&self, at: &Path) -> Result<(), MountsError> {
        let ignore_missing = |result: io::Result<()>| match result {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        };
        // Never recursive: whatever is in there is not ours.
        ignore_missing(fs::remove_dir(at)).map_err(failed("removed", at))?;
        let record = record_path(at);
        ignore_missing(fs::remove_file(&record)).map_err(failed("removed", &record))
    }

    /// Names of mount points, from directories and from records; an unfinished record has one of its own.
    fn names(&self) -> Result<BTreeSet<String>, MountsError> {
        let list = || -> io::Result<BTreeSet<String>> {
            let mut names = BTreeSet::new();
            for entry in fs::read_dir(&self.0)? {
                if let Ok(name) = entry?.file_name().into_string() {
                    names.insert(name.strip_suffix(".json").unwrap_or(&name).to_owned());
                }
            }
            Ok(names)
        };
        list().map_err(failed("listed", &self.0))
    }

    fn read_record(&self, at: &Path) -> Option<Record> {
        let bytes = fs::read(record_path(at)).ok()?;
        let record: Record = serde_json::from_slice(&bytes).ok()?;
        (record.version == RECORD_VERSION).then_some(record)
    }

    /// Replaces the record by rename. No fsync: after a crash of the machine there is no mount either.
    fn write_record(&self, image: &Mounted, generation: &Generation) -> Result<(), MountsError> {
        let record = Record {
            version: RECORD_VERSION,
            way: generation.way,
            metadata: image.metadata.clone(),
            packs: image.packs.iter().map(Digest::to_string).collect(),
            chains: image.chains.iter().map(ChainId::to_string).collect(),
        };
        let path = record_path(&generation.at);
        let temporary = beside(&generation.at, UNFINISHED);
        let bytes = serde_json::to_vec_pretty(&record).expect("a record is plain data");
        let written = fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, &path));
        if written.is_err() {
            // On a full disk it holds space; left behind it would do no other harm.
            let _ = fs::remove_file(&temporary);
        }
        written.map_err(failed("written", &path))
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MountsError {
    move |source| MountsError::Io { what, path: path.to_owned(), source }
}

fn record_path(at: &Path) -> PathBuf {
    beside(at, ".json")
}

/// `x.end` beside `x`. Not `with_extension`: the generation looks like one.
fn beside(at: &Path, end: &str) -> PathBuf {
    let mut path = at.as_os_str().to_owned();
    path.push(end);
    path.into()
}

/// Digest and generation in the name of a mount point.
fn parse_name(name: &str) -> Option<(Digest, u32)> {
    let (digest, number) = name.split_once('.')?;
    let parsed = (Digest::from_str(digest).ok()?, number.parse().ok()?);
    (format!("{}.{}", parsed.0, parsed.1) == name).then_some(parsed)
}

fn is_mounted(mounts: &[MountEntry], at: &Path) -> bool {
    mounts.iter().any(|entry| entry.mount_point == at)
}

/// Whether an overlay in the mount table has `at` among its lower layers. Such an overlay keeps the file system alive by itself, so `umount(2)`
/// of `at` would succeed; but we would not know any more that its packs are read.
pub fn overlay_uses(mounts: &[MountEntry], at: &Path) -> bool {
    let lowers = |options: &str| {
        let values = options.split(',').filter_map(|option| option.split_once('='));
        values.filter(|(key, _)| key.starts_with("lowerdir")).flat_map(|(_, value)| value.split(':').map(PathBuf::from)).collect::<Vec<_>>()
    };
    // containerd shortens a long list of lower layers to paths relative to a directory we do not see.
    let same = |lower: &PathBuf| !lower.as_os_str().is_empty() && if lower.is_absolute() { lower == at } else { at.ends_with(lower) };
    mounts.iter().filter(|entry| entry.fs_type == "overlay").any(|entry| lowers(&entry.fs_options).iter().any(same))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use uapi::mount::parse_mountinfo;

    fn image(chain: u8) -> Mounted {
        let chain = format!("sha256:{}", format!("{chain:02x}").repeat(32)).parse().expect("a chain ID");
        Mounted { metadata: "/state/meta/x".into(), packs: vec![Digest::of(b"p"), Digest::of(b"q")], chains: [chain].into(), generations: Vec::new() }
    }

    fn table(points: &[&Path]) -> Vec<MountEntry> {
        let lines: String = points.iter().map(|at| format!("1 1 0:9 / {} ro - erofs none ro\n", at.display())).collect();
        parse_mountinfo(lines.as_bytes())
    }

    #[test]
    fn what_is_mounted_is_found_again_and_the_rest_is_dropped() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mounts = MountDir::open(&dir.path().join("mounts")).expect("open");
        let digest = Digest::of(b"image");
        let mut first = image(1);
        for way in [Way::FuseBlob, Way::Direct, Way::FuseBlob] {
            let generation = mounts.prepare(&digest, &first, way).expect("prepare");
            first.generations.push(generation);
        }
        first.chains.extend(image(2).chains);
        mounts.update(&first).expect("update");
        let at = |number: usize| first.generations[number].at.as_path();

        let found = mounts.recover(&table(&[at(0), at(1)]), |_| true).expect("recover");
        let mut expected = first.clone();
        expected.generations.truncate(2);
        assert_eq!(found, BTreeMap::from([(digest, expected)]));
        assert!(!at(2).exists() && !record_path(at(2)).exists(), "a record without a mount is dropped");
    }

    #[test]
    fn damaged_records_and_foreign_names_are_no_images() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mounts = MountDir::open(dir.path()).expect("open");
        let generation = mounts.prepare(&Digest::of(b"image"), &image(1), Way::Direct).expect("prepare");
        for text in ["", "{}", "{\"version\": 2}", "rubbish"] {
            fs::create_dir_all(&generation.at).expect("mount point");
            fs::write(record_path(&generation.at), text).expect("write");
            assert_eq!(mounts.recover(&[], |_| true).expect("recover"), BTreeMap::new(), "{text}");
            assert!(!record_path(&generation.at).exists());
        }
    }

    #[test]
    fn whatever_lies_among_the_mount_points_does_not_stand_in_the_way() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mounts = MountDir::open(dir.path()).expect("open");
        let digest = Digest::of(b"image");
        let mut mounted = image(1);
        mounted.generations.push(mounts.prepare(&digest, &mounted, Way::Direct).expect("prepare"));
        let at = |name: &str| dir.path().join(name);
        fs::write(at(&format!("{digest}.0.json-new")), "{\"vers").expect("as a killed worker leaves it, of a record that is there");
        fs::write(at(&format!("{digest}.1.json-new")), "").expect("as a killed worker leaves it, of a new one");
        fs::write(at("README"), "x").expect("a stray file");
        std::os::unix::fs::symlink("/", at("link")).expect("a stray link");
        fs::create_dir_all(at("kept/inside")).expect("a directory with something in it");
        fs::create_dir_all(at(&format!("{digest}.7/inside"))).expect("one with a name of ours");
        fs::create_dir_all(at("x.json/inside")).expect("a directory where a record would be");

        let found = mounts.recover(&table(&[&mounted.generations[0].at]), |_| true).expect("recover");
        assert_eq!(found, BTreeMap::from([(digest, mounted)]));
        let mut left: Vec<String> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        let mut expected = [format!("{digest}.0"), format!("{digest}.0.json"), format!("{digest}.7"), "kept".to_owned(), "x.json".to_owned()];
        expected.sort();
        assert_eq!(left, expected);
        assert!(at("kept/inside").exists(), "what is not ours is not lost");
    }

    #[test]
    fn a_record_that_cannot_be_written_leaves_nothing_behind() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mounts = MountDir::open(dir.path()).expect("open");
        let digest = Digest::of(b"image");
        // A directory in its place: the rename fails as the write does on a full disk.
        fs::create_dir(dir.path().join(format!("{digest}.0.json"))).expect("a directory");
        mounts.prepare(&digest, &image(1), Way::Direct).expect_err("not written");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn names_of_mount_points_are_exact() {
        let digest = Digest::of(b"x");
        for (name, number) in [(format!("{digest}.0"), Some(0)), (format!("{digest}.17"), Some(17)), (format!("{digest}.017"), None)] {
            assert_eq!(parse_name(&name), number.map(|n| (digest, n)), "{name}");
        }
        for name in [digest.to_string(), format!("{digest}."), "x.0".to_owned(), format!("{digest}.0.json"), format!("{digest}.+1")] {
            assert_eq!(parse_name(&name), None, "{name}");
        }
    }

    #[test]
    fn overlays_over_an_image_are_seen() {
        let check = |options: &str, used: bool| {
            let line = format!("1 1 0:9 / /rootfs rw - overlay overlay {options}\n");
            assert_eq!(overlay_uses(&parse_mountinfo(line.as_bytes()), Path::new("/s/mounts/d.0")), used, "{options}");
        };
        check("rw,lowerdir=/s/mounts/d.0,upperdir=/u,workdir=/w", true);
        check("rw,lowerdir=/a:/s/mounts/d.0:/b", true);
        check("rw,lowerdir+=/a,lowerdir+=/s/mounts/d.0", true);
        check("rw,lowerdir=1/fs:mounts/d.0", true);
        check("rw,lowerdir=/s/mounts/d.01:/b", false);
        check("rw,lowerdir=/a,upperdir=/s/mounts/d.0", false);
        check("rw,lowerdir=", false);
        let other = parse_mountinfo(b"1 1 0:9 / /rootfs rw - erofs none lowerdir=/s/mounts/d.0\n");
        assert!(!overlay_uses(&other, Path::new("/s/mounts/d.0")));
    }

    proptest! {
        #[test]
        fn reading_names_never_panics(name in any::<String>()) {
            parse_name(&name);
        }
    }
}
