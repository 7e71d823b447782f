//! A containerd of our own: private root, state, socket and plugins; the host's is never touched.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::cri::Cri;
use crate::daemon::{Daemon, children_of, output, run, wait_until};
use crate::mounts;

const START_LIMIT: Duration = Duration::from_secs(30);
/// A killed container's task is gone at once; containerd then needs a moment to see it.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// The namespace CRI keeps its images in.
const NAMESPACE: &str = "k8s.io";
/// Where every containerd's shims let runc keep the state of that namespace's containers.
const RUNC_STATE: &str = "/run/containerd/runc/k8s.io";

/// The snapshotter CRI pulls into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Snapshotter {
    /// containerd's own.
    Overlayfs,
    /// Slipway's, on this socket.
    Slipway(PathBuf),
}

impl Snapshotter {
    /// Its name in containerd.
    pub fn name(&self) -> &'static str {
        match self {
            Snapshotter::Overlayfs => "overlayfs",
            Snapshotter::Slipway(_) => "slipway",
        }
    }
}

/// A running containerd. Dropping it kills its containers, ends it and its shims, and unmounts what it mounted.
#[derive(Debug)]
pub struct Containerd {
    dir: PathBuf,
    snapshotter: Snapshotter,
    daemon: Daemon,
}

impl Containerd {
    /// Starts a containerd that keeps everything in `dir` (made if missing; a directory used before is used again) and waits until
    /// its CRI answers. Debian's `containerd` from PATH is taken, or the one in `$SLIPWAY_CONTAINERD_DIR` with its `ctr` and shim.
    pub fn start(dir: &Path, snapshotter: Snapshotter) -> Result<Containerd> {
        fs::create_dir_all(dir)?;
        fs::write(dir.join("config.toml"), config(dir, &snapshotter, major_version()?))
            .with_context(|| format!("{} cannot be written", dir.display()))?;
        let daemon = spawn(dir)?;
        let mut started = Containerd { dir: dir.to_path_buf(), snapshotter, daemon };
        started.wait_ready()?;
        Ok(started)
    }

    fn wait_ready(&mut self) -> Result<()> {
        let address = self.address();
        // CRI comes up after the socket: until then its calls answer "unknown service" or "not initialized".
        self.daemon.wait_until("its CRI answers", START_LIMIT, |_| Cri::connect(&address).ok()?.images().ok())?;
        Ok(())
    }

    /// Stops containerd itself (containers go on) and starts it again on the same directories.
    pub fn restart(&mut self) -> Result<()> {
        self.daemon.stop()?;
        self.daemon = spawn(&self.dir)?;
        self.wait_ready()
    }

    /// Its gRPC socket.
    pub fn address(&self) -> PathBuf {
        self.dir.join("containerd.sock")
    }

    /// The name of the snapshotter that CRI uses here.
    pub fn snapshotter(&self) -> &'static str {
        self.snapshotter.name()
    }

    /// The process id of containerd itself.
    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// What containerd has logged.
    pub fn log(&self) -> String {
        self.daemon.log()
    }

    /// A CRI client.
    pub fn cri(&self) -> Result<Cri> {
        Cri::connect(&self.address())
    }

    /// A `ctr` command in CRI's namespace, to be completed and run by the caller.
    pub fn ctr_command(&self) -> Command {
        let mut command = Command::new(program("ctr"));
        command.arg("--address").arg(self.address()).args(["--namespace", NAMESPACE]);
        command
    }

    /// Runs `ctr` with these arguments and returns what it printed; an error shows what it complained about.
    pub fn ctr(&self, args: &[&str]) -> Result<String> {
        let mut command = self.ctr_command();
        command.args(args);
        output(&mut command)
    }

    /// The `ctr run --rm` of an image that is already here, to be run by the caller; the container is removed when it ends.
    pub fn run_command(&self, image: &str, args: &[&str]) -> Command {
        let mut command = self.ctr_command();
        command.args(["run", "--rm", "--snapshotter", self.snapshotter(), image, &new_container_id()]).args(args);
        command
    }

    /// Runs a program in a new container of an image that is already here, and returns what it printed.
    pub fn run(&self, image: &str, args: &[&str]) -> Result<String> {
        output(&mut self.run_command(image, args))
    }

    /// Starts a container that stays, of an image that is already here, and returns its ID.
    pub fn run_detached(&self, image: &str, args: &[&str]) -> Result<String> {
        let id = new_container_id();
        output(self.ctr_command().args(["run", "-d", "--snapshotter", self.snapshotter(), image, &id]).args(args))?;
        Ok(id)
    }

    /// Mounts the read-only view of a committed snapshot (a chain ID, `sha256:…`) and shows where. Unmounted and removed when the
    /// guard is dropped.
    pub fn view(&self, chain: &str) -> Result<View<'_>> {
        let hex: String = chain.chars().filter(char::is_ascii_alphanumeric).collect();
        let at = self.dir.join("views").join(&hex);
        fs::create_dir_all(&at)?;
        let view = View { containerd: self, key: format!("view-{hex}"), at };
        wait_until("the view stays", STOP_LIMIT, || {
            self.snapshots(&["view", &view.key, chain])?;
            // ctr gives a view no root label, so a garbage collection that happens to run now takes it away again.
            Ok(self.snapshots(&["label", &view.key, "containerd.io/gc.root=view"]).ok())
        })?;
        // ctr prints the mount commands rather than mounting: `mount -t overlay overlay /target -o index=off,lowerdir=…`
        let commands = self.snapshots(&["mounts", &view.at.to_string_lossy(), &view.key])?;
        ensure!(!commands.trim().is_empty(), "containerd gave no mounts for a view of {chain}");
        for line in commands.lines().filter(|line| !line.trim().is_empty()) {
            run("sh", ["-c", line]).with_context(|| format!("the view of {chain} cannot be mounted"))?;
        }
        Ok(view)
    }

    /// `ctr snapshots` for the snapshotter that CRI uses here.
    pub fn snapshots(&self, args: &[&str]) -> Result<String> {
        let mut all = vec!["snapshots", "--snapshotter", self.snapshotter()];
        all.extend_from_slice(args);
        self.ctr(&all)
    }

    fn end_containers(&self) -> Result<()> {
        let ids = self.ctr(&["tasks", "ls", "-q"])?;
        for id in ids.lines() {
            self.ctr(&["tasks", "rm", "-f", id])?;
        }
        for id in self.ctr(&["containers", "ls", "-q"])?.lines() {
            self.ctr(&["containers", "rm", id])?;
        }
        Ok(())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Whatever fails here (containerd may have been killed by the test) is made up for by ending the shims below.
        let _ = self.end_containers();
        let _ = self.daemon.stop();
        end_shims_below(&self.dir);
        mounts::unmount_below(&self.dir);
    }
}

/// A mounted read-only view of a snapshot; see [`Containerd::view`].
#[derive(Debug)]
pub struct View<'a> {
    containerd: &'a Containerd,
    key: String,
    at: PathBuf,
}

impl View<'_> {
    /// The root of the tree.
    pub fn path(&self) -> &Path {
        &self.at
    }
}

impl Drop for View<'_> {
    fn drop(&mut self) {
        mounts::unmount_below(&self.at);
        if let Err(error) = self.containerd.snapshots(&["rm", &self.key]) {
            eprintln!("{error:#}");
        }
    }
}

/// Debian's program, or the one in `$SLIPWAY_CONTAINERD_DIR` (for other versions of containerd, unpacked somewhere).
fn program(name: &str) -> PathBuf {
    std::env::var_os("SLIPWAY_CONTAINERD_DIR").map_or_else(|| PathBuf::from(name), |dir| PathBuf::from(dir).join(name))
}

fn spawn(dir: &Path) -> Result<Daemon> {
    let mut command = Command::new(program("containerd"));
    command.arg("--config").arg(dir.join("config.toml"));
    // containerd looks for its shim beside itself and in PATH, and for runc in PATH.
    let path = std::env::var("PATH").unwrap_or_default();
    let own = std::env::var("SLIPWAY_CONTAINERD_DIR").map(|dir| dir + ":").unwrap_or_default();
    command.env("PATH", format!("{own}{path}:/usr/sbin:/sbin"));
    Daemon::spawn("containerd", &command, &dir.join("containerd.log"))
}

/// containerd's defaults but for where things lie, the proxy plugin and the snapshotter's name.
fn config(dir: &Path, snapshotter: &Snapshotter, major: u32) -> String {
    let (name, dir) = (snapshotter.name(), dir.display());
    let mut text = format!(
        "version = {}\nroot = \"{dir}/root\"\nstate = \"{dir}/state\"\n\
         [grpc]\n  address = \"{dir}/containerd.sock\"\n\
         [ttrpc]\n  address = \"{dir}/containerd.sock.ttrpc\"\n\
         [plugins.\"io.containerd.internal.v1.opt\"]\n  path = \"{dir}/opt\"\n",
        if major < 2 { 2 } else { 3 }
    );
    if let Snapshotter::Slipway(socket) = snapshotter {
        text += &format!("[proxy_plugins.slipway]\n  type = \"snapshot\"\n  address = \"{}\"\n", socket.display());
    }
    if major < 2 {
        text += &format!(
            "[plugins.\"io.containerd.grpc.v1.cri\"]\n  restrict_oom_score_adj = true\n\
             [plugins.\"io.containerd.grpc.v1.cri\".cni]\n  conf_dir = \"{dir}/cni\"\n\
             [plugins.\"io.containerd.grpc.v1.cri\".containerd]\n  snapshotter = \"{name}\"\n"
        );
        return text;
    }
    // NRI's socket is the same for all containerds of a machine.
    text += &format!(
        "[plugins.\"io.containerd.nri.v1.nri\"]\n  disable = true\n\
         [plugins.\"io.containerd.cri.v1.runtime\"]\n  restrict_oom_score_adj = true\n\
         [plugins.\"io.containerd.cri.v1.runtime\".cni]\n  conf_dir = \"{dir}/cni\"\n\
         [plugins.\"io.containerd.cri.v1.images\"]\n  snapshotter = \"{name}\"\n\
         [[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n  platform = \"{}\"\n  snapshotter = \"{name}\"\n",
        platform()
    );
    text
}

/// This machine as containerd writes it. containerd 2 pulls through its transfer service, which unpacks only for what it is told to.
fn platform() -> String {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    format!("linux/{architecture}")
}

/// The major version of the containerd that is used: 2 and later have another configuration.
fn major_version() -> Result<u32> {
    // containerd github.com/containerd/containerd/v2 2.1.9 …
    let said = output(Command::new(program("containerd")).arg("--version"))?;
    let version = said.split_whitespace().nth(2).unwrap_or_default();
    let major = version.trim_start_matches('v').split('.').next().unwrap_or_default();
    major.parse().with_context(|| format!("containerd says no version: {said}"))
}

/// A containerd's helper that keeps one container.
#[derive(Debug)]
struct Shim {
    process: Pid,
    container: String,
}

impl Shim {
    /// Ends the container, so that nothing of it is left on the machine, and then the shim.
    fn end(&self) {
        // What has ended meanwhile is no error; what does not end shows in the shims that stay.
        let _ = run("runc", ["--root", RUNC_STATE, "delete", "--force", &self.container]);
        for container in children_of(self.process) {
            let _ = kill_process(container, Signal::KILL);
        }
        let _ = kill_process(self.process, Signal::KILL);
    }
}

/// Ends what containerds in `dir` left running: containers and their shims.
pub(crate) fn end_shims_below(dir: &Path) {
    let ended = wait_until("the shims have ended", STOP_LIMIT, || {
        let shims = shims_below(dir);
        shims.iter().for_each(Shim::end);
        Ok(shims.is_empty().then_some(()))
    });
    if let Err(error) = ended {
        eprintln!("{error:#}");
    }
}

/// The shims that serve a containerd in `dir`: their command line names its socket, which lies in a directory only we use.
fn shims_below(dir: &Path) -> Vec<Shim> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let shim = |pid: i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let args: Vec<&OsStr> = line.split(|&byte| byte == 0).map(OsStr::from_bytes).collect();
        let (program, args) = args.split_first()?;
        let ours = program.as_bytes().ends_with(b"containerd-shim-runc-v2") && args.iter().any(|arg| Path::new(arg).starts_with(dir));
        let id = args.windows(2).find(|pair| pair[0] == "-id").map(|pair| pair[1].to_string_lossy().into_owned());
        Some(Shim { process: Pid::from_raw(pid)?, container: id? }).filter(|_| ours)
    };
    pids.filter_map(shim).collect()
}

/// An ID no other container on this machine has: runc keeps its state in one place for all containerds, by namespace and ID.
fn new_container_id() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("slipway-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Compression, Entry, Image, Layer, Layout, Registry, Scratch, TreeDigest, need, require};

    fn busybox_image(scratch: &Scratch, registry: &Registry) -> (String, crate::BuiltImage) {
        let busybox = fs::read("/bin/busybox").expect("busybox-static is installed");
        let base = Layer::new([
            Entry::dir("bin").mode(0o755),
            Entry::file("bin/busybox", busybox).mode(0o755),
            Entry::symlink("bin/sh", "busybox"),
            Entry::dir("etc"),
            Entry::file("etc/motd", b"from the base".to_vec()),
            Entry::file("etc/gone", b"removed above".to_vec()),
        ]);
        let top = Layer::new([
            Entry::file("etc/motd", b"from the top".to_vec()).owner(1000, 1001).mtime(1_700_000_000, 123_456_789),
            Entry::whiteout("etc/gone"),
        ]);
        let layout = Layout::create(&scratch.join("layout")).expect("a layout");
        let image = Image::new().layer(&base, Compression::Gzip).layer(&top, Compression::Zstd);
        let built = layout.add("test", &image).expect("an image");
        let reference = registry.reference("busybox:test");
        layout.push("test", &reference).expect("a push");
        (reference, built)
    }

    #[test]
    fn an_image_is_pulled_through_cri_run_and_looked_at() {
        require!(need::containers(), need::path("/bin/busybox"));
        let scratch = Scratch::new("containerd").expect("a scratch directory");
        let registry = Registry::start(&scratch.join("registry")).expect("a registry");
        let (reference, built) = busybox_image(&scratch, &registry);
        let containerd = Containerd::start(&scratch.join("containerd"), Snapshotter::Overlayfs).expect("a containerd");
        let mut cri = containerd.cri().expect("a CRI client");

        let mark = registry.mark();
        cri.pull(&reference).expect("a pull");
        let fetched = registry.blob_bytes(mark);
        for layer in &built.layers {
            assert_eq!(fetched.get(&layer.digest).copied(), Some(layer.size), "an ordinary pull fetches each layer once: {fetched:?}");
        }
        assert_eq!(containerd.run(&reference, &["/bin/sh", "-c", "cat /etc/motd; ls /etc/gone"]).ok(), None, "ls fails");
        assert_eq!(containerd.run(&reference, &["/bin/sh", "-c", "cat /etc/motd"]).expect("a run"), "from the top");

        let view = containerd.view(built.top_chain()).expect("a view");
        let tree = TreeDigest::of(view.path()).expect("a tree");
        assert!(tree.get("etc/gone").is_none());
        let motd = tree.get("etc/motd").expect("it is there");
        assert_eq!((motd.uid, motd.gid, motd.mtime), (1000, 1001, (1_700_000_000, 123_456_789)));
        drop(view);

        cri.remove(&reference).expect("a removal");
        assert_eq!(cri.status(&reference).expect("an answer"), None);
    }

    #[test]
    fn nothing_of_a_dropped_containerd_is_left_while_a_container_runs() {
        require!(need::containers(), need::path("/bin/busybox"));
        let scratch = Scratch::new("containerd").expect("a scratch directory");
        let registry = Registry::start(&scratch.join("registry")).expect("a registry");
        let (reference, _) = busybox_image(&scratch, &registry);
        let containerd = Containerd::start(&scratch.join("containerd"), Snapshotter::Overlayfs).expect("a containerd");
        containerd.cri().expect("a CRI client").pull(&reference).expect("a pull");
        containerd.run_detached(&reference, &["/bin/busybox", "sleep", "600"]).expect("a running container");
        assert_eq!(shims_below(scratch.path()).len(), 1);
        drop(containerd);
        assert!(shims_below(scratch.path()).is_empty());
        assert!(!mounts::is_anything_mounted_below(scratch.path()));
    }

    #[test]
    fn the_sweep_ends_containers_whose_test_was_killed() {
        require!(need::containers(), need::path("/bin/busybox"));
        let scratch = Scratch::new("sweep").expect("a scratch directory");
        let registry = Registry::start(&scratch.join("registry")).expect("a registry");
        let (reference, _) = busybox_image(&scratch, &registry);
        let dead = scratch.make_dir("slipway-dead-1-0").expect("a directory");
        fs::write(scratch.join("slipway-dead-1-0.lock"), b"").expect("a lock file nobody holds");
        let mut containerd = Containerd::start(&dead.join("containerd"), Snapshotter::Overlayfs).expect("a containerd");
        containerd.cri().expect("a CRI client").pull(&reference).expect("a pull");
        containerd.run_detached(&reference, &["/bin/busybox", "sleep", "600"]).expect("a running container");
        containerd.daemon.kill();
        std::mem::forget(containerd);

        let shims = shims_below(&dead);
        let containers: Vec<Pid> = shims.iter().flat_map(|shim| children_of(shim.process)).collect();
        assert_eq!((shims.len(), containers.len()), (1, 1), "they outlive containerd");
        crate::scratch::sweep(scratch.path());
        // A process that has ended and that nobody waited for has no command line any more.
        let runs = |process: &Pid| fs::read(format!("/proc/{process}/cmdline")).is_ok_and(|line| !line.is_empty());
        wait_until("the container has ended", STOP_LIMIT, || Ok((!containers.iter().any(runs)).then_some(()))).expect("it was killed");
        assert!(shims_below(&dead).is_empty());
        assert!(!mounts::is_anything_mounted_below(&dead) && !dead.exists());
        assert!(!Path::new(RUNC_STATE).join(&shims[0].container).exists(), "runc has forgotten it");
    }
}
