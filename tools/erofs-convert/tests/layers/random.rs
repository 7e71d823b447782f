//! Random layers converted and folded, compared with what umoci unpacks from the same image.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{Command, Stdio};

use crate::referee::{Compare, assert_same, folded, host, is_root, layout, run};
use erofs::block::UnitBits;
use erofs::fold::fold;
use erofs::layer::{EntryKind, LayerTree};
use erofs::tree::{Body, Tree};
use erofs_convert::layer::{LayerOptions, MemorySink, convert_layer};
use tar_core::{EntryBuilder, EntryType};

/// Images per run; each takes umoci a tenth of a second.
const IMAGES: u64 = 100;

/// A sequence that is the same on every machine (splitmix64).
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

const NAMES: [&str; 5] = ["a", "b", "dir", "e.so", "f"];

/// A layer being made: what it says so far, and what the layers below hold.
struct Maker<'a> {
    random: &'a mut Random,
    tar: Vec<u8>,
    /// Kinds of paths that this layer has entries for: `d` directory, `l` link to a layer below, `f` any other file, `w` whiteout.
    own: BTreeMap<String, char>,
    /// Paths below and whether they are directories.
    below: BTreeMap<String, bool>,
    /// Paths that links to layers below stand for: to put something there as well is refused.
    linked: BTreeSet<String>,
    /// Whether the layer has a directory that hides what is below.
    opaque: bool,
    seen: &'a mut BTreeMap<&'static str, usize>,
    /// Attributes of entries, for links to them: umoci ignores a link's own, so here links repeat the file's. (`syscalls` has
    /// those that do not.)
    attributes: BTreeMap<String, Attributes>,
}

#[derive(Clone, Copy)]
struct Attributes {
    mode: u32,
    uid: u64,
    gid: u64,
    sec: usize,
    nsec: Option<usize>,
}

fn parent(path: &str) -> Option<&str> {
    path.rsplit_once('/').map(|(parent, _)| parent)
}

impl Maker<'_> {
    fn saw(&mut self, feature: &'static str) {
        *self.seen.entry(feature).or_default() += 1;
    }

    fn path(&mut self) -> String {
        let depth = self.random.below(3) + 1;
        let names: Vec<_> = (0..depth).map(|_| self.random.pick(&NAMES)).collect();
        names.join("/")
    }

    /// Whether everything above the path is a directory here, or, where this layer says nothing, below. (Through links in lower layers
    /// umoci goes, while containerd's overlayfs differ makes a directory in their place.)
    fn in_directories(&self, path: &str) -> bool {
        let mut at = path;
        while let Some(dir) = parent(at) {
            match (self.own.get(dir), self.below.get(dir)) {
                (Some('d'), _) => (),
                (Some(_), _) | (None, Some(false)) => return false,
                // containerd copies attributes also from a directory that the layer hides, umoci does not.
                (None, Some(true)) if self.opaque => return false,
                (None, _) => (),
            }
            at = dir;
        }
        true
    }

    /// Whether the layer is free to put something at the path or take it away.
    fn free(&self, path: &str) -> bool {
        self.in_directories(path) && !self.linked.iter().any(|linked| linked == path || linked.starts_with(&format!("{path}/")))
    }

    /// Whether the directory of a whiteout is sure to exist: umoci leaves it out otherwise, while containerd makes it first.
    fn exists_for_whiteout(&self, path: &str) -> bool {
        parent(path).is_none_or(|dir| self.own.get(dir) == Some(&'d') || (self.below.get(dir) == Some(&true) && !self.opaque))
    }

    fn forget_below(&mut self, path: &str) {
        let prefix = format!("{path}/");
        self.own.retain(|own, _| !own.starts_with(&prefix));
    }

    fn note(&mut self, path: &str, kind: char) {
        let mut at = path;
        while let Some(dir) = parent(at) {
            if !self.own.contains_key(dir) {
                self.saw("implied parent");
                self.own.insert(dir.to_owned(), 'd');
            }
            at = dir;
        }
        let before = self.own.insert(path.to_owned(), kind);
        self.opaque |= before.is_some_and(|before| before != 'd');
        match (before, self.below.get(path)) {
            (Some('d'), _) if kind == 'f' => self.saw("directory replaced in its layer"),
            (Some('f'), _) if kind == 'd' => self.saw("file replaced by directory in its layer"),
            (Some('f'), _) if kind == 'f' => self.saw("duplicate"),
            (Some('w'), _) => self.saw("whiteout, then entry"),
            (None, Some(true)) if kind == 'f' => self.saw("directory below replaced"),
            (None, Some(false)) if kind == 'd' => self.saw("file below replaced by directory"),
            _ => (),
        }
        if kind == 'f' {
            self.forget_below(path);
        }
    }

    fn write(&mut self, path: &str, kind: EntryType, link: &str, bytes: &[u8]) {
        let mut entry = EntryBuilder::new_ustar();
        let random = &mut *self.random;
        let any = Attributes {
            mode: random.pick(&[0o644, 0o755, 0o600, 0o4755, 0o2711, 0o1777, 0o7000]),
            uid: random.pick(&[0, 1, 1000, 3_000_000]),
            gid: random.pick(&[0, 5, 70_000]),
            sec: random.below(2_000_000_000),
            nsec: (random.below(3) == 0).then(|| random.below(1_000_000_000)),
        };
        // In a set-group-ID directory the kernel gives what umoci makes for implied parents that directory's group and bit.
        let any = if kind == EntryType::Directory { Attributes { mode: any.mode & !0o2000, ..any } } else { any };
        let of = self.attributes.get(link).copied().filter(|_| kind == EntryType::Link).unwrap_or(any);
        self.attributes.insert(path.to_owned(), of);
        let prefix = random.pick(&["", "./", "/"]);
        let slash = if kind == EntryType::Directory { random.pick(&["", "/"]) } else { "" };
        entry.path(format!("{prefix}{path}{slash}")).entry_type(kind).mode(of.mode).unwrap().size(bytes.len() as u64).unwrap();
        entry.uid(of.uid).unwrap().gid(of.gid).unwrap();
        match of.nsec {
            Some(nsec) => entry.add_pax("mtime", format!("{}.{nsec:09}", of.sec)),
            None => entry.mtime(of.sec as u64).unwrap(),
        };
        if !link.is_empty() {
            entry.link_name(link);
        }
        if matches!(kind, EntryType::Char | EntryType::Block) {
            entry.device(random.below(300) as u32 + 1, random.below(1000) as u32).unwrap();
        }
        match kind {
            EntryType::Regular if random.below(4) == 0 => _ = entry.add_pax("SCHILY.xattr.user.note", format!("n{}", random.below(3))),
            // Always the same of one directory: a later entry adds to what containerd has set, umoci begins anew.
            EntryType::Directory if path.len().is_multiple_of(2) => _ = entry.add_pax("SCHILY.xattr.user.note", path),
            _ => (),
        }
        self.tar.extend_from_slice(&entry.finish_bytes());
        self.tar.extend_from_slice(bytes);
        self.tar.resize(self.tar.len().next_multiple_of(512), 0);
    }

    fn bytes(&mut self) -> Vec<u8> {
        let len = self.random.pick(&[0, 1, 256, 257, 4096, 5000, 65536, 70_000, 200_000]);
        // Few kinds of content, so that chunks repeat, some of them zero.
        let seed = self.random.below(4) as u32;
        (0..len as u32).map(|i| if seed == 0 { 0 } else { (i / 4096 + i % 251 * seed) as u8 }).collect()
    }

    fn step(&mut self) {
        let path = self.path();
        match self.random.below(12) {
            0..=3 if self.free(&path) => {
                let bytes = self.bytes();
                self.saw("file");
                self.note(&path, 'f');
                self.write(&path, EntryType::Regular, "", &bytes);
            }
            4 | 5 if self.free(&path) => {
                self.saw("directory");
                self.note(&path, 'd');
                self.write(&path, EntryType::Directory, "", &[]);
            }
            6 if self.free(&path) => {
                self.saw("symbolic link");
                self.note(&path, 'f');
                let target = self.random.pick(&["a", "../b", "/dir/e.so", "nowhere"]);
                self.write(&path, EntryType::Symlink, target, &[]);
            }
            7 if self.free(&path) => {
                let kind = self.random.pick(&[EntryType::Fifo, EntryType::Char, EntryType::Block]);
                self.saw("device or fifo");
                self.note(&path, 'f');
                self.write(&path, kind, "", &[]);
            }
            8 => self.link(&path),
            9 | 10 if self.free(&path) && self.exists_for_whiteout(&path) => {
                match self.own.get(&path) {
                    None => {
                        self.saw(if self.below.contains_key(&path) { "whiteout" } else { "whiteout of nothing" });
                        self.note(&path, 'w');
                    }
                    Some('w') => return,
                    Some(_) => {
                        self.opaque = true;
                        self.saw("entry, then whiteout");
                    }
                }
                let name = path.rsplit('/').next().expect("a path has a last name");
                let whiteout = format!("{}.wh.{name}", &path[..path.len() - name.len()]);
                self.write(&whiteout, EntryType::Regular, "", &[]);
            }
            11 if self.free(&path) && self.own.get(&path) == Some(&'d') => {
                self.saw("opaque directory");
                self.opaque = true;
                self.write(&format!("{path}/.wh..wh..opq"), EntryType::Regular, "", &[]);
            }
            _ => (),
        }
    }

    /// A hard link to a file of this layer, or, as long as the layer is empty, of a layer below.
    fn link(&mut self, path: &str) {
        let own: Vec<_> = self.own.iter().filter(|(target, kind)| **kind == 'f' && *target != path).map(|(target, _)| target.clone()).collect();
        let below: Vec<_> = self.below.iter().filter(|(target, is_dir)| !**is_dir && *target != path).map(|(target, _)| target.clone()).collect();
        let prefix = format!("{path}/");
        if !self.free(path) {
        } else if self.tar.is_empty() && !below.is_empty() {
            let target = below[self.random.below(below.len())].clone();
            if !target.starts_with(&prefix) {
                self.saw("hard link to a layer below");
                self.note(path, 'f');
                self.write(path, EntryType::Link, &target, &[]);
                self.own.insert(path.to_owned(), 'l');
                self.linked.extend([path.to_owned(), target]);
            }
        } else if !own.is_empty() {
            let target = own[self.random.below(own.len())].clone();
            if !target.starts_with(&prefix) {
                self.saw("hard link");
                self.note(path, 'f');
                self.write(path, EntryType::Link, &target, &[]);
            }
        }
    }
}

/// The entries of every layer, for the report.
fn entries(tars: &[Vec<u8>]) -> String {
    let list = |tar: &Vec<u8>| {
        let mut child = Command::new("tar").arg("-tvP").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("GNU tar is installed");
        child.stdin.take().expect("it was asked for").write_all(tar).expect("tar reads it");
        String::from_utf8_lossy(&child.wait_with_output().expect("tar ends").stdout).into_owned()
    };
    tars.iter().map(list).collect::<Vec<_>>().join("--\n")
}

fn paths(tree: &Tree) -> BTreeMap<String, bool> {
    let mut out = BTreeMap::new();
    let mut todo = vec![(String::new(), Tree::ROOT)];
    while let Some((path, index)) = todo.pop() {
        let children = match &tree.inode(index).body {
            Body::Dir(children) => Some(children),
            Body::Content(_) => None,
        };
        for (name, child) in children.into_iter().flatten() {
            let name = std::str::from_utf8(name).expect("names are ASCII");
            todo.push((if path.is_empty() { name.to_owned() } else { format!("{path}/{name}") }, *child));
        }
        out.insert(path, children.is_some());
    }
    out.remove("");
    out
}

#[test]
fn random_images_come_out_as_umoci_unpacks_them() {
    if !is_root("random_images_come_out_as_umoci_unpacks_them") {
        return;
    }
    let mut seen = BTreeMap::new();
    for seed in 0..IMAGES {
        let mut random = Random(seed);
        let (mut tars, mut trees, mut sink): (Vec<Vec<u8>>, Vec<LayerTree>, _) = (vec![], vec![], MemorySink::default());
        for _ in 0..random.below(4) + 1 {
            let below = paths(&fold(&trees).unwrap());
            let mut maker = Maker {
                random: &mut random,
                tar: vec![],
                own: BTreeMap::new(),
                below,
                linked: BTreeSet::new(),
                opaque: false,
                seen: &mut seen,
                attributes: BTreeMap::new(),
            };
            for _ in 0..maker.random.below(25) {
                maker.step();
            }
            let mut tar = maker.tar;
            tar.resize(tar.len() + 1024, 0);
            let mut own = MemorySink::default();
            let options = LayerOptions { unit_bits: UnitBits::MIN, threads: 2, ..LayerOptions::default() };
            let tree = convert_layer(&tar[..], &mut own, &options).unwrap_or_else(|e| panic!("image {seed}: {e}"));
            *seen.entry("opaque in the tree").or_default() +=
                tree.entries.iter().filter(|e| matches!(e.kind, EntryKind::Dir { opaque: true, .. })).count();
            sink.packs.extend(own.packs);
            trees.push(tree);
            tars.push(tar);
        }
        let dir = tempfile::tempdir().unwrap();
        layout(&dir.path().join("layout"), &tars);
        run("umoci", &["raw", "unpack", "--image", "layout:t", "root"], dir.path());
        let compare = Compare::AllButDirTimes;
        let found = folded(&fold(&trees).unwrap(), &sink, compare);
        assert_same(&host(&dir.path().join("root"), compare), &found, &format!("image {seed}:\n{}", entries(&tars)));
    }
    for (feature, count) in &seen {
        println!("{count:6} {feature}");
    }
    for feature in [
        "file",
        "directory",
        "symbolic link",
        "device or fifo",
        "hard link",
        "hard link to a layer below",
        "whiteout",
        "whiteout of nothing",
        "opaque directory",
        "whiteout, then entry",
        "entry, then whiteout",
        "duplicate",
        "directory replaced in its layer",
        "file replaced by directory in its layer",
        "directory below replaced",
        "file below replaced by directory",
        "implied parent",
        "opaque in the tree",
    ] {
        assert!(seen.get(feature).copied().unwrap_or(0) > 0, "no image had: {feature}");
    }
}
