//! Tests of `fuse-blob`.
