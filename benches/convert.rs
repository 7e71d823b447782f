//! What a conversion costs, stage by stage, beside what the same image costs others: `cargo bench --bench convert [-- DIR|GB]`.
//!
//! The image is the demo's with more layers on top (3 GB compressed, or GB), or whatever layers DIR has (`NN-name.tar.gz` with `.diffid` and
//! `.size`). It lies in a real registry on loopback, nothing of it in the page cache. In the same run containerd pulls and unpacks it, and
//! mkfs.erofs makes file systems of its layers.
//!
//! The floor is what the stages that nobody can leave out take by themselves, each done by the best program for it, spread evenly over the
//! processors: inflating (ISA-L's igzip), SHA-256 of blobs and tars (openssl), BLAKE3 and zstd of what is stored. Fetching and writing are
//! not in it.
//!
//! Needs root, the binaries of the release profile, igzip and openssl (`make bench` has all of it). Judge on a quiet machine.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use erofs::block::UnitBits;
use erofs::digest::Digest;
use rustix::time::{ClockId, clock_gettime};
use serde_json::Value;
use slipway_demo::image::DemoImage;
use slipway_demo::report::bytes;
use testbed::{Containerd, Converter, Registry, Scratch, Snapshotter, drop_caches};

const GIGABYTES: &str = "3";
/// erofs-convert's.
const ZSTD_LEVEL: i32 = 1;
const GOAL_FLOOR: f64 = 1.35;
const GOAL_CONTAINERD: f64 = 2.5;

fn main() -> Result<()> {
    let wanted = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_else(|| GIGABYTES.to_owned());
    let dir = if wanted.parse::<f64>().is_ok() { script("tools/demo/image/larger.sh", &[&wanted])? } else { PathBuf::from(wanted) };
    let image = DemoImage::open(&dir)?;
    let processors = available_parallelism()?.get();
    let sizes = (bytes(image.compressed()), bytes(image.uncompressed()));
    println!("\n{} layers, {} compressed, {} uncompressed; {processors} processors", image.layers.len(), sizes.0, sizes.1);

    let floor = Floor::measure(&image)?;
    let scratch = Scratch::new("bench")?;
    let registry = Registry::start(&scratch.join("registry"))?;
    let reference = registry.reference("bench/large:1");
    image.push(&scratch.join("layout"), &reference)?;
    fs::remove_dir_all(scratch.join("layout"))?;

    let (ours, report) = convert(&scratch, &reference)?;
    show_stages(&report["processorSeconds"], &floor);
    println!("\n  {:<44}{:>10}{:>12}{:>14}{:>14}", "from the registry to disk", "seconds", "processor", "peak memory", "written");
    ours.show("erofs-convert, all digests checked, fsynced");
    let containerd = pull(&scratch, &reference)?;
    containerd.show("containerd pull, overlayfs, not fsynced");
    mkfs(&scratch, &registry, "bench/large:1", &image)?.show("skopeo copy, then mkfs.erofs --tar");

    let least = floor.all() / processors as f64;
    println!("\n  {:<44}{least:>10.1}", "the floor: its processor seconds / processors");
    let verdict = |goal: bool| if goal { "reached" } else { "missed" };
    let (over, faster) = (ours.seconds / least, containerd.seconds / ours.seconds);
    println!("  {:<44}{over:>10.2} ×, goal at most {GOAL_FLOOR} ×: {}", "erofs-convert / floor", verdict(over <= GOAL_FLOOR));
    println!("  {:<44}{faster:>10.2} ×, goal at least {GOAL_CONTAINERD} ×: {}", "containerd / erofs-convert", verdict(faster >= GOAL_CONTAINERD));
    Ok(())
}

fn script(path: &str, args: &[&str]) -> Result<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    Ok(PathBuf::from(testbed::run(&path.to_string_lossy(), args)?.trim()))
}

/// What something took.
struct Cost {
    seconds: f64,
    processor: f64,
    memory: Option<u64>,
    written: u64,
}

impl Cost {
    fn show(&self, what: &str) {
        let memory = self.memory.map_or_else(|| "-".to_owned(), bytes);
        println!("  {what:<44}{:>10.1}{:>12.1}{memory:>14}{:>14}", self.seconds, self.processor, bytes(self.written));
    }
}

/// Does `work` and gives what it took of us, our children that ended meanwhile, and `daemon`.
fn costed(daemon: Option<u32>, work: impl FnOnce() -> Result<()>) -> Result<Cost> {
    let so_far = || -> Result<(f64, u64)> {
        let (ours, theirs) = (used("self")?, daemon.map_or(Ok((0.0, 0)), |pid| used(&pid.to_string()))?);
        Ok((ours.0 + theirs.0, ours.1 + theirs.1))
    };
    drop_caches()?;
    let (before, start) = (so_far()?, Instant::now());
    work()?;
    let seconds = start.elapsed().as_secs_f64();
    // What is still dirty counts as written when it is.
    rustix::fs::sync();
    let after = so_far()?;
    Ok(Cost { seconds, processor: after.0 - before.0, memory: None, written: after.1 - before.1 })
}

/// Processor seconds of programs that `work` runs to their end.
fn children(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let before = used("self")?.0;
    work()?;
    Ok(used("self")?.0 - before)
}

/// Processor seconds and bytes written of a process and of its children that it has waited for.
fn used(process: &str) -> Result<(f64, u64)> {
    // proc_pid_stat(5): fields 14 to 17, in ticks of 10 ms; the name in brackets may have spaces.
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    let after_name = stat.rsplit(") ").next().unwrap_or_default();
    let ticks: f64 = after_name.split(' ').skip(11).take(4).filter_map(|ticks| ticks.parse::<f64>().ok()).sum();
    // proc_pid_io(5); the kernel adds what waited-for children have written.
    let io = fs::read_to_string(format!("/proc/{process}/io"))?;
    let written = io.lines().find_map(|line| line.strip_prefix("write_bytes: ")?.parse().ok()).context("no write_bytes in proc")?;
    Ok((ticks / 100.0, written))
}

/// Processor seconds of one pass over the image by each stage alone.
#[derive(Default)]
struct Floor {
    blob_digest: f64,
    inflate: f64,
    tar_digest: f64,
    blake3: f64,
    zstd: f64,
}

impl Floor {
    fn measure(image: &DemoImage) -> Result<Floor> {
        let mut floor = Floor::default();
        let mut seen = HashSet::new();
        // What is measured is hashing and inflating: layers are read from the page cache, or reading them from the disk is counted too (once
        // 12 s in place of 3 for the digests).
        drop_caches()?;
        for layer in &image.layers {
            std::io::copy(&mut File::open(&layer.file)?, &mut std::io::sink())?;
            floor.blob_digest += children(|| testbed::run("openssl", ["dgst", "-sha256", &layer.file.to_string_lossy()]).map(drop))?;
            let mut inflate = Command::new("igzip");
            inflate.arg("-dc").arg(&layer.file).stdin(Stdio::null());
            floor.inflate += children(|| {
                ensure!(inflate.stdout(Stdio::null()).status().context("igzip (Debian's isal) cannot be started")?.success(), "igzip failed");
                Ok(())
            })?;
            let mut child = inflate.stdout(Stdio::piped()).spawn()?;
            floor.store(child.stdout.take().context("its output is a pipe")?, &mut seen)?;
            ensure!(child.wait()?.success(), "igzip failed");
        }
        floor.tar_digest = floor.blob_digest / image.compressed() as f64 * image.uncompressed() as f64;
        Ok(floor)
    }

    /// Hashes and compresses a tar in pieces of a unit, as if it were one file; what is all zeros or was there before is not compressed.
    fn store(&mut self, mut tar: impl Read, seen: &mut HashSet<Digest>) -> Result<()> {
        let unit = UnitBits::DEFAULT.bytes() as usize;
        let mut zstd = zstd::bulk::Compressor::new(ZSTD_LEVEL)?;
        let (mut piece, mut out) = (Vec::with_capacity(unit), vec![0; unit]);
        while (&mut tar).take(unit as u64).read_to_end(&mut piece)? > 0 {
            let digest = computed(&mut self.blake3, || Digest::of(&piece));
            if piece.iter().any(|&byte| byte != 0) && seen.insert(digest) {
                // It fails for want of room where it saves nothing.
                let _ = computed(&mut self.zstd, || zstd.compress_to_buffer(&piece, &mut out[..piece.len() - 1]));
            }
            piece.clear();
        }
        Ok(())
    }

    fn all(&self) -> f64 {
        self.blob_digest + self.inflate + self.tar_digest + self.blake3 + self.zstd
    }
}

/// Does `work` and adds what this thread computes meanwhile.
fn computed<T>(seconds: &mut f64, work: impl FnOnce() -> T) -> T {
    let now = || {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    };
    let before = now();
    let done = work();
    *seconds += (now() - before).as_secs_f64();
    done
}

fn show_stages(ours: &Value, floor: &Floor) {
    println!("\n  {:<44}{:>14}{:>10}", "processor seconds", "erofs-convert", "floor");
    let stages = [
        ("fetch", "fetch (its own threads are in the rest)", None),
        ("blobDigest", "SHA-256 of the blobs", Some(floor.blob_digest)),
        ("unpack", "inflate", Some(floor.inflate)),
        ("tarDigest", "SHA-256 of the tars", Some(floor.tar_digest)),
        ("cut", "tar, chunks, BLAKE3", Some(floor.blake3)),
        ("compress", "zstd", Some(floor.zstd)),
        ("write", "write", None),
        ("fold", "fold, publish", None),
    ];
    let mut rest = ours["all"].as_f64().unwrap_or_default();
    let line = |what: &str, ours: f64, floor: Option<f64>| {
        println!("  {what:<44}{ours:>14.2}{:>10}", floor.map_or_else(|| "-".to_owned(), |floor| format!("{floor:.2}")));
    };
    let all = rest;
    for (key, what, floor) in stages {
        let seconds = ours[key].as_f64().unwrap_or_default();
        rest -= seconds;
        line(what, seconds, floor);
    }
    line("the rest", rest, None);
    line("in all", all, Some(floor.all()));
}

fn convert(scratch: &Scratch, reference: &str) -> Result<(Cost, Value)> {
    let store = scratch.make_dir("store")?;
    let mut report = Value::Null;
    let mut cost = costed(None, || {
        report = Converter::new(&scratch.join("converter")).convert(reference, &store)?;
        Ok(())
    })?;
    cost.memory = report["peakMemory"].as_u64();
    fs::remove_dir_all(store)?;
    Ok((cost, report))
}

fn pull(scratch: &Scratch, reference: &str) -> Result<Cost> {
    let dir = scratch.join("containerd");
    let containerd = Containerd::start(&dir, Snapshotter::Overlayfs)?;
    let cost =
        costed(Some(containerd.pid()), || containerd.ctr(&["image", "pull", "--plain-http", "--snapshotter", "overlayfs", reference]).map(drop))?;
    drop(containerd);
    fs::remove_dir_all(dir)?;
    Ok(cost)
}

/// skopeo fetches and verifies the blobs, then mkfs.erofs makes an uncompressed image of each.
fn mkfs(scratch: &Scratch, registry: &Registry, name: &str, image: &DemoImage) -> Result<Cost> {
    let mkfs = script("tools/ci/newer-erofs.sh", &[""])?.join("mkfs.erofs");
    let (blobs, output) = (scratch.join("blobs"), scratch.join("layer.erofs"));
    let (from, to) = (format!("docker://{}", registry.reference(name)), format!("dir:{}", blobs.display()));
    let cost = costed(None, || {
        testbed::run("skopeo", ["--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", &from, &to])?;
        for layer in gzip_files(&blobs)? {
            let (output, layer) = (output.to_string_lossy(), layer.to_string_lossy());
            testbed::run(&mkfs.to_string_lossy(), ["--quiet", "--tar=f", "--ungzip", &output, &layer])?;
            fs::remove_file(&*output)?;
        }
        Ok(())
    })?;
    ensure!(gzip_files(&blobs)?.len() == image.layers.len(), "{} has not all layers", blobs.display());
    fs::remove_dir_all(blobs)?;
    Ok(cost)
}

/// The layers among the blobs of a directory.
fn gzip_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let mut head = Vec::new();
        File::open(&path)?.take(2).read_to_end(&mut head)?;
        if head == [0x1f, 0x8b] {
            found.push(path);
        }
    }
    Ok(found)
}
