//! `slipway-demo`: one real image, pulled and started the ordinary way, converted, then started through Slipway with its original
//! reference; with a table of what each way took.
//!
//! Everything runs on this machine with daemons, directories and a disk of its own, and is gone afterwards, also after Ctrl-C.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Parser;
use slipway_demo::image::DemoImage;
use slipway_demo::report::{self, Report, Style};
use slipway_demo::runs::{self, Measured};
use testbed::{Converter, LoopFs, Registry, Scratch, drop_caches, need};

/// Shows a real image pulled the ordinary way and started through Slipway, side by side.
#[derive(Debug, Parser)]
struct Args {
    /// Directory of the image's layers, as tools/demo/image/build.sh makes it.
    #[arg(long, required_unless_present = "check")]
    layers: Option<PathBuf>,
    /// Only say whether this machine has what the demo needs.
    #[arg(long)]
    check: bool,
    /// Also write the figures to this file, as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// What the run needs at its fullest, as multiples of the image's size: registry, containerd's content and unpacked layers, store.
const SPACE_PER_IMAGE: u64 = 4;
/// The store's disk, sparse: an image's packs are smaller than the image.
const STORE_DISK: u64 = 64 << 30;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    catch_signals()?;
    let style = Style { colour: std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() };
    for need in [need::containers(), need::file_backed_erofs(), need::path("/dev/fuse")] {
        need.map_err(|lack| anyhow!(lack.0))?;
    }
    let Some(layers) = &args.layers else { return Ok(()) };
    let report = demonstrate(layers, &style)?;
    println!("\n{}", report.table(&style));
    if let Some(path) = &args.json {
        std::fs::write(path, format!("{:#}\n", report.json())).with_context(|| format!("{} cannot be written", path.display()))?;
    }
    Ok(())
}

/// Ctrl-C reaches every process of the foreground group: daemons and containers end, the step that waits for them fails, and this
/// process, which only notes the signal, cleans up on its way out.
fn catch_signals() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _entered = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
        });
        INTERRUPTED.store(true, Ordering::Relaxed);
        eprintln!("\ninterrupted: cleaning up");
    });
    Ok(())
}

/// Announces the next step, unless a signal asked to stop.
fn step(style: &Style, text: &str) -> Result<()> {
    ensure!(!INTERRUPTED.load(Ordering::Relaxed), "interrupted");
    println!("{}", style.step(text));
    Ok(())
}

fn demonstrate(layers: &Path, style: &Style) -> Result<Report> {
    let scratch = Scratch::new("demo")?;
    let image = DemoImage::open(layers)?;
    check_space(scratch.path(), &image)?;

    step(style, &format!("Push the image to a local registry: {} layers, {} compressed", image.layers.len(), report::bytes(image.compressed())))?;
    let registry = Registry::start(&scratch.join("registry"))?;
    let reference = registry.reference("demo/analysis:1.0");
    let built = image.push(&scratch.join("layout"), &reference)?;
    std::fs::remove_dir_all(scratch.join("layout"))?;

    step(style, "(a) The ordinary way: containerd pulls and unpacks, then runs (page cache dropped before)")?;
    let (ordinary, ordinary_again) = runs::ordinary(&scratch.join("ordinary"), &registry, &reference)?;
    std::fs::remove_dir_all(scratch.join("ordinary"))?;
    println!("{}", report::line(&ordinary));

    step(style, "(b) Convert it into a store (once per image, not once per node)")?;
    let disk = LoopFs::new(&scratch.join("disk"), STORE_DISK)?;
    let store = scratch.make_dir("disk/store")?;
    let converter = Converter::new(&scratch.join("converter"));
    drop_caches()?;
    let started = std::time::Instant::now();
    let converted = converter.convert(&reference, &store)?;
    let convert_seconds = started.elapsed().as_secs_f64();
    println!("  {convert_seconds:.2} s");

    step(style, "(c) The same reference through Slipway: empty cache, page cache dropped")?;
    let node = runs::Node::start(&scratch.join("node"), &store, &converter)?;
    let lazy = node.first(&registry, &reference, &disk)?;
    ensure!(
        lazy.run.output == ordinary.run.output,
        "the workload printed something else through Slipway:\n{}\n{}",
        ordinary.run.output,
        lazy.run.output
    );
    println!("{}", report::line(&lazy));
    check_registry_served(&built, &ordinary, &lazy).with_context(|| format!("slipwayd's log:\n{}", node.log()))?;
    step(style, "(d) And again, warm")?;
    let lazy_again = node.again(&registry, &reference, &disk)?;
    println!("{}", report::line(&lazy_again));
    let cached = node.cached_bytes()?;
    drop(node);

    step(style, "Clean up")?;
    Ok(Report {
        image: image.uncompressed(),
        compressed: image.compressed(),
        ordinary,
        ordinary_again,
        lazy,
        lazy_again,
        cached,
        converted,
        convert_seconds,
    })
}

/// The claim the demo exists for: the ordinary pull fetched every layer, Slipway's none.
fn check_registry_served(built: &testbed::BuiltImage, ordinary: &Measured, lazy: &Measured) -> Result<()> {
    let layer_bytes = |measured: &Measured| built.layers.iter().filter_map(|layer| measured.registry.get(&layer.digest)).sum::<u64>();
    let all: u64 = built.layers.iter().map(|layer| layer.size).sum();
    ensure!(layer_bytes(ordinary) == all, "the ordinary pull fetched {} of {all} layer bytes", layer_bytes(ordinary));
    ensure!(layer_bytes(lazy) == 0, "Slipway fetched {} layer bytes from the registry", layer_bytes(lazy));
    Ok(())
}

fn check_space(dir: &Path, image: &DemoImage) -> Result<()> {
    let stat = rustix::fs::statvfs(dir).with_context(|| format!("{} cannot be looked at", dir.display()))?;
    let (free, needed) = (stat.f_bavail * stat.f_frsize, image.uncompressed() * SPACE_PER_IMAGE);
    ensure!(
        free >= needed,
        "{} has {} free and the demo needs about {}: set SLIPWAY_SCRATCH to a directory with more",
        dir.display(),
        report::bytes(free),
        report::bytes(needed)
    );
    Ok(())
}
