//! A blob as a stream that survives what registries do to connections.
