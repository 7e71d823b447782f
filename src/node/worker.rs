//! The worker: everything but keeping descriptors. It may be killed at any moment.
//!
//! ```text
//! kept descriptors → lock → engine → what is mounted → backends (take over) → packs attached → the kernel is answered
//!                  → images → snapshots → gRPC answers → "ready"
//! ```
//! In this order, because a reader that waited through the last worker's death is answered as soon as its pack is attached, and because containerd
//! must find nothing half ready.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use super::backends::{self, Running, TakeOverError};
use super::client::{Client, ClientError};
use super::holder::LISTENER;
use super::link::{HolderLink, KeptByName};
use super::protocol::FdName;
use crate::config::Config;
use crate::image::catalog::Catalog;
use crate::image::mounts::{MountDir, MountsError};
use crate::image::{Images, ImagesOptions};
use crate::metrics::Metrics;
use crate::serve::{Engine, EngineOptions, ServeError};
use crate::snapshot::{self, SnapshotError, Snapshots};
use crate::store::TrustFiles;

/// How long the worker before may take to be gone. It was killed or is past its last write; this only covers the kernel's cleaning up.
const TURN_WAIT: Duration = Duration::from_secs(10);

/// Time between looks at the lock.
const TURN_RETRY: Duration = Duration::from_millis(20);

/// Threads of the gRPC server. Its work is small; what may block runs elsewhere.
const RPC_THREADS: usize = 2;

/// How long calls under way may take when the worker is asked to end: less than what the holder waits before it kills.
const DRAIN: Duration = Duration::from_secs(3);

/// Longest path that `fsconfig` takes as an option's value (`strndup_user(_value, 256)`, `fs/fsopen.c`).
const OPTION_MAX: usize = 255;

/// Why a worker ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The holder is gone or talks nonsense.
    #[error("the holder does not hand over what it keeps: a worker is started by slipwayd, not by hand")]
    Holder(#[source] io::Error),
    /// The state directory cannot be used.
    #[error("the state directory {} cannot be used", path.display())]
    State {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The worker before does not end.
    #[error("another worker still holds {}", lock.display())]
    Turn {
        /// The lock.
        lock: PathBuf,
    },
    /// The state directory's path does not fit into a mount option.
    #[error("the state directory {} has too long a path: the kernel takes {OPTION_MAX} bytes for a file of {suffix} bytes more below it", path.display())]
    LongPath {
        /// The directory.
        path: PathBuf,
        /// What comes after it.
        suffix: usize,
    },
    /// The data path.
    #[error("serving file data cannot start")]
    Serve(#[from] ServeError),
    /// What is mounted.
    #[error("existing mounts cannot be taken over")]
    Mounts(#[from] MountsError),
    /// What the holder kept.
    #[error(transparent)]
    TakeOver(#[from] TakeOverError),
    /// Snapshots.
    #[error("the snapshotter cannot start")]
    Snapshots(#[from] SnapshotError),
    /// A part of the process itself: threads, signals, sockets.
    #[error("{what} failed")]
    Process {
        /// Which part.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The server does not answer itself.
    #[error("the gRPC server does not answer")]
    Mute(#[source] ClientError),
}

/// Works until asked to end. `holder` is the line to the holder.
pub fn run(config: &Config, holder: OwnedFd) -> Result<(), WorkerError> {
    uapi::process::die_with_parent().map_err(process("tying the worker's life to the holder's"))?;
    let (holder, mut kept) = HolderLink::open(holder).map_err(WorkerError::Holder)?;
    let holder = Arc::new(holder);
    let listener = take_listener(&mut kept)?;
    let state = state_dir(&config.state)?;
    let _turn = wait_for_turn(&state)?;

    let metrics = Arc::new(Metrics::new("fuse-blob"));
    let options = EngineOptions { store_dir: config.store.clone(), cache_dir: config.cache.clone(), data_threads: 0, metrics: metrics.clone() };
    let engine = Engine::start(options)?;
    let catalog = Arc::new(Catalog::new(config.store.clone(), state.clone(), TrustFiles(config.trusted_keys.clone())));
    let mount_dir = MountDir::open(&state.join("mounts"))?;
    let mounts = uapi::mount::mounts().map_err(process("reading the mount table"))?;
    backends::forget_dead(&mut kept, &holder);
    let found = mount_dir.recover(&mounts, |way| backends::alive(way, &kept))?;
    let (ways, running) = backends::start(config, &state, &engine, kept, &holder, &found).inspect_err(|_| _ = engine.stop())?;
    // From here on the kernel is answered: whatever ends this, what is under way is finished and saved.
    let images = Images::start(ImagesOptions { catalog, engine: engine.clone(), ways, mount_dir, found }).map_err(process("starting a thread"));
    let snapshots = images.and_then(|images| Ok(Snapshots::open(&state, Arc::new(images), metrics)?));
    let served = snapshots.and_then(|snapshots| serve(listener, snapshots, holder, &config.socket));
    stop(&running, &engine);
    served
}

fn stop(running: &Running, engine: &Engine) {
    running.stop();
    if engine.stop() {
        running.settle();
        tracing::info!("the worker has ended in order");
    } else {
        tracing::warn!("reads or writes under way do not end; leaving them to the next worker");
    }
}

fn serve(listener: std::os::unix::net::UnixListener, snapshots: Snapshots, holder: Arc<HolderLink>, socket: &Path) -> Result<(), WorkerError> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(RPC_THREADS).enable_all().build().map_err(process("starting the gRPC server's threads"))?;
    let served = runtime.block_on(serve_until_told(listener, snapshots, holder, socket));
    // Calls that hang in the store are left behind: the process ends.
    runtime.shutdown_background();
    served
}

async fn serve_until_told(
    listener: std::os::unix::net::UnixListener,
    snapshots: Snapshots,
    holder: Arc<HolderLink>,
    socket: &Path,
) -> Result<(), WorkerError> {
    let mut terminated = signal(SignalKind::terminate()).map_err(process("watching for SIGTERM"))?;
    let listener = UnixListener::from_std(listener).map_err(process("listening on the gRPC socket"))?;
    let (stop, stopped) = oneshot::channel::<()>();
    let mut server = tokio::spawn(snapshot::serve(listener, snapshots, async move { _ = stopped.await }));
    let mut client = Client::connect(socket).await.map_err(WorkerError::Mute)?;
    client.ping().await.map_err(WorkerError::Mute)?;
    drop(client);
    holder.ready().map_err(WorkerError::Holder)?;
    tracing::info!("ready");

    tokio::select! {
        _ = terminated.recv() => tracing::info!("asked to end"),
        () = holder_gone(holder) => tracing::warn!("the holder is gone; ending"),
        ended = &mut server => return outcome(ended),
    }
    // The server is gone only if it ended by itself, which the next line then tells.
    let _ = stop.send(());
    match tokio::time::timeout(DRAIN, server).await {
        Ok(ended) => outcome(ended),
        Err(_) => Ok(()),
    }
}

fn outcome(ended: Result<Result<(), SnapshotError>, tokio::task::JoinError>) -> Result<(), WorkerError> {
    let served = ended.map_err(|error| WorkerError::Process { what: "the gRPC server", source: io::Error::other(error) })?;
    Ok(served?)
}

/// Ends when the holder does.
async fn holder_gone(holder: Arc<HolderLink>) {
    let (gone, is_gone) = oneshot::channel();
    let watch = move || {
        holder.wait_for_end();
        // Nobody listens when the worker is ending for another reason.
        let _ = gone.send(());
    };
    match std::thread::Builder::new().name("holder".to_owned()).spawn(watch) {
        Ok(_) => _ = is_gone.await,
        // The kernel kills this process with the holder in any case.
        Err(_) => std::future::pending().await,
    }
}

fn take_listener(kept: &mut KeptByName) -> Result<std::os::unix::net::UnixListener, WorkerError> {
    let name = FdName::new(LISTENER).expect("the constant is a name");
    let missing = || WorkerError::Holder(io::Error::new(io::ErrorKind::NotFound, "the gRPC socket was not handed over"));
    let listener = std::os::unix::net::UnixListener::from(kept.remove(&name).ok_or_else(missing)?.0);
    listener.set_nonblocking(true).map_err(process("setting up the gRPC socket"))?;
    Ok(listener)
}

/// The state directory as the mount table shows it: without symlinks. For its owner only.
fn state_dir(path: &Path) -> Result<PathBuf, WorkerError> {
    let failed = |source| WorkerError::State { path: path.to_owned(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
    let path = path.canonicalize().map_err(failed)?;
    check_state_path(&path).map(|()| path)
}

/// Whether a state directory can have this path, which has no symlinks in it.
pub fn check_state_path(path: &Path) -> Result<(), WorkerError> {
    /// The longest path below it that becomes an option: `/packs/<digest>`.
    const LONGEST: usize = "/packs/".len() + 64;
    if path.as_os_str().len() + LONGEST > OPTION_MAX {
        return Err(WorkerError::LongPath { path: path.to_owned(), suffix: LONGEST });
    }
    Ok(snapshot::check_state_path(path)?)
}

/// Takes the lock that one worker has at a time.
fn wait_for_turn(state: &Path) -> Result<File, WorkerError> {
    let lock = state.join("worker.lock");
    let failed = |source| WorkerError::State { path: lock.clone(), source };
    let file = File::options().write(true).create(true).truncate(false).open(&lock).map_err(failed)?;
    let deadline = Instant::now() + TURN_WAIT;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(TURN_RETRY),
            Err(TryLockError::WouldBlock) => return Err(WorkerError::Turn { lock }),
            Err(TryLockError::Error(source)) => return Err(WorkerError::State { path: lock.clone(), source }),
        }
    }
}

fn process(what: &'static str) -> impl FnOnce(io::Error) -> WorkerError {
    move |source| WorkerError::Process { what, source }
}
