//! Which keys a node or converter believes. Trusted keys come from its own configuration, never from the store.

use std::path::PathBuf;

use super::key::{KeyError, PublicKey};

/// The public keys whose records are believed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trust(pub Vec<PublicKey>);

/// The files trusted keys are read from. Kept as files so that a key made after the node started is found without a restart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustFiles(pub Vec<PathBuf>);

impl TrustFiles {
    /// Reads every file. An error names the file that cannot be used.
    pub fn load(&self) -> Result<Trust, KeyError> {
        todo!()
    }
}
