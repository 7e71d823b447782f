//! Debian's docker-registry on a loopback port, and what its log says was fetched.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::daemon::Daemon;

const START_LIMIT: Duration = Duration::from_secs(20);

/// A registry of its own, plain HTTP, data under its directory. Ended when dropped.
#[derive(Debug)]
pub struct Registry {
    daemon: Daemon,
    host: String,
}

/// A point in the registry's log; see [`Registry::mark`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark(usize);

impl Registry {
    /// Starts a registry with its configuration, log and data in `dir` (made if missing). The kernel chooses a free port.
    pub fn start(dir: &Path) -> Result<Registry> {
        fs::create_dir_all(dir)?;
        let config = dir.join("config.yml");
        let data = dir.join("data");
        fs::write(
            &config,
            format!(
                "version: 0.1\nlog:\n  level: info\n  formatter: json\n  accesslog:\n    disabled: true\n\
                 storage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\n  cache:\n    blobdescriptor: inmemory\n\
                 http:\n  addr: 127.0.0.1:0\n",
                data.display()
            ),
        )
        .with_context(|| format!("{} cannot be written", config.display()))?;
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&config).env("OTEL_TRACES_EXPORTER", "none");
        let mut daemon = Daemon::spawn("docker-registry", &command, &dir.join("log"))?;
        let host = daemon.wait_until("it listens", START_LIMIT, |daemon| listening_on(&daemon.log()))?;
        Ok(Registry { daemon, host })
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The full reference of `name` (`team/app:1.2`) here.
    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.host)
    }

    /// Now, as a point in the log: later calls of [`Registry::blob_bytes`] count from there.
    pub fn mark(&self) -> Mark {
        Mark(self.daemon.log().len())
    }

    /// Bytes of blobs answered to GET requests since `mark`, by digest (`sha256:…`). Counts what was really sent, from the
    /// registry's own log; HEAD requests send nothing and are not counted.
    pub fn blob_bytes(&self, mark: Mark) -> BTreeMap<String, u64> {
        blob_bytes(self.daemon.log().get(mark.0..).unwrap_or_default())
    }

    /// Ends the registry; its address then refuses connections.
    pub fn stop(&mut self) -> Result<()> {
        self.daemon.stop().map(drop)
    }
}

/// One line of the registry's JSON log.
#[derive(Deserialize)]
struct Line {
    msg: String,
    #[serde(rename = "http.request.method", default)]
    method: String,
    #[serde(rename = "http.request.uri", default)]
    uri: String,
    #[serde(rename = "http.response.written", default)]
    written: u64,
}

fn lines(log: &str) -> impl Iterator<Item = Line> + '_ {
    log.lines().filter_map(|line| serde_json::from_str(line).ok())
}

fn listening_on(log: &str) -> Option<String> {
    lines(log).find_map(|line| line.msg.strip_prefix("listening on ").map(str::to_owned))
}

fn blob_bytes(log: &str) -> BTreeMap<String, u64> {
    let mut bytes = BTreeMap::new();
    for line in lines(log).filter(|line| line.msg == "response completed" && line.method == "GET") {
        if let Some((_, digest)) = line.uri.split_once("/blobs/") {
            *bytes.entry(digest.to_owned()).or_default() += line.written;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Scratch, need, require};

    #[test]
    fn only_blob_bodies_are_counted() {
        let line = |method: &str, uri: &str, written: u64| {
            format!(
                "{{\"msg\":\"response completed\",\"http.request.method\":\"{method}\",\"http.request.uri\":\"{uri}\",\"http.response.written\":{written}}}\n"
            )
        };
        let log = [
            "not json\n".to_owned(),
            "{\"msg\":\"something else\"}\n".to_owned(),
            line("GET", "/v2/", 2),
            line("GET", "/v2/a/b/manifests/latest", 700),
            line("HEAD", "/v2/a/b/blobs/sha256:11", 0),
            line("GET", "/v2/a/b/blobs/sha256:11", 10),
            line("GET", "/v2/a/b/blobs/sha256:11", 5),
            line("GET", "/v2/a/b/blobs/sha256:22", 7),
        ]
        .concat();
        assert_eq!(blob_bytes(&log), BTreeMap::from([("sha256:11".to_owned(), 15), ("sha256:22".to_owned(), 7)]));
    }

    #[test]
    fn a_registry_answers_on_its_own_port_and_ends_with_its_guard() {
        require!(need::command("docker-registry"));
        let scratch = Scratch::new("registry").expect("a scratch directory");
        let one = Registry::start(&scratch.join("one")).expect("a registry");
        let two = Registry::start(&scratch.join("two")).expect("a second registry beside it");
        assert_ne!(one.host(), two.host());
        let host = one.host().to_owned();
        assert!(std::net::TcpStream::connect(&host).is_ok());
        drop(one);
        assert!(std::net::TcpStream::connect(&host).is_err());
    }
}
