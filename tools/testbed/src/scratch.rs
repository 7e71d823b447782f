//! A temporary directory for daemons and mounts.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

use crate::containerd::end_shims_below;
use crate::mounts::unmount_below;

const PREFIX: &str = "slipway-";

/// A temporary directory (mode 0700) that unmounts what was mounted below it and removes itself when dropped.
///
/// A lock file beside it is held for its whole life, so the first `Scratch` of a later process can tell directories in use from
/// those a killed process left behind, and sweeps the latter. Lies in `$SLIPWAY_SCRATCH` or the system's temporary directory.
#[derive(Debug)]
pub struct Scratch {
    dir: PathBuf,
    lock_path: PathBuf,
    _lock: File,
}

impl Scratch {
    /// Makes a new directory; `label` is part of its name so that a person looking at it knows whose it is.
    pub fn new(label: &str) -> Result<Scratch> {
        static SWEEP: Once = Once::new();
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let base = std::env::var_os("SLIPWAY_SCRATCH").map_or_else(std::env::temp_dir, PathBuf::from);
        SWEEP.call_once(|| sweep(&base));
        loop {
            let name = format!("{PREFIX}{label}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let lock_path = base.join(format!("{name}.lock"));
            // An existing lock file is another run's with the same process id; a lost try_lock is a sweeper that was faster.
            let Ok(lock) = OpenOptions::new().write(true).create_new(true).open(&lock_path) else {
                fs::metadata(&base).with_context(|| format!("the temporary directory {} cannot be used", base.display()))?;
                fs::metadata(&lock_path).with_context(|| format!("{} cannot be made", lock_path.display()))?;
                continue;
            };
            if lock.try_lock().is_err() {
                continue;
            }
            let dir = base.join(name);
            fs::create_dir(&dir).with_context(|| format!("{} cannot be made", dir.display()))?;
            fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
            return Ok(Scratch { dir, lock_path, _lock: lock });
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// A path in the directory; nothing is made there.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.join(name)
    }

    /// Makes a directory in it (and its parents) and returns its path.
    pub fn make_dir(&self, name: impl AsRef<Path>) -> Result<PathBuf> {
        let dir = self.dir.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("{} cannot be made", dir.display()))?;
        Ok(dir)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        clear(&self.dir);
        let _ = fs::remove_file(&self.lock_path);
    }
}

/// Unmounts and removes one directory; says what stays, since a test's own result matters more than its rubbish.
fn clear(dir: &Path) {
    unmount_below(dir);
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => eprintln!("{} could not be removed: {error}", dir.display()),
        _ => {}
    }
}

/// Removes what processes that no longer live left in `base`. Daemons died with them; containers did not.
pub(crate) fn sweep(base: &Path) {
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(dir_name) = name.to_str().and_then(|name| name.strip_suffix(".lock")).filter(|name| name.starts_with(PREFIX)) else { continue };
        let Ok(lock) = OpenOptions::new().write(true).open(entry.path()) else { continue };
        if lock.try_lock().is_ok() {
            end_shims_below(&base.join(dir_name));
            clear(&base.join(dir_name));
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_of_a_dropped_scratch() {
        let scratch = Scratch::new("drop").expect("a scratch directory");
        let (dir, lock) = (scratch.path().to_path_buf(), scratch.lock_path.clone());
        fs::write(scratch.join("file"), b"x").expect("a file");
        scratch.make_dir("a/b/c").expect("directories");
        drop(scratch);
        assert!(!dir.exists() && !lock.exists());
    }

    #[test]
    fn the_sweep_takes_what_nobody_holds_and_nothing_else() {
        let base = Scratch::new("sweep").expect("a scratch directory");
        for name in ["slipway-dead-1-0", "slipway-live-1-0", "other-1-0"] {
            fs::create_dir(base.join(name)).expect("a directory");
            fs::write(base.join(format!("{name}.lock")), b"").expect("a lock file");
        }
        let live = File::open(base.join("slipway-live-1-0.lock")).expect("the lock file");
        live.try_lock().expect("nobody else holds it");
        sweep(base.path());
        let mut left: Vec<_> = fs::read_dir(base.path()).expect("the directory").flatten().map(|entry| entry.file_name()).collect();
        left.sort();
        assert_eq!(left, ["other-1-0", "other-1-0.lock", "slipway-live-1-0", "slipway-live-1-0.lock"]);
    }
}
