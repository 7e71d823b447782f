//! The converter: OCI images in, a Slipway store out. A library so that tests and benchmarks reach its stages; the program is thin.
//!
//! One layer's way: [`slipway::oci`] opens its blob, [`unpack`] turns it into a tar and checks the blob, [`layer`] turns the tar into a
//! layer tree, packs (but for what the [`dictionary`] finds stored already) and a framing, [`convert`] publishes them, folds all layers and
//! makes the result visible. [`export`] gives tars and configuration back. [`check`] goes the other way with none of [`layer`]'s code: it
//! compares what the store gives back with what the source's archives say.

pub mod printable;
pub mod stop;
pub mod layer;
pub mod failure;
pub mod progress;
pub mod parallel;
pub mod pipe;
pub mod unpack;
pub mod journal;
pub mod leftovers;
pub mod pack_file;
pub mod dictionary;
pub mod convert;
pub mod check;
pub mod export;
pub mod inspect;
