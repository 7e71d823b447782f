//! The tree that must be against the tree that is.

use std::collections::HashMap;

use erofs::meta::{self, Content};
use erofs::tree::{self, InodeIndex, Tree};

use super::model::{Attr, Body, Model, NodeId, ROOT};

/// Differences kept with their text; beyond these they are only counted.
const MAX_SHOWN: usize = 1000;

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Path, bytes that are no printable ASCII escaped.
    pub path: String,
    /// What differs, source first.
    pub what: String,
}

/// What was found different.
#[derive(Clone, Debug, Default)]
pub struct Differences {
    /// How many there are.
    pub count: usize,
    /// The first of them.
    pub shown: Vec<Difference>,
    /// Names compared.
    pub names: usize,
    /// Bytes of file data compared.
    pub bytes: u64,
}

impl Differences {
    /// One more.
    pub fn add(&mut self, path: &[u8], what: impl Into<String>) {
        self.count += 1;
        if self.shown.len() < MAX_SHOWN {
            let path = if path.is_empty() { "/".to_owned() } else { path.escape_ascii().to_string() };
            self.shown.push(Difference { path, what: what.into() });
        }
    }
}

/// A regular file whose data is still to be compared.
#[derive(Clone, Debug)]
pub struct FileToRead {
    /// Its first path.
    pub path: Vec<u8>,
    /// The node it must be.
    pub node: NodeId,
    /// The inode it is.
    pub inode: InodeIndex,
}

/// Compares everything but file data; gives the files whose data is to be read, each inode once.
pub fn compare(model: &Model, tree: &Tree, differences: &mut Differences) -> Vec<FileToRead> {
    let mut compare = Compare { model, tree, differences, there: HashMap::new(), back: HashMap::new(), files: Vec::new() };
    let mut todo = vec![(Vec::new(), ROOT, Tree::ROOT)];
    while let Some((path, node, inode)) = todo.pop() {
        compare.pair(&path, node, inode, &mut todo);
    }
    compare.files
}

struct Compare<'a> {
    model: &'a Model,
    tree: &'a Tree,
    differences: &'a mut Differences,
    /// Which inode a node turned out to be, and back: hard links are right when both are one to one.
    there: HashMap<NodeId, InodeIndex>,
    back: HashMap<InodeIndex, NodeId>,
    files: Vec<FileToRead>,
}

type Pair = (Vec<u8>, NodeId, InodeIndex);

impl Compare<'_> {
    fn pair(&mut self, path: &[u8], node: NodeId, inode: InodeIndex, todo: &mut Vec<Pair>) {
        self.differences.names += 1;
        let (known, known_back) = (self.there.insert(node, inode), self.back.insert(inode, node));
        if known == Some(inode) && known_back == Some(node) {
            return;
        }
        if known.is_some() || known_back.is_some() {
            self.differences.add(path, "is hard linked to other names in the source than in the image");
        }
        let (expected, found) = (&self.model.nodes[node], self.tree.inode(inode));
        self.attributes(path, &expected.attr, &found.attr);
        match (&expected.body, &found.body) {
            (Body::Dir(expected), tree::Body::Dir(found)) => {
                let join = |name: &[u8]| if path.is_empty() { name.to_vec() } else { [path, name].join(&b'/') };
                for name in found.keys().filter(|name| !expected.contains_key(*name)) {
                    self.differences.add(&join(name), "is in the image and not in the source");
                }
                for (name, (node, _)) in expected.iter().rev() {
                    match found.get(name) {
                        Some(inode) => todo.push((join(name), *node, *inode)),
                        None => self.differences.add(&join(name), "is in the source and not in the image"),
                    }
                }
            }
            (Body::File(size, _), tree::Body::Content(Content::File(data))) => {
                if *size == data.size() {
                    self.files.push(FileToRead { path: path.to_vec(), node, inode });
                } else {
                    self.differences.add(path, format!("has {size} bytes in the source, {} in the image", data.size()));
                }
            }
            (expected, found) => {
                let (expected, found) = (kind(expected), found_kind(found));
                if expected != found {
                    self.differences.add(path, format!("is {expected} in the source, {found} in the image"));
                }
            }
        }
    }

    fn attributes(&mut self, path: &[u8], expected: &Attr, found: &meta::Attr) {
        let mut field = |name: &str, expected: String, found: String| {
            if expected != found {
                self.differences.add(path, format!("has {name} {expected} in the source, {found} in the image"));
            }
        };
        let time = |t: meta::Time| format!("{}.{:09}", t.sec, t.nsec);
        field("mode", format!("{:04o}", expected.mode), format!("{:04o}", found.mode));
        field("owner", format!("{}:{}", expected.uid, expected.gid), format!("{}:{}", found.uid, found.gid));
        field("modification time", time(expected.mtime), time(found.mtime));
        let xattr = |(name, value): (&Vec<u8>, &Vec<u8>)| format!("{}=\"{}\"", name.escape_ascii(), value.escape_ascii());
        let expected: Vec<String> = expected.xattrs.iter().map(xattr).collect();
        let found: Vec<String> = found.xattrs.iter().map(|x| xattr((&x.name, &x.value))).collect();
        field("extended attributes", format!("[{}]", expected.join(", ")), format!("[{}]", found.join(", ")));
    }
}

fn kind(body: &Body) -> String {
    match body {
        Body::Dir(_) => "a directory".to_owned(),
        Body::File(..) => "a file".to_owned(),
        Body::Symlink(target) => format!("a symbolic link to \"{}\"", target.escape_ascii()),
        Body::Char(device) => format!("character device {}:{}", device.major, device.minor),
        Body::Block(device) => format!("block device {}:{}", device.major, device.minor),
        Body::Fifo => "a pipe".to_owned(),
    }
}

fn found_kind(body: &tree::Body) -> String {
    match body {
        tree::Body::Dir(_) => "a directory".to_owned(),
        tree::Body::Content(Content::File(_)) => "a file".to_owned(),
        tree::Body::Content(Content::Symlink(target)) => kind(&Body::Symlink(target.clone())),
        tree::Body::Content(Content::Char(device)) => kind(&Body::Char(*device)),
        tree::Body::Content(Content::Block(device)) => kind(&Body::Block(*device)),
        tree::Body::Content(Content::Fifo) => kind(&Body::Fifo),
        tree::Body::Content(Content::Socket) => "a socket".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use erofs::layer::{Entry, EntryKind, LayerTree};
    use erofs::meta::Data;
    use proptest::prelude::*;
    use testbed::Layer;

    use super::*;

    /// An image with a directory, two names of one file and a symbolic link, changed by `change`, against the archive of the unchanged.
    fn check(change: impl Fn(&mut Vec<Entry>), expected: &[(&str, &str)]) {
        use testbed::Entry as Made;
        let archive = Layer::new([
            Made::dir("d").mode(0o700).mtime(1, 2),
            Made::file("d/a", "hello").owner(1, 2).mtime(3, 4).xattr("user.x", b"1"),
            Made::hard_link("d/b", "d/a").owner(1, 2).mtime(3, 4).xattr("user.x", b"1"),
            Made::symlink("s", "d/a").mtime(5, 6),
        ]);
        let mut model = Model::default();
        model.apply(&archive.tar()[..]).unwrap();
        let attr =
            |mode, owner: (u32, u32), sec, nsec| meta::Attr { mode, uid: owner.0, gid: owner.1, mtime: meta::Time { sec, nsec }, xattrs: vec![] };
        let node = |attr, content| EntryKind::Node { attr, content };
        let file = meta::Attr { xattrs: vec![meta::Xattr { name: b"user.x".to_vec(), value: b"1".to_vec() }], ..attr(0o644, (1, 2), 3, 4) };
        let mut entries: Vec<Entry> = [
            ("d", EntryKind::Dir { attr: Some(attr(0o700, (0, 0), 1, 2)), opaque: false }),
            ("d/a", node(file, Content::File(Data::Inline(b"hello".to_vec())))),
            ("d/b", EntryKind::Link { target: b"d/a".to_vec() }),
            ("s", node(attr(0o777, (0, 0), 5, 6), Content::Symlink(b"d/a".to_vec()))),
        ]
        .into_iter()
        .map(|(path, kind)| Entry { path: path.into(), kind })
        .collect();
        change(&mut entries);
        let tree = erofs::fold::fold(&[LayerTree::new(vec![], entries).unwrap()]).unwrap();
        let mut differences = Differences::default();
        let files = compare(&model, &tree, &mut differences);
        let found: Vec<(&str, &str)> = differences.shown.iter().map(|d| (d.path.as_str(), d.what.as_str())).collect();
        assert_eq!(found, expected);
        assert!(!expected.is_empty() || files.len() == 1, "one inode's data is to be read");
    }

    fn attr_of(entry: &mut Entry) -> &mut meta::Attr {
        match &mut entry.kind {
            EntryKind::Dir { attr: Some(attr), .. } | EntryKind::Node { attr, .. } => attr,
            _ => panic!(),
        }
    }

    #[test]
    fn every_difference_is_named() {
        check(|_| (), &[]);
        check(|e| attr_of(&mut e[0]).mode = 0o711, &[("d", "has mode 0700 in the source, 0711 in the image")]);
        check(|e| attr_of(&mut e[1]).uid = 9, &[("d/a", "has owner 1:2 in the source, 9:2 in the image")]);
        check(|e| attr_of(&mut e[3]).mtime.nsec = 0, &[("s", "has modification time 5.000000006 in the source, 5.000000000 in the image")]);
        check(|e| attr_of(&mut e[1]).xattrs.clear(), &[("d/a", "has extended attributes [user.x=\"1\"] in the source, [] in the image")]);
        check(|e| drop(e.remove(3)), &[("s", "is in the source and not in the image")]);
        let extra = |e: &mut Vec<Entry>| {
            let mut entry = e[3].clone();
            entry.path = b"t\n".to_vec();
            e.push(entry);
        };
        check(extra, &[("t\\n", "is in the image and not in the source")]);
        let content =
            |content: Content| move |e: &mut Vec<Entry>| e[3].kind = EntryKind::Node { attr: attr_of(&mut e[3]).clone(), content: content.clone() };
        check(content(Content::Fifo), &[("s", "is a symbolic link to \"d/a\" in the source, a pipe in the image")]);
        let longer = |e: &mut Vec<Entry>| {
            e[1].kind = EntryKind::Node { attr: attr_of(&mut e[1]).clone(), content: Content::File(Data::Inline(b"hello!".to_vec())) }
        };
        check(longer, &[("d/a", "has 5 bytes in the source, 6 in the image")]);
        let split = |e: &mut Vec<Entry>| e[2].kind = e[1].kind.clone();
        check(split, &[("d/b", "is hard linked to other names in the source than in the image")]);
    }

    /// Layers of a few entries over a few names, so that they meet in every way.
    fn layers() -> impl Strategy<Value = Vec<Vec<testbed::Entry>>> {
        use testbed::Entry as Made;
        let path = || {
            let name = proptest::sample::select(vec!["a", "b", "c"]);
            proptest::collection::vec(name, 1..4).prop_map(|names| names.join("/"))
        };
        let entry = prop_oneof![
            3 => (path(), 0..8u32).prop_map(|(path, bits)| Made::dir(&path).mode(0o700 + bits).mtime(i64::from(bits), 0)),
            3 => (path(), "[xy]{0,3}", 0..8u32).prop_map(|(path, text, bits)| Made::file(&path, text).mode(0o600 + bits)),
            1 => (path(), path()).prop_map(|(path, target)| Made::symlink(&path, &target)),
            1 => (path(), path()).prop_map(|(path, target)| Made::symlink(&path, &format!("/{target}"))),
            2 => (path(), path()).prop_map(|(path, target)| Made::hard_link(&path, &target)),
            3 => path().prop_map(|path| Made::whiteout(&path)),
            1 => path().prop_map(|path| Made::opaque(&path)),
        ];
        proptest::collection::vec(proptest::collection::vec(entry, 0..8), 1..4)
    }

    /// What the converter makes of the layers, if it accepts them.
    fn converted(layers: &[Vec<testbed::Entry>]) -> Option<Tree> {
        let options = crate::layer::LayerOptions { threads: 1, ..Default::default() };
        let mut sink = crate::layer::MemorySink::default();
        let convert = |layer: &Vec<testbed::Entry>| crate::layer::convert_layer(&Layer::new(layer.clone()).tar()[..], &mut sink, &options).ok();
        let trees: Vec<LayerTree> = layers.iter().map(convert).collect::<Option<_>>()?;
        erofs::fold::fold(&trees).ok()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn what_converts_is_what_the_model_says(layers in layers()) {
            if let Some(tree) = converted(&layers) {
                let short: Vec<Vec<_>> = layers.iter().map(|l| l.iter().map(|e| format!("{} {:?} {:o}", e.path, e.kind, e.mode)).collect()).collect();
                let mut model = Model::default();
                for layer in &layers {
                    let applied = model.apply(&Layer::new(layer.clone()).tar()[..]);
                    // The converter lets such a link pass if a later entry of the layer takes its place.
                    if applied.as_ref().is_err_and(|error| error.to_string().contains("a hard link to nothing")) {
                        return Ok(());
                    }
                    prop_assert!(applied.is_ok(), "{applied:?} {short:?}");
                }
                let mut differences = Differences::default();
                compare(&model, &tree, &mut differences);
                prop_assert!(differences.count == 0, "{:?} {short:?}", differences.shown);
            }
        }
    }
}
