//! What bad input gets: a message that says what and what to do, the exit code for it, and a store without a trace of it.

#![allow(clippy::unwrap_used, reason = "a test's own set-up")]

mod ground;

use std::fs;
use std::process::Command;

use ground::{Ground, files_below, noise};
use testbed::{BuiltImage, Compression, DeadAddress, Entry, Image, Layer, need, require};

/// Two layers, the lower one large enough for several reads.
fn image() -> Image {
    let lower = Layer::new([Entry::file("a", noise(1, 2 << 20))]);
    let upper = Layer::new([Entry::file("b", noise(2, 1000))]);
    Image::new().layer(&lower, Compression::Gzip).layer(&upper, Compression::Gzip)
}

fn with_image(label: &str) -> (Ground, BuiltImage) {
    let ground = Ground::new(label);
    let built = ground.layout.add("1", &image()).unwrap();
    (ground, built)
}

#[test]
fn corrupt_and_truncated_layers_name_layer_and_digests() {
    type Harm = fn(&mut Vec<u8>);
    let cases: [(Harm, &[&str]); 3] = [
        // In the middle of the compressed stream, where unpacking fails first.
        (|blob| blob[1000] ^= 0xff, &["expected sha256:", "but the bytes have sha256:"]),
        (|blob| blob.truncate(blob.len() / 2), &["should have", "ended after"]),
        (|blob| blob.extend_from_slice(b"more"), &["there are more"]),
    ];
    for (harm, parts) in cases {
        let (ground, built) = with_image("corrupt");
        let layer = &built.layers[0].digest;
        let path = ground.layout.blob(layer);
        let mut blob = fs::read(&path).unwrap();
        harm(&mut blob);
        // The layout may share its blobs by hard links.
        fs::remove_file(&path).unwrap();
        fs::write(&path, blob).unwrap();
        let run = ground.run(&["convert", "oci:img:1"]);
        run.assert_failed(6, &[&["layer 1", layer, "img:1", "is damaged"], parts].concat());
        ground.assert_nothing_visible();
    }
}

#[test]
fn a_wrong_diff_id_names_layer_and_both_digests() {
    let ground = Ground::new("diff-id");
    let layer = Layer::new([Entry::file("a", noise(1, 2 << 20))]).blob(Compression::Gzip).unwrap();
    let other = Layer::new([Entry::file("b", "")]).blob(Compression::Plain).unwrap();
    let file = ground.scratch.join("layer");
    fs::write(&file, &layer.bytes).unwrap();
    ground.layout.add("1", &Image::new().layer_file(&file, Compression::Gzip, &other.diff_id)).unwrap();
    ground.run(&["convert", "oci:img:1"]).assert_failed(6, &["layer 1", &layer.digest, &layer.diff_id, &other.diff_id]);
    ground.assert_nothing_visible();
    assert_eq!(files_below(&ground.store().join("packs")).len(), 0, "packs wait for the digests");
}

#[test]
fn a_layer_that_is_no_archive_is_named() {
    let ground = Ground::new("no-tar");
    let (file, bytes) = (ground.scratch.join("layer"), noise(1, 5000));
    fs::write(&file, &bytes).unwrap();
    let diff_id = slipway::oci::Sha256::of(&bytes).oci();
    ground.layout.add("1", &Image::new().layer_file(&file, Compression::Plain, &diff_id)).unwrap();
    ground.run(&["convert", "oci:img:1"]).assert_failed(1, &["layer 1", &diff_id, "cannot be converted"]);
    ground.assert_nothing_visible();
}

#[test]
fn missing_platforms_tags_and_layouts_are_named() {
    let ground = Ground::new("missing");
    ground.layout.add_index("multi", &[image().architecture("riscv64"), image().architecture("s390x")]).unwrap();
    ground.layout.add("single", &image().architecture("s390x")).unwrap();
    for (args, code, parts) in [
        (&["convert", "oci:img:multi", "--platform", "linux/ppc64le"][..], 3, &["linux/ppc64le", "linux/riscv64, linux/s390x"][..]),
        (&["convert", "oci:img:single", "--platform", "linux/ppc64le"], 3, &["linux/s390x"]),
        (&["convert", "oci:img:other"], 3, &["tag other", "multi, single"]),
        (&["convert", "oci:img"], 2, &["oci:", ":TAG", "multi, single"]),
        (&["convert", "oci:absent:1"], 1, &["absent/oci-layout", "No such file"]),
        (&["convert", "docker.io/UPPER"], 2, &["docker.io/UPPER", "lower case"]),
        (&["convert", "oci:img:single", "--platform", "nonsense"], 2, &["nonsense", "linux/amd64"]),
    ] {
        ground.run(args).assert_failed(code, parts);
    }
    ground.assert_nothing_made();
    // A platform that is there can be asked for on any machine.
    let run = ground.run(&["convert", "oci:img:multi", "--platform", "linux/s390x", "--json"]);
    assert_eq!(run.json()["platform"], "linux/s390x");
    assert!(run.err.contains(&format!("made a new store in {}", ground.store().display())), "{}", run.err);
    let again = ground.run(&["convert", "oci:img:multi", "--platform", "linux/s390x"]);
    assert!(again.code == 0 && !again.err.contains("made a new store"), "{}", again.err);
}

/// Where a share was not mounted, images were converted onto the disk below its mount point.
#[test]
fn a_store_directory_that_is_missing_is_not_made() {
    let (ground, _) = with_image("not-mounted");
    fs::remove_dir(ground.store()).unwrap();
    ground.run(&["convert", "oci:img:1"]).assert_failed(1, &["store: check that the store is mounted", "No such file or directory"]);
    assert!(!ground.store().exists() && !ground.scratch.join("state").exists());
}

#[test]
fn an_unreachable_registry_is_named() {
    let ground = Ground::new("unreachable");
    let dead = DeadAddress::new().unwrap();
    let host = dead.host();
    ground.run(&["convert", &format!("{host}/team/app:1")]).assert_failed(5, &[&host, "team/app", "Connection refused"]);
    ground.assert_nothing_made();
}

#[test]
fn directories_that_are_no_store_and_newer_stores_are_refused_and_left_alone() {
    let (ground, _) = with_image("no-store");
    let store = ground.store();
    fs::write(store.join("precious"), "data").unwrap();
    ground.run(&["convert", "oci:img:1"]).assert_failed(1, &["store is no Slipway store", "empty"]);
    ground.run(&["ls"]).assert_failed(1, &["no Slipway store"]);
    assert_eq!(files_below(&store).len(), 1);
    fs::remove_file(store.join("precious")).unwrap();
    ground.convert("oci:img:1");
    let descriptor = store.join("slipway.json");
    let text = fs::read_to_string(&descriptor).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let version = json.as_object_mut().unwrap().values_mut().find(|v| v.is_u64()).expect("the format version");
    *version = 999.into();
    fs::write(&descriptor, json.to_string()).unwrap();
    let before = files_below(&store);
    for args in [&["convert", "oci:img:1"][..], &["ls"]] {
        ground.run(args).assert_failed(1, &["999", "newer Slipway"]);
    }
    assert_eq!(files_below(&store), before);
}

fn mount_tmpfs(ground: &Ground, options: &str) {
    let store = ground.store();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&store).status().unwrap();
    assert!(mounted.success());
}

#[test]
fn a_read_only_store_is_refused() {
    require!(need::root());
    let (ground, _) = with_image("read-only");
    mount_tmpfs(&ground, "size=64m");
    ground.convert("oci:img:1");
    let store = ground.store();
    assert!(Command::new("mount").args(["-o", "remount,ro"]).arg(&store).status().unwrap().success());
    let before = files_below(&store);
    ground.layout.add("2", &Image::new().layer(&Layer::new([Entry::file("c", noise(9, 100_000))]), Compression::Plain)).unwrap();
    ground.run(&["convert", "oci:img:2"]).assert_failed(1, &["store", "must be writable", "Read-only file system"]);
    assert_eq!(files_below(&store), before);
    assert_eq!(ground.listed().len(), 1, "what is there can be read");
}

#[test]
fn a_full_store_says_so_and_gets_its_space_back() {
    require!(need::root());
    let (ground, _) = with_image("full");
    mount_tmpfs(&ground, "size=1m");
    ground.run(&["convert", "oci:img:1"]).assert_failed(1, &["no room", "free space", "No space left"]);
    ground.assert_nothing_visible();
    assert_eq!(files_below(&ground.store().join("packs")).iter().filter(|p| p.ends_with(".pack")).count(), 0);
    // The same store works when there is room.
    let store = ground.store();
    assert!(Command::new("mount").args(["-o", "remount,size=64m"]).arg(&store).status().unwrap().success());
    ground.convert("oci:img:1");
}

#[test]
fn an_unusable_state_directory_is_named() {
    let (ground, _) = with_image("state");
    fs::write(ground.scratch.join("state"), "a file").unwrap();
    ground.run(&["convert", "oci:img:1"]).assert_failed(1, &["state", "--state"]);
}
