//! Images that hold one of everything a layer can hold.

use testbed::{Compression, Entry, EntryKind, Image, Layer, noise};

/// Text that compresses well.
fn prose(length: usize) -> Vec<u8> {
    (0..).flat_map(|line: u32| format!("line {line}: the quick brown fox jumps over the lazy dog\n").into_bytes()).take(length).collect()
}

/// busybox and the names the tests call it by.
pub fn base() -> Layer {
    let busybox = std::fs::read("/bin/busybox").expect("busybox-static is installed");
    let mut entries = vec![
        Entry::dir("bin").mtime(1_600_000_001, 0),
        Entry::file("bin/busybox", busybox).mode(0o755),
        // Unpacking a hard link sets mode and owner of the file it names.
        Entry::hard_link("bin/hard", "bin/busybox").mode(0o755),
        Entry::dir("etc").mtime(1_600_000_002, 500),
        Entry::file("etc/motd", b"from the base\n".to_vec()),
        Entry::file("etc/removed", b"gone above\n".to_vec()),
        Entry::dir("opaque"),
        Entry::file("opaque/below", b"hidden above\n".to_vec()),
        Entry::dir("dropped"),
        Entry::dir("dropped/deep"),
        Entry::file("dropped/deep/file", b"gone with its directory\n".to_vec()),
        Entry::dir("tmp").mode(0o1777),
    ];
    entries.extend(["proc", "dev", "sys", "run"].map(Entry::dir));
    entries.extend(["sh", "cat", "md5sum", "ls", "sleep", "dd", "wc"].map(|name| Entry::symlink(&format!("bin/{name}"), "busybox")));
    Layer::new(entries)
}

/// Files of every size class, links, devices, attributes, odd names.
pub fn everything() -> Layer {
    let mut entries = vec![
        Entry::dir("data").owner(1000, 100).mtime(1_650_000_000, 987_654_321),
        Entry::file("data/huge", [noise(1, 3 << 20), prose(2 << 20), vec![0; 1 << 20], noise(2, 12_345)].concat()).mtime(1_234_567_890, 123_456_789),
        Entry::file("data/zeros", vec![0; 700_000]),
        Entry::file("data/prose", prose(300_000)).owner(65_534, 65_534),
        Entry::hard_link("data/prose-too", "data/prose"),
        Entry::symlink("data/soft", "../etc/motd").mtime(1_600_000_003, 7),
        Entry::symlink("data/long-soft", &"../nowhere/".repeat(90)),
        Entry::file("data/setuid", b"#!/bin/sh\n".to_vec()).mode(0o6755),
        Entry::file("data/attributes", b"x".to_vec()).xattr("user.comment", b"a comment").xattr("trusted.long", &noise(3, 900)).xattr(
            "security.capability",
            // cap_net_raw=ep, revision 2
            &[1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ),
        Entry::new("data/null", EntryKind::CharDevice(1, 3)).mode(0o666),
        Entry::new("data/disk", EntryKind::BlockDevice(8, 1)).mode(0o660).owner(0, 6),
        Entry::new("data/fifo", EntryKind::Fifo).mode(0o600),
        Entry::file("data/ spaces & ümläute \u{1f600}", b"odd name".to_vec()),
        Entry::file(&format!("data/{}", "n".repeat(255)), b"longest name".to_vec()).mtime(0, 1),
        Entry::dir("data/many"),
        Entry::dir("data/empty").mode(0o700),
    ];
    for size in [0, 1, 15, 4095, 4096, 4097, 65_535, 65_536, 65_537, 262_144] {
        entries.push(Entry::file(&format!("data/size-{size}"), noise(size as u64 + 10, size)));
    }
    for number in 0..400 {
        entries.push(Entry::file(&format!("data/many/{number:04}"), noise(number + 1000, (number as usize * 37) % 9000)));
    }
    Layer::new(entries)
}

/// Overrides and whiteouts of all kinds over [`base`] and [`everything`].
pub fn changes() -> Layer {
    Layer::new([
        Entry::dir("etc").mtime(1_660_000_000, 0),
        Entry::file("etc/motd", b"from the top\n".to_vec()).mtime(1_660_000_001, 1),
        Entry::whiteout("etc/removed"),
        Entry::dir("opaque").mode(0o711),
        Entry::opaque("opaque"),
        Entry::file("opaque/above", b"seen\n".to_vec()),
        Entry::whiteout("dropped"),
        Entry::dir("data").owner(1000, 100).mode(0o750).mtime(1_660_000_002, 2),
        Entry::whiteout("data/size-1"),
        Entry::file("data/zeros", b"a file replaced".to_vec()),
        Entry::dir("data/prose-dir"),
        Entry::file("data/prose-dir/new", noise(77, 100_000)),
        Entry::hard_link("data/new-too", "data/prose-dir/new"),
    ])
}

/// A last layer with something to download.
pub fn extra() -> Layer {
    Layer::new([
        Entry::dir("extra").mtime(1_670_000_000, 0),
        Entry::file("extra/file", noise(5, 500_000)),
        Entry::file("extra/small", b"tiny".to_vec()),
    ])
}

/// The first three layers, each compressed in another way.
pub fn full() -> Image {
    Image::new().layer(&base(), Compression::Gzip).layer(&everything(), Compression::Zstd).layer(&changes(), Compression::Plain)
}
