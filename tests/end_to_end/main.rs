//! Whole-system tests: a real registry, the converter, the node daemon, a real containerd and the real kernel.

mod images;
mod world;

use std::fs;
use std::os::unix::fs::FileExt;

use slipway::store::Store;
use testbed::{Compression, Containerd, Image, Registry, SlipwaydConfig, Snapshotter, need, noise, require};
use world::{World, assert_same_tree, store_files};

/// The same number on every Linux architecture.
const EIO: i32 = 5;

/// What every test here needs of the machine.
macro_rules! require_everything {
    () => {
        require!(need::containers(), need::path("/bin/busybox"), need::file_backed_erofs(), need::path("/dev/fuse"))
    };
}

#[test]
fn a_converted_image_starts_from_its_original_reference_without_fetching_a_layer() {
    require_everything!();
    let world = World::new("lazy");
    let (reference, built) = world.push_converted("full", &images::full());
    let node = world.node();

    assert_eq!(node.pull(&world, &reference, &built), [""; 0], "no layer is fetched");
    assert_eq!(node.containerd.run(&reference, &["/bin/cat", "/etc/motd"]).expect("a container"), "from the top\n");
    let same = world.scratch.join("same");
    fs::write(&same, noise(77, 100_000)).expect("a file");
    let sum = |text: String| text.split(' ').next().map(str::to_owned);
    assert_eq!(
        sum(node.containerd.run(&reference, &["/bin/md5sum", "/data/prose-dir/new"]).expect("a container")),
        sum(testbed::run("md5sum", [&same]).expect("md5sum"))
    );

    assert_same_tree(&world.plain_tree(&reference, &built), &node.tree(&built));
}

#[test]
fn a_target_in_another_registry_runs_anywhere_and_starts_lazily_with_slipway() {
    require_everything!();
    let world = World::new("target");
    let (source, built) = world.push("full", &images::full());
    let other = Registry::start(&world.scratch.join("other-registry")).expect("a second registry");
    let target = other.reference("lazy/full:acc");
    let done = world.converter.command(&source, &world.store).expect("a converter").args(["--target", &target]).output().expect("a conversion");
    assert!(done.status.success(), "{done:?}");
    let node = world.node();

    let mark = other.mark();
    node.containerd.cri().expect("a CRI client").pull(&target).expect("a pull");
    let served = other.blob_bytes(mark);
    assert!(built.layers.iter().all(|layer| !served.contains_key(&layer.digest)), "no layer is fetched: {served:?}");
    assert_eq!(node.containerd.run(&target, &["/bin/cat", "/etc/motd"]).expect("a container"), "from the top\n");
    assert_same_tree(&world.plain_tree(&target, &built), &node.tree(&built));
}

#[test]
fn a_compact_target_starts_lazily_where_the_store_is_and_is_refused_elsewhere() {
    require_everything!();
    let world = World::new("compact");
    let (source, built) = world.push("full", &images::full());
    let other = Registry::start(&world.scratch.join("other-registry")).expect("a second registry");
    let target = other.reference("small/full:1");
    let args = ["--target", &target, "--target-kind", "compact", "--json"];
    let done = world.converter.command(&source, &world.store).expect("a converter").args(args).output().expect("a conversion");
    assert!(done.status.success(), "{done:?}");
    let listed = Store::open(&world.store).and_then(|store| store.images()).expect("a list");
    let chain = listed[0].as_ref().expect("an image root").compact[0].oci();
    let plain = world.plain_tree(&source, &built);

    // Nothing but the two documents comes from the registry: not even the layer.
    let node = world.node();
    let mark = other.mark();
    node.containerd.cri().expect("a CRI client").pull(&target).expect("a pull");
    assert_eq!(other.blob_bytes(mark).len(), 1, "the configuration");
    assert_eq!(node.containerd.run(&target, &["/bin/cat", "/etc/motd"]).expect("a container"), "from the top\n");
    assert_same_tree(&plain, &node.tree_of_chain(&chain));
    // The image it stands for starts beside it, and both go.
    assert_eq!(node.pull(&world, &source, &built), [""; 0]);
    assert_same_tree(&plain, &node.tree(&built));
    for image in [&target, &source] {
        node.containerd.cri().expect("a CRI client").remove(image).expect("a removal");
    }
    assert!(!node.containerd.snapshots(&["ls"]).expect("a list").contains("sha256:"));
    drop(node);

    // A node whose store does not know it, until it does.
    fs::remove_dir_all(world.scratch.join("slipwayd")).expect("the node's directory can go");
    fs::remove_dir_all(world.scratch.join("lazy")).expect("the node's directory can go");
    let records = world.store.join("chains");
    let aside = world.scratch.join("aside");
    fs::rename(&records, &aside).expect("the records are moved aside");
    let node = world.node();
    let refused = format!("{:#}", node.containerd.cri().expect("a CRI client").pull(&target).expect_err("a refusal"));
    for part in ["compact image", "holds no files", built.top_chain().trim_start_matches("sha256:"), chain.trim_start_matches("sha256:")] {
        assert!(refused.contains(part), "{part} is not in: {refused}");
    }
    assert_eq!(node.pull(&world, &source, &built).len(), 3, "any other image is pulled plainly");
    fs::rename(&aside, &records).expect("the records are back");
    // A pull that does not say which chain a layer is would leave it unpacked, and so in the way of every later pull.
    let pull = ["images", "pull", "--plain-http", "--snapshotter", node.containerd.snapshotter(), &target];
    if let Err(error) = node.containerd.ctr(&pull) {
        let error = format!("{error:#}");
        assert!(error.contains("compact image") && error.contains("crictl pull"), "{error}");
    }
    node.containerd.cri().expect("a CRI client").pull(&target).expect("the next attempt");
    assert_eq!(node.containerd.run(&target, &["/bin/cat", "/etc/motd"]).expect("a container"), "from the top\n");
    drop(node);

    // Without Slipway it can be pulled, and no container of it comes to run.
    let containerd = Containerd::start(&world.scratch.join("without"), Snapshotter::Overlayfs).expect("a containerd");
    containerd.ctr(&["images", "pull", "--plain-http", "--snapshotter", "overlayfs", &target]).expect("an ordinary pull");
    let error = format!("{:#}", containerd.run(&target, &["/bin/cat", "/etc/motd"]).expect_err("there is no program"));
    assert!(error.contains("/bin/cat"), "{error}");
}

#[test]
fn of_a_target_for_several_platforms_a_node_starts_its_own() {
    require_everything!();
    let world = World::new("platforms");
    let elsewhere = Image::new().layer(&images::extra(), Compression::Gzip).architecture("riscv64");
    let (source, built) = world.push_index("many", &[elsewhere, images::full()]);
    let target = world.registry.reference("test/many:acc");
    let args = ["--all-platforms", "--target", &target];
    let done = world.converter.command(&source, &world.store).expect("a converter").args(args).output().expect("a conversion");
    assert!(done.status.success(), "{done:?}");
    let node = world.node();
    assert_eq!(node.pull(&world, &target, &built[1]), [""; 0], "no layer is fetched");
    assert_eq!(node.containerd.run(&target, &["/bin/cat", "/etc/motd"]).expect("a container"), "from the top\n");
}

#[test]
fn an_image_that_was_never_converted_is_pulled_the_ordinary_way() {
    require_everything!();
    let world = World::new("plain");
    world.push_converted("other", &Image::new().layer(&images::extra(), Compression::Gzip));
    let (reference, built) = world.push("full", &images::full());
    let node = world.node();

    let all: Vec<String> = built.layers.iter().map(|layer| layer.digest.clone()).collect();
    assert_eq!(node.pull(&world, &reference, &built), all, "every layer is fetched");
    assert_eq!(node.containerd.run(&reference, &["/bin/cat", "/etc/motd"]).expect("a container"), "from the top\n");
    assert_same_tree(&world.plain_tree(&reference, &built), &node.tree(&built));
}

#[test]
fn a_converted_base_saves_the_bottom_of_images_built_on_it() {
    require_everything!();
    let world = World::new("prefix");
    world.push_converted("base", &images::full());
    let (reference, built) = world.push("built-on-it", &images::full().layer(&images::extra(), Compression::Gzip));
    let node = world.node();

    assert_eq!(node.pull(&world, &reference, &built), [built.layers[3].digest.clone()], "only the layer on top is fetched");
    assert_eq!(node.containerd.run(&reference, &["/bin/cat", "/extra/small"]).expect("a container"), "tiny");
    assert_same_tree(&world.plain_tree(&reference, &built), &node.tree(&built));
}

#[test]
fn a_prefix_of_a_converted_image_is_known_too() {
    require_everything!();
    let world = World::new("cut");
    world.push_converted("whole", &images::full().layer(&images::extra(), Compression::Gzip));
    // Shares two layers with the converted image and then goes another way.
    let other = Image::new()
        .layer(&images::base(), Compression::Gzip)
        .layer(&images::everything(), Compression::Zstd)
        .layer(&images::extra(), Compression::Zstd);
    let (reference, built) = world.push("other", &other);
    let node = world.node();

    assert_eq!(node.pull(&world, &reference, &built), [built.layers[2].digest.clone()], "only the layer that differs is fetched");
    assert_same_tree(&world.plain_tree(&reference, &built), &node.tree(&built));
}

#[test]
fn an_image_whose_files_are_in_other_images_packs_costs_what_is_new_and_starts() {
    require_everything!();
    let world = World::new("dedup");
    world.push_converted("first", &images::full());
    let stored = |world: &World| store_files(&world.store, ".pack").iter().map(|pack| fs::metadata(pack).expect("a pack").len()).sum::<u64>();
    let before = stored(&world);
    // The first image's two lower layers in one, so that no layer is the same, and half a megabyte of new noise.
    let entries = [images::base().entries, images::everything().entries, images::extra().entries].concat();
    let (reference, built) = world.push_converted("second", &Image::new().layer(&testbed::Layer::new(entries), Compression::Zstd));
    let grown = stored(&world) - before;
    assert!((500_000..550_000).contains(&grown), "{before} bytes grew by {grown}");
    let node = world.node();

    assert_eq!(node.pull(&world, &reference, &built), [""; 0], "no layer is fetched");
    assert_eq!(node.containerd.run(&reference, &["/bin/cat", "/extra/small"]).expect("a container"), "tiny");
    assert_same_tree(&world.plain_tree(&reference, &built), &node.tree(&built));
}

#[test]
fn a_node_whose_store_is_missing_or_broken_pulls_the_ordinary_way() {
    require_everything!();
    let world = World::new("broken");
    let (reference, built) = world.push_converted("full", &images::full());
    let plain = world.plain_tree(&reference, &built);
    let key = world.converter.public_key();

    let missing = world.scratch.join("no-such-store");
    let no_store = world.scratch.make_dir("no-store").expect("a directory");
    fs::write(no_store.join("slipway.json"), b"{ not json").expect("a file");
    let damaged = world.scratch.join("damaged");
    testbed::run("cp", ["-a", &world.store.to_string_lossy(), &damaged.to_string_lossy()]).expect("a copy");
    let metadata = store_files(&damaged.join("meta"), ".erofs.zst");
    assert!(!metadata.is_empty(), "an image has metadata");
    for file in metadata {
        fs::write(&file, b"not what its name says").expect("damage");
    }
    let untrusted = SlipwaydConfig { trusted_keys: Vec::new(), ..SlipwaydConfig::new(&world.store, []) };

    let configs = [missing, no_store, damaged].map(|store| SlipwaydConfig::new(&store, [key.clone()]));
    for config in configs.into_iter().chain([untrusted]) {
        let node = world.node_with(&config);
        assert!(node.pull(&world, &reference, &built).contains(&built.layers[2].digest), "{config:?}: the top is no miss");
        assert_eq!(node.containerd.run(&reference, &["/bin/cat", "/etc/motd"]).expect("a container"), "from the top\n");
        assert_same_tree(&plain, &node.tree(&built));
        drop(node);
        for dir in ["slipwayd", "lazy"] {
            fs::remove_dir_all(world.scratch.join(dir)).expect("the node's directories can go");
        }
    }
}

#[test]
fn damaged_data_is_an_io_error_and_never_wrong_bytes() {
    require_everything!();
    let world = World::new("damage");
    let (reference, built) = world.push_converted("full", &images::full());
    let plain = world.plain_tree(&reference, &built);
    for pack in store_files(&world.store, ".pack") {
        let file = fs::File::options().read(true).write(true).open(&pack).expect("a pack");
        // The first unit: packs begin with it.
        let mut byte = [0];
        file.read_exact_at(&mut byte, 1000).expect("a byte");
        file.write_all_at(&[byte[0] ^ 1], 1000).expect("a byte");
    }
    let node = world.node();
    assert_eq!(node.pull(&world, &reference, &built), [""; 0]);

    let view = node.containerd.view(built.top_chain()).expect("a view");
    let (mut right, mut failed) = (0, 0);
    for (path, expected) in plain.nodes().filter(|(_, node)| node.kind == testbed::NodeKind::File) {
        match fs::read(view.path().join(path)) {
            Ok(bytes) => {
                assert_eq!(Some(blake3::hash(&bytes)), expected.content, "/{path} was read and is not what it was");
                right += 1;
            }
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(EIO), "/{path}: {error}");
                failed += 1;
            }
        }
    }
    assert!(right > 0 && failed > 0, "{right} files read, {failed} failed");
}

#[test]
fn containers_and_containerd_outlive_the_worker() {
    require_everything!();
    let world = World::new("outlive");
    let (reference, built) = world.push_converted("full", &images::full());
    let (other, other_built) = world.push_converted("other", &images::full().layer(&images::extra(), Compression::Plain));
    let mut node = world.node();
    node.pull(&world, &reference, &built);
    let old = node.containerd.run_detached(&reference, &["/bin/sleep", "600"]).expect("a running container");

    let killed = node.slipwayd.kill_worker().expect("a worker to kill");
    node.slipwayd.wait_ready().expect("the next worker answers");
    assert_ne!(node.slipwayd.worker(), Some(killed));
    // A container from before, a new one, and a pull: as if nothing had happened.
    let exec = ["tasks", "exec", "--exec-id", "look", &old, "/bin/wc", "-c", "/data/huge"];
    let length = (3 << 20) + (2 << 20) + (1 << 20) + 12_345;
    assert_eq!(node.containerd.ctr(&exec).expect("the old container reads"), format!("{length} /data/huge\n"));
    assert_eq!(node.containerd.run(&reference, &["/bin/cat", "/etc/motd"]).expect("a container"), "from the top\n");
    assert_eq!(node.pull(&world, &other, &other_built), [""; 0]);
    assert_same_tree(&world.plain_tree(&other, &other_built), &node.tree(&other_built));
}

#[test]
fn removing_the_image_leaves_no_snapshot_and_no_mount() {
    require_everything!();
    let world = World::new("remove");
    let (reference, built) = world.push_converted("full", &images::full());
    let node = world.node();
    node.pull(&world, &reference, &built);
    node.containerd.run(&reference, &["/bin/cat", "/data/huge"]).expect("a container");
    assert!(node.containerd.snapshots(&["ls"]).expect("a list").contains(built.top_chain()));

    node.containerd.cri().expect("a CRI client").remove(&reference).expect("a removal");
    assert!(!node.containerd.snapshots(&["ls"]).expect("a list").contains("sha256:"));
    // Unmounting may go on after the call returned.
    let mounts = node.slipwayd.state();
    testbed::wait_until("nothing is mounted below the state directory", std::time::Duration::from_secs(10), || {
        Ok((!testbed::is_anything_mounted_below(&mounts.join("mounts"))).then_some(()))
    })
    .expect("the image is unmounted");
    assert_eq!(node.pull(&world, &reference, &built), [""; 0], "and it can be pulled again");
}
