//! Credential helpers: programs called `docker-credential-NAME` that keep logins in a keychain.
//!
//! The protocol is that of docker-credential-helpers: `get` with the server's name on stdin gives JSON on stdout, or an exit code and a
//! message.

use std::ffi::OsStr;
use std::io;
use std::process::{Output, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use super::Secret;
use crate::oci::tries::one_line;

/// A keychain that asks its user for something may take a while; one that hangs must not hang a conversion with it.
pub(super) const TIME_LIMIT: Duration = Duration::from_secs(30);
/// Most that is read of either of its outputs: logins are a few KiB.
const MAX_OUTPUT: usize = 1 << 20;
/// How long the pipes of a helper that ended are read when something it started keeps them open.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// What a helper says of a server it has nothing for (docker-credential-helpers, `credentials/error.go`).
const NOT_FOUND: &str = "credentials not found in native keychain";

#[derive(serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// User and secret that `program` has for `server`; `Err` says what went wrong, without a secret.
pub(super) async fn ask(program: &OsStr, server: &str, limit: Duration) -> Result<Option<(String, Secret)>, String> {
    let mut command = Command::new(program);
    command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    // Of its own, so that what it starts can be ended with it.
    command.process_group(0);
    let mut child = command.spawn().map_err(|e| format!("it cannot be started: {e}"))?;
    let group = Group(child.id().and_then(|id| Pid::from_raw(id.try_into().ok()?)));
    let output = tokio::time::timeout(limit, talk(&mut child, server)).await;
    let output = output.map_err(|_| format!("it gave no answer in {} s", limit.as_secs()))?.map_err(|e| format!("its answer cannot be read: {e}"))?;
    // What it left running is its own affair: an agent, say.
    group.keep();
    if output.stdout.len() > MAX_OUTPUT || output.stderr.len() > MAX_OUTPUT {
        return Err(format!("it wrote more than {MAX_OUTPUT} bytes"));
    }
    if output.status.success() {
        // serde_json's own message would quote what it met.
        let answer: Answer =
            serde_json::from_slice(&output.stdout).map_err(|e| format!("its answer is no login: line {} is not as expected", e.line()))?;
        let empty = answer.username.is_empty() && answer.secret.is_empty();
        return Ok((!empty).then(|| (answer.username, Secret::new(answer.secret))));
    }
    let said = one_line(&output.stdout);
    if said == NOT_FOUND {
        return Ok(None);
    }
    // Its message comes on either; what looks like a login is not repeated.
    let message = match one_line(&output.stderr) {
        text if !text.is_empty() => text,
        _ if said.starts_with('{') => String::new(),
        _ => said,
    };
    Err(format!("it ended with {}{}{message}", output.status, if message.is_empty() { "" } else { ": " }))
}

/// Asks, and waits for the end of the program, not of everything that holds its pipes.
async fn talk(child: &mut Child, server: &str) -> io::Result<Output> {
    let mut stdin = child.stdin.take().expect("stdin is a pipe");
    let (from, errors) = (child.stdout.take().expect("stdout is a pipe"), child.stderr.take().expect("stderr is a pipe"));
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let mut read = Box::pin(async { tokio::try_join!(read_some(from, &mut stdout), read_some(errors, &mut stderr)).map(drop) });
    let end = async {
        // A helper that ends without reading its input says more with its exit code.
        let _ = stdin.write_all(format!("{server}\n").as_bytes()).await;
        drop(stdin);
        child.wait().await
    };
    tokio::pin!(end);
    let status = tokio::select! {
        status = &mut end => {
            // What it wrote is in the pipes by now.
            tokio::time::timeout(LAST_WORDS, &mut read).await.unwrap_or(Ok(()))?;
            status?
        }
        result = &mut read => {
            result?;
            end.await?
        }
    };
    drop(read);
    Ok(Output { status, stdout, stderr })
}

/// Reads to the end or just beyond the limit; closes the pipe either way.
async fn read_some(mut pipe: impl AsyncRead + Unpin, bytes: &mut Vec<u8>) -> io::Result<()> {
    while bytes.len() <= MAX_OUTPUT && pipe.read_buf(bytes).await? > 0 {}
    Ok(())
}

/// The processes of a helper, killed when this is dropped.
struct Group(Option<Pid>);

impl Group {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            // It may have ended by itself.
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn told(script: &str, limit: Duration) -> Result<Option<(String, Secret)>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docker-credential-x");
        // Written by another process: a file that this one has open for writing is inherited by whatever another test starts just then,
        // and cannot be executed until that is gone (ETXTBSY).
        let write = r#"printf '#!/bin/sh\n%s\n' "$2" >"$1" && chmod 755 "$1""#;
        assert!(std::process::Command::new("sh").args(["-c", write, "sh"]).arg(&path).arg(script).status().unwrap().success());
        ask(path.as_os_str(), "reg.example.com", limit).await
    }

    #[tokio::test]
    async fn answers_of_helpers() {
        let login = |user: &str, secret: &str| Ok(Some((user.to_owned(), Secret::new(secret))));
        for (script, expected) in [
            (r#"read s; echo "{\"ServerURL\":\"$s\",\"Username\":\"bob\",\"Secret\":\"$s$1\"}""#, login("bob", "reg.example.comget")),
            (r#"echo '{"Username":"<token>","Secret":"t"}'"#, login("<token>", "t")),
            (r#"echo '{}'"#, Ok(None)),
            ("echo credentials not found in native keychain; exit 1", Ok(None)),
            ("echo locked >&2; exit 3", Err("it ended with exit status: 3: locked")),
            ("echo no such item; exit 1", Err("it ended with exit status: 1: no such item")),
            (r#"echo '{"Secret":"hunter2"'; exit 1"#, Err("it ended with exit status: 1")),
            (r#"sleep 5 & echo '{"Username":"bob","Secret":"left behind"}'"#, login("bob", "left behind")),
            ("exec head -c 2000000 /dev/zero", Err("it wrote more than 1048576 bytes")),
            (r#"echo '{"Secret":["hunter2"]}'"#, Err("its answer is no login: line 1 is not as expected")),
        ] {
            assert_eq!(told(script, TIME_LIMIT).await, expected.map_err(str::to_owned), "{script}");
        }
    }

    #[tokio::test]
    async fn a_helper_that_hangs_or_is_missing_is_given_up() {
        let hung = told("exec sleep 600", Duration::from_millis(100)).await.unwrap_err();
        assert!(hung.contains("no answer"), "{hung}");
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let script = format!("sleep 600 & echo $! >'{}'; wait", pid.display());
        assert!(told(&script, Duration::from_secs(2)).await.is_err());
        let child = Pid::from_raw(std::fs::read_to_string(pid).unwrap().trim().parse().unwrap()).unwrap();
        let gone = || {
            let state = std::fs::read_to_string(format!("/proc/{}/stat", child.as_raw_pid()));
            state.is_err() || state.is_ok_and(|state| state.contains(") Z "))
        };
        for _ in 0..100 {
            if gone() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(gone(), "what the helper started is ended too");
        let missing = ask(OsStr::new("docker-credential-that-is-nowhere"), "x", TIME_LIMIT).await.unwrap_err();
        assert!(missing.contains("cannot be started"), "{missing}");
    }
}
