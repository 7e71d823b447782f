//! Where a conversion's processor time goes, stage by stage.

use std::cell::Cell;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// A stage of a conversion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Taking the blob's bytes from whoever brings them.
    Fetch,
    /// SHA-256 of the blob.
    BlobDigest,
    /// Decompressing the blob.
    Unpack,
    /// SHA-256 of the tar.
    TarDigest,
    /// Reading the tar, cutting files into chunks, and their BLAKE3; compressing the framing.
    Cut,
    /// Compressing units, and the BLAKE3 of those that several chunks share.
    Compress,
    /// Writing packs.
    Write,
    /// From layer trees to published records.
    Fold,
}

/// All stages, in the order of a layer's way.
pub const STAGES: [Stage; 8] =
    [Stage::Fetch, Stage::BlobDigest, Stage::Unpack, Stage::TarDigest, Stage::Cut, Stage::Compress, Stage::Write, Stage::Fold];

/// Processor time of every stage, added up over layers and threads. Clones count into the same sums.
#[derive(Clone, Debug, Default)]
pub struct Stages(Arc<[AtomicU64; STAGES.len()]>);

thread_local! {
    /// What the stages within the one that this thread is in have taken so far: theirs, not its own.
    static INNER: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

impl Stages {
    /// Does `work` and counts what this thread computes meanwhile, but for the stages within. It costs two system calls, so `work` is best a
    /// piece of many kilobytes.
    pub fn time<T>(&self, stage: Stage, work: impl FnOnce() -> T) -> T {
        let (around, begun) = (INNER.replace(Duration::ZERO), thread_time());
        let done = work();
        let took = thread_time().saturating_sub(begun);
        let own = took.saturating_sub(INNER.replace(around + took));
        self.add(stage, own);
        done
    }

    /// Counts what was measured in another way.
    pub fn add(&self, stage: Stage, took: Duration) {
        self.0[stage as usize].fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
    }

    /// A reader whose reads are `stage`.
    pub fn reader<R: Read>(&self, stage: Stage, inner: R) -> StageReader<R> {
        StageReader { stages: self.clone(), stage, inner }
    }

    /// The sum of a stage.
    pub fn sum(&self, stage: Stage) -> Duration {
        Duration::from_nanos(self.0[stage as usize].load(Ordering::Relaxed))
    }
}

/// See [`Stages::reader`].
pub struct StageReader<R> {
    stages: Stages,
    stage: Stage,
    inner: R,
}

impl<R> StageReader<R> {
    /// The reader inside.
    pub fn into_inner(self) -> R {
        self.inner
    }
}

impl<R: Read> Read for StageReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stages.time(self.stage, || self.inner.read(buf))
    }
}

/// Processor time of this thread so far.
fn thread_time() -> Duration {
    clock(ClockId::ThreadCPUTime)
}

/// Processor time of this process so far, with all its threads.
pub fn process_time() -> Duration {
    clock(ClockId::ProcessCPUTime)
}

fn clock(id: ClockId) -> Duration {
    let time = clock_gettime(id);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Computes until the thread has taken this long.
    fn compute(long: Duration) {
        let begun = thread_time();
        while thread_time() - begun < long {}
    }

    #[test]
    fn a_stage_counts_its_own_time_and_not_that_of_those_within() {
        const MS: Duration = Duration::from_millis(1);
        let stages = Stages::default();
        let begun = thread_time();
        stages.time(Stage::Unpack, || {
            compute(4 * MS);
            stages.time(Stage::BlobDigest, || {
                compute(10 * MS);
                stages.time(Stage::Fetch, || compute(20 * MS));
                stages.time(Stage::Fetch, || compute(20 * MS));
            });
        });
        let all = thread_time() - begun;
        let mut sum = Duration::ZERO;
        for (stage, least) in [(Stage::Unpack, 4), (Stage::BlobDigest, 10), (Stage::Fetch, 40)] {
            assert!(stages.sum(stage) >= least * MS, "{stage:?}: {:?}", stages.sum(stage));
            sum += stages.sum(stage);
        }
        // What is counted twice comes to more than there was, however busy the machine.
        assert!(sum <= all, "{sum:?} of {all:?}");
        assert_eq!(stages.sum(Stage::Cut), Duration::ZERO);
    }

    #[test]
    fn waiting_is_no_work_and_threads_add_up() {
        const LONG: Duration = Duration::from_millis(20);
        let stages = Stages::default();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| stages.time(Stage::Compress, || compute(LONG)));
            }
            scope.spawn(|| stages.time(Stage::Write, || std::thread::sleep(LONG)));
        });
        assert!(stages.sum(Stage::Compress) >= 2 * LONG);
        assert!(stages.sum(Stage::Write) < LONG);
        assert!(process_time() >= 2 * LONG);
    }
}
