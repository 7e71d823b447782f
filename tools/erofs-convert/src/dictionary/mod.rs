//! The dictionary: which chunks the store has already, and where.
//!
//! The truth are the chunk tables of packs. Asking every pack of a store for every chunk would take too long, so the tables of all packs that
//! trusted records reach are gathered in *segments* of 16 bytes per chunk, kept in the state directory between conversions (`files`) and mapped. They
//! are a hint: a chunk counts as found only when the pack's own table, verified against the pack's name, says so.
//!
//! What the dictionary covers is decided when it is opened: the packs that trusted records reached then, whatever segments there were. So the
//! same store content gives the same answers, with an empty state directory too.
//!
//! A pack that is referred to must stay. Today nothing in a store is ever deleted. Once something is, a converter has to name the packs it may
//! refer to in a lease (`converters/` in the store) before it relies on them; there is no such lease yet.

mod files;
mod segment;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use erofs::block::UnitBits;
use erofs::digest::Digest;
use erofs::meta::PackRef;
use erofs::pack::ChunkEntry;
use slipway::store::{Reach, Store, StoreError};
use tokio_util::sync::CancellationToken;

use crate::failure::Failure;
use crate::layer::{ChunkTable, Known};
use crate::pack_file::PackFile;
use crate::parallel::in_parallel;
use crate::progress::Progress;
use files::Files;
use segment::Segment;

/// Chunk tables read from the store at once: each takes a few round trips.
const READS_AT_ONCE: usize = 16;

/// From so many packs on that are not known yet, reading their tables may take long enough to say so.
const MANY: usize = 200;

/// Chunks that are put into one segment at once, 72 bytes each until it is written: the packs of a store that is new to this machine come in
/// several.
const BATCH: usize = 2 << 20;

/// Chunks of tables that are kept open, 56 bytes each. A pack has as many as it has files, some thousands; all the packs that an image refers
/// to are rarely more than this.
const MAX_OPEN: usize = 2 << 20;

/// Packs offered for one chunk, besides those that are preferred: the first by name. A file that every image has may be in every pack of the store.
const MAX_OTHERS: usize = 8;

/// Chunks of some packs of a store.
pub struct Dictionary<'a> {
    store: &'a Store,
    /// Of its packs. A file's chunks cannot be in packs of other unit sizes than the one it was cut to.
    unit_bits: UnitBits,
    packs: BTreeMap<Digest, PackRef>,
    segments: Vec<Segment>,
    tables: Mutex<Tables>,
}

/// Tables that were asked for.
#[derive(Default)]
struct Tables {
    open: HashMap<Digest, Option<Arc<ChunkTable>>>,
    /// The packs, in the order their tables came.
    order: VecDeque<Digest>,
    chunks: usize,
}

impl Tables {
    /// Keeps a table; those that came first go when there are too many chunks.
    fn keep(&mut self, pack: Digest, table: Option<Arc<ChunkTable>>, max_chunks: usize) {
        let count = |table: &Option<Arc<ChunkTable>>| table.as_ref().map_or(0, |table| table.chunks().count());
        let more = count(&table);
        if self.open.insert(pack, table).is_some() {
            // Another thread read it as well.
            return;
        }
        self.order.push_back(pack);
        self.chunks += more;
        while self.chunks > max_chunks && self.order.len() > 1 {
            let first = self.order.pop_front().and_then(|first| self.open.remove(&first));
            self.chunks -= first.as_ref().map_or(0, count);
        }
    }
}

impl<'a> Dictionary<'a> {
    /// A dictionary without chunks, for packs of this unit size.
    pub fn empty(store: &'a Store, unit_bits: UnitBits) -> Dictionary<'a> {
        Dictionary { store, unit_bits, packs: BTreeMap::new(), segments: Vec::new(), tables: Mutex::default() }
    }

    /// The dictionary of the packs of this unit size that `reach` has. What of it is known from before lies in `state`, and what is new is added
    /// there.
    pub fn open(
        store: &'a Store,
        reach: &Reach,
        unit_bits: UnitBits,
        state: &Path,
        progress: &Progress,
        stop: &CancellationToken,
    ) -> Result<Dictionary<'a>, Failure> {
        let packs = reach.packs().filter(|pack| pack.unit_bits == unit_bits).map(|pack| (pack.digest, *pack)).collect();
        let mut dictionary = Dictionary { packs, ..Dictionary::empty(store, unit_bits) };
        let say_waiting = || progress.say("waiting for another conversion, which gathers what the store holds");
        let mut files = Files::open(&state.join("dictionary").join(store.id()), stop, say_waiting);
        let mut missing = dictionary.packs.clone();
        for pack in files.segments().flat_map(Segment::packs) {
            missing.remove(&pack);
        }
        let mut tables = Vec::new();
        let missing: Vec<PackRef> = missing.into_values().collect();
        if missing.len() >= MANY {
            progress.say(&format!("reading what {} packs of the store hold", missing.len()));
        }
        for some in missing.chunks(READS_AT_ONCE) {
            tables.extend(read_tables(store, some, stop)?);
            if tables.iter().map(|(_, chunks)| chunks.len()).sum::<usize>() >= BATCH {
                files.add(Segment::build(std::mem::take(&mut tables)));
            }
        }
        if !tables.is_empty() {
            files.add(Segment::build(tables));
        }
        files.merge(|pack| dictionary.packs.contains_key(pack));
        dictionary.segments = files.into_segments();
        Ok(dictionary)
    }

    /// Adds the chunks of those of these packs that have its unit size, in memory only.
    pub fn add(&mut self, packs: &[PackRef], stop: &CancellationToken) -> Result<(), Failure> {
        let is_new = |pack: &&PackRef| pack.unit_bits == self.unit_bits && !self.packs.contains_key(&pack.digest);
        let new: Vec<PackRef> = packs.iter().filter(is_new).copied().collect();
        if !new.is_empty() {
            self.segments.push(Segment::build(read_tables(self.store, &new, stop)?));
            self.packs.extend(new.iter().map(|pack| (pack.digest, *pack)));
        }
        Ok(())
    }
}

/// The chunk tables of these packs, without those that cannot be used.
fn read_tables(store: &Store, packs: &[PackRef], stop: &CancellationToken) -> Result<Vec<(Digest, Vec<ChunkEntry>)>, Failure> {
    let stop = stop.child_token();
    let tables = in_parallel(READS_AT_ONCE, packs.to_vec(), &stop, |pack| Ok((pack.digest, read_table(store, &pack)?)))?;
    Ok(tables.into_iter().filter_map(|(pack, chunks)| Some((pack, chunks?))).collect())
}

fn read_table(store: &Store, pack: &PackRef) -> Result<Option<Vec<ChunkEntry>>, StoreError> {
    match PackFile::open(store, pack).and_then(|file| file.chunks()) {
        Ok(chunks) => Ok(Some(chunks)),
        Err(error) if error.is_about_content() => {
            tracing::debug!(pack = %pack.digest, %error, "passing over a pack");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

impl Known for Dictionary<'_> {
    fn candidates(&self, digest: &Digest, is_preferred: &dyn Fn(&Digest) -> bool) -> Vec<(Digest, u32)> {
        let (mut found, mut others) = (Vec::new(), Vec::with_capacity(MAX_OTHERS + 1));
        for segment in &self.segments {
            segment.look_up(digest, &mut |pack, block| {
                let place = (pack, block);
                if is_preferred(&pack) {
                    found.push(place);
                } else if (others.len() < MAX_OTHERS || others.last().is_some_and(|last| place < *last))
                    && self.packs.contains_key(&pack)
                    && let Err(at) = others.binary_search(&place)
                {
                    others.insert(at, place);
                    others.truncate(MAX_OTHERS);
                }
            });
        }
        found.retain(|(pack, _)| self.packs.contains_key(pack));
        found.extend(others);
        found.sort_unstable();
        // A pack may be in two segments when two converters add it at once.
        found.dedup();
        found
    }

    fn table(&self, pack: &Digest) -> io::Result<Option<Arc<ChunkTable>>> {
        let Some(pack) = self.packs.get(pack) else { return Ok(None) };
        let tables = || self.tables.lock().expect("no panic while it is held");
        if let Some(table) = tables().open.get(&pack.digest) {
            return Ok(table.clone());
        }
        // Not under the lock: other layers go on with the tables they have while the store answers.
        let chunks = read_table(self.store, pack).map_err(io::Error::other)?;
        let table = chunks.map(|chunks| Arc::new(ChunkTable::new(*pack, chunks)));
        tables().keep(pack.digest, table.clone(), MAX_OPEN);
        Ok(table)
    }
}

#[cfg(test)]
mod tests;
