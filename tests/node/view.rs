//! An image looked at without containerd.

use std::fs;
use std::path::PathBuf;

use slipway::oci::ChainId;
use testbed::{Slipwayd, binary, run};

/// The image shown by `slipwayd mount`, until dropped.
pub struct View {
    /// Where.
    pub at: PathBuf,
    config: PathBuf,
}

impl View {
    /// Shows the image of `chain` at `at`, a directory to be made.
    pub fn mount(slipwayd: &Slipwayd, chain: &ChainId, at: PathBuf) -> View {
        fs::create_dir(&at).expect("a directory");
        let (chain, config) = (chain.oci(), slipwayd.config());
        let args = ["mount", &chain, at.to_str().expect("text"), "--config", config.to_str().expect("text")];
        run(&program(), args).expect("the image is mounted");
        View { at, config }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        let args = ["umount", self.at.to_str().expect("text"), "--config", self.config.to_str().expect("text")];
        if let Err(error) = run(&program(), args) {
            eprintln!("the view stays mounted: {error:#}");
        }
    }
}

fn program() -> String {
    binary("slipwayd").expect("slipwayd is built").to_str().expect("text").to_owned()
}
