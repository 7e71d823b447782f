//! Slipway: containers start before their images arrive.
//!
//! A converter turns an OCI image into an EROFS *metadata image* (superblock, inodes, directories, chunk indexes) and *packs*
//! (immutable files of compressed, verified units of file data) on a shared file store. A node daemon lets the Linux kernel mount
//! the metadata at once and answers the kernel's read requests as they come. A containerd snapshotter makes it look like a pull.
//!
//! # The map
//!
//! Crates: `uapi` (kernel ABI, the only unsafe code) and `erofs` (the image format, bytes and values only) know nothing of ours;
//! this library uses both; `tools/erofs-convert` uses this library. Modules below are listed low to high and use only what is
//! above them.
//!
//! | module | what it holds |
//! |---|---|
//! | [`config`], [`metrics`] | the node's settings; its counters |
//! | [`oci`] | OCI names and digests, registries, image layouts: what a converter reads |
//! | [`store`] | the directory tree on the shared file store: names, publishing, signed records, reading packs |
//! | [`cache`] | a pack on the local disk: which units are there, who is filling one |
//! | [`kernel`] | backends: ways to get the kernel's read requests and to answer each exactly once |
//! | [`serve`] | request → whole units → claim → store read → verify → local write → answer |
//! | [`mount`] | putting an image into the mount tree |
//! | [`image`] | a chain ID → verified local metadata → a mounted image |
//! | [`snapshot`] | containerd's snapshots service and its ledger |
//! | [`node`] | the two processes of the daemon: holder and worker |
//!
//! # Invariants
//!
//! Code cites these by number where it keeps one.
//!
//! 1. **Bytes or EIO.** A reader gets the image's bytes or an I/O error, whatever crashes, fills up, hangs or is killed. Never
//!    zeros from a hole, never stale data.
//! 2. **Named means whole.** Content in the store (packs, trees, framings, metadata, records) is complete, immutable and matches the digest
//!    in its name: written in `tmp/`, fsynced, `link(2)`ed to its name, directory fsynced. State is replaced by rename and has
//!    one writer.
//! 3. **containerd never waits for the store.** A gRPC handler hands the question to a worker thread with a deadline; a timeout is
//!    a miss. Only hits are remembered.
//! 4. **A miss is a plain pull.** Anything wrong before a snapshot is committed ends in an ordinary overlay snapshot. The one exception is
//!    a layer that says of itself that it holds no files ([`snapshot::COMPACT_CHAIN`]): its pull fails.
//! 5. **Verified before visible.** No byte enters a local cache file before its unit's digest matched; no metadata image is
//!    mounted before its digest matched the signed record.
//! 6. **Data before bit.** A presence bit is persisted only after the data it stands for is durable. The map on disk is never a
//!    writable mapping.
//! 7. **Nothing in use is deleted.** Unknown counts as in use.
//! 8. **Every kernel request is answered exactly once.** Dropping one unanswered is a panic in tests and an EIO plus a counter in
//!    release.
//!
//! # Two journeys
//!
//! *A tar entry* (the converter): [`oci`] opens the layer and checks its digests while it streams → the tar reader gives an entry
//! → its bytes go to chunks, units and packs and come back as chunk references (all other bytes of the tar go to the layer's framing) →
//! entries make a layer tree → `erofs::fold` applies whiteouts and merges layers into one tree → `erofs::image::Checked` (the gate:
//! every rule the writer relies on) → the plan gives it a nid and addresses → emit writes bytes and decides nothing → [`store`]
//! publishes them under their digest, signed records last.
//!
//! *A read* (the node): kernel bytes → `uapi` parses a message → a backend of [`kernel`] makes an [`kernel::Ask`] → [`serve`]
//! widens it to whole units → [`cache`] claims them (present, wait, or fill) → a run is read from the [`store`] → decoded and
//! verified → written to the local file → the guard finishes → `ask.answer(Ok)`. On any error the guard drops (waiters wake),
//! `ask.answer(Err)`, one counter, one log event.

pub mod config;
pub mod metrics;
pub mod oci;
pub mod store;
pub mod cache;
pub mod kernel;
pub mod serve;
pub mod mount;
pub mod image;
pub mod snapshot;
pub mod node;
