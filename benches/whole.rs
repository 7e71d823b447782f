//! Whole-system benchmarks. Each figure stands beside a reference measured in the same run on the same machine, because ratios travel
//! and absolute figures do not. `cargo bench --bench whole -- conversion` runs the ones whose name has that word.
//!
//! Needs root, the binaries of the release profile (`make bench` builds them), the demo's image and a newer erofs-utils (both are made
//! on first use and kept).

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use slipway_demo::image::DemoImage;
use slipway_demo::report::bytes;
use slipway_demo::runs::{self, Node};
use testbed::{BuiltImage, Compression, Containerd, Converter, Entry, Image, Layer, Layout, LoopFs, Registry, Scratch, Snapshotter, drop_caches};

/// Large enough that seeking matters, small enough to be read whole in a moment.
const RANDOM_FILE: usize = 512 << 20;
const RANDOM_READS: usize = 20_000;
const BLOCK: usize = 4096;
const STORE_DISK: u64 = 64 << 30;

fn main() -> Result<()> {
    let wanted = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    for (name, bench) in [("conversion", conversion as fn() -> Result<()>), ("cold start", cold_start), ("random read", random_read)] {
        if name.contains(&wanted) {
            println!("\n{name}");
            bench().with_context(|| format!("the benchmark {name} failed"))?;
        }
    }
    Ok(())
}

/// One line: what, how much, and how that compares.
fn show(what: &str, figure: String, ratio: Option<f64>) {
    let ratio = ratio.map_or_else(String::new, |ratio| format!("{ratio:>8.2} ×"));
    println!("  {what:<58}{figure:>14}{ratio}");
}

fn script(path: &str) -> Result<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    Ok(PathBuf::from(testbed::run(&path.to_string_lossy(), [""; 0])?.trim()))
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64())
}

/// MB of uncompressed layers per second, beside mkfs.erofs on the same archives.
fn conversion() -> Result<()> {
    let scratch = Scratch::new("bench")?;
    let layers = script("tools/demo/image/build.sh")?;
    let mkfs = script("tools/ci/newer-erofs.sh")?.join("mkfs.erofs");
    let image = DemoImage::open(&layers)?;
    let layout = scratch.join("layout");
    image.lay_out(&layout)?;
    let rate = |seconds: f64| image.uncompressed() as f64 / 1e6 / seconds;

    drop_caches()?;
    let store = scratch.make_dir("store")?;
    let ours = rate(timed(|| Converter::new(&scratch.join("converter")).convert(&format!("oci:{}:demo", layout.display()), &store).map(drop))?);
    show("erofs-convert, gzip layers to packs, all digests checked", format!("{ours:.0} MB/s"), None);
    fs::remove_dir_all(&store)?;

    for (what, options) in [
        ("mkfs.erofs --tar, gunzip only, one image per layer", &[][..]),
        ("mkfs.erofs --tar, zstd in units of 64 KiB", &["-zzstd,level=3", "-C65536"][..]),
    ] {
        drop_caches()?;
        let theirs = rate(timed(|| {
            for layer in &image.layers {
                let output = scratch.join("layer.erofs");
                let mut args = vec!["--quiet".to_owned(), "--tar=f".to_owned(), "--ungzip".to_owned()];
                args.extend(options.iter().map(|option| (*option).to_owned()));
                args.extend([output.to_string_lossy().into_owned(), layer.file.to_string_lossy().into_owned()]);
                testbed::run(&mkfs.to_string_lossy(), args)?;
                fs::remove_file(output)?;
            }
            Ok(())
        })?);
        show(what, format!("{theirs:.0} MB/s"), Some(ours / theirs));
    }
    Ok(())
}

/// The demo's workload: from `ctr run` to its first output, nothing in the page cache.
fn cold_start() -> Result<()> {
    let scratch = Scratch::new("bench")?;
    let registry = Registry::start(&scratch.join("registry"))?;
    let reference = registry.reference("bench/analysis:1.0");
    let built = DemoImage::open(&script("tools/demo/image/build.sh")?)?.push(&scratch.join("layout"), &reference)?;
    fs::remove_dir_all(scratch.join("layout"))?;

    let local = {
        let containerd = Containerd::start(&scratch.join("ordinary"), Snapshotter::Overlayfs)?;
        runs::pull(&containerd, &reference)?;
        drop_caches()?;
        runs::run(&containerd, &reference)?.first_output
    };
    fs::remove_dir_all(scratch.join("ordinary"))?;
    show("image pulled and unpacked on ext4 before", format!("{local:.2} s"), None);

    let disk = LoopFs::new(&scratch.join("disk"), STORE_DISK)?;
    let store = scratch.make_dir("disk/store")?;
    let converter = Converter::new(&scratch.join("converter"));
    converter.convert(&reference, &store)?;
    let node = Node::start(&scratch.join("node"), &store, &converter)?;
    let lazy = node.first(&registry, &reference, &disk)?;
    show("Slipway, empty cache", format!("{:.2} s", lazy.run.first_output), Some(lazy.run.first_output / local));
    drop_caches()?;
    let cached = node.again(&registry, &reference, &disk)?;
    show("Slipway, data in the local cache", format!("{:.2} s", cached.run.first_output), Some(cached.run.first_output / local));
    drop(node);
    show_what_was_fetched(&Node::start(&scratch.join("other"), &store, &converter)?, &reference, &built, &disk)
}

/// What a cold run had the kernel read, and what was fetched for it. In a run apart from the timed one: here a view keeps the image mounted,
/// and with it its pages in memory, when the container is gone.
fn show_what_was_fetched(node: &Node, reference: &str, built: &BuiltImage, disk: &LoopFs) -> Result<()> {
    drop_caches()?;
    let before = disk.bytes_read()?;
    runs::pull(node.containerd(), reference)?;
    let view = node.containerd().view(built.top_chain())?;
    runs::run(node.containerd(), reference)?;
    let (fetched, read) = (disk.bytes_read()? - before, node.resident_bytes()?);
    drop(view);
    ensure!(read > 0, "no page of the image is in memory after the run");
    let share = |count: u64| Some(count as f64 / read as f64);
    show("pages of the image the workload had the kernel read", bytes(read), None);
    show("fetched from the store for that, compressed", bytes(fetched), share(fetched));
    let cached = node.cached_bytes()?;
    show("cached for that: whole units, uncompressed", bytes(cached), share(cached));
    Ok(())
}

/// 4 KiB reads at random places, one after the other, nothing in the page cache: cached units, complete packs, and ext4.
fn random_read() -> Result<()> {
    let scratch = Scratch::new("bench")?;
    let registry = Registry::start(&scratch.join("registry"))?;
    let reference = registry.reference("bench/random:1");
    let mut content = vec![0; RANDOM_FILE];
    File::open("/dev/urandom")?.read_exact_at(&mut content, 0)?;
    fs::write(scratch.join("plain"), &content)?;
    let layout = Layout::create(&scratch.join("layout"))?;
    let built = layout.add("random", &Image::new().layer(&Layer::new([Entry::file("random", content)]), Compression::Plain))?;
    layout.push("random", &reference)?;
    let store = scratch.make_dir("store")?;
    let converter = Converter::new(&scratch.join("converter"));
    converter.convert(&reference, &store)?;
    let node = Node::start(&scratch.join("node"), &store, &converter)?;
    runs::pull(node.containerd(), &reference)?;

    let ext4 = random_reads(&scratch.join("plain"))?;
    show("ext4", format!("{ext4:.0} /s"), None);
    for what in ["Slipway, cached units (the mount that fetched them)", "Slipway, complete packs (a mount made afterwards)"] {
        let reads = reads_through(&node, &built)?;
        show(what, format!("{reads:.0} /s"), Some(reads / ext4));
    }
    Ok(())
}

/// Reads the file once, so that all of it is in the local cache, then at random.
fn reads_through(node: &Node, built: &BuiltImage) -> Result<f64> {
    let view = node.containerd().view(built.top_chain())?;
    let file = view.path().join("random");
    ensure!(fs::read(&file)?.len() == RANDOM_FILE, "the file is not whole");
    random_reads(&file)
}

/// Reads per second.
fn random_reads(path: &Path) -> Result<f64> {
    drop_caches()?;
    let file = File::open(path)?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random)?;
    let mut block = vec![0; BLOCK];
    // A walk with a stride that shares no factor with the number of blocks visits each block once, far from the one before.
    let (blocks, stride) = (RANDOM_FILE / BLOCK, 7919 * 13 + 2);
    let seconds = timed(|| {
        for read in 0..RANDOM_READS {
            file.read_exact_at(&mut block, ((read * stride) % blocks * BLOCK) as u64)?;
        }
        Ok(())
    })?;
    Ok(RANDOM_READS as f64 / seconds)
}
