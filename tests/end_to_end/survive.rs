//! The worker is killed while files are read: readers wait, the next worker goes on, no byte is wrong.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use testbed::{Compression, Entry, Image, Layer, drop_caches, need, require, wait_until};

use crate::images;
use crate::world::{Node, World};

const KILLS: usize = 20;
const FILES: usize = 128;
const FILE_LEN: usize = 1 << 20;
const READERS: usize = 4;
/// Files read between two kills, so that kills find the worker in the middle of filling the cache, from first to last.
const READS_PER_KILL: usize = 5;
/// Far more than a restart takes; a read that waits this long waits for ever.
const PAUSE_LIMIT: Duration = Duration::from_secs(30);

#[test]
fn reads_wait_for_the_next_worker_and_get_the_right_bytes() {
    require!(need::containers(), need::path("/bin/busybox"), need::file_system("erofs"), need::path("/dev/fuse"));
    let world = World::new("kill");
    let files = (0..FILES).map(|number| Entry::file(&format!("f{number}"), images::noise(number as u64 + 1, FILE_LEN)));
    let image = Image::new().layer(&Layer::new(files), Compression::Plain);
    let (reference, built) = world.push_converted("noise", &image);
    let node = world.node();
    node.pull(&world, &reference, &built);
    let view = node.containerd.view(built.top_chain()).expect("a view");
    let expected: Vec<blake3::Hash> = (0..FILES).map(|number| blake3::hash(&images::noise(number as u64 + 1, FILE_LEN))).collect();

    let readers =
        Readers { root: view.path(), expected: &expected, stop: AtomicBool::new(false), done: AtomicUsize::new(0), longest_ms: AtomicU64::new(0) };
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..READERS)
            .map(|reader| {
                scope.spawn({
                    let readers = &readers;
                    move || readers.read_all(reader)
                })
            })
            .collect();
        let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| kill_under_load(&node, &readers)));
        readers.stop.store(true, Ordering::Relaxed);
        for handle in handles {
            handle.join().expect("every read gave the right bytes");
        }
        killed.expect("the worker could be killed and came back each time");
    });
    println!("{KILLS} kills, {} files read, longest read {} ms", readers.done.into_inner(), readers.longest_ms.into_inner());
}

fn kill_under_load(node: &Node, readers: &Readers<'_>) {
    for kill in 0..KILLS {
        let before = readers.done.load(Ordering::Relaxed);
        wait_until("reads go on", PAUSE_LIMIT, || Ok((readers.done.load(Ordering::Relaxed) >= before + READS_PER_KILL).then_some(())))
            .unwrap_or_else(|error| panic!("after kill {kill}: {error:#}\nslipwayd's log:\n{}", node.slipwayd.log()));
        // Without the page cache everything read before is asked for again.
        drop_caches().expect("caches dropped");
        let old = node.slipwayd.kill_worker().expect("a worker to kill");
        wait_until("another worker runs", PAUSE_LIMIT, || Ok(node.slipwayd.worker().filter(|worker| *worker != old)))
            .expect("the holder starts another");
    }
}

/// Threads that read files over and over and compare every byte.
struct Readers<'a> {
    root: &'a Path,
    expected: &'a [blake3::Hash],
    stop: AtomicBool,
    done: AtomicUsize,
    longest_ms: AtomicU64,
}

impl Readers<'_> {
    /// Reads every file at least once, and goes on until told to stop.
    fn read_all(&self, reader: usize) {
        let mut read = 0;
        while read < FILES || !self.stop.load(Ordering::Relaxed) {
            // Each reader in an order of its own, so that they seldom want the same file.
            let number = (read * 37 + reader * 29) % FILES;
            let start = Instant::now();
            let bytes = std::fs::read(self.root.join(format!("f{number}"))).unwrap_or_else(|error| panic!("f{number}: {error}"));
            let elapsed = u64::try_from(start.elapsed().as_millis()).expect("milliseconds of a test fit");
            self.longest_ms.fetch_max(elapsed, Ordering::Relaxed);
            assert_eq!(blake3::hash(&bytes), self.expected[number], "f{number} has wrong bytes");
            self.done.fetch_add(1, Ordering::Relaxed);
            read += 1;
        }
    }
}
