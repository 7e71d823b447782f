//! The built converter, with a key and a journal of its own.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::binaries::binary;
use crate::daemon::output;

/// Runs `erofs-convert` with private state. Its key is made by the first conversion.
#[derive(Debug, Clone)]
pub struct Converter {
    state: PathBuf,
}

impl Converter {
    /// A converter that keeps journal and key in `state` (made by the first conversion).
    pub fn new(state: &Path) -> Converter {
        Converter { state: state.to_path_buf() }
    }

    /// The public half of its key, for [`crate::SlipwaydConfig`]. The file is there after the first conversion.
    pub fn public_key(&self) -> PathBuf {
        self.state.join("key.pem.pub")
    }

    /// `erofs-convert convert SOURCE --store STORE`, to be completed and run by the caller.
    pub fn command(&self, source: &str, store: &Path) -> Result<Command> {
        let mut command = Command::new(binary("erofs-convert")?);
        command.args(["convert", source, "--store"]).arg(store).arg("--state").arg(&self.state).arg("--key").arg(self.state.join("key.pem"));
        Ok(command)
    }

    /// Converts an image and returns what the converter reports (its `--json`).
    pub fn convert(&self, source: &str, store: &Path) -> Result<serde_json::Value> {
        let mut command = self.command(source, store)?;
        command.arg("--json");
        let report = output(&mut command)?;
        serde_json::from_str(&report).with_context(|| format!("erofs-convert's report is not JSON: {report}"))
    }
}
