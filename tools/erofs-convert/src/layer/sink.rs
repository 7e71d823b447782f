//! Where packs go.

use std::collections::BTreeMap;
use std::io::{self, Write};

use erofs::digest::Digest;

/// Where packs go: a store, or memory. One pack is open at a time, on a thread of its own.
pub trait PackSink: Send {
    /// A pack being written. Dropping it leaves nothing behind.
    type Temp: Write + Send;

    /// An empty file for a new pack.
    fn create(&mut self) -> io::Result<Self::Temp>;

    /// Makes a completely written pack durable under its name (invariant 2).
    fn publish(&mut self, temp: Self::Temp, name: Digest) -> io::Result<()>;
}

/// Packs in memory, by name: for tests, and stricter than a store in that no pack may come twice or unfinished.
#[derive(Debug, Default)]
pub struct MemorySink {
    /// The packs published so far.
    pub packs: BTreeMap<Digest, Vec<u8>>,
}

impl PackSink for MemorySink {
    type Temp = Vec<u8>;

    fn create(&mut self) -> io::Result<Vec<u8>> {
        Ok(Vec::new())
    }

    fn publish(&mut self, temp: Vec<u8>, name: Digest) -> io::Result<()> {
        let footer = temp.len().checked_sub(erofs::pack::FOOTER_LEN as usize).map(|at| &temp[at..]);
        if footer.map(Digest::of) != Some(name) {
            return Err(io::Error::other(format!("pack {name} is not the BLAKE3 of its footer")));
        }
        match self.packs.insert(name, temp) {
            None => Ok(()),
            Some(_) => Err(io::Error::other(format!("pack {name} is published twice"))),
        }
    }
}
