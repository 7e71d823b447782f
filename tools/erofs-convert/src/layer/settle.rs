//! A converted layer beside the layers below it: what they have as well is referred to there, and the layer packed again without it.
//!
//! Layers of an image are converted at the same time and know nothing of each other. Which chunks move is decided afterwards, by the same rule
//! as for packs of other images ([`super::runs`]). If enough do ([`WORTH`]), the rest of the layer's own chunks is read back from its packs, verified, and
//! goes the same way to new packs; then tree and framing follow ([`Moves`]).

use std::collections::HashMap;
use std::io;

use erofs::block::BLOCK_SIZE;
use erofs::digest::Digest;
use erofs::framing::{Place, Places};
use erofs::layer::{EntryKind, LayerTree};
use erofs::meta::{Chunk, Content, Data, PackRef};

use super::known::{Elsewhere, Found};
use super::packing::Packing;
use super::runs::{Decided, Runs};
use super::{ConvertError, LayerOptions, PackSink, compress};

/// A layer is packed again if one in so many of its own bytes is elsewhere. All the others are compressed again for that, while the layers above
/// wait for their turn: for less, storing it twice is cheaper. It depends on nothing but content, so that a layer always turns out the same.
pub const WORTH: u64 = 16;

/// Chunks of a layer as it was packed first.
#[derive(Clone, Copy, Debug)]
pub struct Before<'a> {
    /// Digest and blocks of every chunk, by its number.
    pub chunks: &'a [(Digest, u32)],
    /// Where they are.
    pub places: &'a Places,
    /// The packs that were made for the layer. The others stay as they are.
    pub own: &'a [PackRef],
}

/// Where the chunks of a layer went when it was packed again. Everything that refers to chunks follows through this, the tree as well as the framing.
#[derive(Debug)]
pub struct Moves {
    /// Packs made now.
    pub own: Vec<PackRef>,
    packs: Vec<PackRef>,
    to: HashMap<(Digest, u32), Place>,
}

/// Own chunks of a layer that are elsewhere as well.
#[derive(Debug)]
pub struct Shared {
    /// By their numbers.
    found: HashMap<u32, Found>,
    bytes: u64,
}

impl Shared {
    /// Bytes that the layer's packs need not hold.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes those that are to be referred to.
    fn take(&mut self, decided: &mut Vec<Decided<u32>>, chunks: &[(Digest, u32)]) {
        for (number, found) in decided.drain(..).filter_map(|(number, found)| Some((number, found?))) {
            self.bytes += u64::from(chunks[number as usize].1) * BLOCK_SIZE;
            self.found.insert(number, found);
        }
    }
}

impl Before<'_> {
    fn pack(&self, place: &Place) -> &PackRef {
        &self.places.packs[place.pack as usize]
    }

    /// What is worth a reference `elsewhere`; `None` if that is not worth packing the layer again.
    pub fn shared(&self, elsewhere: Elsewhere<'_>) -> io::Result<Option<Shared>> {
        let is_own = |place: &Place| self.own.contains(self.pack(place));
        let used = self.places.packs.iter().filter(|pack| !self.own.contains(pack)).map(|pack| pack.digest);
        let mut runs = Runs::beside(elsewhere, used);
        let (mut own, mut shared) = (0, Shared { found: HashMap::new(), bytes: 0 });
        // Taken up at once, for a layer may have millions of chunks and most stay.
        let mut decided = Vec::new();
        for (number, ((digest, blocks), place)) in self.chunks.iter().zip(&self.places.chunks).enumerate() {
            if is_own(place) {
                own += u64::from(*blocks) * BLOCK_SIZE;
                runs.push(number as u32, digest, *blocks, &mut decided)?;
                shared.take(&mut decided, self.chunks);
            }
        }
        runs.end(&mut decided);
        shared.take(&mut decided, self.chunks);
        Ok((shared.bytes > 0 && shared.bytes >= own / WORTH).then_some(shared))
    }

    /// Packs the layer again without what is shared. `read` gives so many blocks from a place in one of the layer's own packs, verified.
    pub fn without(
        &self,
        shared: &Shared,
        sink: &mut impl PackSink,
        options: &LayerOptions,
        mut read: impl FnMut(&PackRef, u32, u32) -> io::Result<Vec<u8>>,
    ) -> Result<Moves, ConvertError> {
        let (packed, own) = compress::run(sink, options, |feeder| {
            let mut packing = Packing::new(options.unit_bits, feeder);
            for (number, ((digest, blocks), place)) in self.chunks.iter().zip(&self.places.chunks).enumerate() {
                let (id, pack) = (packing.number(), self.pack(place));
                match shared.found.get(&(number as u32)) {
                    Some(found) => packing.refer(id, &found.pack, found.block),
                    None if self.own.contains(pack) => {
                        let bytes = read(pack, place.block, *blocks).map_err(|source| ConvertError::Store { source })?;
                        packing.store(id, *digest, bytes)?;
                    }
                    None => packing.refer(id, pack, place.block),
                }
            }
            packing.finish()
        })?;
        let to = self.places.chunks.iter().zip(packed.of_chunks()).map(|(from, to)| ((self.pack(from).digest, from.block), to)).collect();
        let packs = own.iter().chain(&packed.others).copied().collect();
        Ok(Moves { own, packs, to })
    }
}

impl Moves {
    /// Where the chunk is now that was at `block` of `pack`: number of the pack in [`Moves::packs`], and block.
    ///
    /// Panics if no chunk of the layer was there.
    pub fn place(&self, pack: &PackRef, block: u32) -> Place {
        self.to[&(pack.digest, block)]
    }

    /// The packs that chunks of the layer are in now.
    pub fn packs(&self) -> &[PackRef] {
        &self.packs
    }

    /// The layer's tree after the move.
    pub fn tree(&self, tree: LayerTree) -> Result<LayerTree, ConvertError> {
        let LayerTree { packs, mut entries } = tree;
        for entry in &mut entries {
            let EntryKind::Node { content: Content::File(Data::Chunked { chunks, .. }), .. } = &mut entry.kind else { continue };
            for chunk in chunks {
                if let Chunk::At { pack, block } = *chunk {
                    let now = self.place(&packs[pack as usize], block);
                    *chunk = Chunk::At { pack: now.pack, block: now.block };
                }
            }
        }
        LayerTree::new(self.packs.clone(), entries).map_err(|source| ConvertError::Tree { source })
    }

    /// The places of a framing after the move.
    pub fn places(&self, places: &mut Places) {
        let before = places.packs.clone();
        places.map(&self.packs, |place| self.place(&before[place.pack as usize], place.block));
    }
}
