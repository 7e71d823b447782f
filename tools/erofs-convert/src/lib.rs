//! The converter's stages as a library, so that tests and benchmarks reach them.

pub mod layer;
