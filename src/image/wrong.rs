//! Whether what a signed record names fits together. A signature says who wrote it, not that the writer made no mistake.

use erofs::digest::Digest;
use erofs::fold::{self, FoldError};
use erofs::image::{self, Checked, DeviceSlot, Image, ImageError, TreeError};
use erofs::layer::{LayerError, LayerTree};
use erofs::meta::PackRef;

use crate::store::Payload;

/// How a signed record can be wrong.
#[derive(Debug, thiserror::Error)]
pub enum WrongRecord {
    /// A tree it names is no layer tree.
    #[error("tree {tree} is no layer tree")]
    Tree {
        /// The tree.
        tree: Digest,
        /// What it breaks.
        #[source]
        source: LayerError,
    },
    /// The trees do not fold.
    #[error("its layer trees do not fold")]
    Fold(#[source] FoldError),
    /// What they fold to is no file system.
    #[error("what its layer trees fold to is no file system")]
    FileSystem(#[source] TreeError),
    /// They fold to another image.
    #[error("its layer trees give the metadata image {found}, it says {expected}")]
    Metadata {
        /// What the record says.
        expected: Digest,
        /// What the fold gives.
        found: Digest,
    },
    /// The metadata is no image.
    #[error("{digest} is no metadata image")]
    Image {
        /// The metadata.
        digest: Digest,
        /// What it breaks.
        #[source]
        source: ImageError,
    },
    /// The image has other devices than the record names packs.
    #[error("the devices of image {digest} are not the packs it names")]
    Packs {
        /// The metadata.
        digest: Digest,
    },
}

/// Folds a prefix and holds the result against its record: the record's signature covers the digest, so what a node makes itself is as
/// trusted as what it fetches (invariant 5).
pub(super) fn fold_image(payload: &Payload, trees: &[LayerTree]) -> Result<Vec<u8>, WrongRecord> {
    let tree = fold::fold(trees).map_err(WrongRecord::Fold)?;
    let built = image::write(&Checked::new(tree).map_err(WrongRecord::FileSystem)?);
    if built.digest != payload.metadata {
        return Err(WrongRecord::Metadata { expected: payload.metadata, found: built.digest });
    }
    check_devices(payload, &built.bytes)?;
    Ok(built.bytes)
}

/// Whether the image's devices are the record's packs, in their order: a mount is given one for each of the other.
pub(super) fn check_devices(payload: &Payload, metadata: &[u8]) -> Result<(), WrongRecord> {
    let digest = payload.metadata;
    let devices = Image::open(metadata).map_err(|source| WrongRecord::Image { digest, source })?.devices();
    let same = |(device, pack): (&DeviceSlot, &PackRef)| device.digest == pack.digest && device.blocks == pack.blocks;
    if devices.len() != payload.packs.len() || !devices.iter().zip(&payload.packs).all(same) {
        return Err(WrongRecord::Packs { digest });
    }
    Ok(())
}
