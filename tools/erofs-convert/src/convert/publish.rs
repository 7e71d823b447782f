//! From layer trees to what nodes find: metadata image, records for every prefix, image root.

use std::collections::HashMap;
use std::sync::Arc;

use erofs::digest::Digest;
use erofs::fold::{FOLD_VERSION, fold};
use erofs::image::{self, Checked, Image, ImageError};
use erofs::layer::LayerTree;
use erofs::meta::Content;
use erofs::tree::{Body, Tree};
use slipway::oci::{DiffId, SourceImage};
use slipway::store::{ImageRoot, LayerFiles, Payload, RootConfig, RootLayer, SigningKey, Sizes, Store, Trust, record};
use uapi::process::trim_heap;

use super::{Context, Finished, reuse};
use crate::failure::Failure;
use crate::parallel::in_parallel;

/// What is folded at once: each fold holds a whole tree and its metadata image, some 450 bytes per entry. So small images are folded on all
/// processors, and large ones do not take that memory several times over.
const ENTRIES_AT_ONCE: usize = 200_000;

type Outcome = (ImageRoot, Payload, Vec<(Digest, u64)>, Vec<bool>);

/// Publishes an image all of whose layers are `finished`. Gives the root, the record of the whole image, the packs with their lengths, and
/// which layers were reused.
pub(super) fn publish(
    context: &Context<'_>,
    jobs: usize,
    store: &Store,
    key: &SigningKey,
    image: &SourceImage,
    finished: HashMap<DiffId, Finished>,
) -> Result<Outcome, Failure> {
    let layers: Vec<&Finished> = image.layers.iter().map(|layer| &finished[&layer.diff_id]).collect();
    let trees: Vec<Arc<LayerTree>> = layers.iter().map(|layer| Arc::clone(&layer.tree)).collect();
    let files: Vec<LayerFiles> = layers.iter().map(|layer| layer.files).collect();
    let reused = layers.iter().map(|layer| layer.reused).collect();
    context.progress.say("folding layers");
    let stop = context.stop.child_token();
    let prefixes: Vec<Vec<Arc<LayerTree>>> = (1..=trees.len()).map(|len| trees[..len].to_vec()).collect();
    // From here on a tree is there for as long as it is folded: the whole image's own, which is folded last, then comes in the place of the layers'.
    drop(finished);
    let trust = Trust(vec![key.public()]);
    let entries: usize = trees.iter().map(|tree| tree.entries.len()).sum();
    let at_once = jobs.min(ENTRIES_AT_ONCE / entries.max(1)).max(1);
    drop(trees);
    trim_heap();
    let folded = in_parallel(at_once, prefixes, &stop, |trees| {
        let len = trees.len();
        let files = &files[..len];
        let known = if len < image.layers.len() { store.find(&image.layers[len - 1].chain_id, &trust)? } else { None };
        match known {
            // We said so ourselves before.
            Some(payload) if payload.layers().map(|(_, files)| files).eq(files.iter().copied()) => Ok(Prefix { payload, top_bytes: Vec::new() }),
            _ => Prefix::fold(store, key, image, trees, files),
        }
    })?;
    trim_heap();
    let (top, top_bytes) = folded.last().map(|prefix| (&prefix.payload, &prefix.top_bytes)).expect("an image has layers");
    read_back(top_bytes, top.metadata)?;
    store.put_metadata(top_bytes)?;
    for prefix in &folded {
        if context.stop.is_cancelled() {
            return Err(Failure::Stopped);
        }
        store.put_record(&prefix.payload, key)?;
    }
    let root = ImageRoot {
        source: image.name.clone(),
        target: None,
        platform: image.platform.to_string(),
        manifest: image.manifest_digest,
        chain: top.chain,
        metadata: top.metadata,
        config: RootConfig::new(&image.config_bytes),
        layers: image
            .layers
            .iter()
            .zip(&files)
            .map(|(layer, of)| RootLayer { blob: layer.digest, size: layer.size, diff_id: layer.diff_id, tree: of.tree, framing: of.framing })
            .collect(),
        sizes: top.sizes,
        compact: Vec::new(),
    };
    store.put_image(&root, key)?;
    let packs = top.packs.iter().map(|pack| Ok((pack.digest, reuse::pack_len(store, pack.digest)?))).collect::<Result<_, Failure>>()?;
    Ok((root, top.clone(), packs, reused))
}

/// The lowest layers of an image, folded.
struct Prefix {
    payload: Payload,
    /// The metadata image, kept of the whole image only: nodes fold the others themselves if they ever mount them.
    top_bytes: Vec<u8>,
}

impl Prefix {
    fn fold(store: &Store, key: &SigningKey, image: &SourceImage, trees: Vec<Arc<LayerTree>>, files: &[LayerFiles]) -> Result<Prefix, Failure> {
        let len = trees.len();
        let top = len == image.layers.len();
        let chain = image.layers[len - 1].chain_id;
        let tree = fold(&trees).map_err(|source| Failure::Fold { chain, source })?;
        drop(trees);
        trim_heap();
        let checked = Checked::new(tree).map_err(|source| Failure::Tree { chain, source })?;
        let built = image::write(&checked);
        let tree = checked.tree();
        if tree.packs.len() > record::MAX_PACKS {
            return Err(Failure::TooManyPacks { image: image.name.clone(), chain, count: tree.packs.len() });
        }
        let mut stored = 0;
        for pack in &tree.packs {
            stored += reuse::pack_len(store, pack.digest)?;
        }
        let sizes = Sizes { metadata: built.bytes.len() as u64, content: content_size(tree), inodes: tree.inodes.len() as u64, stored };
        let payload = Payload {
            chain,
            parent: len.checked_sub(2).map(|below| image.layers[below].chain_id),
            diff_ids: image.layers[..len].iter().map(|layer| layer.diff_id).collect(),
            trees: files.iter().map(|files| files.tree).collect(),
            framings: files.iter().map(|files| files.framing).collect(),
            metadata: built.digest,
            fold_version: FOLD_VERSION,
            packs: tree.packs.clone(),
            sizes,
            top,
            stands_for: None,
            tool: record::tool(),
            key: key.public().id(),
        };
        Ok(Prefix { payload, top_bytes: if top { built.bytes } else { Vec::new() } })
    }
}

/// The writer is checked by the reader before anything is named after its output: what is read back must give the same image again.
fn read_back(bytes: &[u8], digest: Digest) -> Result<(), Failure> {
    let tree = Image::open(bytes).and_then(|image| image.to_tree()).map_err(|source| Failure::Metadata { digest, source })?;
    let again = Checked::new(tree).map_err(|error| Failure::Metadata { digest, source: ImageError::Tree(error) })?;
    assert_eq!(image::write(&again).digest, digest, "a metadata image that is read back gives itself");
    Ok(())
}

/// Bytes of all regular files, each inode once.
fn content_size(tree: &Tree) -> u64 {
    let size = |inode: &erofs::tree::Inode| match &inode.body {
        Body::Content(Content::File(data)) => data.size(),
        _ => 0,
    };
    tree.inodes.iter().map(size).sum()
}

#[cfg(test)]
mod tests {
    use erofs::block::UnitBits;
    use erofs::layer::{Entry, EntryKind};
    use erofs::meta::{Attr, Chunk, Data, PackRef};
    use slipway::oci::{Platform, Sha256, SourceLayer, chain_ids};
    use slipway::store::Name;

    use super::*;

    /// A layer with one file in a pack of its own.
    fn layer(number: usize) -> LayerTree {
        let pack = PackRef { digest: Digest::of(&number.to_le_bytes()), blocks: 64, unit_bits: UnitBits::DEFAULT };
        let data = Data::Chunked { size: 200_000, unit_bits: UnitBits::DEFAULT, chunks: vec![Chunk::At { pack: 0, block: 0 }] };
        let kind = EntryKind::Node { attr: Attr { mode: 0o644, ..Attr::default() }, content: Content::File(data) };
        LayerTree::new(vec![pack], vec![Entry { path: format!("file{number}").into_bytes(), kind }]).unwrap()
    }

    /// Nodes pass over a record with more packs than a mount takes, so it must not come to one.
    #[test]
    fn an_image_of_more_packs_than_a_mount_takes_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::create(dir.path()).unwrap();
        let key_dir = tempfile::tempdir().unwrap();
        let key = SigningKey::load_or_create(&key_dir.path().join("key")).unwrap();
        let count = record::MAX_PACKS + 1;
        let trees: Vec<Arc<LayerTree>> = (0..count).map(|number| layer(number).into()).collect();
        let files = |tree: &LayerTree| LayerFiles { tree: Digest::of(&tree.encode()), framing: Digest::of(b"no node reads it") };
        let files: Vec<LayerFiles> = trees.iter().map(|tree| files(tree)).collect();
        let diff_ids: Vec<DiffId> = (0..count).map(|i| DiffId(Sha256::of(&i.to_le_bytes()))).collect();
        let layers = chain_ids(&diff_ids).into_iter().zip(&diff_ids);
        let layers =
            layers.map(|(chain_id, diff_id)| SourceLayer { digest: diff_id.0, size: 0, media_type: String::new(), diff_id: *diff_id, chain_id });
        let image = SourceImage {
            name: "example.com/app:1".to_owned(),
            manifest_digest: Sha256::of(b"manifest"),
            manifest_bytes: Vec::new(),
            config_bytes: Vec::new(),
            platform: Platform::host(),
            layers: layers.collect(),
        };
        for tree in &trees {
            store.publish(store.temp().unwrap(), &Name::Pack(tree.packs[0].digest)).unwrap();
        }
        let fold = |len: usize| Prefix::fold(&store, &key, &image, trees[..len].to_vec(), &files[..len]);
        assert_eq!(fold(count - 1).map(|prefix| prefix.payload.packs.len()).map_err(|failure| failure.report()), Ok(count - 1));
        let Err(failure) = fold(count) else { panic!("{count} packs are taken") };
        let text = failure.report();
        for part in ["example.com/app:1", &image.layers[count - 1].chain_id.to_string(), "257", "256", "fewer layers"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
