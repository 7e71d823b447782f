//! What layers have that unpackers get wrong, counted: a comparison that never met a thing says nothing about it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;

/// How often each feature occurred.
pub struct Features {
    what: &'static str,
    seen: BTreeMap<&'static str, usize>,
}

impl Features {
    /// None of these was seen yet.
    pub fn new(what: &'static str, listed: &[&[&'static str]]) -> Features {
        Features { what, seen: listed.iter().copied().flatten().map(|name| (*name, 0)).collect() }
    }

    /// One more, if it is listed: a referee that does not agree on something does not list it, and the generator leaves it out.
    pub fn saw(&mut self, feature: &'static str) {
        self.add(feature, 1);
    }

    pub fn add(&mut self, feature: &'static str, count: usize) {
        *self.seen.get_mut(feature).unwrap_or_else(|| panic!("{feature} is in no list")) += count;
    }

    /// Shows the table, also of a test that passes, and fails when one has no occurrence.
    pub fn report(&self) {
        let mut table = format!("{}:\n", self.what);
        for (feature, count) in &self.seen {
            writeln!(table, "{count:8}  {feature}").expect("a string takes it");
        }
        // Past the test harness, which keeps what print! and eprint! write of a test that passes.
        _ = std::io::stderr().write_all(table.as_bytes());
        let missing: Vec<_> = self.seen.iter().filter(|(_, count)| **count == 0).map(|(feature, _)| feature).collect();
        assert!(missing.is_empty(), "no image had: {missing:?}");
    }
}

/// What random layers have for every referee.
pub const EVERYWHERE: &[&str] = &[
    "PAX huge owner",
    "GNU huge owner",
    "PAX long name",
    "GNU long name",
    "PAX nanoseconds",
    "PAX sparse file 0.0",
    "PAX sparse file 0.1",
    "PAX sparse file 1.0",
    "block device",
    "character device",
    "fifo",
    "directory",
    "directory below replaced",
    "directory replaced in its layer",
    "duplicate",
    "file",
    "file below replaced by directory",
    "file replaced by directory in its layer",
    "hard link",
    "hard link across directories",
    "implied parent",
    "name of a hard-linked file whited out",
    "name that is not UTF-8",
    "opaque directory",
    "opaque in the tree",
    "setuid, setgid or sticky",
    "symbolic link",
    "symbolic link in a parent",
    "trailing data",
    "user extended attribute",
    "whiteout",
    "whiteout of nothing",
    "whiteout, then entry",
];

/// What only umoci agrees on. The specification has whiteouts apply to layers below, whichever comes first: containerd on overlayfs fails. It also
/// refuses links to files of layers below.
pub const UMOCI_ONLY: &[&str] = &["entry, then whiteout", "hard link to a layer below"];

/// What umoci does otherwise than containerd, or not at all.
pub const CONTAINERD_ONLY: &[&str] = &[
    "ACL",
    "PAX negative time",
    "PAX far time",
    "PAX time no file system has",
    "capability",
    "link with attributes of its own",
    "trusted.overlay.* (stripped)",
    "100 000 files in one directory",
    "128 layers",
    "GNU's old sparse file (refused by containerd)",
    "extended attribute of 64 KiB",
    "path as deep as PATH_MAX allows",
    "path 4 000 deep (refused by containerd)",
    "socket (refused by both)",
    "symbolic link of a layer below in a parent",
];
