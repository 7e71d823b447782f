//! A layer tree as an archive: PAX, the same bytes for the same tree, in an order that unpackers and the converter both like.
//!
//! Directories come first, then what is removed, then everything else in the order its data has in the packs (so that converting the
//! archive again packs it the same way), hard links last, after what they name.

use std::collections::HashMap;
use std::io::{self, Write};

use erofs::layer::{Entry, EntryKind, LayerTree};
use erofs::meta::{Attr, Chunk, Content, Data};

const BLOCK: usize = 512;

/// Writes the archive of `tree` to `out`. `data` writes a file's bytes; `below` gives the attributes of a hard link's target in lower layers.
pub fn write<W: Write, E: From<io::Error>>(
    out: &mut W,
    tree: &LayerTree,
    below: impl Fn(&[u8]) -> Option<Attr>,
    mut data: impl FnMut(&mut W, &Entry, &Data) -> Result<(), E>,
) -> Result<(), E> {
    let mut nodes: Vec<(&Entry, &Attr, &Content)> = Vec::new();
    let (mut removed, mut links) = (Vec::new(), Vec::new());
    for entry in &tree.entries {
        match &entry.kind {
            EntryKind::Dir { attr, opaque } => {
                if let Some(attr) = attr.as_ref().filter(|_| !entry.path.is_empty()) {
                    member(out, &[&entry.path, &b"/"[..]].concat(), b'5', attr, b"", 0, (0, 0))?;
                }
                if *opaque {
                    removed.push(join(&entry.path, b".wh..wh..opq"));
                }
            }
            EntryKind::Whiteout => {
                let (dir, name) = split(&entry.path);
                removed.push(join(dir, &[b".wh.", name].concat()));
            }
            EntryKind::Node { attr, content } => nodes.push((entry, attr, content)),
            EntryKind::Link { target } => links.push((&entry.path, target)),
        }
    }
    for path in removed {
        member(out, &path, b'0', &Attr { mode: 0o600, ..Attr::default() }, b"", 0, (0, 0))?;
    }
    let nodes = in_pack_order(nodes);
    let known: HashMap<&[u8], &Attr> = nodes.iter().map(|(entry, attr, _)| (&entry.path[..], *attr)).collect();
    for (entry, attr, content) in &nodes {
        let path = &entry.path;
        match content {
            Content::File(file) => {
                member(out, path, b'0', attr, b"", file.size(), (0, 0))?;
                data(out, entry, file)?;
                pad(out, file.size())?;
            }
            Content::Symlink(target) => member(out, path, b'2', attr, target, 0, (0, 0))?,
            Content::Char(device) => member(out, path, b'3', attr, b"", 0, (device.major, device.minor))?,
            Content::Block(device) => member(out, path, b'4', attr, b"", 0, (device.major, device.minor))?,
            Content::Fifo => member(out, path, b'6', attr, b"", 0, (0, 0))?,
            Content::Socket => return Err(io::Error::other("archives cannot hold sockets").into()),
        }
    }
    for (path, target) in links {
        // Unpackers set the attributes of a link's entry on what it names.
        let attr = match known.get(&target[..]) {
            Some(attr) => (*attr).clone(),
            None => below(target).ok_or_else(|| io::Error::other(format!("\"{}\" is not in the layers below", target.escape_ascii())))?,
        };
        member(out, path, b'1', &attr, target, 0, (0, 0))?;
    }
    out.write_all(&[0; 2 * BLOCK])?;
    Ok(())
}

/// Writes an archive that holds one regular file.
pub fn file(out: &mut impl Write, path: &[u8], attr: &Attr, bytes: &[u8]) -> io::Result<()> {
    let size = bytes.len() as u64;
    member(out, path, b'0', attr, b"", size, (0, 0))?;
    out.write_all(bytes)?;
    pad(out, size)?;
    out.write_all(&[0; 2 * BLOCK])
}

type Node<'a> = (&'a Entry, &'a Attr, &'a Content);

/// An order in which packing gives every byte the place it has: the whole chunks, and apart from them the files' tails, are in the order
/// of the archive they came from. Two files with the same chunk are told apart by what else they have.
fn in_pack_order(nodes: Vec<Node<'_>>) -> Vec<Node<'_>> {
    let (mut whole, mut tails, mut ordered) = (Vec::new(), Vec::new(), Vec::new());
    for node in nodes {
        match places(node.2) {
            (Some(last), tail) => whole.push((last, tail, node)),
            (None, Some(tail)) => tails.push((tail, node)),
            (None, None) => ordered.push(node),
        }
    }
    whole.sort_by_key(|(last, _, _)| *last);
    tails.sort_by_key(|(tail, _)| *tail);
    let mut tails = tails.into_iter().peekable();
    for (_, tail, node) in whole {
        while let Some((_, earlier)) = tails.next_if(|(at, _)| tail.is_some_and(|tail| *at < tail)) {
            ordered.push(earlier);
        }
        ordered.push(node);
    }
    ordered.extend(tails.map(|(_, node)| node));
    ordered
}

/// Where the last of a file's whole chunks is in the packs, and its tail.
fn places(content: &Content) -> (Option<(u32, u32)>, Option<(u32, u32)>) {
    let Content::File(Data::Chunked { size, unit_bits, chunks }) = content else { return (None, None) };
    let at = |chunk: &Chunk| match *chunk {
        Chunk::At { pack, block } => Some((pack, block)),
        Chunk::Hole => None,
    };
    let whole = (size / unit_bits.bytes()) as usize;
    (chunks.iter().take(whole).filter_map(at).max(), chunks.get(whole).and_then(at))
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    path.iter().rposition(|&b| b == b'/').map_or((&b""[..], path), |at| (&path[..at], &path[at + 1..]))
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() { name.to_vec() } else { [dir, name].join(&b'/') }
}

fn member(out: &mut impl Write, path: &[u8], kind: u8, attr: &Attr, link: &[u8], size: u64, device: (u32, u32)) -> io::Result<()> {
    let mut records = Vec::new();
    let mut record = |key: &[u8], value: &[u8]| {
        let body = key.len() + value.len() + 3;
        let mut len = body + 1;
        while len != body + len.to_string().len() {
            len += 1;
        }
        records.extend([format!("{len} ").as_bytes(), key, b"=", value, b"\n"].concat());
    };
    if path.len() > 100 || !path.is_ascii() {
        record(b"path", path);
    }
    if link.len() > 100 || !link.is_ascii() {
        record(b"linkpath", link);
    }
    for (key, id) in [(&b"uid"[..], attr.uid), (b"gid", attr.gid)] {
        if id > 0o7_777_777 {
            record(key, id.to_string().as_bytes());
        }
    }
    if size > 0o77_777_777_777 {
        record(b"size", size.to_string().as_bytes());
    }
    if attr.mtime.nsec != 0 {
        record(b"mtime", format!("{}.{:09}", attr.mtime.sec, attr.mtime.nsec).as_bytes());
    } else if !(0..=0o77_777_777_777).contains(&attr.mtime.sec) {
        record(b"mtime", attr.mtime.sec.to_string().as_bytes());
    }
    for xattr in &attr.xattrs {
        record(&[b"SCHILY.xattr.", &xattr.name[..]].concat(), &xattr.value);
    }
    if !records.is_empty() {
        header(out, b"PaxHeaders/entry", b'x', &Attr { mode: 0o644, ..Attr::default() }, b"", records.len() as u64, (0, 0))?;
        out.write_all(&records)?;
        pad(out, records.len() as u64)?;
    }
    header(out, path, kind, attr, link, size, device)
}

fn header(out: &mut impl Write, path: &[u8], kind: u8, attr: &Attr, link: &[u8], size: u64, device: (u32, u32)) -> io::Result<()> {
    let mut bytes = [0; BLOCK];
    let mut put = |at: usize, len: usize, value: &[u8]| {
        let value = &value[..value.len().min(len)];
        bytes[at..at + value.len()].copy_from_slice(value);
    };
    // What does not fit is in the PAX records before.
    let octal = |value: u64, digits: usize| format!("{:0digits$o}", value.min((1 << (3 * digits)) - 1)).into_bytes();
    put(0, 100, path);
    put(100, 8, &octal(u64::from(attr.mode), 7));
    put(108, 8, &octal(u64::from(attr.uid), 7));
    put(116, 8, &octal(u64::from(attr.gid), 7));
    put(124, 12, &octal(size, 11));
    put(136, 12, &octal(u64::try_from(attr.mtime.sec).unwrap_or(0), 11));
    put(148, 8, b"        ");
    put(156, 1, &[kind]);
    put(157, 100, link);
    put(257, 8, b"ustar\x0000");
    put(329, 8, &octal(u64::from(device.0), 7));
    put(337, 8, &octal(u64::from(device.1), 7));
    let sum: u64 = bytes.iter().map(|&byte| u64::from(byte)).sum();
    bytes[148..154].copy_from_slice(&octal(sum, 6));
    bytes[154] = 0;
    out.write_all(&bytes)
}

fn pad(out: &mut impl Write, size: u64) -> io::Result<()> {
    out.write_all(&[0; BLOCK][..(size.next_multiple_of(BLOCK as u64) - size) as usize])
}
