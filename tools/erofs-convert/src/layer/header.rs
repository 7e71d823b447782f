//! Tar headers and PAX records to what an entry is: bytes in, values out.
//!
//! `tar-core` frames the archive; what a name, a number or a time in it means is decided here, by the rules of Go's `archive/tar`, which is
//! what containerd reads layers with. Where those two could see different entries in the same bytes, the archive is refused: an entry that
//! one program sees and another does not is how files are smuggled past scanners.
//!
//! Stricter than Go: checksums over *signed* bytes, which tars of the 1980s wrote, are refused. More lenient than containerd: contiguous
//! files (type `7`) and GNU's old sparse files (type `S`) are regular files, as to Go; containerd unpacks no layer that has them.

use std::borrow::Cow;
use std::collections::BTreeMap;

use erofs::meta::{Attr, Device, Time, Xattr};
use tar_core::{EntryType, HEADER_SIZE, Header, SparseEntry};

use super::acl;

/// Why an entry is refused, without saying which.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It breaks a rule of the format.
    Malformed(Cow<'static, str>),
    /// It is something that an image cannot hold, or of a kind this version does not know.
    Unsupported(Cow<'static, str>),
}

fn malformed<T>(rule: &'static str) -> Result<T, Refusal> {
    Err(Refusal::Malformed(rule.into()))
}

/// One entry of an archive.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Member {
    /// Path as written.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: MemberKind,
    /// Attributes; extended ones sorted by name, as far as a container could see them.
    pub attr: Attr,
    /// Bytes of data that follow in the archive.
    pub data_len: u64,
    /// The regions of a sparse file that the data is for, and the file's size.
    pub sparse: Option<(Vec<SparseEntry>, u64)>,
}

/// What an entry is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum MemberKind {
    Dir,
    File,
    /// Hard link to this path.
    Link(Vec<u8>),
    Symlink(Vec<u8>),
    Char(Device),
    Block(Device),
    Fifo,
}

/// What extension headers in front of an entry say.
#[derive(Default)]
struct Extensions<'a> {
    long_name: Option<&'a [u8]>,
    long_link: Option<&'a [u8]>,
    pax: Pax<'a>,
}

/// The PAX records that matter. Of records with the same key the last counts, and if that is empty it is as if there were none, as in Go.
#[derive(Default)]
struct Pax<'a> {
    path: Option<&'a [u8]>,
    link: Option<&'a [u8]>,
    size: Option<u64>,
    uid: Option<i64>,
    gid: Option<i64>,
    mtime: Option<Time>,
    xattrs: BTreeMap<&'a [u8], &'a [u8]>,
    sparse: PaxSparse<'a>,
}

/// What PAX records say of a sparse file.
#[derive(Default)]
struct PaxSparse<'a> {
    name: Option<&'a [u8]>,
    major: Option<&'a [u8]>,
    minor: Option<&'a [u8]>,
    size: Option<u64>,
    real_size: Option<u64>,
    /// There is a map, as one record or as many.
    has_map: bool,
}

/// Makes a member of the headers that `tar-core` took for one entry: extension headers, the entry's own, and the map of a sparse file.
/// `sparse` is what it read of that map.
pub(super) fn member(headers: &[u8], sparse: Option<(Vec<SparseEntry>, u64)>) -> Result<Member, Refusal> {
    let mut extensions = Extensions::default();
    let (header, map_len) = own_header(headers, &mut extensions)?;
    let Extensions { long_name, long_link, pax } = extensions;
    let size = pax.size.map_or_else(|| size_of_entry(header), Ok)?;
    // PAX sparse maps (version 1.0) are counted as data, GNU's are not.
    let map_in_data = if header.entry_type() == EntryType::GnuSparse { 0 } else { map_len as u64 };
    match header.entry_type() {
        EntryType::GnuSparse if sparse.is_none() => return malformed("it is a sparse file of GNU's old kind in another format than GNU's"),
        EntryType::GnuSparse => (),
        _ => pax.sparse.check(sparse.as_ref().map(|(_, real_size)| *real_size), map_in_data > 0, size)?,
    }
    let data_len = size.checked_sub(map_in_data).ok_or(Refusal::Malformed("its sparse map is longer than its data".into()))?;
    // Go: the GNU long name counts before PAX. GNU tar and libarchive: the other way round. No program writes both.
    if (long_name.is_some() && pax.path.is_some()) || (long_link.is_some() && pax.link.is_some()) {
        return malformed("it has a GNU and a PAX long name");
    }
    let mut path = long_name.or(pax.path).map_or_else(|| header_path(header), <[u8]>::to_vec);
    if sparse.is_some()
        && header.entry_type() != EntryType::GnuSparse
        && let Some(name) = pax.sparse.name
    {
        path = name.to_vec();
    }
    let link = long_link.or(pax.link).unwrap_or(header.link_name_bytes()).to_vec();
    if path.contains(&0) || link.contains(&0) {
        return malformed("its path contains a NUL byte");
    }
    let old = header.as_old();
    let kind = kind(header, &path, link)?;
    if sparse.is_some() && kind != MemberKind::File {
        return malformed("it is sparse and yet no regular file");
    }
    let attr = Attr {
        mode: mode(number(&old.mode)?, &kind),
        uid: owner(pax.uid.map_or_else(|| number(&old.uid), Ok)?)?,
        gid: owner(pax.gid.map_or_else(|| number(&old.gid), Ok)?)?,
        mtime: bounded(pax.mtime.map_or_else(|| number(&old.mtime).map(|sec| Time { sec, nsec: 0 }), Ok)?),
        xattrs: visible_xattrs(pax.xattrs, &kind)?,
    };
    // Only regular files have data, whatever a size says (Go: isHeaderOnly).
    let data_len = if kind == MemberKind::File { data_len } else { 0 };
    if let Some((map, real_size)) = &sparse {
        check_sparse(map, *real_size, data_len)?;
    }
    Ok(Member { path, kind, attr, data_len, sparse })
}

/// Walks over extension headers to the entry's own; gives it and the length of what follows it.
fn own_header<'a>(headers: &'a [u8], extensions: &mut Extensions<'a>) -> Result<(&'a Header, usize), Refusal> {
    let mut rest = headers;
    loop {
        let Some((block, after)) = rest.split_first_chunk::<HEADER_SIZE>() else {
            return malformed("its headers break off");
        };
        let header = Header::from_bytes(block);
        let kind = header.entry_type();
        if !matches!(kind, EntryType::GnuLongName | EntryType::GnuLongLink | EntryType::XHeader) || !(header.is_gnu() || header.is_ustar()) {
            if header.is_empty() {
                return malformed("a block of zeros stands between its headers");
            }
            return Ok((header, after.len()));
        }
        let len = size_of_entry(header)?;
        let padded = len.checked_next_multiple_of(HEADER_SIZE as u64).filter(|padded| *padded <= after.len() as u64);
        let Some(padded) = padded else { return malformed("its headers break off") };
        let content = &after[..len as usize];
        match kind {
            EntryType::XHeader => extensions.pax = parse_pax(content)?,
            // Empty ones say nothing, as in Go.
            EntryType::GnuLongName => extensions.long_name = Some(until_nul(content)).filter(|name| !name.is_empty()),
            _ => extensions.long_link = Some(until_nul(content)).filter(|name| !name.is_empty()),
        }
        rest = &after[padded as usize..];
    }
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|&b| b == 0).next().unwrap_or_default()
}

/// Size in a header, read strictly and as `tar-core` framed by it: a reader that took another number would look for the next header
/// elsewhere.
fn size_of_entry(header: &Header) -> Result<u64, Refusal> {
    let size = u64::try_from(number(&header.as_old().size)?).map_err(|_| Refusal::Malformed("its size is negative".into()))?;
    if header.entry_size().ok() != Some(size) { malformed("its size can be read in two ways") } else { Ok(size) }
}

/// Path in a header: with the prefix field in the formats that have one.
fn header_path(header: &Header) -> Vec<u8> {
    let bytes = header.as_bytes();
    let prefix = match (&bytes[257..263], &bytes[508..]) {
        // star's variant of the format ends in "tar" and uses the end of the prefix field for times (Go: formatSTAR).
        (b"ustar\0", b"tar\0") => until_nul(&bytes[345..476]),
        (b"ustar\0", _) => until_nul(&bytes[345..500]),
        _ if header.is_gnu() => misplaced_prefix(bytes),
        _ => &[],
    };
    match prefix {
        [] => header.path_bytes().to_vec(),
        prefix => [prefix, b"/", header.path_bytes()].concat(),
    }
}

/// The prefix in a header of the GNU format, which has none: before 1.8, Go wrote one over the access and change times. As in Go today, it
/// counts when the times cannot be read and it is ASCII.
fn misplaced_prefix(header: &[u8; HEADER_SIZE]) -> &[u8] {
    let is_time = |field: &[u8]| field[0] == 0 || number(field).is_ok();
    let prefix = until_nul(&header[345..500]);
    if is_time(&header[345..357]) && is_time(&header[357..369]) || !prefix.is_ascii() { &[] } else { prefix }
}

fn kind(header: &Header, path: &[u8], link: Vec<u8>) -> Result<MemberKind, Refusal> {
    let device = || {
        let fields = header.as_ustar();
        let part = |field: &[u8], bits: u32| {
            u32::try_from(number(field)?).ok().filter(|n| n >> bits == 0).ok_or(Refusal::Unsupported("a device number out of range".into()))
        };
        Ok(Device { major: part(&fields.dev_major, 12)?, minor: part(&fields.dev_minor, 20)? })
    };
    Ok(match header.entry_type() {
        // Archives older than the type for directories end their names in a slash.
        EntryType::Regular if header.as_old().linkflag == [0] && path.ends_with(b"/") => MemberKind::Dir,
        EntryType::Regular | EntryType::Continuous | EntryType::GnuSparse => MemberKind::File,
        EntryType::Link => MemberKind::Link(link),
        EntryType::Symlink if link.is_empty() || link.len() > 4095 => {
            return malformed("its symbolic link's target is empty or longer than 4095 bytes");
        }
        EntryType::Symlink => MemberKind::Symlink(link),
        EntryType::Char => MemberKind::Char(device()?),
        EntryType::Block => MemberKind::Block(device()?),
        EntryType::Directory => MemberKind::Dir,
        EntryType::Fifo => MemberKind::Fifo,
        other => return Err(Refusal::Unsupported(format!("tar entry type {:?}", char::from(other.to_byte())).into())),
    })
}

/// A numeric header field: octal digits between spaces and NULs, or GNU's base 256, which may be negative.
fn number(field: &[u8]) -> Result<i64, Refusal> {
    if field[0] & 0x80 != 0 {
        let negative = field[0] & 0x40 != 0;
        let mut value = 0u64;
        for (index, byte) in field.iter().enumerate() {
            let byte = if negative { !byte } else { *byte };
            let byte = if index == 0 { byte & 0x7f } else { byte };
            if value >> 56 != 0 {
                return malformed("a number in its header is out of range");
            }
            value = value << 8 | u64::from(byte);
        }
        let value = i64::try_from(value).map_err(|_| Refusal::Malformed("a number in its header is out of range".into()))?;
        return Ok(if negative { !value } else { value });
    }
    let is_digit = |byte: &u8| !matches!(byte, b' ' | 0);
    let digits = match (field.iter().position(is_digit), field.iter().rposition(is_digit)) {
        (Some(start), Some(last)) => until_nul(&field[start..=last]),
        _ => &[],
    };
    let mut value = 0i64;
    for digit in digits {
        if !(b'0'..=b'7').contains(digit) {
            return malformed("a number in its header is not octal");
        }
        // At most twelve digits of three bits.
        value = value << 3 | i64::from(digit - b'0');
    }
    Ok(value)
}

fn decimal(value: &[u8]) -> Result<i64, Refusal> {
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).ok_or(Refusal::Malformed("a number in its PAX header is not decimal".into()))
}

/// chown(2) takes 32 bits, of which all ones mean "leave it", which for a file just made by root is 0.
fn owner(id: i64) -> Result<u32, Refusal> {
    match u32::try_from(id) {
        Ok(u32::MAX) => Ok(0),
        Ok(id) => Ok(id),
        Err(_) => Err(Refusal::Unsupported(format!("owner {id}, which does not fit in 32 bits").into())),
    }
}

/// Permission bits; Linux ignores and shows 0777 for those of a symbolic link.
fn mode(mode: i64, kind: &MemberKind) -> u16 {
    if matches!(kind, MemberKind::Symlink(_)) { 0o777 } else { (mode & 0o7777) as u16 }
}

/// Times before 1970 or after what 63 bits of nanoseconds reach become 1970, as in containerd (`pkg/archive/time.go`, boundTime).
fn bounded(time: Time) -> Time {
    const MAX: Time = Time { sec: i64::MAX / 1_000_000_000, nsec: (i64::MAX % 1_000_000_000) as u32 };
    if time < Time::default() || time > MAX { Time::default() } else { time }
}

/// "seconds", "-seconds" or with a fraction, of which nine digits count.
fn pax_time(value: &[u8]) -> Result<Time, Refusal> {
    let (whole, fraction) = value.iter().position(|&b| b == b'.').map_or((value, &[][..]), |at| (&value[..at], &value[at + 1..]));
    let sec = decimal(whole)?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return malformed("a time in its PAX header is not decimal");
    }
    let nsec = (0..9).fold(0, |nsec, digit| nsec * 10 + fraction.get(digit).map_or(0, |b| u32::from(b - b'0')));
    // What is before 1970 becomes 1970 anyway.
    Ok(if whole.starts_with(b"-") { Time { sec: sec.min(-1), nsec: 0 } } else { Time { sec, nsec } })
}

/// The records `length key=value\n`. `tar-core` stops at the first that it cannot read; what it would not see must not be there.
fn parse_pax(mut rest: &[u8]) -> Result<Pax<'_>, Refusal> {
    let broken = || Refusal::Malformed("a PAX record is malformed".into());
    let mut pax = Pax::default();
    while !rest.is_empty() {
        let space = rest.iter().take(20).position(|&b| b == b' ').ok_or_else(broken)?;
        let digits = &rest[..space];
        if !digits.iter().all(u8::is_ascii_digit) {
            return Err(broken());
        }
        let len = usize::try_from(decimal(digits)?).map_err(|_| broken())?;
        let record = rest.get(space + 1..len).and_then(|record| record.strip_suffix(b"\n")).ok_or_else(broken)?;
        let equals = record.iter().position(|&b| b == b'=').filter(|&at| at > 0).ok_or_else(broken)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        if key.contains(&0) {
            return Err(broken());
        }
        pax.set(key, value)?;
        rest = &rest[len..];
    }
    Ok(pax)
}

impl<'a> Pax<'a> {
    fn set(&mut self, key: &'a [u8], value: &'a [u8]) -> Result<(), Refusal> {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            self.xattrs.insert(name, value);
            return Ok(());
        }
        let value = Some(value).filter(|value| !value.is_empty());
        let unsigned = || {
            let number = value.map(decimal).transpose()?.map(u64::try_from).transpose();
            number.map_err(|_| Refusal::Malformed("its size is negative".into()))
        };
        match key {
            b"path" => self.path = value,
            b"linkpath" => self.link = value,
            b"size" => self.size = unsigned()?,
            b"uid" => self.uid = value.map(decimal).transpose()?,
            b"gid" => self.gid = value.map(decimal).transpose()?,
            b"mtime" => self.mtime = value.map(pax_time).transpose()?,
            b"GNU.sparse.name" => self.sparse.name = value,
            b"GNU.sparse.major" => self.sparse.major = value,
            b"GNU.sparse.minor" => self.sparse.minor = value,
            b"GNU.sparse.size" => self.sparse.size = unsigned()?,
            b"GNU.sparse.realsize" => self.sparse.real_size = unsigned()?,
            b"GNU.sparse.map" => self.sparse.has_map = value.is_some(),
            b"GNU.sparse.offset" => self.sparse.has_map = true,
            _ => (),
        }
        Ok(())
    }
}

impl PaxSparse<'_> {
    /// Whether `tar-core` took the entry for what Go takes it for: a sparse file of `real_size`, with its map in front of its data or not, or
    /// a plain one of `size`.
    fn check(&self, real_size: Option<u64>, map_in_data: bool, size: u64) -> Result<(), Refusal> {
        let (is_sparse, in_data) = match (self.major, self.minor) {
            (None, None) => (self.has_map, false),
            (Some(b"0"), Some(b"0" | b"1")) => (true, false),
            (Some(b"1"), Some(b"0")) => (true, true),
            // Go reads the data as it is, map and all; others refuse.
            (major, minor) => {
                let [major, minor] = [major, minor].map(|part| part.unwrap_or(b"?").escape_ascii());
                return Err(Refusal::Unsupported(format!("GNU sparse format {major}.{minor}").into()));
            }
        };
        if (real_size.is_some(), map_in_data) != (is_sparse, in_data) {
            return malformed("its sparse map can be read in two ways");
        }
        if real_size.is_some_and(|real_size| real_size != self.size.or(self.real_size).unwrap_or(size)) {
            return malformed("its size can be read in two ways");
        }
        Ok(())
    }
}

/// The attributes that unpacking would leave on the file, sorted. Left out, as containerd leaves them out or the kernel refuses them:
/// `trusted.*` (so no layer can talk to overlayfs through `trusted.overlay.*`), `user.*` on anything but files and directories, ACLs on
/// symbolic links, default ACLs on what is no directory, ACLs that say nothing, and whatever is of no known namespace.
fn visible_xattrs(records: BTreeMap<&[u8], &[u8]>, kind: &MemberKind) -> Result<Vec<Xattr>, Refusal> {
    let mut xattrs: Vec<Xattr> = Vec::new();
    for (name, value) in records {
        let visible = match name {
            acl::ACCESS => !matches!(kind, MemberKind::Symlink(_)) && acl::says_something(value)?,
            acl::DEFAULT => matches!(kind, MemberKind::Dir) && acl::says_something(value)?,
            name if name.starts_with(b"user.") => matches!(kind, MemberKind::Dir | MemberKind::File | MemberKind::Link(_)),
            name => name.starts_with(b"security."),
        };
        if !visible {
            continue;
        }
        if !Xattr::is_name(name) || value.len() > Xattr::MAX_VALUE {
            return malformed("the name of an extended attribute is none or longer than 255 bytes, or its value longer than 65535");
        }
        xattrs.push(Xattr { name: name.to_vec(), value: value.to_vec() });
    }
    Ok(xattrs)
}

/// Regions in order, not overlapping, within the file, and as long together as the data.
fn check_sparse(map: &[SparseEntry], real_size: u64, data_len: u64) -> Result<(), Refusal> {
    let (mut free, mut sum) = (0u64, 0u64);
    for region in map {
        let end = region.offset.checked_add(region.length).filter(|end| region.offset >= free && *end <= real_size);
        let Some(end) = end else { return malformed("its sparse map is out of order or reaches beyond the file") };
        free = end;
        sum += region.length;
    }
    if sum == data_len { Ok(()) } else { malformed("its sparse map does not match its data") }
}

#[cfg(test)]
mod tests;
