//! Questions to the store, asked by few threads on behalf of many callers with deadlines (invariant 3).
//!
//! A question about a chain is a *flight*: whoever asks while it is under way waits for the same one, up to their own deadline; the
//! flight goes on without them, for the next who asks. At most [`MAX_THREADS`] flights are in the air, others queue: a store that
//! hangs holds those threads and nothing else.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::catalog::CatalogError;
use super::lock;
use crate::oci::ChainId;
use crate::store::Payload;

/// Threads that may be stuck in the store at once. A few, so that one slow answer does not hold up the others.
const MAX_THREADS: usize = 4;

/// Flights that may wait for a thread. A pull asks for its layers one after the other; a full queue is a store that hangs.
const MAX_QUEUED: usize = 256;

/// How long a hit is remembered. Garbage collection of a store waits this out between a tombstone and the next step; a re-check costs
/// one directory listing, one small read and a look at each pack.
const HIT_LIFETIME: Duration = Duration::from_secs(60);

/// What a flight brings home.
pub(super) type Outcome = Result<Arc<Payload>, CatalogError>;

/// The flights of one catalog. Dropping it ends its threads as soon as the store lets go of them.
#[derive(Debug)]
pub(super) struct Flights {
    tower: Arc<Tower>,
}

/// What threads and callers share.
struct Tower {
    /// Asks the store. Runs on the tower's threads only.
    fetch: Box<dyn Fn(&ChainId) -> Outcome + Send + Sync>,
    /// Never held during I/O of any kind.
    desk: Mutex<Desk>,
    /// Wakes idle threads.
    work: Condvar,
}

impl fmt::Debug for Tower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&lock(&self.desk), f)
    }
}

#[derive(Debug, Default)]
struct Desk {
    hits: HashMap<ChainId, (Arc<Payload>, Instant)>,
    flights: HashMap<ChainId, Arc<Flight>>,
    queue: VecDeque<ChainId>,
    threads: usize,
    idle: usize,
    closed: bool,
}

#[derive(Debug, Default)]
struct Flight {
    outcome: Mutex<Option<Outcome>>,
    landed: Condvar,
}

impl Flight {
    fn wait(&self, deadline: Instant) -> Option<Outcome> {
        let mut outcome = lock(&self.outcome);
        loop {
            if let Some(outcome) = &*outcome {
                return Some(outcome.clone());
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            outcome = self.landed.wait_timeout(outcome, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Flights {
    /// Nothing asked yet, no thread started. `fetch` asks the store about a chain; it may take for ever.
    pub fn new(fetch: impl Fn(&ChainId) -> Outcome + Send + Sync + 'static) -> Flights {
        Flights { tower: Arc::new(Tower { fetch: Box::new(fetch), desk: Mutex::default(), work: Condvar::new() }) }
    }

    /// What is known of `chain`: a hit of the last minute, else what its flight brings. `None`: it has not come home by `deadline`, or
    /// too many are waiting.
    pub fn ask(&self, chain: &ChainId, deadline: Instant) -> Option<Outcome> {
        let flight = {
            let mut desk = lock(&self.tower.desk);
            if let Some((payload, since)) = desk.hits.get(chain)
                && since.elapsed() < HIT_LIFETIME
            {
                return Some(Ok(payload.clone()));
            }
            self.tower.flight(&mut desk, chain)?
        };
        flight.wait(deadline)
    }

    /// The same, whatever is remembered.
    pub fn ask_anew(&self, chain: &ChainId, deadline: Instant) -> Option<Outcome> {
        let flight = self.tower.flight(&mut lock(&self.tower.desk), chain)?;
        flight.wait(deadline)
    }

    /// The last hit, however old.
    pub fn last_hit(&self, chain: &ChainId) -> Option<Arc<Payload>> {
        lock(&self.tower.desk).hits.get(chain).map(|(payload, _)| payload.clone())
    }

    /// How many threads there are.
    #[cfg(test)]
    pub fn threads(&self) -> usize {
        lock(&self.tower.desk).threads
    }
}

impl Drop for Flights {
    fn drop(&mut self) {
        lock(&self.tower.desk).closed = true;
        self.tower.work.notify_all();
    }
}

impl Tower {
    /// Joins or starts the chain's flight.
    fn flight(self: &Arc<Self>, desk: &mut Desk, chain: &ChainId) -> Option<Arc<Flight>> {
        if let Some(flight) = desk.flights.get(chain) {
            return Some(flight.clone());
        }
        if desk.queue.len() >= MAX_QUEUED {
            tracing::warn!(%chain, "the store hangs and too many questions wait for it");
            return None;
        }
        if desk.idle <= desk.queue.len() && desk.threads < MAX_THREADS {
            let tower = self.clone();
            match std::thread::Builder::new().name("catalog".to_owned()).spawn(move || tower.run()) {
                Ok(_) => desk.threads += 1,
                Err(error) if desk.threads == 0 => {
                    tracing::error!(%error, "no thread for the store can be started");
                    return None;
                }
                // Another takes the flight when it is free.
                Err(_) => {}
            }
        }
        let flight = Arc::new(Flight::default());
        desk.flights.insert(*chain, flight.clone());
        desk.queue.push_back(*chain);
        self.work.notify_one();
        Some(flight)
    }

    /// A thread's life.
    fn run(&self) {
        while let Some((chain, flight)) = self.next() {
            let mut landing = Landing { tower: self, chain, flight, outcome: None };
            landing.outcome = Some((self.fetch)(&chain));
        }
    }

    /// The next flight, or `None` when nobody can ask any more.
    fn next(&self) -> Option<(ChainId, Arc<Flight>)> {
        let mut desk = lock(&self.desk);
        loop {
            if desk.closed {
                desk.threads -= 1;
                return None;
            }
            if let Some(chain) = desk.queue.pop_front() {
                let flight = desk.flights.get(&chain).expect("a queued chain has its flight").clone();
                return Some((chain, flight));
            }
            desk.idle += 1;
            desk = self.work.wait(desk).unwrap_or_else(PoisonError::into_inner);
            desk.idle -= 1;
        }
    }
}

/// Lands a flight however its fetch ends, a panic included: nobody waits for a flight that is over.
struct Landing<'a> {
    tower: &'a Tower,
    chain: ChainId,
    flight: Arc<Flight>,
    /// `None` when the fetch panicked.
    outcome: Option<Outcome>,
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        let outcome = self.outcome.take().unwrap_or(Err(CatalogError::Panicked { chain: self.chain }));
        let mut desk = lock(&self.tower.desk);
        desk.flights.remove(&self.chain);
        // Only hits are remembered; a chain the store no longer has is forgotten, so that its next question is a miss at once.
        match &outcome {
            Ok(payload) => drop(desk.hits.insert(self.chain, (payload.clone(), Instant::now()))),
            Err(_) => drop(desk.hits.remove(&self.chain)),
        }
        if std::thread::panicking() {
            desk.threads -= 1;
        }
        drop(desk);
        *lock(&self.flight.outcome) = Some(outcome);
        self.flight.landed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    use std::sync::mpsc;

    use super::*;
    use crate::oci::Sha256;

    fn chain(i: usize) -> ChainId {
        ChainId(Sha256::of(&i.to_le_bytes()))
    }

    fn miss(chain: &ChainId) -> Outcome {
        Err(CatalogError::Slow { chain: *chain, store: "/store".into() })
    }

    fn patient() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn a_store_that_hangs_holds_few_threads_and_a_bounded_queue() {
        let (release, held) = mpsc::channel::<()>();
        let held = Mutex::new(held);
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let flights = Flights::new(move |chain| {
            count.fetch_add(1, SeqCst);
            // Until the sender is gone: one thread waits for it, the others for the lock.
            let _ = lock(&held).recv();
            miss(chain)
        });
        for i in 0..MAX_THREADS + MAX_QUEUED + 10 {
            assert!(flights.ask(&chain(i), Instant::now()).is_none());
            // A thread that has not yet taken its flight leaves it in the queue: wait until those that can have done so.
            while asked.load(SeqCst) < MAX_THREADS.min(i + 1) {
                std::thread::yield_now();
            }
        }
        assert_eq!((flights.threads(), lock(&flights.tower.desk).queue.len()), (MAX_THREADS, MAX_QUEUED));
        assert_eq!(asked.load(SeqCst), MAX_THREADS);
        drop(release);
        assert!(flights.ask(&chain(0), patient()).is_some_and(|outcome| outcome.is_err()), "it answers again when the store does");
    }

    #[test]
    fn a_fetch_that_panics_is_a_miss_and_the_next_is_asked() {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let flights = Flights::new(move |chain| match count.fetch_add(1, SeqCst) {
            0..MAX_THREADS => panic!("a bug, for this test"),
            _ => miss(chain),
        });
        for i in 0..MAX_THREADS {
            assert!(matches!(flights.ask(&chain(i), patient()), Some(Err(CatalogError::Panicked { .. }))));
        }
        assert!(matches!(flights.ask(&chain(0), patient()), Some(Err(CatalogError::Slow { .. }))));
    }

    #[test]
    fn threads_end_with_the_flights() {
        let (sender, receiver) = mpsc::channel::<()>();
        let flights = Flights::new(move |chain| {
            // Owned by the closure, which goes when the last thread has let go of it.
            let _ = &sender;
            miss(chain)
        });
        assert!(flights.ask(&chain(0), patient()).is_some());
        drop(flights);
        assert_eq!(receiver.recv_timeout(Duration::from_secs(60)), Err(mpsc::RecvTimeoutError::Disconnected));
    }
}
