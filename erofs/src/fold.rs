//! Layers to tree.
