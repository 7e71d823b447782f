//! Targets pushed by the real program to real registries: what is sent, what is taken over, and what a refusal leaves behind.

#![allow(clippy::unwrap_used, reason = "a test's own set-up")]

mod ground;

use std::fs;

use ground::{Ground, everything};
use serde_json::{Value, json};
use testbed::{Guard, PASSWORD, Registry, USER, need, require};

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
