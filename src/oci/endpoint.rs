//! One repository at one host: GET requests that are authorised, follow redirects, and are made again where that may help.
//!
//! Redirects (to object storage, usually) are followed here, so that tokens stay with the host and errors name the one that failed. A
//! request that fails in a way that may pass is made again a few times, always from the host's own address, because a signed redirect
//! target may have expired.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use reqwest::header::{ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_TYPE, HeaderMap, LOCATION, RANGE, WWW_AUTHENTICATE};
use reqwest::{Client, Response, StatusCode, Url};
use tokio::sync::OnceCell;

use super::access::Access;
use super::challenge::Challenge;
use super::digest::Sha256;
use super::hosts::Host;
use super::login::{Found, Logins, Secret};
use super::manifest::{ACCEPT_MANIFESTS, MAX_MANIFEST};
use super::tries::{Failure, Tries, header, origin, read_limited};
use super::{OciError, tls, verify};

/// Hops from registry to blob: one is usual, a mirror may add another.
const MAX_REDIRECTS: usize = 5;

/// One repository at one host. Cheap to clone.
#[derive(Clone)]
pub(super) struct Endpoint(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub host: Host,
    /// Repository within the registry.
    pub path: String,
    pub own: Client,
    pub elsewhere: Client,
    /// `--plain-http`: logins may go unencrypted to other machines.
    pub plain_http: bool,
    pub logins: Logins,
    /// What tokens must allow besides what the registry asks for: for pushing.
    pub scopes: Vec<String>,
    /// Looked up once, when first asked for, also if that fails: a helper that hangs is not waited for again.
    pub login: OnceCell<Found>,
    /// Value of the Authorization header.
    pub authorization: Mutex<Option<Secret>>,
    down: AtomicBool,
}

/// A manifest or index as a registry gave it.
pub struct Fetched {
    /// `Content-Type`, if there was one.
    pub media_type: Option<String>,
    /// The document.
    pub bytes: Vec<u8>,
}

/// Digest and, where known, length of what is asked for.
pub(super) type Expected = (Sha256, Option<u64>);

impl Endpoint {
    pub(super) fn new(host: Host, path: &str, access: &Access) -> Result<Endpoint, OciError> {
        Endpoint::with_scopes(host, path, access, Vec::new())
    }

    /// One whose tokens allow more than the registry asks for.
    pub(super) fn with_scopes(host: Host, path: &str, access: &Access, scopes: Vec<String>) -> Result<Endpoint, OciError> {
        let (own, elsewhere) = tls::clients(&host.tls, host.dial_timeout, !is_loopback(&host.root))?;
        Ok(Endpoint(Arc::new(Inner {
            host,
            path: path.to_owned(),
            own,
            elsewhere,
            plain_http: access.plain_http,
            logins: access.logins.clone(),
            scopes,
            login: OnceCell::new(),
            authorization: Mutex::new(None),
            down: AtomicBool::new(false),
        })))
    }

    pub(super) fn name(&self) -> &str {
        &self.0.host.name
    }

    pub(super) fn resolves(&self) -> bool {
        self.0.host.resolve
    }

    pub(super) fn pulls(&self) -> bool {
        self.0.host.pull
    }

    /// It failed in a way that will most likely meet the next request too.
    pub(super) fn is_down(&self) -> bool {
        self.0.down.load(Ordering::Relaxed)
    }

    /// Remembers what a failure says about the next request.
    pub(super) fn learn(&self, error: &OciError) {
        let down =
            matches!(error, OciError::Unreachable { .. }) || matches!(error, OciError::Status { status, .. } if *status >= 500 || *status == 429);
        self.0.down.store(down, Ordering::Relaxed);
    }

    /// The manifest or index called `target`, a tag or a digest, checked against `expected` and the host's own digest header.
    pub(super) async fn manifest(&self, target: &str, expected: Option<Expected>, most: u32) -> Result<Fetched, OciError> {
        let what = format!("manifest {target} of {}", self.0.path);
        let (headers, bytes) = self.document(&format!("manifests/{target}"), &what, ACCEPT_MANIFESTS, MAX_MANIFEST, most).await?;
        let announced = header(&headers, "docker-content-digest").and_then(|text| text.parse::<Sha256>().ok()).map(|digest| (digest, None));
        for expected in [announced, expected].into_iter().flatten() {
            self.check(&what, expected, &bytes)?;
        }
        let media_type = header(&headers, CONTENT_TYPE.as_str()).map(|t| t.split(';').next().unwrap_or(t).trim().to_owned());
        Ok(Fetched { media_type, bytes })
    }

    /// The whole blob, of at most `limit` bytes: for configurations.
    pub(super) async fn blob_bytes(&self, expected: Expected, limit: u64, most: u32) -> Result<Vec<u8>, OciError> {
        let what = self.blob_name(expected.0);
        let (_, bytes) = self.document(&format!("blobs/{}", expected.0.oci()), &what, "*/*", limit, most).await?;
        self.check(&what, expected, &bytes)?;
        Ok(bytes)
    }

    pub(super) fn blob_name(&self, digest: Sha256) -> String {
        format!("blob {} of {}", digest.oci(), self.0.path)
    }

    fn check(&self, what: &str, (digest, size): Expected, bytes: &[u8]) -> Result<(), OciError> {
        let damaged = |source| OciError::Damaged { place: self.name().to_owned(), what: what.to_owned(), source: Box::new(source) };
        verify::verify_bytes(what, digest, size, bytes).map_err(damaged)
    }

    async fn document(&self, at: &str, what: &str, accept: &'static str, limit: u64, most: u32) -> Result<(HeaderMap, Vec<u8>), OciError> {
        let mut tries = Tries::new(self.name(), what, most);
        loop {
            let mut response = self.get(at, accept, None, &mut tries).await?;
            let headers = response.headers().clone();
            match read_limited(&mut response, limit).await {
                Ok(Some(bytes)) => return Ok((headers, bytes)),
                Ok(None) => {
                    let reason = format!("it is larger than {limit} bytes, the most that is read of one");
                    return Err(OciError::Unsupported { what: format!("{what} at {}", self.name()), reason });
                }
                Err(error) => tries.failed(Failure::Transport(error)).await?,
            }
        }
    }

    /// One successful answer to a GET for `at` within the repository, from byte `from` on, with as many requests as `tries` still allows
    /// and a new token if the host asks for one (401 and, for tokens that ran out, 403: once).
    pub(super) async fn get(&self, at: &str, accept: &'static str, from: Option<u64>, tries: &mut Tries) -> Result<Response, OciError> {
        let mut renewed = false;
        loop {
            let mut response = match self.follow(at, accept, from).await {
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
                        Some(challenge) => self.log_in(&challenge, status, tries).await?,
                        None => return Err(tries.denied(status, self.refused())),
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

    /// One GET, through redirects. What is secret goes to the host itself only.
    async fn follow(&self, at: &str, accept: &'static str, from: Option<u64>) -> Result<Response, Failure> {
        let host = &self.0.host;
        let mut url = self.url(at)?;
        for _ in 0..=MAX_REDIRECTS {
            let own = self.is_own(&url);
            // Without "identity" a proxy may compress what it passes on, and then no digest matches.
            let client = if own { &self.0.own } else { &self.0.elsewhere };
            let mut request = client.get(url.clone()).header(ACCEPT, accept).header(ACCEPT_ENCODING, "identity");
            if own {
                request = request.headers(host.headers.clone());
                let authorization = self.0.authorization.lock().expect("no panic while the header is held").clone();
                if let Some(authorization) = authorization {
                    request = request.header(AUTHORIZATION, authorization.reveal());
                }
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

    /// The URL of `at` within the repository.
    pub(super) fn url(&self, at: &str) -> Result<Url, Failure> {
        let host = &self.0.host;
        let mut url = Url::parse(&format!("{}/{}/{at}", host.root.as_str().trim_end_matches('/'), self.0.path))
            .map_err(|e| Failure::BadUrl { reason: e.to_string() })?;
        if let Some(namespace) = &host.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        Ok(url)
    }

    pub(super) fn is_own(&self, url: &Url) -> bool {
        self.0.host.root.origin() == url.origin()
    }
}

/// The URL leads to this machine, where nobody can listen in.
pub(super) fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost",
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        None => false,
    }
}
