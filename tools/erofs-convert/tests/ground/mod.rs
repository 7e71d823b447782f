//! What the converter's tests stand on: images in a layout, a store, a state directory, and runs of the real program.
#![allow(dead_code, reason = "every test file uses a part of it")]

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use testbed::{Compression, Entry, EntryKind, Image, Layer, Layout, Scratch};
pub use testbed::{files_below, noise};

/// A scratch directory with an OCI layout `img`, an empty directory to become a store, and a place for a state directory.
pub struct Ground {
    pub scratch: Scratch,
    pub layout: Layout,
}

/// A finished run.
pub struct Run {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Run {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {:?}\n{}", self.out, self.err))
    }

    /// Fails unless the run ended with `code` and its message has all `parts`.
    pub fn assert_failed(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, code, "{}", self.err);
        for part in parts {
            assert!(self.err.contains(part), "{part:?} is not in the message: {}", self.err);
        }
        assert_eq!(self.out, "", "a failure has no result");
    }
}

impl From<Output> for Run {
    fn from(output: Output) -> Run {
        let text = |bytes| String::from_utf8(bytes).expect("the program writes text");
        Run { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
    }
}

impl Ground {
    pub fn new(label: &str) -> Ground {
        let scratch = Scratch::new(label).expect("a scratch directory");
        let layout = Layout::create(&scratch.join("img")).expect("a layout");
        scratch.make_dir("store").expect("a directory");
        Ground { scratch, layout }
    }

    pub fn store(&self) -> PathBuf {
        self.scratch.join("store")
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_erofs-convert"));
        command.args(args).arg("--store").arg(self.store()).stdin(Stdio::null());
        if ["convert", "export"].contains(&args[0]) {
            command.arg("--state").arg(self.scratch.join("state"));
        }
        command.current_dir(self.scratch.path()).env_remove("SLIPWAY_LOG");
        // The logins of whoever runs the tests are none of their business.
        command.env("HOME", self.scratch.path()).env("XDG_RUNTIME_DIR", self.scratch.path());
        for name in ["DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_CONFIG_HOME"] {
            command.env_remove(name);
        }
        command
    }

    pub fn run(&self, args: &[&str]) -> Run {
        self.command(args).output().expect("the program starts").into()
    }

    /// A conversion that must succeed: its JSON.
    pub fn convert(&self, source: &str) -> Value {
        let run = self.run(&["convert", source, "--json"]);
        assert_eq!(run.code, 0, "{}", run.err);
        run.json()
    }

    /// What `ls --json` prints.
    pub fn list_json(&self) -> Value {
        let run = self.run(&["ls", "--json"]);
        assert_eq!(run.code, 0, "{}", run.err);
        run.json()
    }

    /// The images `ls` shows.
    pub fn listed(&self) -> Vec<String> {
        let images = self.list_json()["images"].as_array().expect("a list").clone();
        images.iter().map(|image| image["source"].as_str().expect("a name").to_owned()).collect()
    }

    /// Nothing was made anywhere.
    pub fn assert_nothing_made(&self) {
        assert_eq!(fs::read_dir(self.store()).expect("the directory stays").count(), 0);
        assert!(!self.scratch.join("state").exists());
    }

    /// Nothing can be seen of any image, and no temporary file was left.
    pub fn assert_nothing_visible(&self) {
        assert_eq!(self.listed(), [""; 0]);
        for dir in ["chains", "images", "meta", "tmp"] {
            assert_eq!(files_below(&self.store().join(dir)), BTreeSet::new(), "{dir}");
        }
    }
}

/// An image of [`everything_layers`].
pub fn everything() -> Image {
    let [bottom, middle, top] = everything_layers();
    Image::new().layer(&bottom, Compression::Gzip).layer(&middle, Compression::Zstd).layer(&top, Compression::Plain)
}

/// Three layers with some of everything: all kinds of file, sizes around the chunk size, links, whiteouts, an opaque directory.
pub fn everything_layers() -> [Layer; 3] {
    let chunk = 256 << 10;
    let acl = [2u32.to_le_bytes().to_vec(), [(1u16, 6u16), (2, 4), (4, 4), (16, 6), (32, 4)].iter().flat_map(acl_entry).collect()].concat();
    let capability = &[1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let bottom = Layer::new([
        Entry::dir("bin").mode(0o711).mtime(1_000_000_000, 123_456_789),
        Entry::file("bin/tool", noise(1, 3 * chunk + 5)).mode(0o4755).xattr("security.capability", capability),
        // Without it containerd would take it from the file, GNU tar would not.
        Entry::hard_link("bin/same", "bin/tool").mode(0o4755).xattr("security.capability", capability),
        Entry::symlink("bin/link", "../bin/tool"),
        Entry::file("bin/exact", noise(2, chunk)),
        Entry::file("bin/copy", noise(2, chunk)),
        Entry::file("bin/zeros", vec![0; 2 * chunk + 1]),
        Entry::file("bin/empty", ""),
        Entry::dir("etc"),
        Entry::file("etc/acl", "a").mode(0o664).xattr("system.posix_acl_access", &acl).xattr("user.note", b"hi"),
        Entry::file("etc/owned", "o").owner(1000, 3_000_000_000),
        Entry::file("etc/gone", "g"),
        Entry::dir("opaque"),
        Entry::file("opaque/hidden", "h"),
        Entry::dir("dev"),
        Entry::new("dev/null", EntryKind::CharDevice(1, 3)).mode(0o666),
        Entry::new("dev/sda", EntryKind::BlockDevice(8, 300)),
        Entry::new("dev/pipe", EntryKind::Fifo),
    ]);
    let many = (0..700).map(|i| Entry::file(&format!("many/file-{i:04}"), noise(i + 10, (i * 37 % 9000) as usize)));
    let middle = Layer::new([Entry::dir("many")].into_iter().chain(many));
    let top = Layer::new([
        Entry::whiteout("etc/gone"),
        Entry::dir("opaque").mode(0o700),
        Entry::opaque("opaque"),
        Entry::file("opaque/shown", "s"),
        Entry::file("many/file-0001", "replaced"),
        Entry::hard_link("etc/linked", "many/file-0001"),
        Entry::file(&format!("{}/long", "deep/".repeat(40).trim_end_matches('/')), "l"),
    ]);
    [bottom, middle, top]
}

fn acl_entry(&(tag, perm): &(u16, u16)) -> Vec<u8> {
    // Named user and group have an id, here 7; the others all ones.
    let id: u32 = if matches!(tag, 2 | 8) { 7 } else { u32::MAX };
    [&tag.to_le_bytes()[..], &perm.to_le_bytes(), &id.to_le_bytes()].concat()
}
