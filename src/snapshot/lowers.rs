//! Images as lower layers: asked for with deadlines, mounted while something in the ledger needs them, released after.
//!
//! What touches an image may wait for the store, so it runs on threads for blocking work and a request waits for it only so long
//! (invariant 3). Work on one chain takes turns: between "nobody uses it" and the unmount no new user can get its mount.

use std::collections::HashMap;
use std::error::Error;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::ledger::Ledger;
use crate::image::{Images, NotKnown};
use crate::oci::ChainId;

/// Invariant 3: how long the question "is this chain there?" may take. A pull asks it once per layer, one after the other, so it is felt; a
/// store on a network answers in milliseconds, and what takes longer is a plain pull.
const KNOWN_DEADLINE: Duration = Duration::from_millis(300);
/// The same where a miss is a failed pull. The first look of a cold node has a share to mount, names to look up and a metadata image of perhaps
/// some hundred MB to read, which takes seconds; a pull has no deadline so short, and who waits here in vain tries again.
const PATIENT_DEADLINE: Duration = Duration::from_secs(20);
/// After these, for a thread that does not come to run at all.
const GRACE: Duration = Duration::from_millis(200);
/// Patient questions at the same time. Of the same threads as [`MOUNTS_AT_ONCE`]; the catalog asks the store by few threads of its own.
const PATIENT_AT_ONCE: usize = 64;
/// A container start waits this long for its image to be mounted. Kubelet gives a whole request 2 minutes (`--runtime-request-timeout`).
const MOUNT_DEADLINE: Duration = Duration::from_secs(60);
/// Mounts that may hang at the same time. The runtime has 512 threads for blocking work, so the ledger's work always finds one.
const MOUNTS_AT_ONCE: usize = 64;

/// Images that can be mounted: all that the snapshotter knows of [`Images`]. Every method may block. A trait because one race, a removal
/// between two steps of another request, is tested by holding a stand-in still at that step; everything else is tested with [`Images`].
pub trait LowerImages: Send + Sync + 'static {
    /// Whether the image of `chain` can be mounted from now on, whatever happens to the store. Answers by `deadline`; no answer is a no.
    fn known(&self, chain: &ChainId, deadline: std::time::Instant) -> Result<(), NotKnown>;
    /// Mounts the image and returns where; the same place again while it is mounted.
    fn mount(&self, chain: &ChainId) -> Result<PathBuf, Box<dyn Error + Send + Sync>>;
    /// The last user of the image's mount is gone.
    fn release(&self, chain: &ChainId);
    /// Called once before anything else, with the chains that are in use from before. Must not wait for the store.
    fn recover(&self, in_use: Vec<ChainId>);
}

impl LowerImages for Images {
    fn known(&self, chain: &ChainId, deadline: std::time::Instant) -> Result<(), NotKnown> {
        Images::known(self, chain, deadline)
    }

    fn mount(&self, chain: &ChainId) -> Result<PathBuf, Box<dyn Error + Send + Sync>> {
        Ok(Images::mount(self, chain)?)
    }

    fn release(&self, chain: &ChainId) {
        Images::release(self, chain);
    }

    fn recover(&self, in_use: Vec<ChainId>) {
        Images::recover(self, in_use);
    }
}

/// The image is not mounted, now. The same request may work later.
#[derive(Debug, thiserror::Error)]
pub enum LowerError {
    /// The attempt failed.
    #[error("the image of chain {chain} cannot be mounted")]
    Failed {
        /// Whose image.
        chain: ChainId,
        /// Why, with what to do.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The attempt has not come to an end, or could not begin.
    #[error("the image of chain {chain} is not mounted after {} s: the store may not answer; the next attempt goes on from here", MOUNT_DEADLINE.as_secs())]
    TimedOut {
        /// Whose image.
        chain: ChainId,
    },
}

/// Images with the ledger's knowledge of who uses them.
pub struct Lowers {
    images: Arc<dyn LowerImages>,
    ledger: Arc<Ledger>,
    turns: Mutex<HashMap<ChainId, Arc<tokio::sync::Mutex<()>>>>,
    slots: Arc<Semaphore>,
    patient: Arc<Semaphore>,
}

impl Lowers {
    /// `ledger` says who uses what.
    pub fn new(images: Arc<dyn LowerImages>, ledger: Arc<Ledger>) -> Lowers {
        let [slots, patient] = [MOUNTS_AT_ONCE, PATIENT_AT_ONCE].map(|many| Arc::new(Semaphore::new(many)));
        Lowers { images, ledger, turns: Mutex::default(), slots, patient }
    }

    /// Whether a lazy snapshot of `chain` may be committed. Anything but a clear yes is a no (invariant 4).
    pub async fn known(&self, chain: ChainId) -> Result<(), NotKnown> {
        self.ask(chain, Instant::now() + KNOWN_DEADLINE, None).await
    }

    /// The same, for who has no plain pull to turn to.
    pub async fn known_in_patience(&self, chain: ChainId) -> Result<(), NotKnown> {
        let deadline = Instant::now() + PATIENT_DEADLINE;
        match timeout_at(deadline, self.patient.clone().acquire_owned()).await {
            Ok(Ok(slot)) => self.ask(chain, deadline, Some(slot)).await,
            _ => Err(NotKnown::Missed),
        }
    }

    async fn ask(&self, chain: ChainId, deadline: Instant, slot: Option<OwnedSemaphorePermit>) -> Result<(), NotKnown> {
        let images = self.images.clone();
        let answer = tokio::task::spawn_blocking(move || {
            let _held_until_done = slot;
            images.known(&chain, deadline.into_std())
        });
        match timeout_at(deadline + GRACE, answer).await {
            Ok(Ok(answer)) => answer,
            _ => Err(NotKnown::Missed),
        }
    }

    /// Mounts the image of `chain` for a snapshot that is in the ledger already, so that it counts as a user.
    pub async fn mount(&self, chain: ChainId) -> Result<PathBuf, LowerError> {
        let deadline = Instant::now() + MOUNT_DEADLINE;
        let late = |_| LowerError::TimedOut { chain };
        // The turn first: those who wait for one hanging image must not take the slots of others.
        let turn = timeout_at(deadline, self.turn(chain)).await.map_err(late)?;
        let slot = timeout_at(deadline, self.slots.clone().acquire_owned()).await.map_err(late)?;
        let images = self.images.clone();
        let mounting = tokio::task::spawn_blocking(move || {
            let _held_until_done = (turn, slot);
            images.mount(&chain)
        });
        let outcome = timeout_at(deadline, mounting).await.map_err(late)?;
        let failed = |source| LowerError::Failed { chain, source };
        outcome.map_err(|panicked| failed(panicked.into()))?.map_err(failed)
    }

    /// A snapshot that used the image of `chain` is gone from the ledger: releases the image, in the background, if that was the last one.
    pub fn release_if_unused(self: &Arc<Lowers>, chain: ChainId) {
        let lowers = self.clone();
        tokio::spawn(async move {
            let turn = lowers.turn(chain).await;
            let released = tokio::task::spawn_blocking(move || {
                let _held_until_done = turn;
                match lowers.ledger.has_users(&chain) {
                    Ok(false) => lowers.images.release(&chain),
                    Ok(true) => {}
                    // Unknown counts as in use (invariant 7).
                    Err(error) => tracing::warn!(%chain, %error, "image stays mounted: its users could not be counted"),
                }
            });
            if let Err(error) = released.await {
                tracing::error!(%chain, %error, "releasing an image failed");
            }
        });
    }

    async fn turn(&self, chain: ChainId) -> OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.turns.lock().expect("nothing panics while it holds this lock");
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            turns.entry(chain).or_default().clone()
        };
        turn.lock_owned().await
    }
}
