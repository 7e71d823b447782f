//! A registry, a store, and a node with Slipway beside one without.

use std::path::{Path, PathBuf};

use testbed::{
    BuiltImage, Containerd, Converter, Difference, Image, Layout, Registry, Scratch, Slipwayd, SlipwaydConfig, Snapshotter, TreeDigest, files_below,
};

/// Everything but the nodes. Dropping it leaves nothing behind.
pub struct World {
    pub registry: Registry,
    pub converter: Converter,
    pub store: PathBuf,
    layout: Layout,
    pub scratch: Scratch,
}

impl World {
    pub fn new(label: &str) -> World {
        let scratch = Scratch::new(label).expect("a scratch directory");
        let registry = Registry::start(&scratch.join("registry")).expect("a registry");
        let converter = Converter::new(&scratch.join("converter"));
        let layout = Layout::create(&scratch.join("layout")).expect("a layout");
        let store = scratch.make_dir("store").expect("a directory");
        World { registry, converter, store, layout, scratch }
    }

    /// Builds and pushes an image as `<name>:1`; gives its reference.
    pub fn push(&self, name: &str, image: &Image) -> (String, BuiltImage) {
        let built = self.layout.add(name, image).expect("an image");
        let reference = self.registry.reference(&format!("test/{name}:1"));
        self.layout.push(name, &reference).expect("a push");
        (reference, built)
    }

    /// The same for an image of several platforms.
    pub fn push_index(&self, name: &str, images: &[Image]) -> (String, Vec<BuiltImage>) {
        let built = self.layout.add_index(name, images).expect("an index");
        let reference = self.registry.reference(&format!("test/{name}:1"));
        self.layout.push(name, &reference).expect("a push");
        (reference, built)
    }

    /// [`World::push`], then converts it into the store.
    pub fn push_converted(&self, name: &str, image: &Image) -> (String, BuiltImage) {
        let pushed = self.push(name, image);
        self.converter.convert(&pushed.0, &self.store).expect("a conversion");
        pushed
    }

    /// A node with Slipway that uses the store and trusts the converter.
    pub fn node(&self) -> Node {
        self.node_with(&SlipwaydConfig::new(&self.store, [self.converter.public_key()]))
    }

    pub fn node_with(&self, config: &SlipwaydConfig) -> Node {
        let slipwayd = Slipwayd::start(&self.scratch.join("slipwayd"), config).expect("a node daemon");
        let containerd = Containerd::start(&self.scratch.join("lazy"), Snapshotter::Slipway(slipwayd.socket())).expect("a containerd");
        Node { containerd, slipwayd }
    }

    /// The tree that containerd's overlayfs snapshotter makes of an image: what every other tree is compared with.
    pub fn plain_tree(&self, reference: &str, built: &BuiltImage) -> TreeDigest {
        let containerd = Containerd::start(&self.scratch.join("plain"), Snapshotter::Overlayfs).expect("a containerd");
        containerd.cri().expect("a CRI client").pull(reference).expect("an ordinary pull");
        tree_of(&containerd, built.top_chain())
    }
}

/// A node with Slipway; containerd is declared first, so it ends first.
pub struct Node {
    pub containerd: Containerd,
    pub slipwayd: Slipwayd,
}

impl Node {
    /// Pulls as the kubelet does; gives the digests of the layer blobs that the registry served, from the bottom.
    pub fn pull(&self, world: &World, reference: &str, built: &BuiltImage) -> Vec<String> {
        let mark = world.registry.mark();
        let pulled = self.containerd.cri().expect("a CRI client").pull(reference);
        pulled.unwrap_or_else(|error| panic!("{error:#}\nslipwayd's log:\n{}", self.slipwayd.log()));
        let served = world.registry.blob_bytes(mark);
        built.layers.iter().filter(|layer| served.get(&layer.digest).is_some_and(|bytes| *bytes > 0)).map(|layer| layer.digest.clone()).collect()
    }

    pub fn tree(&self, built: &BuiltImage) -> TreeDigest {
        self.tree_of_chain(built.top_chain())
    }

    pub fn tree_of_chain(&self, chain: &str) -> TreeDigest {
        tree_of(&self.containerd, chain)
    }
}

fn tree_of(containerd: &Containerd, chain: &str) -> TreeDigest {
    let view = containerd.view(chain).unwrap_or_else(|error| panic!("{error:#}"));
    TreeDigest::of(view.path()).unwrap_or_else(|error| panic!("{error:#}"))
}

/// Both trees are the same but for the root directory's own time: no layer names the root, so it is whatever the snapshotter made.
pub fn assert_same_tree(plain: &TreeDigest, lazy: &TreeDigest) {
    let is_root_time = |difference: &Difference| difference.path.is_empty() && difference.what.starts_with("mtime");
    let differences: Vec<String> = plain.differences(lazy).iter().filter(|difference| !is_root_time(difference)).map(Difference::to_string).collect();
    assert!(plain.len() > 400, "the images here are larger than {} nodes", plain.len());
    assert!(differences.is_empty(), "{} differences from what overlayfs shows:\n{}", differences.len(), differences.join("\n"));
}

/// All files of the store whose name ends so, in order.
pub fn store_files(store: &Path, suffix: &str) -> Vec<PathBuf> {
    files_below(store).into_iter().filter(|path| path.to_string_lossy().ends_with(suffix)).map(|path| store.join(path)).collect()
}
