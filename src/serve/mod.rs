//! From asks to answers: whole units are claimed, fetched in runs, verified, answered and stored.

use std::path::PathBuf;
use std::sync::Arc;

use erofs::digest::Digest;

use crate::cache::{Pack, UnitIndex};
use crate::kernel::{Ask, Serve};
use crate::metrics::Metrics;

/// What an engine works with.
pub struct EngineOptions {
    /// The store's directory. It need not be reachable yet.
    pub store_dir: PathBuf,
    /// The cache's directory; made if it is not there.
    pub cache_dir: PathBuf,
    /// Threads with a ring of their own; 0 for one per two CPUs.
    pub data_threads: usize,
    /// Where to count.
    pub metrics: Arc<Metrics>,
}

/// A pack cannot be had, or the engine cannot start.
#[derive(Debug, thiserror::Error)]
#[error("to come")]
pub struct ServeError;

/// The data path of one worker.
pub struct Engine {}

#[allow(clippy::todo, unused_variables)]
impl Engine {
    /// Starts the data threads. Does not touch the store.
    pub fn start(options: EngineOptions) -> Result<Arc<Engine>, ServeError> {
        todo!()
    }

    /// The pack of this name, ready to be attached to a backend. Reads footer and unit table from the local copy, or else from the store:
    /// blocking, so not for a gRPC handler. The same value for as long as the engine lives.
    pub fn pack(&self, digest: &Digest) -> Result<Arc<Pack>, ServeError> {
        todo!()
    }

    /// Whether every unit of the pack is in `serve/<digest>` and durable, so that the file can be mounted directly.
    pub fn is_complete(&self, pack: &Pack) -> bool {
        todo!()
    }

    /// `<cache>/serve/<digest>`: the local file with the pack's uncompressed bytes.
    pub fn local_file(&self, pack: &Digest) -> PathBuf {
        todo!()
    }

    /// Makes everything stored so far durable and its presence known to the next worker. Blocks.
    pub fn flush(&self) {
        todo!()
    }

    /// Answers what is under way, flushes, and ends the data threads. Asks that come later are answered EIO.
    pub fn stop(&self) {
        todo!()
    }
}

#[allow(clippy::todo, unused_variables)]
impl Serve for Engine {
    fn submit(&self, ask: Ask) {
        todo!()
    }

    fn look_ahead(&self, pack: &Arc<Pack>, unit: UnitIndex) {
        todo!()
    }

    fn metrics(&self) -> &Arc<Metrics> {
        todo!()
    }
}
