//! What a directory takes on disk, counted as containerd counts it (`continuity/fs`, `DiskUsage`).

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::ledger::Usage;

/// Unit of `st_blocks`, whatever the file system's block size (stat(2)).
const STAT_BLOCK: u64 = 512;

/// Allocated bytes and inodes of everything from `root` down, itself included; a file with several names counts once.
/// What disappears while it is being counted is not counted. Blocks: not for async threads.
pub fn of_directory(root: &Path) -> io::Result<Usage> {
    let mut usage = Usage::default();
    let mut seen = HashSet::new();
    let mut directories = Vec::new();
    let mut count = |found: &fs::Metadata| {
        if seen.insert((found.dev(), found.ino())) {
            usage.size += (found.blocks() * STAT_BLOCK).cast_signed();
            usage.inodes += 1;
        }
    };
    let Some(found) = unless_gone(fs::symlink_metadata(root))? else { return Ok(usage) };
    count(&found);
    directories.push(root.to_owned());
    while let Some(directory) = directories.pop() {
        let Some(entries) = unless_gone(fs::read_dir(&directory))? else { continue };
        for entry in entries {
            let entry = entry?;
            let Some(found) = unless_gone(entry.metadata())? else { continue };
            count(&found);
            if found.is_dir() {
                directories.push(entry.path());
            }
        }
    }
    Ok(usage)
}

fn unless_gone<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    match found {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        found => found.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn hard_links_count_once_and_symlinks_are_not_followed() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("d")).expect("mkdir");
        fs::write(at("d/big"), vec![1; 1 << 20]).expect("write");
        fs::hard_link(at("d/big"), at("again")).expect("link");
        symlink("/", at("root")).expect("symlink");
        let usage = of_directory(dir.path()).expect("counted");
        assert_eq!(usage.inodes, 4, "the root, d, one file, one symlink");
        let du = std::process::Command::new("du").args(["-s", "-B512"]).arg(dir.path()).output().expect("du runs");
        let du = String::from_utf8_lossy(&du.stdout);
        let blocks: i64 = du.split_whitespace().next().expect("a number").parse().expect("a number");
        assert_eq!(usage.size, blocks * 512);
    }

    #[test]
    fn what_is_gone_takes_nothing() {
        assert_eq!(of_directory(Path::new("/nonexistent/fs")).expect("counted"), Usage::default());
    }
}
