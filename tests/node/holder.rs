//! Holder and worker as a service manager sees them: restarts keep descriptors, signals do what the unit relies on.
//!
//! The store is missing throughout, which a node must live with.

use std::collections::HashMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use slipway::node::client::Client;
use testbed::{Scratch, binary, need, require, wait_until};
use uapi::mount::MountEntry;

/// Far more than a start takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A service manager with one service: its notification socket, its fd store, and the daemon.
struct Manager {
    scratch: Scratch,
    notify: UnixDatagram,
    stored: HashMap<String, OwnedFd>,
    daemon: Child,
}

impl Manager {
    fn start(name: &str) -> Manager {
        let scratch = Scratch::new(name).expect("a scratch directory");
        let config = format!(
            "version = 1\nstore = \"{dir}/no-store\"\nstate = \"{dir}/state\"\nrun = \"{dir}/run\"\ntrusted_keys = []\n",
            dir = scratch.path().display()
        );
        fs::write(scratch.join("config.toml"), config).expect("a configuration");
        let notify = UnixDatagram::bind(scratch.join("notify")).expect("a notification socket");
        notify.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        fs::copy(binary("slipwayd").expect("slipwayd is built"), scratch.join("slipwayd")).expect("a copy of the program");
        let daemon = command(scratch.path(), "exec \"$0\" run --config \"$1\"").stdin(Stdio::null()).spawn().expect("slipwayd starts");
        let mut manager = Manager { scratch, notify, stored: HashMap::new(), daemon };
        manager.wait_for("READY=1");
        // The connection is kept when the kernel's INIT comes, which on a busy machine may be after the daemon is ready for containerd.
        if !manager.stored.contains_key("fuse-blob") {
            manager.wait_for("FDNAME=fuse-blob");
        }
        manager
    }

    /// Starts the daemon again with what the fd store has, as the manager would: descriptors from 3 on, their names in the environment.
    fn start_again(&mut self) {
        let fd = |name: &str| self.stored[name].try_clone().expect("a copy");
        let (grpc, fuse) = (fd("grpc"), fd("fuse-blob"));
        let script = "exec 3<&0 4>&1 </dev/null >&2; LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=grpc:fuse-blob exec \"$0\" run --config \"$1\"";
        self.daemon = command(self.scratch.path(), script).stdin(grpc).stdout(fuse).spawn().expect("slipwayd starts");
        self.wait_for("READY=1");
    }

    /// Takes in notifications until one has this line.
    fn wait_for(&mut self, line: &str) {
        loop {
            let mut buffer = [0; 4096];
            let message = uapi::fdpass::receive(&self.notify, &mut buffer).unwrap_or_else(|error| panic!("no {line}: {error}\n{}", self.log()));
            let text = String::from_utf8_lossy(&buffer[..message.len]).into_owned();
            let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default().to_owned();
            if text.lines().any(|line| line == "FDSTORE=1") {
                let fd = message.fds.into_iter().next().expect("a descriptor");
                self.stored.insert(value("FDNAME="), fd);
            } else if text.lines().any(|line| line == "FDSTOREREMOVE=1") {
                self.stored.remove(&value("FDNAME="));
            }
            if text.lines().any(|candidate| candidate == line) {
                return;
            }
        }
    }

    fn worker(&self) -> Option<u32> {
        let holder = self.daemon.id();
        let children = fs::read_to_string(format!("/proc/{holder}/task/{holder}/children")).ok()?;
        children.split_whitespace().next()?.parse().ok()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.daemon), signal).expect("the holder lives");
    }

    /// Does something that ends the worker, and waits for the next to be ready.
    fn until_next_worker(&mut self, end: impl FnOnce(&Manager, u32)) -> u32 {
        let old = self.worker().expect("a worker");
        end(self, old);
        self.wait_for("READY=1");
        let new = self.worker().expect("another worker");
        assert_ne!(new, old);
        new
    }

    /// The listening socket as `process` has it open: the kernel's number of it.
    fn listener(&self, process: u32) -> String {
        let sockets = fs::read_to_string("/proc/net/unix").expect("the list of sockets");
        let path = self.scratch.join("run/slipway.sock");
        // Num RefCount Protocol Flags Type St Inode Path; accepted connections have the path as well, but not the flag of those that listen.
        let inode = |line: &str| match line.split_whitespace().collect::<Vec<_>>()[..] {
            [_, _, _, "00010000", _, _, inode, at] if Path::new(at) == path => Some(inode.to_owned()),
            _ => None,
        };
        let link = format!("socket:[{}]", sockets.lines().find_map(inode).expect("the socket listens"));
        let mut open = fs::read_dir(format!("/proc/{process}/fd")).expect("its descriptors").filter_map(Result::ok);
        assert!(open.any(|fd| fs::read_link(fd.path()).is_ok_and(|target| target == Path::new(&link))), "{process} has no {link}\n{}", self.log());
        link
    }

    /// The mount of the directory of packs.
    fn pack_dir(&self) -> Option<MountEntry> {
        let at = self.scratch.join("state/packs");
        uapi::mount::mounts().expect("the mount table").into_iter().find(|entry| entry.mount_point == at)
    }

    fn assert_serves(&self) {
        let socket = self.scratch.join("run/slipway.sock");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async { Client::connect(&socket).await?.ping().await }).expect("gRPC answers");
        let entries = fs::read_dir(self.scratch.join("state/packs")).expect("FUSE answers").count();
        assert_eq!(entries, 0, "no image, no packs");
    }

    fn log(&self) -> String {
        fs::read_to_string(self.scratch.join("log")).unwrap_or_default()
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("slipwayd's log:\n{}", self.log());
        }
        // Both fail only when it has ended already. The scratch directory unmounts what is left.
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn command(dir: &Path, script: &str) -> Command {
    let log = fs::File::options().create(true).append(true).open(dir.join("log")).expect("a log");
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "sh", "-c", script]).arg(dir.join("slipwayd")).arg(dir.join("config.toml"));
    command.env("NOTIFY_SOCKET", dir.join("notify")).stdout(Stdio::null()).stderr(log).process_group(0);
    command
}

macro_rules! require_kernel {
    () => {
        require!(need::root(), need::command("setpriv"), need::file_backed_erofs(), need::path("/dev/fuse"));
    };
}

#[test]
fn a_killed_worker_is_followed_by_one_with_the_same_descriptors() {
    require_kernel!();
    let mut manager = Manager::start("holder-kill");
    manager.assert_serves();
    let (listener, mounted) = (manager.listener(manager.worker().expect("a worker")), manager.pack_dir().expect("packs are mounted"));
    for _ in 0..3 {
        let new = manager.until_next_worker(|_, worker| {
            kill_process(Pid::from_raw(worker as i32).expect("a pid"), Signal::KILL).expect("the worker lives");
        });
        assert_eq!(manager.listener(new), listener);
        assert_eq!(manager.pack_dir().as_ref(), Some(&mounted), "the same mount of the same connection");
        manager.assert_serves();
    }
}

#[test]
fn a_removed_socket_is_there_again_with_the_next_worker() {
    require_kernel!();
    let mut manager = Manager::start("holder-socket");
    let mounted = manager.pack_dir();
    fs::remove_file(manager.scratch.join("run/slipway.sock")).expect("the socket");
    manager.until_next_worker(|manager, _| manager.signal(Signal::HUP));
    assert_eq!(manager.pack_dir(), mounted);
    manager.assert_serves();
}

#[test]
fn a_hangup_restarts_the_worker_in_order() {
    require_kernel!();
    let mut manager = Manager::start("holder-hup");
    let mounted = manager.pack_dir();
    manager.until_next_worker(|manager, _| manager.signal(Signal::HUP));
    assert_eq!(manager.pack_dir(), mounted);
    manager.assert_serves();
    assert!(manager.log().contains("the worker has ended in order"), "{}", manager.log());
}

#[test]
fn a_hangup_after_an_installation_upgrades_both_processes() {
    require_kernel!();
    let mut manager = Manager::start("holder-upgrade");
    let (mounted, listener) = (manager.pack_dir(), manager.listener(manager.daemon.id()));
    let program = manager.scratch.join("slipwayd");
    let running = |pid: u32| fs::metadata(format!("/proc/{pid}/exe")).expect("a program").ino();

    // A package manager's way: the new file takes the old one's name.
    fs::copy(binary("slipwayd").expect("slipwayd is built"), manager.scratch.join("new")).expect("a copy of the program");
    fs::rename(manager.scratch.join("new"), &program).expect("installed");
    let installed = fs::metadata(&program).expect("a program").ino();
    let worker = manager.until_next_worker(|manager, _| manager.signal(Signal::HUP));
    assert_eq!([running(manager.daemon.id()), running(worker)], [installed; 2]);
    assert_eq!((manager.pack_dir(), manager.listener(worker)), (mounted.clone(), listener.clone()));
    manager.assert_serves();

    // Where it cannot find again what is kept, it is not run.
    fs::copy(binary("slipwayd").expect("slipwayd is built"), manager.scratch.join("new")).expect("a copy of the program");
    fs::rename(manager.scratch.join("new"), &program).expect("installed");
    fs::remove_dir_all(manager.scratch.join("run/kept")).expect("removed");
    manager.until_next_worker(|manager, _| manager.signal(Signal::HUP));
    assert_eq!(running(manager.daemon.id()), installed);
    assert_eq!(manager.pack_dir(), mounted);
    manager.assert_serves();

    // One that does not work is left alone: the holder goes on, and runs as worker what it itself is.
    fs::write(manager.scratch.join("new"), "#!/bin/sh\nexit 1\n").expect("written");
    fs::set_permissions(manager.scratch.join("new"), fs::Permissions::from_mode(0o755)).expect("executable");
    fs::rename(manager.scratch.join("new"), &program).expect("installed");
    let worker = manager.until_next_worker(|manager, _| manager.signal(Signal::HUP));
    assert_eq!([running(manager.daemon.id()), running(worker)], [installed; 2]);
    assert_eq!((manager.pack_dir(), manager.listener(worker)), (mounted, listener));
    manager.assert_serves();
}

#[test]
fn stopping_leaves_mounts_and_ends_everything_else() {
    require_kernel!();
    let mut manager = Manager::start("holder-stop");
    let worker = manager.worker().expect("a worker");
    manager.signal(Signal::TERM);
    let status = manager.daemon.wait().expect("it ends");
    assert!(status.success(), "{status}\n{}", manager.log());
    assert!(!Path::new(&format!("/proc/{worker}")).exists());
    assert!(manager.pack_dir().is_some(), "the mount stays");
    manager.wait_for("STOPPING=1");
}

#[test]
fn what_the_service_manager_kept_outlives_holder_and_worker() {
    require_kernel!();
    let mut manager = Manager::start("holder-store");
    let (worker, mounted) = (manager.worker().expect("a worker"), manager.pack_dir().expect("packs are mounted"));
    let listener = manager.listener(worker);
    manager.daemon.kill().expect("the holder lives");
    manager.daemon.wait().expect("it ends");
    wait_until("the worker follows its holder", PATIENCE, || Ok((!Path::new(&format!("/proc/{worker}")).exists()).then_some(()))).expect("no orphan");

    manager.start_again();
    assert_eq!(manager.pack_dir(), Some(mounted), "the same mount of the same connection");
    assert_eq!(manager.listener(manager.worker().expect("a worker")), listener);
    manager.assert_serves();
}
