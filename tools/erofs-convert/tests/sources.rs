//! Images from everywhere: registries behind passwords, TLS and mirrors, archives of skopeo and Docker, indexes of many platforms.

#![allow(clippy::unwrap_used, reason = "a test's own set-up")]

mod ground;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use ground::{Ground, Run, everything, everything_layers};
use serde_json::{Value, json};
use testbed::{Compression, DeadAddress, Entry, Guard, Image, Layer, PASSWORD, Registry, TestCa, USER, need, require, run};

/// An image of one small layer.
fn small(content: &str) -> Image {
    Image::new().layer(&Layer::new([Entry::file("a", content)]), Compression::Gzip)
}

/// A Docker configuration in `dir` that has a login for `host`.
fn docker_config(dir: &Path, host: &str, password: &str) -> PathBuf {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("config.json"), json!({"auths": {host: {"username": USER, "password": password}}}).to_string()).unwrap();
    dir.to_owned()
}

/// A directory of hosts.toml files with one for `registry`.
fn hosts_dir(ground: &Ground, registry: &str, text: &str) -> String {
    let dir = ground.scratch.join("certs.d");
    let at = dir.join(format!("{}_", registry.replace(':', "_")));
    fs::create_dir_all(&at).unwrap();
    fs::write(at.join("hosts.toml"), text).unwrap();
    dir.display().to_string()
}

fn assert_done(run: &Run) -> Value {
    assert_eq!(run.code, 0, "{}", run.err);
    run.json()
}

#[test]
fn a_registry_behind_tls_and_a_password_is_read_with_the_login_of_docker() {
    require!(need::command("docker-registry"), need::command("skopeo"), need::command("openssl"));
    let ground = Ground::new("login");
    let ca = TestCa::new(&ground.scratch.join("ca")).unwrap();
    let registry = Registry::start_behind(&ground.scratch.join("registry"), Guard { password: true, tls: Some(&ca) }).unwrap();
    let built = ground.layout.add("1", &everything()).unwrap();
    let reference = registry.reference("team/app:1");
    ground.layout.push("1", &reference).unwrap();
    let ca_file = ca.ca().display().to_string();
    let convert = |config: &Path, more: &[&str]| -> Run {
        let args = [&["convert", &reference, "--json"], more].concat();
        ground.command(&args).env("DOCKER_CONFIG", config).env("SLIPWAY_LOG", "trace").output().unwrap().into()
    };
    let right = docker_config(&ground.scratch.join("right"), registry.host(), PASSWORD);
    let wrong = docker_config(&ground.scratch.join("wrong"), registry.host(), "hunter2");
    let nobody = ground.scratch.join("nobody");

    let login = format!("docker login {}", registry.host());
    convert(&nobody, &["--ca", &ca_file]).assert_failed(4, &["refuses manifest 1 of team/app", "no login for", "nobody/config.json", &login]);
    let refused = convert(&wrong, &["--ca", &ca_file]);
    refused.assert_failed(4, &[registry.host(), "\"someone\"", "wrong/config.json", &login]);
    assert!(!refused.err.contains("hunter2") && !refused.err.contains("c29tZW9uZ"), "{}", refused.err);
    // Without the CA nothing is believed; named explicitly, HTTPS is spoken on loopback too.
    let hosts = hosts_dir(&ground, registry.host(), &format!("server = \"https://{}\"", registry.host()));
    convert(&right, &["--hosts-dir", &hosts]).assert_failed(5, &[registry.host(), "certificate"]);
    convert(&right, &["--ca", &ground.scratch.join("absent.pem").display().to_string()]).assert_failed(1, &["absent.pem"]);
    ground.assert_nothing_made();

    let done = convert(&right, &["--ca", &ca_file]);
    assert_eq!(assert_done(&done)["chain"], built.top_chain());
    assert!(!done.err.contains(PASSWORD) && !done.err.contains("c29tZW9uZ"), "the log shows the login");
    // The same through containerd's file, with the path relative to it.
    fs::copy(ca.ca(), ground.scratch.join("certs.d").join(format!("{}_/ca.pem", registry.host().replace(':', "_")))).unwrap();
    let hosts = hosts_dir(&ground, registry.host(), "ca = \"ca.pem\"");
    assert_done(&convert(&right, &["--hosts-dir", &hosts]));
    let check = ground.command(&["check", &reference, &reference, "--hosts-dir", &hosts]).env("DOCKER_CONFIG", &right).output().unwrap();
    assert_eq!(Run::from(check).code, 0);
}

#[test]
fn a_credential_helper_is_run_once_when_it_is_needed() {
    require!(need::command("docker-registry"), need::command("skopeo"));
    let ground = Ground::new("credential-program");
    let registry = Registry::start_behind(&ground.scratch.join("registry"), Guard { password: true, tls: None }).unwrap();
    let reference = registry.reference("team/app:1");
    ground.layout.add("1", &everything()).unwrap();
    ground.layout.push("1", &reference).unwrap();
    let (bin, log) = (ground.scratch.make_dir("bin").unwrap(), ground.scratch.join("log"));
    let program = bin.join("docker-credential-test");
    let answer = json!({"Username": USER, "Secret": PASSWORD});
    fs::write(&program, format!("#!/bin/sh\nread server\necho \"$1 $server\" >>'{}'\necho '{answer}'\n", log.display())).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(ground.scratch.make_dir("docker").unwrap().join("config.json"), json!({"credsStore": "test"}).to_string()).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let convert = |source: &str| -> Run {
        let mut command = ground.command(&["convert", source, "--json"]);
        command.env("PATH", &path).env("DOCKER_CONFIG", ground.scratch.join("docker")).output().unwrap().into()
    };
    assert_done(&convert("oci:img:1"));
    assert!(!log.exists(), "nobody asked who we are");
    assert_done(&convert(&reference));
    assert_eq!(fs::read_to_string(&log).unwrap(), format!("get {}\n", registry.host()));
    fs::write(&program, "#!/bin/sh\necho the keychain is locked >&2\nexit 7\n").unwrap();
    convert(&reference).assert_failed(4, &["docker-credential-test", "docker/config.json", "the keychain is locked"]);
}

#[test]
fn mirrors_give_what_the_registry_has_not() {
    require!(need::command("docker-registry"), need::command("skopeo"));
    let ground = Ground::new("mirrors");
    let start = |name: &str| Registry::start(&ground.scratch.join(name)).unwrap();
    let (dead, empty, mut full, mut origin) = (DeadAddress::new().unwrap(), start("empty"), start("full"), start("origin"));
    let built = ground.layout.add("1", &everything()).unwrap();
    ground.layout.push("1", &full.reference("team/app:1")).unwrap();
    let mirrors = |capabilities: &str| {
        let table = |host: &str| format!("[host.\"http://{host}\"]\ncapabilities = {capabilities}\ndial_timeout = \"2s\"\n");
        [&dead.host(), empty.host(), full.host()].map(table).concat()
    };
    let hosts = hosts_dir(&ground, origin.host(), &mirrors("[\"pull\"]"));
    let reference = origin.reference("team/app:1");
    let convert = |reference: &str| ground.run(&["convert", reference, "--json", "--hosts-dir", &hosts]);
    // Only the registry may resolve a tag, and it has none.
    convert(&reference).assert_failed(3, &[origin.host(), "has no manifest 1"]);
    let pinned = format!("{}@{}", origin.reference("team/app"), built.manifest.digest);
    let mark = full.mark();
    assert_eq!(assert_done(&convert(&pinned))["chain"], built.top_chain());
    assert!(built.layers.iter().all(|layer| full.blob_bytes(mark).contains_key(&layer.digest)));
    // With the registry gone, mirrors that may resolve do.
    origin.stop().unwrap();
    hosts_dir(&ground, origin.host(), &mirrors("[\"pull\", \"resolve\"]"));
    assert_eq!(assert_done(&convert(&reference))["manifest"], built.manifest.digest);
    full.stop().unwrap();
    let all = [&dead.host(), empty.host(), full.host(), origin.host()].map(|host| format!("\n  {host}: "));
    convert(&reference).assert_failed(5, &all.each_ref().map(String::as_str));
    let mistake = hosts_dir(&ground, origin.host(), "\ncapabilities = [\"fetch\"]\n");
    ground.run(&["convert", &reference, "--hosts-dir", &mistake]).assert_failed(1, &["hosts.toml, line 2", "\"fetch\""]);
}

#[test]
fn archives_of_skopeo_become_the_same_image_as_the_layout_they_are_of() {
    require!(need::command("skopeo"));
    let (ground, from_docker, from_oci) = (Ground::new("archives"), Ground::new("docker-archive"), Ground::new("oci-archive"));
    // Docker's manifests, through which skopeo goes, know no zstd.
    let image = everything_layers().iter().fold(Image::new(), |image, layer| image.layer(layer, Compression::Gzip));
    let built = ground.layout.add("1", &image).unwrap();
    let expected = ground.convert("oci:img:1");
    let (layout, docker, oci) = (ground.layout.path().display(), ground.scratch.join("d.tar"), ground.scratch.join("o.tar"));
    let (docker, oci) = (docker.display(), oci.display());
    for to in [format!("docker-archive:{docker}:app:1"), format!("oci-archive:{oci}:1")] {
        run("skopeo", ["--insecure-policy", "copy", "--quiet", &format!("oci:{layout}:1"), &to]).unwrap();
    }
    for (ground, source) in [(&from_docker, format!("docker-archive:{docker}")), (&from_oci, format!("oci-archive:{oci}:1"))] {
        let done = ground.convert(&source);
        assert_eq!((&done["chain"], &done["metadata"]), (&expected["chain"], &expected["metadata"]), "{source}");
        assert_eq!(done["source"], *source);
        let check = ground.run(&["check", &source, &source, "--json"]);
        assert_eq!(check.code, 0, "{}", check.err);
        assert_eq!(check.json()["differences"], 0);
        // The digest of a manifest that is not there is still always the same.
        assert_eq!(ground.convert(&source)["manifest"], done["manifest"]);
    }
    assert_eq!(from_oci.convert(&format!("oci-archive:{oci}"))["manifest"], built.manifest.digest);
    for (source, code, parts) in [
        (format!("docker-archive:{docker}:docker.io/library/app:1"), 0, &[][..]),
        (format!("docker-archive:{docker}:@0"), 0, &[]),
        (format!("docker-archive:{docker}:app:2"), 3, &["docker.io/library/app:2", "@0 docker.io/library/app:1"]),
        (format!("docker-archive:{docker}:@1"), 3, &["@1"]),
        (format!("docker-archive:{oci}"), 1, &["no manifest.json", "oci-archive:"]),
        (format!("oci-archive:{docker}"), 1, &["docker-archive:"]),
        (format!("oci-archive:{oci}:2"), 3, &["tag 2", "it has: 1"]),
        (format!("docker-archive:{docker}x"), 1, &["d.tarx", "No such file"]),
    ] {
        let run = from_docker.run(&["convert", &source]);
        assert_eq!(run.code, code, "{source}: {}", run.err);
        assert!(parts.iter().all(|part| run.err.contains(part)), "{source}: {}", run.err);
    }
    run("gzip", ["-k", &docker.to_string()]).unwrap();
    from_docker.run(&["convert", &format!("docker-archive:{docker}.gz")]).assert_failed(1, &["decompress it first", "gzip -dk"]);
}

#[test]
fn archives_that_are_layouts_with_a_manifest_json_are_read_either_way() {
    require!(need::command("tar"));
    let ground = Ground::new("docker-25");
    let (one, two) = (ground.layout.add("1", &everything()).unwrap(), ground.layout.add("2", &small("two")).unwrap());
    let blob = |digest: &str| format!("blobs/{}", digest.replace(':', "/"));
    let listed = |image: &testbed::BuiltImage, tag: &str| {
        let layers: Vec<String> = image.layers.iter().map(|layer| blob(&layer.digest)).collect();
        json!({"Config": blob(&image.config.digest), "RepoTags": [tag], "Layers": layers})
    };
    fs::write(ground.layout.path().join("manifest.json"), json!([listed(&one, "app:1"), listed(&two, "app:2")]).to_string()).unwrap();
    let file = ground.scratch.join("saved.tar").display().to_string();
    run("tar", ["-cf", &file, "-C", &ground.layout.path().display().to_string(), "."]).unwrap();
    for (source, chain) in [
        (format!("docker-archive:{file}:app:1"), one.top_chain()),
        (format!("docker-archive:{file}:@1"), two.top_chain()),
        (format!("oci-archive:{file}:2"), two.top_chain()),
    ] {
        assert_eq!(ground.convert(&source)["chain"], chain, "{source}");
    }
    ground.run(&["convert", &format!("docker-archive:{file}")]).assert_failed(2, &["@0 app:1, @1 app:2"]);
    // A blob that is not what its name says.
    let path = ground.layout.blob(&two.layers[0].digest);
    let mut bytes = fs::read(&path).unwrap();
    bytes.reverse();
    fs::write(&path, bytes).unwrap();
    run("tar", ["-cf", &file, "-C", &ground.layout.path().display().to_string(), "."]).unwrap();
    fs::remove_dir_all(ground.store()).unwrap();
    fs::create_dir(ground.store()).unwrap();
    ground.run(&["convert", &format!("docker-archive:{file}:app:2")]).assert_failed(6, &["is damaged"]);
    // Cut short in a layer.
    let cut = fs::read(&file).unwrap();
    fs::write(&file, &cut[..cut.len() / 2]).unwrap();
    ground.run(&["convert", &format!("docker-archive:{file}:app:1")]).assert_failed(1, &["saved.tar", "cut short"]);
}

/// Adds entries to the index under tag 1 of the ground's layout.
fn extend_index(ground: &Ground, entries: &[Value]) {
    let path = ground.layout.path().join("index.json");
    let mut top: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let mut index: Value = serde_json::from_slice(&fs::read(ground.layout.blob(top["manifests"][0]["digest"].as_str().unwrap())).unwrap()).unwrap();
    index["manifests"].as_array_mut().unwrap().extend_from_slice(entries);
    let bytes = index.to_string().into_bytes();
    let hex: String = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &bytes).as_ref().iter().map(|b| format!("{b:02x}")).collect();
    let digest = format!("sha256:{hex}");
    top["manifests"][0]["size"] = json!(bytes.len());
    top["manifests"][0]["digest"] = json!(digest);
    fs::write(ground.layout.blob(&digest), bytes).unwrap();
    fs::write(path, top.to_string()).unwrap();
}

#[test]
fn all_linux_platforms_are_converted_and_nothing_else() {
    let ground = Ground::new("platforms");
    let images = ["amd64", "arm64"].map(|architecture| small(architecture).architecture(architecture));
    let built = ground.layout.add_index("1", &images).unwrap();
    let entry = |platform: Value, annotations: Value| {
        let digest = format!("sha256:{}", "0".repeat(64));
        json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": 1, "platform": platform, "annotations": annotations})
    };
    // None of these has a manifest: to look would be to fail.
    let attestation = entry(json!({"os": "unknown", "architecture": "unknown"}), json!({"vnd.docker.reference.type": "attestation-manifest"}));
    let windows = entry(json!({"os": "windows", "architecture": "amd64"}), json!({}));
    extend_index(&ground, &[attestation, windows]);
    let done = assert_done(&ground.run(&["convert", "oci:img:1", "--all-platforms", "--json"]));
    let done = done.as_array().unwrap();
    let of = |key: &str| done.iter().map(|one| one[key].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(of("platform"), ["linux/amd64", "linux/arm64"]);
    assert_eq!(of("chain"), built.iter().map(|image| image.top_chain().to_owned()).collect::<Vec<_>>());
    assert_eq!(ground.listed().len(), 2);
    let text = ground.run(&["convert", "oci:img:1", "--all-platforms"]).out;
    assert!(text.contains("img:1 (linux/amd64)\n") && text.contains("img:1 (linux/arm64)\n"), "{text}");

    // A platform that cannot be converted: the others are, and the command fails.
    extend_index(&ground, &[entry(json!({"os": "linux", "architecture": "s390x"}), json!({}))]);
    fs::remove_dir_all(ground.store()).unwrap();
    fs::create_dir(ground.store()).unwrap();
    let run = ground.run(&["convert", "oci:img:1", "--all-platforms", "--json"]);
    assert_eq!(run.code, 1, "{}", run.err);
    assert!(run.err.contains("1 of 3 platforms failed (linux/s390x)"), "{}", run.err);
    let json = run.json();
    assert_eq!(json[2]["platform"], "linux/s390x");
    assert!(json[2]["error"].as_str().unwrap().contains("blobs/sha256/0000"), "{json}");
    assert_eq!(ground.listed().len(), 2);
}

#[test]
fn an_index_of_more_than_anybody_builds_is_refused_before_anything_is_read() {
    let ground = Ground::new("many-platforms");
    ground.layout.add_index("1", &[small("amd64")]).unwrap();
    let entry = |number: usize| {
        // None of these has a manifest: to look would be to fail in another way.
        let platform = json!({"os": "linux", "architecture": format!("made-up-{number}")});
        json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": format!("sha256:{number:064}"), "size": 1, "platform": platform})
    };
    extend_index(&ground, &(0..100).map(entry).collect::<Vec<_>>());
    let run = ground.run(&["convert", "oci:img:1", "--all-platforms"]);
    run.assert_failed(1, &["img:1", "more than 100 images", "--platform"]);
    ground.assert_nothing_made();
}

#[test]
fn an_image_or_index_that_is_named_often_is_taken_once() {
    let ground = Ground::new("named-often");
    ground.layout.add_index("1", &[small("amd64").architecture("amd64")]).unwrap();
    let path = ground.layout.path().join("index.json");
    let inner: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let inner = inner["manifests"][0].clone();
    let entries = |ground: &Ground| {
        let top: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let index = fs::read(ground.layout.blob(top["manifests"][0]["digest"].as_str().unwrap())).unwrap();
        serde_json::from_slice::<Value>(&index).unwrap()["manifests"].clone()
    };
    let image = entries(&ground)[0].clone();
    let index = json!({"mediaType": "application/vnd.oci.image.index.v1+json", "digest": inner["digest"], "size": inner["size"]});
    extend_index(&ground, &[vec![index; 200], vec![image; 200]].concat());
    let done = assert_done(&ground.run(&["convert", "oci:img:1", "--all-platforms", "--json"]));
    assert_eq!((done.as_array().unwrap().len(), &done[0]["platform"]), (1, &json!("linux/amd64")));
}

#[test]
fn an_image_without_an_index_is_one_platform() {
    let ground = Ground::new("one-platform");
    let built = ground.layout.add("1", &small("x").architecture("riscv64")).unwrap();
    let done = assert_done(&ground.run(&["convert", "oci:img:1", "--all-platforms", "--json"]));
    assert_eq!((done.as_array().unwrap().len(), &done[0]["platform"], &done[0]["chain"]), (1, &json!("linux/riscv64"), &json!(built.top_chain())));
}
