//! What a conversion may take: memory by the number of inodes, metadata by the same, temporary disk by what is under way. Seen from outside, of the
//! real program.

#![allow(clippy::unwrap_used, reason = "a test's own set-up")]

mod ground;

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::thread::sleep;
use std::time::Duration;

use ground::{Ground, files_below, noise};
use serde_json::Value;
use testbed::{Compression, Entry, Image, Layer};

/// Resident memory: so much, and so much per inode.
const MEMORY: u64 = 150_000_000;
const MEMORY_PER_INODE: u64 = 200;
/// Metadata image, without names and extended attributes.
const METADATA_PER_INODE: u64 = 140;

/// How often the running program is looked at: often enough that a second of conversion is seen a hundred times.
const LOOK: Duration = Duration::from_millis(10);

/// The most that was seen of a conversion.
struct Seen {
    done: Value,
    memory: u64,
    /// Bytes in the store's `tmp/`.
    temporary: u64,
    looks: usize,
}

fn watched(ground: &Ground, args: &[&str]) -> Seen {
    let temporaries = ground.scratch.make_dir("temporaries").unwrap();
    let mut command = ground.command(args);
    let mut child = command.env("TMPDIR", &temporaries).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut seen = Seen { done: Value::Null, memory: 0, temporary: 0, looks: 0 };
    while child.try_wait().unwrap().is_none() {
        seen.memory = seen.memory.max(peak_memory(child.id()));
        seen.temporary = seen.temporary.max(bytes_below(&ground.store().join("tmp")));
        assert!(files_below(&temporaries).is_empty(), "temporary files belong into the store's tmp/");
        seen.looks += 1;
        sleep(LOOK);
    }
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    seen.done = serde_json::from_slice(&output.stdout).unwrap();
    // The kernel's own figure, asked for at the end: what came between two looks is in it.
    seen.memory = seen.memory.max(seen.done["peakMemory"].as_u64().unwrap());
    seen
}

/// `VmHWM` of proc_pid_status(5); none once the process has ended.
fn peak_memory(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) << 10
}

/// Bytes of the files in a directory, as they are now.
fn bytes_below(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.len()).sum()
}

fn assert_memory(seen: &Seen, inodes: u64) {
    let limit = MEMORY + MEMORY_PER_INODE * inodes;
    assert!(seen.memory <= limit, "{} bytes were resident, {limit} are allowed for {inodes} inodes", seen.memory);
}

#[test]
fn memory_and_metadata_stay_within_what_an_inode_may_cost() {
    const FILES: usize = 200_000;
    const PER_DIR: usize = 100;
    let ground = Ground::new("limits-inodes");
    let mut names = 0;
    let mut entries = Vec::with_capacity(FILES + FILES / PER_DIR);
    for number in 0..FILES {
        if number % PER_DIR == 0 {
            let dir = format!("package-{:05}", number / PER_DIR);
            names += dir.len() as u64;
            entries.push(Entry::dir(&dir));
        }
        let name = format!("module_{number:06}.py");
        names += name.len() as u64;
        let path = format!("package-{:05}/{name}", number / PER_DIR);
        // Times as installed files have them: the larger form of inode.
        let (seconds, nanoseconds) = (1_700_000_000 + number as i64, number as u32);
        entries.push(match number % 20 {
            0 => Entry::symlink(&path, "module.py"),
            _ => Entry::file(&path, noise(number as u64, 300 + number % 200)).mtime(seconds, nanoseconds),
        });
    }
    ground.layout.add("1", &Image::new().layer(&Layer::new(entries), Compression::Gzip)).unwrap();
    let seen = watched(&ground, &["convert", "oci:img:1", "--json"]);
    let inodes = seen.done["sizes"]["inodes"].as_u64().unwrap();
    assert_eq!(inodes as usize, FILES + FILES / PER_DIR + 1);
    let metadata = seen.done["sizes"]["metadata"].as_u64().unwrap();
    eprintln!("{} bytes resident, {:.1} bytes of metadata per inode", seen.memory, (metadata - names) as f64 / inodes as f64);
    assert!(metadata <= names + METADATA_PER_INODE * inodes, "{metadata} bytes of metadata for {inodes} inodes with {names} bytes of names");
    assert_memory(&seen, inodes);
}

#[test]
fn no_more_is_temporary_than_the_packs_of_the_layers_under_way() {
    const LAYERS: usize = 5;
    const LAYER: usize = 24 << 20;
    /// What a pack has beside its units, and other small files under way.
    const REST: u64 = 1 << 20;
    let ground = Ground::new("limits-disk");
    let layer = |number: usize| Layer::new((0..3).map(move |i| Entry::file(&format!("{number}-{i}"), noise((number * 3 + i) as u64, LAYER / 3))));
    let image = (0..LAYERS).fold(Image::new(), |image, number| image.layer(&layer(number), Compression::Plain));
    ground.layout.add("1", &image).unwrap();
    for jobs in [1, 2] {
        let seen = watched(&ground, &["convert", "oci:img:1", "--json", "--jobs", &jobs.to_string()]);
        let limit = jobs * (LAYER as u64 + REST);
        assert!(seen.looks > 10 && seen.temporary > LAYER as u64 / 4, "the test looks too seldom: {} times, {} bytes", seen.looks, seen.temporary);
        assert!(seen.temporary <= limit, "{} bytes were temporary, {limit} are allowed with {jobs} layers at once", seen.temporary);
        assert_eq!(bytes_below(&ground.store().join("tmp")), 0);
        assert_memory(&seen, LAYERS as u64 * 3 + 1);
        fs::remove_dir_all(ground.store()).unwrap();
        fs::remove_dir_all(ground.scratch.join("state")).unwrap();
        ground.scratch.make_dir("store").unwrap();
    }
}
