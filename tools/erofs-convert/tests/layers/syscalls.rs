//! Attributes that more than one entry gives an inode, compared with what the system calls that containerd makes leave on this machine's
//! file system: hard links and directories listed again, capabilities and ACLs among their attributes.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{PermissionsExt, lchown, symlink};
use std::path::Path;

use crate::random::Random;
use crate::referee::{Compare, assert_same, folded, host, is_root};
use erofs::block::UnitBits;
use erofs::fold::fold;
use erofs_convert::layer::{LayerOptions, MemorySink, convert_layer};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;
use tar_core::{EntryBuilder, EntryType};

/// Layers per run.
const LAYERS: u64 = 300;

pub const CAPABILITY: &[u8] = &[1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

#[derive(Debug)]
struct Entry {
    kind: EntryType,
    name: &'static str,
    link: &'static str,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: u32,
    xattrs: Vec<(&'static str, Vec<u8>)>,
}

/// An ACL of these tags and permissions, named entries for ID 5.
fn acl(entries: &[(u16, u16)]) -> Vec<u8> {
    let entry = |(tag, perm): &(u16, u16)| {
        let id: u32 = if matches!(tag, 2 | 8) { 5 } else { u32::MAX };
        [&tag.to_le_bytes()[..], &perm.to_le_bytes(), &id.to_le_bytes()].concat()
    };
    [vec![2, 0, 0, 0], entries.iter().flat_map(entry).collect()].concat()
}

pub fn any_acl(random: &mut Random) -> Vec<u8> {
    let mut perm = || random.below(8) as u16;
    let minimal = acl(&[(1, perm()), (4, perm()), (32, perm())]);
    let masked = acl(&[(1, perm()), (4, perm()), (16, perm()), (32, perm())]);
    let named = acl(&[(1, perm()), (2, perm()), (4, perm()), (8, perm()), (16, perm()), (32, perm())]);
    let all = [minimal, masked, named.clone(), named];
    all[random.below(all.len())].clone()
}

fn any_entry(random: &mut Random) -> Entry {
    let kind = random.pick(&[EntryType::Regular, EntryType::Link, EntryType::Link, EntryType::Directory, EntryType::Symlink, EntryType::Fifo]);
    let name = if kind == EntryType::Directory { "d" } else { random.pick(&["a", "b", "c"]) };
    let link = if kind == EntryType::Link { random.pick(&["a", "b", "c"]) } else { "" };
    let mut xattrs = Vec::new();
    if random.below(3) == 0 {
        xattrs.push(("user.note", vec![random.below(3) as u8]));
    }
    if random.below(3) == 0 {
        xattrs.push(("security.capability", CAPABILITY.to_vec()));
    }
    if random.below(2) == 0 {
        xattrs.push(("system.posix_acl_access", any_acl(random)));
    }
    if random.below(2) == 0 && kind == EntryType::Directory {
        xattrs.push(("system.posix_acl_default", any_acl(random)));
    }
    Entry {
        kind,
        name,
        link,
        mode: random.pick(&[0o644, 0o755, 0o600, 0o4751, 0o2711, 0o1777, 0]),
        uid: random.pick(&[0, 1, 1000]),
        gid: random.pick(&[0, 5]),
        mtime: random.below(2_000_000_000) as u32,
        xattrs,
    }
}

/// Does what containerd's `createTarFile` does. `false` if it would fail, as for links to nothing.
fn apply(root: &Path, entry: &Entry) -> bool {
    let path = root.join(entry.name);
    let is_dir = entry.kind == EntryType::Directory;
    if entry.kind == EntryType::Link && (entry.name == entry.link || root.join(entry.link).symlink_metadata().is_err()) {
        return false;
    }
    if !is_dir && let Err(error) = fs::remove_file(&path) {
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
    match entry.kind {
        EntryType::Directory => _ = fs::create_dir(&path),
        EntryType::Symlink => symlink("target", &path).unwrap(),
        EntryType::Fifo => rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RUSR, 0).unwrap(),
        EntryType::Link => fs::hard_link(root.join(entry.link), &path).unwrap(),
        _ => fs::write(&path, "text").unwrap(),
    }
    lchown(&path, Some(entry.uid), Some(entry.gid)).unwrap();
    let kind = path.symlink_metadata().unwrap().file_type();
    for (name, value) in &entry.xattrs {
        match rustix::fs::lsetxattr(&path, *name, value, XattrFlags::empty()) {
            Err(Errno::PERM) if name.starts_with("user.") && !kind.is_file() && !kind.is_dir() => (),
            Err(Errno::OPNOTSUPP) if kind.is_symlink() => (),
            result => result.unwrap_or_else(|e| panic!("{name} on {entry:?}: {e}")),
        }
    }
    if !kind.is_symlink() {
        fs::set_permissions(&path, fs::Permissions::from_mode(entry.mode)).unwrap();
    }
    let time = Timespec { tv_sec: entry.mtime.into(), tv_nsec: 0 };
    rustix::fs::utimensat(CWD, &path, &Timestamps { last_access: time, last_modification: time }, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    true
}

fn tar_of(entries: &[Entry]) -> Vec<u8> {
    let mut tar = Vec::new();
    for entry in entries {
        let bytes: &[u8] = if entry.kind == EntryType::Regular { b"text" } else { b"" };
        let mut builder = EntryBuilder::new_ustar();
        builder.path(entry.name).entry_type(entry.kind).mode(entry.mode).unwrap().size(bytes.len() as u64).unwrap();
        builder.uid(entry.uid.into()).unwrap().gid(entry.gid.into()).unwrap().mtime(entry.mtime.into()).unwrap();
        match entry.kind {
            EntryType::Link => _ = builder.link_name(entry.link),
            EntryType::Symlink => _ = builder.link_name("target"),
            _ => (),
        }
        for (name, value) in &entry.xattrs {
            builder.add_pax(&format!("SCHILY.xattr.{name}"), value);
        }
        tar.extend_from_slice(&builder.finish_bytes());
        tar.extend_from_slice(bytes);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar
}

#[test]
fn attributes_end_up_as_the_system_calls_of_an_unpacker_leave_them() {
    if !is_root("attributes_end_up_as_the_system_calls_of_an_unpacker_leave_them") {
        return;
    }
    for seed in 0..LAYERS {
        let mut random = Random(seed);
        let dir = tempfile::tempdir().unwrap();
        let count = random.below(8) + 1;
        let entries: Vec<Entry> = (0..count).map(|_| any_entry(&mut random)).filter(|entry| apply(dir.path(), entry)).collect();
        let mut sink = MemorySink::default();
        let options = LayerOptions { unit_bits: UnitBits::MIN, threads: 1, ..LayerOptions::default() };
        let tree = convert_layer(&tar_of(&entries)[..], &mut sink, &options).unwrap_or_else(|e| panic!("layer {seed}: {e}: {entries:#?}"));
        let found = folded(&fold(&[tree]).unwrap(), &sink, Compare::All);
        assert_same(&host(dir.path(), Compare::All), &found, &format!("layer {seed}: {entries:#?}"));
    }
}
