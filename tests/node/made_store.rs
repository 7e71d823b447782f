//! A store with one image of two layers, made without a converter.

use std::path::Path;

use erofs::block::UnitBits;
use erofs::fold::{FOLD_VERSION, fold};
use erofs::image::Checked;
use erofs::layer::{Entry, EntryKind, LayerTree};
use erofs::meta::{Attr, Chunk, Content, Data, Time};
use erofs::pack::{PackWriter, encode_unit};
use slipway::oci::{ChainId, DiffId, Sha256, chain_ids};
use slipway::store::record::tool;
use slipway::store::{Name, Payload, SigningKey, Sizes, Store};
use testbed::Noise;

/// Not a multiple of anything: tails of files and of chunks are read as well.
pub const FILE_LEN: usize = 2 * 1024 * 1024 + 12_345;

/// Name and content of the upper layer's one file.
pub const NOTE: &str = "note";

/// A file's bytes. Every other one compresses, and none has eight equal bytes anywhere, so that zeros can only come from a hole.
pub fn content(file: u64) -> Vec<u8> {
    let mut noise = Noise(file);
    let mask = if file.is_multiple_of(2) { u64::MAX } else { 0x0f0f_0f0f_0f0f_0f0f };
    (0..FILE_LEN.div_ceil(8)).flat_map(|_| (noise.next() & mask | 1 << 60).to_le_bytes()).take(FILE_LEN).collect()
}

/// Puts an image into a new store, signed by `key`: a layer with so many files, and one with a [`NOTE`]. Gives the image's chain.
pub fn make_store(dir: &Path, key: &SigningKey, count: u64) -> ChainId {
    std::fs::create_dir(dir).expect("a directory");
    let store = Store::create(dir).expect("a store");
    let bits = UnitBits::MIN;
    let mut pack = PackWriter::new(store.temp().expect("a temporary file"), bits);
    let mut files = Vec::new();
    for file in 0..count {
        let place = |bytes: &[u8]| {
            let mut unit = bytes.to_vec();
            unit.resize(bits.bytes() as usize, 0);
            let unit = encode_unit(&unit, 1);
            Chunk::At { pack: 0, block: pack.push(&unit, &[(unit.digest, 0, bits.blocks())]).expect("room in the pack") }
        };
        let chunks = content(file).chunks(bits.bytes() as usize).map(place).collect();
        files.push(Data::Chunked { size: FILE_LEN as u64, unit_bits: bits, chunks });
    }
    let pack = pack.finish().expect("a pack");
    store.publish(pack.out, &Name::Pack(pack.pack.digest)).expect("a published pack");

    let attr = Attr { mode: 0o644, mtime: Time { sec: 1_700_000_000, nsec: 123_456_789 }, ..Attr::default() };
    let node =
        |(path, data): (String, Data)| Entry { path: path.into_bytes(), kind: EntryKind::Node { attr: attr.clone(), content: Content::File(data) } };
    let files = (0..count).map(name).zip(files).map(node).collect();
    let note = node((NOTE.to_owned(), Data::Inline(NOTE.as_bytes().to_vec())));
    let layers = [LayerTree::new(vec![pack.pack], files), LayerTree::new(Vec::new(), vec![note])].map(|layer| layer.expect("a layer tree"));

    let diff_ids = [DiffId(Sha256([7; 32])), DiffId(Sha256([8; 32]))];
    let chains = chain_ids(&diff_ids);
    let put_tree = |(diff_id, tree)| store.put_tree(diff_id, tree).expect("a published tree").0;
    let trees: Vec<_> = diff_ids.iter().zip(&layers).map(put_tree).collect();
    for length in 1..=layers.len() {
        let folded = fold(&layers[..length]).expect("a tree");
        let packs = folded.packs.clone();
        let image = erofs::image::write(&Checked::new(folded).expect("a valid tree"));
        let top = length == layers.len();
        if top {
            store.put_metadata(&image.bytes).expect("a published image");
        }
        let payload = Payload {
            chain: chains[length - 1],
            parent: length.checked_sub(2).map(|below| chains[below]),
            diff_ids: diff_ids[..length].to_vec(),
            trees: trees[..length].to_vec(),
            // No node looks for them.
            framings: trees[..length].to_vec(),
            metadata: image.digest,
            fold_version: FOLD_VERSION,
            packs,
            sizes: Sizes {
                metadata: image.bytes.len() as u64,
                content: count * FILE_LEN as u64,
                inodes: count + length as u64,
                stored: pack.file_len,
            },
            top,
            stands_for: None,
            tool: tool(),
            key: key.public().id(),
        };
        store.put_record(&payload, key).expect("a signed record");
    }
    chains[1]
}

/// A file's name.
pub fn name(file: u64) -> String {
    format!("file-{file:02}")
}
