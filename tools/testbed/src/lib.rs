//! What whole-system tests, benchmarks and the demo stand on: a registry, containerds, a CRI client, an image maker and a
//! store on a disk of its own, all on loopback and in temporary directories.
//!
//! Every piece is a guard: dropping it (also while a panic unwinds) ends the processes it started, unmounts what it mounted and
//! removes its files. Processes are ended by the pids this library started, never by name. Should the test process itself be
//! killed, its children die with it (`setpriv --pdeathsig`); containers, their shims, mounts and directories outlive it, and the next run ends
//! and sweeps those ([`Scratch`]).
//!
//! All calls block. Start a piece on the thread that keeps it: its processes die with the thread that started them.
//!
//! | piece | what it is |
//! |---|---|
//! | [`Scratch`] | a temporary directory that also unmounts what was mounted below it |
//! | [`Daemon`] | one child process with its log |
//! | [`Registry`], [`TestCa`] | Debian's docker-registry, with its access log by digest; a certificate authority for it |
//! | [`Containerd`], [`Cri`] | a containerd of our own and the calls a kubelet would make |
//! | [`Converter`], [`Slipwayd`] | the built converter and node daemon |
//! | [`GuestKernel`] | Linux 6.1 as a process, for what the running kernel lacks |
//! | [`LoopFs`] | an ext4 of its own, whose reads the kernel counts |
//! | [`drop_caches`], [`resident_bytes`] | the page cache |
//! | [`Layer`], [`Image`], [`Layout`] | OCI images made from entries |
//! | [`noise`], [`files_below`], [`DeadAddress`] | contents, directory listings and an address where nobody answers |
//! | [`TreeDigest`] | everything a user can see of a mounted tree, comparable |
//! | [`require!`] | says what a test needs and skips, or fails, without it |

mod binaries;
mod containerd;
mod converter;
mod cri;
mod daemon;
mod dead_address;
mod files;
mod guest;
mod layer;
mod layout;
mod loop_fs;
mod mounts;
pub mod need;
mod page_cache;
mod registry;
mod scratch;
mod slipwayd;
mod test_ca;
mod tree_digest;

pub use binaries::binary;
pub use containerd::{Containerd, Snapshotter, View};
pub use converter::Converter;
pub use cri::{Cri, CriImage, grpc_channel};
pub use daemon::{Daemon, run, wait_until};
pub use dead_address::DeadAddress;
pub use files::{Noise, files_below, noise};
pub use guest::GuestKernel;
pub use layer::{Compression, Entry, EntryKind, Layer, LayerBlob, sha256};
pub use layout::{BuiltImage, Image, Layout};
pub use loop_fs::LoopFs;
pub use mounts::{is_anything_mounted_below, is_mounted, unmount_below};
pub use page_cache::{drop_caches, resident_bytes};
pub use registry::{Guard, Mark, PASSWORD, Registry, USER};
pub use scratch::Scratch;
pub use slipwayd::{Slipwayd, SlipwaydConfig};
pub use test_ca::TestCa;
pub use tree_digest::{Difference, Node, NodeKind, TreeDigest};
