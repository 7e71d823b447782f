//! How fast the data path is on this machine: `cargo bench --bench data_path [-- MIB]`. Needs root and /dev/fuse.
//!
//! Prints one line per measurement. "cold": nothing cached; "cached": the local file is whole, the kernel's page caches are dropped. Then a
//! table of unit sizes against latencies of the store, which is how the unit size was chosen.

#[allow(dead_code, reason = "the tests use the rest of it")]
#[path = "../tests/data_path/world.rs"]
mod world;

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use erofs::block::UnitBits;
use erofs::digest::Digest;
use slipway::cache::fake::Sample;
use slipway::kernel::fuse_blob::Begin;
use slipway::store::chunks::{ChunkError, ChunkStore, StoreHandle, UfsChunks};
use uapi::buffer::Buffer;
use uapi::mount::{Unmount, unmount};
use world::{Life, World, drop_cached, sample};

fn main() {
    let mib = std::env::args().filter_map(|arg| arg.parse().ok()).next().unwrap_or(256);
    let world = World::new("bench");
    let sample = sample(7, mib);
    world.put(&sample);
    let blob_name = sample.digest().to_string();

    for through in ["blob", "erofs"] {
        let _ = std::fs::remove_dir_all(&world.cache);
        let life = world.begin();
        let (dir, device) = world.mount_packs();
        let fuse = life.serve(device, Begin::New(Box::new(|_| ())), &[&sample]);
        let blob = dir.join(&blob_name);
        let path = if through == "erofs" { world.mount_image(&sample, &blob, "image") } else { blob.clone() };
        let forget = || {
            drop_cached(&path);
            drop_cached(&blob);
        };
        drop_cached(&world.pack_file(&sample));
        report(through, "cold, in order", mib, || in_order(&path));
        life.engine.flush();
        forget();
        report(through, "cached, in order", mib, || in_order(&path));
        forget();
        let times = random(&path, sample.bytes.len(), 4096, 20_000, 0);
        println!("{through:6} cached, 4 KiB random: {}", percentiles(times));
        if through == "blob" {
            forget();
            println!("{through:6} cached, 4 KiB random, O_DIRECT: {}", percentiles(random_direct(&path, sample.bytes.len(), 20_000)));
        }
        println!("{through:6} {} store reads, {} units", life.metrics.store_reads.get(), life.metrics.units_filled.get());
        if through == "erofs" {
            unmount(path.parent().expect("a mount point"), Unmount::Detach).expect("unmounted");
        }
        unmount(&dir, Unmount::Detach).expect("unmounted");
        fuse.stop();
        life.engine.stop();
    }
    units_and_latencies(mib / 2);
}

/// A store that takes `latency` longer for every read.
struct Far {
    near: UfsChunks,
    latency: Duration,
}

impl ChunkStore for Far {
    async fn read(&self, pack: &Digest, offset: u64, buffer: Buffer) -> Result<Buffer, ChunkError> {
        // The runtime's clock ticks in milliseconds, which is too coarse here.
        let (arrived, latency, (tx, rx)) = (Instant::now(), self.latency, tokio::sync::oneshot::channel());
        if !latency.is_zero() {
            std::thread::spawn(move || {
                std::thread::sleep(latency.saturating_sub(arrived.elapsed()));
                drop(tx);
            });
            let _: Result<(), _> = rx.await;
        }
        self.near.read(pack, offset, buffer).await
    }

    fn forget(&self, pack: &Digest) {
        self.near.forget(pack);
    }
}

/// One line per unit size and latency: reading in order; and 8 threads reading 32 KiB at random places, with what that made the store give.
fn units_and_latencies(mib: usize) {
    const READS: usize = 250;
    println!("units  latency  in order   8 x {READS} random reads of 32 KiB: time, bytes from the store, reads of the store");
    let bytes = Sample::mixed(7, mib << 20).bytes;
    for bits in 16..=20 {
        let sample = Sample::of(bytes.clone(), UnitBits::new(bits).expect("a unit size"));
        for micros in [0, 200, 1000, 5000] {
            let world = World::new("bench");
            world.put(&sample);
            let store = Arc::new(StoreHandle::new(world.store.clone()));
            let far = move || Far { near: UfsChunks::new(Arc::clone(&store)), latency: Duration::from_micros(micros) };
            let in_order_rate = with_image(&world, &sample, far.clone(), |path, _| {
                let start = Instant::now();
                in_order(path);
                mib as f64 / start.elapsed().as_secs_f64()
            });
            std::fs::remove_dir_all(&world.cache).expect("the cache");
            let (took, stored, reads) = with_image(&world, &sample, far, |path, life| {
                let start = Instant::now();
                std::thread::scope(|scope| {
                    for thread in 0..8 {
                        let len = sample.bytes.len();
                        scope.spawn(move || random(path, len, 32 << 10, READS, thread));
                    }
                });
                (start.elapsed(), life.metrics.store_bytes.get() >> 20, life.metrics.store_reads.get())
            });
            println!("{:4}K  {micros:5}us  {in_order_rate:4.0} MiB/s   {took:5.2?}, {stored} MiB, {reads}", 1 << (bits - 10));
        }
    }
}

/// Does `work` with a cold image mounted over `chunks`.
fn with_image<S: ChunkStore + 'static, T>(
    world: &World,
    sample: &Sample,
    chunks: impl Fn() -> S + Clone + Send + 'static,
    work: impl FnOnce(&Path, &Life) -> T,
) -> T {
    let life = world.begin_over(chunks);
    let (dir, device) = world.mount_packs();
    let fuse = life.serve(device, Begin::New(Box::new(|_| ())), &[sample]);
    let path = world.mount_image(sample, &dir.join(sample.digest().to_string()), "image");
    let result = work(&path, &life);
    unmount(path.parent().expect("a mount point"), Unmount::Detach).expect("unmounted");
    unmount(&dir, Unmount::Detach).expect("unmounted");
    fuse.stop();
    life.engine.stop();
    result
}

fn report(through: &str, what: &str, mib: usize, work: impl FnOnce()) {
    let (start, cpu) = (Instant::now(), cpu_seconds());
    work();
    let (took, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    println!("{through:6} {what}: {:.0} MiB/s, {:.2} ms of CPU per MiB", mib as f64 / took, cpu * 1000.0 / mib as f64);
}

/// User and system time of this process so far (`proc_pid_stat(5)`, fields 14 and 15, in ticks of 10 ms).
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("procfs");
    let after_name = stat.rsplit(") ").next().expect("a name in brackets");
    after_name.split(' ').skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

fn in_order(path: &Path) {
    let mut file = File::open(path).expect("the file");
    let mut buffer = vec![0; 1 << 20];
    while file.read(&mut buffer).expect("bytes") > 0 {}
}

/// `count` reads of `size` bytes, a power of two, at random multiples of it.
fn random(path: &Path, len: usize, size: usize, count: usize, seed: u64) -> Vec<Duration> {
    let file = File::open(path).expect("the file");
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).expect("advice");
    timed(&file, len, size, count, seed)
}

fn random_direct(path: &Path, len: usize, count: usize) -> Vec<Duration> {
    timed(&OpenOptions::new().read(true).custom_flags(0o40000).open(path).expect("the file"), len, 4096, count, 0)
}

fn timed(file: &File, len: usize, size: usize, count: usize, seed: u64) -> Vec<Duration> {
    let mut page = Buffer::new(size);
    let mut state = seed;
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = (state >> 20) % (len / size) as u64 * size as u64;
        let start = Instant::now();
        file.read_exact_at(&mut page, at).expect("bytes");
        times.push(start.elapsed());
    }
    times
}

fn percentiles(mut times: Vec<Duration>) -> String {
    times.sort();
    let at = |p: usize| times[(times.len() - 1) * p / 100];
    format!("p50 {:?}, p90 {:?}, p99 {:?}", at(50), at(90), at(99))
}
