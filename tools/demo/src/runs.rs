//! The measured runs: the ordinary way and through Slipway.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use testbed::{Containerd, Converter, LoopFs, Registry, Slipwayd, SlipwaydConfig, Snapshotter, drop_caches, resident_bytes};

use crate::image::WORKLOAD;

/// One pull (seconds and what the registry served) and the run after it.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Seconds of the pull; none when the image was there already.
    pub pull: f64,
    /// The container's run.
    pub run: Run,
    /// Blob bytes the registry served, by digest.
    pub registry: BTreeMap<String, u64>,
    /// Bytes read from the store's disk, as the kernel counts them.
    pub store: u64,
}

impl Measured {
    /// Seconds from the order to the first output.
    pub fn total(&self) -> f64 {
        self.pull + self.run.first_output
    }
}

/// One run of the workload; seconds count from the `ctr run`.
#[derive(Debug, Clone)]
pub struct Run {
    /// Until the container's process runs.
    pub started: f64,
    /// Until the workload's first line.
    pub first_output: f64,
    /// That line.
    pub output: String,
}

/// Pulls and runs with containerd's overlayfs snapshotter; then runs once more, warm.
pub fn ordinary(dir: &Path, registry: &Registry, reference: &str) -> Result<(Measured, Run)> {
    let containerd = Containerd::start(dir, Snapshotter::Overlayfs)?;
    drop_caches()?;
    let mark = registry.mark();
    let pull = pull(&containerd, reference)?;
    let first = run(&containerd, reference)?;
    let measured = Measured { pull, run: first, registry: registry.blob_bytes(mark), store: 0 };
    let again = run(&containerd, reference)?;
    Ok((measured, again))
}

/// A node with Slipway: its daemon and a containerd that uses it. The containerd is declared first, so it ends first.
#[derive(Debug)]
pub struct Node {
    containerd: Containerd,
    slipwayd: Slipwayd,
}

impl Node {
    /// Starts a node with an empty cache.
    pub fn start(dir: &Path, store: &Path, converter: &Converter) -> Result<Node> {
        std::fs::create_dir_all(dir)?;
        let slipwayd = Slipwayd::start(&dir.join("slipway"), &SlipwaydConfig::new(store, [converter.public_key()]))?;
        let containerd = Containerd::start(&dir.join("containerd"), Snapshotter::Slipway(slipwayd.socket()))?;
        Ok(Node { containerd, slipwayd })
    }

    /// The first pull and run, nothing cached anywhere.
    pub fn first(&self, registry: &Registry, reference: &str, disk: &LoopFs) -> Result<Measured> {
        drop_caches()?;
        let (mark, before) = (registry.mark(), disk.bytes_read()?);
        let pull = pull(&self.containerd, reference)?;
        let run = run(&self.containerd, reference)?;
        Ok(Measured { pull, run, registry: registry.blob_bytes(mark), store: disk.bytes_read()? - before })
    }

    /// One more run of the image that is here now.
    pub fn again(&self, registry: &Registry, reference: &str, disk: &LoopFs) -> Result<Measured> {
        let (mark, before) = (registry.mark(), disk.bytes_read()?);
        let run = run(&self.containerd, reference)?;
        Ok(Measured { pull: 0.0, run, registry: registry.blob_bytes(mark), store: disk.bytes_read()? - before })
    }

    /// What the node daemon has logged.
    pub fn log(&self) -> String {
        self.slipwayd.log()
    }

    /// The node's containerd.
    pub fn containerd(&self) -> &Containerd {
        &self.containerd
    }

    /// Bytes of mounted images' files that are in the page cache.
    pub fn resident_bytes(&self) -> Result<u64> {
        self.slipwayd.images().iter().map(|image| resident_bytes(image)).sum()
    }

    /// Bytes the local cache occupies on disk.
    pub fn cached_bytes(&self) -> Result<u64> {
        disk_usage(&self.slipwayd.state().join("cache"))
    }
}

/// Pulls as the kubelet does; seconds.
pub fn pull(containerd: &Containerd, reference: &str) -> Result<f64> {
    let mut cri = containerd.cri()?;
    let start = Instant::now();
    cri.pull(reference)?;
    Ok(start.elapsed().as_secs_f64())
}

/// Runs the workload in a new container of an image that is here.
pub fn run(containerd: &Containerd, reference: &str) -> Result<Run> {
    let mut command = containerd.run_command(reference, &WORKLOAD);
    let start = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("ctr cannot be started")?;
    let mut lines = BufReader::new(child.stdout.take().context("its output is a pipe")?).lines();
    let first = lines.next().transpose()?;
    let started = start.elapsed().as_secs_f64();
    let output = lines.next().transpose()?;
    let first_output = start.elapsed().as_secs_f64();
    let mut complaint = String::new();
    child.stderr.take().context("its errors are a pipe")?.read_to_string(&mut complaint)?;
    let status = child.wait()?;
    ensure!(status.success() && first.as_deref() == Some("started"), "the workload failed ({status}): {complaint}");
    Ok(Run { started, first_output, output: output.with_context(|| format!("the workload printed nothing: {complaint}"))? })
}

/// What the files below `dir` occupy: holes are not counted.
fn disk_usage(dir: &Path) -> Result<u64> {
    /// `st_blocks` counts in these, whatever the file system's block size (stat(2)).
    const STAT_BLOCK: u64 = 512;
    let mut total = 0;
    for entry in std::fs::read_dir(dir).with_context(|| format!("{} cannot be listed", dir.display()))? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_dir() {
            total += disk_usage(&entry.path())?;
        } else if metadata.is_file() {
            // Two names of one file count half each.
            total += metadata.blocks() * STAT_BLOCK / metadata.nlink();
        }
    }
    Ok(total)
}
