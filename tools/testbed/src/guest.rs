//! The guest kernel: Linux 6.1 as an ordinary process, for what the running kernel lacks (cachefiles on-demand, NFS).

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::daemon::{Daemon, run};
use crate::scratch::Scratch;

/// Memory of the guest. The page cache of a test image and a worker with its buffers fit several times over.
const MEMORY: &str = "mem=1536M";
/// Size of each disk: sparse, so only what is written costs space.
const DISK_BYTES: u64 = 4 << 30;

/// A built guest kernel.
#[derive(Debug)]
pub struct GuestKernel {
    program: PathBuf,
}

impl GuestKernel {
    /// The kernel from the cache of `tools/guest-kernel/build.sh`, which builds it if need be (minutes).
    pub fn find() -> Result<GuestKernel> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-kernel/build.sh");
        let printed = run("bash", [script.as_os_str()]).context("the guest kernel cannot be built")?;
        Ok(GuestKernel { program: PathBuf::from(printed.trim()) })
    }

    /// Boots the guest with `init` as its first process and waits until it powers off; gives what its console showed.
    ///
    /// The host's files are the guest's root, read-only. `/dev/ubda` and `/dev/ubdb` are fresh ext4 disks. `env` reaches `init` as environment
    /// variables; values must be free of spaces (they travel on the kernel's command line). A guest that takes longer than `limit` is killed.
    pub fn run(&self, scratch: &Scratch, init: &Path, env: &[(&str, &str)], limit: Duration) -> Result<String> {
        let mut command = Command::new(&self.program);
        command.args([MEMORY, "rootfstype=hostfs", "root=/dev/root", "ro", "rootflags=/", "con=null", "con0=null,fd:1", "quiet"]);
        for unit in ["ubd0", "ubd1"] {
            let disk = scratch.join(format!("{unit}.img"));
            File::create(&disk).and_then(|file| file.set_len(DISK_BYTES)).with_context(|| format!("{} cannot be made", disk.display()))?;
            run("mkfs.ext4", [Path::new("-qF"), Path::new("-O"), Path::new("^has_journal"), &disk])?;
            command.arg(format!("{unit}={}", disk.display()));
        }
        command.arg(format!("init={}", init.display()));
        for (key, value) in env {
            ensure!(!value.contains(char::is_whitespace), "{key}={value:?} cannot travel on a kernel command line");
            command.arg(format!("{key}={value}"));
        }
        // User-Mode Linux keeps its memory in a file here and a socket per guest in $HOME/.uml.
        command.env("TMPDIR", scratch.path()).env("HOME", scratch.path());
        let log = scratch.join("console.log");
        let mut guest = Daemon::spawn("the guest kernel", &command, &log)?;
        let pid = guest.pid();
        crate::daemon::wait_until("the guest powers off", limit, || guest.ended())
            .with_context(|| format!("guest (pid {pid}) console:\n{}", guest.log()))?;
        fs::read_to_string(&log).or_else(|_| Ok(guest.log()))
    }
}
