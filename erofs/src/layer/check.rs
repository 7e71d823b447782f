//! The rules of a layer tree: what folding relies on, and what every entry must be to exist on Linux.

use std::collections::{HashMap, HashSet};

use super::{Entry, EntryKind, LayerError, LayerTree, MAX_NAME, MAX_PATH, path_order, room_for_paths, split};
use crate::meta::{Attr, Chunk, Content, Data, Device, PackRef, Xattr};

/// `PATH_MAX` of `include/uapi/linux/limits.h`, less its NUL.
const MAX_SYMLINK: usize = 4095;

type Rule = Result<(), &'static str>;

/// Adds the directories that sorted `entries` are in but do not list.
pub(super) fn with_parents(entries: Vec<Entry>) -> Result<Vec<Entry>, LayerError> {
    let mut out: Vec<Entry> = Vec::with_capacity(entries.len());
    for entry in entries {
        // Before anything is made of the path: a bad one must not become bad parents.
        check_path(&entry.path).map_err(|rule| LayerError::Entry { path: entry.path.clone(), rule })?;
        let previous = out.last().map_or(&[][..], |e| &e.path[..]).to_vec();
        for (at, _) in entry.path.iter().enumerate().filter(|&(_, &b)| b == b'/') {
            let parent = &entry.path[..at];
            // The entry before this one is in sorted order, so it lies in (or is) every listed parent of this one.
            if !contains(parent, &previous) {
                out.push(Entry { path: parent.to_vec(), kind: EntryKind::Dir { attr: None, opaque: false } });
            }
        }
        out.push(entry);
    }
    Ok(out)
}

/// Whether `path` is `dir` or below it.
fn contains(dir: &[u8], path: &[u8]) -> bool {
    path.strip_prefix(dir).is_some_and(|rest| dir.is_empty() || rest.is_empty() || rest[0] == b'/')
}

/// Renumbers packs in the order in which the entries use them.
pub(super) fn order_packs(tree: &mut LayerTree) -> Result<(), LayerError> {
    let mut number: Vec<Option<u32>> = vec![None; tree.packs.len()];
    let mut packs = Vec::new();
    for entry in &mut tree.entries {
        let EntryKind::Node { content: Content::File(Data::Chunked { chunks, .. }), .. } = &mut entry.kind else { continue };
        for chunk in chunks {
            let Chunk::At { pack, .. } = chunk else { continue };
            let Some(new) = number.get_mut(*pack as usize) else {
                return Err(LayerError::Entry { path: entry.path.clone(), rule: "a chunk is in a pack that is not listed" });
            };
            *pack = *new.get_or_insert_with(|| {
                packs.push(tree.packs[*pack as usize]);
                packs.len() as u32 - 1
            });
        }
    }
    tree.packs = packs;
    Ok(())
}

/// Every rule.
pub(super) fn check(tree: &LayerTree) -> Result<(), LayerError> {
    let mut dirs: Vec<&[u8]> = vec![&[]];
    let mut used = 0;
    let mut room = room_for_paths(tree.entries.len());
    let broken = |entry: &Entry, rule| LayerError::Entry { path: entry.path.clone(), rule };
    for (index, entry) in tree.entries.iter().enumerate() {
        check_path(&entry.path).map_err(|rule| broken(entry, rule))?;
        room = room.checked_sub(entry.path.len()).ok_or_else(|| broken(entry, "the layer's paths are too long in all"))?;
        if index > 0 && path_order(&tree.entries[index - 1].path, &entry.path).is_ge() {
            return Err(broken(entry, "it appears twice or out of order"));
        }
        if let Some((parent, _)) = split(&entry.path) {
            while dirs.last().is_some_and(|dir| *dir != parent) {
                dirs.pop();
            }
            if dirs.is_empty() {
                return Err(broken(entry, "what it is in is not a directory"));
            }
        } else if !matches!(entry.kind, EntryKind::Dir { .. }) {
            return Err(broken(entry, "the root is not a directory"));
        }
        if matches!(entry.kind, EntryKind::Dir { .. }) && !entry.path.is_empty() {
            dirs.push(&entry.path);
        }
        check_kind(&entry.kind, &tree.packs, &mut used).map_err(|rule| broken(entry, rule))?;
    }
    let names: HashSet<_> = tree.packs.iter().map(|p| p.digest).collect();
    if used != tree.packs.len() || names.len() != tree.packs.len() {
        return Err(LayerError::Packs { count: tree.packs.len() });
    }
    check_links(tree)
}

/// Links name a file of this layer, something this layer removes, or nothing in this layer.
fn check_links(tree: &LayerTree) -> Result<(), LayerError> {
    let targets: HashMap<&[u8], &Entry> = tree
        .entries
        .iter()
        .filter_map(|entry| match &entry.kind {
            EntryKind::Link { target } => Some((&target[..], entry)),
            _ => None,
        })
        .collect();
    for entry in &tree.entries {
        let Some(link) = targets.get(&entry.path[..]) else { continue };
        if !matches!(entry.kind, EntryKind::Node { .. } | EntryKind::Whiteout) {
            return Err(LayerError::Entry { path: link.path.clone(), rule: "it links to a directory or to another link" });
        }
    }
    Ok(())
}

fn check_path(path: &[u8]) -> Rule {
    if path.is_empty() {
        return Ok(());
    }
    if path.len() > MAX_PATH {
        return Err("its path is longer than 32 KiB");
    }
    for name in path.split(|&b| b == b'/') {
        match name {
            b"" | b"." | b".." => return Err("its path is not in normal form"),
            _ if name.len() > MAX_NAME => return Err("a name in its path is longer than 255 bytes"),
            _ if name.contains(&0) => return Err("its path contains a NUL byte"),
            _ => (),
        }
    }
    Ok(())
}

fn check_kind(kind: &EntryKind, packs: &[PackRef], used: &mut usize) -> Rule {
    match kind {
        EntryKind::Dir { attr, .. } => attr.as_ref().map_or(Ok(()), check_attr),
        EntryKind::Node { attr, content } => {
            check_attr(attr)?;
            match content {
                Content::File(data) => check_data(data, packs, used),
                Content::Symlink(target) if target.is_empty() || target.len() > MAX_SYMLINK || target.contains(&0) => {
                    Err("a symbolic link's target is empty, longer than 4095 bytes or contains a NUL byte")
                }
                Content::Char(Device { major, minor }) | Content::Block(Device { major, minor }) if *major >= 1 << 12 || *minor >= 1 << 20 => {
                    Err("its device number is out of range (major 12 bits, minor 20 bits)")
                }
                // overlayfs, which every container has on top, takes such a device for a whiteout.
                Content::Char(Device { major: 0, minor: 0 }) => Err("a character device 0:0 is a whiteout"),
                _ => Ok(()),
            }
        }
        EntryKind::Link { target } if target.is_empty() => Err("it links to the root"),
        EntryKind::Link { target } => check_path(target),
        EntryKind::Whiteout => Ok(()),
    }
}

fn check_attr(attr: &Attr) -> Rule {
    if attr.mode > 0o7777 {
        return Err("its mode has bits other than permissions, setuid, setgid and sticky");
    }
    if attr.mtime.nsec >= 1_000_000_000 {
        return Err("its modification time has a whole second of nanoseconds");
    }
    if !attr.xattrs.is_sorted_by(|a, b| a.name < b.name) {
        return Err("an extended attribute appears twice or out of order");
    }
    for xattr in &attr.xattrs {
        if !Xattr::is_name(&xattr.name) || xattr.value.len() > Xattr::MAX_VALUE {
            return Err("the name of an extended attribute is none that an image can hold, or its value is longer than 65535 bytes");
        }
    }
    Ok(())
}

fn check_data(data: &Data, packs: &[PackRef], used: &mut usize) -> Rule {
    let Data::Chunked { size, unit_bits, chunks } = data else { return Ok(()) };
    if *size == 0 || size.div_ceil(unit_bits.bytes()) != chunks.len() as u64 {
        return Err("its number of chunks does not match its size");
    }
    for (index, chunk) in chunks.iter().enumerate() {
        let Chunk::At { pack, block } = *chunk else { continue };
        if pack as usize == *used && *used < packs.len() {
            *used += 1;
        } else if pack as usize >= *used {
            return Err("a chunk is in a pack that is not listed in order of first use");
        }
        let pack = &packs[pack as usize];
        let len = (size - index as u64 * unit_bits.bytes()).min(unit_bits.bytes());
        if pack.unit_bits != *unit_bits || u64::from(block) + crate::block::blocks_for(len) > u64::from(pack.blocks) {
            return Err("a chunk lies outside its pack or has another unit size");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::UnitBits;
    use crate::digest::Digest;
    use crate::meta::{Time, Xattr};

    fn pack(n: u8) -> PackRef {
        PackRef { digest: Digest([n; 32]), blocks: 20, unit_bits: UnitBits::MIN }
    }

    fn entry(path: &str, kind: EntryKind) -> Entry {
        Entry { path: path.into(), kind }
    }

    fn file(path: &str, size: u64, chunks: Vec<Chunk>) -> Entry {
        entry(path, EntryKind::Node { attr: Attr::default(), content: Content::File(Data::Chunked { size, unit_bits: UnitBits::MIN, chunks }) })
    }

    fn node(path: &str, content: Content) -> Entry {
        entry(path, EntryKind::Node { attr: Attr::default(), content })
    }

    fn dir(path: &str) -> Entry {
        entry(path, EntryKind::Dir { attr: Some(Attr::default()), opaque: false })
    }

    fn link(path: &str, target: &str) -> Entry {
        entry(path, EntryKind::Link { target: target.into() })
    }

    #[test]
    fn entries_are_sorted_and_get_their_parents() {
        let check = |paths: &[&str], expected: &str| {
            let tree = LayerTree::new(vec![], paths.iter().map(|p| entry(p, EntryKind::Whiteout)).collect()).unwrap();
            let line = |e: &Entry| {
                String::from_utf8_lossy(&e.path).into_owned() + if matches!(e.kind, EntryKind::Dir { attr: None, .. }) { "/" } else { "" }
            };
            assert_eq!(tree.entries.iter().map(line).collect::<Vec<_>>().join(" "), expected);
        };
        check(&[], "");
        check(&["b", "a"], "a b");
        check(&["a/b/c"], "a/ a/b/ a/b/c");
        check(&["a/b/c", "a/b/d", "a-b", "a/c", "ab/b/c"], "a/ a/b/ a/b/c a/b/d a/c a-b ab/ ab/b/ ab/b/c");
    }

    #[test]
    fn packs_are_numbered_by_first_use() {
        let at = |pack, block| Chunk::At { pack, block };
        let tree =
            LayerTree::new(vec![pack(0), pack(1), pack(2)], vec![file("b", 9, vec![at(0, 0)]), file("a", 70000, vec![at(2, 0), at(0, 1)])]).unwrap();
        assert_eq!(tree.packs, [pack(2), pack(0)]);
        assert_eq!(tree.entries, [file("a", 70000, vec![at(0, 0), at(1, 1)]), file("b", 9, vec![at(1, 0)])]);
    }

    #[test]
    fn broken_rules_are_named_with_the_path() {
        let check = |entries: Vec<Entry>, path: &str, rule: &str| {
            let found = LayerTree::new(vec![pack(0)], entries).expect_err(rule);
            let LayerError::Entry { path: found_path, rule: found_rule } = &found else { panic!("{found}") };
            assert!(found_rule.contains(rule) && *found_path == path.as_bytes(), "{found}");
        };
        for path in ["/a", "a/", "a//b", ".", "..", "a/../b", "a/."] {
            check(vec![dir(path)], path, "normal form");
        }
        check(vec![dir("a\0")], "a\0", "NUL");
        let long = "n".repeat(256);
        check(vec![dir(&long)], &long, "longer than 255");
        let long = "n/".repeat(16384) + "n";
        check(vec![dir(&long)], &long, "longer than 32 KiB");
        check(vec![dir("a"), dir("a")], "a", "twice");
        check(vec![node("", Content::Fifo)], "", "root");
        check(vec![node("a", Content::Fifo), dir("a/b")], "a/b", "not a directory");
        check(vec![node("l", Content::Symlink(vec![]))], "l", "symbolic link");
        check(vec![node("c", Content::Char(Device { major: 0, minor: 0 }))], "c", "whiteout");
        check(vec![node("c", Content::Block(Device { major: 4096, minor: 0 }))], "c", "device number");
        check(vec![link("l", "")], "l", "root");
        check(vec![link("l", "/x")], "l", "normal form");
        check(vec![link("l", "d"), dir("d")], "l", "directory");
        check(vec![link("l", "m"), link("m", "n")], "l", "another link");
        check(vec![file("f", 0, vec![])], "f", "number of chunks");
        check(vec![file("f", 65537, vec![Chunk::Hole])], "f", "number of chunks");
        check(vec![file("f", 1, vec![Chunk::At { pack: 1, block: 0 }])], "f", "not listed");
        check(vec![file("f", 4097, vec![Chunk::At { pack: 0, block: 19 }])], "f", "outside");
        check(vec![file("f", 1, vec![Chunk::At { pack: 0, block: u32::MAX }])], "f", "outside");
        let with = |attr: Attr| vec![entry("d", EntryKind::Dir { attr: Some(attr), opaque: false })];
        check(with(Attr { mode: 0o10000, ..Attr::default() }), "d", "mode");
        check(with(Attr { mtime: Time { sec: 0, nsec: 1_000_000_000 }, ..Attr::default() }), "d", "nanoseconds");
        let xattr = |name: &str, len| Xattr { name: name.into(), value: vec![0; len] };
        check(with(Attr { xattrs: vec![xattr("user.b", 0), xattr("user.a", 0)], ..Attr::default() }), "d", "out of order");
        for (name, len) in [("user.b", 65536), ("user.", 0), ("", 0), ("system.nfs4_acl", 0), ("user.\0", 0), (&format!("user.{long}"), 0)] {
            check(with(Attr { xattrs: vec![xattr(name, len)], ..Attr::default() }), "d", "65535 bytes");
        }
    }

    #[test]
    fn packs_that_no_chunk_uses_are_not_listed() {
        let tree = LayerTree { packs: vec![pack(0)], entries: vec![] };
        assert_eq!(tree.check(), Err(LayerError::Packs { count: 1 }));
        let twice = [Chunk::At { pack: 0, block: 0 }, Chunk::At { pack: 1, block: 0 }];
        let tree = LayerTree { packs: vec![pack(0), pack(0)], entries: vec![file("f", 65537, twice.to_vec())] };
        assert_eq!(tree.check(), Err(LayerError::Packs { count: 2 }));
    }
}
