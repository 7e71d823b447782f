//! The Slipway image format: layer trees fold into one tree, a tree becomes an EROFS metadata image, file data lives in packs.
//!
//! Everything here turns values into bytes or bytes into values. There is no I/O beyond `std::io::{Read, Write}` handed in, no path,
//! no clock and no async; the same input gives the same bytes on every machine.
//!
//! Modules, low to high:
//! - [`block`]: the 4 KiB block and the number spaces built on it;
//! - [`digest`]: BLAKE3 digests, the names of everything Slipway stores;
//! - [`meta`]: what a file is apart from its place in a tree (mode, owner, times, xattrs, content);
//! - [`layer`]: one OCI layer as a flat list of entries, and its file form;
//! - [`tree`]: a whole file system, folded from layers;
//! - [`fold`]: layers to tree;
//! - [`image`]: tree to EROFS bytes (checked → plan → emit) and EROFS bytes to views (reader, dump);
//! - [`pack`]: file data as compressed, verified units;
//! - [`framing`]: the rest of a layer's tar, from which and from packs its very bytes come back.

pub mod block;
pub mod digest;
pub mod fold;
pub mod framing;
pub mod image;
pub mod layer;
pub mod meta;
mod number;
pub mod pack;
pub mod tree;
