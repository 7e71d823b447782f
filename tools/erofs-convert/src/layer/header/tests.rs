//! What bytes of a header mean, and which mean nothing.

use proptest::prelude::*;

use super::*;

/// A header block: name, type and size, and fields written over it, with a checksum that fits.
fn block(name: &str, kind: u8, size: &str, fields: &[(usize, &[u8])]) -> [u8; 512] {
    let mut block = [0; 512];
    for (at, bytes) in [(0, name.as_bytes()), (100, b"0000644"), (108, b"0000000"), (116, b"0000000"), (124, size.as_bytes()), (136, b"00000000001")]
    {
        block[at..at + bytes.len()].copy_from_slice(bytes);
    }
    block[156] = kind;
    block[257..265].copy_from_slice(b"ustar\x0000");
    for (at, bytes) in fields {
        block[*at..*at + bytes.len()].copy_from_slice(bytes);
    }
    block
}

/// An extension header with its padded content.
fn extension(kind: u8, content: &[u8]) -> Vec<u8> {
    let mut out = block("././@Extension", kind, &format!("{:011o}", content.len()), &[]).to_vec();
    out.extend_from_slice(content);
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

fn pax(records: &[(&str, &str)]) -> Vec<u8> {
    let record = |(key, value): &(&str, &str)| {
        let rest = key.len() + value.len() + 3;
        let len = (1..).map(|digits| rest + digits).find(|len| len.to_string().len() + rest == *len).unwrap();
        format!("{len} {key}={value}\n")
    };
    extension(b'x', records.iter().map(record).collect::<String>().as_bytes())
}

fn rule<T: std::fmt::Debug>(result: Result<T, Refusal>) -> String {
    match result.unwrap_err() {
        Refusal::Malformed(rule) | Refusal::Unsupported(rule) => rule.into_owned(),
    }
}

#[test]
fn numbers_are_octal_or_base_256() {
    let check = |field: &[u8], expected: Option<i64>| assert_eq!(number(field).ok(), expected, "{}", field.escape_ascii());
    check(b"0000644\0", Some(0o644));
    check(b"   123 \0", Some(0o123));
    check(b"\0\0\0\0", Some(0));
    check(b"        ", Some(0));
    check(b"77777777777\0", Some(0o77777777777));
    check(b"777777777777", Some(0o777777777777));
    check(b"\0\x00000644\0", Some(0o644));
    check(b"+644\0", None);
    check(b"-644\0", None);
    check(b"0648\0", None);
    check(b"12 \x003\0", None);
    check(b"644\n\0", None);
    check(b"06 4\0", None);
    check(b"\x80\0\0\0\0\0\0\x07", Some(7));
    check(b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1));
    check(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2));
    check(b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Some(i64::MAX));
    check(b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None);
    check(b"\x80\0\0\x01\0\0\0\0\0\0\0\0", None);
}

#[test]
fn names_come_from_where_the_format_puts_them() {
    let check = |headers: Vec<u8>, expected: &str| {
        let found = member(&headers, None).map_or_else(|r| rule::<()>(Err(r)), |m| String::from_utf8_lossy(&m.path).into_owned());
        assert_eq!(found, expected);
    };
    let plain = |fields: &[(usize, &[u8])]| block("name", b'0', "0", fields).to_vec();
    check(plain(&[]), "name");
    check(plain(&[(345, b"some/dir")]), "some/dir/name");
    check(plain(&[(345, &[b'p'; 155])]), &("p".repeat(155) + "/name"));
    check(plain(&[(345, &[b'p'; 155]), (508, b"tar\0")]), &("p".repeat(131) + "/name"));
    // What Go wrote before 1.8 where the GNU format has times, if those make none.
    let gnu = |fields: &[(usize, &[u8])]| block("name", b'0', "0", &[&[(257, &b"ustar  \0"[..])], fields].concat()).to_vec();
    check(gnu(&[(345, b"some/dir")]), "some/dir/name");
    check(gnu(&[(345, b"00000000001\0"), (357, b"dir")]), "00000000001/name");
    check(gnu(&[(345, b"00000000001\x0000000000001\0")]), "name");
    check(gnu(&[(345, b"\0\0\0\0\0\0\0\0\0\0\0\0dir")]), "name");
    check(gnu(&[(345, b"d\xefr")]), "name");
    check(plain(&[(257, b"ustar\0ab"), (345, b"some/dir")]), "some/dir/name");
    check(plain(&[(257, b"\0\0\0\0\0\0\0\0"), (345, b"some/dir")]), "name");
    check([extension(b'L', b"long\0junk"), plain(&[])].concat(), "long");
    check([extension(b'L', b"\0"), plain(&[])].concat(), "name");
    check([extension(b'L', b""), plain(&[])].concat(), "name");
    check([pax(&[("path", "pax")]), plain(&[(345, b"dir")])].concat(), "pax");
    check([pax(&[("path", "one"), ("path", "two")]), plain(&[])].concat(), "two");
    check([pax(&[("path", "")]), plain(&[])].concat(), "name");
    check([pax(&[("path", "one"), ("path", "")]), plain(&[])].concat(), "name");
    check([extension(b'L', b""), pax(&[("path", "pax")]), plain(&[])].concat(), "pax");
    check([extension(b'L', b"long\0"), pax(&[("path", "pax")]), plain(&[])].concat(), "it has a GNU and a PAX long name");
    check([pax(&[("path", "a\0b")]), plain(&[])].concat(), "its path contains a NUL byte");
    check([vec![0; 512], plain(&[])].concat(), "a block of zeros stands between its headers");
    check(extension(b'x', b""), "its headers break off");
    check(vec![], "its headers break off");
}

#[test]
fn kinds_have_what_belongs_to_them() {
    let check = |kind: u8, fields: &[(usize, &[u8])], expected: Result<MemberKind, &str>| {
        let found = member(&block("dir/", kind, "0000010", fields), None);
        assert_eq!(
            found.map(|m| (m.kind, m.data_len)).map_err(|r| rule::<()>(Err(r))),
            expected
                .map(|k| {
                    let data_len = if k == MemberKind::File { 8 } else { 0 };
                    (k, data_len)
                })
                .map_err(str::to_owned)
        );
    };
    check(b'0', &[], Ok(MemberKind::File));
    check(b'7', &[], Ok(MemberKind::File));
    check(0, &[], Ok(MemberKind::Dir));
    check(0, &[(0, b"file\0")], Ok(MemberKind::File));
    check(b'5', &[], Ok(MemberKind::Dir));
    check(b'6', &[], Ok(MemberKind::Fifo));
    check(b'1', &[(157, b"target")], Ok(MemberKind::Link(b"target".to_vec())));
    check(b'2', &[(157, b"target")], Ok(MemberKind::Symlink(b"target".to_vec())));
    let long_target = member(&[extension(b'K', b"\0"), block("l", b'2', "0", &[(157, b"t")]).to_vec()].concat(), None).unwrap().kind;
    assert_eq!(long_target, MemberKind::Symlink(b"t".to_vec()), "an empty long link says nothing");
    check(b'2', &[], Err("its symbolic link's target is empty or longer than 4095 bytes"));
    check(b'3', &[(329, b"0000001"), (337, b"0000003")], Ok(MemberKind::Char(Device { major: 1, minor: 3 })));
    check(b'4', &[(329, b"\x80\0\0\0\0\0\x0f\xff"), (337, b"0000001")], Ok(MemberKind::Block(Device { major: 4095, minor: 1 })));
    check(b'4', &[(329, b"0010000")], Err("a device number out of range"));
    check(b'D', &[], Err("tar entry type 'D'"));
    check(b'V', &[], Err("tar entry type 'V'"));
}

#[test]
fn attributes_are_those_containerd_would_set() {
    let of = |records: &[(&str, &str)], fields: &[(usize, &[u8])]| member(&[pax(records), block("f", b'0', "0", fields).to_vec()].concat(), None);
    let attr = of(&[("mtime", "12.34567891234"), ("uid", "3000000000"), ("gid", "4294967295")], &[(100, b"0104755")]).unwrap().attr;
    assert_eq!((attr.mode, attr.uid, attr.gid, attr.mtime), (0o4755, 3_000_000_000, 0, Time { sec: 12, nsec: 345_678_912 }));
    let check = |mtime: &str, sec: i64, nsec: u32| assert_eq!(of(&[("mtime", mtime)], &[]).unwrap().attr.mtime, Time { sec, nsec }, "{mtime}");
    check("1", 1, 0);
    check("1.", 1, 0);
    check("1.5", 1, 500_000_000);
    check("0.000000001", 0, 1);
    check("-1", 0, 0);
    check("-0.5", 0, 0);
    check("9223372036.854775807", 9_223_372_036, 854_775_807);
    check("9223372036.854775808", 0, 0);
    check("99999999999999", 0, 0);
    check("", 1, 0);
    let attr = of(&[("mtime", "5"), ("mtime", ""), ("uid", "7"), ("uid", ""), ("gid", "7"), ("gid", "")], &[]).unwrap().attr;
    assert_eq!((attr.mtime.sec, attr.uid, attr.gid), (1, 0, 0), "an empty record takes back the one before");
    for (records, expected) in [
        (("mtime", "x"), "a number in its PAX header is not decimal"),
        (("mtime", ".5"), "a number in its PAX header is not decimal"),
        (("mtime", "1.x"), "a time in its PAX header is not decimal"),
        (("uid", "4294967296"), "owner 4294967296, which does not fit in 32 bits"),
        (("gid", "-1"), "owner -1, which does not fit in 32 bits"),
        (("size", "-1"), "its size is negative"),
    ] {
        assert_eq!(rule(of(&[records], &[])), expected);
    }
    assert_eq!(of(&[], &[(136, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")]).unwrap().attr.mtime, Time::default());
    assert_eq!(member(&block("l", b'2', "0", &[(157, b"t"), (100, b"0000000")]), None).unwrap().attr.mode, 0o777);
}

#[test]
fn extended_attributes_are_those_a_container_could_see() {
    let of = |kind: u8, records: &[(&str, &str)]| member(&[pax(records), block("f", kind, "0", &[(157, b"t")]).to_vec()].concat(), None);
    let check = |kind: u8, records: &[(&str, &str)], expected: &str| {
        let found = of(kind, records).unwrap().attr.xattrs;
        let text: Vec<_> = found.iter().map(|x| format!("{}={}", x.name.escape_ascii(), x.value.escape_ascii())).collect();
        assert_eq!(text.join(" "), expected);
    };
    check(b'0', &[("SCHILY.xattr.user.b", "1"), ("SCHILY.xattr.user.a", "2"), ("SCHILY.xattr.user.b", "3=4\n")], "user.a=2 user.b=3=4\\n");
    check(b'0', &[("SCHILY.xattr.user.empty", "")], "user.empty=");
    check(b'0', &[("SCHILY.xattr.trusted.overlay.opaque", "y"), ("SCHILY.xattr.trusted.x", "y"), ("SCHILY.xattr.odd", "y")], "");
    check(
        b'2',
        &[("SCHILY.xattr.user.a", "1"), ("SCHILY.xattr.security.selinux", "s"), ("SCHILY.xattr.system.posix_acl_access", "a")],
        "security.selinux=s",
    );
    check(b'6', &[("SCHILY.xattr.user.a", "1"), ("SCHILY.xattr.security.selinux", "s")], "security.selinux=s");
    // Neither containerd nor Go knows libarchive's.
    check(b'0', &[("LIBARCHIVE.xattr.user.c", "AQ==")], "");
    let acl =
        String::from_utf8([&[2, 0, 0, 0][..], &[1, 0, 7, 0, 0, 0, 0, 0], &[4, 0, 5, 0, 0, 0, 0, 0], &[32, 0, 0, 0, 0, 0, 0, 0]].concat()).unwrap();
    let acls = [("SCHILY.xattr.system.posix_acl_access", &acl[..]), ("SCHILY.xattr.system.posix_acl_default", &acl[..])];
    let names = |kind: u8| of(kind, &acls).unwrap().attr.xattrs.iter().map(|x| x.name.escape_ascii().to_string()).collect::<Vec<_>>().join(" ");
    assert_eq!(names(b'0'), "system.posix_acl_access");
    assert_eq!(names(b'5'), "system.posix_acl_access system.posix_acl_default");
    assert_eq!(names(b'2'), "");
    check(b'5', &[("SCHILY.xattr.system.posix_acl_default", &acl[..4])], "");
    assert_eq!(rule(of(b'0', &[("SCHILY.xattr.system.posix_acl_access", "a")])), "an ACL of it is malformed");
    // What no image can hold is refused before anything is written.
    let form = "the name of an extended attribute is none or longer than 255 bytes, or its value longer than 65535";
    for (name, len) in [("user.", 0), ("security.", 0), (&format!("user.{}", "n".repeat(251)), 0), ("user.a", 65536)] {
        assert_eq!(rule(of(b'0', &[(&format!("SCHILY.xattr.{name}"), &"v".repeat(len))])), form);
    }
    check(b'0', &[(&format!("SCHILY.xattr.user.{}", "n".repeat(250)), "")], &format!("user.{}=", "n".repeat(250)));
}

#[test]
fn pax_sparse_files_are_what_go_takes_for_them() {
    let check = |records: &[(&str, &str)], sparse: Option<u64>, map_blocks: usize, expected: Result<&str, &str>| {
        let mut headers = [pax(records), block("header", b'0', "2000", &[]).to_vec()].concat();
        headers.resize(headers.len() + 512 * map_blocks, b'\n');
        let left = 1024 - 512 * map_blocks as u64;
        let found = member(&headers, sparse.map(|size| (vec![SparseEntry { offset: 0, length: left }], size)));
        let found = found.map(|m| String::from_utf8(m.path).unwrap()).map_err(|r| rule::<()>(Err(r)));
        assert_eq!(found, expected.map(str::to_owned).map_err(str::to_owned), "{records:?}");
    };
    let (major, minor, name, map) = ("GNU.sparse.major", "GNU.sparse.minor", ("GNU.sparse.name", "real"), ("GNU.sparse.map", "0,1024"));
    let size = ("GNU.sparse.size", "4096");
    check(&[(major, "1"), (minor, "0"), name, size], Some(4096), 1, Ok("real"));
    check(&[(major, "0"), (minor, "1"), name, map, size], Some(4096), 0, Ok("real"));
    check(&[(major, "0"), (minor, "0"), name, ("GNU.sparse.offset", "0"), size], Some(4096), 0, Ok("real"));
    check(&[name, map, size], Some(4096), 0, Ok("real"));
    check(&[name, map], Some(1024), 0, Ok("real"));
    check(&[name, map, size, ("GNU.sparse.realsize", "1")], Some(4096), 0, Ok("real"));
    check(&[name], None, 0, Ok("header"));
    // Other versions are plain files to Go and sparse ones to others.
    for (a, b, expected) in [("1", "1", "1.1"), ("2", "0", "2.0"), ("0", "2", "0.2"), ("01", "0", "01.0"), ("1", "", "1.?"), ("", "0", "?.0")] {
        check(&[(major, a), (minor, b), name, map, size], Some(4096), 0, Err(&format!("GNU sparse format {expected}")));
    }
    let two_ways = Err("its sparse map can be read in two ways");
    check(&[(major, "1"), (minor, "0"), (major, "0"), name, map, size], Some(4096), 1, two_ways);
    check(&[(major, "0"), (minor, "1"), name, size], None, 0, two_ways);
    check(&[("GNU.sparse.map", ""), name, size], Some(4096), 0, two_ways);
    check(&[name, map, ("GNU.sparse.realsize", "4096"), size], Some(4095), 0, Err("its size can be read in two ways"));
    let old = member(&block("f", b'S', "2000", &[]), None);
    assert_eq!(rule(old), "it is a sparse file of GNU's old kind in another format than GNU's");
}

#[test]
fn pax_records_are_read_to_the_last_byte() {
    let check = |content: &[u8], expected: bool| assert_eq!(parse_pax(content).is_ok(), expected, "{}", content.escape_ascii());
    check(b"", true);
    check(b"8 path=\n", true);
    check(b"9 path=a\n", true);
    check(b"9 path=a\n\0\0\0", false);
    check(b"9 path=a\n9 path=b", false);
    check(b"11 path=a\n", false);
    check(b"9 path=ab\n", false);
    check(b"+9 path=a\n", false);
    check(b"0 path=a\n", false);
    check(b"9path=a\n", false);
    check(b"4 a\n", false);
    check(b"5 =a\n", false);
    check(b"99999999999999999999 path=a\n", false);
    check(b"6 \0=a\n", false);
}

#[test]
fn a_size_that_can_be_read_in_two_ways_is_refused() {
    let check = |size: &[u8], expected: Result<u64, &str>| {
        let found = member(&block("f", b'0', "", &[(124, size)]), None);
        assert_eq!(found.map(|m| m.data_len).map_err(|r| rule::<()>(Err(r))), expected.map_err(str::to_owned));
    };
    check(b"00000001000", Ok(512));
    check(b"\x80\0\0\0\0\0\0\0\0\0\x02\0", Ok(512));
    check(b"\0\x30\x30000001000", Err("its size can be read in two ways"));
    check(b"\x80\0\0\x01\0\0\0\0\0\0\x02\0", Err("a number in its header is out of range"));
    check(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", Err("its size is negative"));
    check(b"+0000001000", Err("a number in its header is not octal"));
}

#[test]
fn sparse_maps_must_describe_the_data() {
    let check = |map: &[(u64, u64)], real_size: u64, expected: &str| {
        let map: Vec<_> = map.iter().map(|&(offset, length)| SparseEntry { offset, length }).collect();
        assert_eq!(check_sparse(&map, real_size, 10).map_or_else(|r| rule::<()>(Err(r)), |()| String::new()), expected, "{map:?}");
    };
    check(&[(0, 4), (8, 6)], 14, "");
    check(&[(0, 4), (4, 6), (20, 0)], 20, "");
    check(&[(8, 6), (0, 4)], 14, "its sparse map is out of order or reaches beyond the file");
    check(&[(0, 4), (3, 6)], 14, "its sparse map is out of order or reaches beyond the file");
    check(&[(0, 10)], 9, "its sparse map is out of order or reaches beyond the file");
    check(&[(u64::MAX, 10)], u64::MAX, "its sparse map is out of order or reaches beyond the file");
    check(&[(0, 9)], 20, "its sparse map does not match its data");
    check(&[], 20, "its sparse map does not match its data");
}

proptest! {
    #[test]
    fn any_headers_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..1600), kind in prop::sample::select(b"0125xLKS".to_vec()), size in 0u16..600) {
        if bytes.len() >= 512 {
            bytes[156] = kind;
            bytes[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
            bytes[257..265].copy_from_slice(b"ustar\x0000");
        }
        let _ = member(&bytes, None);
    }

    #[test]
    fn any_pax_records_never_panic(bytes in "[0-9]{0,3} ?(path|mtime|uid|SCHILY.xattr.user.a|GNU.sparse.major)?=?[0-9.=+-]{0,12}\n?") {
        let _ = parse_pax(bytes.as_bytes());
    }
}
