//! Tests of the whole data path over its fakes: fake kernel above, fake store and fake disk below.

use std::io;

use proptest::prelude::*;

use super::*;
use crate::cache::fake::{FakeDisk, Sample};
use crate::cache::presence::Saved;
use crate::kernel::Wants;
use crate::kernel::fake::FakeKernel;
use crate::store::chunks::{FakeChunks, Fault};

const UNIT: u64 = 65_536;

/// A deadline that tests wait for, and a healthy read keeps also on a machine with far more to do than it has CPUs.
const SHORT: Duration = Duration::from_secs(5);

/// One life of a worker.
struct Life {
    kernel: FakeKernel,
    engine: Arc<Engine>,
    pack: Arc<Pack>,
    sample: Sample,
}

/// What outlives a worker: the store and the disk.
#[derive(Clone)]
struct World {
    sample: Sample,
    chunks: FakeChunks,
    disk: FakeDisk,
}

impl World {
    fn new(sample: Sample) -> World {
        let world = World { chunks: FakeChunks::new(), disk: FakeDisk::default(), sample };
        world.chunks.put(world.sample.digest(), world.sample.file.clone());
        world
    }

    fn begin(&self, wants: Wants) -> Life {
        self.begin_with(wants, Duration::from_secs(20))
    }

    fn begin_with(&self, wants: Wants, deadline: Duration) -> Life {
        let (chunks, disk) = (self.chunks.clone(), self.disk.clone());
        let limits = Limits { deadline, store_reads: 4 };
        let seams = move || (chunks.clone(), disk.clone());
        let engine = Engine::with_seams(2, 2, limits, Arc::new(Metrics::new("test")), None, seams).unwrap();
        let saved = self.saved();
        let pack = self.sample.pack_with(&saved);
        engine.packs().insert(pack.digest(), Arc::clone(&pack));
        let kernel = FakeKernel::new(wants, self.disk.clone(), Arc::clone(&engine) as Arc<dyn Serve>);
        Life { kernel, engine, pack, sample: self.sample.clone() }
    }

    fn saved(&self) -> Saved {
        self.disk.map(&self.sample.digest(), self.sample.pack().table().unit_count())
    }

    fn store_reads(&self) -> usize {
        self.chunks.log().len()
    }
}

impl Life {
    fn read(&self, offset: u64, len: u32) -> Result<(), Errno> {
        self.kernel.read(&self.sample, &self.pack, offset, len)
    }

    fn all(&self) -> Result<(), Errno> {
        (0..self.pack.len().div_ceil(131_072)).try_for_each(|step| {
            let offset = step * 131_072;
            self.read(offset, 131_072.min(self.pack.len() - offset) as u32)
        })
    }
}

/// Waits, far longer than it takes on the busiest machine.
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited in vain: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn bytes_are_right_wherever_an_ask_begins_and_ends() {
    for wants in [Wants::Bytes, Wants::Stored] {
        let life = World::new(Sample::mixed(1, 10 * UNIT as usize + 8192)).begin(wants);
        for (offset, len) in
            [(0, 1), (UNIT - 1, 2), (3 * UNIT, 65_536), (5 * UNIT + 7, 200_000), (10 * UNIT, 8192), (10 * UNIT + 8191, 1), (0, 663_552)]
        {
            assert_eq!(life.read(offset, len), Ok(()), "{len} from {offset}");
        }
        assert_eq!(life.read(10 * UNIT, 8193), Err(Errno::INVAL));
        life.engine.stop();
    }
}

#[test]
fn however_many_ask_a_unit_is_fetched_once() {
    let world = World::new(Sample::mixed(2, 4 * UNIT as usize));
    world.chunks.fault(0, Fault::Delay(Duration::from_millis(100)));
    let life = world.begin(Wants::Bytes);
    let ids: Vec<_> = (0..64).map(|i| life.kernel.ask(&life.sample, &life.pack, i * 1000, 1000)).collect();
    for id in ids {
        assert_eq!(life.kernel.wait(id), Ok(()));
    }
    life.engine.stop();
    assert_eq!(world.store_reads(), 1);
    assert_eq!(life.engine.metrics.units_filled.get(), 1);
}

#[test]
fn a_missing_range_is_one_store_read() {
    let world = World::new(Sample::mixed(3, 16 * UNIT as usize));
    let life = world.begin(Wants::Bytes);
    assert_eq!(life.read(0, 1 << 20), Ok(()));
    assert_eq!(world.store_reads(), 1);
}

#[test]
fn a_sequential_reader_finds_its_bytes_there() {
    let world = World::new(Sample::mixed(4, 400 * UNIT as usize));
    let life = world.begin(Wants::Bytes);
    life.all().unwrap();
    life.engine.stop();
    let reads = world.store_reads();
    assert!(reads < 40, "{reads} store reads for 400 units");
    assert_eq!(life.engine.metrics.units_filled.get(), 400);
}

#[test]
fn passing_faults_of_the_store_are_retried() {
    for fault in [Fault::Fail(io::ErrorKind::StaleNetworkFileHandle), Fault::Truncate, Fault::Corrupt] {
        for wants in [Wants::Bytes, Wants::Stored] {
            let world = World::new(Sample::noise(5, 4 * UNIT as usize));
            world.chunks.fault(0, fault);
            let life = world.begin(wants);
            assert_eq!(life.read(0, 200_000), Ok(()), "{fault:?}");
            assert_eq!(world.store_reads(), 2);
        }
    }
}

#[test]
fn lasting_faults_are_eio_and_leave_nothing_behind() {
    let check = |fault, wants| {
        let world = World::new(Sample::noise(6, UNIT as usize));
        world.chunks.always(Some(fault));
        let life = world.begin_with(wants, SHORT);
        assert_eq!(life.read(0, 4096), Err(Errno::IO), "{fault:?}");
        assert_eq!(world.disk.writes(), 0, "{fault:?}");
        world.chunks.always(None);
        assert_eq!(life.read(0, 4096), Ok(()), "{fault:?}, healed");
    };
    thread::scope(|scope| {
        for fault in [Fault::Fail(io::ErrorKind::NotFound), Fault::Truncate, Fault::Corrupt, Fault::Hang] {
            for wants in [Wants::Bytes, Wants::Stored] {
                scope.spawn(move || check(fault, wants));
            }
        }
    });
}

#[test]
fn a_hung_store_does_not_keep_cached_bytes_from_readers() {
    let world = World::new(Sample::noise(7, 40 * UNIT as usize));
    let life = world.begin_with(Wants::Bytes, SHORT);
    assert_eq!(life.read(0, 4096), Ok(()));
    world.chunks.always(Some(Fault::Hang));
    let hung: Vec<_> = (1..20).map(|i| life.kernel.ask(&life.sample, &life.pack, i * 2 * UNIT, 4096)).collect();
    assert_eq!(life.read(4096, 4096), Ok(()));
    for id in hung {
        assert_eq!(life.kernel.wait(id), Err(Errno::IO));
    }
}

#[test]
fn a_full_cache_disk_hides_nothing_from_who_wants_bytes() {
    let world = World::new(Sample::mixed(8, 4 * UNIT as usize));
    world.disk.refuse_writes(Some(io::ErrorKind::StorageFull));
    assert_eq!(world.begin(Wants::Bytes).all(), Ok(()));
    let life = world.begin(Wants::Stored);
    assert_eq!(life.read(0, 4096), Err(Errno::IO));
    world.disk.refuse_writes(None);
    assert_eq!(life.all(), Ok(()));
}

#[test]
fn the_next_life_uses_what_was_stored_and_checks_it_first() {
    let world = World::new(Sample::mixed(9, 8 * UNIT as usize));
    let first = world.begin(Wants::Bytes);
    assert_eq!(first.all(), Ok(()));
    first.engine.stop();
    assert!(first.engine.is_complete(&first.pack));
    let reads = world.store_reads();

    world.disk.rot(&world.sample.digest(), 3 * UNIT as usize + 77, 0x20);
    let second = world.begin(Wants::Bytes);
    assert!(!second.engine.is_complete(&second.pack), "nothing is relied on that this life has not seen");
    assert_eq!(second.all(), Ok(()));
    assert_eq!(world.store_reads(), reads + 1, "only the rotten unit is fetched");
    assert_eq!(second.engine.metrics.units_damaged.get(), 1);
    second.engine.stop();
    assert!(second.engine.is_complete(&second.pack));
    assert!(world.disk.holds(&world.sample.digest(), 0, &world.sample.bytes));
}

#[test]
fn what_a_failed_sync_lost_is_fetched_again() {
    for wants in [Wants::Bytes, Wants::Stored] {
        let world = World::new(Sample::mixed(13, 8 * UNIT as usize));
        let life = world.begin(wants);
        world.disk.lose_at_next_sync();
        assert_eq!(life.all(), Ok(()));
        life.engine.flush();
        life.engine.flush();
        world.disk.evict();
        assert_eq!(life.all(), Ok(()), "{wants:?}");
        life.engine.stop();
        assert!(life.engine.is_complete(&life.pack));
        assert_eq!(world.saved().present.count(), 8);
        assert!(world.disk.durable(&world.sample.digest()) == world.sample.bytes);
    }
}

#[test]
fn no_unit_is_overwritten_while_a_map_that_names_it_is_being_written() {
    let world = World::new(Sample::mixed(14, 4 * UNIT as usize));
    let life = world.begin(Wants::Bytes);
    world.disk.hold_maps(true);
    assert_eq!(life.read(0, 4096), Ok(()));
    let engine = Arc::clone(&life.engine);
    until("the unit is stored", || life.pack.units().is_ready(UnitIndex(0)));
    let flushing = thread::spawn(move || engine.flush());
    until("its map is being written", || world.disk.map_under_way());
    world.disk.fail_next_read();
    assert_eq!(life.read(0, 4096), Ok(()), "fetched again");
    // Time for the write to go wrong in; if it is too short, the test sees less.
    thread::sleep(Duration::from_millis(50));
    world.disk.hold_maps(false);
    flushing.join().expect("no panic");
    life.engine.stop();
    assert_eq!((world.disk.writes(), world.disk.overwrites()), (2, 0));
}

#[test]
fn rot_with_the_store_away_is_eio_and_heals() {
    let world = World::new(Sample::mixed(10, 2 * UNIT as usize));
    let first = world.begin(Wants::Bytes);
    first.all().unwrap();
    first.engine.stop();
    world.disk.rot(&world.sample.digest(), 5, 1);
    world.chunks.always(Some(Fault::Fail(io::ErrorKind::NotFound)));
    let second = world.begin(Wants::Bytes);
    assert_eq!(second.read(0, 4096), Err(Errno::IO));
    assert_eq!(second.read(UNIT, 4096), Ok(()));
    world.chunks.always(None);
    assert_eq!(second.read(0, 4096), Ok(()));
}

#[test]
fn a_stopped_engine_answers_eio() {
    let life = World::new(Sample::mixed(11, UNIT as usize)).begin(Wants::Bytes);
    life.engine.stop();
    assert_eq!(life.read(0, 1), Err(Errno::IO));
}

#[test]
fn an_ask_dropped_unanswered_is_a_panic_here_and_eio_for_the_reader() {
    struct Dropper(Arc<Metrics>);
    impl Serve for Dropper {
        fn submit(&self, ask: Ask) {
            let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(ask)));
            assert_eq!(dropped.is_err(), cfg!(debug_assertions));
        }
        fn look_ahead(&self, _: &Arc<Pack>, _: UnitIndex) {}
        fn forget(&self, _: &Arc<Pack>) {}
        fn metrics(&self) -> &Arc<Metrics> {
            &self.0
        }
    }
    let serve = Arc::new(Dropper(Arc::new(Metrics::new("test"))));
    let kernel = FakeKernel::new(Wants::Bytes, FakeDisk::default(), Arc::clone(&serve) as Arc<dyn Serve>);
    let sample = Sample::mixed(12, 4096);
    assert_eq!(kernel.read(&sample, &sample.pack(), 0, 1), Err(Errno::IO));
    assert_eq!(serve.0.asks_dropped.get(), 1);
}

fn any_fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        (0u64..5).prop_map(|ms| Fault::Delay(Duration::from_millis(ms))),
        Just(Fault::Fail(io::ErrorKind::TimedOut)),
        Just(Fault::Truncate),
        Just(Fault::Corrupt),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Bytes or EIO: the fake kernel checks every answer.
    #[test]
    fn any_asks_over_any_faults_get_the_right_bytes_or_an_error(
        seed: u64,
        units in 1usize..24,
        asks in proptest::collection::vec((0.0f64..1.0, 1u32..300_000), 1..40),
        faults in proptest::collection::vec((0usize..40, any_fault()), 0..12),
        stored: bool,
    ) {
        let world = World::new(Sample::mixed(seed, units * UNIT as usize - 4096));
        faults.into_iter().for_each(|(nth, fault)| world.chunks.fault(nth, fault));
        let life = world.begin(if stored { Wants::Stored } else { Wants::Bytes });
        let len = life.pack.len();
        let ids: Vec<_> = asks.iter().map(|&(at, count)| {
            let offset = (at * len as f64) as u64;
            life.kernel.ask(&life.sample, &life.pack, offset, u64::from(count).min(len - offset) as u32)
        }).collect();
        for id in ids {
            let _ = life.kernel.wait(id);
        }
        life.engine.stop();
        let map = world.saved();
        let durable = world.disk.durable(&world.sample.digest());
        for (unit, bytes) in (0..).zip(world.sample.bytes.chunks(UNIT as usize)) {
            let start = unit as usize * UNIT as usize;
            prop_assert!(!map.present.has(UnitIndex(unit)) || durable.get(start..start + bytes.len()) == Some(bytes), "unit {}", unit);
        }
    }

    /// Invariant 6: whenever the power fails, no unit that the map speaks of has other bytes than the image's. The second life reads
    /// everything through what the first one left.
    #[test]
    fn after_a_power_cut_the_map_tells_no_lies(
        seed: u64,
        units in 1usize..40,
        crash_at in 0usize..8,
        order in proptest::collection::vec((0.0f64..1.0, any::<bool>()), 1..30),
        rotten in proptest::option::of(0usize..40),
    ) {
        let world = World::new(Sample::mixed(seed, units * UNIT as usize));
        world.disk.crash_at(crash_at, seed);
        let life = world.begin(Wants::Bytes);
        for (at, flush) in order {
            // The disk may be gone, the bytes are not.
            prop_assert_eq!(life.read((at * life.pack.len() as f64) as u64, 1), Ok(()));
            if flush {
                life.engine.flush();
            }
        }
        life.engine.stop();
        world.disk.restart();
        let map = world.saved();
        let durable = world.disk.durable(&world.sample.digest());
        for (unit, bytes) in (0..).zip(world.sample.bytes.chunks(UNIT as usize)) {
            let start = unit as usize * UNIT as usize;
            prop_assert!(!map.present.has(UnitIndex(unit)) || durable.get(start..start + bytes.len()) == Some(bytes), "unit {}", unit);
        }
        if let Some(unit) = rotten {
            world.disk.rot(&world.sample.digest(), unit * UNIT as usize, 0xff);
        }
        let second = world.begin(Wants::Bytes);
        prop_assert_eq!(second.all(), Ok(()));
        second.engine.stop();
        prop_assert_eq!(world.disk.overwrites(), 0);
        prop_assert!(world.disk.holds(&world.sample.digest(), 0, &world.sample.bytes));
    }
}
