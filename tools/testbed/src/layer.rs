//! Image layers made from entries: a deterministic tar archive, compressed or not.

use std::io::Write;

use anyhow::{Context, Result};

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file with this content.
    File(Vec<u8>),
    /// A directory.
    Dir,
    /// A symbolic link to this target.
    Symlink(String),
    /// A hard link to this path of the archive.
    HardLink(String),
    /// A character device: major, minor.
    CharDevice(u32, u32),
    /// A block device: major, minor.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
}

/// One member of a layer. Every field may hold anything: tests make odd layers on purpose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path as it stands in the archive, usually without a leading slash.
    pub path: String,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits with set-id and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970 and nanoseconds.
    pub mtime: (i64, u32),
    /// Extended attributes, full names.
    pub xattrs: Vec<(String, Vec<u8>)>,
}

impl Entry {
    /// An entry with mode 0644 (0755 for a directory), owner root, a fixed mtime, no xattrs.
    pub fn new(path: &str, kind: EntryKind) -> Entry {
        let mode = if kind == EntryKind::Dir { 0o755 } else { 0o644 };
        Entry { path: path.to_owned(), kind, mode, uid: 0, gid: 0, mtime: (1_600_000_000, 0), xattrs: Vec::new() }
    }

    /// A regular file.
    pub fn file(path: &str, content: impl Into<Vec<u8>>) -> Entry {
        Entry::new(path, EntryKind::File(content.into()))
    }

    /// A directory.
    pub fn dir(path: &str) -> Entry {
        Entry::new(path, EntryKind::Dir)
    }

    /// A symbolic link.
    pub fn symlink(path: &str, target: &str) -> Entry {
        Entry::new(path, EntryKind::Symlink(target.to_owned())).mode(0o777)
    }

    /// A hard link.
    pub fn hard_link(path: &str, target: &str) -> Entry {
        Entry::new(path, EntryKind::HardLink(target.to_owned()))
    }

    /// The marker that removes `path` of the layers below.
    pub fn whiteout(path: &str) -> Entry {
        let (dir, name) = path.rsplit_once('/').map_or((String::new(), path), |(dir, name)| (format!("{dir}/"), name));
        Entry::file(&format!("{dir}.wh.{name}"), Vec::new())
    }

    /// The marker that hides everything the layers below have in `dir`.
    pub fn opaque(dir: &str) -> Entry {
        Entry::file(&format!("{dir}/.wh..wh..opq"), Vec::new())
    }

    /// With these permission bits.
    pub fn mode(self, mode: u32) -> Entry {
        Entry { mode, ..self }
    }

    /// With this owner and group.
    pub fn owner(self, uid: u32, gid: u32) -> Entry {
        Entry { uid, gid, ..self }
    }

    /// With this modification time.
    pub fn mtime(self, seconds: i64, nanoseconds: u32) -> Entry {
        Entry { mtime: (seconds, nanoseconds), ..self }
    }

    /// With one more extended attribute.
    pub fn xattr(mut self, name: &str, value: &[u8]) -> Entry {
        self.xattrs.push((name.to_owned(), value.to_vec()));
        self
    }
}

/// How a layer's blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    Plain,
    /// gzip.
    Gzip,
    /// Zstandard.
    Zstd,
}

impl Compression {
    /// The OCI media type of such a layer.
    pub fn media_type(self) -> &'static str {
        match self {
            Compression::Plain => "application/vnd.oci.image.layer.v1.tar",
            Compression::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Compression::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

/// A layer as it is stored in a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerBlob {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Their OCI media type.
    pub media_type: &'static str,
    /// `sha256:` and the digest of the bytes.
    pub digest: String,
    /// `sha256:` and the digest of the uncompressed archive.
    pub diff_id: String,
}

/// The entries of a layer, in archive order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Layer {
    /// Members in the order they are written.
    pub entries: Vec<Entry>,
}

impl Layer {
    /// A layer of these entries in this order.
    pub fn new(entries: impl IntoIterator<Item = Entry>) -> Layer {
        Layer { entries: entries.into_iter().collect() }
    }

    /// The uncompressed tar archive: the same entries always give the same bytes.
    pub fn tar(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for entry in &self.entries {
            write_entry(&mut out, entry);
        }
        out.resize(out.len() + 2 * BLOCK, 0);
        out
    }

    /// The blob that goes into a registry.
    pub fn blob(&self, compression: Compression) -> Result<LayerBlob> {
        let tar = self.tar();
        let diff_id = sha256(&tar);
        let bytes = match compression {
            Compression::Plain => tar,
            Compression::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(&tar).and_then(|()| encoder.finish()).context("compressing into memory")?
            }
            Compression::Zstd => zstd::encode_all(&tar[..], 1).context("compressing into memory")?,
        };
        Ok(LayerBlob { digest: sha256(&bytes), bytes, media_type: compression.media_type(), diff_id })
    }
}

/// `sha256:` and 64 hex digits.
pub fn sha256(bytes: &[u8]) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    digest.as_ref().iter().fold("sha256:".to_owned(), |text, byte| text + &format!("{byte:02x}"))
}

/// tar's unit: headers are one, contents are padded to a multiple.
const BLOCK: usize = 512;
/// The longest path a plain header takes; longer ones go into a PAX record.
const NAME_LEN: usize = 100;
/// The largest number an octal field of 12 bytes holds.
const OCTAL_12_MAX: u64 = 0o77_777_777_777;
/// The largest number an octal field of 8 bytes holds.
const OCTAL_8_MAX: u32 = 0o7_777_777;

/// PAX records first where the plain header is too small (long names, nanoseconds, xattrs, large ids), then header and content.
fn write_entry(out: &mut Vec<u8>, entry: &Entry) {
    let (type_flag, link, content, device) = match &entry.kind {
        EntryKind::File(content) => (b'0', "", &content[..], (0, 0)),
        EntryKind::HardLink(target) => (b'1', target.as_str(), &[][..], (0, 0)),
        EntryKind::Symlink(target) => (b'2', target.as_str(), &[][..], (0, 0)),
        EntryKind::CharDevice(major, minor) => (b'3', "", &[][..], (*major, *minor)),
        EntryKind::BlockDevice(major, minor) => (b'4', "", &[][..], (*major, *minor)),
        EntryKind::Dir => (b'5', "", &[][..], (0, 0)),
        EntryKind::Fifo => (b'6', "", &[][..], (0, 0)),
    };
    let path = if entry.kind == EntryKind::Dir { format!("{}/", entry.path) } else { entry.path.clone() };
    let mut records = Vec::new();
    let mut plain_time = u64::try_from(entry.mtime.0).unwrap_or(0);
    if path.len() > NAME_LEN {
        record(&mut records, "path", path.as_bytes());
    }
    if link.len() > NAME_LEN {
        record(&mut records, "linkpath", link.as_bytes());
    }
    if entry.mtime.1 != 0 || entry.mtime.0 < 0 || plain_time > OCTAL_12_MAX {
        record(&mut records, "mtime", pax_time(entry.mtime).as_bytes());
        plain_time = plain_time.min(OCTAL_12_MAX);
    }
    for (name, id) in [("uid", entry.uid), ("gid", entry.gid)] {
        if id > OCTAL_8_MAX {
            record(&mut records, name, id.to_string().as_bytes());
        }
    }
    for (name, value) in &entry.xattrs {
        record(&mut records, &format!("SCHILY.xattr.{name}"), value);
    }
    if !records.is_empty() {
        let header = Header {
            name: "PaxHeaders/entry",
            mode: 0o644,
            uid: 0,
            gid: 0,
            size: records.len(),
            mtime: 0,
            type_flag: b'x',
            link: "",
            device: (0, 0),
        };
        header.write(out);
        padded(out, &records);
    }
    let header = Header {
        name: &path,
        mode: entry.mode,
        uid: entry.uid.min(OCTAL_8_MAX),
        gid: entry.gid.min(OCTAL_8_MAX),
        size: content.len(),
        mtime: plain_time,
        type_flag,
        link,
        device,
    };
    header.write(out);
    padded(out, content);
}

/// PAX writes a time as a decimal; a negative one's fraction counts downwards (-1.25 is a quarter second before -1).
fn pax_time((seconds, nanoseconds): (i64, u32)) -> String {
    let total = i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
    let sign = if total < 0 { "-" } else { "" };
    let total = total.unsigned_abs();
    format!("{sign}{}.{:09}", total / 1_000_000_000, total % 1_000_000_000)
}

/// `LENGTH key=value\n`, where LENGTH counts itself.
fn record(out: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + rest.to_string().len();
    if rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    out.extend_from_slice(format!("{length} {key}=").as_bytes());
    out.extend_from_slice(value);
    out.push(b'\n');
}

fn padded(out: &mut Vec<u8>, content: &[u8]) {
    out.extend_from_slice(content);
    out.resize(out.len().next_multiple_of(BLOCK), 0);
}

/// One POSIX ustar header.
struct Header<'a> {
    name: &'a str,
    mode: u32,
    uid: u32,
    gid: u32,
    size: usize,
    mtime: u64,
    type_flag: u8,
    link: &'a str,
    device: (u32, u32),
}

impl Header<'_> {
    fn write(&self, out: &mut Vec<u8>) {
        let start = out.len();
        let text = |out: &mut Vec<u8>, text: &str, width: usize| {
            let bytes = &text.as_bytes()[..text.len().min(width)];
            out.extend_from_slice(bytes);
            out.resize(out.len() + width - bytes.len(), 0);
        };
        let octal = |out: &mut Vec<u8>, value: u64, width: usize| out.extend_from_slice(format!("{value:0width$o}\0", width = width - 1).as_bytes());
        text(out, self.name, NAME_LEN);
        octal(out, self.mode.into(), 8);
        octal(out, self.uid.into(), 8);
        octal(out, self.gid.into(), 8);
        octal(out, self.size as u64, 12);
        octal(out, self.mtime, 12);
        let checksum_at = out.len();
        out.extend_from_slice(b"        ");
        out.push(self.type_flag);
        text(out, self.link, NAME_LEN);
        out.extend_from_slice(b"ustar\x0000");
        text(out, "", 64); // owner and group names
        octal(out, self.device.0.into(), 8);
        octal(out, self.device.1.into(), 8);
        out.resize(start + BLOCK, 0);
        let sum: u64 = out[start..].iter().map(|&byte| u64::from(byte)).sum();
        out[checksum_at..checksum_at + 8].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Scratch, TreeDigest, need, require, run};

    #[test]
    fn a_record_counts_its_own_length() {
        let check = |key: &str, value_len: usize, expected: usize| {
            let mut out = Vec::new();
            record(&mut out, key, &vec![b'v'; value_len]);
            assert_eq!(out.len(), expected);
            assert!(out.starts_with(format!("{expected} ").as_bytes()));
        };
        check("k", 1, 6);
        check("k", 4, 9);
        check("k", 5, 11);
        check("path", 90, 99);
        check("path", 91, 101);
    }

    #[test]
    fn times_before_1970_count_downwards() {
        assert_eq!(pax_time((5, 7)), "5.000000007");
        assert_eq!(pax_time((-2, 750_000_000)), "-1.250000000");
        assert_eq!(pax_time((-1, 0)), "-1.000000000");
    }

    #[test]
    fn whiteouts_are_named_beside_what_they_remove() {
        assert_eq!(Entry::whiteout("a/b/c").path, "a/b/.wh.c");
        assert_eq!(Entry::whiteout("c").path, ".wh.c");
        assert_eq!(Entry::opaque("a").path, "a/.wh..wh..opq");
    }

    #[test]
    fn gnu_tar_unpacks_every_kind_of_entry_as_it_was_described() {
        require!(need::root(), need::command("tar"));
        let long = format!("d/{}", "long-name-".repeat(15));
        let layer = Layer::new([
            Entry::dir("d").mode(0o2750).owner(1000, 3_000_000_000),
            Entry::file("d/f", vec![1, 2, 3])
                .mode(0o4755)
                .mtime(1_234_567_890, 987_654_321)
                .xattr("user.color", b"blue")
                .xattr("trusted.t", &[0, 255]),
            Entry::file(&long, vec![9; 5000]),
            Entry::hard_link("d/hard", "d/f"),
            Entry::symlink("d/soft", &"far/".repeat(40)),
            Entry::new("d/char", EntryKind::CharDevice(1, 3)).mode(0o666),
            Entry::new("d/block", EntryKind::BlockDevice(7, 300)),
            Entry::new("d/fifo", EntryKind::Fifo),
        ]);
        let scratch = Scratch::new("layer").expect("a scratch directory");
        std::fs::write(scratch.join("layer.tar"), layer.tar()).expect("a file");
        let root = scratch.make_dir("root").expect("a directory");
        let args = ["--xattrs", "--xattrs-include=*", "-p", "--same-owner", "-xf"];
        run("tar", args.iter().map(std::ffi::OsString::from).chain([scratch.join("layer.tar").into(), "-C".into(), root.clone().into()]))
            .expect("tar takes it");
        let tree = TreeDigest::of(&root).expect("a tree");
        let at = |path: &str| tree.get(path).unwrap_or_else(|| panic!("{path} is missing"));
        assert_eq!((at("d").mode, at("d").uid, at("d").gid), (0o2750, 1000, 3_000_000_000));
        assert_eq!((at("d/f").mode, at("d/f").mtime), (0o4755, (1_234_567_890, 987_654_321)));
        assert_eq!(at("d/f").xattrs, std::collections::BTreeMap::from([("trusted.t".into(), vec![0, 255]), ("user.color".into(), b"blue".to_vec())]));
        assert_eq!(at("d/hard").link_group, at("d/f").link_group);
        assert!(at("d/f").link_group.is_some());
        assert_eq!(at(&long).size, 5000);
        assert_eq!(at("d/soft").size, 160);
        assert_eq!((at("d/char").device, at("d/block").device), (Some((1, 3)), Some((7, 300))));
    }

    #[test]
    fn the_same_entries_give_the_same_blob() {
        let layer = Layer::new([Entry::file("a", vec![1; 100_000])]);
        for compression in [Compression::Plain, Compression::Gzip, Compression::Zstd] {
            let blob = layer.blob(compression).expect("a blob");
            assert_eq!(blob, layer.blob(compression).expect("a blob"));
            assert_eq!(blob.diff_id, sha256(&layer.tar()));
        }
        assert_eq!(sha256(b""), "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }
}
