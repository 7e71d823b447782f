//! What images share is stored once: the real program, two images, one store.

#![allow(clippy::unwrap_used, reason = "a test's own set-up")]

mod ground;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use ground::{Ground, files_below, noise};
use slipway::store::Store;
use testbed::{Compression, Entry, Image, Layer};

/// Bytes of all packs.
fn packs(ground: &Ground) -> u64 {
    let dir = ground.store().join("packs");
    files_below(&dir).iter().map(|name| fs::metadata(dir.join(name)).unwrap().len()).sum()
}

/// Files of a directory: `count` of them with contents from `seed` on, sizes from small to several chunks.
fn some(dir: &str, seed: u64, count: u64) -> Vec<Entry> {
    (seed..seed + count).map(|i| Entry::file(&format!("{dir}/{i:03}"), noise(i, (i * 37_813 % 700_000) as usize))).collect()
}

/// The store gives back the image's files and its layers' very bytes.
fn assert_checks(ground: &Ground, image: &str) {
    let check = ground.run(&["check", image, image]);
    assert_eq!(check.code, 0, "{}{}", check.out, check.err);
    // Which checks diff IDs.
    let export = ground.run(&["export", image, &format!("oci:out-of-{}", image.replace(':', "-"))]);
    assert_eq!(export.code, 0, "{}", export.err);
}

#[test]
fn an_image_that_shares_its_files_costs_what_is_new() {
    let ground = Ground::new("dedup-images");
    let first = Image::new().layer(&Layer::new(some("a", 1, 20)), Compression::Gzip).layer(&Layer::new(some("b", 100, 10)), Compression::Gzip);
    ground.layout.add("1", &first).unwrap();
    ground.convert("oci:img:1");
    let before = packs(&ground);
    // The same files under other layers, in other directories, with one more.
    let new = 300_000;
    let all = [some("c", 1, 20), vec![Entry::file("new", noise(999, new))], some("d", 100, 10)].concat();
    ground.layout.add("2", &Image::new().layer(&Layer::new(all), Compression::Zstd)).unwrap();
    let done = ground.convert("oci:img:2");
    assert_eq!(done["layers"][0]["reused"], false);
    let grown = packs(&ground) - before;
    assert!(grown >= new as u64 && grown <= new as u64 + 20_000, "{before} bytes grew by {grown}");
    assert_eq!(done["packs"].as_array().unwrap().len(), 3);
    let shared: u64 = (1..21).chain(100..110).map(|seed: u64| (seed * 37_813 % 700_000).next_multiple_of(4096)).sum();
    let expected = serde_json::json!({"new": new.next_multiple_of(4096), "newStored": grown, "present": shared, "ratio": done["data"]["ratio"]});
    assert_eq!(done["data"], expected);
    assert!(done["data"]["ratio"].as_f64().is_some_and(|ratio| ratio > 0.96 && ratio < 1.0), "{}", done["data"]);
    for image in ["oci:img:1", "oci:img:2"] {
        assert_checks(&ground, image);
    }
    // Again with nothing in the state directory but the key, and with a store that another converter reads.
    let tree = done["layers"][0]["tree"].as_str().unwrap().to_owned();
    assert!(!files_below(&ground.scratch.join("state/dictionary")).is_empty());
    for _ in 0..2 {
        let mut roots = Store::open(&ground.store()).unwrap().images().unwrap().into_iter().map(Result::unwrap);
        let second = roots.find(|root| root.source.contains("img:2")).unwrap();
        fs::remove_file(ground.store().join(second.name().path())).unwrap();
        let layers = ground.store().join("layers");
        for name in files_below(&layers).into_iter().filter(|name| name.to_string_lossy().contains(&tree)) {
            fs::remove_file(layers.join(name)).unwrap();
        }
        let _ = fs::remove_file(ground.scratch.join("state/journal"));
        let again = ground.convert("oci:img:2");
        assert_eq!((&again["layers"][0]["reused"], &again["layers"][0]["tree"]), (&false.into(), &done["layers"][0]["tree"]));
        fs::remove_dir_all(ground.scratch.join("state/dictionary")).unwrap();
    }
}

/// Everything in the store but records, roots and the store's own id, by name.
fn content(ground: &Ground) -> BTreeMap<PathBuf, Vec<u8>> {
    let of = |dir: &str| {
        let dir = ground.store().join(dir);
        files_below(&dir).into_iter().map(move |name| (name.clone(), fs::read(dir.join(name)).unwrap()))
    };
    ["packs", "layers", "meta"].into_iter().flat_map(of).collect()
}

#[test]
fn what_layers_of_an_image_share_is_stored_once_whichever_is_converted_first() {
    // Overlapping stretches of the same files; the upper layers are shorter and done first.
    let layers: Vec<Layer> = (0..6u64).map(|i| Layer::new(some(&format!("d{i}"), 1 + i * 5, 26 - 3 * i))).collect();
    let image = layers.iter().fold(Image::new(), |image, layer| image.layer(layer, Compression::Gzip));
    let mut first: Option<BTreeMap<PathBuf, Vec<u8>>> = None;
    for jobs in ["1", "2", "8"] {
        let ground = Ground::new("dedup-layers");
        ground.layout.add("1", &image).unwrap();
        let run = ground.run(&["convert", "oci:img:1", "--jobs", jobs]);
        assert_eq!(run.code, 0, "{}", run.err);
        assert_eq!(files_below(&ground.store().join("tmp")).len(), 0, "what was packed again is gone");
        match &first {
            None => {
                // Of the six layers 40 MB; a few files of each are not worth a reference to the layer that has them.
                let all: u64 = (1..37).map(|seed: u64| (seed * 37_813 % 700_000).next_multiple_of(4096)).sum();
                let stored = packs(&ground);
                assert!(stored < all + all / 3, "{stored} bytes for {all}");
                assert_checks(&ground, "oci:img:1");
                first = Some(content(&ground));
            }
            Some(first) => assert!(*first == content(&ground), "--jobs {jobs} gave other bytes than --jobs 1"),
        }
    }
}

#[test]
fn what_is_not_worth_a_reference_is_stored_again() {
    let ground = Ground::new("dedup-little");
    ground.layout.add("1", &Image::new().layer(&Layer::new(some("a", 1, 4)), Compression::Gzip)).unwrap();
    ground.layout.add("2", &Image::new().layer(&Layer::new([some("a", 1, 4), some("b", 50, 1)].concat()), Compression::Gzip)).unwrap();
    ground.convert("oci:img:1");
    assert_eq!(ground.convert("oci:img:2")["packs"].as_array().unwrap().len(), 1, "less than 1 MiB is shared");
    assert_checks(&ground, "oci:img:2");
}

#[test]
fn a_converter_with_another_key_shares_nothing() {
    let ground = Ground::new("dedup-trust");
    ground.layout.add("1", &Image::new().layer(&Layer::new(some("a", 1, 20)), Compression::Gzip)).unwrap();
    ground.layout.add("2", &Image::new().layer(&Layer::new([some("a", 1, 20), some("b", 50, 2)].concat()), Compression::Gzip)).unwrap();
    ground.convert("oci:img:1");
    for name in files_below(&ground.scratch.join("state")).iter().filter(|name| name.to_string_lossy().contains("key")) {
        fs::remove_file(ground.scratch.join("state").join(name)).unwrap();
    }
    assert_eq!(ground.convert("oci:img:2")["packs"].as_array().unwrap().len(), 1, "nobody it trusts vouches for the first image's packs");
    assert_checks(&ground, "oci:img:2");
}
