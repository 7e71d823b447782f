//! Backend `fscache`: EROFS `fsid=` mounts whose bytes the kernel keeps in its own cache and asks for through /dev/cachefiles.
//!
//! An object is a metadata image (the `fsid`) or a pack (a device tag); both are named by digest, so one domain serves all images. The
//! kernel opens an object with a descriptor to write to; what is in it the kernel alone knows, and once a range is there no reader comes
//! back to us for it. So an ask is answered after the write of its units returned ([`Wants::Stored`]), and there is no way to say "error":
//! a request completed with its range still missing makes the reader's EIO (`fs/cachefiles/io.c`, second miss).
//!
//! When the process dies while another keeps the device open, readers wait; the successor attaches the same digests and says `restore`:
//! the kernel opens every object with unanswered requests again and repeats them.

use std::collections::HashMap;
use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{fs, io, thread};

use erofs::block::BLOCK_SIZE;
use erofs::digest::Digest;
use erofs::pack::PackTable;
use uapi::buffer::Buffer;
use uapi::cachefiles::{Device, Limits, MESSAGE_MAX, MessageId, Object, ObjectId, OpenMessage};
use uapi::ring::PollRing;

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

/// The cachefiles device being served. Dropping it stops the reader thread with the next request; the mounts stay for whoever else holds
/// the descriptor.
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
    /// Opens /dev/cachefiles and binds the cache directory `dir` under the name `tag`, which must be unique on this machine.
    pub fn bind(dir: &Path, tag: &str) -> Result<Device, FscacheError> {
        let failed = |action: String| move |source| FscacheError::Device { action, source };
        let device = Device::open().map_err(failed("open /dev/cachefiles".into()))?;
        device.bind(dir, tag, Limits::default()).map_err(failed(format!("bind {} to /dev/cachefiles", dir.display())))?;
        Ok(device)
    }

    /// Prepares to serve a bound device. Nothing is read from it before [`Fscache::serve`], so objects can be attached first.
    pub fn new(device: Device, serve: Arc<dyn Serve>) -> Fscache {
        Fscache { inner: Arc::new(Inner { device, serve, known: Mutex::default(), objects: Mutex::default() }) }
    }

    /// Starts the reader thread. `taken_over`: the device was bound by an earlier process, whose unanswered requests are asked for again.
    pub fn serve(&self, taken_over: bool) -> Result<(), FscacheError> {
        let failed = |action: &str| {
            let action = action.to_owned();
            move |source| FscacheError::Device { action, source }
        };
        if taken_over {
            self.inner.device.restore().map_err(failed("take over /dev/cachefiles from an earlier process"))?;
        }
        let ring = self.inner.device.try_clone_fd().and_then(PollRing::new).map_err(failed("watch /dev/cachefiles with io_uring"))?;
        let inner = Arc::clone(&self.inner);
        thread::Builder::new()
            .name("fscache".into())
            .spawn(move || inner.read_loop(ring))
            .map_err(failed("start the reader thread of /dev/cachefiles"))?;
        Ok(())
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

impl Inner {
    fn known(&self) -> MutexGuard<'_, HashMap<Digest, Source>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn objects(&self) -> MutexGuard<'_, HashMap<ObjectId, Arc<Open>>> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads requests until the device is gone. Every message is read before the next wait: the poll reports changes only.
    fn read_loop(self: Arc<Self>, mut ring: PollRing) {
        let mut buffer = [0; MESSAGE_MAX];
        loop {
            match self.device.next(&mut buffer) {
                Ok(Some(message)) => self.dispatch(message),
                Ok(None) => match ring.wait() {
                    Ok(ready) if ready.closed() => return,
                    Ok(_) => {}
                    Err(error) => {
                        tracing::error!(%error, "cannot wait for /dev/cachefiles; its mounts answer EIO until the daemon is restarted");
                        return;
                    }
                },
                Err(error) if error.kind() == io::ErrorKind::InvalidData => tracing::error!(%error, "a request of /dev/cachefiles was skipped"),
                Err(error) => {
                    tracing::error!(%error, "cannot read /dev/cachefiles; its mounts answer EIO until the daemon is restarted");
                    return;
                }
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
                    // The kernel asks only for objects it has opened with us and not closed.
                    None => tracing::error!(object = object.0, "the kernel reads an object that is not open"),
                }
            }
        }
    }

    fn open(&self, id: MessageId, object: Object, cookie: &[u8]) {
        let digest = std::str::from_utf8(cookie).ok().and_then(|text| text.parse::<Digest>().ok());
        let source = digest.and_then(|digest| self.known().get(&digest).cloned());
        let size = match source {
            Some(Source::Metadata { path, len }) => {
                self.insert(Open { object, body: Body::Metadata { path, fill: Mutex::new(MetadataFill::Idle) } });
                Ok(len)
            }
            Some(Source::Pack(table)) => {
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
            tracing::error!(%error, "cannot answer an open request of /dev/cachefiles");
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
            Body::Metadata { path, fill } => self.read_metadata(id, open, path, fill),
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
    fn read_metadata(self: &Arc<Self>, id: MessageId, open: &Arc<Open>, path: &Path, fill: &Mutex<MetadataFill>) {
        {
            let mut fill = fill.lock().unwrap_or_else(PoisonError::into_inner);
            if let MetadataFill::Running(waiting) = &mut *fill {
                waiting.push(id);
                return;
            }
            *fill = MetadataFill::Running(vec![id]);
        }
        let (own, at) = (Arc::clone(open), path.to_owned());
        let started = thread::Builder::new().name("fscache-meta".into()).spawn(move || {
            if let Err(error) = copy_metadata(&at, &own.object) {
                tracing::error!(metadata = %at.display(), %error, "cannot copy a metadata image into the kernel's cache; reads of it get EIO");
            }
            own.metadata_filled();
        });
        if let Err(error) = started {
            tracing::error!(metadata = %path.display(), %error, "cannot start a thread; reads of the metadata image get EIO");
            open.metadata_filled();
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

    /// Answers everyone who waits for the metadata image. If it was not written, the kernel finds the hole and gives EIO.
    fn metadata_filled(&self) {
        let Body::Metadata { fill, .. } = &self.body else { return };
        let done = std::mem::replace(&mut *fill.lock().unwrap_or_else(PoisonError::into_inner), MetadataFill::Idle);
        if let MetadataFill::Running(waiting) = done {
            waiting.into_iter().for_each(|id| self.complete(id));
        }
    }
}

impl Channel for Inner {
    fn wants(&self) -> Wants {
        Wants::Stored
    }

    fn answer(&self, id: AskId, _result: Result<&[IoSlice<'_>], Errno>) {
        // Success and failure look the same: on failure the range is still a hole, and the kernel makes EIO of it.
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

fn copy_metadata(path: &Path, object: &Object) -> io::Result<()> {
    let mut file = fs::File::open(path)?;
    let mut buffer = Buffer::new(METADATA_STEP);
    let mut offset = 0;
    loop {
        buffer.set_len(METADATA_STEP);
        let mut filled = 0;
        while filled < METADATA_STEP {
            match file.read(&mut buffer[filled..])? {
                0 => break,
                n => filled += n,
            }
        }
        if filled == 0 {
            return Ok(());
        }
        // Metadata images are whole blocks long, which is what direct I/O wants.
        buffer.set_len(filled.next_multiple_of(BLOCK_SIZE as usize));
        object.write_at(&buffer, offset)?;
        offset += filled as u64;
    }
}
