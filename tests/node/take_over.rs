//! What is mounted goes on whatever the next worker finds: a full disk, another configuration.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use slipway::oci::ChainId;
use slipway::store::SigningKey;
use testbed::{LoopFs, Scratch, Slipwayd, SlipwaydConfig, need, require, wait_until};

use crate::made_store::{FILE_LEN, content, make_store, name};
use crate::view::View;

const FILES: u64 = 6;
const PATIENCE: Duration = Duration::from_secs(60);

macro_rules! require_kernel {
    () => {
        require!(need::root(), need::file_backed_erofs(), need::file_system("overlay"), need::path("/dev/fuse"), need::command("mkfs.ext4"));
    };
}

fn make_image(scratch: &Scratch) -> (ChainId, SlipwaydConfig) {
    let key = SigningKey::load_or_create(&scratch.join("key")).expect("a key");
    let chain = make_store(&scratch.join("store"), &key, FILES);
    let mut config = SlipwaydConfig::new(&scratch.join("store"), [scratch.join("key.pub")]);
    config.backend = "fuse-blob".into();
    (chain, config)
}

fn assert_file(slipwayd: &Slipwayd, view: &View, file: u64) {
    let read = fs::read(view.at.join(name(file))).unwrap_or_else(|error| panic!("{}: {error}\n{}", name(file), slipwayd.log()));
    assert!(read == content(file), "{} differs", name(file));
}

/// Does something that ends the worker, and waits for another.
fn until_next_worker(slipwayd: &mut Slipwayd, end: impl FnOnce(&mut Slipwayd)) {
    let old = slipwayd.worker().expect("a worker");
    end(slipwayd);
    wait_until("another worker runs", PATIENCE, || Ok(slipwayd.worker().filter(|new| *new != old))).expect("the holder starts another");
}

fn fill(disk: &Path) {
    let mut filler = File::create(disk.join("filler")).expect("a file");
    for size in [1 << 20, 4096, 1] {
        let bytes = vec![1; size];
        while filler.write_all(&bytes).is_ok() {}
    }
}

#[test]
fn mounts_go_on_when_a_worker_dies_while_the_state_disk_is_full() {
    require_kernel!();
    let scratch = Scratch::new("take-over-full").expect("a scratch directory");
    let (chain, config) = make_image(&scratch);
    let disk = LoopFs::new(&scratch.join("node"), 64 << 20).expect("a disk of its own");
    let mut slipwayd = Slipwayd::start(disk.path(), &config).expect("slipwayd starts");
    let view = View::mount(&slipwayd, &chain, scratch.join("view"));
    assert_file(&slipwayd, &view, 0);
    // A trial mount needs room for this.
    fs::remove_dir_all(slipwayd.state().join("probe")).expect("removed");
    fill(disk.path());
    for file in 1..FILES {
        until_next_worker(&mut slipwayd, |slipwayd| _ = slipwayd.kill_worker().expect("a worker to kill"));
        assert_file(&slipwayd, &view, file);
    }
    fs::remove_file(disk.path().join("filler")).expect("removed");
    slipwayd.wait_ready().expect("it serves containerd when there is room again");
    drop(view);
}

#[test]
fn mounts_go_on_when_the_configuration_chooses_another_backend() {
    require_kernel!();
    let scratch = Scratch::new("take-over-config").expect("a scratch directory");
    let (chain, config) = make_image(&scratch);
    let mut slipwayd = Slipwayd::start(&scratch.join("node"), &config).expect("slipwayd starts");
    let view = View::mount(&slipwayd, &chain, scratch.join("view"));
    let half_read = File::open(view.at.join(name(0))).expect("a file");
    let text = fs::read_to_string(slipwayd.config()).expect("its configuration");
    fs::write(slipwayd.config(), text.replace("\"fuse-blob\"", "\"fscache\"")).expect("a changed configuration");
    let reload = |slipwayd: &mut Slipwayd| slipwayd.signal(Signal::HUP).expect("the holder lives");
    for file in 1..3 {
        until_next_worker(&mut slipwayd, reload);
        assert_file(&slipwayd, &view, file);
    }
    let mut byte = [0];
    std::os::unix::fs::FileExt::read_exact_at(&half_read, &mut byte, FILE_LEN as u64 - 1).expect("open files are read on");
    assert_eq!(byte[0], *content(0).last().expect("a byte"));
    slipwayd.wait_ready().expect("ready");
    drop(half_read);
    drop(view);

    // Nothing reads through it any more, and nothing new shall.
    let packs = slipwayd.state().join("packs");
    let mounts = slipwayd.state().join("mounts");
    wait_until("the image is unmounted", PATIENCE, || Ok(fs::read_dir(&mounts)?.next().is_none().then_some(()))).expect("nothing uses it");
    until_next_worker(&mut slipwayd, reload);
    wait_until("the directory of packs is gone", PATIENCE, || Ok((!uapi::mount::is_mount_point(&packs)?).then_some(()))).expect("of no use");
    slipwayd.wait_ready().expect("ready");
}
