//! What a file system holds, as text: of a directory that another program unpacked, and of layer trees folded, to be compared.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use erofs::digest::Digest;
use erofs::meta::{Chunk, Content, Data, PackRef};
use erofs::pack::{FOOTER_LEN, PackTable, decode_unit};
use erofs::tree::{Body, Inode, Tree};
use erofs_convert::layer::MemorySink;

/// A tree as text: path to everything there is to know of it. The root itself is left out: containerd ignores an archive's root entry.
pub type Listing = BTreeMap<String, String>;

/// What to leave out of a comparison.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Compare {
    /// Nothing.
    All,
    /// Modification times of directories: the other program leaves the time of unpacking on directories it had to make.
    AllButDirTimes,
}

/// Whether this process may make devices and set owners. Says so if not; fails where skipping is not allowed.
pub fn is_root(test: &str) -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    assert!(std::env::var_os("CI").is_none() && std::env::var_os("SLIPWAY_NO_SKIP").is_none(), "{test} needs root");
    eprintln!("skipping {test}: unpacking owners and devices needs root");
    false
}

/// Runs a program to success; gives its standard output.
pub fn run(program: &str, arguments: &[&str], dir: &Path) -> Vec<u8> {
    let out = Command::new(program).args(arguments).current_dir(dir).output().unwrap_or_else(|e| panic!("cannot run {program}: {e}"));
    assert!(out.status.success(), "{program} {arguments:?}: {}\n{}", out.status, String::from_utf8_lossy(&out.stderr));
    out.stdout
}

fn line(kind: &str, meta: (u32, u32, u32, i64, u32), content: &str, xattrs: &[(Vec<u8>, Vec<u8>)], compare: Compare) -> String {
    let (mode, uid, gid, sec, nsec) = meta;
    let time = if compare == Compare::AllButDirTimes && kind == "dir" { String::new() } else { format!(" {sec}.{nsec:09}") };
    let xattrs: String = xattrs.iter().map(|(name, value)| format!(" {}={}", name.escape_ascii(), value.escape_ascii())).collect();
    format!("{kind} {mode:o} {uid}:{gid}{time} {content}{xattrs}")
}

/// Lists a directory of this machine.
pub fn host(root: &Path, compare: Compare) -> Listing {
    let mut out = Listing::new();
    let mut paths = Vec::new();
    let mut todo = vec![root.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            // overlayfs lists whiteouts that lie in directories with nothing below, though nobody can open them.
            if entry.path().symlink_metadata().is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound) {
                continue;
            }
            if entry.file_type().unwrap().is_dir() {
                todo.push(entry.path());
            }
            paths.push(entry.path());
        }
    }
    paths.sort_by(|a, b| a.components().cmp(b.components()));
    // Names are counted: the link count has also those that a layer above hides.
    let mut names: BTreeMap<u64, usize> = BTreeMap::new();
    for path in &paths {
        *names.entry(path.symlink_metadata().unwrap().ino()).or_default() += 1;
    }
    let mut first: BTreeMap<u64, String> = BTreeMap::new();
    for path in paths {
        let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes().escape_ascii().to_string();
        let meta = path.symlink_metadata().unwrap();
        let kind = meta.file_type();
        let device = || format!("{}:{}", rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
        let (kind, content) = if kind.is_dir() {
            ("dir", String::new())
        } else if kind.is_file() {
            ("file", format!("{} {}", meta.len(), Digest::of(&fs::read(&path).unwrap())))
        } else if kind.is_symlink() {
            ("symlink", fs::read_link(&path).unwrap().as_os_str().as_bytes().escape_ascii().to_string())
        } else if kind.is_char_device() {
            ("char", device())
        } else if kind.is_block_device() {
            ("block", device())
        } else {
            ("fifo", String::new())
        };
        let attributes = (meta.mode() & 0o7777, meta.uid(), meta.gid(), meta.mtime(), meta.mtime_nsec() as u32);
        let mut text = line(kind, attributes, &content, &host_xattrs(&path), compare);
        if !meta.is_dir() && names[&meta.ino()] > 1 {
            text += &format!(" same as {}", first.entry(meta.ino()).or_insert_with(|| name.clone()));
        }
        out.insert(name, text);
    }
    out
}

fn host_xattrs(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut names = vec![0; 65536];
    let len = rustix::fs::llistxattr(path, &mut names[..]).unwrap_or(0);
    let mut out: Vec<_> = names[..len]
        .split(|&b| b == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0; 65536];
            let len = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]).unwrap();
            value.truncate(len);
            (name.to_vec(), value)
        })
        .collect();
    out.sort();
    out
}

/// Lists a folded tree, reading data from the packs.
pub fn folded(tree: &Tree, sink: &MemorySink, compare: Compare) -> Listing {
    let mut out = Listing::new();
    let mut names = vec![0; tree.inodes.len()];
    for inode in &tree.inodes {
        if let Body::Dir(children) = &inode.body {
            children.values().for_each(|child| names[child.0 as usize] += 1);
        }
    }
    let mut first: Vec<Option<String>> = vec![None; tree.inodes.len()];
    let mut todo = vec![(Vec::new(), Tree::ROOT)];
    while let Some((path, index)) = todo.pop() {
        let inode = tree.inode(index);
        if let Body::Dir(children) = &inode.body {
            let join = |name: &[u8]| if path.is_empty() { name.to_vec() } else { [&path[..], b"/", name].concat() };
            todo.extend(children.iter().rev().map(|(name, child)| (join(name), *child)));
        }
        if path.is_empty() {
            continue;
        }
        let name = path.escape_ascii().to_string();
        let mut text = inode_line(inode, &tree.packs, sink, compare);
        if names[index.0 as usize] > 1 {
            text += &format!(" same as {}", first[index.0 as usize].get_or_insert_with(|| name.clone()));
        }
        out.insert(name, text);
    }
    out
}

fn inode_line(inode: &Inode, packs: &[PackRef], sink: &MemorySink, compare: Compare) -> String {
    let (kind, content) = match &inode.body {
        Body::Dir(_) => ("dir", String::new()),
        Body::Content(Content::File(data)) => ("file", format!("{} {}", data.size(), Digest::of(&bytes(data, packs, sink)))),
        Body::Content(Content::Symlink(target)) => ("symlink", target.escape_ascii().to_string()),
        Body::Content(Content::Char(device)) => ("char", format!("{}:{}", device.major, device.minor)),
        Body::Content(Content::Block(device)) => ("block", format!("{}:{}", device.major, device.minor)),
        Body::Content(_) => ("fifo", String::new()),
    };
    let attr = &inode.attr;
    let xattrs: Vec<_> = attr.xattrs.iter().map(|x| (x.name.clone(), x.value.clone())).collect();
    line(kind, (attr.mode.into(), attr.uid, attr.gid, attr.mtime.sec, attr.mtime.nsec), &content, &xattrs, compare)
}

/// A file's bytes, from packs whose every table and unit is verified on the way.
fn bytes(data: &Data, packs: &[PackRef], sink: &MemorySink) -> Vec<u8> {
    let (size, unit_bits, chunks) = match data {
        Data::Inline(bytes) => return bytes.clone(),
        Data::Chunked { size, unit_bits, chunks } => (*size as usize, *unit_bits, chunks),
    };
    let unit_len = unit_bits.bytes() as usize;
    let mut out = vec![0; size];
    for (index, chunk) in chunks.iter().enumerate() {
        let Chunk::At { pack, block } = *chunk else { continue };
        let name = packs[pack as usize].digest;
        let file = &sink.packs[&name];
        let footer = PackTable::parse_footer(&name, &file[file.len() - FOOTER_LEN as usize..]).unwrap();
        let (at, len) = footer.unit_table();
        let table = PackTable::parse(footer, &file[at as usize..at as usize + len]).unwrap();
        let (unit, in_unit) = (block / unit_bits.blocks(), (block % unit_bits.blocks()) as usize * 4096);
        let entry = table.unit(unit).unwrap();
        let mut decoded = vec![0; table.unit_len(unit)];
        decode_unit(entry, &file[entry.offset as usize..][..entry.stored_len as usize], &mut decoded).unwrap();
        let range = index * unit_len..size.min((index + 1) * unit_len);
        let len = range.len();
        out[range].copy_from_slice(&decoded[in_unit..in_unit + len]);
    }
    out
}

/// Fails with the lines that differ.
pub fn assert_same(expected: &Listing, found: &Listing, what: &str) {
    let mut report = String::new();
    for path in expected.keys().chain(found.keys().filter(|path| !expected.contains_key(*path))) {
        let (expected, found) = (expected.get(path), found.get(path));
        if expected != found {
            let text = |line: Option<&String>| line.cloned().unwrap_or_else(|| "nothing".to_owned());
            report += &format!("{path}\n  expected {}\n  found    {}\n", text(expected), text(found));
        }
    }
    assert!(report.is_empty(), "{what}:\n{report}");
}

/// An OCI layout of these uncompressed layers, with the tag `t`.
pub fn layout(dir: &Path, layers: &[Vec<u8>]) {
    let sha256 =
        |bytes: &[u8]| aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes).as_ref().iter().map(|b| format!("{b:02x}")).collect::<String>();
    fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
    let blob = |bytes: &[u8], media_type: &str| {
        let digest = sha256(bytes);
        fs::write(dir.join("blobs/sha256").join(&digest), bytes).unwrap();
        serde_json::json!({"mediaType": format!("application/vnd.oci.image.{media_type}"), "digest": format!("sha256:{digest}"), "size": bytes.len()})
    };
    let diff_ids: Vec<_> = layers.iter().map(|layer| format!("sha256:{}", sha256(layer))).collect();
    let layers: Vec<_> = layers.iter().map(|layer| blob(layer, "layer.v1.tar")).collect();
    let config = serde_json::json!({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}});
    let config = blob(config.to_string().as_bytes(), "config.v1+json");
    let manifest = serde_json::json!({"schemaVersion": 2, "config": config, "layers": layers});
    let mut manifest = blob(manifest.to_string().as_bytes(), "manifest.v1+json");
    manifest["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": "t"});
    fs::write(dir.join("index.json"), serde_json::json!({"schemaVersion": 2, "manifests": [manifest]}).to_string()).unwrap();
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion": "1.0.0"}"#).unwrap();
}

/// A name of bytes that need not be UTF-8.
pub fn os(bytes: &[u8]) -> std::ffi::OsString {
    std::ffi::OsString::from_vec(bytes.to_vec())
}
