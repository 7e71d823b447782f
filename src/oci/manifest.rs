//! Manifests, indexes and configurations: their media types, their sizes, and what of them the converter needs.
