//! What of an image's data was stored already, and what was not.

use std::collections::{BTreeMap, HashMap, HashSet};

use erofs::block::BLOCK_SIZE;
use erofs::digest::Digest;
use erofs::layer::{EntryKind, LayerTree};
use erofs::meta::{Chunk, Content, Data};
use serde_json::{Value, json};
use slipway::oci::{DiffId, SourceImage};

use super::Finished;

/// Data of an image's layers, each distinct chunk of a layer counted once. Zeros and data kept in the metadata are in neither.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Savings {
    /// Bytes that packs new in the store hold.
    pub new: u64,
    /// Bytes of the files of those packs: what the store grew by.
    pub stored: u64,
    /// Bytes that were there: in packs of other images, in layers below, in layers that were not converted.
    pub present: u64,
}

impl Savings {
    /// Of an image all of whose layers are `finished`.
    pub(super) fn of(image: &SourceImage, finished: &HashMap<DiffId, Finished>) -> Savings {
        let mut savings = Savings::default();
        let mut seen = HashSet::new();
        for layer in image.layers.iter().filter(|layer| seen.insert(layer.diff_id)).map(|layer| &finished[&layer.diff_id]) {
            savings.stored += layer.new_packs.iter().map(|(_, len)| len).sum::<u64>();
            for (pack, bytes) in data_by_pack(&layer.tree) {
                let is_new = layer.new_packs.iter().any(|(new, _)| *new == pack);
                *(if is_new { &mut savings.new } else { &mut savings.present }) += bytes;
            }
        }
        savings
    }

    /// Share of the data that was there, 0 to 1.
    pub fn ratio(&self) -> f64 {
        let all = self.new + self.present;
        if all == 0 { 0.0 } else { self.present as f64 / all as f64 }
    }

    /// For programs.
    pub fn json(&self) -> Value {
        json!({"new": self.new, "newStored": self.stored, "present": self.present, "ratio": self.ratio()})
    }
}

/// Bytes of the distinct chunks that the tree has in each pack, padded to blocks.
pub(super) fn data_by_pack(tree: &LayerTree) -> BTreeMap<Digest, u64> {
    let mut chunks: HashSet<(u32, u32)> = HashSet::new();
    let mut packs = BTreeMap::new();
    for entry in &tree.entries {
        let EntryKind::Node { content: Content::File(Data::Chunked { size, unit_bits, chunks: of_file }), .. } = &entry.kind else { continue };
        for (i, chunk) in of_file.iter().enumerate() {
            if let Chunk::At { pack, block } = *chunk
                && chunks.insert((pack, block))
            {
                let bytes = (size - i as u64 * unit_bits.bytes()).min(unit_bits.bytes()).next_multiple_of(BLOCK_SIZE);
                *packs.entry(tree.packs[pack as usize].digest).or_default() += bytes;
            }
        }
    }
    packs
}
