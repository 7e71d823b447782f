//! The snapshotter from outside: its gRPC service as any client sees it, and under a real containerd.
//!
//! Images are stood in for by directory trees ([`trees::Trees`]), so that what is tested here is the contract with containerd alone.

mod trees;
mod client;
mod wire;
mod races;
mod views;
mod full_disk;
mod power_cut;
mod under_containerd;
