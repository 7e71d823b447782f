//! The store on the shared file system: one directory tree of immutable, digest-named files.

pub mod chunks;
mod content;
pub mod error;
pub mod key;
pub mod layout;
pub mod publish;
pub mod record;
pub mod roots;
pub mod trust;

pub use error::StoreError;
pub use key::{KeyId, PublicKey, SigningKey};
pub use layout::Name;
pub use publish::{Published, Temp};
pub use record::{Payload, Sizes};
pub use roots::{ImageRoot, RootLayer};
pub use trust::{Trust, TrustFiles};

use std::fs::File;
use std::path::Path;

/// An open store: its directory is held open, and everything is reached beneath it.
#[derive(Debug)]
pub struct Store {}

impl Store {
    /// Opens the store in `dir`, or makes one if `dir` is empty (or does not exist but its parent does). For converters.
    pub fn create(dir: &Path) -> Result<Store, StoreError> {
        let _ = dir;
        todo!()
    }

    /// Opens the store in `dir`. For nodes and readers; writes nothing.
    pub fn open(dir: &Path) -> Result<Store, StoreError> {
        let _ = dir;
        todo!()
    }

    /// The directory it was opened with, for messages.
    pub fn dir(&self) -> &Path {
        todo!()
    }

    /// The store's random id, 32 hex digits, made with the store.
    pub fn id(&self) -> &str {
        todo!()
    }

    /// Opens a file of the store for reading. Never follows a symbolic link, never leaves the store, gives regular files only.
    pub fn open_file(&self, name: &Name) -> Result<File, StoreError> {
        let _ = name;
        todo!()
    }

    /// Whether a file of this name is there, and how long it is.
    pub fn len(&self, name: &Name) -> Result<Option<u64>, StoreError> {
        let _ = name;
        todo!()
    }
}
