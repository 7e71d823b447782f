//! A fake disk.
