//! How often a request is made again, how long is waited in between, and what a failure that stays is called.

use std::time::Duration;

use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{Response, StatusCode, Url};

use super::OciError;

/// Requests for one thing before giving up. With the waits below that spans 3 s: a restarting registry or a hiccup of a load
/// balancer is survived, a dead one is reported while the user still watches.
pub(super) const MAX_TRIES: u32 = 5;
/// Requests to a host that has another behind it: a hiccup is survived, and a dead mirror does not hold up what the next host has.
pub(super) const TRIES_BEFORE_NEXT: u32 = 2;
/// Wait after the first failure; doubled each time. Tests do not wait.
const FIRST_WAIT: Duration = if cfg!(test) { Duration::from_millis(1) } else { Duration::from_millis(200) };
/// Longest wait that a registry may ask for with Retry-After; a rate limit that lasts longer is reported instead of slept out.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(30);
/// Bytes of an error answer that are read to quote it.
const MAX_ERROR_BODY: u64 = 16 << 10;

/// Why one request did not help.
pub(super) enum Failure {
    /// No answer, or one that broke off.
    Transport(reqwest::Error),
    /// An answer with an error status.
    Status { host: String, status: StatusCode, retry_after: Option<Duration>, detail: String, may_pass: bool },
    /// Nowhere to ask.
    BadUrl { reason: String },
    /// The answer ended early, without saying how long it would be.
    Short { detail: String },
}

impl Failure {
    /// From an error answer; `elsewhere`: a redirect led there, and the next one may lead to somewhere better.
    pub(super) async fn status(response: &mut Response, elsewhere: bool) -> Failure {
        let status = response.status();
        let retry_after = header(response.headers(), RETRY_AFTER.as_str()).and_then(|t| t.parse().ok()).map(Duration::from_secs);
        let detail = quote(read_limited(response, MAX_ERROR_BODY).await.ok().flatten().as_deref().unwrap_or_default());
        let busy = [StatusCode::TOO_MANY_REQUESTS, StatusCode::REQUEST_TIMEOUT].contains(&status);
        let may_pass = (status.is_server_error() || busy || elsewhere) && retry_after.is_none_or(|wait| wait <= MAX_RETRY_AFTER);
        Failure::Status { host: origin(response.url()), status, retry_after, detail, may_pass }
    }
}

/// How often something was asked for in vain.
pub(super) struct Tries {
    host: String,
    what: String,
    /// Requests in a row.
    pub(super) most: u32,
    failures: u32,
}

impl Tries {
    /// For requests for `what` to `host`, at most `most` in a row.
    pub(super) fn new(host: &str, what: &str, most: u32) -> Tries {
        Tries { host: host.to_owned(), what: what.to_owned(), most, failures: 0 }
    }

    /// Something was achieved: patience starts anew.
    pub(super) fn progress(&mut self) {
        self.failures = 0;
    }

    /// Waits before the next request, or says that there should be none: the failure is final or was one too many.
    pub(super) async fn failed(&mut self, failure: Failure) -> Result<(), OciError> {
        self.failures += 1;
        let may_pass = match &failure {
            Failure::Transport(_) | Failure::Short { .. } => true,
            // The next host is sooner than what this one asks us to wait for.
            Failure::Status { retry_after: Some(_), .. } if self.most == TRIES_BEFORE_NEXT => false,
            Failure::Status { may_pass, .. } => *may_pass,
            Failure::BadUrl { .. } => false,
        };
        if may_pass && self.failures < self.most {
            tracing::debug!(host = self.host, what = self.what, failures = self.failures, "request failed, trying again");
            let doubled = FIRST_WAIT * (1 << (self.failures - 1));
            let wait = match &failure {
                Failure::Status { retry_after: Some(asked), .. } => *asked,
                _ => doubled,
            };
            tokio::time::sleep(wait).await;
            return Ok(());
        }
        let (what, tries) = (self.what.clone(), self.failures);
        Err(match failure {
            Failure::Transport(source) => {
                let host = source.url().map_or(self.host.clone(), origin);
                OciError::Unreachable { host, what, tries, source: source.without_url() }
            }
            Failure::Status { host, status, detail, .. } => OciError::Status { host, what, status: status.as_u16(), tries, detail },
            Failure::BadUrl { reason } => OciError::Malformed { what: format!("the answer of {} for {what}", self.host), reason },
            Failure::Short { detail } => OciError::Status { host: self.host.clone(), what, status: 200, tries, detail },
        })
    }

    pub(super) fn denied(&self, status: StatusCode, login: String) -> OciError {
        OciError::Denied { host: self.host.clone(), what: self.what.clone(), status: status.as_u16(), login }
    }

    pub(super) fn not_found(&self) -> OciError {
        OciError::NotFound { place: self.host.clone(), what: self.what.clone() }
    }
}

/// Host and port of a URL as people write them; nothing else of it, since a signed URL's query is a secret.
pub(super) fn origin(url: &Url) -> String {
    match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host.to_owned(),
        (None, _) => url.scheme().to_owned(),
    }
}

/// A header's value, if it is text.
pub(super) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// The body, or `None` if it is longer than `limit`.
pub(super) async fn read_limited(response: &mut Response, limit: u64) -> Result<Option<Vec<u8>>, reqwest::Error> {
    let mut bytes = Vec::new();
    while let Some(piece) = response.chunk().await? {
        if (bytes.len() + piece.len()) as u64 > limit {
            return Ok(None);
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(Some(bytes))
}

/// A registry's error text, fit for one line of a terminal: control characters are a way to forge log lines.
fn quote(body: &[u8]) -> String {
    let text = one_line(body);
    if text.is_empty() { String::new() } else { format!("; it said: {text}") }
}

/// The beginning of somebody else's text on one line and without control characters.
pub(super) fn one_line(text: &[u8]) -> String {
    const LONGEST: usize = 200;
    let text: String = String::from_utf8_lossy(text).chars().map(|c| if c.is_control() { ' ' } else { c }).take(LONGEST).collect();
    text.trim().to_owned()
}
