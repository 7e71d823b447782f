//! A file system of its own on a loop device, whose reads the kernel counts.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::daemon::run;
use crate::mounts;

/// The unit of `/sys/block/*/stat`, whatever the device's own sector size is (Documentation/block/stat.rst).
const SECTOR: u64 = 512;

/// An ext4 in a sparse file, mounted through a loop device. Unmounted when dropped; the file goes with its directory.
#[derive(Debug)]
pub struct LoopFs {
    at: PathBuf,
    device: String,
}

impl LoopFs {
    /// Makes `<at>.img` of `size` bytes with an empty ext4 in it and mounts it at `at` (made if missing).
    pub fn new(at: &Path, size: u64) -> Result<LoopFs> {
        fs::create_dir_all(at).with_context(|| format!("{} cannot be made", at.display()))?;
        let image = at.with_extension("img");
        File::create(&image).and_then(|file| file.set_len(size)).with_context(|| format!("{} cannot be made", image.display()))?;
        run("mkfs.ext4", ["-q", "-F", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", &image.to_string_lossy()])?;
        run("mount", ["-o", "loop", &image.to_string_lossy(), &at.to_string_lossy()])?;
        let mut made = LoopFs { at: at.to_path_buf(), device: String::new() };
        let mount = mounts::list().into_iter().rev().find(|mount| mount.mount_point == at).context("what was just mounted is not listed")?;
        made.device =
            mount.source.to_str().and_then(|source| source.strip_prefix("/dev/")).context("a loop mount's source is its device")?.to_owned();
        // An ext4 made here has no "lost" files worth showing in a tree that tests compare.
        fs::remove_dir(at.join("lost+found")).context("a new ext4 has an empty lost+found")?;
        Ok(made)
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.at
    }

    /// Bytes read from the device since it was attached, as the kernel's block layer counts them: what any process read that was
    /// not in the page cache, file system metadata included.
    pub fn bytes_read(&self) -> Result<u64> {
        let path = format!("/sys/block/{}/stat", self.device);
        let text = fs::read_to_string(&path).with_context(|| format!("{path} cannot be read"))?;
        sectors_read(&text).map(|sectors| sectors * SECTOR).with_context(|| format!("{path} has no third number"))
    }
}

impl Drop for LoopFs {
    fn drop(&mut self) {
        mounts::unmount_below(&self.at);
    }
}

/// `reads merged SECTORS ticks …`
fn sectors_read(stat: &str) -> Option<u64> {
    stat.split_whitespace().nth(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Scratch, drop_caches, need, require};

    #[test]
    fn the_third_number_counts_sectors() {
        assert_eq!(sectors_read("     100        0     4242      13  0 0 0 0 0 0 0\n"), Some(4242));
        assert_eq!(sectors_read("1 2"), None);
    }

    #[test]
    fn cold_reads_are_counted_and_warm_ones_are_not() {
        require!(need::root(), need::command("mkfs.ext4"), need::path("/dev/loop-control"));
        const SIZE: u64 = 8 << 20;
        let scratch = Scratch::new("loop").expect("a scratch directory");
        let disk = LoopFs::new(&scratch.join("disk"), 64 << 20).expect("a loop file system");
        let file = disk.path().join("data");
        fs::write(&file, vec![7; SIZE as usize]).expect("a file");
        drop_caches().expect("caches dropped");
        let before = disk.bytes_read().expect("a count");
        fs::read(&file).expect("a cold read");
        let cold = disk.bytes_read().expect("a count") - before;
        // Something else on the machine may drop caches between two reads, but hardly every time.
        let warm_read = |_| {
            let before = disk.bytes_read().expect("a count");
            fs::read(&file).expect("a warm read");
            disk.bytes_read().expect("a count") - before
        };
        let warm = (0..5).map(warm_read).min().expect("five reads");
        assert!((SIZE..SIZE * 2).contains(&cold), "{cold} bytes for a cold read of {SIZE}");
        assert!(warm < SIZE / 2, "{warm} bytes for a warm read");
        let at = disk.path().to_path_buf();
        drop(disk);
        assert!(!mounts::is_mounted(&at));
    }
}
