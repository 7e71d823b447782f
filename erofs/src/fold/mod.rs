//! Layers to tree: whiteouts and opaque markers applied, hard links resolved, unused packs dropped.
//!
//! The result is what a container on overlayfs sees when containerd has applied the layers, with these choices:
//!
//! - The root is 0755, owned by 0:0, modified at the epoch unless a layer tree lists it. (containerd ignores an archive's root entry.)
//! - A directory that a layer implies but does not list keeps the attributes it has below, also when the layer itself hides it by an opaque
//!   directory. Over a symbolic link to a directory it is new with that one's attributes, over anything else it is new and like a root.
//!   What is below is asked as the container saw it, all layers in one. containerd's `mkparent` asks one layer's directory after the
//!   other, the topmost first, and so also finds what a layer in between has hidden, and follows links within one layer only: of `d/e/` in
//!   one layer, `d` made opaque in the next and `d/e/f` alone in a third it gives `d/e` the first layer's attributes, the fold those of
//!   a new directory. What was removed should not come back.
//! - A directory that a layer lists takes all its attributes from that layer, extended ones too, and keeps its children below. (Listed after
//!   something in it, it has for containerd also the extended attributes it has below, from when it was implied. The order of entries should not
//!   matter, and tools list directories first.)
//! - A hard link to a file of a lower layer is one more name of that inode, as if the link had been made in the merged directory.
//!   (containerd's overlayfs differ refuses such layers; its native one and umoci do the same as we.)
//! - Times of directories are never touched by what happens in them.

mod draft;
mod finish;

use std::borrow::Borrow;

use crate::digest::Digest;
use crate::layer::{LayerError, LayerTree};
use crate::tree::Tree;

/// Version of the folding rules and of the image writer. Records carry it: two binaries that agree on it give the same tree and the same
/// metadata image.
pub const FOLD_VERSION: u32 = 2;

/// Layers that do not fold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FoldError {
    /// A layer tree was not made by [`LayerTree::new`] or [`LayerTree::decode`] and breaks their rules.
    #[error("layer {layer} cannot be folded; convert it again")]
    Layer {
        /// Number of the layer, 0 at the bottom.
        layer: usize,
        /// The rule.
        #[source]
        source: LayerError,
    },
    /// A hard link names nothing, or a directory: this layer does not belong on these others.
    #[error("layer {layer}: hard link \"{}\" cannot be made: \"{}\" is no file in the layers below; check the order of the layers", path.escape_ascii(), target.escape_ascii())]
    LinkTarget {
        /// Number of the layer, 0 at the bottom.
        layer: usize,
        /// The link.
        path: Vec<u8>,
        /// What it names.
        target: Vec<u8>,
    },
    /// Two layers say different things about one pack, so at least one of them is wrong.
    #[error("layer {layer} gives pack {pack} another length or unit size than a layer below; convert both again")]
    Pack {
        /// Number of the layer, 0 at the bottom.
        layer: usize,
        /// The pack.
        pack: Digest,
    },
}

/// Folds layers, bottom first, into the tree a container sees. Inodes come depth first by name, packs in the order in which their chunks
/// are met on the way; what no name reaches is dropped.
pub fn fold<L: Borrow<LayerTree>>(layers: &[L]) -> Result<Tree, FoldError> {
    let mut draft = draft::Draft::new();
    for (number, layer) in layers.iter().map(Borrow::borrow).enumerate() {
        layer.check().map_err(|source| FoldError::Layer { layer: number, source })?;
        draft.apply(number, layer)?;
    }
    Ok(finish::finish(draft))
}

#[cfg(test)]
mod tests;
