//! From asks to answers: whole units are claimed, fetched in runs, verified, answered and stored.
//!
//! An [`Engine`] has data threads, each with a ring of its own (`data`), which read the store and write the cache; decoders
//! (`decode`), which decompress and verify; and one thread that has maps saved now and then. Which units an ask needs and which a store
//! read brings is decided in [`plan`], how far ahead of a reader to fetch in [`crate::cache::ahead`].

mod data;
mod decode;
pub mod plan;

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc as sync};
use std::thread;
use std::time::Duration;

use erofs::digest::Digest;
use erofs::pack::{FOOTER_LEN, PackError, PackTable};
use tokio::sync::{Semaphore, mpsc};
use uapi::buffer::Pool;

use crate::cache::disk::{Disk, RingDisk};
use crate::cache::local::{CacheError, LocalCache};
use crate::cache::{Pack, Presence, UnitIndex};
use crate::kernel::vital::Vital;
use crate::kernel::{Ask, Errno, Serve};
use crate::metrics::Metrics;
use crate::store::chunks::{ChunkStore, StoreHandle, UfsChunks};
use crate::store::{Name, StoreError};

use data::Data;
use decode::Decoders;

/// An ask without bytes for this long is answered EIO, and a store read without an answer given up. Longer than the failover of most file
/// servers; shorter than the 120 s after which the kernel reports (or on some nodes panics over) a hung task.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// What is stored becomes durable, and known to the next worker, this often. A crash of the node loses no more than this much fetching;
/// a crash of the worker as well, though its data is still there.
const SAVE_INTERVAL: Duration = Duration::from_secs(2);

/// Entries of a data thread's ring: what one thread has under way is far less (see [`Limits::store_reads`] and the look-ahead budget).
const RING_ENTRIES: u32 = 256;

/// What an engine works with.
pub struct EngineOptions {
    /// The store's directory. It need not be reachable yet.
    pub store_dir: PathBuf,
    /// The cache's directory; made if it is not there.
    pub cache_dir: PathBuf,
    /// Threads with a ring of their own; 0 for the default, one per four CPUs.
    pub data_threads: usize,
    /// Where to count.
    pub metrics: Arc<Metrics>,
}

/// A pack cannot be had, or the engine cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The system refuses a thread or a ring.
    #[error("cannot start {what}; check limits on threads, and that io_uring is allowed (sysctl kernel.io_uring_disabled)")]
    Start {
        /// What was to be started.
        what: &'static str,
        /// Why it was not.
        #[source]
        source: io::Error,
    },
    /// The local cache does not work.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The store does not give the pack file.
    #[error("cannot open pack {pack} in the store; check that the store is mounted and has this pack")]
    Open {
        /// The pack.
        pack: Digest,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// The pack file cannot be read.
    #[error("cannot read the tables of pack {pack} in the store; check the store's health")]
    Read {
        /// The pack.
        pack: Digest,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The pack file is not what its name promises.
    #[error(transparent)]
    Table(#[from] PackError),
}

/// What a data thread is told.
enum Job {
    Ask(Ask),
    LookAhead(Arc<Pack>, UnitIndex),
    /// Save these packs' maps; then send.
    Save(Vec<Arc<Pack>>, sync::Sender<()>),
    /// Close files.
    Forget(Arc<Pack>),
    /// Finish what is under way, then save these packs' maps.
    Stop(Vec<Arc<Pack>>),
}

/// Bounds that tests tighten.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// See [`DEADLINE`].
    deadline: Duration,
    /// Store reads one data thread has under way. A ring runs blocking operations on at most 4 worker threads per CPU (`io_uring/io-wq.c`),
    /// and on a hung share each read holds one for ever; two are left for the cache, so what is cached stays readable.
    store_reads: usize,
}

impl Limits {
    fn real(cpus: usize) -> Limits {
        Limits { deadline: DEADLINE, store_reads: 4 * cpus - 2 }
    }
}

/// The data path of one worker.
pub struct Engine {
    threads: Vec<DataThread>,
    /// Whose turn it is: asks go to the data threads in turn.
    turn: AtomicUsize,
    packs: Arc<Mutex<HashMap<Digest, Arc<Pack>>>>,
    /// Units of closed packs that were verified in this process, for when they are opened again. Taken under `packs` only.
    verified: Mutex<HashMap<Digest, Presence>>,
    source: Option<Source>,
    metrics: Arc<Metrics>,
    deadline: Duration,
    /// Dropped to end the saving thread.
    saver: Mutex<Option<sync::Sender<()>>>,
}

struct DataThread {
    jobs: mpsc::UnboundedSender<Job>,
    /// Disconnected when the thread has done its last job.
    ended: Mutex<sync::Receiver<()>>,
}

/// Where packs come from.
struct Source {
    store: StoreHandle,
    cache: LocalCache,
}

impl Engine {
    /// Starts the data threads. Does not touch the store.
    pub fn start(options: EngineOptions) -> Result<Arc<Engine>, ServeError> {
        let store = Arc::new(StoreHandle::new(options.store_dir.clone()));
        Engine::start_over(options, move || UfsChunks::new(Arc::clone(&store)))
    }

    /// As [`Engine::start`], but units come from what `chunks` makes on each data thread. (Packs' tables still come from the directory.)
    pub fn start_over<S: ChunkStore + 'static>(
        options: EngineOptions,
        chunks: impl Fn() -> S + Clone + Send + 'static,
    ) -> Result<Arc<Engine>, ServeError> {
        let cpus = thread::available_parallelism().map_or(1, |n| n.get());
        let threads = if options.data_threads == 0 { cpus.div_ceil(4) } else { options.data_threads };
        let source = Source { store: StoreHandle::new(options.store_dir), cache: LocalCache::open(&options.cache_dir)? };
        Engine::with_seams(threads, cpus, Limits::real(cpus), options.metrics, Some(source), move || (chunks(), RingDisk::default()))
    }

    /// Starts an engine over any store and disk; `seams` is called once on each data thread.
    fn with_seams<S: ChunkStore + 'static, D: Disk + 'static>(
        threads: usize,
        decoders: usize,
        limits: Limits,
        metrics: Arc<Metrics>,
        source: Option<Source>,
        seams: impl Fn() -> (S, D) + Clone + Send + 'static,
    ) -> Result<Arc<Engine>, ServeError> {
        let pool = Pool::new();
        let decoders = Decoders::start(decoders, &pool).map_err(|source| ServeError::Start { what: "a decoder thread", source })?;
        let start = |number| {
            let (decoders, pool, metrics, seams) = (decoders.clone(), Arc::clone(&pool), Arc::clone(&metrics), seams.clone());
            let data = move || {
                let (store, disk) = seams();
                Data {
                    store: Rc::new(store),
                    disk,
                    decoders,
                    pool,
                    reads: Arc::new(Semaphore::new(limits.store_reads)),
                    ahead_reads: Arc::new(Semaphore::new(limits.store_reads.div_ceil(2))),
                    ahead: Default::default(),
                    limits,
                    metrics,
                    store_warnings: Default::default(),
                    cache_warnings: Default::default(),
                }
            };
            DataThread::start(number, data).map_err(|source| ServeError::Start { what: "a data thread", source })
        };
        let threads = (0..threads).map(start).collect::<Result<_, _>>()?;
        let (saver, stop_saving) = sync::channel();
        let engine = Arc::new(Engine {
            threads,
            turn: AtomicUsize::new(0),
            packs: Arc::default(),
            verified: Mutex::default(),
            source,
            metrics,
            deadline: limits.deadline,
            saver: Mutex::new(Some(saver)),
        });
        let (packs, jobs) = (Arc::clone(&engine.packs), engine.threads[0].jobs.clone());
        let saving = thread::Builder::new().name("save-maps".into()).spawn(move || save_now_and_then(&packs, &jobs, &stop_saving));
        saving.map_err(|source| ServeError::Start { what: "the saving thread", source })?;
        Ok(engine)
    }

    /// The pack of this name, ready to be attached to a backend. Reads footer and unit table from the local copy, or else from the store:
    /// blocking, so not for a gRPC handler. The same value until [`Engine::close`].
    pub fn pack(&self, digest: &Digest) -> Result<Arc<Pack>, ServeError> {
        if let Some(pack) = self.packs().get(digest) {
            return Ok(Arc::clone(pack));
        }
        self.open(digest, self.table(digest)?)
    }

    /// As [`Engine::pack`], but never waits for the store: `None` if the tables are not in the local cache.
    pub fn local_pack(&self, digest: &Digest) -> Result<Option<Arc<Pack>>, ServeError> {
        self.local_table(digest).map(|table| self.open(digest, table)).transpose()
    }

    fn open(&self, digest: &Digest, table: PackTable) -> Result<Arc<Pack>, ServeError> {
        let source = self.source();
        // Local work only under the lock, so that one pack's files are not opened twice.
        let mut packs = self.packs();
        if let Some(pack) = packs.get(digest) {
            return Ok(Arc::clone(pack));
        }
        let pack = Arc::new(source.cache.pack(table)?);
        if let Some(verified) = self.verified().remove(digest) {
            pack.units().trust(&verified);
        }
        packs.insert(*digest, Arc::clone(&pack));
        Ok(pack)
    }

    /// A pack's footer and unit table, verified. From the local copy, or else from the store: blocking.
    pub fn table(&self, digest: &Digest) -> Result<PackTable, ServeError> {
        self.source().table(digest)
    }

    /// As [`Engine::table`], but never waits for the store: `None` if the tables are not in the local cache.
    pub fn local_table(&self, digest: &Digest) -> Option<PackTable> {
        self.source().local_table(digest)
    }

    /// Lets go of packs that no backend has attached: their files are closed once nothing is under way for them. To be called after
    /// [`Engine::flush_packs`], as what is not saved is fetched again. Does not block.
    pub fn close(&self, digests: &[Digest]) {
        for digest in digests {
            let mut packs = self.packs();
            let Some(pack) = packs.remove(digest) else { continue };
            self.verified().insert(*digest, pack.units().durable());
            drop(packs);
            self.forget(&pack);
        }
    }

    /// Whether every unit of the pack is in the local file, durable and verified since this process began, so that [`Engine::local_file`] can be mounted directly.
    pub fn is_complete(&self, pack: &Pack) -> bool {
        pack.units().all_durable()
    }

    /// `<cache>/serve/<digest>`: the local file with the pack's uncompressed bytes.
    pub fn local_file(&self, pack: &Digest) -> PathBuf {
        self.source().cache.served(pack)
    }

    /// Makes everything stored so far durable and its presence known to the next worker. Blocks, at most for [`DEADLINE`].
    pub fn flush(&self) {
        let packs = changed(&self.packs());
        self.save(packs);
    }

    /// As [`Engine::flush`], for these packs only.
    pub fn flush_packs(&self, digests: &[Digest]) {
        let packs = {
            let packs = self.packs();
            digests.iter().filter_map(|digest| packs.get(digest).cloned()).collect()
        };
        self.save(packs);
    }

    fn save(&self, packs: Vec<Arc<Pack>>) {
        let (done, saved) = sync::channel();
        if self.threads[0].jobs.send(Job::Save(packs, done)).is_ok() {
            // Longer than this hangs only a disk that hangs, and then there is nothing to save to.
            let _ = saved.recv_timeout(self.deadline);
        }
    }

    /// Answers what is under way, saves, and ends the data threads; blocks, for each thread at most for [`DEADLINE`]. Asks that come later
    /// are answered EIO. Whether all of it was done in time.
    pub fn stop(&self) -> bool {
        self.saver.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (last, others) = self.threads.split_last().expect("an engine has at least one data thread");
        let mut in_time = true;
        for thread in others {
            in_time &= thread.stop(Vec::new(), self.deadline);
        }
        // Whatever is still being written is written by the one that saves, or has been.
        let packs = self.packs().values().cloned().collect();
        last.stop(packs, self.deadline) && in_time
    }

    fn source(&self) -> &Source {
        self.source.as_ref().expect("only tests start engines without a source, and bring their own packs")
    }

    fn packs(&self) -> MutexGuard<'_, HashMap<Digest, Arc<Pack>>> {
        self.packs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn verified(&self) -> MutexGuard<'_, HashMap<Digest, Presence>> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, job: Job) {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.threads.len();
        if let Err(mpsc::error::SendError(Job::Ask(ask))) = self.threads[turn].jobs.send(job) {
            ask.answer(Err(Errno::IO));
        }
    }
}

impl Serve for Engine {
    fn submit(&self, ask: Ask) {
        self.send(Job::Ask(ask));
    }

    fn look_ahead(&self, pack: &Arc<Pack>, unit: UnitIndex) {
        self.send(Job::LookAhead(Arc::clone(pack), unit));
    }

    fn forget(&self, pack: &Arc<Pack>) {
        // Before the jobs: what a thread opens before it does its job is closed by it, what it opens afterwards is not kept.
        pack.forget();
        for thread in &self.threads {
            // A thread that has ended has closed everything.
            let _ = thread.jobs.send(Job::Forget(Arc::clone(pack)));
        }
    }

    fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }
}

impl DataThread {
    fn start<S: ChunkStore + 'static, D: Disk + 'static>(
        number: usize,
        data: impl FnOnce() -> Data<S, D> + Send + 'static,
    ) -> io::Result<DataThread> {
        let (jobs, todo) = mpsc::unbounded_channel();
        let (end, ended) = sync::channel();
        let (begun, has_begun) = sync::channel();
        thread::Builder::new().name(format!("data-{number}")).spawn(move || {
            // Panics if the kernel refuses a ring.
            tokio_uring::builder().entries(RING_ENTRIES).start(async {
                let _ = begun.send(());
                // From here on: a panic before is an error of the start.
                let _vital = Vital::thread("a data thread");
                Rc::new(data()).run(todo).await;
                // Now, and not when the runtime is gone: it waits for every operation, also one on a hung share.
                drop(end);
            });
        })?;
        has_begun.recv().map_err(|_| io::Error::other("the kernel gave no io_uring"))?;
        Ok(DataThread { jobs, ended: Mutex::new(ended) })
    }

    fn stop(&self, save: Vec<Arc<Pack>>, deadline: Duration) -> bool {
        // A thread that was stopped before refuses the job and has ended.
        let _ = self.jobs.send(Job::Stop(save));
        self.ended.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(deadline) == Err(sync::RecvTimeoutError::Disconnected)
    }
}

impl Source {
    fn local_table(&self, digest: &Digest) -> Option<PackTable> {
        let (footer, unit_table) = self.cache.tables(digest)?;
        PackTable::parse_footer(digest, &footer).and_then(|footer| PackTable::parse(footer, &unit_table)).ok()
    }

    /// A pack's tables, verified: the local copy, or else the store's.
    fn table(&self, digest: &Digest) -> Result<PackTable, ServeError> {
        if let Some(table) = self.local_table(digest) {
            return Ok(table);
        }
        let unread = |source| ServeError::Read { pack: *digest, source };
        let file = self.store.open_file(&Name::Pack(*digest)).map_err(|source| ServeError::Open { pack: *digest, source })?;
        let len = file.metadata().map_err(unread)?.len();
        let mut footer_bytes = vec![0; FOOTER_LEN as usize];
        let footer_at = len.checked_sub(FOOTER_LEN).ok_or_else(|| unread(io::ErrorKind::UnexpectedEof.into()))?;
        file.read_exact_at(&mut footer_bytes, footer_at).map_err(unread)?;
        let footer = PackTable::parse_footer(digest, &footer_bytes)?;
        let (offset, len) = footer.unit_table();
        let mut unit_table = vec![0; len];
        file.read_exact_at(&mut unit_table, offset).map_err(unread)?;
        let table = PackTable::parse(footer, &unit_table)?;
        self.cache.keep_tables(digest, &footer_bytes, &unit_table)?;
        Ok(table)
    }
}

fn changed(packs: &HashMap<Digest, Arc<Pack>>) -> Vec<Arc<Pack>> {
    packs.values().filter(|pack| pack.units().has_changed()).cloned().collect()
}

/// Ends when the sender of `stop` is dropped.
fn save_now_and_then(packs: &Mutex<HashMap<Digest, Arc<Pack>>>, jobs: &mpsc::UnboundedSender<Job>, stop: &sync::Receiver<()>) {
    while let Err(sync::RecvTimeoutError::Timeout) = stop.recv_timeout(SAVE_INTERVAL) {
        let packs = changed(&packs.lock().unwrap_or_else(PoisonError::into_inner));
        let (done, saved) = sync::channel();
        if !packs.is_empty() && jobs.send(Job::Save(packs, done)).is_ok() {
            // One save at a time; an error just means that the data thread is gone.
            let _ = saved.recv();
        }
    }
}

#[cfg(test)]
mod tests;
