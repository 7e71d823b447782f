//! One layer's tar stream becomes a layer tree and packs.

use std::io::{self, Read, Write};

use erofs::block::UnitBits;
use erofs::digest::Digest;
use erofs::layer::LayerTree;

/// Where packs go. One pack is open at a time.
pub trait PackSink {
    /// A pack being written.
    type Temp: Write + Send;

    /// An empty file for a new pack.
    fn create(&mut self) -> io::Result<Self::Temp>;

    /// Makes a completely written pack durable under its name (invariant 2).
    fn publish(&mut self, temp: Self::Temp, name: Digest) -> io::Result<()>;
}

/// How to convert, and how much a layer may cost.
#[derive(Clone, Debug)]
pub struct LayerOptions {
    /// Unit (and chunk) size.
    pub unit_bits: UnitBits,
    /// Compression threads, at least 1. The result does not depend on it.
    pub threads: usize,
}

/// Why a layer could not be converted.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The tar stream could not be read: the source's problem.
    #[error("cannot read the layer at byte {offset}; try again")]
    Read {
        /// Bytes of the uncompressed tar read so far.
        offset: u64,
        /// What the reader said.
        #[source]
        source: io::Error,
    },
}

/// Converts one layer. `reader` gives the uncompressed tar and is read to its end, also past the archive's end marker (so that a
/// verifying reader sees every byte).
#[allow(clippy::todo)]
pub fn convert_layer(reader: impl Read, sink: &mut impl PackSink, options: &LayerOptions) -> Result<LayerTree, ConvertError> {
    let _ = (reader, sink, options);
    todo!()
}
