//! The cache directory.
