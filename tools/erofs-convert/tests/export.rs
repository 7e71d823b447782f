//! From the store back to a plain image: the source's image id and diff IDs, or an error and nothing.

#![allow(clippy::unwrap_used, reason = "a test's own set-up")]

mod ground;

use std::fs;
use std::path::{Path, PathBuf};

use ground::{Ground, everything, everything_layers};
use serde_json::Value;
use slipway::oci::Sha256;
use slipway::store::{ImageRoot, RootConfig, SigningKey, Store};
use testbed::{Compression, Entry, Image, Layer, files_below, need, noise, require, run};

/// The manifest of a layout's only image, and its configuration's bytes.
fn documents(layout: &Path) -> (Value, Vec<u8>) {
    let blob = |descriptor: &Value| fs::read(layout.join("blobs").join(descriptor["digest"].as_str().unwrap().replace(':', "/"))).unwrap();
    let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
    let manifest: Value = serde_json::from_slice(&blob(&index["manifests"][0])).unwrap();
    let config = blob(&manifest["config"]);
    (manifest, config)
}

fn below(ground: &Ground, dir: &str) -> Vec<PathBuf> {
    let dir = ground.store().join(dir);
    files_below(&dir).into_iter().map(|name| dir.join(name)).collect()
}

#[test]
fn an_exported_image_has_the_id_and_the_diff_ids_of_its_source_and_other_tools_read_it() {
    require!(need::root(), need::command("skopeo"), need::command("umoci"));
    let ground = Ground::new("export");
    // A link to a file of a lower layer, and a file that its own layer replaces.
    let linked = Layer::new([Entry::hard_link("etc/z", "etc/owned").owner(1000, 3_000_000_000)]);
    let replaced = Layer::new([Entry::file("twice", noise(5, 300_000)), Entry::file("twice", noise(6, 300_000))]);
    let image = everything().layer(&linked, Compression::Gzip).layer(&replaced, Compression::Zstd);
    let built = ground.layout.add("1", &image).unwrap();
    let done = ground.convert("oci:img:1");
    let exported = ground.run(&["export", "oci:img:1", "oci:out:1", "--json"]);
    assert_eq!(exported.code, 0, "{}", exported.err);
    let exported = exported.json();

    let diff_ids = |layers: &Value| layers.as_array().unwrap().iter().map(|layer| layer["diffId"].clone()).collect::<Vec<_>>();
    assert_eq!(diff_ids(&exported["layers"]), diff_ids(&done["layers"]));
    assert_eq!(exported["config"], built.config.digest.as_str());
    let target = ground.scratch.join("out");
    let (manifest, config) = documents(&target);
    assert!(config == fs::read(ground.layout.blob(&built.config.digest)).unwrap(), "the configuration is the source's");
    assert_eq!(manifest["config"]["digest"], exported["config"]);

    let (again, source) = (Ground::new("export-again"), format!("oci:{}:1", target.display()));
    let same = again.convert(&source);
    for (field, of) in [("manifest", &exported), ("metadata", &done), ("chain", &done)] {
        assert_eq!(same[field], of[field], "{field}");
    }
    run("skopeo", ["inspect", &source]).unwrap();
    let bundle = ground.scratch.join("bundle");
    run("umoci", ["unpack", "--image", &source[4..], bundle.to_str().unwrap()]).unwrap();
    assert_eq!(fs::read(bundle.join("rootfs/etc/linked")).unwrap(), b"replaced");
    assert!(!bundle.join("rootfs/etc/gone").exists() && !bundle.join("rootfs/opaque/hidden").exists());

    ground.run(&["export", "oci:img:1", "oci:out:1"]).assert_failed(1, &["out", "not empty"]);
    let second = ground.run(&["export", "oci:img:1", "oci:second", "--json"]);
    assert_eq!(second.json(), exported, "the same bytes every time");
}

#[test]
fn a_layer_found_again_in_another_image_is_exported_as_well() {
    let ground = Ground::new("export-reused");
    let shared: Vec<Entry> = (0..20).map(|i| Entry::file(&format!("f{i}"), noise(i, 200_000))).collect();
    let base = Layer::new(shared.clone());
    ground.layout.add("1", &Image::new().layer(&base, Compression::Gzip)).unwrap();
    ground.convert("oci:img:1");
    // The layer itself, and one whose data is in its packs.
    let moved = Layer::new(shared.into_iter().map(|entry| Entry { path: format!("moved/{}", entry.path), ..entry }));
    let built = ground.layout.add("2", &Image::new().layer(&base, Compression::Zstd).layer(&moved, Compression::Gzip)).unwrap();
    let done = ground.convert("oci:img:2");
    assert_eq!((&done["layers"][0]["reused"], done["packs"].as_array().unwrap().len()), (&true.into(), 1), "nothing was stored twice");
    let exported = ground.run(&["export", "oci:img:2", "oci:out", "--json"]);
    assert_eq!(exported.json()["config"], built.config.digest.as_str(), "{}", exported.err);
}

/// A run that must leave nothing where it should have written.
fn fails(ground: &Ground, code: i32, parts: &[&str]) {
    for empty in [false, true] {
        let out = ground.scratch.join("out");
        if empty {
            fs::create_dir(&out).unwrap();
        }
        ground.run(&["export", "oci:img:1", "oci:out:1"]).assert_failed(code, parts);
        assert_eq!(out.exists(), empty, "a directory that was made is taken away again");
        if empty {
            assert_eq!(fs::read_dir(&out).unwrap().count(), 0);
            fs::remove_dir(&out).unwrap();
        }
    }
}

#[test]
fn what_is_damaged_in_the_store_is_named_and_not_exported() {
    let ground = Ground::new("export-damaged");
    let image = |seed| Image::new().layer(&Layer::new([Entry::file("a", noise(seed, 300_000))]), Compression::Gzip);
    ground.layout.add("1", &image(1).layer(&Layer::new([Entry::file("b", noise(3, 300_000))]), Compression::Gzip)).unwrap();
    let done = ground.convert("oci:img:1");
    let lower = done["layers"][0]["diffId"].as_str().unwrap()["sha256:".len()..].to_owned();
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let framing = below(&ground, "layers").into_iter().find(|path| name(path).starts_with(&lower) && name(path).ends_with(".framing.zst")).unwrap();
    let pack = ground.store().join("packs").join(&done["packs"][0]["digest"].as_str().unwrap()[..2]);
    let pack = pack.join(format!("{}.pack", done["packs"][0]["digest"].as_str().unwrap()));

    let change = |path: &Path, edit: &dyn Fn(&mut Vec<u8>)| {
        let whole = fs::read(path).unwrap();
        let mut bytes = whole.clone();
        edit(&mut bytes);
        fs::remove_file(path).unwrap();
        fs::write(path, bytes).unwrap();
        whole
    };
    let shown = |path: &Path| path.to_str().unwrap().to_owned();
    let whole = change(&pack, &|bytes| bytes[100] ^= 1);
    fails(&ground, 6, &["layer 1", &lower, "img:1", "cannot be read from the store", "unit 0 of pack", &shown(&pack)]);
    fs::write(&pack, whole).unwrap();
    let whole = change(&framing, &|bytes| bytes.truncate(bytes.len() - 3));
    fails(&ground, 6, &[&shown(&framing), "is damaged"]);
    change(&framing, &|bytes| *bytes = zstd::encode_all(&b"SLWYFRAM\x01\0\0\0\x12\0\0"[..], 3).unwrap());
    fails(&ground, 6, &[&shown(&framing), "its content has the digest"]);
    fs::remove_file(&framing).unwrap();
    fails(&ground, 1, &[&shown(&framing), "is not in the store"]);
    fs::write(&framing, whole).unwrap();
    assert_eq!(ground.run(&["export", "oci:img:1", "oci:out:1"]).code, 0);
}

/// The only image root of a store, and its file.
fn root_of(ground: &Ground) -> (Store, ImageRoot, PathBuf) {
    let store = Store::open(&ground.store()).unwrap();
    let root = store.images().unwrap().remove(0).unwrap();
    let path = ground.store().join(root.name().path());
    (store, root, path)
}

/// Who can write to the store and has no key could otherwise have others run what they want.
#[test]
fn an_image_root_that_no_trusted_key_signed_is_not_exported() {
    let ground = Ground::new("export-forged");
    ground.layout.add("1", &Image::new().layer(&Layer::new([Entry::file("a", noise(1, 3000))]), Compression::Gzip)).unwrap();
    ground.convert("oci:img:1");
    let (store, good, path) = root_of(&ground);
    let signed = fs::read(&path).unwrap();
    let shown = path.to_str().unwrap().to_owned();
    let mut config: Value = serde_json::from_slice(&good.config.bytes).unwrap();
    config["config"]["Cmd"] = serde_json::json!(["/theirs"]);
    let forged = ImageRoot { config: RootConfig::new(config.to_string().as_bytes()), ..good };

    fs::write(&path, serde_json::to_vec(&forged).unwrap()).unwrap();
    assert_eq!(ground.listed().len(), 1, "it is kept and listed");
    assert_eq!(ground.run(&["show", "oci:img:1"]).code, 0);
    fails(&ground, 1, &[&shown, "is not signed", "convert the image again"]);

    let key = ground.scratch.join("other/key.pem");
    let theirs = SigningKey::load_or_create(&key).unwrap();
    store.put_image(&forged, &theirs).unwrap();
    assert_eq!(ground.listed().len(), 1, "it is kept and listed");
    fails(&ground, 1, &[&shown, &theirs.public().id().to_string(), "not trusted", "--trusted-key"]);
    let public = ground.scratch.join("other/key.pem.pub");
    let trusting = ["export", "oci:img:1", "oci:out:1", "--trusted-key", public.to_str().unwrap()];
    assert_eq!(ground.run(&trusting).code, 0);
    let (_, exported) = documents(&ground.scratch.join("out"));
    assert!(exported == forged.config.bytes);
    fs::remove_dir_all(ground.scratch.join("out")).unwrap();

    // What another key signed, said to be signed by ours.
    let mut envelope: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    envelope["key"] = serde_json::from_slice::<Value>(&signed).unwrap()["key"].clone();
    fs::write(&path, envelope.to_string()).unwrap();
    fails(&ground, 6, &[&shown, "signature"]);
    fs::remove_file(&public).unwrap();
    ground.run(&trusting).assert_failed(1, &[public.to_str().unwrap()]);
    // Without any key: not even the state directory is there.
    let nowhere = ground.scratch.join("nowhere");
    let run = ground.command(&["export", "oci:img:1", "oci:out:1"]).env_remove("SLIPWAY_KEY").arg("--key").arg(&nowhere).output().unwrap();
    let run: ground::Run = run.into();
    run.assert_failed(1, &[&shown, "not trusted"]);
    assert!(!nowhere.exists(), "an export makes no key");

    ground.convert("oci:img:1");
    assert!(fs::read(&path).unwrap() == signed, "converted again, it is as it was");
    assert_eq!(ground.run(&["export", "oci:img:1", "oci:out:1"]).code, 0);
}

#[test]
fn an_image_root_that_says_something_else_of_its_image_is_not_exported() {
    let ground = Ground::new("export-root");
    let layer = |name: &str, seed| Layer::new([Entry::file(name, noise(seed, 3000))]);
    ground.layout.add("1", &Image::new().layer(&layer("a", 1), Compression::Gzip).layer(&layer("b", 2), Compression::Gzip)).unwrap();
    ground.convert("oci:img:1");
    let (store, good, path) = root_of(&ground);
    let key = SigningKey::load_or_create(&ground.scratch.join("state/key.pem")).unwrap();
    let with = |edit: &dyn Fn(&mut ImageRoot)| {
        let mut root = good.clone();
        edit(&mut root);
        store.put_image(&root, &key).unwrap();
    };
    let shown = path.to_str().unwrap().to_owned();
    with(&|root| root.config.bytes = b"{}".to_vec());
    fails(&ground, 6, &[&shown, "the configuration in it has the digest"]);
    with(&|root| root.config = RootConfig::new(b"{}"));
    fails(&ground, 1, &["configuration", "rootfs"]);
    with(&|root| root.layers.reverse());
    fails(&ground, 6, &[&shown, "do not belong together"]);
    with(&|root| root.layers.truncate(1));
    fails(&ground, 6, &[&shown, "do not belong together"]);
    // Another layer's framing under this layer's name, as nobody but an attacker makes it.
    let framings: Vec<String> = good.layers.iter().map(|layer| layer.framing.to_string()).collect();
    let diff_ids: Vec<String> = good.layers.iter().map(|layer| layer.diff_id.0.to_string()).collect();
    let file = |diff_id: &str, framing: &str| ground.store().join("layers").join(&diff_id[..2]).join(format!("{diff_id}.{framing}.framing.zst"));
    let forged = file(&diff_ids[0], &framings[1]);
    fs::copy(file(&diff_ids[1], &framings[1]), &forged).unwrap();
    with(&|root| root.layers[0].framing = root.layers[1].framing);
    fails(&ground, 6, &["layer 1", &diff_ids[0], forged.to_str().unwrap(), "give a tar with the digest", &diff_ids[1]]);
}

/// Docker's own kind of image: the configuration's bytes are what `docker save` wrote.
#[test]
fn an_image_of_docker_save_keeps_its_id() {
    require!(need::command("skopeo"));
    let ground = Ground::new("export-docker");
    let gzip = everything_layers().iter().fold(Image::new(), |image, layer| image.layer(layer, Compression::Gzip));
    let built = ground.layout.add("1", &gzip).unwrap();
    let archive = format!("docker-archive:{}:example.com/app:1", ground.scratch.join("app.tar").display());
    run("skopeo", ["--insecure-policy", "copy", "-q", &format!("oci:{}:1", ground.layout.path().display()), &archive]).unwrap();
    let done = ground.convert("docker-archive:app.tar");
    let name = done["source"].as_str().unwrap();
    let exported = ground.run(&["export", name, "oci:out", "--json"]);
    assert_eq!(exported.code, 0, "{}", exported.err);
    let id = exported.json()["config"].as_str().unwrap().to_owned();
    let (_, config) = documents(&ground.scratch.join("out"));
    assert_eq!(id, Sha256::of(&config).oci());
    let diff_ids = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap()["rootfs"]["diff_ids"].clone();
    assert_eq!(diff_ids(&config), diff_ids(&fs::read(ground.layout.blob(&built.config.digest)).unwrap()));
    let kept = run("tar", ["-xOf", ground.scratch.join("app.tar").to_str().unwrap(), &format!("{}.json", &id["sha256:".len()..])]).unwrap();
    assert_eq!(kept.trim_end().as_bytes(), config.trim_ascii_end(), "the archive names its configuration by the image id");
}
