//! Layers converted and folded, compared with what containerd on overlayfs unpacks and the kernel then shows: random ones, and the extremes of what
//! layers may have.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use testbed::{Containerd, Entry, EntryKind, Layer, Scratch, Snapshotter, need, require};

use crate::features::{CONTAINERD_ONLY, EVERYWHERE, Features};
use crate::random::{Made, Referee, entries};
use crate::referee::{Compare, Listing, assert_same, host, layout, run};

/// Random images per run; each takes a fifth of a second.
const IMAGES: u64 = 100;

/// A containerd whose everything is on a tmpfs: that holds times and extended attributes that ext4 does not, and is quick.
struct Unpacker {
    containerd: Containerd,
    tmpfs: Tmpfs,
}

struct Tmpfs(Scratch);

impl Drop for Tmpfs {
    fn drop(&mut self) {
        run("umount", &["-l", "."], self.0.path());
    }
}

impl Unpacker {
    fn start() -> Unpacker {
        let scratch = Scratch::new("ctd").expect("a scratch directory");
        run("mount", &["-t", "tmpfs", "-o", "size=3g,mode=755", "tmpfs", &scratch.path().to_string_lossy()], Path::new("/"));
        let tmpfs = Tmpfs(scratch);
        let containerd = Containerd::start(&tmpfs.0.join("c"), Snapshotter::Overlayfs).expect("a containerd");
        Unpacker { containerd, tmpfs }
    }

    /// What a container of these layers sees, or why containerd does not unpack them.
    fn unpack(&self, number: u64, tars: &[Vec<u8>]) -> Result<Listing> {
        // The place to mount at is also the snapshot's name, so each has its own.
        let (dir, archive, root) = (self.tmpfs.0.join("i"), self.tmpfs.0.join("i.tar"), self.tmpfs.0.make_dir(format!("r{number}"))?);
        layout(&dir, tars);
        let reference = format!("docker.io/library/random:{number}");
        let index = fs::read_to_string(dir.join("index.json"))?;
        fs::write(
            dir.join("index.json"),
            index.replace("\"org.opencontainers.image.ref.name\":\"t\"", &format!("\"io.containerd.image.name\":\"{reference}\"")),
        )?;
        run("tar", &["-cf", "../i.tar", "."], &dir);
        fs::remove_dir_all(&dir)?;
        self.containerd.ctr(&["images", "import", "--no-unpack", &archive.to_string_lossy()])?;
        fs::remove_file(&archive)?;
        // Unpacks what is not yet, as a pull does.
        self.containerd.ctr(&["images", "mount", &reference, &root.to_string_lossy()])?;
        let listing = host(&root, Compare::All);
        let unmounted = Command::new("umount").arg(&root).status()?;
        ensure!(unmounted.success(), "{} cannot be unmounted", root.display());
        Ok(listing)
    }

    /// Fails unless the converter and containerd make the same of these layers.
    fn assert_same(&self, number: u64, made: &Made, what: &str) {
        let mut expected = self.unpack(number, &made.tars).with_context(|| what.to_owned()).unwrap_or_else(|e| panic!("{e:?}"));
        let mut found = made.listing(Compare::All);
        without_times(&mut expected, &made.implied);
        without_times(&mut found, &made.implied);
        assert_same(&expected, &found, what);
    }
}

/// Drops the times of directories that no entry lists: containerd leaves that of the last change in them, the fold what the layer below said.
fn without_times(listing: &mut Listing, implied: &BTreeSet<String>) {
    for path in implied {
        if let Some(line) = listing.get_mut(path).filter(|line| line.starts_with("dir ")) {
            *line = line.split(' ').enumerate().filter(|(i, _)| *i != 3).map(|(_, word)| word).collect::<Vec<_>>().join(" ");
        }
    }
}

#[test]
fn images_come_out_as_a_container_on_overlayfs_sees_them() {
    require!(need::containers());
    let mut seen = Features::new("layers for containerd", &[EVERYWHERE, CONTAINERD_ONLY]);
    let unpacker = Unpacker::start();
    for seed in 0..IMAGES {
        let made = Made::random(seed, Referee::Containerd, &mut seen);
        unpacker.assert_same(seed, &made, &format!("image {seed}:\n{}", entries(&made.tars)));
    }
    for (number, (feature, tars)) in extremes().into_iter().enumerate() {
        let mut made = Made::of(tars).unwrap_or_else(|e| panic!("{feature}: {e}"));
        made.implied = made.listing(Compare::All).into_iter().filter(|(_, line)| line.starts_with("dir ")).map(|(path, _)| path).collect();
        unpacker.assert_same(IMAGES + number as u64, &made, feature);
        seen.saw(feature);
    }
    for (number, (feature, tar, refusal)) in refused().into_iter().enumerate() {
        let error = unpacker.unpack(2 * IMAGES + number as u64, std::slice::from_ref(&tar)).expect_err(feature);
        eprintln!("{feature}: containerd says {error:#}");
        match (Made::of([tar]), refusal) {
            (Err(error), Some(refusal)) => assert!(error.to_string().contains(refusal), "{feature}: {error}"),
            (Ok(_), None) => (),
            (Err(error), None) => panic!("{feature}: {error}"),
            (Ok(_), Some(refusal)) => panic!("{feature}: converted, although {refusal}"),
        }
        seen.saw(feature);
    }
    seen.report();
}

/// A file so many directories deep.
fn deep(levels: usize) -> Vec<u8> {
    Layer::new([Entry::file(&format!("{}file", "d/".repeat(levels)), "deep")]).tar()
}

/// What random layers cannot be asked for.
fn extremes() -> Vec<(&'static str, Vec<Vec<u8>>)> {
    let many = (0..100_000).map(|i| Entry::file(&format!("many/{i}"), ""));
    let many = Layer::new([Entry::dir("many")].into_iter().chain(many)).tar();
    // Each replaces, removes or adds to what the ones below have.
    let stack = (0..128).map(|i| {
        let own = Entry::file(&format!("d/{}", i % 50), format!("{i}"));
        let gone = (i >= 50).then(|| Entry::whiteout(&format!("d/{}", (i + 7) % 50)));
        Layer::new([Entry::dir("d").mtime(i, 0), own].into_iter().chain(gone)).tar()
    });
    // EROFS has 16 bits for the length, so one byte less than the kernel allows elsewhere.
    let large =
        Layer::new([Entry::file("large", "").xattr("user.large", &[b'v'; 65535]), Entry::dir("dir").xattr("user.large", &[b'w'; 65535])]).tar();
    let linked = vec![
        Layer::new([Entry::dir("to").mode(0o750).owner(5, 6), Entry::file("to/a", "a"), Entry::symlink("link", "to")]).tar(),
        Layer::new([Entry::file("link/b", "b")]).tar(),
    ];
    vec![
        ("100 000 files in one directory", vec![many]),
        ("128 layers", stack.collect()),
        ("extended attribute of 64 KiB", vec![large]),
        // What containerd puts in front of a path needs some of PATH_MAX too.
        ("path as deep as PATH_MAX allows", vec![deep(1900)]),
        ("symbolic link of a layer below in a parent", linked),
    ]
}

/// What containerd does not unpack, and the converter's refusal if it refuses as well.
fn refused() -> Vec<(&'static str, Vec<u8>, Option<&'static str>)> {
    let mut sparse = tar_core::EntryBuilder::new_gnu();
    sparse.path("sparse").mode(0o644).unwrap().size(3).unwrap().mtime(1).unwrap();
    sparse.sparse(&[tar_core::SparseEntry { offset: 5000, length: 3 }], 9000);
    let mut sparse = sparse.finish_bytes();
    sparse.extend_from_slice(b"abc");
    sparse.resize(sparse.len().next_multiple_of(512) + 1024, 0);
    // No tar format has a type for sockets; star wrote this one.
    let mut socket = Layer::new([Entry::new("socket", EntryKind::Fifo)]).tar();
    socket[156] = b's';
    let sum: u32 = socket[..512].iter().enumerate().map(|(i, b)| if (148..156).contains(&i) { 32 } else { u32::from(*b) }).sum();
    socket[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    vec![
        ("GNU's old sparse file (refused by containerd)", sparse, None),
        ("path 4 000 deep (refused by containerd)", deep(4000), None),
        ("socket (refused by both)", socket, Some("tar entry type 's'")),
    ]
}
