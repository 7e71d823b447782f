//! The layer stage against independent readers: GNU tar, Python and umoci unpack the same archives, and the results are
//! compared; and against the system calls that unpacking is made of. What was converted is given back, and the same bytes again.

#![allow(clippy::unwrap_used, reason = "a test's own set-up")]

mod containerd;
mod corpora;
mod exported;
mod features;
mod random;
mod referee;
mod syscalls;
mod unpackers;
