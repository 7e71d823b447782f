//! Credential helpers: programs called `docker-credential-NAME` that keep logins in a keychain.
//!
//! The protocol is that of docker-credential-helpers: `get` with the server's name on stdin gives JSON on stdout, or an exit code and a
//! message.

use std::ffi::OsStr;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::Secret;
use crate::oci::tries::one_line;

/// A keychain that asks its user for something may take a while; one that hangs must not hang a conversion with it.
pub(super) const TIME_LIMIT: Duration = Duration::from_secs(30);
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
    let mut child = command.spawn().map_err(|e| format!("it cannot be started: {e}"))?;
    let mut stdin = child.stdin.take().expect("stdin is a pipe");
    let talk = async {
        // A helper that ends without reading its input says more with its exit code.
        let _ = stdin.write_all(format!("{server}\n").as_bytes()).await;
        drop(stdin);
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(limit, talk).await;
    let output = output.map_err(|_| format!("it gave no answer in {} s", limit.as_secs()))?.map_err(|e| format!("its answer cannot be read: {e}"))?;
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    async fn told(script: &str, limit: Duration) -> Result<Option<(String, Secret)>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docker-credential-x");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
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
            (r#"echo '{"Secret":["hunter2"]}'"#, Err("its answer is no login: line 1 is not as expected")),
        ] {
            assert_eq!(told(script, TIME_LIMIT).await, expected.map_err(str::to_owned), "{script}");
        }
    }

    #[tokio::test]
    async fn a_helper_that_hangs_or_is_missing_is_given_up() {
        let hung = told("exec sleep 600", Duration::from_millis(100)).await.unwrap_err();
        assert!(hung.contains("no answer"), "{hung}");
        let missing = ask(OsStr::new("docker-credential-that-is-nowhere"), "x", TIME_LIMIT).await.unwrap_err();
        assert!(missing.contains("cannot be started"), "{missing}");
    }
}
