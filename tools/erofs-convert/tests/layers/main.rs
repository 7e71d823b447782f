//! The layer stage against independent readers: GNU tar, Python and umoci unpack the same archives, and the results are compared.

mod random;
mod referee;
mod unpackers;
