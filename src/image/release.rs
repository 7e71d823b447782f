//! Unmounting in the background what nothing uses any more.
//!
//! A mount is undone when no chain in use needs its image, no overlay in the mount table has it as a lower layer, and `umount(2)` agrees
//! (invariant 7). Anything else is tried again later: a process may sit in the directory, or a container may be on its way down.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use erofs::digest::Digest;
use uapi::mount::{MountError, Unmount, unmount};

use super::mounts::{Mounted, overlay_uses};
use super::{Failure, Shared, lock};

/// Time between attempts to unmount what was in use. Nobody waits for it; it only holds some memory.
const RETRY: Duration = Duration::from_secs(10);

/// The thread that unmounts. It ends when this is dropped; what is left is the next worker's.
pub(super) struct Cleaner {
    unused: Option<Sender<Digest>>,
    thread: Option<JoinHandle<()>>,
}

impl Cleaner {
    pub(super) fn start(shared: Arc<Shared>) -> io::Result<Cleaner> {
        let (unused, arriving) = unbounded();
        let thread = std::thread::Builder::new().name("unmount".to_owned()).spawn(move || run(&shared, &arriving))?;
        Ok(Cleaner { unused: Some(unused), thread: Some(thread) })
    }

    /// The image is in no use that we know of: look again and unmount it. Returns at once.
    pub(super) fn unmount(&self, image: Digest) {
        if let Some(unused) = &self.unused {
            // The thread ends after `drop` only.
            let _ = unused.send(image);
        }
    }
}

impl Drop for Cleaner {
    fn drop(&mut self) {
        self.unused = None;
        if let Some(thread) = self.thread.take() {
            // A panic in it has been reported by the thread itself.
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared, arriving: &Receiver<Digest>) {
    let mut waiting: BTreeSet<Digest> = BTreeSet::new();
    loop {
        let next = if waiting.is_empty() { arriving.recv().map_err(|_| RecvTimeoutError::Disconnected) } else { arriving.recv_timeout(RETRY) };
        match next {
            Ok(image) => _ = waiting.insert(image),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        waiting.extend(arriving.try_iter());
        waiting.retain(|digest| {
            let Some(image) = lock(&shared.index).images.get(digest).cloned() else { return false };
            let mut image = lock(&image);
            if !image.chains.is_empty() {
                return false;
            }
            match shared.unmount(&mut image) {
                Ok(done) => !done,
                Err(error) => {
                    tracing::warn!(image = %digest, error = error.as_ref() as &dyn std::error::Error, "an unused image stays mounted for now");
                    true
                }
            }
        });
    }
}

impl Shared {
    /// Undoes all mounts of an image that nothing refers to. False: one is in use, try later.
    fn unmount(&self, image: &mut Mounted) -> Result<bool, Failure> {
        while let Some(generation) = image.generations.last().cloned() {
            if overlay_uses(&uapi::mount::mounts()?, &generation.at) {
                return Ok(false);
            }
            match unmount(&generation.at, Unmount::IfUnused) {
                Ok(()) => {}
                Err(MountError::Busy { .. }) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
            tracing::info!(at = %generation.at.display(), "unmounted");
            image.generations.pop();
            self.forget(image, &generation)?;
        }
        Ok(true)
    }
}
