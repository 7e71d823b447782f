//! File data as compressed, verified units.
