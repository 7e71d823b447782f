//! The converter's own memory of finished layers, so that a conversion that was interrupted does not start over.
//!
//! After a kill only trees named here are trusted without a signed record (the journal lies in this machine's state directory, the
//! store may be written by others), and even those are used only if the store still has them whole.
//!
//! One line per finished layer: CRC-32 of the rest as eight hex digits, a space, JSON. A line torn by a crash fails its checksum and
//! is skipped; since every entry begins with a newline, the next one is not glued to it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use slipway::oci::DiffId;
use slipway::store::LayerFiles;

/// A finished layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The store it is in, by its id.
    pub store: String,
    /// The layer.
    pub diff_id: DiffId,
    /// Its tree and its framing.
    pub files: LayerFiles,
}

#[derive(serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Line {
    store: String,
    diff_id: DiffId,
    tree: String,
    framing: String,
}

impl Entry {
    fn encode(&self) -> String {
        let LayerFiles { tree, framing } = self.files;
        let line = Line { store: self.store.clone(), diff_id: self.diff_id, tree: tree.to_string(), framing: framing.to_string() };
        let json = serde_json::to_string(&line).expect("strings are always JSON");
        format!("\n{:08x} {json}\n", crc32fast::hash(json.as_bytes()))
    }

    fn decode(line: &str) -> Option<Entry> {
        let (crc, json) = line.split_once(' ')?;
        if crc.len() != 8 || u32::from_str_radix(crc, 16).ok()? != crc32fast::hash(json.as_bytes()) {
            return None;
        }
        // A line of a program that made no framings lacks one, and is skipped as well.
        let Line { store, diff_id, tree, framing } = serde_json::from_str(json).ok()?;
        Some(Entry { store, diff_id, files: LayerFiles { tree: tree.parse().ok()?, framing: framing.parse().ok()? } })
    }
}

/// What the journal says: the latest files of `diff_id` in `store`.
pub fn find(text: &str, store: &str, diff_id: DiffId) -> Option<LayerFiles> {
    let mut latest_first = text.lines().rev().filter_map(Entry::decode);
    latest_first.find(|e| e.store == store && e.diff_id == diff_id).map(|e| e.files)
}

/// The journal file of a state directory.
pub struct Journal {
    path: PathBuf,
    /// As it was when the conversion began.
    text: String,
    file: File,
}

impl Journal {
    /// Opens or makes `<state>/journal`.
    pub fn open(state: &Path) -> Result<Journal, (PathBuf, io::Error)> {
        let path = state.join("journal");
        let open = || {
            let file = OpenOptions::new().create(true).append(true).open(&path)?;
            // Bytes that are no UTF-8 are damage and fail their line's checksum.
            Ok((String::from_utf8_lossy(&fs::read(&path)?).into_owned(), file))
        };
        match open() {
            Ok((text, file)) => Ok(Journal { path, text, file }),
            Err(error) => Err((path, error)),
        }
    }

    /// The files of a layer in a store, if a run before this one finished it.
    pub fn find(&self, store: &str, diff_id: DiffId) -> Option<LayerFiles> {
        find(&self.text, store, diff_id)
    }

    /// Remembers a layer whose tree, framing and packs are in the store, durably.
    pub fn add(&self, entry: &Entry) -> Result<(), (PathBuf, io::Error)> {
        // One write of a short line to a file opened for appending: several converters do not mix their lines.
        let write = || (&self.file).write_all(entry.encode().as_bytes()).and_then(|()| self.file.sync_data());
        write().map_err(|error| (self.path.clone(), error))
    }
}

#[cfg(test)]
mod tests {
    use erofs::digest::Digest;
    use proptest::prelude::*;
    use slipway::oci::Sha256;

    use super::*;

    fn entry(store: &str, diff_id: &[u8], tree: &[u8]) -> Entry {
        Entry { store: store.to_owned(), diff_id: DiffId(Sha256::of(diff_id)), files: files(tree) }
    }

    fn files(tree: &[u8]) -> LayerFiles {
        LayerFiles { tree: Digest::of(tree), framing: Digest::of(&[b"framing of", tree].concat()) }
    }

    #[test]
    fn the_latest_entry_of_store_and_layer_counts() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        for e in [entry("s", b"1", b"a"), entry("s", b"2", b"b"), entry("t", b"1", b"c"), entry("s", b"1", b"d")] {
            journal.add(&e).unwrap();
        }
        let journal = Journal::open(dir.path()).unwrap();
        for (store, diff_id, tree) in
            [("s", &b"1"[..], Some(&b"d"[..])), ("s", b"2", Some(b"b")), ("t", b"1", Some(b"c")), ("t", b"2", None), ("u", b"1", None)]
        {
            assert_eq!(journal.find(store, DiffId(Sha256::of(diff_id))), tree.map(files));
        }
    }

    #[test]
    fn torn_and_altered_lines_are_skipped_and_harm_no_other() {
        let (first, second) = (entry("s", b"1", b"a").encode(), entry("s", b"2", b"b").encode());
        let sees = |text: &str| [&b"1"[..], b"2"].map(|id| find(text, "s", DiffId(Sha256::of(id))).is_some());
        assert_eq!(sees(&format!("{first}{second}")), [true, true]);
        for cut in 0..first.len() - 1 {
            assert_eq!(sees(&format!("{}{second}", &first[..cut])), [false, true], "{cut}");
        }
        let json = &first[10..first.len() - 1];
        let old = json.replace(&json[json.find(",\"framing").unwrap()..json.len() - 1], "");
        assert_eq!(sees(&format!("\n{:08x} {old}\n", crc32fast::hash(old.as_bytes()))), [false, false], "{old}");
        assert_eq!(sees(&first.replacen("\"s\"", "\"S\"", 1)), [false, false]);
    }

    proptest! {
        #[test]
        fn any_line_decodes_or_not_without_panic(line in "\\PC{0,80}") {
            let _ = Entry::decode(&line);
        }
    }
}
