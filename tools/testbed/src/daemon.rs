//! Child processes: one that runs to its end, and one that stays until its guard is dropped.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

/// How often a condition is looked at while it is waited for: short against every start measured here (0.1 s and more).
const POLL: Duration = Duration::from_millis(10);
/// How long a daemon may take to obey SIGTERM before it is killed; containerd needs up to about a second.
const PATIENCE: Duration = Duration::from_secs(5);
/// How much of a log an error shows.
const LOG_TAIL_LINES: usize = 20;

/// Runs a program to its end and returns its standard output; any other end than success is an error that shows standard error.
pub fn run<S: AsRef<std::ffi::OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> Result<String> {
    let mut command = Command::new(program);
    command.args(args);
    output(&mut command)
}

/// [`run`] for a prepared command.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let shown = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{shown} could not be started"))?;
    ensure!(output.status.success(), "{shown}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Looks at a condition until it gives a value; after `limit` the error says what was waited for.
pub fn wait_until<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = probe()? {
            return Ok(value);
        }
        ensure!(start.elapsed() < limit, "gave up after {limit:?} waiting until {what}");
        std::thread::sleep(POLL);
    }
}

/// The children of a process, whichever of its threads started them.
pub(crate) fn children_of(process: Pid) -> Vec<Pid> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let children = tasks.map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default()).collect::<Vec<_>>().join(" ");
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).filter_map(Pid::from_raw).collect()
}

/// A running child process, its output going to a log file. Dropping it ends it: SIGTERM, then SIGKILL.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts `command` with output appended to `log`. The child also dies when the thread that started it does.
    pub fn spawn(name: &str, command: &Command, log: &Path) -> Result<Daemon> {
        let file = File::options().create(true).append(true).open(log).with_context(|| format!("the log {} cannot be made", log.display()))?;
        let mut wrapped = Command::new("setpriv");
        wrapped.args(["--pdeathsig", "KILL", "--"]).arg(command.get_program()).args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(key, value),
                None => wrapped.env_remove(key),
            };
        }
        if let Some(dir) = command.get_current_dir() {
            wrapped.current_dir(dir);
        }
        wrapped.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = wrapped.spawn().with_context(|| format!("{name} could not be started ({command:?})"))?;
        Ok(Daemon { name: name.to_owned(), child, log: log.to_path_buf() })
    }

    /// Its process id (valid until it has ended and was waited for).
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All it has written so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// The end of its log, as errors show it.
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
    }

    /// Its exit status once it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("{} cannot be waited for", self.name))
    }

    /// Waits until `probe` gives a value. Ends early, showing the log, when the process dies; `limit` bounds the wait.
    pub fn wait_until<T>(&mut self, what: &str, limit: Duration, mut probe: impl FnMut(&Daemon) -> Option<T>) -> Result<T> {
        let found = wait_until(what, limit, || {
            if let Some(value) = probe(self) {
                return Ok(Some(value));
            }
            if let Some(status) = self.ended()? {
                bail!("{} ended ({status}) before {what}", self.name);
            }
            Ok(None)
        });
        found.with_context(|| format!("{}'s log ends with:\n{}", self.name, self.log_tail()))
    }

    /// Sends a signal; a process that has ended already is no error.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.ended()?.is_none() {
            let pid = Pid::from_child(&self.child);
            kill_process(pid, signal).with_context(|| format!("{} (pid {pid:?}) cannot be signalled", self.name))?;
        }
        Ok(())
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM, and waits for the end; SIGKILL when it takes too long. Returns how it ended.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        let ended = wait_until(&format!("{} obeys SIGTERM", self.name), PATIENCE, || self.ended());
        match ended {
            Ok(status) => Ok(status),
            Err(_) => {
                self.kill();
                self.ended()?.context("a killed and awaited process has a status")
            }
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.stop().is_err() {
            self.kill();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Scratch;

    #[test]
    fn a_dropped_daemon_has_ended() {
        let scratch = Scratch::new("daemon").expect("a scratch directory");
        let mut command = Command::new("sleep");
        command.arg("600");
        let daemon = Daemon::spawn("sleep", &command, &scratch.join("log")).expect("sleep starts");
        let pid = daemon.pid();
        assert!(Path::new(&format!("/proc/{pid}")).exists());
        drop(daemon);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn an_early_end_is_told_with_the_log() {
        let scratch = Scratch::new("daemon").expect("a scratch directory");
        let mut command = Command::new("sh");
        command.args(["-c", "echo no such luck; exit 3"]);
        let mut daemon = Daemon::spawn("unlucky", &command, &scratch.join("log")).expect("sh starts");
        let error = daemon.wait_until("pigs fly", Duration::from_secs(10), |_| None::<()>).expect_err("it ends instead");
        let shown = format!("{error:#}");
        assert!(shown.contains("no such luck") && shown.contains("pigs fly") && shown.contains('3'), "{shown}");
    }

    #[test]
    fn a_failed_program_is_told_with_what_it_said() {
        let error = run("sh", ["-c", "echo out of cheese >&2; exit 1"]).expect_err("it fails");
        assert!(format!("{error:#}").contains("out of cheese"));
        assert_eq!(run("echo", ["hello"]).expect("echo works"), "hello\n");
    }
}
