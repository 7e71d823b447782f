//! Child processes with one passed descriptor, signals as descriptors, and descriptors that a service manager kept.
//!
//! Facts: `kernel-notes.md`, "Processes and descriptors".

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Resource};

/// A child process that can be waited for with poll: its pidfd is readable once it has ended (Linux 5.3).
#[derive(Debug)]
pub struct Child {
    child: std::process::Child,
    pidfd: OwnedFd,
}

impl Child {
    /// Starts `program` with `args` and with `stdin` as its descriptor 0 (every other descriptor of ours is close-on-exec). The child gets our
    /// environment without the variables of the service manager's descriptor protocol. It also inherits blocked signals: see
    /// [`unblock_signals`].
    pub fn spawn<S: AsRef<OsStr>>(program: &Path, args: &[S], stdin: OwnedFd) -> io::Result<Child> {
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::from(stdin))
            .env_remove("LISTEN_PID")
            .env_remove("LISTEN_FDS")
            .env_remove("LISTEN_FDNAMES")
            .env_remove("NOTIFY_SOCKET")
            .env_remove(KEPT)
            .spawn()?;
        match rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Child { child, pidfd }),
            Err(error) => {
                child.kill()?;
                child.wait()?;
                Err(error.into())
            }
        }
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends SIGTERM. A process that has ended already is no error.
    pub fn terminate(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::TERM) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends SIGKILL. A process that has ended already is no error.
    pub fn kill(&mut self) -> io::Result<()> {
        self.child.kill()
    }

    /// Waits until the process has ended, and reaps it.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }
}

impl AsFd for Child {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Takes descriptor 0, which the parent passed, and puts `/dev/null` in its place.
pub fn take_stdin() -> io::Result<OwnedFd> {
    let taken = io::stdin().as_fd().try_clone_to_owned()?;
    let null = std::fs::File::open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    Ok(taken)
}

/// `prctl(PR_SET_PDEATHSIG, SIGKILL)`: this process is killed when the thread that started it ends. A parent that ended before the call is not
/// noticed: whoever uses this also reads from something that the parent held open.
pub fn die_with_parent() -> io::Result<()> {
    Ok(rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?)
}

/// Lets every signal through again that the parent blocked for itself, as [`Signals::block`] does. To be called before any thread is started.
pub fn unblock_signals() -> io::Result<()> {
    Ok(SigSet::empty().thread_set_mask()?)
}

/// Has glibc's `malloc` use at most `arenas` heaps (`mallopt(3)`, `M_ARENA_MAX`), before other threads are started. By default there
/// are eight per processor, and each keeps for itself what its threads have freed.
pub fn limit_malloc_arenas(arenas: u16) {
    // SAFETY: takes two integers and changes only malloc's own settings, under malloc's lock. The one way to fail is an unknown
    // parameter, which this is not.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, arenas.into());
    }
    #[cfg(not(target_env = "gnu"))]
    let _ = arenas;
}

/// Gives free pages of the heap back to the kernel (`malloc_trim(3)`). By itself glibc gives back only what lies at the end of an arena, and what one
/// thread has freed is of no use to threads of other arenas.
pub fn trim_heap() {
    // SAFETY: takes a number and works under malloc's own locks.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Raises the soft limit of open files to the hard one. Gives the limit as it is afterwards.
pub fn raise_open_file_limit() -> io::Result<u64> {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    rustix::process::setrlimit(Resource::Nofile, limit)?;
    Ok(limit.current.unwrap_or(u64::MAX))
}

/// What a daemon is asked to do by a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// SIGTERM or SIGINT: end.
    Stop,
    /// SIGHUP: restart what can be restarted.
    Reload,
}

/// SIGTERM, SIGINT and SIGHUP as a descriptor (`signalfd(2)`), blocked in the thread that made it and in threads it starts later.
#[derive(Debug)]
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks the signals and opens the descriptor. To be called before any thread is started.
    pub fn block() -> io::Result<Signals> {
        let set: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
        set.thread_block()?;
        Ok(Signals(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?))
    }

    /// The next signal that has arrived, `None` when there is none.
    pub fn next(&self) -> io::Result<Option<Asked>> {
        let info = self.0.read_signal()?;
        Ok(info.map(|info| if info.ssi_signo == Signal::SIGHUP as u32 { Asked::Reload } else { Asked::Stop }))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// `poll(2)` for reading: which of `fds` can be read, are closed or broken. All false when `timeout` has passed (`None`: no limit) or a signal
/// came.
pub fn wait_readable<const N: usize>(fds: [BorrowedFd<'_>; N], timeout: Option<Duration>) -> io::Result<[bool; N]> {
    let mut polled = fds.each_ref().map(|fd| PollFd::new(fd, PollFlags::IN));
    let timeout = timeout.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: i64::from(t.subsec_nanos()) });
    match rustix::event::poll(&mut polled, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(polled.map(|fd| !fd.revents().is_empty())),
        Err(error) => Err(error.into()),
    }
}

/// First descriptor of the service manager's protocol (`SD_LISTEN_FDS_START`, `sd_listen_fds(3)`).
const LISTEN_FDS_START: RawFd = 3;

/// More descriptors than this are not believed: systemd's own limit is `FileDescriptorStoreMax`, which our unit sets far below.
const LISTEN_FDS_MAX: usize = 65_536;

/// Descriptors handed over at the start of this process, with their names: by the service manager (`sd_listen_fds_with_names(3)`: its fd store
/// after a restart, or socket activation), or by what this process was before [`exec_keeping`]. Empty if the variables do not name this
/// process. They become close-on-exec. Works once per process, at its start, before anything else is opened; later calls give an error.
pub fn take_passed_fds() -> io::Result<Vec<(String, OwnedFd)>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let variable = |name| std::env::var(name).unwrap_or_default();
    let mut passed: Vec<(String, RawFd)> = match parse_kept(&variable(KEPT), std::process::id()) {
        // The service manager's variables are still there, but their descriptors are among these or gone.
        kept if !kept.is_empty() => kept,
        _ => {
            let names = parse_listen(&variable("LISTEN_PID"), &variable("LISTEN_FDS"), &variable("LISTEN_FDNAMES"), std::process::id());
            names.into_iter().zip(LISTEN_FDS_START..).collect()
        }
    };
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Err(io::Error::other("passed descriptors were taken before"));
    }
    passed.sort_by_key(|(_, number)| *number);
    passed.dedup_by_key(|(_, number)| *number);
    let mut taken = Vec::with_capacity(passed.len());
    for (name, number) in passed {
        // SAFETY: the number is borrowed for one call that fails with EBADF if it is not open.
        rustix::io::fcntl_setfd(unsafe { BorrowedFd::borrow_raw(number) }, rustix::io::FdFlags::CLOEXEC)?;
        // SAFETY: the descriptor is open (the call above) and, by either protocol, ours: the variable names this process. Each number comes once,
        // and `TAKEN` lets this happen once, at the start, so nobody else here owns it.
        taken.push((name, unsafe { OwnedFd::from_raw_fd(number) }));
    }
    Ok(taken)
}

/// Variable of [`exec_keeping`]: the process id, then `name=number` for each descriptor, separated by colons.
const KEPT: &str = "SLIPWAYD_KEPT_FDS";

/// Turns this process into `program` with `args`; it keeps its process id, and `fds` as [`take_passed_fds`] will give them. Comes back only with
/// an error, and then nothing has changed. Names have no `=` and no `:`.
pub fn exec_keeping<S: AsRef<OsStr>>(program: &Path, args: &[S], fds: &[(&str, BorrowedFd<'_>)]) -> io::Error {
    let inheritable = |flags| fds.iter().try_for_each(|(_, fd)| rustix::io::fcntl_setfd(fd, flags));
    if let Err(error) = inheritable(rustix::io::FdFlags::empty()) {
        return error.into();
    }
    let entries = fds.iter().map(|(name, fd)| format!(":{name}={}", fd.as_raw_fd()));
    let kept = format!("{}{}", std::process::id(), entries.collect::<String>());
    let error = Command::new(program).args(args).env(KEPT, kept).exec();
    match inheritable(rustix::io::FdFlags::CLOEXEC) {
        Ok(()) => error,
        Err(error) => error.into(),
    }
}

/// Names and numbers in the value of [`KEPT`]. Empty if it is not for `own_pid`; entries that make no sense are left out.
fn parse_kept(value: &str, own_pid: u32) -> Vec<(String, RawFd)> {
    let mut parts = value.split(':');
    if parts.next().and_then(|pid| pid.parse().ok()) != Some(own_pid) {
        return Vec::new();
    }
    let entry = |part: &str| {
        let (name, number) = part.split_once('=')?;
        let number = number.parse().ok().filter(|number| *number >= LISTEN_FDS_START)?;
        (!name.is_empty()).then(|| (name.to_owned(), number))
    };
    parts.filter_map(entry).collect()
}

/// Names of the passed descriptors, in order; those without a name get systemd's "unknown". Empty if the variables are not for `own_pid` or
/// make no sense.
fn parse_listen(pid: &str, count: &str, names: &str, own_pid: u32) -> Vec<String> {
    if pid.parse() != Ok(own_pid) {
        return Vec::new();
    }
    let count = count.parse().ok().filter(|count| *count <= LISTEN_FDS_MAX).unwrap_or(0);
    let mut names = names.split(':');
    (0..count).map(|_| names.next().filter(|name| !name.is_empty()).unwrap_or("unknown").to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passed_descriptors_are_for_the_named_process_only() {
        let check = |pid: &str, count: &str, names: &str, expected: &[&str]| {
            assert_eq!(parse_listen(pid, count, names, 7), expected, "{pid:?} {count:?} {names:?}");
        };
        check("", "", "", &[]);
        check("8", "2", "a:b", &[]);
        check("7", "2", "a:b", &["a", "b"]);
        check("7", "2", "a", &["a", "unknown"]);
        check("7", "3", "a::c:d", &["a", "unknown", "c"]);
        check("7", "x", "a", &[]);
        check("7", "99999999", "a", &[]);
        check("7", "-1", "a", &[]);
    }

    #[test]
    fn kept_descriptors_are_for_the_same_process_only() {
        let check = |value: &str, expected: &[(&str, RawFd)]| {
            let expected: Vec<_> = expected.iter().map(|(name, number)| ((*name).to_owned(), *number)).collect();
            assert_eq!(parse_kept(value, 7), expected, "{value:?}");
        };
        check("", &[]);
        check("8:a=3", &[]);
        check("7", &[]);
        check("7:a=3:b-c=12", &[("a", 3), ("b-c", 12)]);
        check("7:a=2:b=-1:c=x:=5:d:e=9", &[("e", 9)]);
    }

    #[test]
    fn a_program_that_cannot_be_run_changes_nothing() {
        let (a, _b) = crate::fdpass::pair().expect("socketpair");
        let error = exec_keeping(Path::new("/nonexistent"), &["x"], &[("a", a.as_fd())]);
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(rustix::io::fcntl_getfd(&a).expect("flags").contains(rustix::io::FdFlags::CLOEXEC));
    }

    #[test]
    fn a_child_gets_its_descriptor_and_its_end_can_be_polled() {
        let (ours, theirs) = crate::fdpass::pair().expect("socketpair");
        let mut child = Child::spawn(Path::new("/bin/sh"), &["-c", "readlink /proc/self/fd/0 | grep -q socket && exit 7"], theirs).expect("spawn");
        let ready = wait_readable([child.as_fd()], Some(Duration::from_secs(20))).expect("poll");
        assert_eq!(ready, [true]);
        assert_eq!(child.wait().expect("wait").code(), Some(7));
        child.terminate().expect("a dead child is no error");
        assert_eq!(crate::fdpass::receive(&ours, &mut [0; 8]).expect("receive").len, 0, "the child's end is closed");
    }

    #[test]
    fn waiting_ends_after_its_time() {
        let (a, b) = crate::fdpass::pair().expect("socketpair");
        let wait = || wait_readable([a.as_fd(), b.as_fd()], Some(Duration::ZERO)).expect("poll");
        assert_eq!(wait(), [false, false]);
        crate::fdpass::send(&a, b"x", &[]).expect("send");
        assert_eq!(wait(), [false, true]);
    }
}
