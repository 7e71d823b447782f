//! The seam to the store's pack files: exact ranges, or an error. Real ones go through io_uring; the fake has every fault we know.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use erofs::digest::Digest;
use tokio::sync::oneshot;
use tokio_uring::fs::File;
use uapi::buffer::Buffer;

use super::{Name, Store, StoreError};

/// Reads of pack files. One value per data thread; a future may be dropped at any await, the read then ends on its own.
#[allow(async_fn_in_trait, reason = "used with static dispatch on one thread only")]
pub trait ChunkStore {
    /// Fills `buffer` from `offset` of the pack file. Gives exactly that many bytes, unverified, or an error.
    async fn read(&self, pack: &Digest, offset: u64, buffer: Buffer) -> Result<Buffer, ChunkError>;
}

/// Bytes of a pack cannot be had from the store now. Trying again may help in both cases.
#[derive(Debug, thiserror::Error)]
pub enum ChunkError {
    /// The pack file cannot be opened.
    #[error("cannot open pack {pack} in the store; check that the store is mounted and has this pack")]
    Open {
        /// The pack.
        pack: Digest,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// The pack file is open but does not give the bytes.
    #[error("cannot read {len} bytes at {offset} of pack {pack} from the store; check the store's health, and the pack file's length")]
    Read {
        /// The pack.
        pack: Digest,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: usize,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The store as the data path opens it: when first needed, and anew after an error, as a share can be gone at start and its handles go
/// stale when its server fails over.
#[derive(Debug)]
pub struct StoreHandle {
    dir: PathBuf,
    /// Held while opening: whoever else needs the store would only wait for the same directory.
    open: Mutex<Option<Arc<Store>>>,
}

impl StoreHandle {
    /// The store in `dir`; nothing is opened yet.
    pub fn new(dir: PathBuf) -> StoreHandle {
        StoreHandle { dir, open: Mutex::default() }
    }

    /// Opens a file of the store. Blocks as long as the share does.
    pub fn open_file(&self, name: &Name) -> Result<std::fs::File, StoreError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let store = match open.as_ref() {
            Some(store) => Arc::clone(store),
            None => Arc::clone(open.insert(Arc::new(Store::open(&self.dir)?))),
        };
        drop(open);
        store.open_file(name).inspect_err(|_| self.forget())
    }

    fn forget(&self) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// The store through this thread's ring.
pub struct UfsChunks {
    store: Arc<StoreHandle>,
    /// tokio-uring's files belong to one thread.
    files: RefCell<HashMap<Digest, Rc<File>>>,
}

impl UfsChunks {
    /// Reads packs of `store`.
    pub fn new(store: Arc<StoreHandle>) -> UfsChunks {
        UfsChunks { store, files: RefCell::default() }
    }

    async fn open(&self, pack: &Digest) -> Result<Rc<File>, ChunkError> {
        if let Some(file) = self.files.borrow().get(pack) {
            return Ok(Rc::clone(file));
        }
        // A thread of its own: on a hung share this open never returns, and nothing else may wait behind it, nor at the end of the
        // runtime for it.
        let (tx, rx) = oneshot::channel();
        let (store, name) = (Arc::clone(&self.store), Name::Pack(*pack));
        let spawned = std::thread::Builder::new().name("open-pack".into()).spawn(move || drop(tx.send(store.open_file(&name))));
        spawned.map_err(|source| self.unread(pack, 0, 0, source))?;
        let opened = rx.await.map_err(|_| self.unread(pack, 0, 0, io::Error::other("the opening thread died")))?;
        let file = Rc::new(File::from_std(opened.map_err(|source| ChunkError::Open { pack: *pack, source })?));
        self.files.borrow_mut().insert(*pack, Rc::clone(&file));
        Ok(file)
    }

    /// Notes a failed read: the next one opens the file by its path again, which cures stale handles.
    fn unread(&self, pack: &Digest, offset: u64, len: usize, source: io::Error) -> ChunkError {
        self.files.borrow_mut().remove(pack);
        ChunkError::Read { pack: *pack, offset, len, source }
    }
}

impl ChunkStore for UfsChunks {
    async fn read(&self, pack: &Digest, offset: u64, buffer: Buffer) -> Result<Buffer, ChunkError> {
        let len = buffer.len();
        let (result, buffer) = self.open(pack).await?.read_exact_at(buffer, offset).await;
        result.map(|()| buffer).map_err(|source| self.unread(pack, offset, len, source))
    }
}

/// What can go wrong with a read of a [`FakeChunks`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It takes this long.
    Delay(Duration),
    /// It never ends.
    Hang,
    /// It fails.
    Fail(io::ErrorKind),
    /// The file ends before the range does.
    Truncate,
    /// One bit of what is read is wrong.
    Corrupt,
}

/// Pack files in memory, shared by its clones.
#[derive(Clone, Default)]
pub struct FakeChunks {
    inner: Arc<Mutex<FakeInner>>,
}

#[derive(Default)]
struct FakeInner {
    packs: HashMap<Digest, Arc<Vec<u8>>>,
    /// By number of the read.
    faults: BTreeMap<usize, Fault>,
    always: Option<Fault>,
    log: Vec<(u64, usize)>,
}

impl FakeChunks {
    /// A store with nothing in it.
    pub fn new() -> FakeChunks {
        FakeChunks::default()
    }

    /// Adds a pack file, or replaces it.
    pub fn put(&self, pack: Digest, file: Vec<u8>) {
        self.lock().packs.insert(pack, Arc::new(file));
    }

    /// Read number `nth` from now (0 is the next) goes wrong.
    pub fn fault(&self, nth: usize, fault: Fault) {
        let mut inner = self.lock();
        let at = inner.log.len() + nth;
        inner.faults.insert(at, fault);
    }

    /// Every read from now on goes wrong (or, with `None`, none but those named).
    pub fn always(&self, fault: Option<Fault>) {
        self.lock().always = fault;
    }

    /// Offset and length of every read so far.
    pub fn log(&self) -> Vec<(u64, usize)> {
        self.lock().log.clone()
    }

    fn lock(&self) -> MutexGuard<'_, FakeInner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ChunkStore for FakeChunks {
    async fn read(&self, pack: &Digest, offset: u64, mut buffer: Buffer) -> Result<Buffer, ChunkError> {
        let len = buffer.len();
        let (file, fault) = {
            let mut inner = self.lock();
            let number = inner.log.len();
            inner.log.push((offset, len));
            (inner.packs.get(pack).cloned().unwrap_or_default(), inner.faults.get(&number).copied().or(inner.always))
        };
        let unread = |kind: io::ErrorKind| ChunkError::Read { pack: *pack, offset, len, source: kind.into() };
        match fault {
            Some(Fault::Delay(delay)) => tokio::time::sleep(delay).await,
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::Fail(kind)) => return Err(unread(kind)),
            Some(Fault::Truncate) => return Err(unread(io::ErrorKind::UnexpectedEof)),
            Some(Fault::Corrupt) | None => tokio::task::yield_now().await,
        }
        let bytes = file.get(offset as usize..offset as usize + len).ok_or_else(|| unread(io::ErrorKind::UnexpectedEof))?;
        buffer.copy_from_slice(bytes);
        if fault == Some(Fault::Corrupt) {
            buffer[len / 2] ^= 1;
        }
        Ok(buffer)
    }
}
