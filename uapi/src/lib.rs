//! Kernel interfaces of Slipway: the only crate with unsafe code. One module per kernel area; file descriptors in as `AsFd`, out as `OwnedFd`.

pub mod buffer;
pub mod cachefiles;
pub mod fdpass;
pub mod fuse;
pub mod mapping;
pub mod mount;
pub mod process;
pub mod ring;
pub mod writeback;
