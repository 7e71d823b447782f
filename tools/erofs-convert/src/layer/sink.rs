//! Where packs go.

use std::collections::BTreeMap;
use std::io::{self, Write};

use erofs::digest::Digest;
use erofs::framing::{FramingReader, Step};
use erofs::meta::PackRef;
use erofs::pack::{FOOTER_LEN, PackTable, decode_unit};

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

impl MemorySink {
    /// The tar that a framing and these packs give back. Panics if they do not fit each other.
    pub fn tar(&self, framing: &[u8]) -> Vec<u8> {
        let reader = || FramingReader::new(framing).expect("a framing");
        let places = reader().places().expect("a whole framing");
        let packs: Vec<Vec<u8>> = places.packs.iter().map(|pack| self.content(pack)).collect();
        let (mut steps, mut tar) = (reader(), Vec::new());
        while let Some(step) = steps.next().expect("a whole framing") {
            match step {
                Step::Raw(raw) => tar.extend_from_slice(raw),
                Step::Data { chunk: None, len, .. } => tar.resize(tar.len() + len as usize, 0),
                Step::Data { chunk: Some(id), from, len } => {
                    let place = places.chunks[id as usize];
                    let start = place.block as usize * erofs::block::BLOCK_SIZE as usize + from as usize;
                    tar.extend_from_slice(&packs[place.pack as usize][start..start + len as usize]);
                }
            }
        }
        tar
    }

    /// All units of a pack, verified and one after the other.
    fn content(&self, pack: &PackRef) -> Vec<u8> {
        let file = &self.packs[&pack.digest];
        let footer = PackTable::parse_footer(&pack.digest, &file[file.len() - FOOTER_LEN as usize..]).expect("a footer");
        let (at, len) = footer.unit_table();
        let table = PackTable::parse(footer, &file[at as usize..at as usize + len]).expect("a unit table");
        assert_eq!(table.pack_ref(), *pack, "the framing says something else of the pack than its footer");
        let mut content = Vec::new();
        for index in 0..table.unit_count() {
            let entry = table.unit(index).expect("it is in the table");
            let mut unit = vec![0; table.unit_len(index)];
            decode_unit(entry, &file[entry.offset as usize..][..entry.stored_len as usize], &mut unit).expect("a whole unit");
            content.extend(unit);
        }
        content
    }
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
