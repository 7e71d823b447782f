//! How many packs an image may refer to, and how they are shared out.
//!
//! An image has at most [`MAX_PACKS`] packs, of its own and of others. Before any layer is read it is decided how many packs of others each
//! may refer to: what layers in the store refer to is known, for layers to come an estimate of their own packs is set aside, and the rest is
//! split evenly. So the share of a layer does not depend on how the others turn out.
//!
//! The estimate may be too small, and layers in the store may refer to many packs. If the image then refers to too many, layers that refer to more
//! than they would need of their own are converted again, alone: references to others never make an image fail.

use std::collections::{BTreeSet, HashMap};

use erofs::digest::Digest;
use erofs::layer::LayerTree;
use erofs::pack::MAX_PACK_BYTES;
use slipway::oci::{DiffId, SourceImage, SourceLayer};
use slipway::store::record::MAX_PACKS;

use super::Finished;
use super::savings::data_by_pack;

/// How many times larger than its blob a layer's data is at most, by estimate.
const EXPANSION: u64 = 4;

/// Packs of others that one layer may refer to at most: what it shares with is rarely more than a few layers, and each pack is a device of the
/// mount and an open file on the node.
const MAX_SHARE: usize = 32;

/// Packs of others that each of the layers `todo` may refer to.
pub(super) fn share(finished: &HashMap<DiffId, Finished>, todo: &[(usize, &SourceLayer)]) -> usize {
    let known: BTreeSet<Digest> = finished.values().flat_map(|layer| &layer.tree.packs).map(|pack| pack.digest).collect();
    let own: u64 = todo.iter().map(|(_, layer)| 1 + layer.size.saturating_mul(EXPANSION) / MAX_PACK_BYTES).sum();
    let left = (MAX_PACKS as u64).saturating_sub(known.len() as u64).saturating_sub(own) as usize;
    (left / todo.len().max(1)).min(MAX_SHARE)
}

/// Layers, with their numbers, that have to be converted again without references to others, for the image has too many packs.
pub(super) fn crowded<'a>(image: &'a SourceImage, finished: &HashMap<DiffId, Finished>) -> Vec<(usize, &'a SourceLayer)> {
    let all: BTreeSet<Digest> = image.layers.iter().flat_map(|layer| &finished[&layer.diff_id].tree.packs).map(|pack| pack.digest).collect();
    if all.len() <= MAX_PACKS {
        return Vec::new();
    }
    let mut seen = BTreeSet::new();
    let layers = image.layers.iter().enumerate().map(|(i, layer)| (i + 1, layer)).filter(|(_, layer)| seen.insert(layer.diff_id));
    layers.filter(|(_, layer)| needs_fewer(&finished[&layer.diff_id].tree)).collect()
}

/// Whether the layer's data would take fewer packs if it were all its own.
fn needs_fewer(tree: &LayerTree) -> bool {
    let bytes: u64 = data_by_pack(tree).values().sum();
    // Units that small files share are not always full.
    tree.packs.len() as u64 > 1 + bytes / (MAX_PACK_BYTES / 2)
}

#[cfg(test)]
mod tests {
    use erofs::block::UnitBits;
    use erofs::layer::{Entry, EntryKind};
    use erofs::meta::{Attr, Chunk, Content, Data, PackRef};
    use slipway::oci::{ChainId, Platform, Sha256};
    use slipway::store::LayerFiles;

    use super::*;

    /// A layer with a chunk in each of these packs.
    fn finished(packs: std::ops::Range<u32>) -> Finished {
        let pack = |n: u32| PackRef { digest: Digest::of(&n.to_le_bytes()), blocks: 64, unit_bits: UnitBits::DEFAULT };
        let chunks = (0..packs.len() as u32).map(|pack| Chunk::At { pack, block: 0 }).collect::<Vec<_>>();
        let data = Data::Chunked { size: chunks.len() as u64 * UnitBits::DEFAULT.bytes(), unit_bits: UnitBits::DEFAULT, chunks };
        let kind = EntryKind::Node { attr: Attr::default(), content: Content::File(data) };
        let tree = LayerTree::new(packs.map(pack).collect(), vec![Entry { path: b"f".to_vec(), kind }]).unwrap();
        let files = LayerFiles { tree: Digest::of(&tree.encode()), framing: Digest::of(b"no matter") };
        Finished { files, tree: tree.into(), reused: false, new_packs: Vec::new() }
    }

    fn layer(name: &str, size: u64) -> SourceLayer {
        let digest = Sha256::of(name.as_bytes());
        SourceLayer { digest, size, media_type: String::new(), diff_id: DiffId(digest), chain_id: ChainId(digest) }
    }

    #[test]
    fn room_is_left_for_what_layers_have_of_their_own() {
        let check = |known: u32, sizes: &[u64], expected: usize| {
            let layers: Vec<SourceLayer> = sizes.iter().enumerate().map(|(i, size)| layer(&i.to_string(), *size)).collect();
            let todo: Vec<_> = layers.iter().enumerate().map(|(i, layer)| (i + 1, layer)).collect();
            let finished = HashMap::from([(DiffId(Sha256::of(b"known")), finished(0..known.max(1)))]);
            assert_eq!(share(&finished, &todo), expected, "{known} {sizes:?}");
            assert!(known as usize + todo.len() * (expected + 1) <= MAX_PACKS.max(known as usize + todo.len()));
        };
        check(1, &[1 << 20], 32);
        check(1, &[1 << 20; 10], 24);
        check(1, &[1 << 20; 100], 1);
        check(1, &[1 << 20; 200], 0);
        check(250, &[1 << 20], 5);
        check(1, &[10 << 30; 5], 10);
        check(256, &[1 << 20], 0);
        check(1, &[u64::MAX], 0);
    }

    #[test]
    fn an_image_with_too_many_packs_makes_do_with_fewer() {
        let layers: Vec<SourceLayer> = ["a", "b", "c", "b"].map(|name| layer(name, 1)).to_vec();
        let image = |layers: &[SourceLayer]| SourceImage {
            name: "example.com/app:1".to_owned(),
            manifest_digest: Sha256::of(b""),
            manifest_bytes: Vec::new(),
            config_bytes: Vec::new(),
            platform: Platform::host(),
            layers: layers.to_vec(),
        };
        let check = |packs: [std::ops::Range<u32>; 3], expected: &[usize]| {
            let finished = layers.iter().zip(packs).map(|(layer, packs)| (layer.diff_id, finished(packs))).collect();
            assert_eq!(crowded(&image(&layers), &finished).iter().map(|(number, _)| *number).collect::<Vec<_>>(), expected);
        };
        check([0..100, 100..200, 200..256], &[]);
        check([0..200, 0..200, 0..256], &[]);
        check([0..100, 100..200, 200..257], &[1, 2, 3]);
        check([0..250, 250..251, 251..257], &[1, 3]);
    }
}
