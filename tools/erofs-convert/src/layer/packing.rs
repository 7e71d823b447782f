//! Chunks to units, and where each of them then is.

use std::collections::HashMap;

use erofs::block::{BLOCK_SIZE, UnitBits};
use erofs::digest::Digest;
use erofs::framing::Place;
use erofs::meta::PackRef;
use erofs::pack::{MAX_PACK_BYTES, PlacedUnit, Placer};

use super::ConvertError;
use super::compress::{Feeder, Unit};

/// Number of a chunk in the order the layer first has them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct ChunkId(pub u32);

/// Gives every chunk of a layer a place, and feeds units to the compressors. Chunks may get theirs later than others of higher numbers.
pub(super) struct Packing<'f> {
    unit_bits: UnitBits,
    placer: Placer<(ChunkId, Digest)>,
    places: Vec<Placed>,
    units: u32,
    feeder: &'f Feeder,
    /// Packs of others that chunks are in, and their numbers.
    others: Vec<PackRef>,
    other_numbers: HashMap<Digest, u32>,
}

/// Where a chunk is.
#[derive(Clone, Copy)]
enum Placed {
    /// In this unit of the layer, at this block of the unit.
    Own { unit: u32, block: u32 },
    /// In this one of the packs of others, at this block.
    Elsewhere { other: u32, block: u32 },
}

/// Where every chunk of a layer is.
pub(super) struct Packed {
    unit_bits: UnitBits,
    units: u32,
    places: Vec<Placed>,
    /// Packs of others that chunks are in.
    pub others: Vec<PackRef>,
}

impl<'f> Packing<'f> {
    pub fn new(unit_bits: UnitBits, feeder: &'f Feeder) -> Packing<'f> {
        let placer = Placer::new(unit_bits);
        Packing { unit_bits, placer, places: Vec::new(), units: 0, feeder, others: Vec::new(), other_numbers: HashMap::new() }
    }

    /// One more chunk, which is to get its place by [`Packing::store`] or [`Packing::refer`].
    pub fn number(&mut self) -> ChunkId {
        self.places.push(Placed::Own { unit: u32::MAX, block: 0 });
        ChunkId(self.places.len() as u32 - 1)
    }

    /// Stores a chunk in the layer's packs.
    pub fn store(&mut self, id: ChunkId, digest: Digest, bytes: Vec<u8>) -> Result<(), ConvertError> {
        self.placer.lend(|| self.feeder.buffer());
        match self.placer.push(bytes, (id, digest)) {
            Some(unit) => self.send(unit),
            None => Ok(()),
        }
    }

    /// Refers to a chunk in a pack of others.
    pub fn refer(&mut self, id: ChunkId, pack: &PackRef, block: u32) {
        let other = *self.other_numbers.entry(pack.digest).or_insert_with(|| {
            self.others.push(*pack);
            self.others.len() as u32 - 1
        });
        self.places[id.0 as usize] = Placed::Elsewhere { other, block };
    }

    fn send(&mut self, unit: PlacedUnit<(ChunkId, Digest)>) -> Result<(), ConvertError> {
        for piece in &unit.pieces {
            self.places[piece.handle.0.0 as usize] = Placed::Own { unit: self.units, block: piece.block };
        }
        self.units += 1;
        // A chunk that fills its unit has the unit's digest.
        let digest = match unit.pieces[..] {
            [piece] if piece.blocks as u64 * BLOCK_SIZE == unit.data.len() as u64 => Some(piece.handle.1),
            _ => None,
        };
        let chunks = unit.pieces.iter().map(|p| (p.handle.1, p.block, p.blocks)).collect();
        self.feeder.send(Unit { data: unit.data, digest, chunks })
    }

    /// Sends what is left; from then on every chunk has its place.
    pub fn finish(mut self) -> Result<Packed, ConvertError> {
        let last = std::mem::replace(&mut self.placer, Placer::new(self.unit_bits)).finish();
        if let Some(unit) = last {
            self.send(unit)?;
        }
        Ok(Packed { unit_bits: self.unit_bits, units: self.units, places: self.places, others: self.others })
    }
}

impl Packed {
    /// Where every chunk is, by its number, as a framing has it.
    pub fn of_chunks(&self) -> Vec<Place> {
        self.places.iter().map(|placed| self.place(*placed)).collect()
    }

    /// Where a chunk is; the pack is that in a list of the layer's own and then [`Packed::others`].
    pub fn get(&self, id: ChunkId) -> Option<Place> {
        self.places.get(id.0 as usize).map(|placed| self.place(*placed))
    }

    /// Every one of the layer's own packs but the last is full.
    fn place(&self, placed: Placed) -> Place {
        let units_per_pack = (MAX_PACK_BYTES / self.unit_bits.bytes()) as u32;
        match placed {
            Placed::Own { unit, block } => Place { pack: unit / units_per_pack, block: unit % units_per_pack * self.unit_bits.blocks() + block },
            Placed::Elsewhere { other, block } => Place { pack: self.units.div_ceil(units_per_pack) + other, block },
        }
    }
}
