//! How fast the data path is on this machine: `cargo bench --bench data_path [-- MIB]`. Needs root and /dev/fuse.
//!
//! Prints one line per measurement. "cold": nothing cached; "cached": the local file is whole, the kernel's page caches are dropped.

#[allow(dead_code, reason = "the tests use the rest of it")]
#[path = "../tests/data_path/world.rs"]
mod world;

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use slipway::kernel::fuse_blob::Begin;
use uapi::buffer::Buffer;
use uapi::mount::{Unmount, unmount};
use world::{World, drop_cached, sample};

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
        let times = random(&path, sample.bytes.len(), 20_000);
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

fn random(path: &Path, len: usize, count: usize) -> Vec<Duration> {
    let file = File::open(path).expect("the file");
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).expect("advice");
    timed(&file, len, count)
}

fn random_direct(path: &Path, len: usize, count: usize) -> Vec<Duration> {
    timed(&OpenOptions::new().read(true).custom_flags(0o40000).open(path).expect("the file"), len, count)
}

fn timed(file: &File, len: usize, count: usize) -> Vec<Duration> {
    let mut page = Buffer::new(4096);
    let mut state = 1u64;
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = (state >> 20) % (len as u64 / 4096) * 4096;
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
