//! Layers to tree: whiteouts and opaque markers applied, hard links resolved, unused packs dropped.

use crate::layer::LayerTree;
use crate::tree::Tree;

/// Version of the folding rules. Records carry it: two binaries that agree on it give the same tree, and so the same metadata image.
pub const FOLD_VERSION: u32 = 1;

/// Layers that do not fold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FoldError {
    /// A hard link names nothing, or a directory.
    #[error("layer {layer}: hard link {} cannot be made: {} is not a file of this or a lower layer", path.escape_ascii(), target.escape_ascii())]
    LinkTarget {
        /// Number of the layer, 0 at the bottom.
        layer: usize,
        /// The link.
        path: Vec<u8>,
        /// What it names.
        target: Vec<u8>,
    },
}

/// Folds layers, bottom first, into the tree a container sees.
#[allow(clippy::todo)]
pub fn fold(layers: &[LayerTree]) -> Result<Tree, FoldError> {
    let _ = layers;
    todo!()
}
