//! Threads that compute: decompression and verification of units, away from the threads that wait for I/O.
//!
//! A data thread that decoded would hold back every read and answer queued behind it (its ring is only submitted to when it has nothing
//! else to do). So data threads own I/O and decoders own the CPU: what readers wait for first, what is fetched ahead after it.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::thread;

use crossbeam_channel::{Receiver, Sender, TryRecvError, select, unbounded};
use tokio::sync::oneshot;
use uapi::buffer::{Buffer, Pool, Shared};

use crate::cache::{Pack, UnitIndex, Verified};
use crate::kernel::vital::Vital;

/// Who waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// A reader.
    Demand,
    /// Nobody yet.
    Ahead,
}

/// Bytes to be verified.
pub enum Input {
    /// As the store gave them: this part of a run.
    Stored(Shared, Range<usize>),
    /// As the local file gave them.
    Local(Buffer),
}

struct Work {
    pack: Arc<Pack>,
    unit: UnitIndex,
    input: Input,
    done: oneshot::Sender<Option<Verified>>,
}

/// Hands work to the decoders. They end when the last clone is dropped.
#[derive(Clone)]
pub struct Decoders {
    demand: Sender<Work>,
    ahead: Sender<Work>,
}

impl Decoders {
    /// Starts `count` decoders, which take the memory of decoded units from `pool`.
    pub fn start(count: usize, pool: &Arc<Pool>) -> io::Result<Decoders> {
        // Unbounded, as what is in them is bounded: by the kernel's outstanding requests and by the look-ahead budget.
        let (demand, demanded) = unbounded();
        let (ahead, wanted_ahead) = unbounded();
        for number in 0..count {
            let (demanded, wanted_ahead, pool) = (demanded.clone(), wanted_ahead.clone(), Arc::clone(pool));
            thread::Builder::new().name(format!("decode-{number}")).spawn(move || run(&demanded, &wanted_ahead, &pool))?;
        }
        Ok(Decoders { demand, ahead })
    }

    /// Verifies one unit. `None` if the bytes are not the unit's.
    pub async fn verify(&self, pack: &Arc<Pack>, unit: UnitIndex, input: Input, urgency: Urgency) -> Option<Verified> {
        let (done, verified) = oneshot::channel();
        let queue = match urgency {
            Urgency::Demand => &self.demand,
            Urgency::Ahead => &self.ahead,
        };
        // Decoders end only after the last sender, which this is not.
        let _ = queue.send(Work { pack: Arc::clone(pack), unit, input, done });
        verified.await.ok().flatten()
    }
}

fn run(demanded: &Receiver<Work>, wanted_ahead: &Receiver<Work>, pool: &Arc<Pool>) {
    let _vital = Vital::thread("decoding units");
    while let Some(work) = next(demanded, wanted_ahead) {
        let Work { pack, unit, input, done } = work;
        if done.is_closed() {
            continue;
        }
        let verified = match input {
            Input::Stored(run, range) => {
                Verified::decode(pack.table(), unit, &run[range], pool.get(pack.unit_len(unit))).inspect_err(|damage| {
                    tracing::warn!(pack = %pack.digest(), unit = unit.0, error = %damage, "a unit from the store is damaged");
                })
            }
            .ok(),
            Input::Local(bytes) => Verified::check(pack.table(), unit, bytes),
        };
        // An asker that gave up does not matter.
        let _ = done.send(verified);
    }
}

/// The most urgent work, or `None` at the end.
fn next(demanded: &Receiver<Work>, wanted_ahead: &Receiver<Work>) -> Option<Work> {
    match demanded.try_recv() {
        Ok(work) => Some(work),
        Err(TryRecvError::Disconnected) => wanted_ahead.recv().ok(),
        Err(TryRecvError::Empty) => select! {
            recv(demanded) -> work => work.ok().or_else(|| wanted_ahead.recv().ok()),
            recv(wanted_ahead) -> work => work.ok().or_else(|| demanded.recv().ok()),
        },
    }
}
