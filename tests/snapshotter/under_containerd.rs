//! containerd itself pulls, unpacks and runs: with any part of an image known, what a container sees is what overlayfs gives.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use slipway::metrics::Metrics;
use slipway::oci::ChainId;
use slipway::snapshot::{Snapshots, serve};
use testbed::{
    BuiltImage, Compression, Containerd, Entry, Image, Layer, Layout, NodeKind, Registry, Scratch, Snapshotter, TreeDigest, need, require,
};
use tokio::net::UnixListener;
use tokio::sync::oneshot;

use crate::trees::Trees;

/// A snapshotter on a thread of its own. Ends when dropped.
struct Service {
    trees: Arc<Trees>,
    socket: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Service {
    fn start(dir: &Path) -> Service {
        fs::create_dir_all(dir).expect("a directory");
        let (trees, socket, state) = (Arc::new(Trees::new(Some(dir.join("mounts")))), dir.join("socket"), dir.join("state"));
        let (stop, stopped) = oneshot::channel::<()>();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = {
            let (trees, socket) = (trees.clone(), socket.clone());
            thread::spawn(move || {
                let runtime = tokio::runtime::Runtime::new().expect("a runtime");
                runtime.block_on(async move {
                    let listener = UnixListener::bind(&socket).expect("a socket");
                    let snapshots = Snapshots::open(&state, trees, Arc::new(Metrics::new("none"))).expect("opened");
                    ready.send(()).expect("someone waits");
                    tokio::select! {
                        served = serve(listener, snapshots, std::future::pending()) => served.expect("served"),
                        _ = stopped => {}
                    }
                });
            })
        };
        is_ready.recv().expect("it starts");
        Service { trees, socket, stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// An image with what is easily lost: modes, owners, whiteouts, overrides, parents not named by the layer that adds to them, hard links.
fn test_image(scratch: &Scratch, registry: &Registry) -> (String, BuiltImage) {
    let busybox = fs::read("/bin/busybox").expect("busybox-static is installed");
    let one = Layer::new([
        Entry::dir("bin"),
        Entry::file("bin/busybox", busybox).mode(0o4755),
        Entry::symlink("bin/sh", "busybox"),
        Entry::dir("etc"),
        Entry::file("etc/motd", b"one".to_vec()),
        Entry::file("etc/gone", b"gone".to_vec()),
        Entry::dir("srv").mode(0o700).owner(1234, 4321),
        Entry::dir("srv/private").mode(0o1777),
        Entry::dir("replaced"),
        Entry::file("replaced/old", b"old".to_vec()),
    ]);
    let two = Layer::new([
        Entry::whiteout("etc/gone"),
        Entry::file("etc/motd", b"two".to_vec()).owner(5, 6).mtime(1_600_000_000, 5),
        Entry::hard_link("etc/motd2", "etc/motd"),
        Entry::file("srv/private/two", b"2".to_vec()),
    ]);
    let three = Layer::new([
        Entry::dir("replaced"),
        Entry::opaque("replaced"),
        Entry::file("replaced/new", b"new".to_vec()).xattr("user.kept", b"yes"),
        Entry::file("srv/private/three", b"3".to_vec()),
        Entry::file("etc/motd", b"three".to_vec()).mode(0o600),
    ]);
    let layout = Layout::create(&scratch.join("layout")).expect("a layout");
    let layers = [one, two, three];
    let image = layers.iter().fold(Image::new(), |image, layer| image.layer(layer, Compression::Gzip));
    let built = layout.add("test", &image).expect("an image");
    let reference = registry.reference("test:1");
    layout.push("test", &reference).expect("a push");
    (reference, built)
}

/// What overlayfs makes of every prefix of the image: a copy for the fake store, and the figures to compare with.
fn reference_trees(scratch: &Scratch, reference: &str, built: &BuiltImage) -> Vec<(PathBuf, TreeDigest)> {
    let containerd = Containerd::start(&scratch.join("overlayfs"), Snapshotter::Overlayfs).expect("a containerd");
    containerd.cri().expect("a CRI client").pull(reference).expect("a pull");
    let trees = built.chains.iter().enumerate().map(|(number, chain)| {
        let view = containerd.view(chain).expect("a view");
        let copy = scratch.join(format!("tree{number}"));
        testbed::run("cp", ["-a", &format!("{}/.", view.path().display()), &copy.display().to_string()]).expect("copied");
        (copy, TreeDigest::of(view.path()).expect("a tree"))
    });
    trees.collect()
}

/// A directory that a layer changes without naming it has the time at which that layer was unpacked.
fn assert_same_but_for_unpack_times(expected: &TreeDigest, found: &TreeDigest) {
    let is_dir = |path: &str| expected.get(path).is_some_and(|node| node.kind == NodeKind::Dir);
    let mut differences = expected.differences(found);
    differences.retain(|difference| !(difference.what.starts_with("mtime ") && is_dir(&difference.path)));
    assert!(differences.is_empty(), "{differences:#?}");
}

/// Pulls with the chains `known` (numbers from 0) known; says which layers were downloaded.
fn check(known: &[usize], downloaded: &[usize]) {
    let scratch = Scratch::new("snapshotter").expect("a scratch directory");
    let registry = Registry::start(&scratch.join("registry")).expect("a registry");
    let (reference, built) = test_image(&scratch, &registry);
    let expected = reference_trees(&scratch, &reference, &built);
    let service = Service::start(&scratch.join("slipway"));
    for &number in known {
        service.trees.add(built.chains[number].parse::<ChainId>().expect("a chain ID"), &expected[number].0);
    }
    let containerd = Containerd::start(&scratch.join("containerd"), Snapshotter::Slipway(service.socket.clone())).expect("a containerd");
    let mark = registry.mark();
    let mut cri = containerd.cri().expect("a CRI client");
    cri.pull(&reference).expect("a pull");
    let fetched = registry.blob_bytes(mark);
    let layers: Vec<_> = (0..3).filter(|&number| fetched.contains_key(&built.layers[number].digest)).collect();
    assert_eq!(layers, downloaded, "layers downloaded with {known:?} known");
    if downloaded.is_empty() {
        assert!(service.trees.mounted().is_empty(), "nothing is mounted for a pull");
    }

    for (chain, (_, tree)) in built.chains.iter().zip(&expected) {
        let view = containerd.view(chain).expect("a view");
        assert_same_but_for_unpack_times(tree, &TreeDigest::of(view.path()).expect("a tree"));
    }
    let script =
        "cat /etc/motd /srv/private/three; stat -c %u:%g:%a /srv; echo x > /etc/new && cat /etc/new; ls -1 /replaced; stat -c %a /bin/busybox";
    let said = containerd.run(&reference, &["/bin/sh", "-c", script]).expect("a run");
    assert_eq!(said, "three31234:4321:700\nx\nnew\n4755\n", "{known:?}");

    cri.remove(&reference).expect("a removal");
    assert!(!containerd.snapshots(&["ls"]).expect("a list").contains("Committed"), "CRI removes the snapshots before it answers");
    let left: Vec<_> = fs::read_dir(scratch.join("slipway/state/s")).expect("the directory of snapshots").collect();
    assert!(left.is_empty(), "directories of removed snapshots are moved away at once: {left:?}");
    drop(containerd);
    service.trees.wait_until_unmounted();
}

#[test]
fn an_unknown_image_is_pulled_plainly() {
    require!(need::containers(), need::path("/bin/busybox"));
    check(&[], &[0, 1, 2]);
}

#[test]
fn of_a_known_image_no_layer_is_downloaded() {
    require!(need::containers(), need::path("/bin/busybox"));
    check(&[0, 1, 2], &[]);
}

#[test]
fn above_a_known_prefix_only_the_rest_is_downloaded() {
    require!(need::containers(), need::path("/bin/busybox"));
    check(&[0], &[1, 2]);
    check(&[0, 1], &[2]);
}

#[test]
fn a_hole_at_the_bottom_does_no_harm() {
    require!(need::containers(), need::path("/bin/busybox"));
    check(&[1, 2], &[0, 1, 2]);
    check(&[2], &[0, 1, 2]);
}
