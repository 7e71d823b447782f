//! Layers whose data is partly in other layers' packs.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use erofs::digest::Digest;

use super::*;

/// Packs of layers that were converted before, and the chunks in them.
#[derive(Default)]
pub struct Shelf {
    tables: BTreeMap<Digest, Arc<ChunkTable>>,
    places: HashMap<Digest, Vec<(Digest, u32)>>,
}

impl Shelf {
    pub fn add(&mut self, sink: &MemorySink) {
        for (name, file) in &sink.packs {
            let footer = PackTable::parse_footer(name, &file[file.len() - 4096..]).unwrap();
            let (at, len) = footer.chunk_table();
            let chunks = footer.parse_chunks(&file[at as usize..at as usize + len]).unwrap();
            for chunk in &chunks {
                self.places.entry(chunk.digest).or_default().push((*name, chunk.block));
            }
            self.tables.insert(*name, Arc::new(ChunkTable::new(footer.pack_ref(), chunks)));
        }
        self.places.values_mut().for_each(|places| places.sort_unstable());
    }
}

impl Known for Shelf {
    fn candidates(&self, digest: &Digest, _: &dyn Fn(&Digest) -> bool) -> Vec<(Digest, u32)> {
        self.places.get(digest).cloned().unwrap_or_default()
    }

    fn table(&self, pack: &Digest) -> io::Result<Option<Arc<ChunkTable>>> {
        Ok(self.tables.get(pack).cloned())
    }
}

/// Files by the seed of their content; the size depends on it, so that equal seeds are equal files.
fn files(seeds: &[u8]) -> Vec<(String, Vec<u8>)> {
    let size = |seed: u8| match seed % 4 {
        0 => 300 + usize::from(seed) * 40,
        1 => 20_000 + usize::from(seed) * 50,
        2 => 65_536 * (1 + usize::from(seed) % 3),
        _ => 150_000 + usize::from(seed) * 1000,
    };
    seeds.iter().enumerate().map(|(i, &seed)| (format!("d{}/f{i}", i % 3), noise(seed, size(seed)))).collect()
}

fn archive(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    tar(&files.iter().map(|(name, bytes)| (&name[..], &bytes[..])).collect::<Vec<_>>())
}

/// The tree, the framing, the layer's own packs, and what was made of them.
fn beside(shelf: &Shelf, tar: &[u8], max_packs: usize) -> (LayerTree, Vec<u8>, Vec<PackRef>, MemorySink) {
    let mut sink = MemorySink::default();
    let elsewhere = Elsewhere { known: shelf, max_packs };
    let Converted { tree, framing, places, own, .. } = convert_layer_beside(elsewhere, tar, &mut sink, Vec::new(), &options(2)).unwrap();
    (tree, framing.finish(&places).unwrap(), own, sink)
}

/// Bytes of distinct chunks of the tree in each pack.
fn referred(tree: &LayerTree) -> BTreeMap<Digest, u64> {
    let mut chunks: BTreeMap<(u32, u32), u64> = BTreeMap::new();
    for entry in &tree.entries {
        let EntryKind::Node { content: Content::File(Data::Chunked { size, chunks: of_file, .. }), .. } = &entry.kind else { continue };
        for (i, chunk) in of_file.iter().enumerate() {
            if let Chunk::At { pack, block } = *chunk {
                chunks.insert((pack, block), (size - i as u64 * 65536).min(65536).next_multiple_of(4096));
            }
        }
    }
    let mut out = BTreeMap::new();
    for ((pack, _), bytes) in chunks {
        *out.entry(tree.packs[pack as usize].digest).or_default() += bytes;
    }
    out
}

#[test]
fn a_layer_that_is_mostly_stored_takes_only_what_is_new() {
    let old: Vec<u8> = (0..60).collect();
    let (_, old_sink) = convert(&archive(&files(&old)));
    let mut shelf = Shelf::default();
    shelf.add(&old_sink);
    // Most of it in the same order, a file of its own in the middle and at the end.
    let new = files(&[&old[5..30], &[200], &old[30..50], &[201]].concat());
    let (tree, framing, own, sink) = beside(&shelf, &archive(&new), 9);
    let own: u64 = own.iter().map(|pack| u64::from(pack.blocks) * 4096).sum();
    let fresh: u64 = files(&[200, 201]).iter().map(|(_, bytes)| bytes.len().next_multiple_of(4096) as u64).sum();
    assert_eq!(own, fresh);
    let mut all = MemorySink::default();
    all.packs.extend(old_sink.packs.into_iter().chain(sink.packs));
    for (name, bytes) in &new {
        assert!(read_back(&tree, &all, name) == *bytes, "{name}");
    }
    assert!(all.tar(&framing) == archive(&new), "the framing follows the chunks");
    // With nothing known, or no pack allowed, it is all its own.
    let alone = convert(&archive(&new)).0;
    assert_eq!(beside(&Shelf::default(), &archive(&new), 9).0, alone);
    assert_eq!(beside(&shelf, &archive(&new), 0).0, alone);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn layers_read_back_whatever_is_known_and_refer_only_to_what_is_worth_it(
        old in prop::collection::vec((0u8..60, 1u8..30), 1..6),
        new in prop::collection::vec((0u8..90, 1u8..30), 1..6),
        max_packs in 0usize..4,
    ) {
        // Stretches of consecutive seeds: what is in both has a chance to be a run.
        let stretches = |of: &[(u8, u8)]| of.iter().flat_map(|(from, len)| *from..from + len).collect::<Vec<u8>>();
        let mut shelf = Shelf::default();
        let mut all = MemorySink::default();
        for stretch in &old {
            let (_, sink) = convert(&archive(&files(&stretches(&[*stretch]))));
            shelf.add(&sink);
            all.packs.extend(sink.packs);
        }
        let new = files(&stretches(&new));
        let tar = archive(&new);
        let (tree, framing, _, sink) = beside(&shelf, &tar, max_packs);
        let again = beside(&shelf, &tar, max_packs);
        prop_assert!((&again.0, &again.1) == (&tree, &framing), "the same again");
        let own: Vec<Digest> = sink.packs.keys().copied().collect();
        all.packs.extend(sink.packs);
        for (name, bytes) in &new {
            prop_assert!(read_back(&tree, &all, name) == *bytes, "{}", name);
        }
        prop_assert!(all.tar(&framing) == tar);
        let others: BTreeMap<_, _> = referred(&tree).into_iter().filter(|(pack, _)| !own.contains(pack)).collect();
        prop_assert!(others.len() <= max_packs);
        prop_assert!(others.values().all(|bytes| *bytes >= runs::RUN), "{:?}", others);
    }
}

/// Reads blocks of packs in memory.
fn blocks_of(sink: &MemorySink) -> impl FnMut(&PackRef, u32, u32) -> io::Result<Vec<u8>> {
    |pack, block, blocks| {
        let file = &sink.packs[&pack.digest];
        let footer = PackTable::parse_footer(&pack.digest, &file[file.len() - 4096..]).unwrap();
        let (at, len) = footer.unit_table();
        let table = PackTable::parse(footer, &file[at as usize..at as usize + len]).unwrap();
        let (unit, mut bytes) = (table.unit(block / 16).unwrap(), vec![0; table.unit_len(block / 16)]);
        decode_unit(unit, &file[unit.offset as usize..][..unit.stored_len as usize], &mut bytes).unwrap();
        Ok(bytes[block as usize % 16 * 4096..][..blocks as usize * 4096].to_vec())
    }
}

/// Converts layers alone and settles them from the lowest: trees, framings, packs that stay, and bytes saved.
fn image(layers: &[Vec<(String, Vec<u8>)>]) -> (Vec<LayerTree>, Vec<Vec<u8>>, MemorySink, u64) {
    let (mut shelf, mut kept, mut saved) = (Shelf::default(), MemorySink::default(), 0);
    let (mut trees, mut framings) = (Vec::new(), Vec::new());
    let size = |packs: &[PackRef]| packs.iter().map(|pack| u64::from(pack.blocks) * 4096).sum::<u64>();
    for files in layers {
        let (mut first, mut again) = (MemorySink::default(), MemorySink::default());
        let converted = convert_layer_framed(&archive(files)[..], &mut first, Vec::new(), &options(2)).unwrap();
        let Converted { mut tree, framing, mut places, own, chunks } = converted;
        let before = settle::Before { chunks: &chunks, places: &places, own: &own };
        if let Some(shared) = before.shared(Elsewhere { known: &shelf, max_packs: 9 }).unwrap() {
            let moves = before.without(&shared, &mut again, &options(2), blocks_of(&first)).unwrap();
            tree = moves.tree(tree).unwrap();
            moves.places(&mut places);
            saved += size(&own) - size(&moves.own);
            first = again;
        }
        shelf.add(&first);
        kept.packs.extend(first.packs);
        framings.push(framing.finish(&places).unwrap());
        trees.push(tree);
    }
    (trees, framings, kept, saved)
}

#[test]
fn a_layer_loses_what_the_layers_below_have_and_nothing_else() {
    let seeds: Vec<u8> = (0..40).collect();
    let layers = [files(&seeds[..30]), files(&[&[100], &seeds[5..25], &[101], &seeds[30..], &seeds[28..30]].concat()), files(&seeds[10..35])];
    let (trees, framings, packs, saved) = image(&layers);
    for ((files, tree), framing) in layers.iter().zip(&trees).zip(&framings) {
        for (name, bytes) in files {
            assert!(read_back(tree, &packs, name) == *bytes, "{name}");
        }
        assert!(packs.tar(framing) == archive(files));
    }
    let bytes = |seeds: &[u8]| files(seeds).iter().map(|(_, bytes)| bytes.len().next_multiple_of(4096) as u64).sum::<u64>();
    // Files 28 and 29 are no run worth it, and neither are 30 to 34 after the others, which are in another pack.
    assert!(saved >= bytes(&seeds[5..25]) + bytes(&seeds[10..30]), "{saved}");
    assert_eq!(trees.iter().map(|tree| tree.packs.len()).collect::<Vec<_>>(), [1, 2, 2]);
}

#[test]
fn a_layer_of_which_little_is_below_stays_as_it_was_packed() {
    let shared = files(&(0..16).collect::<Vec<u8>>());
    let size = shared.iter().map(|(_, bytes)| bytes.len().next_multiple_of(4096)).sum::<usize>();
    let saved = |more: usize| image(&[shared.clone(), shared.iter().cloned().chain([("large".to_owned(), noise(200, size * more))]).collect()]).3;
    assert!(saved(1) >= size as u64);
    assert_eq!(saved(17), 0, "it is not worth compressing all the rest again");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn settled_layers_read_back_whatever_is_below_them(layers in prop::collection::vec(prop::collection::vec((0u8..80, 1u8..25), 1..4), 1..5)) {
        let layers: Vec<_> = layers.iter().map(|of| files(&of.iter().flat_map(|(from, len)| *from..from + len).collect::<Vec<u8>>())).collect();
        let (trees, framings, packs, _) = image(&layers);
        for ((files, tree), framing) in layers.iter().zip(&trees).zip(&framings) {
            for (name, bytes) in files {
                prop_assert!(read_back(tree, &packs, name) == *bytes, "{}", name);
            }
            prop_assert!(packs.tar(framing) == archive(files));
            prop_assert_eq!(&LayerTree::decode(&tree.encode()).unwrap(), tree);
        }
        let again = image(&layers);
        prop_assert!((again.0, again.1, again.2.packs) == (trees, framings, packs.packs));
    }
}
