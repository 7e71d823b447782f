//! How the program behaves towards people and programs: exit codes, streams, progress, completion scripts, manual pages.

#![allow(clippy::unwrap_used, reason = "a test's own set-up")]

mod ground;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};

use ground::{Ground, Run, noise};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use testbed::{Compression, DeadAddress, Entry, Image, Layer, need, require};

fn image() -> Image {
    Image::new().layer(&Layer::new([Entry::file("a", noise(1, 200_000))]), Compression::Gzip)
}

/// The program alone, without a store.
fn program(args: &[&str]) -> Run {
    Command::new(env!("CARGO_BIN_EXE_erofs-convert")).args(args).env_remove("SLIPWAY_STORE").output().unwrap().into()
}

/// The subcommands that `--help` lists.
fn subcommands() -> Vec<String> {
    let help = program(&["--help"]).out;
    let list = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let name = |line: &str| line.strip_prefix("  ").filter(|rest| !rest.starts_with(' ')).map(|rest| rest.split(' ').next().unwrap().to_owned());
    list.lines().filter_map(name).filter(|name| name != "help").collect()
}

/// The codes of the paragraph in `--help`.
fn documented_codes() -> BTreeSet<i32> {
    let help = program(&["--help"]).out;
    let paragraph = help.split("Exit codes:").nth(1).unwrap().split("\n\n").next().unwrap();
    let words = paragraph.split_whitespace().collect::<Vec<_>>();
    // A code follows the colon or a comma.
    let is_code = |i: &usize| *i == 0 || words[i - 1].ends_with(',');
    (0..words.len()).filter(is_code).filter_map(|i| words[i].parse().ok()).collect()
}

/// A registry that answers every request the same way.
fn registry(answer: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    host
}

/// The code after SIGINT while it waits for a registry.
fn interrupted(ground: &Ground) -> i32 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let source = format!("{}/team/app:1", listener.local_addr().unwrap());
    let mut child = ground.command(&["convert", &source]).stderr(Stdio::null()).spawn().unwrap();
    // The handlers are there before it looks for anything.
    let _waiting = listener.accept().unwrap();
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    child.wait().unwrap().code().unwrap_or(-1)
}

#[test]
fn every_documented_exit_code_is_given_by_a_real_command() {
    require!(need::command("strace"));
    let ground = Ground::new("codes");
    let built = ground.layout.add("1", &image()).unwrap();
    let damaged = ground.layout.add("damaged", &Image::new().layer(&Layer::new([Entry::file("b", "x")]), Compression::Gzip)).unwrap();
    let blob = ground.layout.blob(&damaged.layers[0].digest);
    let bytes = fs::read(&blob).unwrap();
    fs::remove_file(&blob).unwrap();
    fs::write(&blob, [&bytes[..bytes.len() - 1], b"?"].concat()).unwrap();
    let refuses = registry("HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    let dead = DeadAddress::new().unwrap();
    let without_openat2 = |args: &[&str]| {
        let mut strace = Command::new("strace");
        strace.args(["-f", "-o", "/dev/null", "-e", "inject=openat2:error=ENOSYS", env!("CARGO_BIN_EXE_erofs-convert")]).args(args);
        let output = strace.arg("--store").arg(ground.store()).output().unwrap();
        output.status.code().unwrap_or(-1)
    };
    let code = |args: &[&str]| ground.run(args).code;
    let found = [
        (0, code(&["convert", "oci:img:1"])),
        (1, code(&["convert", "oci:absent:1"])),
        (2, code(&["convert"])),
        (3, code(&["show", &built.manifest.digest.replace("sha256:", "sha256:0")[..71]])),
        (4, code(&["convert", &format!("{refuses}/team/app:1")])),
        (5, code(&["convert", &format!("{}/team/app:1", dead.host())])),
        (6, code(&["convert", "oci:img:damaged"])),
        (7, without_openat2(&["ls"])),
        (130, interrupted(&ground)),
    ];
    for (expected, found) in found {
        assert_eq!(found, expected);
    }
    assert_eq!(documented_codes(), found.map(|(expected, _)| expected).into(), "as --help has them");
}

#[test]
fn the_completion_scripts_know_every_command() {
    require!(need::command("bash"));
    let ground = Ground::new("completion");
    for shell in ["bash", "zsh", "fish"] {
        let run = program(&["completion", shell]);
        assert_eq!(run.code, 0, "{}", run.err);
        for command in subcommands() {
            assert!(run.out.contains(&command), "{shell}: {command}");
        }
        if shell == "bash" {
            let script = ground.scratch.join("script");
            fs::write(&script, &run.out).unwrap();
            let checked = Command::new("bash").arg("-n").arg(&script).output().unwrap();
            assert!(checked.status.success() && checked.stderr.is_empty(), "{}", String::from_utf8_lossy(&checked.stderr));
        }
    }
}

#[test]
fn the_manual_has_a_page_for_every_command_and_renders_without_warnings() {
    let ground = Ground::new("man");
    let dir = ground.scratch.make_dir("man").unwrap();
    let run = program(&["man", dir.to_str().unwrap()]);
    assert_eq!((run.code, &run.out[..]), (0, ""), "{}", run.err);
    let main = fs::read_to_string(dir.join("erofs-convert.1")).unwrap();
    for command in subcommands() {
        assert!(main.contains(&format!("erofs\\-convert\\-{command}(1)")), "{command} is not in {main}");
        assert!(dir.join(format!("erofs-convert-{command}.1")).is_file(), "{command}");
    }
    assert!(main.contains("130 interrupted"), "{main}");
    require!(need::command("man"));
    for page in fs::read_dir(&dir).unwrap() {
        let page = page.unwrap().path();
        let shown = Command::new("man").args(["--warnings", "-E", "UTF-8", "-l"]).arg(&page).env("MANWIDTH", "80").output().unwrap();
        let warnings = String::from_utf8_lossy(&shown.stderr);
        assert!(shown.status.success() && warnings.is_empty() && !shown.stdout.is_empty(), "{}: {warnings}", page.display());
    }
    program(&["man", ground.scratch.join("absent").to_str().unwrap()]).assert_failed(1, &["absent"]);
}

#[test]
fn results_go_to_stdout_and_the_rest_to_stderr_and_neither_has_escape_codes() {
    let ground = Ground::new("streams");
    ground.layout.add("1", &image()).unwrap();
    let loud = |args: &[&str]| -> Run { ground.command(args).env("SLIPWAY_LOG", "debug").env("CLICOLOR", "1").output().unwrap().into() };
    let json = loud(&["convert", "oci:img:1", "-o", "json"]);
    assert_eq!(json.json()["layers"].as_array().unwrap().len(), 1);
    assert!(json.err.contains("1 layers"), "{}", json.err);
    for args in
        [&["ls"][..], &["ls", "--json"], &["show", "oci:img:1"], &["check", "oci:img:1", "oci:img:1"], &["convert", "oci:img:1"], &["ls", "-h"]]
    {
        let run = loud(args);
        assert_eq!(run.code, 0, "{}", run.err);
        assert!(!run.out.is_empty() && !run.out.contains('\u{1b}') && !run.err.contains('\u{1b}'), "{args:?}: {}{}", run.out, run.err);
    }
    assert_eq!(ground.run(&["ls", "--output", "json"]).json(), ground.run(&["ls", "--json"]).json());
    let by_environment: Run = ground.command(&["ls"]).env("SLIPWAY_OUTPUT", "json").output().unwrap().into();
    assert_eq!(by_environment.json(), ground.run(&["ls", "--json"]).json());
}

/// Every name in a JSON value.
fn names(value: &Value, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => fields.iter().for_each(|(name, value)| {
            into.insert(name.clone());
            names(value, into);
        }),
        Value::Array(values) => values.iter().for_each(|value| names(value, into)),
        _ => {}
    }
}

#[test]
fn progress_is_plain_json_or_nothing_as_asked() {
    let events =
        |run: &Run| run.err.lines().map(|line| serde_json::from_str::<Value>(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect::<Vec<_>>();
    let ground = Ground::new("progress");
    let built = ground.layout.add("1", &image()).unwrap();
    let run = ground.run(&["convert", "oci:img:1", "--progress", "json", "--json"]);
    let mut used = BTreeSet::new();
    let seen = events(&run);
    seen.iter().for_each(|event| names(event, &mut used));
    names(&run.json(), &mut used);
    let layers: Vec<&Value> = seen.iter().filter(|event| event["event"] == "layer").collect();
    let (first, last) = (layers.first().unwrap(), layers.last().unwrap());
    assert_eq!((&first["state"], &first["done"], &first["layer"], &first["layers"]), (&"started".into(), &0.into(), &1.into(), &1.into()));
    assert_eq!((&last["state"], &last["done"]), (&"done".into(), &last["size"]));
    assert_eq!(last["digest"], built.layers[0].digest);
    for args in [&["show", "oci:img:1", "--json"][..], &["ls", "--json"], &["check", "oci:img:1", "oci:img:1", "--json", "-q"]] {
        names(&ground.run(args).json(), &mut used);
    }
    for name in used {
        assert!(name.chars().all(char::is_alphanumeric) && name.starts_with(char::is_lowercase), "{name} is not camelCase");
    }

    let failed = ground.run(&["--progress", "json", "show", "other:1"]);
    let error = &events(&failed)[0];
    assert_eq!((&error["event"], &error["exitCode"], failed.code), (&"error".into(), &3.into(), 3), "{error}");
    assert!(error["message"].as_str().unwrap().contains("other:1"), "{error}");

    let plain = ground.run(&["check", "oci:img:1", "oci:img:1", "--progress", "plain"]).err;
    assert!(plain.contains("layer 1/1 ") && plain.contains("comparing"), "{plain}");
    for silent in [&["--progress", "none"][..], &["-q"]] {
        let run = ground.run(&[&["check", "oci:img:1", "oci:img:1"], silent].concat());
        assert_eq!((run.code, &run.err[..]), (0, ""));
        assert!(run.out.contains("0 differences"), "{}", run.out);
        ground.run(&[&["show", "other:1"], silent].concat()).assert_failed(3, &["other:1"]);
    }
}
