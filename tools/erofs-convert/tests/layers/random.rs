//! Random layers converted and folded, compared with what umoci unpacks from the same image.

mod made;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{Command, Stdio};

use crate::exported::Way;
use crate::features::{EVERYWHERE, Features, UMOCI_ONLY};
use crate::referee::{Compare, Listing, assert_same, folded, host, is_root, layout, run};
use crate::syscalls::{CAPABILITY, any_acl};
use erofs::block::UnitBits;
use erofs::fold::fold;
use erofs::layer::{EntryKind, LayerTree};
use erofs::tree::{Body, Tree};
use erofs_convert::layer::{ConvertError, Converted, LayerOptions, MemorySink, convert_layer_framed};
use tar_core::{EntryBuilder, EntryType, SparseEntry};

pub use made::{Made, entries};

/// Images per run; each takes umoci a tenth of a second.
const IMAGES: u64 = 200;

/// Who unpacks the same layers. Where two of them differ, containerd is right; the generator keeps from each what it does otherwise.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Referee {
    Umoci,
    Containerd,
}

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

/// Few, so that entries meet. Bytes as Latin-1, here and wherever paths are text: one is not UTF-8, one is too long for a plain header.
const NAMES: [&str; 9] = ["a", "b", "dir", "a", "b", "dir", "e.so", "\u{ff}", LONG];
const LONG: &str = "long-long-long-long-long-long-long-long-long-long-long-long-long-long-long-long-long-long-long-long-long-long-long-long-";

fn raw(path: &str) -> Vec<u8> {
    path.chars().map(|c| c as u8).collect()
}

/// A layer being made: what it says so far, and what the layers below hold.
struct Maker<'a> {
    random: &'a mut Random,
    tar: Vec<u8>,
    /// Kinds of paths that this layer has entries for: `d` directory, `l` link to a layer below, `f` any other file, `w` whiteout.
    own: BTreeMap<String, char>,
    /// Paths below and whether they are directories.
    below: BTreeMap<String, bool>,
    /// Those of them that are one of several names.
    below_links: BTreeSet<String>,
    /// Paths that any layer below had, also hidden ones, and whether any had something else there than a directory.
    ever: &'a BTreeMap<String, bool>,
    /// Directories that their last layer did not list: their times are those of unpacking.
    implied: &'a mut BTreeSet<String>,
    /// Symbolic links of this layer and where they lead, if to a place in the image.
    symlinks: BTreeMap<String, String>,
    /// Directories that this layer has listed, whatever became of them.
    listed: BTreeSet<String>,
    referee: Referee,
    /// Paths that links to layers below stand for: to put something there as well is refused.
    linked: BTreeSet<String>,
    /// Whether the layer has a directory that hides what is below.
    opaque: bool,
    seen: &'a mut Features,
    /// Attributes of entries, for links to them: umoci ignores a link's own, so here links repeat the file's. (`syscalls` has
    /// those that do not.)
    attributes: BTreeMap<String, Attributes>,
}

/// Two regions of a file, and its size, when its data may be written sparsely: zeros take the place of everything else.
const SPARSE: ((usize, usize), (usize, usize), usize) = ((1000, 5000), (100_000, 7), 200_000);

#[derive(Clone, Copy)]
struct Attributes {
    mode: u32,
    uid: u64,
    gid: u64,
    sec: i64,
    nsec: Option<usize>,
}

/// Where a link leads; `None` if to nothing that a path here could name.
fn leads(link: &str, target: &str) -> Option<String> {
    let start = if target.starts_with('/') { "" } else { parent(link).unwrap_or_default() };
    let mut names: Vec<&str> = start.split('/').filter(|name| !name.is_empty()).collect();
    for name in target.split('/') {
        match name {
            "" | "." => (),
            ".." => _ = names.pop(),
            name => names.push(name),
        }
    }
    Some(names.join("/")).filter(|path| !path.is_empty())
}

fn parent(path: &str) -> Option<&str> {
    path.rsplit_once('/').map(|(parent, _)| parent)
}

/// Whether `dir` is the path, or, if that counts too, below it.
fn is_or_below(dir: &str, path: &str, below: bool) -> bool {
    dir == path || below && dir.starts_with(&format!("{path}/"))
}

impl Maker<'_> {
    fn saw(&mut self, feature: &'static str) {
        self.seen.saw(feature);
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
                (None, Some(true)) if self.opaque && self.referee == Referee::Umoci => return false,
                // What was removed stays so; containerd would copy its attributes. Where it became a file or a whiteout, containerd fails.
                (None, None) if self.referee == Referee::Containerd && self.ever.iter().any(|(e, other)| is_or_below(dir, e, *other)) => {
                    return false;
                }
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

    /// Whether what is no directory may come here. Not for containerd where the layer has listed a directory: at the layer's end it sets the times
    /// of all listed directories by name, so that the file in its place gets that time, or what a symbolic link leads to, or it fails.
    fn free_for_file(&self, path: &str) -> bool {
        let was_listed = |dir: &String| dir == path || dir.starts_with(&format!("{path}/"));
        self.free(path) && (self.referee == Referee::Umoci || !self.listed.iter().any(was_listed))
    }

    /// Whether a directory may come here. In place of what the layer itself had there it is opaque by the specification, while containerd shows the
    /// directory below again. And one that is listed after what is in it has for containerd the extended attributes of the directory below as well.
    fn free_for_directory(&self, path: &str) -> bool {
        let came_back = matches!(self.own.get(path), Some('f' | 'w'));
        let late = self.own.get(path) == Some(&'d') && !self.listed.contains(path);
        self.free(path) && (self.referee == Referee::Umoci || !(came_back || late) || self.below.get(path) != Some(&true))
    }

    fn forget_below(&mut self, path: &str) {
        let prefix = format!("{path}/");
        self.symlinks.retain(|own, _| !own.starts_with(&prefix));
        self.implied.retain(|own| !own.starts_with(&prefix));
        self.own.retain(|own, _| !own.starts_with(&prefix));
    }

    fn note(&mut self, path: &str, kind: char) {
        let mut at = path;
        while let Some(dir) = parent(at) {
            if !self.own.contains_key(dir) {
                self.saw("implied parent");
                self.own.insert(dir.to_owned(), 'd');
                self.implied.insert(dir.to_owned());
            }
            at = dir;
        }
        let before = self.own.insert(path.to_owned(), kind);
        self.symlinks.remove(path);
        self.implied.remove(path);
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
        if kind != 'd' {
            self.forget_below(path);
        }
    }

    fn attributes(&mut self, path: &str, kind: EntryType, link: &str) -> Attributes {
        let random = &mut *self.random;
        let mut any = Attributes {
            mode: random.pick(&[0o644, 0o755, 0o600, 0o4755, 0o2711, 0o1777, 0o7000]),
            uid: random.pick(&[0, 1, 1000, 3_000_000, 4_000_000_000]),
            gid: random.pick(&[0, 5, 70_000]),
            sec: random.below(2_000_000_000) as i64,
            nsec: (random.below(3) == 0).then(|| random.below(1_000_000_000)),
        };
        if self.referee == Referee::Containerd && self.random.below(5) == 0 {
            let (feature, sec) =
                self.random.pick(&[("PAX negative time", -5), ("PAX far time", 9_000_000_000), ("PAX time no file system has", 99_999_999_999)]);
            self.saw(feature);
            any.sec = sec;
        }
        // In a set-group-ID directory the kernel gives what is made for implied parents that directory's group and bit.
        if kind == EntryType::Directory {
            any.mode &= !0o2000;
        }
        let of = self.attributes.get(link).copied().filter(|_| kind == EntryType::Link);
        let attributes = match of {
            Some(_) if self.referee == Referee::Containerd => {
                self.saw("link with attributes of its own");
                any
            }
            Some(of) => of,
            None => any,
        };
        self.attributes.insert(path.to_owned(), attributes);
        attributes
    }

    /// Records for extended attributes.
    fn xattrs(&mut self, path: &str, kind: EntryType) -> Vec<(&'static str, Vec<u8>)> {
        let mut out = Vec::new();
        match kind {
            EntryType::Regular if self.random.below(4) == 0 => out.push(("user.note", format!("n{}", self.random.below(3)).into_bytes())),
            // Always the same of one directory: a later entry adds to what containerd has set, umoci begins anew.
            EntryType::Directory if path.len().is_multiple_of(2) => out.push(("user.note", raw(path))),
            _ => (),
        }
        if !out.is_empty() {
            self.saw("user extended attribute");
        }
        if self.referee == Referee::Umoci || !matches!(kind, EntryType::Regular | EntryType::Directory) || self.random.below(3) > 0 {
            return out;
        }
        let is_dir = kind == EntryType::Directory;
        out.push(match self.random.below(3) {
            0 => {
                self.saw("ACL");
                ("system.posix_acl_access", any_acl(self.random))
            }
            1 if !is_dir => {
                self.saw("capability");
                ("security.capability", CAPABILITY.to_vec())
            }
            _ => {
                self.saw("trusted.overlay.* (stripped)");
                if is_dir { ("trusted.overlay.opaque", b"y".to_vec()) } else { ("trusted.overlay.redirect", b"/a".to_vec()) }
            }
        });
        out
    }

    /// The path as the archive has it: perhaps through a symbolic link of this layer to where it is.
    fn spelled(&mut self, path: &str, kind: EntryType) -> Vec<u8> {
        let mut name = path.to_owned();
        if let Some(dir) = parent(path)
            && (self.referee == Referee::Umoci || kind != EntryType::Directory)
            && self.random.below(2) == 0
            && let Some((link, _)) = self.symlinks.iter().find(|(link, leads)| *leads == dir && !link.starts_with(&format!("{dir}/")))
        {
            name = format!("{link}/{}", &path[dir.len() + 1..]);
            self.saw("symbolic link in a parent");
        }
        let prefix = self.random.pick(&["", "./", "/"]);
        let slash = if kind == EntryType::Directory { self.random.pick(&["", "/"]) } else { "" };
        raw(&format!("{prefix}{name}{slash}"))
    }

    fn write(&mut self, path: &str, kind: EntryType, link: &str, bytes: &[u8]) {
        let of = self.attributes(path, kind, link);
        let xattrs = self.xattrs(path, kind);
        let name = self.spelled(path, kind);
        let pax_time = of.nsec.is_some() || of.sec < 0;
        let sparse = kind == EntryType::Regular && bytes.len() == SPARSE.2 && self.random.below(2) == 0;
        let gnu = xattrs.is_empty() && !pax_time && !sparse && self.random.below(3) == 0;
        let mut entry = if gnu { EntryBuilder::new_gnu() } else { EntryBuilder::new_ustar() };
        for (seen, feature) in [
            (name.contains(&0xff), "name that is not UTF-8"),
            (of.mode & 0o7000 != 0, "setuid, setgid or sticky"),
            (of.nsec.is_some(), "PAX nanoseconds"),
            (gnu && of.uid > 0o7_777_777, "GNU huge owner"),
            (!gnu && of.uid > 0o7_777_777, "PAX huge owner"),
            (gnu && name.len() > 100, "GNU long name"),
            (!gnu && name.len() > 100, "PAX long name"),
        ] {
            if seen {
                self.saw(feature);
            }
        }
        let ((at, len), more, _) = SPARSE;
        let data = if sparse { [&bytes[at..at + len], &bytes[more.0..more.0 + more.1]].concat() } else { bytes.to_vec() };
        entry.path(&name).entry_type(kind).mode(of.mode).unwrap().size(data.len() as u64).unwrap();
        entry.uid(of.uid).unwrap().gid(of.gid).unwrap();
        match of.nsec.or((of.sec < 0).then_some(0)) {
            Some(nsec) => _ = entry.add_pax("mtime", format!("{}.{nsec:09}", of.sec)),
            None => _ = entry.mtime(of.sec as u64).unwrap(),
        }
        if !link.is_empty() {
            entry.link_name(raw(link));
        }
        if matches!(kind, EntryType::Char | EntryType::Block) {
            entry.device(self.random.below(300) as u32 + 1, self.random.below(1000) as u32).unwrap();
        }
        for (name, value) in xattrs {
            entry.add_pax(&format!("SCHILY.xattr.{name}"), value);
        }
        if sparse {
            self.sparse(&mut entry);
        }
        self.tar.extend_from_slice(&entry.finish_bytes());
        self.tar.extend_from_slice(&data);
        self.tar.resize(self.tar.len().next_multiple_of(512), 0);
    }

    /// Makes an entry one of the sparse files that GNU tar writes with PAX headers.
    fn sparse(&mut self, entry: &mut EntryBuilder) {
        let (one, two, size) = SPARSE;
        let regions = [one, two];
        match self.random.below(3) {
            0 => {
                self.saw("PAX sparse file 0.0");
                entry.add_pax("GNU.sparse.size", size.to_string()).add_pax("GNU.sparse.numblocks", "2");
                for (at, len) in regions {
                    entry.add_pax("GNU.sparse.offset", at.to_string()).add_pax("GNU.sparse.numbytes", len.to_string());
                }
            }
            1 => {
                self.saw("PAX sparse file 0.1");
                entry.add_pax("GNU.sparse.size", size.to_string()).add_pax("GNU.sparse.numblocks", "2");
                entry.add_pax("GNU.sparse.map", format!("{},{},{},{}", one.0, one.1, two.0, two.1));
            }
            _ => {
                self.saw("PAX sparse file 1.0");
                entry.sparse(&regions.map(|(at, len)| SparseEntry { offset: at as u64, length: len as u64 }), size as u64);
            }
        }
    }

    fn bytes(&mut self) -> Vec<u8> {
        let len = self.random.pick(&[0, 1, 256, 257, 4096, 5000, 65536, 70_000, SPARSE.2]);
        // Few kinds of content, so that chunks repeat, some of them zero.
        let seed = self.random.below(4) as u32;
        let (one, two, size) = SPARSE;
        let hole = |i: usize| len == size && ![one, two].iter().any(|(at, len)| (*at..at + len).contains(&i));
        (0..len).map(|i| if seed == 0 || hole(i) { 0 } else { (i as u32 / 4096 + i as u32 % 251 * seed) as u8 }).collect()
    }

    fn step(&mut self) {
        let path = self.path();
        match self.random.below(12) {
            0..=3 if self.free_for_file(&path) => {
                let bytes = self.bytes();
                self.saw("file");
                self.note(&path, 'f');
                self.write(&path, EntryType::Regular, "", &bytes);
            }
            4 | 5 if self.free_for_directory(&path) => {
                self.saw("directory");
                self.listed.insert(path.clone());
                self.note(&path, 'd');
                self.write(&path, EntryType::Directory, "", &[]);
            }
            6 if self.free_for_file(&path) => {
                self.saw("symbolic link");
                self.note(&path, 'f');
                let target = self.random.pick(&["a", "../b", "/dir/e.so", "nowhere", "/dir", "dir", "/a/b"]);
                self.write(&path, EntryType::Symlink, target, &[]);
                self.symlinks.extend(leads(&path, target).map(|leads| (path, leads)));
            }
            7 if self.free_for_file(&path) => {
                let kinds = [(EntryType::Fifo, "fifo"), (EntryType::Char, "character device"), (EntryType::Block, "block device")];
                let (kind, feature) = self.random.pick(&kinds);
                self.saw(feature);
                self.note(&path, 'f');
                self.write(&path, kind, "", &[]);
            }
            8 => self.link(&path),
            9 | 10 if self.free(&path) && self.exists_for_whiteout(&path) => {
                match self.own.get(&path) {
                    None => {
                        self.saw(if self.below.contains_key(&path) { "whiteout" } else { "whiteout of nothing" });
                        if self.below_links.contains(&path) {
                            self.saw("name of a hard-linked file whited out");
                        }
                        self.note(&path, 'w');
                    }
                    Some('w') => return,
                    Some(_) if self.referee == Referee::Containerd => return,
                    Some(_) => {
                        self.opaque = true;
                        self.saw("entry, then whiteout");
                    }
                }
                let name = path.rsplit('/').next().expect("a path has a last name");
                let whiteout = format!("{}.wh.{name}", &path[..path.len() - name.len()]);
                self.write(&whiteout, EntryType::Regular, "", &[]);
            }
            // In the bottom layer containerd removes what the marker comes after, if in directories that the layer implies.
            11 if self.referee == Referee::Containerd && self.own.keys().any(|own| own.starts_with(&format!("{path}/"))) => (),
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
        if !self.free_for_file(path) {
        } else if self.tar.is_empty() && !below.is_empty() && self.referee == Referee::Umoci {
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
                if parent(&target) != parent(path) {
                    self.saw("hard link across directories");
                }
                self.note(path, 'f');
                self.write(path, EntryType::Link, &target, &[]);
            }
        }
    }
}
