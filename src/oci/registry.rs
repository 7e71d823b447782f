//! A thin registry client: manifests and blobs by the OCI distribution specification, anonymously.
//!
//! Redirects (to object storage, usually) are followed here, so that the token stays with the registry and errors name the host
//! that failed. A request that fails in a way that may pass is made again a few times, always from the registry's own address,
//! because a signed redirect target may have expired.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::header::{ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_TYPE, HeaderMap, LOCATION, RANGE, RETRY_AFTER, WWW_AUTHENTICATE};
use reqwest::{Client, Response, StatusCode, Url};

use super::blob::{self, BlobStream};
use super::challenge::Challenge;
use super::digest::Sha256;
use super::manifest::{ACCEPT_MANIFESTS, MAX_MANIFEST};
use super::reference::Reference;
use super::{OciError, verify};

/// A registry that does not complete a TCP and TLS handshake in this time is down for practical purposes.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest silence within an answer. Registries that fetch from a slower upstream can be silent for several seconds; a dead
/// connection should not hold a conversion for minutes.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(30);
/// Requests for one thing before giving up. With the waits below that spans 3 s: a restarting registry or a hiccup of a load
/// balancer is survived, a dead one is reported while the user still watches.
const MAX_TRIES: u32 = 5;
/// Wait after the first failure; doubled each time. Tests do not wait.
const FIRST_WAIT: Duration = if cfg!(test) { Duration::from_millis(1) } else { Duration::from_millis(200) };
/// Longest wait that a registry may ask for with Retry-After; a rate limit that lasts longer is reported instead of slept out.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(30);
/// Hops from registry to blob: one is usual, a mirror may add another.
const MAX_REDIRECTS: usize = 5;
/// Largest token answer: tokens are a few KiB.
const MAX_TOKEN: u64 = 1 << 20;
/// Bytes of an error answer that are read to quote it.
const MAX_ERROR_BODY: u64 = 16 << 10;

/// One repository of a registry. Cheap to clone.
#[derive(Clone)]
pub struct Registry(Arc<Inner>);

struct Inner {
    client: Client,
    reference: Reference,
    /// `scheme://host/v2/<path>`
    base: String,
    plain_http: bool,
    token: Mutex<Option<String>>,
}

/// A manifest or index as a registry gave it. Only its own digest header was compared.
pub struct Fetched {
    /// `Content-Type`, if there was one.
    pub media_type: Option<String>,
    /// The document.
    pub bytes: Vec<u8>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Registry({})", self.0.base)
    }
}

impl Registry {
    /// A client for `reference`'s repository. Plain HTTP is used on this machine's own addresses, and elsewhere only if
    /// `plain_http` says so.
    pub fn new(reference: Reference, plain_http: bool) -> Result<Registry, OciError> {
        let loopback = reference.is_loopback();
        let plain_http = plain_http || loopback;
        let scheme = if plain_http { "http" } else { "https" };
        let mut client = Client::builder()
            .user_agent(concat!("slipway/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(SILENCE_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none());
        if loopback {
            client = client.no_proxy();
        }
        let client = client.build().map_err(|source| OciError::Client { source })?;
        let base = format!("{scheme}://{}/v2/{}", reference.host(), reference.path());
        Ok(Registry(Arc::new(Inner { client, reference, base, plain_http, token: Mutex::new(None) })))
    }

    /// The image this client was made for.
    pub fn reference(&self) -> &Reference {
        &self.0.reference
    }

    /// The manifest or index called `target`, a tag or a digest.
    pub async fn manifest(&self, target: &str) -> Result<Fetched, OciError> {
        let what = format!("manifest {target} of {}", self.0.reference.path());
        let url = format!("{}/manifests/{target}", self.0.base);
        let (headers, bytes) = self.document(&url, &what, ACCEPT_MANIFESTS, MAX_MANIFEST).await?;
        let announced = header(&headers, "docker-content-digest").and_then(|text| text.parse::<Sha256>().ok());
        if let Some(expected) = announced {
            let damaged = |source| OciError::Damaged { place: self.host().to_owned(), what: what.clone(), source: Box::new(source) };
            verify::verify_bytes(&what, expected, None, &bytes).map_err(damaged)?;
        }
        let media_type = header(&headers, CONTENT_TYPE.as_str()).map(|t| t.split(';').next().unwrap_or(t).trim().to_owned());
        Ok(Fetched { media_type, bytes })
    }

    /// The whole blob `digest`, unverified, of at most `limit` bytes: for configurations.
    pub async fn blob_bytes(&self, digest: Sha256, limit: u64) -> Result<Vec<u8>, OciError> {
        let (url, what) = self.blob_names(digest);
        Ok(self.document(&url, &what, "*/*", limit).await?.1)
    }

    /// The blob `digest` of `size` bytes as a stream, unverified. The first answer is awaited, so that a missing blob is an
    /// error here.
    pub async fn open_blob(&self, digest: Sha256, size: u64) -> Result<BlobStream, OciError> {
        let (url, what) = self.blob_names(digest);
        blob::open(self.clone(), url, what, size).await
    }

    fn blob_names(&self, digest: Sha256) -> (String, String) {
        (format!("{}/blobs/{}", self.0.base, digest.oci()), format!("blob {} of {}", digest.oci(), self.0.reference.path()))
    }

    pub(super) fn host(&self) -> &str {
        self.0.reference.host()
    }

    async fn document(&self, url: &str, what: &str, accept: &'static str, limit: u64) -> Result<(HeaderMap, Vec<u8>), OciError> {
        let mut tries = Tries::new(self.host(), what);
        loop {
            let mut response = self.get(url, accept, None, &mut tries).await?;
            let headers = response.headers().clone();
            match read_limited(&mut response, limit).await {
                Ok(Some(bytes)) => return Ok((headers, bytes)),
                Ok(None) => {
                    let reason = format!("it is larger than {limit} bytes, the most that is read of one");
                    return Err(OciError::Unsupported { what: format!("{what} at {}", self.host()), reason });
                }
                Err(error) => tries.failed(Failure::Transport(error)).await?,
            }
        }
    }

    /// One successful answer to a GET from byte `from` on, with as many requests as `tries` still allows and a new token if the
    /// registry asks for one (401 and, for tokens that ran out, 403: once).
    pub(super) async fn get(&self, url: &str, accept: &'static str, from: Option<u64>, tries: &mut Tries) -> Result<Response, OciError> {
        let mut renewed = false;
        loop {
            let mut response = match self.follow(url, accept, from).await {
                Ok(response) => response,
                Err(failure) => {
                    tries.failed(failure).await?;
                    continue;
                }
            };
            let status = response.status();
            let elsewhere = !self.is_own(response.url());
            match status {
                _ if status.is_success() => return Ok(response),
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if !elsewhere => {
                    let challenge = Challenge::in_headers(response.headers().get_all(WWW_AUTHENTICATE).iter().filter_map(|v| v.to_str().ok()));
                    match challenge.filter(|_| !renewed) {
                        Some(challenge) => self.renew_token(&challenge).await?,
                        None => return Err(tries.denied(status)),
                    }
                    renewed = true;
                }
                StatusCode::NOT_FOUND if !elsewhere => return Err(tries.not_found()),
                _ => {
                    let failure = Failure::status(&mut response, elsewhere).await;
                    tries.failed(failure).await?;
                }
            }
        }
    }

    /// One GET, through redirects. The token goes to the registry only.
    async fn follow(&self, url: &str, accept: &'static str, from: Option<u64>) -> Result<Response, Failure> {
        let mut url = Url::parse(url).map_err(|e| Failure::BadUrl { reason: e.to_string() })?;
        for _ in 0..=MAX_REDIRECTS {
            // Without "identity" a proxy may compress what it passes on, and then no digest matches.
            let mut request = self.0.client.get(url.clone()).header(ACCEPT, accept).header(ACCEPT_ENCODING, "identity");
            let token = self.0.token.lock().expect("no panic while the token is held").clone();
            if let Some(token) = token.filter(|_| self.is_own(&url)) {
                request = request.header(AUTHORIZATION, format!("Bearer {token}"));
            }
            if let Some(from) = from {
                request = request.header(RANGE, format!("bytes={from}-"));
            }
            let response = request.send().await.map_err(Failure::Transport)?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let location = header(response.headers(), LOCATION.as_str()).unwrap_or_default();
            let next = url.join(location).map_err(|e| Failure::BadUrl { reason: format!("redirect to {location:?}: {e}") })?;
            let encrypted = next.scheme() == "https" || (next.scheme() == "http" && url.scheme() == "http");
            if !encrypted {
                return Err(Failure::BadUrl { reason: format!("redirect from {} to {}", origin(&url), origin(&next)) });
            }
            url = next;
        }
        Err(Failure::BadUrl { reason: format!("more than {MAX_REDIRECTS} redirects, the last to {}", origin(&url)) })
    }

    fn is_own(&self, url: &Url) -> bool {
        Url::parse(&self.0.base).is_ok_and(|own| own.origin() == url.origin())
    }

    /// Gets an anonymous token (distribution `docs/spec/auth/token.md`). An `http` realm is asked only where HTTP is allowed anyway.
    async fn renew_token(&self, challenge: &Challenge) -> Result<(), OciError> {
        let path = self.0.reference.path();
        let what = format!("a token for {path}");
        let malformed = |reason: String| OciError::Malformed { what: format!("the login challenge of {}", self.host()), reason };
        let mut realm = Url::parse(&challenge.realm).map_err(|e| malformed(format!("realm {:?}: {e}", challenge.realm)))?;
        if !(realm.scheme() == "https" || realm.scheme() == "http" && self.0.plain_http) {
            return Err(malformed(format!("realm {realm} is not HTTPS")));
        }
        realm.query_pairs_mut().extend_pairs(challenge.service.iter().map(|service| ("service", service)));
        realm.query_pairs_mut().append_pair("scope", &challenge.scope.clone().unwrap_or_else(|| format!("repository:{path}:pull")));
        let mut tries = Tries::new(&origin(&realm), &what);
        let bytes = loop {
            let mut response = match self.0.client.get(realm.clone()).send().await {
                Ok(response) => response,
                Err(error) => {
                    tries.failed(Failure::Transport(error)).await?;
                    continue;
                }
            };
            let status = response.status();
            if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
                return Err(tries.denied(status));
            }
            if !status.is_success() {
                let failure = Failure::status(&mut response, false).await;
                tries.failed(failure).await?;
                continue;
            }
            match read_limited(&mut response, MAX_TOKEN).await {
                Ok(bytes) => break bytes.unwrap_or_default(),
                Err(error) => tries.failed(Failure::Transport(error)).await?,
            }
        };
        #[derive(serde::Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        let answer: Answer = serde_json::from_slice(&bytes).map_err(|e| malformed(format!("{realm} gave no token: {e}")))?;
        let token = answer.token.or(answer.access_token).ok_or_else(|| malformed(format!("{realm} gave no token")))?;
        *self.0.token.lock().expect("no panic while the token is held") = Some(token);
        Ok(())
    }
}

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
    async fn status(response: &mut Response, elsewhere: bool) -> Failure {
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
    failures: u32,
}

impl Tries {
    pub(super) fn new(host: &str, what: &str) -> Tries {
        Tries { host: host.to_owned(), what: what.to_owned(), failures: 0 }
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
            Failure::Status { may_pass, .. } => *may_pass,
            Failure::BadUrl { .. } => false,
        };
        if may_pass && self.failures < MAX_TRIES {
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

    pub(super) fn denied(&self, status: StatusCode) -> OciError {
        OciError::Denied { host: self.host.clone(), what: self.what.clone(), status: status.as_u16() }
    }

    pub(super) fn not_found(&self) -> OciError {
        OciError::NotFound { place: self.host.clone(), what: self.what.clone() }
    }
}

/// Host and port of a URL as people write them; nothing else of it, since a signed URL's query is a secret.
fn origin(url: &Url) -> String {
    match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host.to_owned(),
        (None, _) => url.scheme().to_owned(),
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// The body, or `None` if it is longer than `limit`.
async fn read_limited(response: &mut Response, limit: u64) -> Result<Option<Vec<u8>>, reqwest::Error> {
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
    const LONGEST: usize = 200;
    let text: String = String::from_utf8_lossy(body).chars().map(|c| if c.is_control() { ' ' } else { c }).take(LONGEST).collect();
    let text = text.trim();
    if text.is_empty() { String::new() } else { format!("; it said: {text}") }
}
