//! The files in `deploy/` say what the program does: defaults, names and paths agree.

use std::fs;
use std::path::Path;

use slipway::config::Config;

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
fn containerd_is_given_the_default_socket() {
    let socket = Config::parse("version = 1\nstore = \"/s\"").expect("a configuration").socket;
    for name in ["containerd/config-1.x.toml", "containerd/config-2.x.toml"] {
        let config: toml::Table = toml::from_str(&deployed(name)).expect("TOML");
        assert_eq!(config["proxy_plugins"]["slipway"]["address"].as_str(), socket.to_str(), "{name}");
        assert_eq!(config["proxy_plugins"]["slipway"]["type"].as_str(), Some("snapshot"), "{name}");
    }
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
