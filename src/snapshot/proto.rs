//! containerd's `snapshots/v1` messages, server and client, generated from the files in `proto/` (Apache-2.0, The containerd Authors).
//!
//! Changed against containerd's API 1.9: the import path of `mount.proto` is the one containerd 2.2 uses, and
//! `CommitSnapshotRequest.parent` is added. The client half serves `slipwayd mount` and the tests.

pub use generated::containerd::services::snapshots::v1::*;
pub use generated::containerd::types::Mount;

#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/containerd.rs"));
}
