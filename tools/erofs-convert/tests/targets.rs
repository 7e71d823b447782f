//! Targets pushed by the real program to real registries: what is sent, what is taken over, and what a refusal leaves behind.

#![allow(clippy::unwrap_used, reason = "a test's own set-up")]

mod ground;

use std::fs;

use ground::{Ground, everything, everything_layers, files_below};
use serde_json::{Value, json};
use testbed::{Compression, Guard, Image, PASSWORD, Registry, USER, need, require};

fn convert(ground: &Ground, source: &str, target: &str) -> Value {
    let run = ground.run(&["convert", source, "--target", target, "--json"]);
    assert_eq!(run.code, 0, "{}", run.err);
    run.json()
}

fn counts(done: &Value) -> [u64; 3] {
    ["present", "mounted", "sent"].map(|how| done["target"][how].as_u64().unwrap())
}

#[test]
fn within_a_registry_no_layer_is_sent_and_beyond_it_each_once() {
    require!(need::command("docker-registry"), need::command("skopeo"));
    let ground = Ground::new("targets");
    let registry = Registry::start(&ground.scratch.join("registry")).unwrap();
    let built = ground.layout.add("1", &everything()).unwrap();
    let source = registry.reference("team/app:1");
    ground.layout.push("1", &source).unwrap();

    let mark = registry.mark();
    let first = convert(&ground, &source, &registry.reference("lazy/app:1-acc"));
    assert_eq!(counts(&first), [0, 4, 0], "three layers and the configuration are taken over");
    let requests = registry.requests(mark);
    let wrote = |method: &str, part: &str| requests.iter().filter(|r| r.starts_with(method) && r.contains(part)).count();
    assert_eq!((wrote("POST ", "mount="), wrote("PUT ", "/blobs/"), wrote("PATCH ", ""), wrote("PUT ", "/manifests/1-acc")), (4, 0, 0, 1));
    assert_ne!(first["target"]["digest"], built.manifest.digest, "either can be deleted alone");
    let shows_target = || ground.run(&["show", &source]).out.contains(&registry.reference("lazy/app:1-acc"));
    assert!(shows_target());
    ground.convert(&source);
    assert!(shows_target(), "a conversion without a target forgets none");

    let mark = registry.mark();
    let again = convert(&ground, &source, &registry.reference("lazy/app:1-acc"));
    assert_eq!((counts(&again), &again["target"]["digest"]), ([4, 0, 0], &first["target"]["digest"]));
    assert_eq!(registry.blob_bytes(mark).iter().filter(|(digest, _)| built.layers.iter().any(|l| l.digest == **digest)).count(), 0);
    let beside = convert(&ground, &source, &registry.reference("team/app:1-acc"));
    assert_eq!((counts(&beside), &beside["target"]["digest"]), ([4, 0, 0], &first["target"]["digest"]));

    let other = Registry::start(&ground.scratch.join("other")).unwrap();
    let copied = convert(&ground, &source, &other.reference("app:acc"));
    assert_eq!((counts(&copied), &copied["target"]["digest"]), ([0, 0, 4], &first["target"]["digest"]));
    // It is a whole image: it can be converted from there, into the same chain.
    let back = ground.convert(&other.reference("app:acc"));
    assert_eq!((&back["chain"], &back["manifest"]), (&json!(built.top_chain()), &first["target"]["digest"]));

    ground.run(&["convert", &source, "--target", &source]).assert_failed(2, &[&source, "another tag"]);
    let from_layout = convert(&ground, "oci:img:1", &other.reference("laid/out:acc"));
    assert_eq!(counts(&from_layout), [0, 0, 4]);
}

#[test]
fn a_compact_target_is_a_few_kilobytes_and_the_same_every_time() {
    require!(need::command("docker-registry"), need::command("skopeo"));
    let ground = Ground::new("compact");
    let registry = Registry::start(&ground.scratch.join("registry")).unwrap();
    let built = ground.layout.add("1", &everything()).unwrap();
    let (source, target) = (registry.reference("team/app:1"), registry.reference("small/app:1"));
    ground.layout.push("1", &source).unwrap();
    let compact = |target: &str| {
        let run = ground.run(&["convert", &source, "--target", target, "--target-kind", "compact", "--json"]);
        assert_eq!(run.code, 0, "{}", run.err);
        run.json()
    };
    let first = compact(&target);
    assert_eq!((counts(&first), &first["target"]["kind"]), ([0, 0, 2], &json!("compact")));
    let records = || files_below(&ground.store().join("chains"));
    let before = records();
    let again = compact(&target);
    assert_eq!((counts(&again), &again["target"]["digest"]), ([2, 0, 0], &first["target"]["digest"]));
    assert_eq!(records(), before);
    let other = Registry::start(&ground.scratch.join("other")).unwrap();
    assert_eq!(compact(&other.reference("x:y"))["target"]["digest"], first["target"]["digest"]);

    // Another tool takes it, and what it says leads back to the source.
    let inspect = |what: &[&str]| -> Value {
        let name = format!("docker://{target}");
        let args = [&["--insecure-policy", "inspect", "--tls-verify=false", "--raw"][..], what, &[&name]].concat();
        serde_json::from_str(&testbed::run("skopeo", args).unwrap()).unwrap()
    };
    let (manifest, config) = (inspect(&[]), inspect(&["--config"]));
    let layers = manifest["layers"].as_array().unwrap();
    let size = manifest["config"]["size"].as_u64().unwrap() + layers[0]["size"].as_u64().unwrap();
    assert_eq!((layers.len(), size), (1, first["target"]["sentBytes"].as_u64().unwrap()));
    assert!(size < 64 << 10, "{size} bytes");
    assert_eq!(manifest["subject"]["digest"], json!(built.manifest.digest));
    assert_eq!(layers[0]["annotations"]["containerd.io/snapshot/slipway.chain"], json!(built.top_chain()));
    assert_eq!((&config["config"]["Cmd"], &config["rootfs"]["diff_ids"]), (&json!(["/bin/sh"]), &ground.list_json()["images"][0]["compact"]));
    let copy = format!("oci:{}", ground.scratch.join("copy").display());
    testbed::run("skopeo", ["--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", &format!("docker://{target}"), &copy]).unwrap();

    // There is nothing in it to convert, whatever is done to what it says of itself.
    ground.run(&["convert", &target]).assert_failed(1, &[&target, "compact", "holds no files", &format!("team/app@{}", built.manifest.digest)]);
    ground.run(&["check", &source, &target]).assert_failed(1, &["compact"]);
    let blob = ground.scratch.join("copy/blobs/sha256").join(layers[0]["digest"].as_str().unwrap().trim_start_matches("sha256:"));
    let diff_id = config["rootfs"]["diff_ids"][0].as_str().unwrap().to_owned();
    let unlabelled = Image::new().layer_file(&blob, Compression::Gzip, &diff_id).layer(&everything_layers()[1], Compression::Gzip);
    ground.layout.add("unlabelled", &unlabelled).unwrap();
    ground.run(&["convert", "oci:img:unlabelled"]).assert_failed(1, &["img:unlabelled", "compact", "convert the image it was made from"]);
    assert_eq!(records(), before, "nodes never have to choose");

    // The root goes on naming the record's chain when the image is converted without a target.
    ground.convert(&source);
    assert_eq!(ground.list_json()["images"][0]["compact"], json!([diff_id]));
    assert!(ground.run(&["show", &source]).out.contains(&format!("compact   {diff_id}\n")));
}

#[test]
fn the_progress_of_a_push_is_shown_like_that_of_a_conversion() {
    require!(need::command("docker-registry"), need::command("skopeo"));
    let ground = Ground::new("target-progress");
    let registry = Registry::start(&ground.scratch.join("registry")).unwrap();
    let built = ground.layout.add("1", &everything()).unwrap();
    let convert = |tag: &str, show: &str| {
        let run = ground.run(&["convert", "oci:img:1", "--target", &registry.reference(&format!("{tag}:1")), "--progress", show]);
        assert_eq!(run.code, 0, "{}", run.err);
        run.err
    };
    let events: Vec<Value> = convert("a/json", "json").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let pushes = || events.iter().filter(|event| event["event"] == "push");
    for (number, layer) in (1u64..).zip(&built.layers) {
        let of_it: Vec<&Value> = pushes().filter(|event| event["layer"] == json!(number)).collect();
        let (first, last) = (of_it.first().unwrap(), of_it.last().unwrap());
        assert_eq!((&first["state"], &first["done"], &first["layers"]), (&json!("started"), &json!(0), &json!(3)));
        assert_eq!((&last["state"], &last["done"], &last["size"]), (&json!("done"), &json!(layer.size), &json!(layer.size)));
        assert!(of_it.iter().all(|event| event["digest"] == json!(layer.digest)));
    }
    let digest = &built.layers[0].digest["sha256:".len()..][..12];
    let plain = convert("a/plain", "plain");
    assert!(plain.contains(&format!("pushing layer 1/3 {digest}: ")) && plain.matches(" sent in ").count() == 3, "{plain}");
    let again = convert("a/plain", "plain");
    assert!(again.contains(&format!("pushing layer 1/3 {digest}: is there\n")) && !again.contains("sent"), "{again}");
    assert_eq!(convert("a/none", "none"), "");
}

fn raw(reference: &str) -> String {
    testbed::run("skopeo", ["--insecure-policy", "inspect", "--tls-verify=false", "--raw", &format!("docker://{reference}")]).unwrap()
}

#[test]
fn all_platforms_are_one_target_and_everybody_finds_theirs() {
    require!(need::command("docker-registry"), need::command("skopeo"));
    let ground = Ground::new("target-platforms");
    let registry = Registry::start(&ground.scratch.join("registry")).unwrap();
    let [bottom, middle, _] = everything_layers();
    let images = [("amd64", &bottom), ("arm64", &middle)].map(|(cpu, layer)| Image::new().layer(layer, Compression::Gzip).architecture(cpu));
    let built = ground.layout.add_index("1", &images).unwrap();
    let source = registry.reference("team/app:1");
    ground.layout.push("1", &source).unwrap();
    for kind in ["portable", "compact"] {
        let target = registry.reference(&format!("lazy/app:{kind}"));
        let args = ["convert", &source, "--all-platforms", "--target", &target, "--target-kind", kind];
        let mark = registry.mark();
        let run = ground.run(&[&args[..], &["--json"]].concat());
        assert_eq!(run.code, 0, "{}", run.err);
        let puts: Vec<String> = registry.requests(mark).into_iter().filter(|r| r.starts_with("PUT ") && r.contains("/manifests/")).collect();
        assert!(puts.len() == 3 && puts[2].ends_with(&format!("/{kind}")), "the index comes last and only it has a tag: {puts:?}");
        let done = run.json();
        let text = raw(&target);
        let index: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(done[0]["target"]["index"], json!(testbed::sha256(text.as_bytes())));
        let source_digest = testbed::sha256(raw(&source).as_bytes());
        let made_from = format!("{}@{source_digest}", registry.reference("team/app"));
        assert_eq!(index["annotations"], json!({"containerd.io/snapshot/slipway.source": made_from}));
        for (i, cpu) in ["amd64", "arm64"].into_iter().enumerate() {
            let entry = &index["manifests"][i];
            assert_eq!(entry["platform"], json!({"architecture": cpu, "os": "linux"}));
            assert_eq!((&entry["digest"], &done[i]["target"]["index"]), (&done[i]["target"]["digest"], &done[0]["target"]["index"]));
            let theirs = ["--insecure-policy", "--override-arch", cpu, "inspect", "--config", "--tls-verify=false", &format!("docker://{target}")];
            let config: Value = serde_json::from_str(&testbed::run("skopeo", theirs).unwrap()).unwrap();
            let ours = ground.run(&["convert", &target, "--platform", &format!("linux/{cpu}"), "--json"]);
            if kind == "portable" {
                assert_eq!(config["rootfs"]["diff_ids"], json!(built[i].diff_ids));
                assert_eq!((ours.code, &ours.json()["chain"]), (0, &json!(built[i].top_chain())), "{}", ours.err);
            } else {
                assert_eq!(config["architecture"], cpu);
                ours.assert_failed(1, &["compact", &built[i].manifest.digest]);
            }
        }
        let roots = ground.list_json();
        let named = roots["images"].as_array().unwrap().iter().filter(|image| image["target"] == json!(target)).count();
        assert_eq!(named, 2, "{roots}");
        let text = ground.run(&args).out;
        let digest = done[0]["target"]["index"].as_str().unwrap();
        assert!(text.ends_with(&format!("{target}@{digest}: index of 2 platforms\n")), "the same index again: {text}");
    }
}

#[test]
fn a_platform_that_fails_leaves_the_tag_as_it_was() {
    require!(need::command("docker-registry"), need::command("skopeo"));
    let ground = Ground::new("target-failed");
    let registry = Registry::start(&ground.scratch.join("registry")).unwrap();
    let [bottom, middle, _] = everything_layers();
    let images = [("amd64", &bottom), ("arm64", &middle)].map(|(cpu, layer)| Image::new().layer(layer, Compression::Gzip).architecture(cpu));
    let built = ground.layout.add_index("1", &images).unwrap();
    fs::write(ground.layout.blob(&built[0].layers[0].digest), b"not what it was").unwrap();
    let target = registry.reference("lazy/app:acc");
    let mark = registry.mark();
    let run = ground.run(&["convert", "oci:img:1", "--all-platforms", "--target", &target, "--json"]);
    assert_eq!(run.code, 6, "{}", run.err);
    for part in ["1 of 2 platforms failed (linux/amd64)", "the others are converted", &format!("{target} was not pushed")] {
        assert!(run.err.contains(part), "{part} is not in: {}", run.err);
    }
    let done = run.json();
    assert!(done[0]["error"].is_string() && done[1]["target"]["index"].is_null(), "{done}");
    let asked = registry.requests(mark);
    assert!(asked.iter().any(|r| r.starts_with("PUT ") && r.ends_with(done[1]["target"]["digest"].as_str().unwrap())), "{asked:?}");
    assert!(!asked.iter().any(|r| r.ends_with("/manifests/acc")), "{asked:?}");
    assert!(ground.list_json()["images"][0]["target"].is_null(), "there is none of that name");
}

#[test]
fn without_the_right_to_push_the_image_is_converted_and_the_next_run_only_pushes() {
    require!(need::command("docker-registry"), need::command("skopeo"));
    let ground = Ground::new("targets-login");
    ground.layout.add("1", &everything()).unwrap();
    let registry = Registry::start_behind(&ground.scratch.join("registry"), Guard { password: true, tls: None }).unwrap();
    let target = registry.reference("team/app:acc");
    let args = ["convert", "oci:img:1", "--target", &target, "--json"];
    let login = format!("docker login {}", registry.host());
    ground.run(&args).assert_failed(4, &[&target, "is converted", registry.host(), "team/app", &login]);
    assert_eq!(ground.listed().len(), 1);

    let file = ground.scratch.join("auth.json");
    fs::write(&file, json!({"auths": {registry.host(): {"username": USER, "password": PASSWORD}}}).to_string()).unwrap();
    let run: ground::Run = ground.command(&args).env("REGISTRY_AUTH_FILE", &file).output().unwrap().into();
    assert_eq!(run.code, 0, "{}", run.err);
    assert_eq!(counts(&run.json()), [0, 0, 4]);
    assert!(run.json()["layers"].as_array().unwrap().iter().all(|layer| layer["reused"] == true));
}
