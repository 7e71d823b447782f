//! The holder's named descriptors, and their copies in the service manager's fd store.
//!
//! systemd keeps a copy of what it is sent with `FDSTORE=1` and hands it to the next start of the service (`FileDescriptorStoreMax=`; across
//! stop and start with `FileDescriptorStorePreserve=yes`, systemd 254). It knows names only, so each payload is also a file beside the socket.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use sd_notify::NotifyState;

use super::protocol::FdName;

/// A kept descriptor with what its user wants to know of it later.
#[derive(Debug)]
pub struct Kept {
    /// The descriptor.
    pub fd: OwnedFd,
    /// What the worker gave with it.
    pub payload: Vec<u8>,
}

/// All kept descriptors by name.
#[derive(Debug)]
pub struct KeptFds {
    fds: BTreeMap<FdName, Kept>,
    payload_dir: PathBuf,
}

impl KeptFds {
    /// Starts with what the service manager kept: `passed`, as the program took it from its environment. `payload_dir` (made if missing,
    /// 0700) must survive restarts of the service as the descriptors do. A passed descriptor whose name or payload is unknown is closed: nobody
    /// could use it.
    pub fn open(payload_dir: &Path, passed: Vec<(String, OwnedFd)>) -> io::Result<KeptFds> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(payload_dir)?;
        let mut fds = BTreeMap::new();
        for (name, fd) in passed {
            let payload = FdName::new(&name).map(|known| (fs::read(payload_dir.join(known.as_str())), known));
            match payload {
                Some((Ok(payload), name)) => {
                    fds.insert(name, Kept { fd, payload });
                }
                _ => tracing::warn!(name, "the service manager kept a descriptor that is not known here; closing it"),
            }
        }
        Ok(KeptFds { fds, payload_dir: payload_dir.to_owned() })
    }

    /// The descriptor called `name`.
    pub fn get(&self, name: &FdName) -> Option<&Kept> {
        self.fds.get(name)
    }

    /// All descriptors, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&FdName, &Kept)> {
        self.fds.iter()
    }

    /// Keeps `fd`, instead of an earlier one of the name. It is kept even if this gives an error, which is about the copies that survive us.
    pub fn keep(&mut self, name: FdName, fd: OwnedFd, payload: Vec<u8>) -> io::Result<()> {
        let replaced = self.fds.insert(name.clone(), Kept { fd, payload });
        let kept = &self.fds[&name];
        let copied = self.write_payload(&name, &kept.payload).and_then(|()| {
            if replaced.is_some() {
                notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name.as_str())], None)?;
            }
            // FDPOLL=0: systemd would drop a descriptor that reports POLLHUP, which a FUSE device may do.
            notify(&[NotifyState::FdStore, NotifyState::FdName(name.as_str()), NotifyState::Custom("FDPOLL=0")], Some(&kept.fd))
        });
        copied.map_err(|error| io::Error::new(error.kind(), format!("the service manager has no copy of {name}: {error}")))
    }

    /// Closes the descriptor called `name` here and in the service manager's store.
    pub fn forget(&mut self, name: &FdName) -> io::Result<()> {
        if self.fds.remove(name).is_none() {
            return Ok(());
        }
        notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name.as_str())], None)?;
        fs::remove_file(self.payload_dir.join(name.as_str()))
    }

    /// Makes sure that every payload is on file, as for a successor that is to find them.
    pub fn write_payloads(&self) -> io::Result<()> {
        self.fds.iter().try_for_each(|(name, kept)| match fs::read(self.payload_dir.join(name.as_str())) {
            Ok(there) if there == kept.payload => Ok(()),
            _ => self.write_payload(name, &kept.payload),
        })
    }

    fn write_payload(&self, name: &FdName, payload: &[u8]) -> io::Result<()> {
        // The dot keeps a half-written file from ever being taken for a payload: no name begins with one.
        let temporary = self.payload_dir.join(format!(".{name}"));
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        io::Write::write_all(&mut file, payload)?;
        fs::rename(&temporary, self.payload_dir.join(name.as_str()))
    }
}

/// Tells the service manager. Without one (`NOTIFY_SOCKET` not set) nothing happens.
fn notify(state: &[NotifyState<'_>], fd: Option<&OwnedFd>) -> io::Result<()> {
    match fd {
        Some(fd) => sd_notify::notify_with_fds(state, &[fd.as_fd()]),
        None => sd_notify::notify(state),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> FdName {
        FdName::new(text).expect("a name")
    }

    fn some_fd() -> OwnedFd {
        fs::File::open("/dev/null").expect("/dev/null").into()
    }

    #[test]
    fn what_the_service_manager_kept_comes_back_with_its_payload() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let payloads = dir.path().join("kept");
        let mut kept = KeptFds::open(&payloads, Vec::new()).expect("open");
        kept.keep(name("fuse"), some_fd(), b"old".to_vec()).expect("keep");
        kept.keep(name("fuse"), some_fd(), b"new".to_vec()).expect("keep again");
        kept.keep(name("gone"), some_fd(), b"x".to_vec()).expect("keep");
        kept.forget(&name("gone")).expect("forget");
        kept.forget(&name("never")).expect("forgetting nothing");
        drop(kept);

        let passed = ["fuse", "gone", "stored", "../x"].into_iter().map(|name| (name.to_owned(), some_fd())).collect();
        let kept = KeptFds::open(&payloads, passed).expect("open again");
        let found: Vec<_> = kept.iter().map(|(name, kept)| (name.as_str(), kept.payload.as_slice())).collect();
        assert_eq!(found, [("fuse", &b"new"[..])]);
    }

    #[test]
    fn payloads_are_written_again_or_it_is_an_error() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let payloads = dir.path().join("kept");
        let mut kept = KeptFds::open(&payloads, Vec::new()).expect("open");
        kept.keep(name("fuse"), some_fd(), b"payload".to_vec()).expect("keep");
        for spoil in [|file: &Path| fs::remove_file(file), |file: &Path| fs::write(file, "other")] {
            spoil(&payloads.join("fuse")).expect("spoilt");
            kept.write_payloads().expect("written");
            assert_eq!(fs::read(payloads.join("fuse")).expect("a payload"), b"payload");
        }
        fs::remove_dir_all(&payloads).expect("removed");
        kept.write_payloads().expect_err("there is nowhere to write to");
    }
}
