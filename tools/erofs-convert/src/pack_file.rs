//! A pack of the store: its tables verified when it is opened, every unit when it is read.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use erofs::block::BLOCK_SIZE;
use erofs::digest::Digest;
use erofs::meta::PackRef;
use erofs::pack::{ChunkEntry, FOOTER_LEN, PackTable, decode_unit};
use slipway::store::{Name, Store, StoreError};

/// An open pack.
pub struct PackFile {
    file: File,
    len: u64,
    table: PackTable,
    path: PathBuf,
}

impl PackFile {
    /// Opens a pack and verifies its tables.
    pub fn open(store: &Store, pack: &PackRef) -> Result<PackFile, StoreError> {
        let name = Name::Pack(pack.digest);
        PackFile::of(store.open_file(&name)?, store.dir().join(name.path()), pack)
    }

    /// A pack in an open file, which may have another name yet; verifies its tables.
    pub fn of(file: File, path: PathBuf, pack: &PackRef) -> Result<PackFile, StoreError> {
        let damaged = |reason: String| StoreError::Damaged { path: path.clone(), reason };
        let read = |at: u64, len: usize| {
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, at).map(|()| bytes).map_err(|e| StoreError::reading(&path, e))
        };
        let len = file.metadata().map_err(|e| StoreError::reading(&path, e))?.len();
        let footer_at = len.checked_sub(FOOTER_LEN).ok_or_else(|| damaged("shorter than its footer".to_owned()))?;
        let footer = PackTable::parse_footer(&pack.digest, &read(footer_at, FOOTER_LEN as usize)?);
        let footer = footer.map_err(|e| damaged(e.to_string()))?;
        let (at, table_len) = footer.unit_table();
        let table = PackTable::parse(footer, &read(at, table_len)?).map_err(|e| damaged(e.to_string()))?;
        if footer.file_len() != len {
            return Err(damaged(format!("it is {len} bytes long and should be {}", footer.file_len())));
        }
        if table.pack_ref() != *pack {
            return Err(damaged("the metadata image says another size of it than its footer".to_owned()));
        }
        Ok(PackFile { file, len, table, path })
    }

    /// Length of the file.
    pub fn file_len(&self) -> u64 {
        self.len
    }

    /// The chunks in it, verified.
    pub fn chunks(&self) -> Result<Vec<ChunkEntry>, StoreError> {
        let damaged = |reason: String| StoreError::Damaged { path: self.path.clone(), reason };
        let (at, len) = self.table.footer().chunk_table();
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, at).map_err(|e| StoreError::reading(&self.path, e))?;
        self.table.footer().parse_chunks(&bytes).map_err(|e| damaged(e.to_string()))
    }

    /// Unit `index`, uncompressed; or what is wrong with it, in words.
    pub fn unit(&self, index: u32) -> Result<Vec<u8>, String> {
        self.read_unit(index).map_err(|error| {
            let reason = match error {
                StoreError::Damaged { reason, .. } => reason,
                StoreError::Unreachable { source, .. } => source.to_string(),
                error => error.to_string(),
            };
            format!("unit {index} of pack {}: {reason}", self.path.display())
        })
    }

    fn read_unit(&self, index: u32) -> Result<Vec<u8>, StoreError> {
        let damaged = |reason: String| StoreError::Damaged { path: self.path.clone(), reason };
        let entry = self.table.unit(index).ok_or_else(|| damaged(format!("it has no unit {index}")))?;
        let mut stored = vec![0; entry.stored_len as usize];
        self.file.read_exact_at(&mut stored, entry.offset).map_err(|e| StoreError::reading(&self.path, e))?;
        let mut unit = vec![0; self.table.unit_len(index)];
        decode_unit(entry, &stored, &mut unit).map_err(|e| damaged(e.to_string()))?;
        Ok(unit)
    }
}

/// Reads chunks of packs that `open` opens. Remembers the unit that the last chunk shared with others: chunks that come in the order they
/// were stored in are decoded once.
pub struct BlockReader<F> {
    open: F,
    packs: HashMap<Digest, PackFile>,
    unit: Option<(Digest, u32, Vec<u8>)>,
}

impl<F: FnMut(&PackRef) -> Result<PackFile, StoreError>> BlockReader<F> {
    /// Nothing is opened before it is read.
    pub fn new(open: F) -> BlockReader<F> {
        BlockReader { open, packs: HashMap::new(), unit: None }
    }

    /// So many blocks of a pack from `block` on, verified. They lie in one unit.
    pub fn read(&mut self, pack: &PackRef, block: u32, blocks: u32) -> io::Result<Vec<u8>> {
        let file = match self.packs.entry(pack.digest) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert((self.open)(pack).map_err(io::Error::other)?),
        };
        let (index, first) = (block / pack.unit_bits.blocks(), block % pack.unit_bits.blocks());
        if blocks == pack.unit_bits.blocks() {
            return file.read_unit(index).map_err(io::Error::other);
        }
        let unit = match &mut self.unit {
            Some((of, number, bytes)) if *of == pack.digest && *number == index => bytes,
            other => &mut other.insert((pack.digest, index, file.read_unit(index).map_err(io::Error::other)?)).2,
        };
        let range = u64::from(first) * BLOCK_SIZE..u64::from(first + blocks) * BLOCK_SIZE;
        let bytes = unit.get(range.start as usize..range.end as usize);
        bytes.map(<[u8]>::to_vec).ok_or_else(|| io::Error::other(format!("unit {index} of pack {} ends before block {block}", pack.digest)))
    }
}
