//! The table of cases that says what folding means.

use proptest::prelude::*;

use super::*;
use crate::block::UnitBits;
use crate::layer::{Entry, EntryKind};
use crate::meta::{Attr, Chunk, Content, Data, PackRef};
use crate::tree::{Body, InodeIndex};

/// One entry as text: `path/` directory, `path/:` implied directory, `path/!` opaque one, `path=text` file, `path@target` symbolic link,
/// `path>target` hard link, `-path` whiteout. A mode in octal may follow after a space.
fn entry(text: &str) -> Entry {
    let (text, mode) = text.split_once(' ').map_or((text, 0o700), |(text, mode)| (text, u16::from_str_radix(mode, 8).unwrap()));
    let attr = Attr { mode, ..Attr::default() };
    let node = |content| EntryKind::Node { attr: attr.clone(), content };
    let (path, kind) = if let Some(path) = text.strip_prefix('-') {
        (path, EntryKind::Whiteout)
    } else if let Some((path, target)) = text.split_once('>') {
        (path, EntryKind::Link { target: target.into() })
    } else if let Some((path, target)) = text.split_once('@') {
        (path, node(Content::Symlink(target.into())))
    } else if let Some((path, bytes)) = text.split_once('=') {
        (path, node(Content::File(Data::Inline(bytes.into()))))
    } else if let Some(path) = text.strip_suffix("/!:") {
        (path, EntryKind::Dir { attr: None, opaque: true })
    } else if let Some(path) = text.strip_suffix("/:") {
        (path, EntryKind::Dir { attr: None, opaque: false })
    } else if let Some(path) = text.strip_suffix("/!") {
        (path, EntryKind::Dir { attr: Some(attr), opaque: true })
    } else {
        (text.strip_suffix('/').unwrap(), EntryKind::Dir { attr: Some(attr), opaque: false })
    };
    Entry { path: path.into(), kind }
}

fn layer(entries: &str) -> LayerTree {
    LayerTree::new(vec![], entries.split(", ").filter(|e| !e.is_empty()).map(entry).collect()).unwrap()
}

/// Paths of a tree in order, with content; names of one inode beyond the first point to the first; modes unless 0700.
fn text(tree: &Tree) -> String {
    let mut names: Vec<Option<String>> = vec![None; tree.inodes.len()];
    let mut lines = Vec::new();
    let mut todo = vec![(String::new(), Tree::ROOT)];
    while let Some((path, index)) = todo.pop() {
        let inode = tree.inode(index);
        let mode = if inode.attr.mode == 0o700 { String::new() } else { format!(" {:o}", inode.attr.mode) };
        match (&inode.body, &names[index.0 as usize]) {
            (_, Some(first)) => lines.push(format!("{path}>{first}")),
            (Body::Dir(children), _) => {
                let prefix = if path.is_empty() { String::new() } else { format!("{path}/") };
                todo.extend(children.iter().rev().map(|(name, child)| (prefix.clone() + std::str::from_utf8(name).unwrap(), *child)));
                lines.push(format!("{path}/{mode}"));
            }
            (Body::Content(Content::Symlink(target)), _) => lines.push(format!("{path}@{}{mode}", target.escape_ascii())),
            (Body::Content(Content::File(Data::Inline(bytes))), _) => lines.push(format!("{path}={}{mode}", bytes.escape_ascii())),
            (Body::Content(other), _) => lines.push(format!("{path} {other:?}")),
        }
        names[index.0 as usize].get_or_insert(path);
    }
    lines.join(", ")
}

/// Folds these layers, bottom first; the tree without its root, or the error.
fn check(layers: &[&str], expected: &str) {
    let layers: Vec<_> = layers.iter().map(|l| layer(l)).collect();
    let found = match fold(&layers) {
        Ok(tree) => text(&tree).strip_prefix("/ 755").expect("the root is implicit").trim_start_matches(", ").to_owned(),
        Err(error) => error.to_string(),
    };
    assert_eq!(found, expected);
}

#[test]
fn layers_merge_by_path() {
    check(&[], "");
    check(&["", ""], "");
    check(&["d/, d/a=1", "d/b=2"], "d/, d/a=1, d/b=2");
    check(&["a=1", "a=2"], "a=2");
    check(&["d/ 711, d/a=1", "d/ 750"], "d/ 750, d/a=1");
}

#[test]
fn the_root_takes_attributes_only_from_a_layer_that_lists_it() {
    for (layers, mode) in [(vec![""], 0o755), (vec!["a=1"], 0o755), (vec!["/ 700", "a=1"], 0o700), (vec!["/ 700", "/ 711"], 0o711)] {
        let layers: Vec<_> = layers.into_iter().map(layer).collect();
        assert_eq!(fold(&layers).unwrap().inode(Tree::ROOT).attr.mode, mode);
    }
    assert_eq!(text(&fold(&[layer("a=1, d/b=2"), layer("/!, c=3")]).unwrap()), "/, c=3");
}

#[test]
fn implied_directories_never_override() {
    check(&["d/ 711, d/a=1", "d/b=2"], "d/ 711, d/a=1, d/b=2");
    check(&["d/b=2"], "d/ 755, d/b=2");
    check(&["d/b=2", "d/ 711", "d/c=3"], "d/ 711, d/b=2, d/c=3");
    check(&["d=1", "d/b=2"], "d/ 755, d/b=2");
    // Over a link to a directory: a new directory with that one's attributes (containerd's mkparent copies them through the link).
    check(&["usr/lib/ 711, usr/lib/a=1, lib@usr/lib", "lib/b=2"], "lib/ 711, lib/b=2, usr/ 755, usr/lib/ 711, usr/lib/a=1");
    check(&["usr/lib/ 711, lib@/usr/../../usr/lib/", "lib/b=2"], "lib/ 711, lib/b=2, usr/ 755, usr/lib/ 711");
    check(&["lib@nowhere", "lib/b=2"], "lib/ 755, lib/b=2");
    check(&["lib@lib", "lib/b=2"], "lib/ 755, lib/b=2");
    check(&["f=1, lib@f", "lib/b=2"], "f=1, lib/ 755, lib/b=2");
}

#[test]
fn whiteouts_remove_what_is_below() {
    check(&["a=1, b=2", "-a"], "b=2");
    check(&["d/, d/a=1", "-d"], "");
    check(&["d/, d/a=1, d/b=2", "-d/a"], "d/, d/b=2");
    check(&["b=2", "-a, -x/y"], "b=2, x/ 755");
    check(&["a=1", "-a", "a=2"], "a=2");
    check(&["d/ 711, d/a=1", "-d", "d/b=2"], "d/ 755, d/b=2");
    check(&["d@x", "-d/e"], "d/ 755");
}

#[test]
fn opaque_directories_hide_children_below() {
    check(&["d/, d/a=1, d/e/f=1", "d/!, d/b=2"], "d/, d/b=2");
    check(&["d/ 711, d/a=1", "d/!:, d/b=2"], "d/ 711, d/b=2");
    check(&["d/, d/a=1", "d/!", "d/c=3"], "d/, d/c=3");
    check(&["d=1", "d/!"], "d/");
    check(&["d/, d/e/ 711, d/e/f=1", "d/!, d/e/g=2"], "d/, d/e/ 711, d/e/g=2");
    // Hidden by a layer in between it is gone, to the fold if not to containerd.
    check(&["d/, d/e/ 711, d/e/f=1", "d/!", "d/e/g=2"], "d/, d/e/ 755, d/e/g=2");
}

#[test]
fn directories_are_replaced_by_files_and_back() {
    check(&["d/, d/a=1", "d=2"], "d=2");
    check(&["d/, d/a=1", "d=2", "d/b=3"], "d/ 755, d/b=3");
    check(&["d/, d/a=1", "d@e", "d/"], "d/");
    check(&["a=1", "a/", "a@b"], "a@b");
}

#[test]
fn hard_links_are_names_of_one_inode() {
    check(&["a=1, b>a"], "a=1, b>a");
    check(&["a>b, b=1, c>b"], "a=1, b>a, c>a");
    check(&["d/a=1, e/b>d/a"], "d/ 755, d/a=1, e/ 755, e/b>d/a");
    check(&["a@x, b>a"], "a@x, b>a");
    // Below.
    check(&["a=1", "b>a"], "a=1, b>a");
    check(&["a=1, c>a", "b>a"], "a=1, b>a, c>a");
    check(&["lib@usr/lib, usr/lib/f=1", "b>lib/f"], "b=1, lib@usr/lib, usr/ 755, usr/lib/ 755, usr/lib/f>b");
    check(&["a@x", "b>a"], "a@x, b>a");
    // One name of an inode going away or changing leaves the others.
    check(&["a=1, b>a", "-a"], "b=1");
    check(&["a=1, b>a", "a=2"], "a=2, b=1");
    check(&["a=1, b>a", "b=2", "c>a"], "a=1, b=2, c>a");
    // What is below means before this layer: removing the target and linking to it go together.
    check(&["a=1", "-a, b>a"], "b=1");
    check(&["d/a=1", "d/!, b>d/a"], "b=1, d/");
    check(&["d/a=1", "-d, b>d/a"], "b=1");
    check(&["d/a=1", "d/b>d/a, d/!"], "d/, d/b=1");
    check(&["a=1, d/", "d>a"], "a=1, d>a");
    // The layer's own file comes before one below.
    check(&["a=1", "a=2, b>a"], "a=2, b>a");
}

#[test]
fn links_to_nothing_are_errors() {
    let error = |layer, path, target| {
        format!("layer {layer}: hard link \"{path}\" cannot be made: \"{target}\" is no file in the layers below; check the order of the layers")
    };
    check(&["b>a"], &error(0, "b", "a"));
    check(&["d/", "b>d"], &error(1, "b", "d"));
    check(&["a=1", "-a", "b>a"], &error(2, "b", "a"));
    check(&["l@l", "b>l/a"], &error(1, "b", "l/a"));
    check(&["f=1", "b>f/a"], &error(1, "b", "f/a"));
}

#[test]
fn a_layer_tree_that_breaks_the_rules_is_refused() {
    let broken = LayerTree { packs: vec![], entries: vec![entry("d/a=1")] };
    assert!(matches!(fold(&[layer("x=1"), broken]), Err(FoldError::Layer { layer: 1, .. })));
}

fn pack(n: u8, blocks: u32) -> PackRef {
    PackRef { digest: Digest([n; 32]), blocks, unit_bits: UnitBits::MIN }
}

/// A file with one chunk in each of these packs.
fn chunked(path: &str, packs: &[u32]) -> Entry {
    let chunks: Vec<_> = packs.iter().map(|&pack| Chunk::At { pack, block: 0 }).collect();
    let data = Data::Chunked { size: 65536 * chunks.len() as u64, unit_bits: UnitBits::MIN, chunks };
    Entry { path: path.into(), kind: EntryKind::Node { attr: Attr::default(), content: Content::File(data) } }
}

#[test]
fn packs_come_in_first_use_order_and_unused_ones_go() {
    let bottom =
        LayerTree::new(vec![pack(1, 16), pack(2, 16), pack(3, 16)], vec![chunked("a", &[0]), chunked("b", &[1]), chunked("z", &[2, 1])]).unwrap();
    let top = LayerTree::new(vec![pack(3, 16), pack(4, 16)], vec![chunked("a/x", &[0]), entry("-b"), chunked("c", &[1])]).unwrap();
    let tree = fold(&[bottom.clone(), top]).unwrap();
    assert_eq!(tree.packs, [pack(3, 16), pack(4, 16), pack(2, 16)]);
    let Body::Content(Content::File(Data::Chunked { chunks, .. })) = &tree.inodes.last().unwrap().body else { panic!() };
    assert_eq!(chunks[..], [Chunk::At { pack: 0, block: 0 }, Chunk::At { pack: 2, block: 0 }]);
    assert_eq!(tree.inodes.len(), 5, "root, a, a/x, c, z: what was replaced is gone");
    let other = LayerTree::new(vec![pack(2, 17)], vec![chunked("q", &[0])]).unwrap();
    assert_eq!(fold(&[bottom, other]), Err(FoldError::Pack { layer: 1, pack: Digest([2; 32]) }));
}

#[test]
fn very_deep_trees_fold() {
    let deep = "d/".repeat(4000) + "f=1";
    let tree = fold(&[layer(&deep), layer(&("d/".repeat(3999) + "g=2"))]).unwrap();
    assert_eq!(tree.inodes.len(), 4003);
}

/// Layers of a few names, so that everything meets everything.
fn layers() -> impl Strategy<Value = Vec<LayerTree>> {
    let path = prop::sample::select(vec!["a", "b", "d", "d/a", "d/b", "d/e", "d/e/a", "e", "e/a"]);
    let kind = (path.clone(), 0..8u8, path).prop_map(|(path, kind, other)| match kind {
        0 => format!("-{path}"),
        1 => format!("{path}/"),
        2 => format!("{path}/!"),
        3 => format!("{path}/:"),
        4 => format!("{path}@{other}"),
        5 => format!("{path}>{other}"),
        _ => format!("{path}=1"),
    });
    let one = prop::collection::vec(kind, 0..6)
        .prop_filter_map("a valid layer", |texts| LayerTree::new(vec![], texts.iter().map(|t| entry(t)).collect()).ok());
    prop::collection::vec(one, 0..5)
}

proptest! {
    #[test]
    fn folded_trees_are_canonical(layers in layers()) {
        if let Ok(tree) = fold(&layers) {
            prop_assert_eq!(&fold(&layers).unwrap(), &tree);
            // Depth first by name: every inode is first met in the order of its number.
            let mut met = 0;
            let mut todo = vec![Tree::ROOT];
            while let Some(InodeIndex(index)) = todo.pop() {
                prop_assert!(index <= met);
                met += u32::from(index == met);
                if index + 1 == met && let Body::Dir(children) = &tree.inodes[index as usize].body {
                    todo.extend(children.values().rev());
                }
            }
            prop_assert_eq!(met as usize, tree.inodes.len());
        }
    }

    #[test]
    fn hiding_everything_below_leaves_the_layers_above(layers in layers()) {
        // Applied twice, with everything hidden in between, layers give what they give applied once.
        if let Ok(tree) = fold(&layers) {
            let again: Vec<_> = layers.iter().cloned().chain([layer("/!:")]).chain(layers.iter().cloned()).collect();
            prop_assert_eq!(text(&fold(&again).unwrap()), text(&tree));
        }
    }
}
