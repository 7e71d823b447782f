//! The built node daemon, with directories of its own.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use tonic::codegen::http::uri::PathAndQuery;

use crate::binaries::binary;
use crate::cri::{client_runtime, grpc_channel};
use crate::daemon::{Daemon, children_of};
use crate::mounts;

const START_LIMIT: Duration = Duration::from_secs(30);

/// What a node daemon is started with; the rest of its configuration lies in its directory.
#[derive(Debug, Clone)]
pub struct SlipwaydConfig {
    /// The store's directory. It need not exist or be a store: a node must live with that.
    pub store: PathBuf,
    /// Files with trusted public keys.
    pub trusted_keys: Vec<PathBuf>,
    /// `auto`, `fuse-blob`, `fscache`.
    pub backend: String,
    /// Further lines of the configuration's top level (TOML).
    pub extra: String,
}

impl SlipwaydConfig {
    /// A node that uses `store` and trusts `keys`, backend `auto`.
    pub fn new(store: &Path, keys: impl IntoIterator<Item = PathBuf>) -> SlipwaydConfig {
        SlipwaydConfig { store: store.to_path_buf(), trusted_keys: keys.into_iter().collect(), backend: "auto".into(), extra: String::new() }
    }
}

/// A running node daemon (holder and worker). Dropping it ends both and unmounts what they mounted.
#[derive(Debug)]
pub struct Slipwayd {
    dir: PathBuf,
    daemon: Daemon,
}

impl Slipwayd {
    /// Starts `slipwayd` with state, cache, mounts and socket in `dir` (made if missing; one used before is used again), and waits
    /// until its socket answers calls.
    pub fn start(dir: &Path, config: &SlipwaydConfig) -> Result<Slipwayd> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let path = dir.join("config.toml");
        fs::write(&path, config_text(dir, config)).with_context(|| format!("{} cannot be written", path.display()))?;
        let mut command = Command::new(binary("slipwayd")?);
        command.args(["run", "--config"]).arg(&path);
        let daemon = Daemon::spawn("slipwayd", &command, &dir.join("slipwayd.log"))?;
        let mut started = Slipwayd { dir: dir.to_path_buf(), daemon };
        started.wait_ready()?;
        Ok(started)
    }

    /// Waits until the gRPC socket answers a call (any: an unknown one is answered too), as after the worker was killed.
    pub fn wait_ready(&mut self) -> Result<()> {
        let socket = self.socket();
        let runtime = client_runtime()?;
        self.daemon.wait_until("its socket answers", START_LIMIT, |_| runtime.block_on(answers(&socket)).then_some(()))
    }

    /// The snapshotter's socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("run/slipway.sock")
    }

    /// Its configuration file, for the daemon's own client commands.
    pub fn config(&self) -> PathBuf {
        self.dir.join("config.toml")
    }

    /// Where it keeps what must survive a restart.
    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// Where images are mounted now, as EROFS.
    pub fn images(&self) -> Vec<PathBuf> {
        let below = self.state().join("mounts");
        let images = mounts::list().into_iter().filter(|mount| mount.fs_type == "erofs" && mount.mount_point.starts_with(&below));
        images.map(|mount| mount.mount_point).collect()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        self.daemon.log()
    }

    /// The holder's process id.
    pub fn holder(&self) -> u32 {
        self.daemon.pid()
    }

    /// The worker's process id: the holder's child that was started with `worker`. None while no worker lives.
    pub fn worker(&self) -> Option<u32> {
        let holder = Pid::from_raw(i32::try_from(self.holder()).ok()?)?;
        let is_worker = |pid: &Pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|&byte| byte == 0).nth(1) == Some(b"worker")
        };
        let worker = children_of(holder).into_iter().find(is_worker)?;
        u32::try_from(worker.as_raw_pid()).ok()
    }

    /// Kills the worker with SIGKILL and returns its process id.
    pub fn kill_worker(&self) -> Result<u32> {
        let worker = self.worker().context("the holder has no worker")?;
        let pid = i32::try_from(worker).ok().and_then(Pid::from_raw).context("a process id is a positive i32")?;
        kill_process(pid, Signal::KILL).with_context(|| format!("worker {worker} cannot be killed"))?;
        Ok(worker)
    }

    /// Sends the holder a signal.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        self.daemon.signal(signal)
    }

    /// SIGTERM; returns when the holder has ended.
    pub fn stop(&mut self) -> Result<()> {
        self.daemon.stop().map(drop)
    }

    /// Whether the holder still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.daemon.ended(), Ok(None))
    }
}

impl Drop for Slipwayd {
    fn drop(&mut self) {
        let worker = self.worker();
        let _ = self.daemon.stop();
        // A holder that had to be killed leaves its worker to us.
        if let Some(pid) = worker.and_then(|pid| i32::try_from(pid).ok()).filter(|pid| started_from(*pid, &self.config())).and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
        mounts::unmount_below(&self.dir);
    }
}

/// Guards against a process id that was given to another process meanwhile.
fn started_from(pid: i32, config: &Path) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut args = line.split(|&byte| byte == 0);
    args.next().is_some_and(|program| program.ends_with(b"slipwayd")) && args.any(|arg| arg == config.as_os_str().as_encoded_bytes())
}

fn config_text(dir: &Path, config: &SlipwaydConfig) -> String {
    let dir = dir.display();
    let keys: Vec<String> = config.trusted_keys.iter().map(|key| format!("\"{}\"", key.display())).collect();
    format!(
        "version = 1\nstore = \"{}\"\nstate = \"{dir}/state\"\ncache = \"{dir}/state/cache\"\nrun = \"{dir}/run\"\n\
         socket = \"{dir}/run/slipway.sock\"\nbackend = \"{}\"\ntrusted_keys = [{}]\n{}\n",
        config.store.display(),
        config.backend,
        keys.join(", "),
        config.extra
    )
}

/// Whether a gRPC server answers on the socket. The method is one no server of ours has; "unimplemented" is an answer.
async fn answers(socket: &Path) -> bool {
    let Ok(channel) = grpc_channel(socket).await else { return false };
    let mut client = tonic::client::Grpc::new(channel);
    if client.ready().await.is_err() {
        return false;
    }
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    let answer = client.unary(tonic::Request::new(()), PathAndQuery::from_static("/slipway.Probe/Any"), codec).await;
    matches!(answer, Err(status) if status.code() == tonic::Code::Unimplemented)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_holds_what_the_node_needs_to_be_told() {
        let mut config = SlipwaydConfig::new(Path::new("/s"), ["/k1".into(), "/k2".into()]);
        config.extra = "log = \"debug\"".into();
        let text = config_text(Path::new("/d"), &config);
        for line in ["version = 1", "store = \"/s\"", "socket = \"/d/run/slipway.sock\"", "trusted_keys = [\"/k1\", \"/k2\"]", "log = \"debug\""] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}
