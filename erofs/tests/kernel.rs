//! The kernel as a referee: a tree with one of everything is written, mounted, and compared through system calls.
//!
//! Needs root, EROFS, and file-backed mounts (Linux 6.12).

mod trees;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use erofs::block::UnitBits;
use erofs::digest::Digest;
use erofs::image::{Checked, FileKind, write};
use erofs::meta::{Attr, Chunk, Content, Data, Device, PackRef, Time, Xattr};
use erofs::tree::{Body, InodeIndex, Tree};
use trees::{Builder, attr, canonical, file_at, pack_bytes, xattr};

/// Why the kernel cannot be asked here, if so.
fn missing() -> Option<&'static str> {
    let known = || std::fs::read_to_string("/proc/filesystems").is_ok_and(|text| text.lines().any(|line| line.trim() == "erofs"));
    if !rustix::process::geteuid().is_root() {
        return Some("needs root");
    }
    if !known() {
        // The file system may be a module.
        let _ = Command::new("modprobe").arg("erofs").status();
    }
    if !known() {
        return Some("this kernel has no EROFS");
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    (version < (6, 12)).then_some("file-backed EROFS mounts need Linux 6.12")
}

/// Whether the test has to be skipped; says why, and fails where nothing may be skipped.
fn skipped() -> bool {
    let Some(why) = missing() else { return false };
    assert!(std::env::var_os("CI").is_none() && std::env::var_os("SLIPWAY_NO_SKIP").is_none(), "{why}");
    println!("skipped: {why}");
    true
}

/// A mounted image. Unmounted when dropped, also while panicking.
struct Mounted {
    dir: tempfile::TempDir,
    packs: Vec<Vec<u8>>,
}

impl Mounted {
    fn new(tree: &Tree) -> Mounted {
        Mounted::mount(tree, true).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Mounts `tree` with or without telling the kernel where its packs are; gives what mount says when it refuses.
    fn mount(tree: &Tree, with_packs: bool) -> Result<Mounted, String> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("image"), write(&Checked::new(tree.clone()).expect("the tree obeys the rules")).bytes).expect("the image can be written");
        std::fs::create_dir(at("mnt")).expect("a mount point");
        let packs: Vec<Vec<u8>> = tree.packs.iter().enumerate().map(|(i, pack)| pack_bytes(i as u8 + 1, pack.blocks)).collect();
        let mut options = Vec::new();
        for (i, bytes) in packs.iter().enumerate() {
            let path = at(&format!("pack{i}"));
            std::fs::write(&path, bytes).expect("a pack can be written");
            if with_packs {
                options.push(format!("device={}", path.display()));
            }
        }
        let mounted = Mounted { dir, packs };
        // Not mount(8): given a file it makes a loop device of it.
        let options = std::ffi::CString::new(options.join(",")).expect("no NUL");
        let flags = rustix::mount::MountFlags::RDONLY;
        match rustix::mount::mount(mounted.dir.path().join("image"), mounted.root(), "erofs", flags, Some(options.as_c_str())) {
            Ok(()) => Ok(mounted),
            Err(error) => Err(format!("mount: {error} (dmesg may say more)")),
        }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// What a chunk must read as.
    fn chunk(&self, chunk: Chunk, len: usize) -> Vec<u8> {
        match chunk {
            Chunk::Hole => vec![0; len],
            Chunk::At { pack, block } => self.packs[pack as usize][block as usize * 4096..][..len].to_vec(),
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.root(), rustix::mount::UnmountFlags::empty());
    }
}

/// Asserts that what is mounted is `tree`, name by name.
fn assert_mounted(mounted: &Mounted, tree: &Tree) {
    let mut numbers: BTreeMap<InodeIndex, (u64, u64)> = BTreeMap::new();
    let mut stack = vec![(Tree::ROOT, mounted.root())];
    let mut reader = XattrReader::new();
    while let Some((index, path)) = stack.pop() {
        let shown = path.to_string_lossy().into_owned();
        let inode = tree.inode(index);
        let stat = std::fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("{shown}: {error}"));
        let kind = FileKind::of(&inode.body);
        let Attr { mode, uid, gid, mtime, xattrs } = &inode.attr;
        assert_eq!(stat.mode(), u32::from(kind.mode_bits() | mode), "{shown}: mode");
        assert_eq!((stat.uid(), stat.gid()), (*uid, *gid), "{shown}: owner");
        assert_eq!((stat.mtime(), stat.mtime_nsec()), (mtime.sec, i64::from(mtime.nsec)), "{shown}: mtime");
        assert_eq!(reader.read(&path), *xattrs, "{shown}: xattrs");
        // Names of one inode have one number; every name is counted in its links.
        let entry = numbers.entry(index).or_insert((stat.ino(), stat.nlink()));
        assert_eq!(entry.0, stat.ino(), "{shown}: inode number");
        entry.1 = entry.1.wrapping_sub(1);
        match &inode.body {
            Body::Dir(children) => {
                let mut names: Vec<_> = std::fs::read_dir(&path).expect("readable").map(|e| e.expect("readable").file_name()).collect();
                names.sort();
                assert!(names.iter().map(|name| name.as_bytes()).eq(children.keys().map(Vec::as_slice)), "{shown}: names");
                let subdirs = children.values().filter(|child| matches!(tree.inode(**child).body, Body::Dir(_))).count();
                assert_eq!(stat.nlink(), 2 + subdirs as u64, "{shown}: links");
                entry.1 = 0;
                stack.extend(children.iter().map(|(name, child)| (*child, path.join(OsStr::from_bytes(name)))));
            }
            Body::Content(content) => assert_content(mounted, content, &path),
        }
    }
    let distinct: std::collections::BTreeSet<u64> = numbers.values().map(|(ino, _)| *ino).collect();
    assert_eq!(distinct.len(), tree.inodes.len(), "inode numbers are distinct");
    for (index, (_, unseen)) in numbers {
        assert_eq!(unseen, 0, "inode {}: links without a name", index.0);
    }
}

fn assert_content(mounted: &Mounted, content: &Content, path: &Path) {
    let shown = path.to_string_lossy();
    let stat = std::fs::symlink_metadata(path).expect("seen before");
    match content {
        Content::File(data) => {
            assert_eq!(stat.size(), data.size(), "{shown}: size");
            let file = std::fs::File::open(path).expect("readable");
            match data {
                Data::Inline(bytes) => assert!(std::fs::read(path).expect("readable") == *bytes, "{shown}: content"),
                Data::Chunked { size, unit_bits, chunks } => {
                    let unit = unit_bits.bytes();
                    for (i, &chunk) in chunks.iter().enumerate() {
                        let start = i as u64 * unit;
                        // Of a huge file the start of each hole will do.
                        let looked_at = if chunks.len() > 100 && chunk == Chunk::Hole { 4096 } else { unit };
                        let mut got = vec![0xee; looked_at.min(size - start) as usize];
                        file.read_exact_at(&mut got, start).unwrap_or_else(|error| panic!("{shown}: chunk {i}: {error}"));
                        assert!(got == mounted.chunk(chunk, got.len()), "{shown}: chunk {i}");
                    }
                }
            }
        }
        Content::Symlink(target) => assert_eq!(std::fs::read_link(path).expect("readable").as_os_str().as_bytes(), target, "{shown}: target"),
        Content::Char(device) | Content::Block(device) => {
            assert_eq!(stat.rdev(), rustix::fs::makedev(device.major, device.minor), "{shown}: device number");
        }
        Content::Fifo | Content::Socket => assert_eq!(stat.size(), 0, "{shown}: size"),
    }
}

/// Reads xattrs; keeps its buffers, as there are many files.
struct XattrReader {
    names: Vec<u8>,
    value: Vec<u8>,
}

impl XattrReader {
    fn new() -> XattrReader {
        // The kernel's limits for a list and for a value.
        XattrReader { names: vec![0; 65_536], value: vec![0; 65_536] }
    }

    fn read(&mut self, path: &Path) -> Vec<Xattr> {
        let len = rustix::fs::llistxattr(path, self.names.as_mut_slice()).expect("xattrs can be listed");
        let mut xattrs = Vec::new();
        for name in self.names[..len].split(|&b| b == 0).filter(|name| !name.is_empty()) {
            let len = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), self.value.as_mut_slice())
                .unwrap_or_else(|error| panic!("{}: {}: {error}", path.display(), name.escape_ascii()));
            xattrs.push(Xattr { name: name.to_vec(), value: self.value[..len].to_vec() });
        }
        xattrs.sort();
        xattrs
    }
}

fn pack(seed: u8, blocks: u32, bits: u8) -> PackRef {
    PackRef { digest: Digest::of(&[seed]), blocks, unit_bits: UnitBits::new(bits).expect("a unit size") }
}

/// An ACL as the kernel keeps it: version 2, then (tag, permissions, id) for owner, a user, group, mask, others.
fn acl(user: u32) -> Vec<u8> {
    let mut out = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [(1u16, 7u16, u32::MAX), (2, 6, user), (4, 5, u32::MAX), (0x10, 7, u32::MAX), (0x20, 4, u32::MAX)] {
        out.extend(tag.to_le_bytes());
        out.extend(permissions.to_le_bytes());
        out.extend(id.to_le_bytes());
    }
    out
}

/// `cap_net_bind_service=ep` as a version 2 `vfs_cap_data`.
fn capability() -> Vec<u8> {
    [0x0200_0001u32, 1 << 10, 0, 0, 0].into_iter().flat_map(u32::to_le_bytes).collect()
}

fn everything() -> Tree {
    let root = Tree::ROOT;
    let time = |sec, nsec| Attr { mtime: Time { sec, nsec }, ..attr(0o644) };
    let mut b = Builder::new(Attr { mtime: Time { sec: 1_600_000_000, nsec: 1 }, ..attr(0o755) });
    b.tree.packs = vec![pack(1, 1024, 18), pack(2, 64, 16), pack(3, 512, 20)];
    let packs = b.tree.packs.clone();
    add_names(&mut b);
    add_xattrs(&mut b);
    // Content: all unit sizes, ends of packs, parts of blocks, holes, the same chunk twice, beyond 4 GiB.
    let data = b.dir(root, b"data", attr(0o755));
    for (name, content) in [
        (&b"empty"[..], Content::File(Data::Inline(Vec::new()))),
        (b"tiny", Content::File(Data::Inline(b"tiny".to_vec()))),
        (b"block", Content::File(Data::Inline(vec![7; 4096]))),
        (b"blocks and tail", Content::File(Data::Inline((0..10_000u32).map(|i| i as u8).collect()))),
        (b"one byte", file_at(&packs, 0, 5, 1)),
        (b"one block", file_at(&packs, 0, 5, 4096)),
        (b"odd", file_at(&packs, 0, 64, 700_001)),
        (b"to the end", file_at(&packs, 1, 0, 64 * 4096)),
        (b"large units", file_at(&packs, 2, 0, 2 << 20)),
        (b"no chunks", Content::File(Data::Chunked { size: 0, unit_bits: UnitBits::MIN, chunks: Vec::new() })),
        (b"all hole", Content::File(Data::Chunked { size: 200_000, unit_bits: UnitBits::MAX, chunks: vec![Chunk::Hole] })),
    ] {
        b.add(data, name, attr(0o644), content);
    }
    let at = |pack, block| Chunk::At { pack, block };
    let mixed = vec![Chunk::Hole, at(1, 16), at(1, 16), Chunk::Hole, at(1, 0), at(1, 48)];
    b.add(data, b"mixed", attr(0o644), Content::File(Data::Chunked { size: 5 * 65536 + 4097, unit_bits: UnitBits::MIN, chunks: mixed }));
    let mut large = vec![Chunk::Hole; 5000];
    large[4999] = at(2, 256);
    b.add(data, b"large", attr(0o644), Content::File(Data::Chunked { size: (4999 << 20) + 12_345, unit_bits: UnitBits::MAX, chunks: large }));
    // Kinds, link groups, times, owners.
    let kinds = b.dir(root, b"kinds", attr(0o1777));
    b.add(kinds, b"char", attr(0o666), Content::Char(Device { major: 1, minor: 3 }));
    b.add(kinds, b"block", attr(0o660), Content::Block(Device { major: 4095, minor: 0xf_ffff }));
    b.add(kinds, b"whiteout alike", attr(0), Content::Char(Device { major: 0, minor: 0 }));
    let fifo = b.add(kinds, b"fifo", attr(0o600), Content::Fifo);
    b.link(data, b"fifo", fifo);
    b.add(kinds, b"socket", attr(0o777), Content::Socket);
    for len in [1, 59, 60, 4000, 4090, 4095] {
        b.add(kinds, format!("link {len}").as_bytes(), attr(0o777), Content::Symlink(vec![b'a'; len]));
    }
    let setuid = b.add(kinds, b"setuid", Attr { uid: 65_535, gid: 65_536, ..attr(0o6755) }, file_at(&packs, 0, 0, 10));
    b.add(kinds, b"owners", Attr { uid: u32::MAX - 1, gid: 4_000_000_000, ..attr(0o7777) }, Content::File(Data::Inline(Vec::new())));
    for i in 0..70_000 {
        b.link(kinds, format!("setuid {i}").as_bytes(), setuid);
    }
    let times = b.dir(root, b"times", time(-1, 999_999_999));
    for (i, sec) in [0, 1, -1, i64::from(i32::MIN) - 1, i64::from(u32::MAX) + 1, 1 << 40, -(1 << 40)].into_iter().enumerate() {
        b.add(times, &[b'a' + i as u8], time(sec, if i == 1 { 0 } else { i as u32 * 7 }), Content::Fifo);
    }
    let mut deep = b.dir(root, b"deep", attr(0o755));
    for _ in 0..200 {
        deep = b.dir(deep, b"er", attr(0o711));
    }
    canonical(&b.tree)
}

fn add_names(b: &mut Builder) {
    let names = b.dir(Tree::ROOT, b"names", attr(0o755));
    for name in
        [&b"!"[..], b"-", b"+plus", b" ", b"\x01", b"\xff\xfe", b"...", b".\x01", b".-", b"..-", b"..a", b".hidden", &[0xc3; 255], &[b'n'; 255]]
    {
        b.add(names, name, attr(0o644), Content::File(Data::Inline(name.to_vec())));
    }
    let huge = b.dir(Tree::ROOT, b"huge", attr(0o755));
    for i in 0..100_000u32 {
        b.add(huge, format!("{}{i}", ["", "-", "entry with a longer name "][i as usize % 3]).as_bytes(), attr(0o600), Content::Fifo);
    }
    // Directories whose entries end exactly at a block's end, and one byte on either side.
    for (i, last) in [135, 136, 137].into_iter().enumerate() {
        let dir = b.dir(Tree::ROOT, format!("brim{i}").as_bytes(), attr(0o755));
        // . and .. take 27 bytes, 14 names of 255 bytes 3738, one of 183 bytes 195: with 136 bytes of entry it makes 4096.
        for n in 0..14 {
            b.add(dir, &[&[b'A' + n][..], &[b'x'; 254]].concat(), attr(0), Content::Fifo);
        }
        b.add(dir, &[b'y'; 183], attr(0), Content::Fifo);
        b.add(dir, &vec![b'z'; last - 12], attr(0), Content::Fifo);
    }
}

fn add_xattrs(b: &mut Builder) {
    let xattrs = b.dir(Tree::ROOT, b"xattrs", Attr { xattrs: vec![xattr("system.posix_acl_default", &acl(1000))], ..attr(0o755) });
    // An ACL's mask is the group's permission bits.
    let with_acl = vec![xattr("security.capability", &capability()), xattr("system.posix_acl_access", &acl(7)), xattr("user.note", b"own")];
    b.add(xattrs, b"acl", Attr { xattrs: with_acl, ..attr(0o774) }, Content::File(Data::Inline(b"x".to_vec())));
    let label = || vec![xattr("security.selinux", b"system_u:object_r:bin_t:s0\0"), xattr("trusted.shared", &[9; 3000])];
    for i in 0..10u8 {
        b.add(xattrs, &[b'0' + i], Attr { xattrs: label(), ..attr(0o644) }, Content::File(Data::Inline(vec![i; 100])));
    }
    b.add(xattrs, b"link", Attr { xattrs: label(), ..attr(0o777) }, Content::Symlink(b"0".to_vec()));
    b.add(xattrs, b"device", Attr { xattrs: label(), ..attr(0o600) }, Content::Char(Device { major: 5, minor: 1 }));
    let large = vec![xattr("trusted.empty", b""), xattr("user.large", &[0xa5; 65_535]), xattr(&format!("user.{}", "n".repeat(250)), b"long name")];
    b.add(xattrs, b"large", Attr { xattrs: large, ..attr(0o644) }, Content::File(Data::Inline(Vec::new())));
    let shared_large = || vec![xattr("user.large and shared", &[0x5a; 65_535])];
    b.add(xattrs, b"large 1", Attr { xattrs: shared_large(), ..attr(0o644) }, Content::File(Data::Inline(Vec::new())));
    b.dir(xattrs, b"large 2", Attr { xattrs: shared_large(), ..attr(0o755) });
    let many = || (0..300).map(|i| xattr(&format!("user.{i:03}"), b"one of many")).collect();
    b.add(xattrs, b"many 1", Attr { xattrs: many(), ..attr(0o644) }, Content::File(Data::Inline(Vec::new())));
    b.add(xattrs, b"many 2", Attr { xattrs: many(), ..attr(0o644) }, Content::File(Data::Inline(b"beside xattrs".to_vec())));
}

#[test]
fn the_kernel_shows_the_tree_as_it_was_written() {
    if skipped() {
        return;
    }
    let tree = everything();
    assert_mounted(&Mounted::new(&tree), &tree);
}

#[test]
fn the_kernel_shows_random_trees_as_they_were_written() {
    if skipped() {
        return;
    }
    use proptest::strategy::{Strategy, ValueTree};
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    for _ in 0..20 {
        let mut tree = canonical(&trees::any_tree().new_tree(&mut runner).expect("a tree").current());
        for inode in &mut tree.inodes {
            // The kernel itself refuses what these would say: ACLs that are none, `user.` on links and devices.
            let plain = matches!(FileKind::of(&inode.body), FileKind::File | FileKind::Dir);
            inode.attr.xattrs.retain(|x| !x.name.starts_with(b"system.") && (plain || !x.name.starts_with(b"user.")));
            // uid -1 is no owner.
            inode.attr.uid = inode.attr.uid.min(u32::MAX - 1);
            inode.attr.gid = inode.attr.gid.min(u32::MAX - 1);
        }
        assert_mounted(&Mounted::new(&tree), &tree);
    }
}

/// Invariant 1: an image mounted without its packs (kernels take that for one with all data in itself) shows errors, not bytes.
#[test]
fn without_packs_data_is_an_error() {
    if skipped() {
        return;
    }
    let mut b = Builder::new(attr(0o755));
    b.tree.packs = vec![pack(1, 1024, 18)];
    let content = file_at(&b.tree.packs, 0, 0, 5000);
    b.add(Tree::ROOT, b"file", attr(0o644), content);
    let mounted = Mounted::mount(&canonical(&b.tree), false).expect("the image mounts without its packs");
    let error = std::fs::read(mounted.root().join("file")).expect_err("data that is not there");
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()), "{error}");
}
