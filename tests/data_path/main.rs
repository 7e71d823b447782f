//! The data path through the real kernel: FUSE directory of packs, EROFS on top, a store directory below.

#![allow(clippy::unwrap_used, reason = "a test's own set-up")]

mod world;

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use slipway::cache::fake::Sample;
use slipway::cache::{Pack, UnitIndex};
use slipway::kernel::fuse_blob::{Begin, FuseBlob};
use slipway::kernel::{Ask, Serve};
use slipway::metrics::Metrics;
use testbed::{need, require, wait_until};
use uapi::fuse::Negotiated;
use uapi::mount::{Unmount, unmount};
use world::{World, drop_cached, sample};

const EIO: i32 = 5;

const PATIENCE: Duration = Duration::from_secs(60);

fn begin() -> Begin {
    Begin::New(Box::new(|_| ()))
}

/// Compares a file with what it should be: in order if `seed` is 0, else at random places.
fn compare(path: &Path, expected: &[u8], seed: u64) -> io::Result<()> {
    let file = File::open(path)?;
    if seed == 0 {
        let mut got = Vec::new();
        (&file).read_to_end(&mut got)?;
        assert!(got == expected, "{} differs", path.display());
        return Ok(());
    }
    let mut state = seed;
    for _ in 0..400 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = (state >> 20) as usize % expected.len();
        let len = ((state >> 8) as usize % 70_000).min(expected.len() - at);
        let mut got = vec![0; len];
        file.read_exact_at(&mut got, at as u64)?;
        assert!(got == expected[at..at + len], "{} differs in {len} bytes at {at}", path.display());
    }
    Ok(())
}

#[test]
fn eight_readers_get_the_packs_bytes_directly_and_through_erofs() {
    require!(need::root(), need::path("/dev/fuse"), need::file_backed_erofs());
    let world = World::new("bytes");
    let sample = sample(1, 48);
    world.put(&sample);
    let life = world.begin();
    let (dir, device) = world.mount_packs();
    let fuse = life.serve(device, begin(), &[&sample]);

    let listed: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(listed, [sample.digest().to_string()]);
    let blob = dir.join(&listed[0]);
    assert_eq!(fs::metadata(&blob).unwrap().len(), sample.bytes.len() as u64);
    assert_eq!(fs::metadata(dir.join("0".repeat(64))).unwrap_err().kind(), io::ErrorKind::NotFound);
    assert!(fs::write(dir.join("new"), b"x").is_err());

    let data = world.mount_image(&sample, &blob, "image");
    thread::scope(|scope| {
        for reader in 0..8 {
            let (path, bytes) = (if reader % 2 == 0 { &blob } else { &data }, &sample.bytes);
            scope.spawn(move || compare(path, bytes, reader / 2).unwrap());
        }
    });
    compare(&data, &sample.bytes, 0).unwrap();
    assert_eq!(life.metrics.asks_failed.get(), 0);

    // Readers have their bytes before these are written.
    let pack = life.engine.pack(&sample.digest()).unwrap();
    wait_until("the pack is complete", PATIENCE, || {
        life.engine.flush();
        Ok(life.engine.is_complete(&pack).then_some(()))
    })
    .unwrap();
    assert_eq!(life.metrics.units_filled.get(), 192, "every unit once");
    let direct = world.mount_image(&sample, &life.engine.local_file(&sample.digest()), "direct");
    compare(&direct, &sample.bytes, 0).unwrap();
    for at in [direct, data] {
        unmount(at.parent().unwrap(), Unmount::IfUnused).unwrap();
    }
    unmount(&dir, Unmount::IfUnused).unwrap();
    fuse.stop();
    life.engine.stop();
}

#[test]
fn damage_in_the_store_is_eio_until_it_is_healed() {
    require!(need::root(), need::path("/dev/fuse"), need::file_backed_erofs());
    let world = World::new("damage");
    let sample = sample(2, 4);
    world.put(&sample);
    let life = world.begin();
    let (dir, device) = world.mount_packs();
    let _fuse = life.serve(device, begin(), &[&sample]);
    let data = world.mount_image(&sample, &dir.join(sample.digest().to_string()), "image");

    let entry = *sample.pack().table().unit(5).unwrap();
    let at = entry.offset + u64::from(entry.stored_len) / 2;
    world.flip(&sample, at);
    let file = File::open(&data).unwrap();
    let mut got = vec![0; 4096];
    assert_eq!(file.read_exact_at(&mut got, 5 << 18).unwrap_err().raw_os_error(), Some(EIO));
    file.read_exact_at(&mut got, 9 << 18).unwrap();
    assert_eq!(got, sample.bytes[9 << 18..][..4096]);
    assert!(life.metrics.units_damaged.get() > 0);

    world.flip(&sample, at);
    compare(&data, &sample.bytes, 0).unwrap();
}

#[test]
fn the_next_worker_checks_the_cache_and_needs_no_store_for_what_is_right() {
    require!(need::root(), need::path("/dev/fuse"));
    let world = World::new("cached");
    let sample = sample(3, 4);
    world.put(&sample);
    let read = |world: &World, expect: &dyn Fn(io::Result<()>)| {
        let life = world.begin();
        let (dir, device) = world.mount_packs();
        let _fuse = life.serve(device, begin(), &[&sample]);
        expect(compare(&dir.join(sample.digest().to_string()), &sample.bytes, 0));
        unmount(&dir, Unmount::Detach).unwrap();
        life.engine.stop();
    };
    read(&world, &|outcome| outcome.unwrap());

    fs::rename(&world.store, world.scratch.join("away")).unwrap();
    read(&world, &|outcome| outcome.unwrap());

    let fill = File::options().write(true).open(world.cache.join("fill").join(sample.digest().to_string())).unwrap();
    fill.write_all_at(b"rot", 1 << 20).unwrap();
    read(&world, &|outcome| assert_eq!(outcome.unwrap_err().raw_os_error(), Some(EIO)));

    fs::rename(world.scratch.join("away"), &world.store).unwrap();
    read(&world, &|outcome| outcome.unwrap());

    fill.set_len(1 << 20).unwrap();
    read(&world, &|outcome| outcome.unwrap());
}

/// Takes requests and never answers, as a worker does that is about to be killed.
struct Doomed {
    metrics: Arc<Metrics>,
    taken: mpsc::Sender<()>,
}

impl Serve for Doomed {
    fn submit(&self, ask: Ask) {
        std::mem::forget(ask);
        self.taken.send(()).expect("the test listens");
    }
    fn look_ahead(&self, _: &Arc<Pack>, _: UnitIndex) {}
    fn forget(&self, _: &Arc<Pack>) {}

    fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }
}

#[test]
fn a_successor_answers_what_its_predecessor_left_unanswered() {
    require!(need::root(), need::path("/dev/fuse"));
    let world = World::new("takeover");
    let sample: Sample = sample(4, 4);
    world.put(&sample);
    let life = world.begin();
    let pack = life.engine.pack(&sample.digest()).unwrap();
    let (dir, device) = world.mount_packs();
    let kept = device.try_clone().unwrap();

    let (agree, agreed) = mpsc::channel();
    let (taken, was_taken) = mpsc::channel();
    let doomed = FuseBlob::new(device, Arc::new(Doomed { metrics: Arc::clone(&life.metrics), taken })).unwrap();
    doomed.attach(&pack).unwrap();
    doomed.serve(Begin::New(Box::new(move |negotiated: &Negotiated| agree.send(negotiated.to_bytes()).unwrap())), 2).unwrap();
    let blob = dir.join(sample.digest().to_string());
    let reader = thread::spawn({
        let (blob, expected) = (blob.clone(), sample.bytes.clone());
        move || compare(&blob, &expected, 0)
    });
    was_taken.recv_timeout(PATIENCE).expect("a read request");
    drop(doomed);

    let negotiated = Negotiated::from_bytes(&agreed.recv().unwrap()).unwrap();
    let _successor = life.serve(kept, Begin::TakenOver(negotiated), &[&sample]);
    reader.join().unwrap().unwrap();
    drop_cached(&blob);
    compare(&blob, &sample.bytes, 3).unwrap();
}
