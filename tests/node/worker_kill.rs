//! The worker is killed again and again while readers compare every byte of a lazily mounted image: no read fails, no byte is wrong.
//!
//! Without containerd, converter or registry: the store is made here, and the image is looked at with `slipwayd mount`. What is left is the
//! path from the kernel's request to the store and back, and taking it over.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use slipway::store::SigningKey;
use testbed::{Noise, Scratch, Slipwayd, SlipwaydConfig, need, require, wait_until};

use crate::made_store::{FILE_LEN, content, make_store, name};
use crate::view::View;

const KILLS: usize = 20;
const READERS: u64 = 8;
/// Reads, over all readers, between a worker's first answer and its end: enough to be in the middle of fills, few enough to stay there.
const READS_PER_LIFE: u64 = 40;
const FILES: u64 = 48;
/// Longest read. Spans several units, so that one read needs several fills.
const READ_MAX: u64 = 700 * 1024;
/// Far more than a restart takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// What readers share.
struct Load<'a> {
    at: &'a Path,
    expected: &'a [Vec<u8>],
    stop: AtomicBool,
    reads: AtomicU64,
    longest_ms: AtomicU64,
}

impl Load<'_> {
    /// Reads and compares ranges until told to stop. Page caches are dropped behind each read, so that the next asks the worker again.
    fn read_and_compare(&self, seed: u64) -> Result<(), String> {
        let mut noise = Noise(seed << 32);
        let files: Vec<File> =
            (0..FILES).map(|file| File::open(self.at.join(name(file))).map_err(|e| format!("open: {e}"))).collect::<Result<_, _>>()?;
        while !self.stop.load(Ordering::Relaxed) {
            let (file, offset) = ((noise.next() % FILES) as usize, noise.next() % FILE_LEN as u64);
            let expected = &self.expected[file][offset as usize..FILE_LEN.min((offset + 1 + noise.next() % READ_MAX) as usize)];
            let mut got = vec![0; expected.len()];
            let start = Instant::now();
            files[file].read_exact_at(&mut got, offset).map_err(|e| format!("{} at {offset} + {}: {e}", name(file as u64), got.len()))?;
            self.longest_ms.fetch_max(start.elapsed().as_millis() as u64, Ordering::Relaxed);
            if let Some(at) = (0..got.len()).find(|&at| got[at] != expected[at]) {
                let zeros = got[at..].iter().take_while(|&&byte| byte == 0).count();
                return Err(format!("{} at {}: wrong byte, {zeros} zeros", name(file as u64), offset as usize + at));
            }
            rustix::fs::fadvise(&files[file], 0, None, rustix::fs::Advice::DontNeed).map_err(|e| format!("fadvise: {e}"))?;
            self.reads.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn wait_for_reads(&self, more: u64) {
        let before = self.reads.load(Ordering::Relaxed);
        let enough = || Ok((self.stop.load(Ordering::Relaxed) || self.reads.load(Ordering::Relaxed) >= before + more).then_some(()));
        wait_until("reads go on", PATIENCE, enough).expect("readers are answered");
    }
}

/// Drops what the FUSE mount of packs has cached.
fn forget_packs(slipwayd: &Slipwayd) {
    for pack in fs::read_dir(slipwayd.state().join("packs")).expect("the directory of packs") {
        let pack = File::open(pack.expect("an entry").path()).expect("a pack");
        rustix::fs::fadvise(&pack, 0, None, rustix::fs::Advice::DontNeed).expect("fadvise");
    }
}

#[test]
fn no_read_fails_or_lies_while_workers_are_killed() {
    require!(need::root(), need::file_backed_erofs(), need::file_system("overlay"), need::path("/dev/fuse"));
    let scratch = Scratch::new("worker-kill").expect("a scratch directory");
    let key = SigningKey::load_or_create(&scratch.join("key")).expect("a key");
    let chain = make_store(&scratch.join("store"), &key, FILES);
    let expected: Vec<Vec<u8>> = (0..FILES).map(content).collect();
    let mut config = SlipwaydConfig::new(&scratch.join("store"), [scratch.join("key.pub")]);
    config.backend = "fuse-blob".into();
    let mut slipwayd = Slipwayd::start(&scratch.join("node"), &config).expect("slipwayd starts");
    let view = View::mount(&slipwayd, &chain, scratch.join("view"));
    let mode = fs::metadata(slipwayd.state().join("mounts")).expect("metadata").permissions().mode();
    assert_eq!(mode & 0o777, 0o700, "mount points are for their owner only");

    let load = Load { at: &view.at, expected: &expected, stop: AtomicBool::new(false), reads: AtomicU64::new(0), longest_ms: AtomicU64::new(0) };
    std::thread::scope(|scope| {
        let read = |seed| {
            let load = &load;
            scope.spawn(move || load.read_and_compare(seed).inspect_err(|_| load.stop.store(true, Ordering::Relaxed)))
        };
        let readers: Vec<_> = (0..READERS).map(read).collect();
        let kills = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..KILLS {
                load.wait_for_reads(READS_PER_LIFE);
                forget_packs(&slipwayd);
                let old = slipwayd.kill_worker().expect("a worker to kill");
                wait_until("another worker runs", PATIENCE, || Ok(slipwayd.worker().filter(|new| *new != old))).expect("the holder starts another");
            }
            load.wait_for_reads(READS_PER_LIFE);
        }));
        load.stop.store(true, Ordering::Relaxed);
        let failures: Vec<_> = readers.into_iter().filter_map(|reader| reader.join().expect("readers do not panic").err()).collect();
        assert!(failures.is_empty() && kills.is_ok(), "{failures:#?}\nslipwayd's log:\n{}", slipwayd.log());
    });
    println!("{KILLS} kills, {} reads, the longest took {} ms", load.reads.into_inner(), load.longest_ms.into_inner());
    assert!(!slipwayd.log().contains("dropped unanswered"), "{}", slipwayd.log());

    // And everything once more in order, now that most of it comes from the cache of earlier workers.
    for (file, expected) in (0..).zip(&expected) {
        assert!(fs::read(view.at.join(name(file))).expect("a file") == *expected, "{} differs", name(file));
    }
    drop(view);
    wait_until("the image is unmounted", PATIENCE, || Ok(fs::read_dir(slipwayd.state().join("mounts"))?.next().is_none().then_some(())))
        .expect("nothing uses it any more");
    slipwayd.stop().expect("slipwayd stops");
}
