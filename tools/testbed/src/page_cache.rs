//! The kernel's page cache: emptying it, and what of a tree is in it.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::daemon::run;

/// Paths per call of fincore: far below what a command line may hold.
const FILES_PER_CALL: usize = 200;

/// Writes back what is dirty and empties page, dentry and inode caches, so that the next reads are cold. Needs root.
pub fn drop_caches() -> Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3\n").context("/proc/sys/vm/drop_caches cannot be written")
}

/// Bytes of the regular files below `dir` that are in the page cache, as fincore of util-linux sees them; a file with several names counts
/// once. Give the file system itself, not an overlay of it: what an overlay's file shows depends on how fincore asks.
pub fn resident_bytes(dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    for files in regular_files(dir)?.chunks(FILES_PER_CALL) {
        let args = ["--bytes", "--noheadings", "--raw", "--output", "RES"].map(|arg| arg.as_ref());
        let printed = run("fincore", args.into_iter().chain(files.iter().map(|file| file.as_os_str())))?;
        for number in printed.split_whitespace() {
            bytes += number.parse::<u64>().with_context(|| format!("fincore printed {number:?}, which is no number"))?;
        }
    }
    Ok(bytes)
}

/// All regular files that have content.
fn regular_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let (mut found, mut seen) = (Vec::new(), HashSet::new());
    let mut pending = vec![dir.to_owned()];
    while let Some(at) = pending.pop() {
        for entry in fs::read_dir(&at).with_context(|| format!("{} cannot be listed", at.display()))? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            if metadata.is_dir() {
                pending.push(entry.path());
            } else if metadata.is_file() && metadata.len() > 0 && seen.insert((metadata.dev(), metadata.ino())) {
                found.push(entry.path());
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Scratch, need, require};

    #[test]
    fn pages_in_memory_count_once_however_many_names_their_file_has() {
        require!(need::command("fincore"));
        const SIZE: usize = 8 << 20;
        let scratch = Scratch::new("pages").expect("a scratch directory");
        let (file, dir) = (scratch.join("dir/data"), scratch.make_dir("dir").expect("a directory"));
        fs::File::create(&file).and_then(|file| file.set_len(SIZE as u64)).expect("a file");
        fs::hard_link(&file, dir.join("same")).expect("a second name");
        fs::write(dir.join("empty"), b"").expect("a file");
        std::os::unix::fs::symlink(&file, dir.join("link")).expect("a link");
        assert_eq!(resident_bytes(&dir).expect("a count"), 0, "a hole nobody read");
        // Another test may drop caches before the look, but hardly every time.
        let write = |_| {
            fs::write(&file, vec![7; SIZE]).expect("written");
            resident_bytes(&dir).expect("a count")
        };
        assert_eq!((0..5).map(write).max(), Some(SIZE as u64));
    }
}
