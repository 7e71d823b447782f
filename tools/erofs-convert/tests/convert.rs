//! Conversion end to end with the real program: an image in, what the store then has, and what looking at it shows.

#![allow(clippy::unwrap_used, reason = "a test's own set-up")]

mod ground;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use erofs::digest::Digest;
use ground::{Ground, everything, files_below, noise};
use slipway::store::{Name, Payload, SigningKey, Store, Trust};
use testbed::{Compression, Entry, Image, Layer};

#[test]
fn an_image_is_converted_listed_and_the_same_as_its_source() {
    let ground = Ground::new("convert");
    let built = ground.layout.add("1", &everything()).unwrap();
    let done = ground.convert("oci:img:1");
    assert_eq!(done["chain"], built.top_chain());
    assert_eq!(done["manifest"], built.manifest.digest);
    assert_eq!(done["layers"].as_array().unwrap().len(), 3);
    let seconds = |of: &str| done["processorSeconds"][of].as_f64().unwrap();
    let stages: f64 = ["fetch", "blobDigest", "unpack", "tarDigest", "cut", "compress", "write", "fold"].map(seconds).iter().sum();
    assert!(seconds("compress") > 0.0 && stages <= seconds("all"), "{done}");
    assert!(done["peakMemory"].as_u64().unwrap() > 1 << 20, "{done}");
    let source = done["source"].as_str().unwrap();
    assert_eq!(ground.listed(), [source]);

    let check = ground.run(&["check", "oci:img:1", "oci:img:1", "--json"]);
    assert_eq!(check.code, 0, "{}\n{}", check.out, check.err);
    assert_eq!(check.json()["differences"], 0);
    assert!(check.json()["names"].as_u64().unwrap() > 700);

    // A record for every prefix of the layers, under its chain.
    for chain in &built.chains {
        let hex = chain.strip_prefix("sha256:").unwrap();
        assert_eq!(files_below(&ground.store().join("chains").join(&hex[..2]).join(hex)).len(), 1, "{chain}");
    }
    assert_eq!(files_below(&ground.store().join("meta")).len(), 1, "only the top's metadata is stored");
    assert_eq!(files_below(&ground.store().join("tmp")).len(), 0);

    for name in ["oci:img:1", source, &built.manifest.digest] {
        let show = ground.run(&["show", name, "--json"]);
        assert_eq!(show.code, 0, "{}", show.err);
        assert_eq!(show.json()["packs"].as_array().unwrap().len(), 2, "the top layer's files are all tiny");
    }
    assert!(ground.run(&["show", "oci:img:1"]).out.contains("256.00 KiB"));
    let dump = ground.run(&["dump", "oci:img:1"]).out;
    assert!(dump.contains("file-0699"), "{dump}");
    assert_eq!(ground.run(&["dump", done["metadata"].as_str().unwrap()]).out, dump);
    ground.run(&["show", "other:1"]).assert_failed(3, &["other:1", "ls"]);
}

#[test]
fn the_same_image_gives_the_same_bytes_however_many_layers_are_converted_at_once() {
    let mut image = everything();
    for number in 0..8u64 {
        // Some of it again and again, so that layers finish in another order than they began.
        let files = (0..=number % 3 * 20).map(|i| Entry::file(&format!("more/{number}-{i}"), noise(number + i % 5, 90_000)));
        image = image.layer(&Layer::new(files), Compression::Gzip);
    }
    let mut first: Option<BTreeMap<PathBuf, Vec<u8>>> = None;
    for jobs in ["1", "2", "8"] {
        let ground = Ground::new("convert-jobs");
        ground.layout.add("1", &image).unwrap();
        let run = ground.run(&["convert", "oci:img:1", "--jobs", jobs]);
        assert_eq!(run.code, 0, "{}", run.err);
        let store = ["packs", "layers", "meta"].into_iter().flat_map(|dir| {
            let dir = ground.store().join(dir);
            files_below(&dir).into_iter().map(move |name| (name.clone(), fs::read(dir.join(name)).unwrap()))
        });
        let store: BTreeMap<PathBuf, Vec<u8>> = store.collect();
        match &first {
            None => first = Some(store),
            Some(first) => assert!(*first == store, "--jobs {jobs} gave other bytes than --jobs 1"),
        }
    }
}

#[test]
fn the_same_image_gives_the_same_bytes_whoever_converts_it() {
    let (one, two) = (Ground::new("convert-one"), Ground::new("convert-two"));
    for ground in [&one, &two] {
        ground.layout.add("1", &everything()).unwrap();
        ground.convert("oci:img:1");
    }
    for dir in ["packs", "layers", "meta"] {
        let (a, b) = (files_below(&one.store().join(dir)), files_below(&two.store().join(dir)));
        assert_eq!(a, b);
        for name in a {
            assert!(fs::read(one.store().join(dir).join(&name)).unwrap() == fs::read(two.store().join(dir).join(&name)).unwrap(), "{name:?}");
        }
    }
}

/// Records of programs that wrote no framings: their layers cannot be exported, so they are not reused.
#[test]
fn layers_without_framings_are_converted_anew() {
    let ground = Ground::new("no-framings");
    let layer = |number| Layer::new([Entry::file("file", noise(number, 300_000))]);
    ground.layout.add("1", &Image::new().layer(&layer(1), Compression::Gzip).layer(&layer(2), Compression::Gzip)).unwrap();
    let done = ground.convert("oci:img:1");
    let key = SigningKey::load_or_create(&ground.scratch.join("state/key.pem")).unwrap();
    let (store, trust) = (Store::open(&ground.store()).unwrap(), Trust(vec![key.public()]));
    for chain in files_below(&ground.store().join("chains")) {
        let chain = chain.parent().unwrap().file_name().unwrap().to_str().unwrap().parse().unwrap();
        let payload = store.find(&chain, &trust).unwrap().unwrap();
        fs::remove_dir_all(ground.store().join(Name::Record { chain, digest: Digest::of(b"") }.path()).parent().unwrap()).unwrap();
        store.put_record(&Payload { framings: Vec::new(), ..payload }, &key).unwrap();
    }
    fs::remove_file(ground.scratch.join("state/journal")).unwrap();
    let again = ground.convert("oci:img:1");
    for number in 0..2 {
        assert_eq!((&again["layers"][number]["reused"], &again["layers"][number]["tree"]), (&false.into(), &done["layers"][number]["tree"]));
    }
    assert!(ground.convert("oci:img:1")["layers"].as_array().unwrap().iter().all(|layer| layer["reused"] == true));
}

#[test]
fn layers_in_the_store_are_not_read_again() {
    let ground = Ground::new("reuse");
    let (base, app) = (Layer::new([Entry::file("base", noise(1, 300_000))]), Layer::new([Entry::file("app", noise(2, 300_000))]));
    let first = Image::new().layer(&base, Compression::Gzip).layer(&app, Compression::Gzip);
    let built = ground.layout.add("1", &first).unwrap();
    ground.convert("oci:img:1");
    let before = files_below(&ground.store());
    let layers = |done: &serde_json::Value| done["layers"].as_array().unwrap().iter().map(|l| l["reused"].as_bool().unwrap()).collect::<Vec<_>>();
    // With the blobs gone a conversion that read them would fail.
    for layer in &built.layers {
        fs::remove_file(ground.layout.blob(&layer.digest)).unwrap();
    }
    assert_eq!(layers(&ground.convert("oci:img:1")), [true, true]);
    assert_eq!(files_below(&ground.store()), before, "the second run adds nothing");
    // Without the journal the signed record is believed, since it is signed by our own key.
    fs::remove_file(ground.scratch.join("state/journal")).unwrap();
    assert_eq!(layers(&ground.convert("oci:img:1")), [true, true]);
    // Another image on the same base.
    let other = Image::new().layer(&base, Compression::Gzip).layer(&Layer::new([Entry::file("other", noise(3, 300_000))]), Compression::Zstd);
    ground.layout.add("2", &other).unwrap();
    assert_eq!(layers(&ground.convert("oci:img:2")), [true, false]);
    assert_eq!(ground.listed().len(), 2);
    // And one that has the layer somewhere else: what counts is that a record names it, for whatever chain.
    fs::remove_file(ground.scratch.join("state/journal")).unwrap();
    let built =
        ground.layout.add("3", &Image::new().layer(&Layer::new([Entry::file("below", "b")]), Compression::Plain).layer(&app, Compression::Gzip));
    fs::remove_file(ground.layout.blob(&built.unwrap().layers[1].digest)).unwrap();
    assert_eq!(layers(&ground.convert("oci:img:3")), [false, true]);
    assert_eq!(ground.listed().len(), 3);
    // Without our own journal and with another key, nothing in the store can be trusted.
    fs::remove_dir_all(ground.scratch.join("state")).unwrap();
    ground.layout.add("1", &first).unwrap();
    assert_eq!(layers(&ground.convert("oci:img:1")), [false, false]);
}

#[test]
fn other_images_records_are_looked_at_only_for_layers_that_are_missing_and_need_not_be_in_order() {
    let ground = Ground::new("others");
    for (tag, seed) in [("1", 1), ("2", 2), ("3", 3)] {
        ground.layout.add(tag, &Image::new().layer(&Layer::new([Entry::file("a", noise(seed, 300_000))]), Compression::Gzip)).unwrap();
    }
    ground.convert("oci:img:1");
    let chain = ground.convert("oci:img:2")["chain"].as_str().unwrap().trim_start_matches("sha256:").to_owned();
    let place = ground.store().join("chains").join(&chain[..2]).join(&chain);
    fs::remove_dir_all(&place).unwrap();
    fs::write(&place, b"not a directory").unwrap();
    let warned = |source: &str| {
        let run = ground.run(&["convert", source]);
        assert_eq!(run.code, 0, "{}", run.err);
        run.err.contains(place.to_str().unwrap())
    };
    assert!(!warned("oci:img:1"), "all its layers are there");
    assert!(warned("oci:img:3"), "what is in the way is named");
}

#[test]
fn what_is_damaged_in_the_store_is_made_again() {
    let ground = Ground::new("repair");
    ground.layout.add("1", &everything()).unwrap();
    ground.convert("oci:img:1");
    let packs = ground.store().join("packs");
    let pack = packs.join(files_below(&packs).first().unwrap());
    let whole = fs::read(&pack).unwrap();
    fs::remove_file(&pack).unwrap();
    ground.run(&["check", "oci:img:1", "oci:img:1"]).assert_failed(1, &["is not in the store"]);
    ground.convert("oci:img:1");
    assert!(fs::read(&pack).unwrap() == whole);
    fs::write(&pack, &whole[..whole.len() - 4096]).unwrap();
    ground.convert("oci:img:1");
    assert!(fs::read(&pack).unwrap() == whole, "a pack cut short is noticed");
    // A flipped bit is found by check, which names the file.
    let mut damaged = whole;
    damaged[100] ^= 1;
    fs::write(&pack, damaged).unwrap();
    let check = ground.run(&["check", "oci:img:1", "oci:img:1"]);
    assert_eq!(check.code, 6, "{}", check.err);
    let advice = format!("cannot be read from the store: unit 0 of pack {}: ", pack.display());
    assert!(check.out.contains(&advice) && check.out.contains("remove that file, then convert the image again"), "{}", check.out);
    ground.convert("oci:img:1");
    assert_eq!(ground.run(&["check", "oci:img:1", "oci:img:1"]).code, 6, "a finished layer's data is not read again");
    fs::remove_file(&pack).unwrap();
    ground.convert("oci:img:1");
    assert_eq!(ground.run(&["check", "oci:img:1", "oci:img:1"]).code, 0, "the advice is true");
}

#[test]
fn a_layer_whose_archive_would_not_come_back_is_converted_again() {
    let ground = Ground::new("repair-framing");
    // Two packs: of the first the only file is replaced, so that the framing alone names it.
    let replaced = Layer::new([Entry::file("a", noise(1, 300_000)), Entry::file("a", "")]);
    let kept = Layer::new([Entry::file("b", noise(2, 300_000))]);
    ground.layout.add("1", &Image::new().layer(&replaced, Compression::Gzip).layer(&kept, Compression::Gzip)).unwrap();
    let reused = |done: serde_json::Value| done["layers"].as_array().unwrap().iter().map(|layer| layer["reused"] == true).collect::<Vec<_>>();
    assert_eq!(reused(ground.convert("oci:img:1")), [false, false]);
    let of_lower = ground.list_json()["images"][0]["layers"][0]["diffId"].as_str().unwrap()["sha256:".len()..].to_owned();
    let below = |dir: &str| {
        let dir = ground.store().join(dir);
        files_below(&dir).into_iter().map(move |name| dir.join(name)).collect::<Vec<_>>()
    };
    let is_framing_of = |path: &std::path::Path| {
        let name = path.file_name().unwrap().to_str().unwrap();
        name.starts_with(&of_lower) && name.ends_with(".framing.zst")
    };
    let framing = below("layers").into_iter().find(|path| is_framing_of(path)).unwrap();
    let shown = ground.run(&["show", "oci:img:1", "--json"]).json()["packs"].to_string();
    let unseen: Vec<_> = below("packs").into_iter().filter(|path| !shown.contains(path.file_stem().unwrap().to_str().unwrap())).collect();
    assert_eq!((below("packs").len(), unseen.len()), (2, 1));
    for path in [&framing, &unseen[0]] {
        let whole = fs::read(path).unwrap();
        for damaged in [None, Some(&whole[..whole.len() - 5]), Some(b"")] {
            fs::remove_file(path).unwrap();
            if let Some(bytes) = damaged {
                fs::write(path, bytes).unwrap();
            }
            assert_eq!(reused(ground.convert("oci:img:1")), [false, true], "{}", path.display());
            assert!(fs::read(path).unwrap() == whole, "{}", path.display());
            assert_eq!(reused(ground.convert("oci:img:1")), [true, true]);
        }
    }
}

#[test]
fn of_an_image_pushed_anew_the_version_converted_last_is_meant() {
    let ground = Ground::new("versions");
    let image = |content: &str| Image::new().layer(&Layer::new([Entry::file("a", content)]), Compression::Plain);
    let manifests: Vec<String> = ["one", "two", "one"]
        .into_iter()
        .map(|content| {
            ground.layout.add("1", &image(content)).unwrap();
            ground.convert("oci:img:1")["manifest"].as_str().unwrap().to_owned()
        })
        .collect();
    assert!(manifests[0] == manifests[2] && manifests[0] != manifests[1]);
    let (newest, older) = (&manifests[0], &manifests[1]);
    for name in ["oci:img:1", newest] {
        let shown = ground.run(&["show", name, "--json"]);
        assert_eq!(shown.json()["manifest"], **newest, "{}", shown.err);
        assert_eq!(shown.err.contains(older), name == "oci:img:1", "{}", shown.err);
    }
    assert_eq!(ground.run(&["show", older, "--json"]).json()["manifest"], **older);
    assert_eq!(ground.run(&["check", "oci:img:1", "oci:img:1"]).code, 0);
}

#[test]
fn check_tells_another_image_apart() {
    let ground = Ground::new("check");
    let image = |content: &str| Image::new().layer(&Layer::new([Entry::dir("d"), Entry::file("d/a", content)]), Compression::Plain);
    ground.layout.add("1", &image("one")).unwrap();
    ground.layout.add("2", &image("two")).unwrap();
    ground.convert("oci:img:1");
    let check = ground.run(&["check", "oci:img:1", "oci:img:2"]);
    assert_eq!(check.code, 6);
    assert!(check.out.contains("d/a: has content with BLAKE3") && check.out.contains("the source's manifest is"), "{}", check.out);
    assert!(check.err.contains("differs from its source in 2 places"), "{}", check.err);
}

#[test]
fn the_same_layer_twice_is_converted_once() {
    let ground = Ground::new("twice");
    let layer = Layer::new([Entry::file("a", noise(1, 10_000))]);
    ground.layout.add("1", &Image::new().layer(&layer, Compression::Gzip).layer(&layer, Compression::Gzip)).unwrap();
    let done = ground.convert("oci:img:1");
    assert_eq!(done["packs"].as_array().unwrap().len(), 1);
    assert_eq!(done["layers"][0]["tree"], done["layers"][1]["tree"]);
}
