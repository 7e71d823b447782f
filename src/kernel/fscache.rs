//! Backend `fscache`: EROFS `fsid=` mounts whose bytes the kernel keeps in its own cache and asks for through /dev/cachefiles.
//!
//! An object is a metadata image (the `fsid`) or a pack (a device tag); both are named by digest, so one domain serves all images. The
//! kernel opens an object with a descriptor to write to; what is in it the kernel alone knows, and once a range is there no reader comes
//! back to us for it. So an ask is answered after the write of its units returned ([`Wants::Stored`]), and there is no way to say "error":
//! a request completed with its range still missing makes the reader's EIO (`fs/cachefiles/io.c`, second miss).
//!
//! When the process dies while another keeps the device open, readers wait; the successor attaches the same digests and says `restore`:
//! the kernel opens every object with unanswered requests again and repeats them. A worker that ends in order leaves what it cannot serve
//! any more unanswered, for the same reason.

use std::collections::HashMap;
use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::{fs, io, thread};

use erofs::block::BLOCK_SIZE;
use erofs::digest::Digest;
use erofs::pack::PackTable;
use uapi::buffer::Buffer;
use uapi::cachefiles::{Device, Limits, MESSAGE_MAX, MessageId, Object, ObjectId, OpenMessage};
use uapi::ring::PollRing;

use super::vital::{self, Vital};
use super::{Ask, AskId, Channel, Errno, Serve, Wants};
use crate::cache::presence::Saved;
use crate::cache::{Pack, PackFile, UnitIndex};

/// Bytes of a metadata image copied into the kernel's cache in one write: large enough that the write's own cost is small beside the
/// copy, small enough to allocate without thought.
const METADATA_STEP: usize = 1 << 20;

/// fscache cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum FscacheError {
    /// The device cannot be opened or set up.
    #[error(
        "cannot {action}; on-demand cachefiles need Linux 5.19 to 7.1 with CONFIG_CACHEFILES_ONDEMAND, root, a cache directory on ext4 or XFS, and no other daemon using /dev/cachefiles"
    )]
    Device {
        /// What was tried.
        action: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// The cachefiles device being served. Dropping it stops serving, as [`Fscache::stop`] does; the mounts stay for whoever else holds the
/// descriptor.
pub struct Fscache {
    inner: Arc<Inner>,
}

struct Inner {
    device: Device,
    serve: Arc<dyn Serve>,
    /// What may be opened, by digest. Filled before a mount asks for it.
    known: Mutex<HashMap<Digest, Source>>,
    /// What the kernel has open.
    objects: Mutex<HashMap<ObjectId, Arc<Open>>>,
    /// From then on nothing is read from the device, and no request is completed without its bytes.
    stopped: AtomicBool,
    /// Threads that copy metadata.
    copies: Mutex<Vec<JoinHandle<()>>>,
}

/// Where an object's bytes come from.
#[derive(Clone)]
enum Source {
    Metadata { path: PathBuf, len: u64 },
    Pack(PackTable),
}

/// One object the kernel has open.
struct Open {
    object: Object,
    body: Body,
}

enum Body {
    Metadata {
        digest: Digest,
        path: PathBuf,
        fill: Mutex<MetadataFill>,
    },
    /// The pack is made when the first read comes: only then has the kernel a file behind the descriptor to ask what is in it.
    Pack {
        table: PackTable,
        pack: Mutex<Option<Arc<Pack>>>,
    },
}

/// A metadata image is written whole when its first page is asked for.
enum MetadataFill {
    Idle,
    Running(Vec<MessageId>),
}

impl Fscache {
    /// Opens /dev/cachefiles: while it is open no other process has it.
    pub fn open() -> Result<Device, FscacheError> {
        Device::open().map_err(failed("open /dev/cachefiles"))
    }

    /// Binds the cache directory `dir` under the name `tag`, which must be unique on this machine.
    pub fn bind(device: &Device, dir: &Path, tag: &str) -> Result<(), FscacheError> {
        device.bind(dir, tag, Limits::default()).map_err(failed(format!("bind {} to /dev/cachefiles", dir.display())))
    }

    /// Prepares to serve a bound device. Nothing is read from it before [`Fscache::serve`], so objects can be attached first.
    pub fn new(device: Device, serve: Arc<dyn Serve>) -> Fscache {
        let inner =
            Inner { device, serve, known: Mutex::default(), objects: Mutex::default(), stopped: AtomicBool::new(false), copies: Mutex::default() };
        Fscache { inner: Arc::new(inner) }
    }

    /// Starts the reader thread. `taken_over`: the device was bound by an earlier process, whose unanswered requests are asked for again.
    pub fn serve(&self, taken_over: bool) -> Result<(), FscacheError> {
        if taken_over {
            self.restore().map_err(failed("take over /dev/cachefiles from an earlier process"))?;
        }
        let ring = self.inner.device.try_clone_fd().and_then(PollRing::new).map_err(failed("watch /dev/cachefiles with io_uring"))?;
        let inner = Arc::clone(&self.inner);
        thread::Builder::new()
            .name("fscache".into())
            .spawn(move || inner.read_loop(ring))
            .map_err(failed("start the reader thread of /dev/cachefiles"))?;
        Ok(())
    }

    /// Has the kernel repeat what is unanswered. An error: this kernel cannot.
    pub fn restore(&self) -> io::Result<()> {
        self.inner.device.restore()
    }

    /// Another descriptor of the device, for whoever keeps it.
    pub fn device(&self) -> io::Result<OwnedFd> {
        self.inner.device.try_clone_fd()
    }

    /// Reads no more requests, fails none of those under way, and waits until no metadata is being written. What is unanswered, waits for a
    /// successor or for the end of the device.
    pub fn stop(&self) {
        self.inner.stopped.store(true, Ordering::SeqCst);
        let copies = std::mem::take(&mut *self.inner.copies());
        for copy in copies {
            // One that panicked has written nothing that was not verified.
            let _ = copy.join();
        }
    }

    /// Lets mounts use this metadata image: a local file, complete and verified (invariant 5).
    pub fn attach_metadata(&self, digest: Digest, path: &Path) -> io::Result<()> {
        let len = fs::metadata(path)?.len();
        self.inner.known().insert(digest, Source::Metadata { path: path.to_owned(), len });
        Ok(())
    }

    /// Lets mounts use this pack.
    pub fn attach(&self, table: &PackTable) {
        self.inner.known().insert(table.pack_ref().digest, Source::Pack(table.clone()));
    }

    /// Ends the use of a metadata image or pack by later mounts. What is open stays served.
    pub fn detach(&self, digest: &Digest) {
        self.inner.known().remove(digest);
    }
}

impl Drop for Fscache {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Inner {
    fn known(&self) -> MutexGuard<'_, HashMap<Digest, Source>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn objects(&self) -> MutexGuard<'_, HashMap<ObjectId, Arc<Open>>> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn copies(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    /// Reads requests until stopped. Every message is read before the next wait: the poll reports changes only.
    fn read_loop(self: Arc<Self>, mut ring: PollRing) {
        let _vital = Vital::thread("serving /dev/cachefiles");
        let give_up = |action: &str, error: io::Error| -> ! { vital::end("serving /dev/cachefiles", format_args!("cannot {action}: {error}")) };
        let mut buffer = [0; MESSAGE_MAX];
        while !self.is_stopped() {
            match self.device.next(&mut buffer) {
                Ok(Some(message)) => self.dispatch(message),
                Ok(None) => match ring.wait() {
                    Ok(ready) if ready.closed() => give_up("wait for it", io::ErrorKind::BrokenPipe.into()),
                    Ok(_) => {}
                    Err(error) => give_up("wait for it", error),
                },
                // A successor would be told the same.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => tracing::error!(%error, "a request of /dev/cachefiles was skipped"),
                Err(error) if is_of_one_open(&error) => tracing::error!(%error, "the kernel could not open an object for us"),
                Err(error) => give_up("read it", error),
            }
        }
    }

    fn dispatch(self: &Arc<Self>, message: OpenMessage) {
        match message {
            OpenMessage::Open { id, object, cookie, .. } => self.open(id, object, &cookie),
            OpenMessage::Close { object } => self.close(object),
            OpenMessage::Read { id, object, offset, len } => {
                let open = self.objects().get(&object).map(Arc::clone);
                match open {
                    Some(open) => self.read(id, &open, offset, len),
                    // The kernel asks only for objects it has opened with us and not closed. Whatever went wrong: it opens this one anew with
                    // a successor, and repeats the request.
                    None => vital::end("serving /dev/cachefiles", format_args!("the kernel reads object {}, which is not open here", object.0)),
                }
            }
        }
    }

    fn open(&self, id: MessageId, object: Object, cookie: &[u8]) {
        let object_id = object.id();
        let digest = std::str::from_utf8(cookie).ok().and_then(|text| text.parse::<Digest>().ok());
        let source = digest.and_then(|digest| Some((digest, self.known().get(&digest).cloned()?)));
        let size = match source {
            Some((digest, Source::Metadata { path, len })) => {
                self.insert(Open { object, body: Body::Metadata { digest, path, fill: Mutex::new(MetadataFill::Idle) } });
                Ok(len)
            }
            Some((_, Source::Pack(table))) => {
                let len = u64::from(table.blocks()) * BLOCK_SIZE;
                self.insert(Open { object, body: Body::Pack { table, pack: Mutex::default() } });
                Ok(len)
            }
            None => {
                tracing::warn!(cookie = %String::from_utf8_lossy(cookie), "a mount asks for an object that no image of this node has");
                Err(Errno::NOENT)
            }
        };
        if let Err(error) = self.device.open_done(id, size) {
            // Who waited for it was killed, or the kernel wants it opened again.
            tracing::warn!(%error, "cannot answer an open request of /dev/cachefiles");
            self.objects().remove(&object_id);
        }
    }

    fn insert(&self, open: Open) {
        self.objects().insert(open.object.id(), Arc::new(open));
    }

    /// The kernel closes an object when no request for it is left, so nobody waits for what is dropped here.
    fn close(&self, object: ObjectId) {
        let open = self.objects().remove(&object);
        if let Some(Body::Pack { pack, .. }) = open.as_deref().map(|open| &open.body)
            && let Some(pack) = pack.lock().unwrap_or_else(PoisonError::into_inner).take()
        {
            self.serve.forget(&pack);
        }
    }

    fn read(self: &Arc<Self>, id: MessageId, open: &Arc<Open>, offset: u64, len: u64) {
        match &open.body {
            Body::Metadata { digest, path, fill } => self.read_metadata(id, open, digest, path, fill),
            Body::Pack { table, pack } => match open.pack(table, pack) {
                Ok(pack) => self.read_pack(id, open, pack, offset, len),
                Err(error) => {
                    tracing::error!(pack = %table.pack_ref().digest, %error, "cannot see what the kernel has of a pack");
                    open.complete(id);
                }
            },
        }
    }

    fn read_pack(self: &Arc<Self>, id: MessageId, open: &Open, pack: Arc<Pack>, offset: u64, len: u64) {
        // The kernel rounds to pages, so the end may lie behind the pack's.
        let len = len.min(pack.len().saturating_sub(offset));
        let ask_id = AskId(u64::from(open.object.id().0) << 32 | u64::from(id.0));
        let channel: Arc<dyn Channel> = Arc::clone(self) as Arc<dyn Channel>;
        match u32::try_from(len) {
            Ok(len) if len > 0 => {
                self.serve.submit(Ask::new(pack, offset, len, ask_id, channel, Arc::clone(self.serve.metrics())));
            }
            _ => {
                tracing::error!(pack = %pack.digest(), offset, len, "the kernel asks for bytes that the pack does not have");
                open.complete(id);
            }
        }
    }

    /// Copies the metadata image into the kernel's cache, on a thread of its own so that reads of other objects go on.
    fn read_metadata(self: &Arc<Self>, id: MessageId, open: &Arc<Open>, digest: &Digest, path: &Path, fill: &Mutex<MetadataFill>) {
        {
            let mut fill = fill.lock().unwrap_or_else(PoisonError::into_inner);
            if let MetadataFill::Running(waiting) = &mut *fill {
                waiting.push(id);
                return;
            }
            *fill = MetadataFill::Running(vec![id]);
        }
        let (inner, own, digest, at) = (Arc::clone(self), Arc::clone(open), *digest, path.to_owned());
        let copy = move || {
            if let Err(error) = copy_metadata(&digest, &at, &own.object, &inner.stopped) {
                tracing::error!(metadata = %at.display(), %error, "cannot copy a metadata image into the kernel's cache; reads of it get EIO");
            }
            inner.metadata_filled(&own);
        };
        let mut copies = self.copies();
        // With the lock held, so that none is started behind the back of `stop`.
        if self.is_stopped() {
            return;
        }
        match thread::Builder::new().name("fscache-meta".into()).spawn(copy) {
            Ok(started) => {
                copies.retain(|copy| !copy.is_finished());
                copies.push(started);
            }
            Err(error) => {
                tracing::error!(metadata = %path.display(), %error, "cannot start a thread; reads of the metadata image get EIO");
                self.metadata_filled(open);
            }
        }
    }

    /// Answers everyone who waits for the metadata image. If it was not written, the kernel finds the hole and gives EIO; but not because we
    /// stopped.
    fn metadata_filled(&self, open: &Open) {
        let Body::Metadata { fill, .. } = &open.body else { return };
        let done = std::mem::replace(&mut *fill.lock().unwrap_or_else(PoisonError::into_inner), MetadataFill::Idle);
        if let MetadataFill::Running(waiting) = done
            && !self.is_stopped()
        {
            waiting.into_iter().for_each(|id| open.complete(id));
        }
    }
}

impl Open {
    /// The object's pack, with the units that the kernel has.
    fn pack(&self, table: &PackTable, pack: &Mutex<Option<Arc<Pack>>>) -> io::Result<Arc<Pack>> {
        let mut slot = pack.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pack) = &*slot {
            return Ok(Arc::clone(pack));
        }
        let stored = self.stored(table)?;
        let data: OwnedFd = self.object.as_fd().try_clone_to_owned()?;
        let made = Arc::new(Pack::new(table.clone(), PackFile::Kernel { data }, &stored));
        *slot = Some(Arc::clone(&made));
        Ok(made)
    }

    /// The units that are whole in the kernel's file: everything there was verified before it was written (invariant 5), and the
    /// directory is wiped after an unclean restart.
    fn stored(&self, table: &PackTable) -> io::Result<Saved> {
        let mut stored = Saved::nothing(table.unit_count());
        let end = u64::from(table.blocks()) * BLOCK_SIZE;
        let mut at = 0;
        while let Some(data) = self.object.next_data(at)?.filter(|data| *data < end) {
            let hole = self.object.next_hole(data)?.unwrap_or(end).min(end);
            whole_units(data..hole, table).for_each(|unit| stored.present.insert(unit));
            if hole <= at {
                break;
            }
            at = hole;
        }
        Ok(stored)
    }

    /// Lets the kernel look at the file again for this request.
    fn complete(&self, id: MessageId) {
        if let Err(error) = self.object.read_complete(id) {
            tracing::warn!(object = self.object.id().0, request = id.0, %error, "the kernel no longer waits for a read");
        }
    }
}

impl Channel for Inner {
    fn wants(&self) -> Wants {
        Wants::Stored
    }

    fn answer(&self, id: AskId, result: Result<&[IoSlice<'_>], Errno>) {
        // What fails because we stop is repeated for the successor. Otherwise success and failure look the same: on failure the range is still
        // a hole, and the kernel makes EIO of it.
        if result.is_err() && self.is_stopped() {
            return;
        }
        let (object, request) = (ObjectId((id.0 >> 32) as u32), MessageId(id.0 as u32));
        let open = self.objects().get(&object).map(Arc::clone);
        if let Some(open) = open {
            open.complete(request);
        }
    }
}

/// The units of which every byte lies in `stored`.
fn whole_units(stored: std::ops::Range<u64>, table: &PackTable) -> impl Iterator<Item = UnitIndex> + '_ {
    let unit = table.unit_bits().bytes();
    let end = u64::from(table.blocks()) * BLOCK_SIZE;
    let first = stored.start.div_ceil(unit);
    let past = if stored.end >= end { u64::from(table.unit_count()) } else { stored.end / unit };
    (first..past).map(|unit| UnitIndex(u32::try_from(unit).expect("packs have at most 2^14 units")))
}

/// Whether the kernel could not make a descriptor for an OPEN (`cachefiles_ondemand_daemon_read`): then it has failed that OPEN already, and the
/// next request is as good as any. `EEXIST`: the object's descriptor of an earlier process is not closed yet.
fn is_of_one_open(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::EXIST))
}

/// Writes a metadata image into the kernel's cache, where nobody checks it again: so it is checked here, from the memory it is then written from
/// (invariant 5). Ends early, with nothing wrong, when `stopped`.
fn copy_metadata(digest: &Digest, path: &Path, object: &Object, stopped: &AtomicBool) -> io::Result<()> {
    let bytes = read_verified(digest, path)?;
    let mut buffer = Buffer::new(METADATA_STEP);
    for (offset, step) in (0..).step_by(METADATA_STEP).zip(bytes.chunks(METADATA_STEP)) {
        if stopped.load(Ordering::SeqCst) {
            return Ok(());
        }
        // Metadata images are whole blocks long, which is what direct I/O wants.
        buffer.set_len(step.len().next_multiple_of(BLOCK_SIZE as usize));
        buffer[..step.len()].copy_from_slice(step);
        object.write_at(&buffer, offset)?;
    }
    Ok(())
}

/// A file's bytes, if they are those of `digest`.
fn read_verified(digest: &Digest, path: &Path) -> io::Result<Vec<u8>> {
    let bytes = fs::read(path)?;
    match Digest::of(&bytes) {
        found if found == *digest => Ok(bytes),
        found => Err(io::Error::new(io::ErrorKind::InvalidData, format!("the file is damaged: its digest is {found}, not {digest}"))),
    }
}

fn failed(action: impl Into<String>) -> impl FnOnce(io::Error) -> FscacheError {
    let action = action.into();
    move |source| FscacheError::Device { action, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_that_changed_on_the_disk_is_not_copied() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), b"metadata").unwrap();
        let digest = Digest::of(b"metadata");
        assert_eq!(read_verified(&digest, file.path()).unwrap(), b"metadata");
        for damaged in [&b"metadatA"[..], b"metadat", b"", b"metadata\0"] {
            fs::write(file.path(), damaged).unwrap();
            assert_eq!(read_verified(&digest, file.path()).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn an_open_that_the_kernel_failed_does_not_end_the_reading() {
        for (errno, goes_on) in [(Errno::MFILE, true), (Errno::NFILE, true), (Errno::NOMEM, true), (Errno::EXIST, true), (Errno::IO, false)] {
            assert_eq!(is_of_one_open(&io::Error::from(errno)), goes_on, "{errno}");
        }
        assert!(!is_of_one_open(&io::ErrorKind::InvalidData.into()));
    }
}
