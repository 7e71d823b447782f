//! From the store back to a plain image, which other tools read and which is the same when converted again.

#![allow(clippy::unwrap_used, reason = "a test's own set-up")]

mod ground;

use std::fs;

use ground::{Ground, everything};
use testbed::{Compression, Entry, Layer, files_below, need, require, run};

#[test]
fn an_exported_image_converts_to_the_same_metadata_and_other_tools_read_it() {
    require!(need::root(), need::command("skopeo"), need::command("umoci"));
    let ground = Ground::new("export");
    // A link to a file of a lower layer gets that file's attributes.
    let linked = Layer::new([Entry::hard_link("etc/z", "etc/owned").owner(1000, 3_000_000_000)]);
    ground.layout.add("1", &everything().layer(&linked, Compression::Gzip)).unwrap();
    let done = ground.convert("oci:img:1");
    let exported = ground.run(&["export", "oci:img:1", "oci:out:1", "--json"]);
    assert_eq!(exported.code, 0, "{}", exported.err);

    let (again, target) = (Ground::new("export-again"), ground.scratch.join("out"));
    let source = format!("oci:{}:1", target.display());
    let same = again.convert(&source);
    assert_eq!(same["manifest"], exported.json()["manifest"]);
    assert_eq!(same["metadata"], done["metadata"]);
    assert_eq!(same["layers"].as_array().unwrap().len(), 4);

    run("skopeo", ["inspect", &source]).unwrap();
    let bundle = ground.scratch.join("bundle");
    run("umoci", ["unpack", "--image", &source[4..], bundle.to_str().unwrap()]).unwrap();
    assert_eq!(fs::read(bundle.join("rootfs/etc/linked")).unwrap(), b"replaced");
    assert!(!bundle.join("rootfs/etc/gone").exists() && !bundle.join("rootfs/opaque/hidden").exists());

    ground.run(&["export", "oci:img:1", "oci:out:1"]).assert_failed(1, &["out", "not empty"]);
    let second = ground.run(&["export", "oci:img:1", "oci:second", "--json"]);
    assert_eq!(second.json(), exported.json(), "the same bytes every time");
}

#[test]
fn what_is_damaged_in_the_store_is_not_exported() {
    let ground = Ground::new("export-damaged");
    ground.layout.add("1", &everything()).unwrap();
    ground.convert("oci:img:1");
    for pack in files_below(&ground.store().join("packs")) {
        let path = ground.store().join("packs").join(pack);
        let mut bytes = fs::read(&path).unwrap();
        bytes[100] ^= 1;
        fs::remove_file(&path).unwrap();
        fs::write(&path, bytes).unwrap();
    }
    ground.run(&["export", "oci:img:1", "oci:out:1"]).assert_failed(6, &["cannot be read from the store", "unit 0 of pack"]);
    assert!(!ground.scratch.join("out/index.json").exists());
}
