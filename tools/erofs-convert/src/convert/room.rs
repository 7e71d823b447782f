//! How many packs an image may refer to, and how they are shared out.
//!
//! An image has at most [`MAX_PACKS`] packs, of its own and of others. Before any layer is read it is decided how many packs of others each
//! may refer to: what layers refer to that records name is known, for all others an estimate of their own packs is set aside, and the rest is
//! split evenly. So the share of a layer does not depend on how the others turn out, nor on whether some were finished by a run that was stopped.
//!
//! The estimate may be too small, and layers in the store may refer to many packs. If the image then refers to too many, layers that refer to more
//! than they would need of their own are converted again, alone: references to others never make an image fail.

use std::collections::{BTreeSet, HashMap};

use erofs::digest::Digest;
use erofs::layer::LayerTree;
use erofs::pack::MAX_PACK_BYTES;
use slipway::oci::{DiffId, SourceImage, SourceLayer};
use slipway::store::LayerFiles;
use slipway::store::record::MAX_PACKS;

use super::Finished;
use super::savings::data_by_pack;

/// How many times larger than its blob a layer's data is at most, by estimate.
const EXPANSION: u64 = 4;

/// Packs of others that one layer may refer to at most: what it shares with is rarely more than a few layers, and each pack is a device of the
/// mount and an open file on the node.
const MAX_SHARE: usize = 32;

/// Packs of others that each layer of `image` may refer to that no record names. `is_named` says whether one does: of a layer that only the journal has,
/// some run of this converter was stopped, and what is left is to turn out as if it had not been.
pub(super) fn share(image: &SourceImage, finished: &HashMap<DiffId, Finished>, is_named: impl Fn(&DiffId, LayerFiles) -> bool) -> usize {
    let (mut known, mut others, mut own) = (BTreeSet::new(), BTreeSet::new(), 0u64);
    for layer in &image.layers {
        match finished.get(&layer.diff_id).filter(|finished| is_named(&layer.diff_id, finished.files)) {
            Some(named) => known.extend(named.tree.packs.iter().map(|pack| pack.digest)),
            None if others.insert(layer.diff_id) => own = own.saturating_add(1 + layer.size.saturating_mul(EXPANSION) / MAX_PACK_BYTES),
            None => {}
        }
    }
    let left = (MAX_PACKS as u64).saturating_sub(known.len() as u64).saturating_sub(own) as usize;
    (left / others.len().max(1)).min(MAX_SHARE)
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

/// Whether the layer's data could do with fewer packs if it were all its own. It may take more than that when units that small files share are not
/// full; but what could not do with fewer need not be tried.
fn needs_fewer(tree: &LayerTree) -> bool {
    let bytes: u64 = data_by_pack(tree).values().sum();
    tree.packs.len() as u64 > bytes.div_ceil(MAX_PACK_BYTES).max(1)
}

#[cfg(test)]
mod tests {
    use erofs::block::UnitBits;
    use erofs::layer::{Entry, EntryKind};
    use erofs::meta::{Attr, Chunk, Content, Data, PackRef};
    use slipway::oci::{Access, ChainId, Platform, Sha256, Source};
    use slipway::store::{Reach, Store};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::convert::layer_job::LayerJob;
    use crate::convert::{Context, Options, convert_layers};
    use crate::journal::Journal;
    use crate::layer::{Elsewhere, Stages};
    use crate::leftovers::Leftovers;
    use crate::progress::Progress;

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

    fn image(layers: &[SourceLayer]) -> SourceImage {
        SourceImage {
            name: "example.com/app:1".to_owned(),
            manifest_digest: Sha256::of(b""),
            manifest_bytes: Vec::new(),
            config_bytes: Vec::new(),
            platform: Platform::host(),
            layers: layers.to_vec(),
        }
    }

    #[test]
    fn room_is_left_for_what_layers_have_of_their_own() {
        let check = |known: u32, sizes: &[u64], expected: usize| {
            let layers: Vec<SourceLayer> = sizes.iter().enumerate().map(|(i, size)| layer(&i.to_string(), *size)).collect();
            let of_image: Vec<_> = layers.iter().cloned().chain([layer("known", 1)]).collect();
            let is_known = |diff_id: &DiffId, _| *diff_id == DiffId(Sha256::of(b"known"));
            let mut done = HashMap::from([(DiffId(Sha256::of(b"known")), finished(0..known.max(1)))]);
            assert_eq!(share(&image(&of_image), &done, is_known), expected, "{known} {sizes:?}");
            assert!(known as usize + layers.len() * (expected + 1) <= MAX_PACKS.max(known as usize + layers.len()));
            // One was finished by a run that was stopped.
            done.insert(layers[0].diff_id, finished(known..known + 20));
            assert_eq!(share(&image(&of_image), &done, is_known), expected, "{known} {sizes:?}");
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
        let check = |packs: [std::ops::Range<u32>; 3], expected: &[usize]| {
            let finished = layers.iter().zip(packs).map(|(layer, packs)| (layer.diff_id, finished(packs))).collect();
            assert_eq!(crowded(&image(&layers), &finished).iter().map(|(number, _)| *number).collect::<Vec<_>>(), expected);
        };
        check([0..100, 100..200, 200..256], &[]);
        check([0..200, 0..200, 0..256], &[]);
        check([0..100, 100..200, 200..257], &[1, 2, 3]);
        check([0..250, 250..251, 251..257], &[1, 3]);
    }

    #[test]
    fn large_layers_that_could_do_with_fewer_packs_do() {
        let check = |units: u64, packs: u32, expected: bool| {
            let pack = |n: u32| PackRef { digest: Digest::of(&n.to_le_bytes()), blocks: u32::MAX, unit_bits: UnitBits::DEFAULT };
            let place = |i: u64| Chunk::At { pack: i as u32 % packs, block: i as u32 / packs * UnitBits::DEFAULT.blocks() };
            let data =
                Data::Chunked { size: units * UnitBits::DEFAULT.bytes(), unit_bits: UnitBits::DEFAULT, chunks: (0..units).map(place).collect() };
            let kind = EntryKind::Node { attr: Attr::default(), content: Content::File(data) };
            let tree = LayerTree::new((0..packs).map(pack).collect(), vec![Entry { path: b"f".to_vec(), kind }]).unwrap();
            assert_eq!(needs_fewer(&tree), expected, "{units} units in {packs} packs");
        };
        let full = MAX_PACK_BYTES / UnitBits::DEFAULT.bytes();
        for (units, packs, expected) in [(full, 1, false), (full, 2, true), (full + full / 5, 3, true), (full + 1, 2, false), (2 * full, 3, true)] {
            check(units, packs, expected);
        }
    }

    #[test]
    fn a_layer_of_too_many_packs_is_converted_again_alone() {
        let dir = tempfile::tempdir().unwrap();
        let made = |name: &str| {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            dir.path().join(name)
        };
        let layout = testbed::Layout::create(&dir.path().join("layout")).unwrap();
        let content = testbed::Layer::new([testbed::Entry::file("f", testbed::noise(1, 300_000))]);
        layout.add("1", &testbed::Image::new().layer(&content, testbed::Compression::Plain)).unwrap();
        let source = Source::parse(&format!("oci:{}:1", layout.path().display()), &Access::default()).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let of_source = runtime.block_on(source.resolve(&Platform::host())).unwrap();
        let options = Options {
            source,
            platform: Platform::host(),
            store: made("store"),
            state: made("state"),
            key: dir.path().join("key"),
            jobs: 1,
            target: None,
        };
        let store = Store::create(&options.store).unwrap();
        let journal = Journal::open(&options.state).unwrap();
        let leftovers = Leftovers::take_over(&options.state, &Progress::Silent).unwrap();
        let (stop, stages) = (CancellationToken::new(), Stages::default());
        let context = Context { runtime: runtime.handle(), stop: &stop, progress: &Progress::Silent };
        let job = LayerJob {
            context: &context,
            source: &options.source,
            image: &of_source,
            store: &store,
            journal: &journal,
            leftovers: &leftovers,
            elsewhere: Elsewhere::NOTHING,
            stop: &stop,
            stages: &stages,
        };
        let diff_id = of_source.layers[0].diff_id;
        let left_over = (Digest::of(b"of the first attempt"), 7);
        let mut layers = HashMap::from([(diff_id, Finished { new_packs: vec![left_over], ..finished(0..257) })]);
        convert_layers(&job, &options, &Reach::default(), Vec::new(), &mut layers).unwrap();
        let again = &layers[&diff_id];
        assert_eq!(again.tree.packs.len(), 1);
        assert_eq!(
            again.new_packs.iter().map(|(pack, _)| *pack).collect::<Vec<_>>(),
            [again.tree.packs[0].digest, left_over.0],
            "both are in the store"
        );
        assert!(crowded(&of_source, &layers).is_empty());
    }
}
