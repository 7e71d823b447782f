//! Layers converted and folded, compared with what GNU tar, Python and umoci make of the same archives on this machine's file system.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;

use crate::referee::{Compare, Listing, assert_same, folded, host, is_root, os, run};
use erofs::block::UnitBits;
use erofs::fold::fold;
use erofs::layer::LayerTree;
use erofs_convert::layer::{LayerOptions, MemorySink, convert_layer};

fn convert(layers: &[Vec<u8>], compare: Compare) -> Listing {
    let options = LayerOptions { unit_bits: UnitBits::MIN, threads: 2, ..LayerOptions::default() };
    let mut sink = MemorySink::default();
    let mut trees = Vec::new();
    for tar in layers {
        // A sink for each layer: the same pack may well come of two.
        let mut own = MemorySink::default();
        let tree = convert_layer(&tar[..], &mut own, &options).unwrap();
        assert_eq!(LayerTree::decode(&tree.encode()).as_ref(), Ok(&tree));
        sink.packs.extend(own.packs);
        trees.push(tree);
    }
    folded(&fold(&trees).unwrap(), &sink, compare)
}

/// A directory with one of everything that a tar can hold.
fn make_everything(root: &Path) {
    let dir = |path: &str, mode: u32| {
        fs::create_dir(root.join(path)).unwrap();
        fs::set_permissions(root.join(path), fs::Permissions::from_mode(mode)).unwrap();
    };
    let file = |path: &[u8], bytes: &[u8], mode: u32, owner: u32| {
        let path = root.join(os(path));
        fs::write(&path, bytes).unwrap();
        chown(&path, Some(owner), Some(owner + 1)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    };
    dir("bin", 0o755);
    dir("tmp", 0o1777);
    dir("empty", 0o700);
    file(b"bin/setuid", b"#!", 0o4755, 0);
    file(b"bin/big", &(0..200_000u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>(), 0o644, 70_000);
    file(b"bin/empty", b"", 0o600, 3);
    file(b"bin/tail", &[7; 65537], 0o2711, 2_000_000);
    file(b"bin/not utf-8 \xff\xfe", b"x", 0o644, 0);
    let long = format!("{}/{}", "d".repeat(200), "e".repeat(200));
    fs::create_dir_all(root.join(&long)).unwrap();
    file(format!("{long}/{}", "f".repeat(200)).as_bytes(), b"long", 0o644, 0);
    fs::hard_link(root.join("bin/big"), root.join("tmp/same")).unwrap();
    symlink("../bin/big", root.join("tmp/link")).unwrap();
    symlink("t".repeat(300), root.join("tmp/long-link")).unwrap();
    symlink("nowhere", root.join("empty-link")).unwrap();
    fs::hard_link(root.join("empty-link"), root.join("empty-link-too")).unwrap();
    run("mknod", &["null", "c", "1", "3"], root);
    run("mknod", &["disk", "b", "259", "70000"], root);
    run("mkfifo", &["pipe"], root);
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    for (at, bytes) in [(70_000, &b"one"[..]), (300_000, &[9; 5000][..]), (1_000_000, b"three")] {
        std::os::unix::fs::FileExt::write_all_at(&sparse, bytes, at).unwrap();
    }
    sparse.set_len(3_000_000).unwrap();
    for (path, time) in
        [("bin/big", "@1.5"), ("bin/tail", "2001-02-03T04:05:06.123456789Z"), ("empty", "@1700000000.000000001"), ("bin", "@1234567890")]
    {
        run("touch", &["-h", "-d", time, path], root);
    }
}

#[test]
fn what_gnu_tar_packs_comes_out_as_gnu_tar_unpacks_it() {
    if !is_root("what_gnu_tar_packs_comes_out_as_gnu_tar_unpacks_it") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    make_everything(&root);
    for (name, value) in
        [("user.note", "text"), ("user.bytes", "0x000102ff0a"), ("security.capability", "0x0100000200200000000000000000000000000000")]
    {
        run("setfattr", &["-n", name, "-v", value, "bin/setuid"], &root);
    }
    run("setfattr", &["-n", "user.dir", "-v", "x", "empty"], &root);
    let xattrs = ["--xattrs", "--xattrs-include=*"];
    for (number, format) in [
        &["--format=pax", xattrs[0], xattrs[1]][..],
        &["--format=pax", "--sparse", "--sparse-version=1.0", xattrs[0], xattrs[1]],
        &["--format=pax", "--sparse", "--sparse-version=0.1"],
        &["--format=pax", "--sparse", "--sparse-version=0.0"],
        &["--format=gnu"],
        &["--format=gnu", "--sparse"],
        // The oldest formats cannot hold the long names and large owners.
        &["--format=ustar", "--exclude=ddd*", "--exclude=bin/tail", "--exclude=long-link"],
        &["--format=v7", "--exclude=ddd*", "--exclude=bin/tail", "--exclude=long-link", "--exclude=null", "--exclude=disk", "--exclude=pipe"],
    ]
    .iter()
    .enumerate()
    {
        let arguments = [&["-c", "--numeric-owner", "--sort=name"], *format, &["."]].concat();
        let tar = run("tar", &arguments, &root);
        let out = dir.path().join(number.to_string());
        fs::create_dir(&out).unwrap();
        fs::write(dir.path().join("tar"), &tar).unwrap();
        run("tar", &["-x", "-p", "--same-owner", "--numeric-owner", xattrs[0], xattrs[1], "-f", "../tar"], &out);
        assert_same(&host(&out, Compare::All), &convert(&[tar], Compare::All), &format!("{format:?}"));
    }
}

#[test]
fn what_python_packs_comes_out_as_python_says() {
    if !is_root("what_python_packs_comes_out_as_python_says") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let script = r#"
import io, os, sys, tarfile
def add(tar, name, kind=tarfile.REGTYPE, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mtime, info.mode = kind, len(data), 1.25, 0o640
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))
formats = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}
with tarfile.open(sys.argv[2], "w", format=formats[sys.argv[1]], encoding="utf-8", errors="surrogateescape") as tar:
    add(tar, "./d", tarfile.DIRTYPE, mode=0o750, uid=5)
    add(tar, "d/file", data=b"x" * 70000, uid=1 << 20, gid=7)
    add(tar, "/abs/\udcff", data=b"absolute")
    add(tar, "d/hard", tarfile.LNKTYPE, linkname="./d/file", mode=0o640, uid=1 << 20, gid=7)
    add(tar, "d/soft", tarfile.SYMTYPE, linkname="file")
    add(tar, "null", tarfile.CHRTYPE, devmajor=1, devminor=3)
    add(tar, "disk", tarfile.BLKTYPE, devmajor=8, devminor=17)
    add(tar, "pipe", tarfile.FIFOTYPE)
    add(tar, "d/twice", data=b"first")
    add(tar, "d/twice", data=b"second", mode=0o600)
    if sys.argv[1] != "ustar":
        add(tar, "n" * 120 + "/" + "m" * 120, data=b"long")
"#;
    for format in ["pax", "gnu", "ustar"] {
        run("python3", &["-c", script, format, "tar"], dir.path());
        let out = dir.path().join(format);
        fs::create_dir(&out).unwrap();
        run("tar", &["-x", "-p", "--same-owner", "--numeric-owner", "-f", "../tar"], &out);
        let tar = fs::read(dir.path().join("tar")).unwrap();
        let compare = Compare::AllButDirTimes;
        assert_same(&host(&out, compare), &convert(&[tar], compare), format);
    }
}
