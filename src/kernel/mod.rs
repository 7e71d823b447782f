//! Ways to get the kernel's read requests: what an [`Ask`] is, and who answers it.
//!
//! Each backend is one file and knows nothing of the others. It turns the kernel's messages into asks, hands them to a [`Serve`], and
//! gets each answered exactly once through its [`Channel`] (invariant 8).

pub mod fake;
pub mod fscache;
pub mod fuse_blob;
pub mod vital;

use std::io::IoSlice;
use std::sync::Arc;
use std::time::Instant;

pub use uapi::fuse::Errno;

use crate::cache::{Pack, UnitIndex};
use crate::metrics::Metrics;

pub use crate::cache::Wants;

/// A backend's number of an ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AskId(pub u64);

/// A backend's way to answer.
pub trait Channel: Send + Sync {
    /// What must be there before an ask may be answered with success.
    fn wants(&self) -> Wants;

    /// Answers the ask `id`: with the bytes asked for, in parts, or (for [`Wants::Stored`]) with no parts after the write of those bytes
    /// returned; or with an error. Called exactly once per ask, from any thread; must not block.
    fn answer(&self, id: AskId, result: Result<&[IoSlice<'_>], Errno>);
}

/// What serves asks: `serve::Engine`, seen from below.
pub trait Serve: Send + Sync {
    /// Answers the ask sometime. Never blocks.
    fn submit(&self, ask: Ask);

    /// A reader touched a marked unit: time to fetch further. Never blocks.
    fn look_ahead(&self, pack: &Arc<Pack>, unit: UnitIndex);

    /// A pack's file was closed by the one who opened it: nothing of it is to be kept open. Never blocks.
    fn forget(&self, pack: &Arc<Pack>);

    /// Where to count.
    fn metrics(&self) -> &Arc<Metrics>;
}

/// A read request of the kernel: `len` bytes from `offset` of a pack's uncompressed space. It must be answered; dropping it unanswered
/// answers EIO, counts, and in debug builds panics.
#[must_use]
pub struct Ask {
    pack: Arc<Pack>,
    offset: u64,
    len: u32,
    reply: Reply,
}

struct Reply {
    id: AskId,
    channel: Arc<dyn Channel>,
    metrics: Arc<Metrics>,
    asked: Instant,
    answered: bool,
}

impl Ask {
    /// An ask that will be answered through `channel`.
    pub fn new(pack: Arc<Pack>, offset: u64, len: u32, id: AskId, channel: Arc<dyn Channel>, metrics: Arc<Metrics>) -> Ask {
        metrics.asks.bump();
        Ask { pack, offset, len, reply: Reply { id, channel, metrics, asked: Instant::now(), answered: false } }
    }

    /// The pack.
    pub fn pack(&self) -> &Arc<Pack> {
        &self.pack
    }

    /// First byte asked for.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Number of bytes asked for.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether nothing is asked for.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The backend's number, for log lines.
    pub fn id(&self) -> AskId {
        self.reply.id
    }

    /// What must be there before [`Ask::answer`] with success.
    pub fn wants(&self) -> Wants {
        self.reply.channel.wants()
    }

    /// Answers: see [`Channel::answer`].
    pub fn answer(mut self, result: Result<&[IoSlice<'_>], Errno>) {
        self.reply.answered = true;
        if result.is_err() {
            self.reply.metrics.asks_failed.bump();
        }
        self.reply.channel.answer(self.reply.id, result);
        self.reply.metrics.ask_time.observe(self.reply.asked.elapsed());
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        self.metrics.asks_dropped.bump();
        self.channel.answer(self.id, Err(Errno::IO));
        if !std::thread::panicking() {
            debug_assert!(false, "ask {} was dropped unanswered", self.id.0);
        }
    }
}
