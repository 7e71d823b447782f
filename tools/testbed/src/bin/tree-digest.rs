//! Prints a directory tree as [`testbed::TreeDigest`] sees it, one line per node, for comparing trees across kernels.

use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};

fn main() -> Result<()> {
    let root = std::env::args_os().nth(1).context("usage: tree-digest DIRECTORY")?;
    let tree = testbed::TreeDigest::of(Path::new(&root))?;
    let mut out = BufWriter::new(std::io::stdout().lock());
    for (path, node) in tree.nodes() {
        writeln!(out, "/{path} {node:?}")?;
    }
    Ok(out.flush()?)
}
