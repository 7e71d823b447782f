//! Files of the store come into being here: temporary first, named when whole (invariant 2).

use std::fs::File;
use std::io;
use std::path::Path;

use super::{Name, Store, StoreError};

/// A file in the store's `tmp/`, removed when dropped unpublished. Write to it, then [`Store::publish`] it.
#[derive(Debug)]
pub struct Temp {
    file: File,
}

impl Temp {
    /// The open file, for reading back or for writers that need a `File`.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it lies, for messages.
    pub fn path(&self) -> &Path {
        todo!()
    }
}

impl io::Write for Temp {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// How a name came to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    /// The file is new.
    New,
    /// The name was there and whole; the temporary file was dropped.
    Present,
    /// The name was there but damaged (or, for an image root, said something else) and has been replaced.
    Replaced,
}

impl Store {
    /// A new temporary file. Errors: [`StoreError::NotWritable`], [`StoreError::Full`], [`StoreError::Unreachable`].
    pub fn temp(&self) -> Result<Temp, StoreError> {
        todo!()
    }

    /// Gives `temp` its name. When this returns, the file is whole, durable and visible under `name`.
    pub fn publish(&self, temp: Temp, name: &Name) -> Result<Published, StoreError> {
        let _ = (temp, name);
        todo!()
    }
}
