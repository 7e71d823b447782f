//! Slipway: containers start before their images arrive.

pub mod config;
pub mod metrics;
pub mod oci;
pub mod store;
pub mod cache;
pub mod kernel;
pub mod serve;
pub mod mount;
pub mod image;
pub mod snapshot;
pub mod node;
