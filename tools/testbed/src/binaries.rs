//! Finds the binaries of this workspace that tests and the demo run.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// The path of a binary this workspace builds (`slipwayd`, `erofs-convert`).
///
/// Looked for in `$SLIPWAY_BIN_DIR` when that is set, else beside the running program (`target/<profile>`, and for a test in
/// `target/<profile>/deps` one directory up). `cargo test` alone does not build the binaries of other packages:
/// `cargo build --workspace` (or `make build`) does.
pub fn binary(name: &str) -> Result<PathBuf> {
    let mut looked_in = Vec::new();
    let dirs = match std::env::var_os("SLIPWAY_BIN_DIR") {
        Some(dir) => vec![PathBuf::from(dir)],
        None => {
            let me = std::env::current_exe().context("this program's own path is not known")?;
            me.ancestors().skip(1).take(2).map(PathBuf::from).collect()
        }
    };
    for dir in dirs {
        let path = dir.join(name);
        if path.is_file() {
            return Ok(path);
        }
        looked_in.push(dir.display().to_string());
    }
    bail!("{name} is in none of {}: run `cargo build --workspace` first, or set SLIPWAY_BIN_DIR", looked_in.join(", "))
}
