//! The files in `deploy/` say what the program does: defaults, names and paths agree.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use slipway::config::Config;
use slipway::store::{SigningKey, Store};

fn deployed(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy").join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The example with every commented setting switched on.
fn with_all_settings(example: &str) -> String {
    let setting = |line: &&str| {
        !line.starts_with('#') || line.strip_prefix("# ").is_some_and(|line| line.split_once(" = ").is_some_and(|(key, _)| !key.contains(' ')))
    };
    example.lines().filter(setting).map(|line| line.strip_prefix("# ").unwrap_or(line)).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_example_configuration_shows_the_defaults() {
    let example = deployed("slipwayd.toml");
    let config = Config::parse(&example).expect("the example is valid");
    assert_eq!(config.store, Path::new("/mnt/slipway"));
    let shown = Config::parse(&with_all_settings(&example)).expect("its commented settings are valid");
    assert_eq!(shown, config);
}

#[test]
fn the_example_configuration_shows_every_setting() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/slipwayd.toml");
    // It prints every field of the parsed configuration.
    let checked = Command::new(env!("CARGO_BIN_EXE_slipwayd")).args(["check-config", "--config"]).arg(&example).output().expect("slipwayd runs");
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    let keys = |text: &str| toml::from_str::<toml::Table>(text).expect("TOML").into_iter().map(|(key, _)| key).collect::<BTreeSet<_>>();
    let mut expected = keys(&String::from_utf8(checked.stdout).expect("text"));
    expected.insert("version".to_owned());
    assert_eq!(keys(&with_all_settings(&deployed("slipwayd.toml"))), expected);
}

#[test]
fn check_config_tells_what_run_would_refuse_from_what_may_come_later() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (root, file) = (dir.path(), dir.path().join("slipwayd.toml"));
    fs::create_dir(root.join("store")).expect("a directory");
    Store::create(&root.join("store")).expect("a store");
    SigningKey::load_or_create(&root.join("key.pem")).expect("a key");
    fs::write(root.join("a-file"), "").expect("a file");
    let check = |edit: (&str, &str), code: i32, parts: &[&str]| {
        let good =
            "version = 1\nstore = \"R/store\"\nstate = \"R/state/deeper\"\nrun = \"R/run\"\ntrusted_keys = [\"R/key.pem.pub\"]\nlog = \"info\"\n";
        fs::write(&file, good.replace(edit.0, edit.1).replace('R', root.to_str().expect("text"))).expect("written");
        let done = Command::new(env!("CARGO_BIN_EXE_slipwayd")).args(["check-config", "--config"]).arg(&file).output().expect("slipwayd runs");
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(code), "{edit:?}: {said}");
        assert!(parts.iter().all(|part| said.contains(part)) && said.is_empty() == parts.is_empty(), "{edit:?}: {said}");
        assert_eq!(said.contains("warning: "), code == 0 && !parts.is_empty(), "{edit:?}: {said}");
    };
    check(("", ""), 0, &[]);
    check(("R/store", "R/absent"), 0, &["/absent", "is mounted"]);
    check(("R/store", "R"), 0, &["is no Slipway store"]);
    check(("R/key.pem.pub", "R/absent.pub"), 0, &["/absent.pub", "no key to trust"]);
    check(("info", "slipway=loud"), 2, &["slipway=loud"]);
    check(("state/deeper", "st:ate"), 2, &["/st:ate", "':'"]);
    check(("state/deeper", &"long/".repeat(40)), 2, &["too long a path"]);
    check(("state/deeper", "a-file/state"), 2, &["/a-file is no directory"]);
    check(("R/run", &format!("R/{}", "long/".repeat(25))), 2, &["slipway.sock cannot be made"]);
    assert!(!root.join("state").exists(), "nothing is made");
}

#[test]
fn containerd_is_given_the_default_socket() {
    let socket = Config::parse("version = 1\nstore = \"/s\"").expect("a configuration").socket;
    for name in ["containerd/config-1.x.toml", "containerd/config-2.x.toml"] {
        let config: toml::Table = toml::from_str(&deployed(name)).expect("TOML");
        assert_eq!(config["proxy_plugins"]["slipway"]["address"].as_str(), socket.to_str(), "{name}");
        assert_eq!(config["proxy_plugins"]["slipway"]["type"].as_str(), Some("snapshot"), "{name}");
    }
}

#[test]
fn containerd_2_is_told_where_snapshots_lie_and_what_to_unpack_with() {
    let state = Config::parse("version = 1\nstore = \"/s\"").expect("a configuration").state;
    let text = deployed("containerd/config-2.x.toml");
    let config: toml::Table = toml::from_str(&text).expect("TOML");
    assert_eq!(config["proxy_plugins"]["slipway"]["exports"]["root"].as_str(), state.to_str());
    let entries = config["plugins"]["io.containerd.transfer.v1.local"]["unpack_config"].as_array().expect("a list");
    let named: Vec<_> = entries.iter().map(|entry| (entry["platform"].as_str(), entry["snapshotter"].as_str())).collect();
    assert_eq!(named, [(Some("linux/amd64"), Some("slipway")), (Some("linux/amd64"), Some("overlayfs"))]);
    let comment = "# The platform must be the node's own";
    assert!(text.lines().any(|line| line.starts_with(comment)), "whoever copies it to another architecture has to change the platform");
}

#[test]
fn the_unit_keeps_what_the_daemon_needs() {
    let unit = deployed("slipway.service");
    let has = |line: &str| assert!(unit.lines().any(|candidate| candidate == line), "{line}");
    has("Type=notify");
    has("Before=containerd.service");
    has("KillMode=mixed");
    has("FileDescriptorStorePreserve=yes");
    has("RuntimeDirectoryPreserve=yes");
    // Any of these makes a mount namespace, which hides our mounts from containerd.
    for directive in [
        "PrivateTmp",
        "PrivateDevices",
        "PrivateMounts",
        "ProtectSystem",
        "ProtectHome",
        "ProtectKernel",
        "ReadWritePaths",
        "ReadOnlyPaths",
        "BindPaths",
        "DynamicUser",
        "RootDirectory",
    ] {
        assert!(!unit.lines().any(|line| line.starts_with(directive)), "{directive} makes a mount namespace");
    }
}
