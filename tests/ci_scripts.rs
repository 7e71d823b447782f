//! What the scripts of `tools/ci` promise when something fails.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use testbed::{Scratch, wait_until};

/// Far more than ending a process takes.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn a_failed_phase_ends_what_runs_in_the_background() {
    let scratch = Scratch::new("phases").expect("a scratch directory");
    let temp = scratch.make_dir("tmp").expect("a directory");
    // The command's own child is the one that would go on.
    let script = r#"
        set -euo pipefail
        . tools/ci/phases.sh
        background "kernel" sh -c 'sleep 600 & echo $! >"$0/pid.new"; mv "$0/pid.new" "$0/pid"; wait' "$1"
        until [ -e "$1/pid" ]; do sleep 0.01; done
        phase "build" false
    "#;
    let mut bash = Command::new("bash");
    bash.args(["-c", script, "test"]).arg(scratch.path()).env("TMPDIR", &temp).current_dir(env!("CARGO_MANIFEST_DIR"));
    let output = bash.output().expect("bash runs");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("build failed"), "{output:?}");
    assert_eq!(fs::read_dir(&temp).expect("the directory").count(), 0, "its log is removed");
    let pid = fs::read_to_string(scratch.join("pid")).expect("the child's process id");
    let command_line = Path::new("/proc").join(pid.trim()).join("cmdline");
    // One that has ended and that nobody waited for has no command line any more.
    let ended = || Ok(fs::read(&command_line).map_or(true, |line| line.is_empty()).then_some(()));
    wait_until("the background command's child has ended", PATIENCE, ended).expect("it was killed");
}

#[test]
fn a_background_command_that_fails_fails_the_run_with_its_log() {
    let script = r#"
        set -euo pipefail
        . tools/ci/phases.sh
        background "kernel" sh -c 'echo no such header; exit 3'
        phase "the rest" finish
    "#;
    let output = Command::new("bash").args(["-c", script]).current_dir(env!("CARGO_MANIFEST_DIR")).output().expect("bash runs");
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("no such header"), "{output:?}");
}
