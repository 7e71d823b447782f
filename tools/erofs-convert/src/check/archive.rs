//! A tar reader of its own, so that `check` does not believe the converter's.
//!
//! POSIX ustar, GNU and PAX as Go's `archive/tar` reads them, since containerd unpacks with that. It gives up with a message at the
//! first thing it does not understand.

use std::collections::BTreeMap;
use std::io::{self, Read};

use erofs::meta::{Device, Time};

const BLOCK: usize = 512;
/// Largest extension header or sparse map that is believed.
const MAX_EXTENSION: u64 = 16 << 20;
/// What is read of a file's data at once.
const PIECE: usize = 256 << 10;

/// An entry without its data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Path as written.
    pub path: Vec<u8>,
    /// Type flag of the header.
    pub kind: u8,
    /// Link target as written.
    pub link: Vec<u8>,
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Time,
    /// Device number of a device.
    pub device: Device,
    /// Extended attributes as written.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Bytes of the file, holes included.
    pub size: u64,
}

/// Reads an archive entry by entry.
pub struct Archive<R> {
    tar: R,
    /// Data regions of the current file: offset in the file, length. Data not read yet and padding follow from them.
    regions: Vec<(u64, u64)>,
    /// Bytes of data and padding left before the next header.
    left: u64,
    padding: u64,
}

fn broken<T>(what: &str) -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::InvalidData, format!("the archive is malformed: {what}")))
}

type Records = BTreeMap<Vec<u8>, Vec<u8>>;

impl<R: Read> Archive<R> {
    /// Reads from the start of `tar`.
    pub fn new(tar: R) -> Archive<R> {
        Archive { tar, regions: Vec::new(), left: 0, padding: 0 }
    }

    /// The next entry; `None` at the end. What was left of the data of the one before is skipped.
    pub fn next_member(&mut self) -> io::Result<Option<Member>> {
        self.skip(self.left)?;
        // The last entry may lack its padding.
        io::copy(&mut (&mut self.tar).take(self.padding), &mut io::sink())?;
        (self.left, self.padding) = (0, 0);
        self.regions.clear();
        let mut pax = Records::new();
        let mut sparse_list = Vec::new();
        let (mut long_path, mut long_link) = (None, None);
        loop {
            let Some(header) = self.header()? else { return Ok(None) };
            let size = unsigned(&header[124..136])?;
            match header[156] {
                b'x' => (pax, sparse_list) = parse_records(&self.extension(size)?)?,
                b'g' => drop(self.extension(size)?),
                b'L' => long_path = Some(c_string(&self.extension(size)?)),
                b'K' => long_link = Some(c_string(&self.extension(size)?)),
                _ => return self.member(&header, size, &pax, &sparse_list, long_path, long_link).map(Some),
            }
        }
    }

    fn member(
        &mut self,
        header: &[u8; BLOCK],
        size: u64,
        pax: &Records,
        sparse_list: &[(u64, u64)],
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> io::Result<Member> {
        let text = |key: &str| pax.get(key.as_bytes()).filter(|value| !value.is_empty());
        let number = |key: &str| text(key).map(|value| decimal(value)).transpose();
        let not_empty = |name: Option<Vec<u8>>| name.filter(|name| !name.is_empty());
        let path = not_empty(long_path).or_else(|| text("path").cloned()).unwrap_or_else(|| plain_path(header));
        let kind = match header[156] {
            0 if path.ends_with(b"/") => b'5',
            0 | b'7' => b'0',
            kind => kind,
        };
        let stored = number("size")?.map_or(Ok(size), |size| u64::try_from(size).or_else(|_| broken("negative size")))?;
        let mut member = Member {
            path,
            kind,
            link: not_empty(long_link).or_else(|| text("linkpath").cloned()).unwrap_or_else(|| c_string(&header[157..257])),
            mode: (signed(&header[100..108])? & 0o7777) as u16,
            uid: owner(number("uid")?.map_or_else(|| signed(&header[108..116]), Ok)?)?,
            gid: owner(number("gid")?.map_or_else(|| signed(&header[116..124]), Ok)?)?,
            mtime: clamp(text("mtime").map_or_else(|| signed(&header[136..148]).map(|sec| Time { sec, nsec: 0 }), |text| pax_time(text))?),
            device: Device { major: 0, minor: 0 },
            xattrs: xattrs(pax),
            size: 0,
        };
        if matches!(kind, b'3' | b'4') {
            member.device = Device { major: owner(signed(&header[329..337])?)?, minor: owner(signed(&header[337..345])?)? };
        }
        // Only regular files have data, whatever the size field of others says.
        if !matches!(kind, b'0' | b'S') {
            return Ok(member);
        }
        (self.left, self.padding) = (stored, stored.next_multiple_of(BLOCK as u64) - stored);
        member.kind = b'0';
        member.size = stored;
        self.regions = vec![(0, stored)];
        if kind == b'S' {
            member.size = unsigned(&header[483..495])?;
            self.regions = self.gnu_map(header)?;
            return Ok(member);
        }
        let size = number("GNU.sparse.size")?.or(number("GNU.sparse.realsize")?);
        let size = size.map_or_else(|| broken("sparse file without size"), |size| u64::try_from(size).or_else(|_| broken("negative size")));
        match (text("GNU.sparse.major").map(|v| &v[..]), text("GNU.sparse.minor").map(|v| &v[..])) {
            (Some(b"1"), Some(b"0")) => {
                member.size = size?;
                self.regions = self.map_in_data()?;
            }
            (None, None) if text("GNU.sparse.map").is_none() && sparse_list.is_empty() => return Ok(member),
            (None, None) | (Some(b"0"), Some(b"0" | b"1")) => {
                member.size = size?;
                self.regions = match text("GNU.sparse.map") {
                    Some(map) => pairs(map.split(|&b| b == b',').filter(|n| !n.is_empty()))?,
                    None => sparse_list.to_vec(),
                };
            }
            _ => return broken("an unknown sparse format"),
        }
        if let Some(name) = text("GNU.sparse.name") {
            member.path.clone_from(name);
        }
        Ok(member)
    }

    /// Passes the current file's bytes to `sink`, holes as zeros.
    pub fn data(&mut self, size: u64, mut sink: impl FnMut(&[u8])) -> io::Result<()> {
        let zeros = vec![0; PIECE];
        let fill = |mut hole: u64, sink: &mut dyn FnMut(&[u8])| {
            while hole > 0 {
                let step = hole.min(PIECE as u64);
                sink(&zeros[..step as usize]);
                hole -= step;
            }
        };
        let mut piece = vec![0; PIECE];
        let mut at = 0;
        for (offset, len) in std::mem::take(&mut self.regions) {
            if offset < at || offset.checked_add(len).is_none_or(|end| end > size) || len > self.left {
                return broken("a file's data does not fit its size");
            }
            fill(offset - at, &mut sink);
            at = offset + len;
            let mut rest = len;
            while rest > 0 {
                let step = rest.min(PIECE as u64);
                self.tar.read_exact(&mut piece[..step as usize])?;
                sink(&piece[..step as usize]);
                rest -= step;
            }
            self.left -= len;
        }
        fill(size - at, &mut sink);
        Ok(())
    }

    fn header(&mut self) -> io::Result<Option<[u8; BLOCK]>> {
        let mut header = [0; BLOCK];
        let mut len = 0;
        while len < BLOCK {
            match self.tar.read(&mut header[len..])? {
                0 if len == 0 => return Ok(None),
                0 => return broken("it ends within a header"),
                more => len += more,
            }
        }
        if header.iter().all(|&b| b == 0) {
            return Ok(None);
        }
        let sum: u32 = header.iter().enumerate().map(|(i, &b)| if (148..156).contains(&i) { 32 } else { u32::from(b) }).sum();
        if unsigned(&header[148..156])? != u64::from(sum) {
            return broken("a header has a wrong checksum");
        }
        Ok(Some(header))
    }

    fn extension(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > MAX_EXTENSION {
            return broken("an extension header is too large");
        }
        let mut bytes = vec![0; size.next_multiple_of(BLOCK as u64) as usize];
        self.tar.read_exact(&mut bytes)?;
        bytes.truncate(size as usize);
        Ok(bytes)
    }

    fn skip(&mut self, len: u64) -> io::Result<()> {
        if io::copy(&mut (&mut self.tar).take(len), &mut io::sink())? == len { Ok(()) } else { broken("it ends within a file") }
    }

    /// GNU's old sparse map: four entries in the header, more in blocks behind it.
    fn gnu_map(&mut self, header: &[u8; BLOCK]) -> io::Result<Vec<(u64, u64)>> {
        let mut regions = Vec::new();
        let mut add = |entries: &[u8]| -> io::Result<()> {
            for entry in entries.chunks_exact(24).take_while(|entry| entry[0] != 0) {
                regions.push((unsigned(&entry[..12])?, unsigned(&entry[12..])?));
            }
            Ok(())
        };
        add(&header[386..482])?;
        let mut more = header[482] != 0;
        while more {
            let block = self.extension(BLOCK as u64)?;
            add(&block[..504])?;
            more = block[504] != 0;
        }
        Ok(regions)
    }

    /// PAX sparse format 1.0: the map is the first part of the data, decimal numbers, one per line.
    fn map_in_data(&mut self) -> io::Result<Vec<(u64, u64)>> {
        let mut text = Vec::new();
        loop {
            let complete = text.iter().filter(|&&b| b == b'\n').count() as u64;
            let lines: Vec<&[u8]> = text.split(|&b| b == b'\n').collect();
            if complete > 0 {
                let count = u64::try_from(decimal(lines[0])?).or_else(|_| broken("negative count"))?;
                if complete > count.saturating_mul(2) {
                    return pairs(lines[1..=2 * count as usize].iter().copied());
                }
            }
            if text.len() as u64 > MAX_EXTENSION || self.left < BLOCK as u64 {
                return broken("a sparse map does not end");
            }
            text.extend(self.extension(BLOCK as u64)?);
            self.left -= BLOCK as u64;
        }
    }
}

fn pairs<'a>(numbers: impl Iterator<Item = &'a [u8]>) -> io::Result<Vec<(u64, u64)>> {
    let numbers = numbers.map(|n| u64::try_from(decimal(n)?).or_else(|_| broken("negative number"))).collect::<io::Result<Vec<u64>>>()?;
    Ok(numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
}

fn c_string(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().copied().take_while(|&b| b != 0).collect()
}

/// Name field, with the prefix field in the formats that have it.
fn plain_path(header: &[u8; BLOCK]) -> Vec<u8> {
    let name = c_string(&header[..100]);
    let prefix = match (&header[257..263], &header[508..]) {
        (b"ustar\0", b"tar\0") => c_string(&header[345..476]),
        (b"ustar\0", _) => c_string(&header[345..500]),
        // Go's former mistake: a prefix where GNU's format has two times.
        (b"ustar ", _) if header[263..265] == *b" \0" => {
            let unreadable = |at: usize| header[at] != 0 && signed(&header[at..at + 12]).is_err();
            let prefix = c_string(&header[345..500]);
            if prefix.is_ascii() && (unreadable(345) || unreadable(357)) { prefix } else { Vec::new() }
        }
        _ => Vec::new(),
    };
    if prefix.is_empty() { name } else { [prefix, name].join(&b'/') }
}

/// Octal text, or GNU's two's complement big-endian when the first bit is set.
fn signed(field: &[u8]) -> io::Result<i64> {
    if field[0] & 0x80 != 0 {
        let first = if field[0] & 0x40 != 0 { -1 } else { 0 };
        let mut value = first << 6 | i128::from(field[0] & 0x3f);
        for byte in &field[1..] {
            value = value << 8 | i128::from(*byte);
        }
        return i64::try_from(value).or_else(|_| broken("a number is out of range"));
    }
    let text: Vec<u8> = field.iter().copied().skip_while(|b| matches!(b, b' ' | 0)).take_while(|b| !matches!(b, b' ' | 0)).collect();
    if text.is_empty() {
        return Ok(0);
    }
    let text = std::str::from_utf8(&text).ok().and_then(|text| i64::from_str_radix(text, 8).ok());
    text.map_or_else(|| broken("a number is not octal"), Ok)
}

fn unsigned(field: &[u8]) -> io::Result<u64> {
    u64::try_from(signed(field)?).or_else(|_| broken("a length is negative"))
}

fn decimal(text: &[u8]) -> io::Result<i64> {
    std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()).map_or_else(|| broken("a PAX number is not decimal"), Ok)
}

/// All ones means "do not change" to chown(2): the file stays root's.
fn owner(id: i64) -> io::Result<u32> {
    let id = u32::try_from(id).or_else(|_| broken("an owner or device number is out of range"))?;
    Ok(if id == u32::MAX { 0 } else { id })
}

fn pax_time(text: &[u8]) -> io::Result<Time> {
    let mut parts = text.splitn(2, |&b| b == b'.');
    let whole = parts.next().unwrap_or_default();
    let fraction: Vec<u8> = parts.next().unwrap_or_default().iter().copied().chain(std::iter::repeat(b'0')).take(9).collect();
    let nsec = decimal(&fraction)?;
    let sec = decimal(whole)?;
    Ok(if whole.starts_with(b"-") { Time { sec: -1, nsec: 0 } } else { Time { sec, nsec: nsec as u32 } })
}

/// containerd's `boundTime`: what 63 bits of nanoseconds since 1970 cannot hold becomes 1970.
fn clamp(time: Time) -> Time {
    let nanoseconds = i128::from(time.sec) * 1_000_000_000 + i128::from(time.nsec);
    if (0..=i128::from(i64::MAX)).contains(&nanoseconds) { time } else { Time::default() }
}

fn parse_records(mut rest: &[u8]) -> io::Result<(Records, Vec<(u64, u64)>)> {
    let mut records = Records::new();
    let mut sparse = Vec::new();
    let mut offset = None;
    while !rest.is_empty() {
        let space = rest.iter().position(|&b| b == b' ').map_or_else(|| broken("a PAX record has no length"), Ok)?;
        let len = usize::try_from(decimal(&rest[..space])?).ok().filter(|&len| len > space + 1 && len <= rest.len());
        let Some(len) = len else { return broken("a PAX record has a wrong length") };
        let record = &rest[space + 1..len - 1];
        let equals = record.iter().position(|&b| b == b'=').map_or_else(|| broken("a PAX record has no value"), Ok)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        match (key, offset) {
            (b"GNU.sparse.offset", _) => offset = Some(decimal(value)?),
            (b"GNU.sparse.numbytes", Some(offset)) => sparse.push((offset as u64, decimal(value)? as u64)),
            _ => drop(records.insert(key.to_vec(), value.to_vec())),
        }
        rest = &rest[len..];
    }
    Ok((records, sparse))
}

/// `SCHILY.xattr.*` as it is; other programs' records are not read by containerd.
fn xattrs(pax: &Records) -> BTreeMap<Vec<u8>, Vec<u8>> {
    pax.iter().filter_map(|(key, value)| Some((key.strip_prefix(b"SCHILY.xattr.")?.to_vec(), value.clone()))).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read_all(tar: &[u8]) -> io::Result<Vec<(Member, Vec<u8>)>> {
        let mut archive = Archive::new(tar);
        let mut out = Vec::new();
        while let Some(member) = archive.next_member()? {
            let mut data = Vec::new();
            archive.data(member.size, |piece| data.extend_from_slice(piece))?;
            out.push((member, data));
        }
        Ok(out)
    }

    #[test]
    fn what_the_image_maker_writes_is_read() {
        use testbed::{Entry, EntryKind, Layer};
        let long = "long/".repeat(60) + "name";
        let layer = Layer::new([
            Entry::file("a", "hello").mode(0o4755).owner(7, 3_000_000).mtime(12, 345),
            Entry::file(&long, "").xattr("user.x", b"a\nb=\0"),
            Entry::symlink("s", &long),
            Entry::hard_link("h", "a"),
            Entry::dir("d/").mtime(-5, 5),
            Entry::new("c", EntryKind::CharDevice(5, 300)),
        ]);
        let members = read_all(&layer.tar()).unwrap();
        let paths: Vec<_> = members.iter().map(|(m, _)| String::from_utf8_lossy(&m.path).into_owned()).collect();
        assert_eq!(paths, ["a", &long, "s", "h", "d//", "c"]);
        let (a, data) = &members[0];
        assert_eq!((a.mode, a.uid, a.gid, a.mtime, &data[..]), (0o4755, 7, 3_000_000, Time { sec: 12, nsec: 345 }, &b"hello"[..]));
        assert_eq!(members[1].0.xattrs[&b"user.x"[..]], b"a\nb=\0");
        assert_eq!(members[2].0.link, long.as_bytes());
        assert_eq!((members[3].0.kind, &members[3].0.link[..]), (b'1', &b"a"[..]));
        assert_eq!((members[4].0.kind, members[4].0.mtime), (b'5', Time::default()));
        assert_eq!(members[5].0.device, Device { major: 5, minor: 300 });
    }

    #[test]
    fn gnu_tar_s_sparse_files_are_read_in_every_format() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sparse");
        let file = std::fs::File::create(&path).unwrap();
        let mut expected = vec![0; 3 << 20];
        for at in (0..40).map(|i| i * 65536) {
            std::os::unix::fs::FileExt::write_all_at(&file, b"data", at).unwrap();
            expected[at as usize..at as usize + 4].copy_from_slice(b"data");
        }
        file.set_len(expected.len() as u64).unwrap();
        for format in [
            &["--format=gnu"][..],
            &["--format=pax", "--sparse-version=1.0"],
            &["--format=pax", "--sparse-version=0.1"],
            &["--format=pax", "--sparse-version=0.0"],
        ] {
            let tar = std::process::Command::new("tar").args(["-cS", "-C"]).arg(dir.path()).args(format).arg("sparse").output().unwrap();
            assert!(tar.status.success(), "{format:?}");
            let members = read_all(&tar.stdout).unwrap();
            assert_eq!(members.len(), 1);
            assert_eq!(members[0].0.path, b"sparse", "{format:?}");
            assert!(members[0].1 == expected, "{format:?}");
        }
    }

    #[test]
    fn numbers_in_both_notations() {
        for (field, expected) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"\x80\0\0\0\0\0\x01\0", Some(256)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2)),
            (b"0000648\0", None),
        ] {
            assert_eq!(signed(field).ok(), expected, "{field:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused_without_panic(tar in proptest::collection::vec(any::<u8>(), 0..2000), records in "([0-9]{1,2} [a-z]{0,3}=[0-9.-]{0,5}\n){0,4}") {
            let _ = read_all(&tar);
            let _ = parse_records(records.as_bytes());
            let _ = pax_time(records.as_bytes());
        }
    }
}
