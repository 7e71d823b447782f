//! The holder: keeps descriptors, keeps a worker running, and does nothing else.
//!
//! ```text
//!            spawn, hand over              Done              dies │ SIGHUP
//!  (start) ──────────────────> starting ─────────> serving ───────┴──────> (start), after a pause if it keeps dying young,
//!                                  │ dies                │ SIGTERM                  after SIGHUP as the program that is installed now
//!                                  └──> (start)          └──> stopping ──> exit, mounts left in place
//! ```
//!
//! One thread, one `poll` loop over signals, the worker's end and its messages. What the holder needs is opened at start, so that no full disk or
//! hanging store can stop it later.

use std::error::Error;
use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use uapi::fdpass;
use uapi::process::{Asked, Child, Signals, wait_readable};

use super::kept::KeptFds;
use super::protocol::{self, FdName, Message};

/// Name of the kept descriptor that is the gRPC listening socket.
pub const LISTENER: &str = "grpc";

/// The lock of a directory of ours.
const LOCK: &str = "slipwayd.lock";

/// The lock of the cache: of another name, because it may lie in the state directory itself.
const CACHE_LOCK: &str = "slipwayd-cache.lock";

/// How long a worker that is asked to end may take: it flushes the cache and its ledger. Readers wait for as long, so it is short; killing it
/// loses nothing that a crash would not.
const STOP_GRACE: Duration = Duration::from_secs(10);

/// A worker that lives less long than this after it was ready has died young: something it meets at once may be killing it.
const YOUNG: Duration = Duration::from_secs(2);

/// So many young deaths in a row are restarted without a pause: readers wait meanwhile, and a kill or an out-of-memory kill is soon over.
const FREE_RESTARTS: u32 = 5;

/// The pause after that, doubled for each further young death …
const PAUSE_FIRST: Duration = Duration::from_millis(100);

/// … up to this: a bug that kills every worker must not keep a core busy (a start takes 50 to 100 ms of one), and readers wait no longer than
/// they must for a worker that lives again.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// When the first workers of a fresh start end so often before any was ready, and nothing is kept for anybody, the cause is the installation
/// (configuration, permissions): the holder ends too and the service manager reports it.
const GIVE_UP_AFTER: u32 = 3;

/// How long an installed program may take to say its version, before the holder stays what it is. Readers wait meanwhile.
const VERSION_WAIT: Duration = Duration::from_secs(5);

/// Time between looks at whether it has.
const VERSION_POLL: Duration = Duration::from_millis(5);

/// Where the holder puts things and what it runs.
#[derive(Clone, Debug)]
pub struct HolderOptions {
    /// Directory of the socket and of runtime state, made with mode 0700.
    pub run_dir: PathBuf,
    /// Directory of the state that only one daemon may use, made with mode 0700.
    pub state_dir: PathBuf,
    /// Directory of the cache, which only one daemon may use either.
    pub cache_dir: PathBuf,
    /// The gRPC socket, made with mode 0600.
    pub socket: PathBuf,
    /// The worker's program.
    pub worker: PathBuf,
    /// What is run in its place when it cannot be started or keeps dying young: the program the holder itself runs, which is known to work. The
    /// two differ while an upgrade is installed, or after a bad one.
    pub fallback: Option<PathBuf>,
    /// Its arguments.
    pub worker_args: Vec<OsString>,
    /// Arguments with which [`HolderOptions::worker`] is a holder, for upgrading this process.
    pub holder_args: Vec<OsString>,
}

/// Why the holder did not start or ended.
#[derive(Debug, thiserror::Error)]
pub enum HolderError {
    /// Another daemon uses the same directory.
    #[error("another slipwayd runs with {}: stop it first, or give this one directories of its own", lock.display())]
    AlreadyRunning {
        /// The lock that it holds.
        lock: PathBuf,
    },
    /// Something could not be set up.
    #[error("{what} {} failed", path.display())]
    Setup {
        /// What was done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The service could never be started.
    #[error("the worker ended {deaths} times before it was ready, last with {last}: its own messages above say why")]
    GaveUp {
        /// How often.
        deaths: u32,
        /// How it ended the last time.
        last: ExitStatus,
    },
    /// The worker's program cannot be run at all.
    #[error("the worker's program {} cannot be started", program.display())]
    NoWorker {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The holder's own loop failed.
    #[error("watching the worker failed")]
    Watch(#[source] io::Error),
}

/// Why watching one worker ended.
enum Ended {
    /// It could not be started.
    NotStarted(io::Error),
    /// It died by itself.
    Died { status: ExitStatus, ready_for: Option<Duration> },
    /// It was asked to, so that a new one starts.
    Reloaded,
    /// The daemon is to end.
    Stopped,
}

/// Runs the daemon's holder until it is asked to stop. `passed`: what the service manager kept for us.
pub fn run(options: &HolderOptions, passed: Vec<(String, OwnedFd)>) -> Result<(), HolderError> {
    let signals = Signals::block().map_err(HolderError::Watch)?;
    let _locks = [lock(&options.run_dir, LOCK)?, lock(&options.state_dir, LOCK)?];
    let payloads = options.run_dir.join("kept");
    let kept = KeptFds::open(&payloads, passed).map_err(setup("opening the directory of kept descriptors", &payloads))?;
    let _cache_lock = lock_cache(&options.cache_dir, &kept)?;
    let mut holder = Holder { options, signals, kept, ever_ready: false };
    holder.open_listener()?;
    holder.keep_running()
}

struct Holder<'a> {
    options: &'a HolderOptions,
    signals: Signals,
    kept: KeptFds,
    ever_ready: bool,
}

impl<'a> Holder<'a> {
    /// Starts worker after worker.
    fn keep_running(&mut self) -> Result<(), HolderError> {
        let mut young_deaths = 0;
        loop {
            let program = self.program(young_deaths);
            // Somebody may have removed the socket's file; a worker that nobody can call would end at once.
            self.open_listener().unwrap_or_else(|error| tracing::error!(error = &error as &dyn Error, "the gRPC socket cannot be made again"));
            let ended = self.one_worker(program)?;
            let nothing_at_stake = !self.ever_ready && !serves_mounts(&self.kept);
            let give_up = nothing_at_stake && young_deaths + 1 >= GIVE_UP_AFTER;
            match ended {
                Ended::Stopped => return Ok(()),
                Ended::Reloaded => {
                    self.upgrade();
                    young_deaths = 0;
                    continue;
                }
                Ended::Died { ready_for: Some(lived), status } if lived >= YOUNG => {
                    tracing::error!(%status, "the worker died; starting another");
                    young_deaths = 0;
                    continue;
                }
                Ended::Died { status, .. } if give_up => return Err(HolderError::GaveUp { deaths: young_deaths + 1, last: status }),
                Ended::NotStarted(source) if give_up => return Err(HolderError::NoWorker { program: program.to_owned(), source }),
                Ended::Died { status, .. } => tracing::error!(%status, "the worker died young"),
                Ended::NotStarted(error) => tracing::error!(%error, program = %program.display(), "the worker cannot be started"),
            }
            young_deaths += 1;
            let pause = pause_after(young_deaths);
            tracing::info!(young_deaths, pause_ms = pause.as_millis() as u64, "starting another worker");
            if self.pause(pause)? {
                return Ok(());
            }
        }
    }

    /// Becomes the installed program, if that is another than the running one and works as far as can be seen: descriptors, process id and
    /// everything else that others know of the holder stay. Comes back if not.
    fn upgrade(&self) {
        let program = &self.options.worker;
        let file = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
        match (file(program), file(Path::new("/proc/self/exe"))) {
            (Ok(installed), Ok(running)) if installed != running => {}
            _ => return,
        }
        // A program that cannot even do this would take every mount down with it.
        match version_of(program) {
            Ok(version) => tracing::info!(to = version, "upgrading the holder"),
            Err(error) => return tracing::error!(%error, "the installed program does not work; the holder stays what it is"),
        }
        // What has no payload beside it is closed by who comes after.
        if let Err(error) = self.kept.write_payloads() {
            return tracing::error!(%error, "descriptors cannot be handed on, is the runtime directory full? The holder stays what it is");
        }
        let fds: Vec<_> = self.kept.iter().map(|(name, kept)| (name.as_str(), kept.fd.as_fd())).collect();
        let error = uapi::process::exec_keeping(program, &self.options.holder_args, &fds);
        tracing::error!(%error, "the installed program cannot be run; the holder stays what it is");
    }

    /// The worker's program, and after two young deaths every other time what the holder knows to work.
    fn program(&self, young_deaths: u32) -> &'a Path {
        match &self.options.fallback {
            Some(fallback) if young_deaths >= 2 && young_deaths.is_multiple_of(2) => fallback,
            _ => &self.options.worker,
        }
    }

    /// Runs one worker to its end.
    fn one_worker(&mut self, program: &Path) -> Result<Ended, HolderError> {
        let started = fdpass::pair().and_then(|(ours, theirs)| Ok((ours, Child::spawn(program, &self.options.worker_args, theirs)?)));
        // Also when it is for want of descriptors: ending would close every device.
        let (ours, mut worker) = match started {
            Ok(started) => started,
            Err(error) => return Ok(Ended::NotStarted(error)),
        };
        tracing::info!(pid = worker.id(), kept = self.kept.iter().count(), "started a worker");
        // A worker that dies during this is noticed below.
        let _ = self.hand_over(&ours);
        let ended = self.watch(&mut worker, &ours);
        if ended.is_err() {
            worker.kill().map_err(HolderError::Watch)?;
            worker.wait().map_err(HolderError::Watch)?;
        }
        ended
    }

    fn hand_over(&self, socket: &OwnedFd) -> io::Result<()> {
        for (name, kept) in self.kept.iter() {
            protocol::send_fd(socket, name, &kept.payload, kept.fd.as_fd())?;
        }
        protocol::send_done(socket)
    }

    /// Serves the worker until it has ended and everything it said is taken in.
    fn watch(&mut self, worker: &mut Child, socket: &OwnedFd) -> Result<Ended, HolderError> {
        let mut ready_since = None;
        let mut asked = None;
        let mut kill_at: Option<Instant> = None;
        let mut open = true;
        loop {
            let timeout = kill_at.map(|at| at.saturating_duration_since(Instant::now()));
            // A closed socket is readable for ever: watch the signals in its place.
            let third = if open { socket.as_fd() } else { self.signals.as_fd() };
            let [signal, ended, message] = wait_readable([self.signals.as_fd(), worker.as_fd(), third], timeout).map_err(HolderError::Watch)?;
            if signal && let Some(what) = self.signals.next().map_err(HolderError::Watch)? {
                asked = Some(if asked == Some(Asked::Stop) { Asked::Stop } else { what });
                kill_at.get_or_insert_with(|| Instant::now() + STOP_GRACE);
                self.announce(what);
                worker.terminate().map_err(HolderError::Watch)?;
            }
            if open && message {
                open = self.take_message(socket, &mut ready_since);
            }
            if ended {
                while open {
                    open = self.take_message(socket, &mut ready_since);
                }
                let status = worker.wait().map_err(HolderError::Watch)?;
                return Ok(match asked {
                    Some(Asked::Stop) => Ended::Stopped,
                    Some(Asked::Reload) => Ended::Reloaded,
                    None => Ended::Died { status, ready_for: ready_since.map(|since: Instant| since.elapsed()) },
                });
            }
            if kill_at.is_some_and(|at| at <= Instant::now()) {
                tracing::warn!(pid = worker.id(), "the worker does not end; killing it");
                worker.kill().map_err(HolderError::Watch)?;
                kill_at = None;
            }
        }
    }

    /// Takes in one message. False when the socket is at its end or speaks nonsense.
    fn take_message(&mut self, socket: &OwnedFd, ready_since: &mut Option<Instant>) -> bool {
        match protocol::receive(socket) {
            Ok(Some(Message::Fd { name, payload, fd })) => {
                tracing::info!(%name, "keeping a descriptor");
                self.kept.keep(name, fd, payload).unwrap_or_else(|error| tracing::warn!(%error, "a kept descriptor will not survive the holder"));
            }
            Ok(Some(Message::Forget { name })) => {
                tracing::info!(%name, "closing a kept descriptor");
                self.kept.forget(&name).unwrap_or_else(|error| tracing::warn!(%name, %error, "the service manager may still keep a descriptor"));
            }
            Ok(Some(Message::Done)) => {
                tracing::info!("the worker is ready");
                *ready_since = Some(Instant::now());
                self.ever_ready = true;
                tell_manager(&[NotifyState::Ready, NotifyState::Status("serving")]);
            }
            Ok(None) => return false,
            Err(error) => {
                tracing::error!(%error, "the worker's messages cannot be understood; not listening to it any more");
                return false;
            }
        }
        true
    }

    fn announce(&self, asked: Asked) {
        match asked {
            Asked::Stop => {
                tracing::info!("stopping; mounts stay in place");
                tell_manager(&[NotifyState::Stopping]);
            }
            Asked::Reload => {
                tracing::info!("restarting the worker");
                tell_manager(&[NotifyState::Status("restarting the worker")]);
            }
        }
    }

    /// Waits, but not longer than a signal to stop. True when asked to stop.
    fn pause(&self, pause: Duration) -> Result<bool, HolderError> {
        let end = Instant::now() + pause;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            wait_readable([self.signals.as_fd()], Some(left)).map_err(HolderError::Watch)?;
            match self.signals.next().map_err(HolderError::Watch)? {
                Some(Asked::Stop) => return Ok(true),
                Some(Asked::Reload) => return Ok(false),
                None => {}
            }
        }
    }

    /// The gRPC socket: kept from before, or made now. Clients that connect while no worker runs wait in its queue.
    fn open_listener(&mut self) -> Result<(), HolderError> {
        let name = FdName::new(LISTENER).expect("the constant is a name");
        let socket = &self.options.socket;
        if self.kept.get(&name).is_some() && socket.exists() {
            return Ok(());
        }
        match fs::remove_file(socket) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(setup("removing the old socket", socket)(error)),
        }
        private_dir(socket.parent().unwrap_or(Path::new("/")))?;
        let listener = UnixListener::bind(socket).map_err(setup("listening on", socket))?;
        fs::set_permissions(socket, fs::Permissions::from_mode(0o600)).map_err(setup("restricting the mode of", socket))?;
        self.kept.keep(name, listener.into(), Vec::new()).unwrap_or_else(|error| tracing::warn!(%error, "the socket will not survive the holder"));
        Ok(())
    }
}

/// What `program --version` prints, if it succeeds within [`VERSION_WAIT`].
fn version_of(program: &Path) -> io::Result<String> {
    let mut child = Command::new(program).arg("--version").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let deadline = Instant::now() + VERSION_WAIT;
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if Instant::now() < deadline => std::thread::sleep(VERSION_POLL),
            None => {
                // Not waited for, because what hangs in the kernel does not even die: one entry in the process table is the price.
                child.kill()?;
                return Err(io::Error::new(io::ErrorKind::TimedOut, format!("{} --version does not end", program.display())));
            }
        }
    };
    if !status.success() {
        return Err(io::Error::other(format!("{} --version ended with {status}", program.display())));
    }
    let mut text = [0; 256];
    let len = match child.stdout.take() {
        // What it left running may hold the pipe open and empty.
        Some(mut stdout) if wait_readable([stdout.as_fd()], Some(Duration::ZERO))? == [true] => stdout.read(&mut text)?,
        _ => 0,
    };
    Ok(String::from_utf8_lossy(&text[..len]).trim().to_owned())
}

/// How long to wait before the next worker after so many young deaths in a row.
fn pause_after(young_deaths: u32) -> Duration {
    match young_deaths.checked_sub(FREE_RESTARTS + 1) {
        None => Duration::ZERO,
        // 2^16 first pauses are more than any maximum.
        Some(doublings) => PAUSE_FIRST.saturating_mul(1 << doublings.min(16)).min(PAUSE_MAX),
    }
}

/// Makes `dir` if missing, readable for its owner only.
fn private_dir(dir: &Path) -> Result<(), HolderError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(setup("making the directory", dir))
}

/// A lock, until it is dropped or the process ends.
struct Locked(File);

impl Drop for Locked {
    fn drop(&mut self) {
        // Closing would leave it to a child that has not yet come from fork to exec. What cannot be unlocked ends with that.
        let _ = self.0.unlock();
    }
}

/// Takes the lock that says that one daemon uses `dir`.
fn lock(dir: &Path, name: &str) -> Result<Locked, HolderError> {
    private_dir(dir)?;
    let path = dir.join(name);
    let file = File::options().write(true).create(true).truncate(false).open(&path).map_err(setup("opening the lock", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(Locked(file)),
        Err(TryLockError::WouldBlock) => Err(HolderError::AlreadyRunning { lock: path }),
        Err(TryLockError::Error(error)) => Err(setup("locking", &path)(error)),
    }
}

/// Whether anything is kept that mounts may read through.
fn serves_mounts(kept: &KeptFds) -> bool {
    kept.iter().any(|(name, _)| name.as_str() != LISTENER)
}

/// The lock of the cache. With mounts to serve a cache that cannot be locked is no reason to end, because that would close what they read through:
/// its disk may be full or read-only, or the configuration may have become wrong, all of which can be put right. Another daemon's cache stays one.
fn lock_cache(dir: &Path, kept: &KeptFds) -> Result<Option<Locked>, HolderError> {
    match lock(dir, CACHE_LOCK) {
        Err(error @ HolderError::Setup { .. }) if serves_mounts(kept) => {
            tracing::error!(error = &error as &dyn Error, "serving on without the lock of the cache; no other slipwayd may use it");
            Ok(None)
        }
        locked => locked.map(Some),
    }
}

fn setup(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> HolderError {
    move |source| HolderError::Setup { what, path: path.to_owned(), source }
}

fn tell_manager(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "the service manager cannot be told");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(dir: &Path, script: &str) -> HolderOptions {
        HolderOptions {
            run_dir: dir.join("run"),
            state_dir: dir.join("state"),
            cache_dir: dir.join("cache"),
            socket: dir.join("run/slipway.sock"),
            worker: "/bin/sh".into(),
            fallback: None,
            worker_args: ["-c", script].map(OsString::from).into(),
            holder_args: Vec::new(),
        }
    }

    #[test]
    fn pauses_begin_after_repeated_young_deaths_and_are_bounded() {
        let millis = |deaths| pause_after(deaths).as_millis();
        for (deaths, pause) in [(0, 0), (1, 0), (5, 0), (6, 100), (7, 200), (8, 400), (9, 800), (10, 1000), (13, 1000), (u32::MAX, 1000)] {
            assert_eq!(millis(deaths), pause, "{deaths} deaths");
        }
    }

    #[test]
    fn a_worker_that_never_starts_ends_the_holder() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let count = dir.path().join("count");
        let error = run(&options(dir.path(), &format!("echo x >> {}; exit 3", count.display())), Vec::new()).expect_err("nothing to serve");
        assert!(matches!(error, HolderError::GaveUp { deaths: GIVE_UP_AFTER, last } if last.code() == Some(3)), "{error}");
        assert_eq!(fs::read_to_string(count).expect("count").lines().count(), GIVE_UP_AFTER as usize);
    }

    #[test]
    fn what_cannot_be_run_or_keeps_dying_is_replaced_by_the_fallback() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let count = dir.path().join("count");
        // The fallback is asked for after two deaths, the third attempt of which ends the holder.
        let mut options = options(dir.path(), &format!("echo x >> {}; exit 3", count.display()));
        options.worker = "/nonexistent/slipwayd".into();
        assert!(matches!(run(&options, Vec::new()), Err(HolderError::NoWorker { program, .. }) if program == options.worker));
        options.fallback = Some("/bin/sh".into());
        assert!(matches!(run(&options, Vec::new()), Err(HolderError::GaveUp { .. })));
        assert_eq!(fs::read_to_string(count).expect("count").lines().count(), 1);
    }

    #[test]
    fn the_socket_and_its_directory_are_the_owners_only() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let options = options(dir.path(), "exit 1");
        run(&options, Vec::new()).expect_err("the worker ends");
        let mode = |path: &Path| fs::metadata(path).expect("metadata").permissions().mode() & 0o7777;
        assert_eq!([mode(&options.run_dir), mode(&options.state_dir), mode(&options.socket)], [0o700, 0o700, 0o600]);
    }

    #[test]
    fn a_cache_that_cannot_be_locked_ends_only_a_holder_with_nothing_to_serve() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (file, cache) = (dir.path().join("file"), dir.path().join("cache"));
        fs::write(&file, "no directory").expect("written");
        let mut kept = KeptFds::open(&dir.path().join("kept"), Vec::new()).expect("opened");
        let keep = |kept: &mut KeptFds, name| {
            let fd = File::open(&file).expect("a file").into();
            kept.keep(FdName::new(name).expect("a name"), fd, Vec::new()).expect("kept");
        };
        keep(&mut kept, LISTENER);
        assert!(matches!(lock_cache(&file, &kept), Err(HolderError::Setup { .. })));
        keep(&mut kept, "fuse-blob");
        assert!(matches!(lock_cache(&file, &kept), Ok(None)));
        let _held = lock_cache(&cache, &kept).expect("no error").expect("a lock");
        assert!(matches!(lock_cache(&cache, &kept), Err(HolderError::AlreadyRunning { .. })));
    }

    #[test]
    fn one_daemon_per_directory() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let options = options(dir.path(), "exit 1");
        for (dir, name) in [(&options.state_dir, LOCK), (&options.cache_dir, CACHE_LOCK)] {
            let _held = lock(dir, name).expect("lock");
            assert!(matches!(run(&options, Vec::new()), Err(HolderError::AlreadyRunning { lock }) if lock.starts_with(dir)));
        }
        assert!(matches!(run(&options, Vec::new()), Err(HolderError::GaveUp { .. })));
    }

    #[test]
    fn the_version_of_a_program_that_hangs_is_not_waited_for() {
        let dir = tempfile::tempdir().expect("temporary directory");
        // Made by another process: what this one had open for writing may be so still in a child that another test forks, and is then "busy".
        const MAKE: &str = "printf '#!/bin/sh\\n%s\\n' \"$1\" >new && chmod 755 new && mv new program";
        let program = |script: &str| {
            let made = Command::new("/bin/sh").args(["-c", MAKE, "sh", script]).current_dir(dir.path()).status().expect("a shell");
            assert!(made.success());
            dir.path().join("program")
        };
        assert_eq!(version_of(&program("echo slipwayd 9")).expect("a version"), "slipwayd 9");
        assert_eq!(version_of(&program("exit 0")).expect("a silent one"), "");
        assert!(version_of(&program("echo slipwayd 9; exit 1")).is_err());
        let start = Instant::now();
        let error = version_of(&program("exec sleep 1000")).expect_err("it hangs");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(start.elapsed() < VERSION_WAIT * 4, "{:?}", start.elapsed());
    }
}
