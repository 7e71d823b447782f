//! Images are mounted once, improved when they can be, kept while used, and found again.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use slipway::image::catalog::Catalog;
use slipway::image::mounts::MountDir;
use slipway::image::{Images, ImagesOptions, Ways};
use slipway::metrics::Metrics;
use slipway::mount::{Lazy, PackDir, probe_file_backed};
use slipway::oci::ChainId;
use slipway::serve::{Engine, EngineOptions};
use slipway::store::{SigningKey, TrustFiles};
use testbed::{Scratch, need, require, wait_until};
use uapi::mount::{Unmount, mounts, unmount};

use crate::made_store::{NOTE, content, make_store, name};

const FILES: u64 = 3;
const PATIENCE: Duration = Duration::from_secs(60);

/// What stays when a worker ends: directories, and the connection that the holder keeps.
struct World {
    scratch: Scratch,
    chain: ChainId,
    kept: Arc<Mutex<Option<(OwnedFd, Vec<u8>)>>>,
}

/// What a worker has of images.
struct Worker {
    images: Images,
    engine: Arc<Engine>,
    packs: Arc<PackDir>,
}

impl World {
    fn new(name: &str) -> World {
        let scratch = Scratch::new(name).expect("a scratch directory");
        let key = SigningKey::load_or_create(&scratch.join("key")).expect("a key");
        let chain = make_store(&scratch.join("store"), &key, FILES);
        World { scratch, chain, kept: Arc::default() }
    }

    fn state(&self) -> PathBuf {
        self.scratch.join("state")
    }

    fn worker(&self) -> Worker {
        let (state, cache) = (self.state(), self.scratch.join("cache"));
        fs::create_dir_all(&state).expect("a state directory");
        let options =
            EngineOptions { store_dir: self.scratch.join("store"), cache_dir: cache, data_threads: 1, metrics: Arc::new(Metrics::new("fuse-blob")) };
        let engine = Engine::start(options).expect("an engine");
        let catalog = Arc::new(Catalog::new(self.scratch.join("store"), state.clone(), TrustFiles(vec![self.scratch.join("key.pub")])));
        let keep = {
            let kept = self.kept.clone();
            move |fd: std::os::fd::BorrowedFd<'_>, payload: &[u8]| {
                *kept.lock().expect("no panic") = Some((fd.try_clone_to_owned()?, payload.to_vec()));
                Ok(())
            }
        };
        let kept = self.kept.lock().expect("no panic").as_ref().map(|(fd, payload)| (fd.try_clone().expect("a copy"), payload.clone()));
        let (at, taken_over) = (state.join("packs"), kept.is_some());
        let opened = match kept {
            Some((fd, payload)) => PackDir::take_over(&at, fd, &payload, engine.clone()),
            None => PackDir::mount(&at, engine.clone(), Box::new(keep)),
        };
        let (packs, start) = opened.expect("a directory of packs");
        let mount_dir = MountDir::open(&state.join("mounts")).expect("mount points");
        let found = mount_dir.recover(&mounts().expect("the mount table"), |_| taken_over).expect("what was mounted");
        for image in found.values() {
            for pack in &image.packs {
                packs.attach(&engine.pack(pack).expect("a pack")).expect("attached");
            }
        }
        packs.serve(start).expect("serving");
        let packs = Arc::new(packs);
        let ways = Ways { direct: true, lazy: vec![packs.clone() as Arc<dyn Lazy>], ..Ways::default() };
        let images = Images::start(ImagesOptions { catalog, engine: engine.clone(), ways, mount_dir, found }).expect("images");
        Worker { images, engine, packs }
    }

    /// Where images are mounted, in mount order.
    fn mounted(&self) -> Vec<PathBuf> {
        let below = self.state().join("mounts");
        mounts().expect("the mount table").into_iter().map(|entry| entry.mount_point).filter(|at| at.starts_with(&below)).collect()
    }

    fn wait_until_unmounted(&self) {
        wait_until("everything is unmounted", PATIENCE, || Ok(self.mounted().is_empty().then_some(()))).expect("nothing uses it");
        wait_until("nothing is left", PATIENCE, || Ok(fs::read_dir(self.state().join("mounts"))?.next().is_none().then_some(()))).expect("clean");
    }
}

impl Worker {
    /// Ends in order, as at an upgrade.
    fn end(self) {
        drop(self.images);
        self.packs.stop();
        self.engine.stop();
    }
}

fn assert_content(at: &Path) {
    assert_eq!(fs::read_to_string(at.join(NOTE)).expect("the note"), NOTE);
    for file in 0..FILES {
        assert!(fs::read(at.join(name(file))).expect("a file") == content(file), "{} differs", name(file));
    }
}

macro_rules! require_kernel {
    () => {
        require!(need::root(), need::file_backed_erofs(), need::file_system("overlay"), need::path("/dev/fuse"));
    };
}

#[test]
fn the_trial_mount_works_here_and_leaves_nothing() {
    require_kernel!();
    let scratch = Scratch::new("images-probe").expect("a scratch directory");
    for _ in 0..2 {
        probe_file_backed(scratch.path()).expect("file-backed EROFS");
    }
    assert!(!uapi::mount::is_mount_point(&scratch.join("at")).expect("the mount table"));
}

#[test]
fn an_image_is_mounted_once_however_many_ask() {
    require_kernel!();
    let world = World::new("images-once");
    let worker = world.worker();
    assert!(wait_until("the chain is known", PATIENCE, || Ok(worker.images.known(&world.chain, Instant::now() + PATIENCE).ok())).is_ok());
    let paths: Vec<PathBuf> = std::thread::scope(|scope| {
        let asks: Vec<_> = (0..8).map(|_| scope.spawn(|| worker.images.mount(&world.chain).expect("mounted"))).collect();
        asks.into_iter().map(|ask| ask.join().expect("no panic")).collect()
    });
    assert_eq!(world.mounted(), paths[..1]);
    assert!(paths.iter().all(|path| *path == paths[0]));
    assert_content(&paths[0]);
    worker.images.release(&world.chain);
    world.wait_until_unmounted();
    worker.end();
}

#[test]
fn complete_packs_are_mounted_directly_beside_the_lazy_mount() {
    require_kernel!();
    let world = World::new("images-direct");
    let worker = world.worker();
    let lazy = worker.images.mount(&world.chain).expect("mounted");
    assert_content(&lazy);
    let direct = wait_until("the packs are complete", PATIENCE, || {
        worker.engine.flush();
        let at = worker.images.mount(&world.chain)?;
        Ok((at != lazy).then_some(at))
    })
    .expect("everything was read");
    assert_content(&direct);
    assert_eq!(worker.images.mount(&world.chain).expect("mounted"), direct);
    assert_eq!(world.mounted(), [lazy, direct.clone()], "who started on the lazy mount stays there");
    worker.end();

    // Nobody serves any more, and the direct mount does not care.
    assert_content(&direct);
    let worker = world.worker();
    assert_eq!(worker.images.mount(&world.chain).expect("mounted"), direct);
    worker.images.release(&world.chain);
    world.wait_until_unmounted();
    worker.end();
}

/// Files below these directories that this process has open.
fn open_below(dirs: &[PathBuf]) -> usize {
    let open = fs::read_dir("/proc/self/fd").expect("the open files").filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
    open.filter(|path| dirs.iter().any(|dir| path.starts_with(dir))).count()
}

#[test]
fn a_released_image_keeps_no_file_open_and_what_was_verified_stays_known() {
    require_kernel!();
    let world = World::new("images-closed");
    let worker = world.worker();
    let (serve, dirs) = (world.scratch.join("cache/serve"), [world.scratch.join("cache"), world.scratch.join("store/packs")]);
    for _ in 0..2 {
        let at = worker.images.mount(&world.chain).expect("mounted");
        assert_content(&at);
        assert!(open_below(&dirs) > 0);
        worker.images.release(&world.chain);
        world.wait_until_unmounted();
        wait_until("the packs' files are closed", PATIENCE, || Ok((open_below(&dirs) == 0).then_some(()))).expect("nothing uses them");
    }
    for pack in fs::read_dir(serve).expect("the local files") {
        let name = pack.expect("a name").file_name().into_string().expect("a digest");
        let pack = worker.engine.pack(&name.parse().expect("a digest")).expect("a pack");
        assert!(worker.engine.is_complete(&pack), "it was read in this worker's life");
    }
    worker.end();
}

#[test]
fn the_next_worker_finds_images_and_unmounts_those_not_in_use() {
    require_kernel!();
    let world = World::new("images-recover");
    let worker = world.worker();
    let at = worker.images.mount(&world.chain).expect("mounted");
    worker.end();

    let worker = world.worker();
    worker.images.recover(vec![world.chain]);
    assert_content(&at);
    assert_eq!(worker.images.mount(&world.chain).expect("mounted"), at);
    worker.end();

    let worker = world.worker();
    worker.images.recover(Vec::new());
    world.wait_until_unmounted();
    worker.end();
}

#[test]
fn without_the_connection_old_mounts_are_detached_and_made_anew() {
    require_kernel!();
    let world = World::new("images-lost");
    let worker = world.worker();
    let at = worker.images.mount(&world.chain).expect("mounted");
    worker.end();
    *world.kept.lock().expect("no panic") = None;
    assert!(fs::read(at.join(name(0))).is_err(), "an error, never zeros");

    let worker = world.worker();
    worker.images.recover(vec![world.chain]);
    let at = worker.images.mount(&world.chain).expect("mounted");
    assert_content(&at);
    worker.images.release(&world.chain);
    world.wait_until_unmounted();
    worker.end();
}

#[test]
fn an_image_below_an_overlay_stays_mounted() {
    require_kernel!();
    let world = World::new("images-overlay");
    let worker = world.worker();
    let lower = worker.images.mount(&world.chain).expect("mounted");
    let (empty, merged) = (world.scratch.join("empty"), world.scratch.join("merged"));
    fs::create_dir(&empty).expect("a directory");
    fs::create_dir(&merged).expect("a directory");
    let lowers = format!("lowerdir={}:{}", empty.display(), lower.display());
    uapi::mount::mount_with_options("overlay", "overlay", &merged, &["ro".to_owned(), lowers]).expect("an overlay");
    worker.images.release(&world.chain);
    // Ending waits for the thread that unmounts, which takes in everything it was told first.
    worker.end();
    assert_eq!(world.mounted(), [lower]);
    let worker = world.worker();
    assert_content(&merged);
    unmount(&merged, Unmount::IfUnused).expect("unmounted");
    worker.images.recover(Vec::new());
    world.wait_until_unmounted();
    worker.end();
}
