//! Layer trees: any bytes are decoded without panic; what decodes encodes to the same bytes; what folds can be written as a
//! metadata image and comes back from it.
#![no_main]

use erofs::fold::fold;
use erofs::image::{Checked, Image, write};
use erofs::layer::LayerTree;
use libfuzzer_sys::fuzz_target;

/// What comes before the first byte that matters to the fuzzer: it need not guess the magic.
fn magic() -> Vec<u8> {
    let empty = LayerTree::new(Vec::new(), Vec::new()).expect("an empty layer obeys the rules").encode();
    empty[..empty.len().min(8)].to_vec()
}

fn decode(input: &[u8]) -> Option<LayerTree> {
    let bytes = [&magic(), input].concat();
    let tree = LayerTree::decode(&bytes).ok()?;
    assert!(tree.encode() == bytes, "a layer tree has more than one encoding");
    Some(tree)
}

fuzz_target!(|input: &[u8]| {
    let _ = LayerTree::decode(input);
    // The first byte says where the input is cut into two layers.
    let Some((&cut, rest)) = input.split_first() else { return };
    let (lower, upper) = rest.split_at(rest.len() * usize::from(cut) / 256);
    let layers: Vec<LayerTree> = [lower, upper].into_iter().filter_map(decode).collect();
    let Ok(tree) = fold(&layers) else { return };
    // Layers may be larger than what EROFS takes; then the gate says so.
    let Ok(checked) = Checked::new(tree) else { return };
    let built = write(&checked);
    let again = Image::open(&built.bytes).expect("what was written can be read").to_tree().expect("what was written can be read");
    assert!(again == *checked.tree(), "a folded tree changes when written");
});
