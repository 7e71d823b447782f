//! One data thread: takes jobs, owns store reads and cache writes, answers.
//!
//! Everything here runs on one thread and never computes or blocks: I/O goes to the ring, verification to the decoders. A unit goes
//! claim → store read → verify → bytes to those who want bytes → cache write → those who want it stored; each step frees its guard on
//! every way out.

use std::cell::Cell;
use std::io::IoSlice;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::spawn_local;
use tokio::time::timeout;
use uapi::buffer::{Buffer, Pool, Shared};
use uapi::fuse::Errno;

use super::decode::{Decoders, Input, Urgency};
use super::plan::{self, Run};
use super::{Job, Limits};
use crate::cache::ahead::Window;
use crate::cache::claim::Unfilled;
use crate::cache::disk::Disk;
use crate::cache::presence::encode;
use crate::cache::{Claim, Fill, Pack, PackFile, UnitIndex, Verified, Wait, Wants};
use crate::kernel::Ask;
use crate::metrics::Metrics;
use crate::store::chunks::{ChunkError, ChunkStore};

/// Bytes fetched ahead of readers that one data thread has under way: two largest windows, each for a few readers. Beyond it nothing more
/// is fetched ahead, so that look-ahead can use up neither memory nor the store.
const AHEAD_BUDGET: u64 = 32 << 20;

/// Pauses between attempts at a store read that failed or brought damaged units: a dropped connection or a server's restart of its
/// service is bridged, while a pack that is really damaged or gone gives EIO within a second.
const RETRY_PAUSES: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(400)];

/// What a data thread works with.
pub struct Data<S, D> {
    pub store: Rc<S>,
    pub disk: D,
    pub decoders: Decoders,
    pub pool: Arc<Pool>,
    /// Store reads under way: see [`Limits::store_reads`].
    pub reads: Arc<Semaphore>,
    /// Those among them that nobody waits for yet: fewer, so that a reader never queues behind look-ahead alone.
    pub ahead_reads: Arc<Semaphore>,
    /// Bytes being fetched ahead.
    pub ahead: Cell<u64>,
    pub limits: Limits,
    pub metrics: Arc<Metrics>,
    pub store_warnings: Seldom,
    pub cache_warnings: Seldom,
}

/// Keeps one kind of log line from filling the disk while a store is away or a cache is full.
#[derive(Default)]
pub struct Seldom(Cell<Option<Instant>>);

impl Seldom {
    /// Whether the line may be written now: at most one per ten seconds and thread, as the counters have the numbers.
    fn now(&self) -> bool {
        let due = self.0.get().is_none_or(|last| last.elapsed() > Duration::from_secs(10));
        if due {
            self.0.set(Some(Instant::now()));
        }
        due
    }
}

/// Held by every task: when the last is gone, so is all work.
type Alive = mpsc::Sender<()>;

/// One piece of an answer: these bytes of that unit (or of what was read of it).
struct Part {
    bytes: Shared,
    range: Range<usize>,
}

impl<S: ChunkStore + 'static, D: Disk + 'static> Data<S, D> {
    /// Does jobs until told to stop, then finishes what is under way. Asks that come too late are answered EIO.
    pub async fn run(self: Rc<Self>, mut jobs: mpsc::UnboundedReceiver<Job>) {
        let (alive, mut all_done) = mpsc::channel(1);
        let mut save_last = Vec::new();
        while let Some(job) = jobs.recv().await {
            match job {
                Job::Ask(ask) => self.spawn(&alive, Self::answer(Rc::clone(&self), ask, alive.clone())),
                Job::LookAhead(pack, unit) => self.look_ahead(&pack, unit, &alive),
                Job::Save(packs, done) => {
                    let data = Rc::clone(&self);
                    self.spawn(&alive, async move {
                        data.save_all(&packs).await;
                        // Whoever asked may have gone.
                        let _ = done.send(());
                    });
                }
                Job::Forget(pack) => {
                    self.disk.forget(pack.id());
                    self.store.forget(&pack.digest());
                }
                Job::Stop(packs) => {
                    save_last = packs;
                    jobs.close();
                }
            }
        }
        drop(alive);
        let _ = all_done.recv().await;
        self.save_all(&save_last).await;
    }

    fn spawn(&self, alive: &Alive, task: impl Future<Output = ()> + 'static) {
        let alive = alive.clone();
        spawn_local(async move {
            task.await;
            drop(alive);
        });
    }

    /// One ask, from claim to answer.
    async fn answer(self: Rc<Self>, ask: Ask, alive: Alive) {
        let Some(units) = ask.pack().units_in(ask.offset(), ask.len()) else {
            tracing::error!(ask = ask.id().0, offset = ask.offset(), len = ask.len(), "the kernel asked for bytes outside the pack");
            ask.answer(Err(Errno::INVAL));
            return;
        };
        match timeout(self.limits.deadline, self.gather(&ask, units, &alive)).await {
            Ok(Ok(parts)) => {
                let slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(&part.bytes[part.range.clone()])).collect();
                let bytes_wanted = ask.wants() == Wants::Bytes;
                ask.answer(Ok(if bytes_wanted { &slices } else { &[] }));
            }
            Ok(Err(errno)) => ask.answer(Err(errno)),
            Err(_) => {
                let pack = ask.pack().digest();
                tracing::error!(ask = ask.id().0, %pack, offset = ask.offset(), len = ask.len(), "no bytes within the deadline; check the store");
                ask.answer(Err(Errno::IO));
            }
        }
    }

    /// Gets every unit of an ask. Everything is claimed before anything is waited for, so that what is missing is fetched together.
    async fn gather(self: &Rc<Self>, ask: &Ask, units: Range<u32>, alive: &Alive) -> Result<Vec<Part>, Errno> {
        let pack = ask.pack();
        let mut fills = Vec::new();
        let mut claims = Vec::with_capacity(units.len());
        for unit in units.clone().map(UnitIndex) {
            if pack.units().take_mark(unit) {
                self.look_ahead(pack, unit, alive);
            }
            claims.push((unit, self.claim(pack, unit, ask.wants(), &mut fills)));
        }
        if !fills.is_empty() {
            let window = pack.streams().missed(&units);
            self.fetch(pack, fills, Urgency::Demand, alive);
            if let Some(window) = window {
                self.fetch_window(pack, window, alive);
            }
        }
        let mut parts = Vec::with_capacity(claims.len());
        for (unit, claim) in claims {
            let range = plan::part(pack, unit, ask.offset(), ask.len());
            let part = self.part(pack, unit, range, claim, ask.wants(), alive).await?;
            parts.extend(part);
        }
        Ok(parts)
    }

    /// A claim that is Ready or a wait; what is the caller's to fill goes to `fills`.
    fn claim(&self, pack: &Arc<Pack>, unit: UnitIndex, wants: Wants, fills: &mut Vec<Fill>) -> Option<Wait> {
        loop {
            match pack.claim(unit, wants) {
                Claim::Ready => return None,
                Claim::Wait(wait) => return Some(wait),
                Claim::Fill(fill) => fills.push(fill),
            }
        }
    }

    /// One unit's part of an answer, once it is there. `None` for what need not be read as the asker does not want bytes.
    async fn part(
        self: &Rc<Self>,
        pack: &Arc<Pack>,
        unit: UnitIndex,
        range: Range<usize>,
        mut wait: Option<Wait>,
        wants: Wants,
        alive: &Alive,
    ) -> Result<Option<Part>, Errno> {
        // A fill that was only ahead of readers, or whose filler went away, is no verdict on this ask: it tries once itself.
        for last in [false, true] {
            let outcome = match wait.take() {
                Some(wait) => wait.done().await.map(|verified| Some(Part { bytes: verified.bytes().clone(), range: range.clone() })),
                None if wants == Wants::Stored => Ok(None),
                None => self.read_ready(pack, unit, range.clone()).await.map(Some),
            };
            match outcome {
                Ok(part) => return Ok(part),
                Err(Unfilled::Failed(errno)) if last => return Err(errno),
                Err(Unfilled::Dropped) if last => return Err(Errno::IO),
                Err(_) => {
                    let mut fills = Vec::new();
                    wait = self.claim(pack, unit, wants, &mut fills);
                    self.fetch(pack, fills, Urgency::Demand, alive);
                }
            }
        }
        Err(Errno::IO)
    }

    /// Reads a part of a Ready unit from the local file. If that does not work the unit is no longer Ready.
    async fn read_ready(&self, pack: &Arc<Pack>, unit: UnitIndex, range: Range<usize>) -> Result<Part, Unfilled> {
        let offset = pack.unit_start(unit) + range.start as u64;
        match self.disk.read(pack, offset, self.pool.get(range.len())).await {
            Ok(buffer) => Ok(Part { range: 0..buffer.len(), bytes: buffer.share() }),
            Err(error) => {
                tracing::error!(pack = %pack.digest(), unit = unit.0, %error, "cannot read the cache; fetching again. Check the cache's disk");
                pack.units().lose(unit);
                Err(Unfilled::Dropped)
            }
        }
    }

    /// A reader arrived at a marked unit.
    fn look_ahead(self: &Rc<Self>, pack: &Arc<Pack>, unit: UnitIndex, alive: &Alive) {
        let window = pack.streams().touched(unit);
        if let Some(window) = window {
            self.fetch_window(pack, window, alive);
        }
    }

    fn fetch_window(self: &Rc<Self>, pack: &Arc<Pack>, Window(units): Window, alive: &Alive) {
        if self.ahead.get() >= AHEAD_BUDGET || pack.is_forgotten() {
            return;
        }
        pack.units().mark(UnitIndex(units.start));
        let fills = units.map(UnitIndex).filter_map(|unit| pack.claim_absent(unit)).collect();
        self.fetch(pack, fills, Urgency::Ahead, alive);
    }

    /// Starts filling: what an earlier process stored is checked, the rest comes from the store in as few reads as possible.
    fn fetch(self: &Rc<Self>, pack: &Arc<Pack>, fills: Vec<Fill>, urgency: Urgency, alive: &Alive) {
        let (cached, absent): (Vec<Fill>, Vec<Fill>) = fills.into_iter().partition(Fill::is_cached);
        for fill in cached {
            self.spawn(alive, Self::check(Rc::clone(self), fill, urgency));
        }
        let runs = plan::runs(pack.table(), absent.iter().map(Fill::unit));
        let mut absent = absent.into_iter();
        for run in runs {
            let fills = absent.by_ref().take(run.units.len()).collect();
            self.spawn(alive, Self::fetch_run(Rc::clone(self), Arc::clone(pack), run, fills, urgency));
        }
    }

    /// Checks a unit that an earlier process stored; if it is not right any more, fetches it.
    async fn check(self: Rc<Self>, mut fill: Fill, urgency: Urgency) {
        let (pack, unit) = (Arc::clone(fill.pack()), fill.unit());
        let read = self.disk.read(&pack, pack.unit_start(unit), self.pool.get(pack.unit_len(unit))).await;
        let verified = match read {
            Ok(bytes) => self.decoders.verify(&pack, unit, Input::Local(bytes), urgency).await,
            Err(_) => None,
        };
        if let Some(verified) = verified {
            fill.verified(&verified);
            fill.stored(verified);
            return;
        }
        tracing::error!(pack = %pack.digest(), unit = unit.0, "the cache lost or damaged a unit; fetching it again. Check the cache's disk");
        self.metrics.units_damaged.bump();
        fill.not_cached();
        let run = plan::runs(pack.table(), [unit]).into_iter().next().expect("a unit makes a run");
        Self::fetch_run(Rc::clone(&self), pack, run, vec![fill], urgency).await;
    }

    /// Fills the units of one run, trying again what did not come or came damaged.
    async fn fetch_run(self: Rc<Self>, pack: Arc<Pack>, run: Run, mut fills: Vec<Fill>, urgency: Urgency) {
        let ahead = if urgency == Urgency::Ahead { run.len as u64 } else { 0 };
        self.ahead.set(self.ahead.get() + ahead);
        self.metrics.fills.bump();
        let mut pauses = RETRY_PAUSES.into_iter();
        loop {
            match self.read_store(&pack, &run, urgency).await {
                Ok(stored) => {
                    let stored = stored.share();
                    let landed = fills.into_iter().map(|fill| self.land(fill, &run, &stored, urgency));
                    fills = join_all(landed).await.into_iter().flatten().collect();
                }
                Err(error) => {
                    if self.store_warnings.now() {
                        tracing::warn!(error = &error as &dyn std::error::Error, "store read failed");
                    }
                    if matches!(error, ReadError::Deadline { .. }) {
                        break;
                    }
                }
            }
            match pauses.next() {
                Some(pause) if !fills.is_empty() => tokio::time::sleep(pause).await,
                _ => break,
            }
        }
        self.ahead.set(self.ahead.get() - ahead);
        if !fills.is_empty() {
            let units = fills.iter().map(|fill| fill.unit().0).collect::<Vec<_>>();
            tracing::error!(pack = %pack.digest(), ?units, "units cannot be had from the store; their readers get EIO. Check the store");
            self.metrics.fills_failed.bump();
        }
        for fill in fills {
            fill.failed(Errno::IO);
        }
    }

    /// Verifies one unit of a run that has come, gives its bytes to those who wait, stores it. Gives the fill back if the bytes are wrong.
    async fn land(&self, fill: Fill, run: &Run, stored: &Shared, urgency: Urgency) -> Option<Fill> {
        let (pack, unit) = (Arc::clone(fill.pack()), fill.unit());
        let entry = pack.table().unit(unit.0)?;
        let start = (entry.offset - run.offset) as usize;
        let input = Input::Stored(stored.clone(), start..start + entry.stored_len as usize);
        let Some(verified) = self.decoders.verify(&pack, unit, input, urgency).await else {
            self.metrics.units_damaged.bump();
            return Some(fill);
        };
        fill.verified(&verified);
        match self.write(&pack, &verified).await {
            Ok(()) => {
                self.metrics.units_filled.bump();
                self.metrics.cache_bytes.add(verified.bytes().len() as u64);
                fill.stored(verified);
            }
            // Whoever wanted bytes has them already; the unit will be fetched again when someone asks again.
            Err(error) => {
                if self.cache_warnings.now() {
                    tracing::warn!(pack = %pack.digest(), unit = unit.0, %error, "cannot write to the cache; check its space and its disk");
                }
                fill.failed(Errno::IO);
            }
        }
        None
    }

    async fn write(&self, pack: &Pack, verified: &Verified) -> std::io::Result<()> {
        // Invariant 6: a bit never stands over bytes that are being replaced. (Only after the disk lost or damaged the unit.)
        if pack.units().is_saved(verified.unit()) {
            pack.units().not_saved();
            self.save(pack).await?;
        }
        self.disk.write(pack, verified).await
    }

    /// Reads a run, within the deadline.
    async fn read_store(&self, pack: &Arc<Pack>, run: &Run, urgency: Urgency) -> Result<Buffer, ReadError> {
        let started = Instant::now();
        let (store, digest, offset, buffer) = (Rc::clone(&self.store), pack.digest(), run.offset, self.pool.get(run.len));
        let (pack, reads, ahead_reads) = (Arc::clone(pack), Arc::clone(&self.reads), Arc::clone(&self.ahead_reads));
        let read = async move {
            let ahead = match urgency {
                Urgency::Demand => None,
                Urgency::Ahead => Some(ahead_reads.acquire_owned().await),
            };
            let permit = (ahead, reads.acquire_owned().await);
            // A task of its own: when the deadline passes, the read goes on in the kernel and its permit stays taken until it ends.
            let read = spawn_local(async move {
                let read = store.read(&digest, offset, buffer).await;
                if pack.is_forgotten() {
                    store.forget(&digest);
                }
                drop(permit);
                read
            });
            read.await
        };
        let buffer = match timeout(self.limits.deadline, read).await {
            Ok(Ok(read)) => read?,
            Ok(Err(_)) | Err(_) => return Err(ReadError::Deadline { pack: digest, offset }),
        };
        self.metrics.store_reads.bump();
        self.metrics.store_bytes.add(run.len as u64);
        self.metrics.store_read_time.observe(started.elapsed());
        Ok(buffer)
    }

    async fn save_all(&self, packs: &[Arc<Pack>]) {
        for pack in packs {
            // Said in the log; tried again at the next save.
            let _ = self.save(pack).await;
        }
    }

    /// Makes what is stored of a pack durable, then says so in its map (invariant 6).
    async fn save(&self, pack: &Pack) -> std::io::Result<()> {
        if matches!(pack.file(), PackFile::Kernel { .. }) {
            return Ok(());
        }
        let _one_at_a_time = pack.units().saving().await;
        let Some(map) = pack.units().to_save() else { return Ok(()) };
        if let Err(error) = self.disk.sync(pack).await {
            tracing::warn!(pack = %pack.digest(), %error, "the cache's disk did not take what was written; it is fetched again when asked for. Check the disk");
            // Invariants 1 and 6: the next sync would succeed, and say nothing about this data.
            pack.units().lose_unsaved();
            return Err(error);
        }
        let (offset, slot) = encode(&pack.digest(), &map);
        if let Err(error) = self.disk.write_map(pack, offset, slot).await {
            tracing::warn!(pack = %pack.digest(), %error, "cannot save what is cached; it would be fetched again after a restart");
            pack.units().not_saved();
            return Err(error);
        }
        pack.units().saved(map);
        Ok(())
    }
}

/// A run did not come.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error(transparent)]
    Store(#[from] ChunkError),
    #[error("the store did not give bytes at {offset} of pack {pack} within the deadline; check the store's server and network")]
    Deadline { pack: erofs::digest::Digest, offset: u64 },
}
