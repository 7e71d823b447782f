//! The layer stage against independent readers: GNU tar, Python and umoci unpack the same archives, and the results are compared.

#![allow(clippy::unwrap_used, reason = "a test's own set-up")]

mod random;
mod referee;
mod unpackers;
