//! Tree to EROFS bytes and back.
