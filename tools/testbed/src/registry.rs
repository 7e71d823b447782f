//! Debian's docker-registry on a loopback port, on request behind a password or TLS, and what its log says was fetched.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::TestCa;
use crate::daemon::{Daemon, wait_until};

const START_LIMIT: Duration = Duration::from_secs(20);
/// An answered request is in the log within a moment. One whose end is never logged (an answer that is neither success nor an error of
/// the registry's own) keeps nobody waiting longer than this.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);

/// The only user of a registry that wants a password.
pub const USER: &str = "someone";
/// Their password.
pub const PASSWORD: &str = "letmein";
/// Both as docker-registry wants them: bcrypt of the lowest cost, since it is computed for every request.
const HTPASSWD: &str = "someone:$2b$05$Uo2VTb/doDS2vVu1o90wiuhNxcsqkrLEVf9SCbyFvt/pFvBbq00cC\n";

/// What stands between a registry and its users.
#[derive(Debug, Default, Clone, Copy)]
pub struct Guard<'a> {
    /// [`USER`] and [`PASSWORD`] are asked for.
    pub password: bool,
    /// TLS with this authority's server certificate.
    pub tls: Option<&'a TestCa>,
}

/// A registry of its own, plain HTTP unless asked otherwise, data under its directory. Ended when dropped.
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
        Registry::start_behind(dir, Guard::default())
    }

    /// The same behind a password or TLS.
    pub fn start_behind(dir: &Path, guard: Guard<'_>) -> Result<Registry> {
        fs::create_dir_all(dir)?;
        let config = dir.join("config.yml");
        let mut text = format!(
            "version: 0.1\nlog:\n  level: debug\n  formatter: json\n  accesslog:\n    disabled: true\n\
             storage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\n  cache:\n    blobdescriptor: inmemory\n",
            dir.join("data").display()
        );
        if guard.password {
            let file = dir.join("htpasswd");
            fs::write(&file, HTPASSWD)?;
            text.push_str(&format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", file.display()));
        }
        text.push_str("http:\n  addr: 127.0.0.1:0\n");
        if let Some(ca) = guard.tls {
            text.push_str(&format!("  tls:\n    certificate: {}\n    key: {}\n", ca.server().display(), ca.server_key().display()));
        }
        fs::write(&config, text).with_context(|| format!("{} cannot be written", config.display()))?;
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
        Mark(self.settled_log().len())
    }

    /// Bytes of blobs answered to GET requests since `mark`, by digest (`sha256:…`). Counts what was really sent, from the
    /// registry's own log; HEAD requests send nothing and are not counted.
    pub fn blob_bytes(&self, mark: Mark) -> BTreeMap<String, u64> {
        blob_bytes(self.settled_log().get(mark.0..).unwrap_or_default())
    }

    /// Method and path, with what follows it, of every request answered since `mark`.
    pub fn requests(&self, mark: Mark) -> Vec<String> {
        let log = self.settled_log();
        let answered = lines(log.get(mark.0..).unwrap_or_default()).filter(|line| line.msg.starts_with("response completed"));
        answered.map(|line| format!("{} {}", line.method, line.uri)).collect()
    }

    /// The log with everything that was answered before this call.
    ///
    /// The registry logs the end of a request after its client has the answer, so another request's line may still be missing. It logs the
    /// beginning before it answers: once a request of our own is in the log, all earlier beginnings are, and their ends can be waited for.
    fn settled_log(&self) -> String {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let uri = format!("/v2/?settled={}", NEXT.fetch_add(1, Ordering::Relaxed));
        if get(&self.host, &uri).is_ok() {
            // Too late is as good as it gets: see the limit.
            let _ = wait_until("the registry's log is complete", SETTLE_LIMIT, || Ok(is_settled(&self.daemon.log(), &uri).then_some(())));
        }
        // A registry that has ended answers nothing, and its log is complete.
        self.daemon.log()
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
    #[serde(rename = "http.request.id", default)]
    id: String,
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

/// Asks and waits for the end of the answer.
fn get(host: &str, uri: &str) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(host)?;
    stream.set_read_timeout(Some(SETTLE_LIMIT))?;
    write!(stream, "GET {uri} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
    stream.read_to_end(&mut Vec::new()).map(drop)
}

/// Whether the request of `uri` and all that began before it have ended.
fn is_settled(log: &str, uri: &str) -> bool {
    let (mut begun, mut seen, mut ended) = (BTreeSet::new(), false, BTreeSet::new());
    for line in lines(log) {
        if line.msg == "authorizing request" && !seen {
            seen = line.uri == uri;
            begun.insert(line.id);
        } else if line.msg.starts_with("response completed") {
            ended.insert(line.id);
        }
    }
    seen && begun.is_subset(&ended)
}

fn listening_on(log: &str) -> Option<String> {
    lines(log).find_map(|line| line.msg.strip_prefix("listening on ").map(|address| address.trim_end_matches(", tls").to_owned()))
}

fn blob_bytes(log: &str) -> BTreeMap<String, u64> {
    let mut bytes = BTreeMap::new();
    for line in lines(log).filter(|line| line.msg == "response completed" && line.method == "GET") {
        if let Some((_, digest)) = line.uri.split_once("/blobs/") {
            // A mirror is told after the question mark which registry is meant.
            let digest = digest.split('?').next().unwrap_or_default();
            *bytes.entry(digest.to_owned()).or_default() += line.written;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Compression, Entry, Image, Layer, Layout, Scratch, need, require};

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
            line("GET", "/v2/a/b/blobs/sha256:11?ns=x", 5),
            line("GET", "/v2/a/b/blobs/sha256:22", 7),
        ]
        .concat();
        assert_eq!(blob_bytes(&log), BTreeMap::from([("sha256:11".to_owned(), 15), ("sha256:22".to_owned(), 7)]));
    }

    #[test]
    fn a_log_is_complete_when_all_requests_before_ours_have_ended() {
        let line = |msg: &str, id: &str, uri: &str| format!("{{\"msg\":\"{msg}\",\"http.request.id\":\"{id}\",\"http.request.uri\":\"{uri}\"}}\n");
        let begin = |id: &str, uri: &str| line("authorizing request", id, uri);
        let end = |id: &str| line("response completed", id, "");
        let check = |log: &[String], expected: bool| assert_eq!(is_settled(&log.concat(), "/our"), expected, "{log:#?}");
        check(&[], false);
        check(&[begin("1", "/a"), end("1")], false);
        check(&[begin("2", "/our")], false);
        check(&[begin("2", "/our"), end("2")], true);
        check(&[begin("1", "/a"), begin("2", "/our"), end("2")], false);
        check(&[begin("1", "/a"), begin("2", "/our"), end("2"), end("1")], true);
        check(&[begin("1", "/a"), begin("2", "/our"), line("response completed with error", "1", ""), end("2")], true);
        check(&[begin("2", "/our"), begin("3", "/later"), end("2")], true);
    }

    #[test]
    fn what_was_answered_is_counted_at_once() {
        require!(need::command("docker-registry"), need::command("skopeo"));
        let scratch = Scratch::new("registry").expect("a scratch directory");
        let registry = Registry::start(&scratch.join("registry")).expect("a registry");
        let layout = Layout::create(&scratch.join("layout")).expect("a layout");
        let layer = Layer::new([Entry::file("a", vec![7; 100_000])]);
        let built = layout.add("1", &Image::new().layer(&layer, Compression::Plain)).expect("an image");
        layout.push("1", &registry.reference("a:1")).expect("a push");
        let layer = &built.layers[0];
        for _ in 0..50 {
            let mark = registry.mark();
            get(registry.host(), &format!("/v2/a/blobs/{}", layer.digest)).expect("a blob");
            assert_eq!(registry.blob_bytes(mark), BTreeMap::from([(layer.digest.clone(), layer.size)]));
        }
    }

    #[test]
    fn a_registry_answers_on_its_own_port_and_ends_with_its_guard() {
        require!(need::command("docker-registry"));
        let scratch = Scratch::new("registry").expect("a scratch directory");
        let one = Registry::start(&scratch.join("one")).expect("a registry");
        let two = Registry::start(&scratch.join("two")).expect("a second registry beside it");
        assert_ne!(one.host(), two.host());
        assert!(TcpStream::connect(one.host()).is_ok());
        // Not by its port, which another process may get at once.
        let process = format!("/proc/{}", one.daemon.pid());
        assert!(Path::new(&process).exists());
        drop(one);
        assert!(!Path::new(&process).exists());
    }
}
