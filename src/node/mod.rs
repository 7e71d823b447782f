//! The two processes of the daemon.
//!
//! ```text
//!   service manager ──starts──> holder ──starts, watches, restarts──> worker
//!        keeps copies of fds <──  owns /dev/fuse, /dev/cachefiles,     does everything else,
//!                                 the gRPC listening socket            may be killed at any moment
//! ```
//!
//! *The [`holder`]* keeps descriptors whose last close would end mounts or connections. It has one thread, never touches the shared store, and
//! restarts the worker as soon as it dies. *The [`worker`]* is handed every kept descriptor before anything else, continues what its
//! predecessor left, and gives descriptors it makes to the holder before anything depends on them. They speak [`protocol`] over a socket pair
//! whose end means that the other is gone.
//!
//! Who dies, and what readers see: worker — they wait for the next one; holder — the worker is killed with it, and unless the service manager
//! kept copies of the descriptors ([`kept`]), reads of data that is not cached give EIO (invariant 1). Stopping the daemon leaves mounts in place.

pub mod protocol;
pub mod kept;
pub mod holder;
pub mod link;
pub mod backends;
pub mod client;
pub mod worker;
