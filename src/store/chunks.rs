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

    /// Closes what is kept open of a pack that is not used any more. Should it be read again, it is opened again.
    fn forget(&self, pack: &Digest);
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

    fn forget(&self, pack: &Digest) {
        self.files.borrow_mut().remove(pack);
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

    fn forget(&self, _pack: &Digest) {}
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A name and bytes that could be its pack's.
    fn pack_file() -> (Digest, Vec<u8>) {
        (Digest::of(b"pack"), (0..70_000u32).map(|i| ((i * 7919) >> 5) as u8).collect())
    }

    /// Bytes of a read of `len` bytes at `offset`, or the variant of the error.
    async fn read(chunks: &impl ChunkStore, pack: &Digest, offset: u64, len: usize) -> Result<Vec<u8>, &'static str> {
        match chunks.read(pack, offset, Buffer::new(len)).await {
            Ok(buffer) => Ok(buffer.to_vec()),
            Err(ChunkError::Open { .. }) => Err("open"),
            Err(ChunkError::Read { .. }) => Err("read"),
        }
    }

    #[test]
    fn the_store_gives_exact_ranges_or_an_error_and_recovers_by_itself() {
        let dir = tempfile::tempdir().unwrap();
        let (pack, file) = pack_file();
        let path = dir.path().join("store").join(Name::Pack(pack).path());
        let chunks = UfsChunks::new(Arc::new(StoreHandle::new(dir.path().join("store"))));
        tokio_uring::start(async {
            assert_eq!(read(&chunks, &pack, 0, 1).await, Err("open"), "no store yet");
            fs::create_dir(dir.path().join("store")).unwrap();
            Store::create(&dir.path().join("store")).unwrap();
            assert_eq!(read(&chunks, &pack, 0, 1).await, Err("open"), "no pack yet");
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, &file).unwrap();
            for (offset, len) in [(0, 1), (4096, 5000), (0, file.len()), (file.len() - 1, 1)] {
                assert_eq!(read(&chunks, &pack, offset as u64, len).await.as_deref(), Ok(&file[offset..offset + len]));
            }
            assert_eq!(chunks.files.borrow().len(), 1);
            chunks.forget(&pack);
            assert_eq!(chunks.files.borrow().len(), 0);
            assert_eq!(read(&chunks, &pack, 1, file.len()).await, Err("read"), "one byte too far");
            fs::remove_file(&path).unwrap();
            assert_eq!(read(&chunks, &pack, 0, 1).await, Err("open"), "opened anew after the error");
        });
    }

    #[test]
    fn a_hung_store_does_not_hold_up_the_ring() {
        let dir = tempfile::tempdir().unwrap();
        let chunks = UfsChunks::new(Arc::new(StoreHandle::new(dir.path().to_owned())));
        let held = chunks.store.open.lock().unwrap();
        tokio_uring::start(async {
            let short = Duration::from_millis(50);
            assert!(tokio::time::timeout(short, chunks.read(&Digest::of(b"p"), 0, Buffer::new(1))).await.is_err());
        });
        drop(held);
    }

    #[test]
    fn fakes_go_wrong_as_told() {
        let (pack, file) = pack_file();
        let chunks = FakeChunks::new();
        chunks.put(pack, file.clone());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            chunks.fault(1, Fault::Corrupt);
            chunks.fault(2, Fault::Truncate);
            assert_eq!(read(&chunks, &pack, 5, 10).await.as_deref(), Ok(&file[5..15]));
            let corrupt = read(&chunks, &pack, 5, 10).await.unwrap();
            assert_eq!(corrupt.iter().zip(&file[5..15]).filter(|(a, b)| a != b).count(), 1);
            assert_eq!(read(&chunks, &pack, 5, 10).await, Err("read"));
            assert_eq!(read(&chunks, &pack, 5, 10).await.as_deref(), Ok(&file[5..15]));
            assert_eq!(chunks.log(), [(5, 10); 4]);
        });
    }
}
