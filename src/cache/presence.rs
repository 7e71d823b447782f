//! The presence map: which units of a pack are durable in its local file, in memory and on disk.
//!
//! On disk a map is a file of two slots of [`SLOT`] bytes, written in turn, so that a torn write leaves the other slot. A slot, integers
//! little-endian:
//!
//! | offset | |
//! |---|---|
//! | 0 | magic `SLIPMAP1` |
//! | 8 | CRC-32 of everything from 12 to the end of the bits |
//! | 12 | number of units, u32 |
//! | 16 | generation, u64: the valid slot with the higher one counts |
//! | 24 | name of the pack, 32 bytes |
//! | 56 | one bit per unit, lowest first |
//!
//! A slot is written only after the data it stands for is durable (invariant 6). Anything that is not a valid slot for this very pack
//! counts as no slot, and no slot as an empty map: at worst data is fetched again.

use erofs::digest::Digest;

use super::UnitIndex;

/// Bytes of a slot, room for the bits of the largest pack: 2^14 units of 64 KiB.
pub const SLOT: usize = 4096;

const MAGIC: &[u8; 8] = b"SLIPMAP1";
const CRC_OFFSET: usize = MAGIC.len();
const UNITS_OFFSET: usize = CRC_OFFSET + size_of::<u32>();
const GENERATION_OFFSET: usize = UNITS_OFFSET + size_of::<u32>();
const PACK_OFFSET: usize = GENERATION_OFFSET + size_of::<u64>();
const BITS_OFFSET: usize = PACK_OFFSET + size_of::<Digest>();

/// A set of units of one pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Presence {
    units: u32,
    bits: Vec<u8>,
}

impl Presence {
    /// No unit of `units`.
    pub fn empty(units: u32) -> Presence {
        Presence { units, bits: vec![0; (units as usize).div_ceil(8)] }
    }

    /// Adds a unit. Panics if the pack has no such unit.
    pub fn insert(&mut self, unit: UnitIndex) {
        assert!(unit.0 < self.units, "unit {} of {}", unit.0, self.units);
        self.bits[unit.0 as usize / 8] |= 1 << (unit.0 % 8);
    }

    /// Adds the units of another set of the same pack.
    pub fn add(&mut self, other: &Presence) {
        self.bits.iter_mut().zip(&other.bits).for_each(|(byte, more)| *byte |= more);
    }

    /// Whether the unit is in the set.
    pub fn has(&self, unit: UnitIndex) -> bool {
        unit.0 < self.units && self.bits[unit.0 as usize / 8] & 1 << (unit.0 % 8) != 0
    }

    /// Number of units in the set.
    pub fn count(&self) -> u32 {
        self.bits.iter().map(|byte| byte.count_ones()).sum()
    }
}

/// What a map file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Of the slot that counts; 0 if none does.
    pub generation: u64,
    /// The durable units.
    pub present: Presence,
}

impl Saved {
    /// No map: no unit of `units` is durable.
    pub fn nothing(units: u32) -> Saved {
        Saved { generation: 0, present: Presence::empty(units) }
    }
}

/// The slot that says `saved`, and where in the map file it goes.
pub fn encode(pack: &Digest, saved: &Saved) -> (u64, Vec<u8>) {
    let Saved { generation, present } = saved;
    let mut slot = vec![0; SLOT];
    slot[..CRC_OFFSET].copy_from_slice(MAGIC);
    slot[UNITS_OFFSET..GENERATION_OFFSET].copy_from_slice(&present.units.to_le_bytes());
    slot[GENERATION_OFFSET..PACK_OFFSET].copy_from_slice(&generation.to_le_bytes());
    slot[PACK_OFFSET..BITS_OFFSET].copy_from_slice(&pack.0);
    let end = BITS_OFFSET + present.bits.len();
    slot[BITS_OFFSET..end].copy_from_slice(&present.bits);
    let crc = crc32fast::hash(&slot[UNITS_OFFSET..end]);
    slot[CRC_OFFSET..UNITS_OFFSET].copy_from_slice(&crc.to_le_bytes());
    (generation % 2 * SLOT as u64, slot)
}

/// Reads a map file of a pack with `units` units.
pub fn decode(pack: &Digest, units: u32, file: &[u8]) -> Saved {
    let valid = file.chunks_exact(SLOT).take(2).filter_map(|slot| decode_slot(pack, units, slot));
    valid.max_by_key(|saved| saved.generation).unwrap_or_else(|| Saved::nothing(units))
}

fn decode_slot(pack: &Digest, units: u32, slot: &[u8]) -> Option<Saved> {
    let (magic, rest) = slot.split_first_chunk::<8>()?;
    let (crc, covered) = rest.split_first_chunk::<4>()?;
    let (slot_units, rest) = covered.split_first_chunk::<4>()?;
    let (generation, rest) = rest.split_first_chunk::<8>()?;
    let (name, rest) = rest.split_first_chunk::<32>()?;
    let mut present = Presence::empty(units);
    let len = present.bits.len();
    present.bits.copy_from_slice(rest.get(..len)?);
    let covered = covered.get(..BITS_OFFSET - UNITS_OFFSET + len)?;
    let right = magic == MAGIC && *name == pack.0 && u32::from_le_bytes(*slot_units) == units && crc32fast::hash(covered) == u32::from_le_bytes(*crc);
    // Bits past the last unit would count as units.
    let tail_clear = units.is_multiple_of(8) || present.bits.last().is_none_or(|last| last >> (units % 8) == 0);
    (right && tail_clear).then(|| Saved { generation: u64::from_le_bytes(*generation), present })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn saved(generation: u64, units: u32, members: &[u32]) -> Saved {
        let mut present = Presence::empty(units);
        members.iter().for_each(|&unit| present.insert(UnitIndex(unit)));
        Saved { generation, present }
    }

    fn file(slots: &[(u64, Vec<u8>)]) -> Vec<u8> {
        let mut file = vec![0; 2 * SLOT];
        for (at, slot) in slots {
            file[*at as usize..][..SLOT].copy_from_slice(slot);
        }
        file
    }

    #[test]
    fn the_newer_valid_slot_counts() {
        let pack = Digest::of(b"pack");
        let older = encode(&pack, &saved(6, 11, &[0]));
        let newer = encode(&pack, &saved(7, 11, &[0, 10]));
        assert_eq!((older.0, newer.0), (0, 4096));
        let both = file(&[older.clone(), newer]);
        assert_eq!(decode(&pack, 11, &both), saved(7, 11, &[0, 10]));
        let mut torn = both.clone();
        torn[SLOT + BITS_OFFSET] ^= 0x10;
        assert_eq!(decode(&pack, 11, &torn), saved(6, 11, &[0]));
        assert_eq!(decode(&pack, 11, &both[..2 * SLOT - 1]), saved(6, 11, &[0]));
    }

    #[test]
    fn what_is_not_this_packs_map_is_an_empty_one() {
        let pack = Digest::of(b"pack");
        let map = file(&[encode(&pack, &saved(2, 11, &[1, 2, 3]))]);
        assert_eq!(decode(&Digest::of(b"other"), 11, &map), Saved::nothing(11));
        assert_eq!(decode(&pack, 12, &map), Saved::nothing(12));
        for len in [0, 1, 55, SLOT - 1] {
            assert_eq!(decode(&pack, 11, &map[..len]), Saved::nothing(11), "{len}");
        }
        for at in 0..BITS_OFFSET + 2 {
            let mut flipped = map.clone();
            flipped[at] ^= 1;
            assert_eq!(decode(&pack, 11, &flipped), Saved::nothing(11), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_read_back(units in 1u32..=16_384, seed: Vec<u32>, generation in 1u64..) {
            let pack = Digest::of(b"p");
            let saved = saved(generation, units, &seed.iter().map(|s| s % units).collect::<Vec<_>>());
            prop_assert_eq!(decode(&pack, units, &file(&[encode(&pack, &saved)])), saved);
        }

        #[test]
        fn no_bytes_make_it_panic(units in 0u32..=16_384, bytes in proptest::collection::vec(any::<u8>(), 0..9000)) {
            let _ = decode(&Digest::of(b"p"), units, &bytes);
        }
    }
}
