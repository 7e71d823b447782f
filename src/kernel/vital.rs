//! Threads that readers depend on: when one cannot go on, the process ends at once, and the next worker takes over what it left.
//!
//! Everything kept for the next worker makes its readers wait. A process that lives on without such a thread would make them wait, or give them
//! EIO, for as long as it lives.

/// Held by a thread that readers depend on: if it unwinds, the process ends.
#[derive(Debug)]
pub struct Vital(&'static str);

impl Vital {
    /// Watches the thread that calls it, whose work `what` is.
    #[must_use = "it watches for as long as it is held"]
    pub fn thread(what: &'static str) -> Vital {
        Vital(what)
    }
}

impl Drop for Vital {
    fn drop(&mut self) {
        if std::thread::panicking() {
            end(self.0, "the thread panicked");
        }
    }
}

/// Ends the process: `what` cannot go on, because of `why`. Killed, not aborted, because a core dump would make readers wait for its writing.
pub fn end(what: &str, why: impl std::fmt::Display) -> ! {
    tracing::error!(why = %why, "{what} cannot go on; ending, so that the next worker takes over");
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    std::process::abort();
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    /// Set in the child process that is to die.
    const DIE: &str = "SLIPWAY_TEST_VITAL_DIES";

    #[test]
    fn a_panic_in_a_vital_thread_ends_the_process() {
        if std::env::var_os(DIE).is_some() {
            let watched = || {
                let _vital = Vital::thread("a test");
                panic!("on purpose");
            };
            let _ = std::thread::spawn(watched).join();
            return;
        }
        let own = std::env::current_exe().expect("this program");
        let name = "kernel::vital::tests::a_panic_in_a_vital_thread_ends_the_process";
        let child = Command::new(own).args([name, "--exact", "--nocapture"]).env(DIE, "1").output().expect("it runs");
        assert_eq!(child.status.signal(), Some(rustix::process::Signal::KILL.as_raw()), "{child:?}");
    }
}
