//! Whole images of random layers, and umoci as their first referee. Every layer is also given back by framing and packs.

use super::*;

/// The entries of every layer, for the report.
pub fn entries(tars: &[Vec<u8>]) -> String {
    let list = |tar: &Vec<u8>| {
        let mut child = Command::new("tar").arg("-tvP").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("GNU tar is installed");
        // It may end at the archive's end marker, before it has taken what follows.
        let _ = child.stdin.take().expect("it was asked for").write_all(tar);
        String::from_utf8_lossy(&child.wait_with_output().expect("tar ends").stdout).into_owned()
    };
    tars.iter().map(list).collect::<Vec<_>>().join("--\n")
}

fn latin1(bytes: &[u8]) -> String {
    bytes.iter().map(|b| char::from(*b)).collect()
}

/// The paths of files that have several.
fn linked_paths(tree: &Tree) -> BTreeSet<String> {
    let mut names: BTreeMap<_, Vec<String>> = BTreeMap::new();
    let mut todo = vec![(String::new(), Tree::ROOT)];
    while let Some((path, index)) = todo.pop() {
        if let Body::Dir(children) = &tree.inode(index).body {
            let join = |name: &[u8]| if path.is_empty() { latin1(name) } else { format!("{path}/{}", latin1(name)) };
            todo.extend(children.iter().map(|(name, child)| (join(name), *child)));
        }
        names.entry(index.0).or_default().push(path);
    }
    names.into_values().filter(|names| names.len() > 1).flatten().collect()
}

fn paths(tree: &Tree) -> BTreeMap<String, bool> {
    let mut out = BTreeMap::new();
    let mut todo = vec![(String::new(), Tree::ROOT)];
    while let Some((path, index)) = todo.pop() {
        let children = match &tree.inode(index).body {
            Body::Dir(children) => Some(children),
            Body::Content(_) => None,
        };
        for (name, child) in children.into_iter().flatten() {
            let name = latin1(name);
            todo.push((if path.is_empty() { name } else { format!("{path}/{name}") }, *child));
        }
        out.insert(path, children.is_some());
    }
    out.remove("");
    out
}

/// An image of random layers.
pub struct Made {
    pub tars: Vec<Vec<u8>>,
    pub trees: Vec<LayerTree>,
    pub sink: MemorySink,
    /// Directories whose times are those of unpacking, as the listings have them.
    pub implied: BTreeSet<String>,
}

impl Made {
    pub fn random(seed: u64, referee: Referee, seen: &mut Features) -> Made {
        let mut random = Random(seed);
        let mut made = Made { tars: vec![], trees: vec![], sink: MemorySink::default(), implied: BTreeSet::new() };
        let (mut ever, mut implied): (BTreeMap<String, bool>, _) = (BTreeMap::new(), BTreeSet::new());
        for _ in 0..random.below(4) + 1 {
            let tree = fold(&made.trees).unwrap();
            let below = paths(&tree);
            for entry in made.trees.iter().flat_map(|tree| &tree.entries) {
                *ever.entry(latin1(&entry.path)).or_default() |= !matches!(entry.kind, EntryKind::Dir { .. });
            }
            implied.retain(|path| below.contains_key(path));
            let mut maker = Maker {
                random: &mut random,
                tar: vec![],
                own: BTreeMap::new(),
                below,
                below_links: linked_paths(&tree),
                ever: &ever,
                implied: &mut implied,
                symlinks: BTreeMap::new(),
                listed: BTreeSet::new(),
                referee,
                linked: BTreeSet::new(),
                opaque: false,
                seen,
                attributes: BTreeMap::new(),
            };
            for _ in 0..maker.random.below(30) {
                maker.step();
            }
            let mut tar = maker.tar;
            tar.resize(tar.len() + 1024, 0);
            if random.below(3) == 0 {
                tar.extend_from_slice(&[b'x'; 700]);
                seen.saw("trailing data");
            }
            let tree = made.add(tar).unwrap_or_else(|e| panic!("image {seed}: {e}"));
            seen.add("opaque in the tree", tree.entries.iter().filter(|e| matches!(e.kind, EntryKind::Dir { opaque: true, .. })).count());
        }
        made.implied = implied.iter().map(|path| raw(path).escape_ascii().to_string()).collect();
        made
    }

    /// An image of these layers.
    pub fn of(tars: impl IntoIterator<Item = Vec<u8>>) -> Result<Made, ConvertError> {
        let mut made = Made { tars: vec![], trees: vec![], sink: MemorySink::default(), implied: BTreeSet::new() };
        for tar in tars {
            made.add(tar)?;
        }
        Ok(made)
    }

    fn add(&mut self, tar: Vec<u8>) -> Result<&LayerTree, ConvertError> {
        // A sink for each layer: the same pack may well come of two.
        let mut own = MemorySink::default();
        let options = LayerOptions { unit_bits: UnitBits::MIN, threads: 2, ..LayerOptions::default() };
        let Converted { tree, framing, places, .. } = convert_layer_framed(&tar[..], &mut own, Vec::new(), &options)?;
        assert!(own.tar(&framing.finish(&places).unwrap()) == tar, "the archive does not come back:\n{}", entries(&[tar]));
        self.sink.packs.extend(own.packs);
        self.tars.push(tar);
        self.trees.push(tree);
        Ok(self.trees.last().expect("one was just put there"))
    }

    /// What the converter makes of it.
    pub fn listing(&self, compare: Compare) -> Listing {
        folded(&fold(&self.trees).unwrap(), &self.sink, compare)
    }
}

#[test]
fn random_images_come_out_as_umoci_unpacks_them() {
    if !is_root("random_images_come_out_as_umoci_unpacks_them") {
        return;
    }
    let mut seen = Features::new("random layers for umoci", &[EVERYWHERE, UMOCI_ONLY]);
    let way = Way::new();
    for seed in 0..IMAGES {
        let made = Made::random(seed, Referee::Umoci, &mut seen);
        let dir = tempfile::tempdir().unwrap();
        layout(&dir.path().join("layout"), &made.tars);
        way.assert_comes_back(&dir.path().join("layout"), &format!("image {seed}"));
        run("umoci", &["raw", "unpack", "--image", "layout:t", "root"], dir.path());
        let compare = Compare::AllButDirTimes;
        assert_same(&host(&dir.path().join("root"), compare), &made.listing(compare), &format!("image {seed}:\n{}", entries(&made.tars)));
    }
    seen.report();
}
