//! Conversions that are stopped half way: nothing is visible, nothing is left behind, and the next run goes on from there.

#![allow(clippy::unwrap_used, reason = "a test's own set-up")]

mod ground;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use ground::{Ground, files_below, noise};
use rustix::process::{Pid, Signal, kill_process};
use testbed::{BuiltImage, Compression, Entry, Image, Layer};

/// A registry of one image one layer of which stops half way until the gate opens.
struct Registry {
    host: String,
    open: Arc<(Mutex<bool>, Condvar)>,
    done: Arc<AtomicBool>,
}

impl Registry {
    fn start(ground: &Ground, built: &BuiltImage, slow: usize) -> Registry {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let open = Arc::new((Mutex::new(false), Condvar::new()));
        let done = Arc::new(AtomicBool::new(false));
        let blobs: PathBuf = ground.layout.path().join("blobs/sha256");
        let (manifest, slow) = (built.manifest.digest.clone(), built.layers[slow].digest.clone());
        let (gate, stop) = (open.clone(), done.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let (blobs, manifest, slow, gate) = (blobs.clone(), manifest.clone(), slow.clone(), gate.clone());
                thread::spawn(move || answer(stream.unwrap(), &blobs, &manifest, &slow, &gate));
            }
        });
        Registry { host, open, done }
    }

    fn open_gate(&self) {
        *self.open.0.lock().unwrap() = true;
        self.open.1.notify_all();
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.done.store(true, Ordering::SeqCst);
        self.open_gate();
        // Wakes the accept loop.
        let _ = TcpStream::connect(&self.host);
    }
}

fn answer(mut stream: TcpStream, blobs: &std::path::Path, manifest: &str, slow: &str, gate: &(Mutex<bool>, Condvar)) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut request = String::new();
    while reader.read_line(&mut request).is_ok_and(|len| len > 2) {}
    let Some(path) = request.split(' ').nth(1) else { return };
    let name = path.rsplit('/').next().unwrap();
    let digest = if name.starts_with("sha256:") { name } else { manifest };
    let body = fs::read(blobs.join(digest.strip_prefix("sha256:").unwrap())).unwrap();
    let kind = if digest == manifest { "application/vnd.oci.image.manifest.v1+json" } else { "application/octet-stream" };
    let head = format!("HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    let (first, rest) = body.split_at(if digest == slow { body.len() / 2 } else { body.len() });
    // The client may be killed at any time.
    if stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(first)).is_err() {
        return;
    }
    if !rest.is_empty() {
        let opened = gate.1.wait_while(gate.0.lock().unwrap(), |open| !*open).unwrap();
        drop(opened);
        let _ = stream.write_all(rest);
    }
}

/// A conversion of two layers that has finished the first and waits in the middle of the second, with a pack begun.
struct HalfWay {
    ground: Ground,
    registry: Registry,
    source: String,
    child: Child,
    stderr: BufReader<std::process::ChildStderr>,
}

fn half_way(label: &str) -> HalfWay {
    let ground = Ground::new(label);
    let lower = Layer::new([Entry::file("lower", noise(1, 900_000))]);
    let upper = Layer::new((0..20).map(|i| Entry::file(&format!("upper-{i}"), noise(i + 2, 700_000))));
    let image = Image::new().layer(&lower, Compression::Gzip).layer(&upper, Compression::Gzip);
    let built = ground.layout.add("1", &image).unwrap();
    let registry = Registry::start(&ground, &built, 1);
    let source = format!("{}/app:1", registry.host);
    let mut child = ground.command(&["convert", &source, "-j", "2"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    // The first layer is in the store when the program says so.
    let mut line = String::new();
    while !line.contains("layer 1/2") || !line.contains("done") {
        line.clear();
        assert_ne!(stderr.read_line(&mut line).unwrap(), 0, "the program ended early");
    }
    // The second has begun to write when a temporary file has grown.
    let tmp = ground.store().join("tmp");
    let grown = || fs::read_dir(&tmp).unwrap().flatten().any(|entry| entry.metadata().is_ok_and(|meta| meta.len() > 0));
    while !grown() {
        assert!(child.try_wait().unwrap().is_none(), "the program ended early");
        thread::yield_now();
    }
    HalfWay { ground, registry, source, child, stderr }
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_raw(child.id().try_into().unwrap()).unwrap(), signal).unwrap();
}

/// After the interruption: nothing is visible; a second run reuses the first layer, leaves no temporary file, and is right.
fn assert_goes_on(ground: &Ground, registry: &Registry, source: &str) {
    assert_eq!(ground.listed(), [""; 0]);
    for dir in ["chains", "images", "meta"] {
        assert_eq!(files_below(&ground.store().join(dir)).len(), 0, "{dir}");
    }
    registry.open_gate();
    let done = ground.convert(source);
    assert_eq!(done["layers"][0]["reused"], true);
    assert_eq!(done["layers"][1]["reused"], false);
    assert_eq!(files_below(&ground.store().join("tmp")).len(), 0);
    assert_eq!(ground.listed(), [source]);
    let check = ground.run(&["check", source, "oci:img:1", "--json"]);
    assert_eq!(check.code, 0, "{}{}", check.out, check.err);
}

#[test]
fn a_killed_conversion_leaves_nothing_visible_and_goes_on_later() {
    let HalfWay { ground, registry, source, mut child, .. } = half_way("killed");
    signal(&child, Signal::KILL);
    child.wait().unwrap();
    assert_ne!(files_below(&ground.store().join("tmp")).len(), 0, "a killed program cannot clean up");
    assert_goes_on(&ground, &registry, &source);
}

#[test]
fn signals_end_a_conversion_cleanly() {
    for which in [Signal::INT, Signal::TERM] {
        let HalfWay { ground, registry, source, mut child, mut stderr } = half_way("signalled");
        signal(&child, which);
        assert_eq!(child.wait().unwrap().code(), Some(130));
        let mut message = String::new();
        stderr.read_to_string(&mut message).unwrap();
        assert!(message.contains("run it again"), "{message}");
        assert_eq!(files_below(&ground.store().join("tmp")).len(), 0, "temporary files are removed");
        assert_goes_on(&ground, &registry, &source);
    }
}

#[test]
fn another_conversion_s_temporary_files_are_left_alone() {
    let HalfWay { ground, registry, source, mut child, .. } = half_way("beside");
    let before = files_below(&ground.store().join("tmp"));
    // The same state directory, the same store, at the same time.
    ground.layout.add("other", &Image::new().layer(&Layer::new([Entry::file("x", "x")]), Compression::Plain)).unwrap();
    ground.convert("oci:img:other");
    assert_eq!(files_below(&ground.store().join("tmp")), before);
    registry.open_gate();
    assert!(child.wait().unwrap().success());
    assert_eq!(ground.listed().len(), 2);
    assert!(ground.listed().contains(&source));
}

/// A layer that is done before one below it waits for that, as temporary files. What it has in common with the layer below is not known before.
#[test]
fn a_layer_that_waited_for_a_lower_one_is_converted_again_after_a_kill() {
    let entries = |from: u64, to: u64| (from..to).map(|i| Entry::file(&format!("file-{i}"), noise(i, 700_000)));
    let (lower, upper) = (Layer::new(entries(1, 20)), Layer::new(entries(10, 24)));
    let image = Image::new().layer(&lower, Compression::Gzip).layer(&upper, Compression::Gzip);
    let convert = |label: &str, image: &Image| {
        let ground = Ground::new(label);
        ground.layout.add("1", image).unwrap();
        ground.convert("oci:img:1");
        ground
    };
    let packs = |ground: &Ground| files_below(&ground.store().join("packs"));
    let (undisturbed, upper_alone) = (convert("undisturbed", &image), convert("upper", &Image::new().layer(&upper, Compression::Plain)));
    let waits = fs::metadata(upper_alone.store().join("packs").join(packs(&upper_alone).first().unwrap())).unwrap().len();

    let ground = Ground::new("waited");
    let built = ground.layout.add("1", &image).unwrap();
    let registry = Registry::start(&ground, &built, 0);
    let source = format!("{}/app:1", registry.host);
    let mut child = ground.command(&["convert", &source, "-j", "2"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let tmp = ground.store().join("tmp");
    let is_whole = |entry: fs::DirEntry| entry.metadata().is_ok_and(|meta| meta.len() == waits);
    while !fs::read_dir(&tmp).is_ok_and(|entries| entries.flatten().any(is_whole)) {
        assert!(child.try_wait().unwrap().is_none(), "the program ended early");
        thread::yield_now();
    }
    assert_eq!(packs(&ground).len(), 0, "it waits");
    signal(&child, Signal::KILL);
    child.wait().unwrap();
    registry.open_gate();
    let done = ground.convert(&source);
    assert_eq!((&done["layers"][0]["reused"], &done["layers"][1]["reused"]), (&false.into(), &false.into()));
    assert_eq!(files_below(&tmp).len(), 0);
    assert_eq!(packs(&ground), packs(&undisturbed), "as if nothing had happened");
    let check = ground.run(&["check", &source, "oci:img:1", "--json"]);
    assert_eq!(check.code, 0, "{}{}", check.out, check.err);
}
