//! The directories of plain content: made inside the ledger's transaction, moved aside at once when removed, deleted later.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use super::SnapshotError;
use super::durable::Durable;
use super::ledger::{Kind, SnapshotId};
use super::mounts::Layout;

/// Mode of a new snapshot's content directory, which is the container's root directory; as containerd's overlayfs snapshotter has it.
const CONTENT_MODE: u32 = 0o755;
/// Mode of overlayfs's work directory, as containerd has it.
const WORK_MODE: u32 = 0o711;
/// Nothing here is for other users, except through a mount.
const PRIVATE_MODE: u32 = 0o700;

/// Makes and deletes directories. One thread does all the deleting, so that removing many large snapshots stays in the background.
#[derive(Debug)]
pub struct Dirs {
    layout: Layout,
    gone: PathBuf,
    sweeper: Sender<()>,
    durable: Durable,
}

impl Dirs {
    /// Makes what is missing of the fixed directories below `state`.
    pub fn open(state: &Path, layout: Layout) -> Result<Dirs, SnapshotError> {
        let gone = state.join("gone");
        let fixed = [(state, PRIVATE_MODE), (layout.snapshots(), PRIVATE_MODE), (&gone, PRIVATE_MODE), (layout.empty(), CONTENT_MODE)];
        for (path, mode) in fixed {
            let failed = |source| SnapshotError::Directory { path: path.to_owned(), source };
            DirBuilder::new().recursive(true).mode(mode).create(path).map_err(failed)?;
            if path != state {
                fs::set_permissions(path, Permissions::from_mode(mode)).map_err(failed)?;
            }
        }
        let (sweeper, wanted) = channel();
        let swept = gone.clone();
        let thread = thread::Builder::new().name("snapshot-sweep".into());
        thread.spawn(move || sweep_when_wanted(&swept, &wanted)).map_err(|source| SnapshotError::Directory { path: gone.clone(), source })?;
        let snapshots =
            fs::File::open(layout.snapshots()).map_err(|source| SnapshotError::Directory { path: layout.snapshots().to_owned(), source })?;
        Ok(Dirs { layout, gone, sweeper, durable: Durable::new(snapshots) })
    }

    /// Where things are.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Makes the directory of a new snapshot. Its root belongs to whom the root of `above`, the plain snapshot right below, belongs to.
    pub fn make(&self, kind: Kind, id: SnapshotId, above: Option<SnapshotId>) -> io::Result<()> {
        self.durable.made(id);
        let whole = self.layout.of(id);
        if whole.symlink_metadata().is_ok() {
            // Left by a transaction that did not come to its end; the number is free.
            self.move_aside(&whole)?;
        }
        make_directory(&whole, PRIVATE_MODE)?;
        make_directory(&self.layout.upper(id), CONTENT_MODE)?;
        if kind == Kind::Active {
            make_directory(&self.layout.work(id), WORK_MODE)?;
        }
        above.map_or(Ok(()), |above| self.set_owner(id, &self.layout.upper(above)))
    }

    /// Whether the content of `id` is a file of this name and nothing else.
    pub fn holds_only(&self, id: SnapshotId, name: &str) -> io::Result<bool> {
        let mut entries = fs::read_dir(self.layout.upper(id))?;
        let (Some(only), None) = (entries.next().transpose()?, entries.next()) else { return Ok(false) };
        Ok(only.file_name() == name && only.file_type()?.is_file())
    }

    /// Gives the root of `id` the owner and group that `like` has.
    pub fn set_owner(&self, id: SnapshotId, like: &Path) -> io::Result<()> {
        let like = fs::metadata(like)?;
        lchown(self.layout.upper(id), Some(like.uid()), Some(like.gid()))
    }

    /// Waits until the content of a snapshot is on disk, by writing back all of its file system: one call, where a layer may have as many files
    /// as it likes. Blocks.
    pub fn make_durable(&self, id: SnapshotId) -> io::Result<()> {
        self.durable.sync(id, |file_system| Ok(rustix::fs::syncfs(file_system)?))
    }

    /// Takes a snapshot's directory out of the way; the space comes back a little later. A lazy snapshot has none.
    pub fn discard(&self, id: SnapshotId) {
        self.durable.gone(id);
        match self.move_aside(&self.layout.of(id)) {
            Ok(()) => self.sweep(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(snapshot = id.0, %error, "directory of a removed snapshot stays until the next clean-up"),
        }
    }

    /// Takes every directory out of the way that belongs to none of `ids`. Nothing may be added meanwhile (`Ledger::hold_ids`).
    pub fn discard_orphans(&self, ids: &BTreeSet<SnapshotId>) -> io::Result<()> {
        for entry in fs::read_dir(self.layout.snapshots())? {
            let entry = entry?;
            let owner = entry.file_name().to_str().and_then(|name| name.parse().ok()).map(SnapshotId);
            if owner.is_none_or(|id| !ids.contains(&id)) {
                self.move_aside(&entry.path())?;
            }
        }
        self.sweep();
        Ok(())
    }

    fn sweep(&self) {
        self.sweeper.send(()).expect("the sweeper lives as long as this sender");
    }

    fn move_aside(&self, from: &Path) -> io::Result<()> {
        let name = from.file_name().unwrap_or(OsStr::new("unnamed")).to_string_lossy();
        // Names may be taken by what could not be deleted.
        for attempt in 0_u64.. {
            match fs::rename(from, self.gone.join(format!("{name}.{attempt}"))) {
                Err(error) if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists) => {}
                done => return done,
            }
        }
        unreachable!("2^64 names are not all taken")
    }
}

/// `mkdir` with a mode that the umask cannot change.
fn make_directory(path: &Path, mode: u32) -> io::Result<()> {
    fs::create_dir(path)?;
    fs::set_permissions(path, Permissions::from_mode(mode))
}

fn sweep_when_wanted(gone: &Path, wanted: &Receiver<()>) {
    while wanted.recv().is_ok() {
        // One sweep answers all wishes that came so far.
        while wanted.try_recv().is_ok() {}
        if let Err(error) = delete_all_below(gone) {
            tracing::warn!(path = %gone.display(), %error, "removed snapshots could not be deleted; tried again with the next removal");
        }
    }
}

fn delete_all_below(gone: &Path) -> io::Result<()> {
    let mut outcome = Ok(());
    for entry in fs::read_dir(gone)? {
        let path = entry?.path();
        if let Err(error) = fs::remove_dir_all(&path) {
            outcome = Err(io::Error::new(error.kind(), format!("{}: {error}", path.display())));
        }
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    fn open(state: &Path) -> Dirs {
        Dirs::open(state, Layout::new(state, Vec::new())).expect("directories")
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).expect("exists").mode() & 0o7777
    }

    #[test]
    fn directories_look_as_containerd_makes_them() {
        let state = tempfile::tempdir().expect("a temporary directory");
        let dirs = open(state.path());
        dirs.make(Kind::Active, SnapshotId(1), None).expect("made");
        dirs.make(Kind::View, SnapshotId(2), Some(SnapshotId(1))).expect("made");
        assert_eq!(mode(&dirs.layout.upper(SnapshotId(1))), 0o755);
        assert_eq!(mode(&dirs.layout.work(SnapshotId(1))), 0o711);
        assert!(!dirs.layout.work(SnapshotId(2)).exists());
        assert_eq!(mode(dirs.layout.snapshots()), 0o700);
        assert_eq!(mode(dirs.layout.empty()), 0o755);
    }

    #[test]
    fn a_lone_file_is_told_from_everything_else() {
        let state = tempfile::tempdir().expect("a temporary directory");
        let dirs = open(state.path());
        dirs.make(Kind::Active, SnapshotId(1), None).expect("made");
        let (upper, lone) = (dirs.layout.upper(SnapshotId(1)), || dirs.holds_only(SnapshotId(1), "name").expect("read"));
        assert!(!lone(), "nothing");
        fs::create_dir(upper.join("name")).expect("made");
        assert!(!lone(), "a directory");
        fs::remove_dir(upper.join("name")).expect("removed");
        fs::write(upper.join("other"), "x").expect("written");
        assert!(!lone(), "another file");
        fs::write(upper.join("name"), "x").expect("written");
        assert!(!lone(), "one of two");
        fs::remove_file(upper.join("other")).expect("removed");
        assert!(lone());
        assert!(dirs.holds_only(SnapshotId(2), "name").is_err(), "no such snapshot");
    }

    #[test]
    fn what_a_failed_transaction_left_does_not_stand_in_the_way() {
        let state = tempfile::tempdir().expect("a temporary directory");
        let dirs = open(state.path());
        dirs.make(Kind::Active, SnapshotId(1), None).expect("made");
        fs::write(dirs.layout.upper(SnapshotId(1)).join("old"), "x").expect("written");
        dirs.make(Kind::Active, SnapshotId(1), None).expect("made again");
        assert!(!dirs.layout.upper(SnapshotId(1)).join("old").exists());
    }

    #[test]
    fn orphans_go_and_the_rest_stays() {
        let state = tempfile::tempdir().expect("a temporary directory");
        let dirs = open(state.path());
        for id in 1..4 {
            dirs.make(Kind::Active, SnapshotId(id), None).expect("made");
        }
        fs::create_dir(dirs.layout.snapshots().join("new-123")).expect("made");
        dirs.discard_orphans(&BTreeSet::from([SnapshotId(2)])).expect("moved");
        let left: Vec<_> = fs::read_dir(dirs.layout.snapshots()).expect("read").map(|entry| entry.expect("read").file_name()).collect();
        assert_eq!(left, ["2"]);
        let give_up = Instant::now() + Duration::from_secs(10);
        while fs::read_dir(&dirs.gone).expect("read").next().is_some() {
            assert!(Instant::now() < give_up, "the sweeper did not delete");
            thread::yield_now();
        }
    }
}
