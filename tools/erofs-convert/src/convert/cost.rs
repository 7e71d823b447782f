//! What a conversion took of the machine.

use std::time::Duration;

use serde_json::{Map, Value};

use crate::layer::{STAGES, Stage, Stages, process_time};

/// Counts while a conversion runs.
pub(super) struct Meter {
    /// For the stages of its layers.
    pub stages: Stages,
    before: Duration,
}

/// What it came to.
#[derive(Clone, Debug)]
pub struct Cost {
    /// Processor time of every stage.
    pub stages: Stages,
    /// Processor time in all, network and file system included.
    pub processor: Duration,
    /// The most memory that was resident at once in this process's life, if the kernel says.
    pub peak_memory: Option<u64>,
}

impl Meter {
    pub fn start() -> Meter {
        Meter { stages: Stages::default(), before: process_time() }
    }

    /// Does `work`, which may use threads of its own but has the process to itself, and counts it as folding.
    pub fn fold<T>(&self, work: impl FnOnce() -> T) -> T {
        let before = process_time();
        let done = work();
        self.stages.add(Stage::Fold, process_time().saturating_sub(before));
        done
    }

    pub fn cost(&self) -> Cost {
        Cost { stages: self.stages.clone(), processor: process_time().saturating_sub(self.before), peak_memory: peak_memory() }
    }
}

impl Cost {
    /// Seconds of processor time by stage, and `all`.
    pub fn json(&self) -> Value {
        let mut seconds = Map::new();
        for stage in STAGES {
            seconds.insert(name(stage).to_owned(), self.stages.sum(stage).as_secs_f64().into());
        }
        seconds.insert("all".to_owned(), self.processor.as_secs_f64().into());
        seconds.into()
    }
}

fn name(stage: Stage) -> &'static str {
    match stage {
        Stage::Fetch => "fetch",
        Stage::BlobDigest => "blobDigest",
        Stage::Unpack => "unpack",
        Stage::TarDigest => "tarDigest",
        Stage::Cut => "cut",
        Stage::Compress => "compress",
        Stage::Write => "write",
        Stage::Fold => "fold",
    }
}

/// `VmHWM` of proc_pid_status(5).
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_no_less_than_what_is_held_now() {
        let before = peak_memory().expect("procfs");
        let held = vec![1u8; 64 << 20];
        let after = peak_memory().expect("procfs");
        assert!(after >= before && after >= held.len() as u64, "{before} {after}");
    }
}
