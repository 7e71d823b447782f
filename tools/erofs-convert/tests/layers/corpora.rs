//! The archives that other readers of tar are tested with: each is read as libarchive reads it and comes back byte for byte, or is refused by
//! name.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use erofs::block::UnitBits;
use erofs::fold::fold;
use erofs_convert::layer::{Budget, LayerOptions, MemorySink, convert_layer_framed};
use testbed::{need, require};

use crate::referee::{Compare, Listing, folded, host};

/// What is refused, and in which words.
const REFUSED: &[(&str, &str)] = &[
    // As Go refuses them.
    ("go-issue10968.tar", "invalid octal field"),
    ("go-issue11169.tar", "breaks off in its headers"),
    ("go-issue12435.tar", "checksum mismatch"),
    ("go-neg-size.tar", "a number in its header is out of range"),
    ("go-pax-bad-hdr-file.tar", "malformed PAX extension record"),
    ("go-pax-bad-mtime-file.tar", "not decimal"),
    ("go-pax-nul-path.tar", "NUL byte"),
    ("go-pax-nul-xattrs.tar", "a PAX record is malformed"),
    ("go-pax-path-hdr.tar", "breaks off in its headers"),
    ("python-recursion.tar", "breaks off in its headers"),
    // Go gives the type, and containerd refuses it: directories of GNU tar's incremental backups.
    ("go-gnu-incremental.tar", "tar entry type 'D' cannot be converted"),
    // Readers differ in which of two long names or PAX headers counts, and no program writes two.
    ("go-gnu-multi-hdrs.tar", "duplicate GNU long name entry"),
    ("go-pax-multi-hdrs.tar", "duplicate PAX extended header"),
    // Files of 16 and 60 GB.
    ("go-gnu-sparse-big.tar", "more than 67108864 bytes of file data"),
    ("go-pax-sparse-big.tar", "more than 67108864 bytes of file data"),
    ("go-writer-big-long.tar", "more than 67108864 bytes of file data"),
    ("go-writer-big.tar", "more than 67108864 bytes of file data"),
];

/// What stands in the way of comparing the rest of Python's archive is made as it is today: two checksums over signed bytes, which tars of the 1980s
/// wrote, and an extension header of Solaris' own type `X`. Both are refused, the type also by containerd.
fn without_oddities(mut tar: Vec<u8>) -> Vec<u8> {
    for header in tar.chunks_exact_mut(512) {
        let solaris = header[257..262] == *b"ustar" && header[156] == b'X';
        if solaris {
            header[156] = b'x';
        }
        if solaris || header[..100].windows(13).any(|name| name == b"signed-chksum") {
            let sum: u32 = header.iter().enumerate().map(|(i, b)| if (148..156).contains(&i) { 32 } else { u32::from(*b) }).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
    tar
}

/// What libarchive reads otherwise, and why the converter is right.
const OTHERWISE: &[(&str, &str)] = &[
    ("go-invalid-go17.tar", "as Go, which once wrote a prefix into GNU's header and reads it back"),
    ("go-nil-uid.tar", "its size is 14 to Go, Python and GNU tar, 2176 to libarchive"),
];

/// Enough for every archive but those with files of many gigabytes.
const BUDGET: Budget = Budget { entries: 1000, bytes: 64 << 20, metadata: 8 << 20, stream: 64 << 20, time: std::time::Duration::from_secs(60) };

/// Kind, size and content of everything: owners and times are compared elsewhere, with programs that agree on them.
fn contents(listing: Listing) -> BTreeMap<String, String> {
    let of = |line: String| {
        let words: Vec<&str> = line.split(' ').collect();
        format!("{} {}", words[0], words[4..words.len().min(6)].join(" "))
    };
    listing.into_iter().map(|(path, line)| (path, of(line))).collect()
}

fn unpacked(archive: &Path) -> (BTreeMap<String, String>, String) {
    let dir = tempfile::tempdir().unwrap();
    let out =
        Command::new("bsdtar").args(["-x", "--no-xattrs", "--no-acls", "--no-fflags", "-f"]).arg(archive).current_dir(dir.path()).output().unwrap();
    (contents(host(dir.path(), Compare::All)), String::from_utf8_lossy(&out.stderr).into_owned())
}

#[test]
fn archives_of_other_readers_tests_come_out_as_libarchive_unpacks_them_or_are_refused() {
    require!(need::root(), need::command("bsdtar"), need::command("apt-get"));
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../ci/tar-corpora.sh");
    let out = Command::new(script).output().unwrap();
    if !out.status.success() {
        return need::skip(&need::Lack(format!("{script}: {}", String::from_utf8_lossy(&out.stderr))));
    }
    let dir = String::from_utf8(out.stdout).unwrap();
    let mut archives: Vec<_> = fs::read_dir(dir.trim_end()).unwrap().map(|entry| entry.unwrap().path()).collect();
    archives.sort();
    assert!(archives.len() > 40, "{archives:?}");
    let mut wrong = String::new();
    for archive in &archives {
        let name = archive.file_name().unwrap().to_str().unwrap();
        let refusal = REFUSED.iter().find(|(refused, _)| *refused == name).map(|(_, words)| *words);
        let otherwise = OTHERWISE.iter().any(|(known, _)| *known == name);
        let mut sink = MemorySink::default();
        let options = LayerOptions { unit_bits: UnitBits::MIN, threads: 1, budget: BUDGET, ..LayerOptions::default() };
        let tar = without_oddities(fs::read(archive).unwrap());
        match (convert_layer_framed(&tar[..], &mut sink, Vec::new(), &options), refusal) {
            (Err(error), Some(words)) if error.to_string().contains(words) => (),
            (Err(error), _) => wrong += &format!("{name}: {error}\n"),
            (Ok(_), Some(words)) => wrong += &format!("{name} is no longer refused: {words}\n"),
            (Ok(layer), None) => {
                if sink.tar(&layer.framing.finish(&layer.places).unwrap()) != tar {
                    wrong += &format!("{name}: the archive does not come back\n");
                }
                let found = contents(folded(&fold(&[layer.tree]).unwrap(), &sink, Compare::All));
                let (expected, said) = unpacked(archive);
                if (found != expected) != otherwise {
                    wrong += &format!("{name}: libarchive {expected:#?} {said}, the converter {found:#?}\n");
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}
