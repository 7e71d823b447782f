//! Temporary files of conversions that were killed.
//!
//! Packs grow as temporary files in the store, which many machines share: nobody can tell from there whether another machine's file
//! is still being written. So every run keeps a list of its own temporary files in the local state directory and holds a lock on
//! that list for as long as it lives. A list whose lock is free belongs to a run that is gone; what it names can be removed.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process;

use crate::progress::Progress;

/// Names of lists, followed by the process id and a number that makes them unique.
const PREFIX: &str = "temporary.";

/// This run's list. Removed with its lock when dropped; by then the temporary files have removed themselves.
pub struct Leftovers {
    path: PathBuf,
    list: File,
}

impl Leftovers {
    /// Removes what earlier runs left behind, and begins this run's list in `state`.
    pub fn take_over(state: &Path, progress: &Progress) -> Result<Leftovers, (PathBuf, io::Error)> {
        let failed = |error| (state.to_owned(), error);
        for entry in fs::read_dir(state).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.file_name().is_some_and(|name| name.as_bytes().starts_with(PREFIX.as_bytes())) {
                let removed = sweep(&path).map_err(|error| (path.clone(), error))?;
                if removed > 0 {
                    progress.say(&format!("removed {removed} temporary files of a conversion that was killed"));
                }
            }
        }
        let (path, list) = (0u32..)
            .find_map(|number| {
                let path = state.join(format!("{PREFIX}{}.{number}", process::id()));
                match OpenOptions::new().create_new(true).append(true).open(&path) {
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => None,
                    result => Some(result.map(|list| (path.clone(), list)).map_err(|error| (path, error))),
                }
            })
            .expect("some number is free")?;
        // Another run may see the list before it is locked, find it empty and remove it. Then this run's files are just not listed.
        list.lock().map_err(|error| (path.clone(), error))?;
        Ok(Leftovers { path, list })
    }

    /// Lists a temporary file of this run. Not synced: after a power failure the worst is a file that stays.
    pub fn note(&self, temp: &Path) -> io::Result<()> {
        let mut line = temp.as_os_str().as_bytes().to_vec();
        line.push(b'\n');
        (&self.list).write_all(&line)
    }
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        // If it stays, the next run removes it.
        let _ = fs::remove_file(&self.path);
    }
}

/// Removes the files of a list whose run is gone, then the list; gives how many there were.
fn sweep(path: &Path) -> io::Result<usize> {
    let list = match File::open(path) {
        Ok(list) => list,
        // Its run ended just now.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    match list.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(0),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    let lines = fs::read(path)?;
    let mut removed = 0;
    // The last line may be torn; it lacks its newline.
    for line in lines.split_inclusive(|&b| b == b'\n').filter_map(|line| line.strip_suffix(b"\n")) {
        let temp = PathBuf::from(std::ffi::OsString::from_vec(line.to_vec()));
        match fs::remove_file(&temp) {
            Ok(()) => removed += 1,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                // A store that is not mounted now may be next time: the list stays.
                tracing::warn!(path = %temp.display(), %error, "cannot remove a temporary file of a killed conversion");
                return Ok(removed);
            }
        }
    }
    fs::remove_file(path)?;
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_gone_run_are_removed_and_those_of_a_living_one_stay() {
        let (state, store) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let temp = |name: &str| {
            let path = store.path().join(name);
            fs::write(&path, name).unwrap();
            path
        };
        let living = Leftovers::take_over(state.path(), &Progress::Silent).unwrap();
        let (kept, gone) = (temp("kept"), temp("gone"));
        living.note(&kept).unwrap();
        // A run that was killed: its list is there, nobody holds the lock, and the last line is torn.
        let list = format!("{}\n/absent\n{}", gone.display(), kept.display());
        fs::write(state.path().join("temporary.1.0"), list).unwrap();
        let other = Leftovers::take_over(state.path(), &Progress::Silent).unwrap();
        assert!(kept.exists() && !gone.exists());
        assert!(!state.path().join("temporary.1.0").exists());
        drop((living, other));
        assert_eq!(fs::read_dir(state.path()).unwrap().count(), 0);
    }
}
