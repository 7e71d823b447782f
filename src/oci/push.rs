//! Writing to a registry: blobs that stream from where they are, and manifests that are read back.
//!
//! A blob that the registry has is not sent; one in another of its repositories is mounted; any other is sent in one request, verified on
//! its way: its last bytes are kept back until all of them are right. What fails in a way that may pass begins anew, with an upload of
//! its own. The registry itself is written to, never a mirror of it.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, LOCATION, WWW_AUTHENTICATE};
use reqwest::{Body, Client, Method, RequestBuilder, Response, StatusCode, Url};
use tokio_util::io::ReaderStream;

use super::access::Access;
use super::challenge::Challenge;
use super::digest::Sha256;
use super::endpoint::{Endpoint, is_loopback};
use super::reference::Reference;
use super::source::{BlobStream, Source, SourceLayer};
use super::tries::{Failure, MAX_TRIES, Tries, header, origin};
use super::verify::{Check, VerifyError};
use super::{OciError, hosts, tls};

/// Logins for one blob or manifest: the first, and one more for a token that runs out meanwhile.
const MAX_LOGINS: u32 = 2;
/// Longest time in which an upload gets nowhere: more than a source may take that is asked again and again, and than a registry needs to
/// take over what it got.
const STALL: Duration = if cfg!(test) { Duration::from_secs(5) } else { Duration::from_secs(300) };
/// How often a running upload is looked at: often enough for a bar that moves, seldom enough to cost nothing.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Bytes sent at once.
const PIECE: usize = 128 << 10;

/// A repository to push to.
pub struct Target {
    reference: Reference,
    endpoint: Endpoint,
    /// For blobs: to the registry itself, and to where it sends us.
    upload: (Client, Client),
    /// Another repository of the same registry that has the source's blobs.
    mount_from: Option<String>,
}

/// Where a blob's bytes come from.
#[derive(Clone, Copy)]
pub enum Content<'a> {
    /// They are here.
    Bytes(&'a [u8]),
    /// They are a layer of a source.
    Layer(&'a Source, &'a SourceLayer),
}

/// Who is told how many bytes of an upload have been handed to the network.
pub type Sent<'a> = &'a (dyn Fn(u64) + Sync);

/// How a blob came to be in the repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// It was there.
    Present,
    /// The registry has taken it over from the source's repository.
    Mounted,
    /// Its bytes were sent.
    Sent,
}

/// Why an attempt did not help.
enum Trouble {
    /// Perhaps next time.
    Failed(Failure),
    /// With a login, perhaps.
    Challenged(Challenge, StatusCode),
    /// Never.
    Last(OciError),
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Trouble {
        Trouble::Failed(failure)
    }
}

/// The attempts at one thing.
struct Attempts<'a> {
    endpoint: &'a Endpoint,
    tries: Tries,
    logins: u32,
}

impl Attempts<'_> {
    /// Gets ready for the next attempt, or says that there should be none.
    async fn after(&mut self, trouble: Trouble) -> Result<(), OciError> {
        match trouble {
            Trouble::Failed(failure) => self.tries.failed(failure).await,
            Trouble::Challenged(challenge, status) if self.logins < MAX_LOGINS => {
                self.logins += 1;
                self.endpoint.log_in(&challenge, status, &self.tries).await
            }
            Trouble::Challenged(_, status) => Err(self.tries.denied(status, self.endpoint.refused())),
            Trouble::Last(error) => Err(error),
        }
    }
}

impl Target {
    /// The repository and tag of `reference`, for an image from `source`.
    pub fn new(reference: Reference, access: &Access, source: &Source) -> Result<Target, OciError> {
        let mount_from = match source {
            Source::Registry(registry) => {
                let from = registry.reference();
                (from.domain() == reference.domain() && from.path() != reference.path()).then(|| from.path().to_owned())
            }
            _ => None,
        };
        let mut scopes = vec![format!("repository:{}:pull,push", reference.path())];
        scopes.extend(mount_from.iter().map(|path| format!("repository:{path}:pull")));
        let host = hosts::find(&reference, access)?.pop().expect("the registry itself is the last of its hosts");
        let upload = tls::upload_clients(&host.tls, host.dial_timeout, !is_loopback(&host.root))?;
        let endpoint = Endpoint::with_scopes(host, reference.path(), access, scopes)?;
        Ok(Target { reference, endpoint, upload, mount_from })
    }

    /// What is pushed to.
    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// Sees to it that the repository has the blob `digest` of `size` bytes. While it is uploaded `sent` is told how many of them have gone; 0 when
    /// an upload begins, be it anew.
    pub async fn push_blob(&self, digest: Sha256, size: u64, content: Content<'_>, sent: Sent<'_>) -> Result<Pushed, OciError> {
        let what = self.endpoint.blob_name(digest);
        let mut attempts = self.attempts(&what);
        loop {
            match self.has_blob(digest).await {
                Ok(true) => return Ok(Pushed::Present),
                Ok(false) => break,
                Err(trouble) => attempts.after(trouble).await?,
            }
        }
        let mut mount_from = self.mount_from.as_deref();
        attempts = self.attempts(&what);
        loop {
            match self.upload((digest, size), content, mount_from, &what, sent).await {
                Ok(pushed) => return Ok(pushed),
                Err(trouble) => match attempts.after(trouble).await {
                    // Without the right to pull from the source's repository there is no mount, but perhaps an upload.
                    Err(OciError::Denied { .. }) if mount_from.take().is_some() => attempts = self.attempts(&what),
                    after => after?,
                },
            }
        }
    }

    /// Puts the manifest or index under the tag and reads it back. Everything it names must be there.
    pub async fn push_manifest(&self, media_type: &str, bytes: &[u8]) -> Result<Sha256, OciError> {
        self.push_under(&self.reference.target(), media_type, bytes).await
    }

    /// The same for a manifest that gets no tag, as an index names it.
    pub async fn push_untagged(&self, media_type: &str, bytes: &[u8]) -> Result<Sha256, OciError> {
        self.push_under(&Sha256::of(bytes).oci(), media_type, bytes).await
    }

    async fn push_under(&self, name: &str, media_type: &str, bytes: &[u8]) -> Result<Sha256, OciError> {
        let digest = Sha256::of(bytes);
        let what = format!("manifest {name} of {}", self.reference.path());
        let mut attempts = self.attempts(&what);
        let response = loop {
            match self.put_manifest(name, media_type, bytes, &what).await {
                Ok(response) => break response,
                Err(trouble) => attempts.after(trouble).await?,
            }
        };
        if let Some(other) = header(response.headers(), "docker-content-digest").filter(|stated| *stated != digest.oci()) {
            let detail = format!(": it calls it {:?}, and not {}", other.chars().take(80).collect::<String>(), digest.oci());
            return Err(OciError::Rejected { host: self.endpoint.name().to_owned(), what, detail });
        }
        let read_back = self.endpoint.manifest(name, Some((digest, Some(bytes.len() as u64))), MAX_TRIES).await;
        read_back.map_err(|error| match error {
            OciError::Damaged { place, what, source } => OciError::Rejected { host: place, what, detail: format!(": {source}") },
            error => error,
        })?;
        Ok(digest)
    }

    fn attempts(&self, what: &str) -> Attempts<'_> {
        Attempts { endpoint: &self.endpoint, tries: Tries::new(self.endpoint.name(), what, MAX_TRIES), logins: 0 }
    }

    async fn has_blob(&self, digest: Sha256) -> Result<bool, Trouble> {
        let url = self.endpoint.url(&format!("blobs/{}", digest.oci()))?;
        let mut response = self.request(Method::HEAD, &url).send().await.map_err(Failure::Transport)?;
        match response.status() {
            StatusCode::NOT_FOUND => Ok(false),
            // Where blobs are elsewhere they are there.
            status if status.is_redirection() => Ok(true),
            _ => self.judge(&mut response, None).await.map(|()| true),
        }
    }

    async fn put_manifest(&self, name: &str, media_type: &str, bytes: &[u8], what: &str) -> Result<Response, Trouble> {
        let url = self.endpoint.url(&format!("manifests/{name}"))?;
        let request = self.request(Method::PUT, &url).header(CONTENT_TYPE, media_type).body(bytes.to_vec());
        let mut response = request.send().await.map_err(Failure::Transport)?;
        self.judge(&mut response, Some(what)).await?;
        Ok(response)
    }

    /// One upload from its beginning.
    async fn upload(
        &self,
        (digest, size): (Sha256, u64),
        content: Content<'_>,
        mount_from: Option<&str>,
        what: &str,
        sent: Sent<'_>,
    ) -> Result<Pushed, Trouble> {
        let mut url = self.endpoint.url("blobs/uploads/")?;
        if let Some(from) = mount_from {
            url.query_pairs_mut().append_pair("mount", &digest.oci()).append_pair("from", from);
        }
        let mut response = self.request(Method::POST, &url).header(CONTENT_LENGTH, 0).send().await.map_err(Failure::Transport)?;
        self.judge(&mut response, Some(what)).await?;
        if response.status() == StatusCode::CREATED && mount_from.is_some() {
            return Ok(Pushed::Mounted);
        }
        let mut url = location(&url, &response)?;
        url.query_pairs_mut().append_pair("digest", &digest.oci());
        let stream: BlobStream = match content {
            Content::Bytes(bytes) => Box::new(io::Cursor::new(bytes.to_vec())),
            Content::Layer(source, layer) => source.open_layer(layer).await.map_err(Trouble::Last)?,
        };
        let (body, watch) = outgoing(stream, Check::new(what, digest, Some(size)));
        let (own, elsewhere) = &self.upload;
        let request = self
            .request_by(own, elsewhere, Method::PUT, &url)
            .header(CONTENT_TYPE, "application/octet-stream")
            .header(CONTENT_LENGTH, size)
            .body(body);
        let answer = unless_stalled(request.send(), &watch.sent, sent).await;
        // What kept us from sending is the reason, whatever the registry made of it.
        let ours = watch.broken.lock().expect("no panic while the error is held").take();
        if let Some(error) = ours {
            return Err(from_source(error, content, what));
        }
        let Some(answer) = answer else {
            return Err(Failure::Short { detail: format!("; the upload got nowhere for {} seconds", STALL.as_secs()) }.into());
        };
        let mut response = answer.map_err(Failure::Transport)?;
        self.judge(&mut response, Some(what)).await?;
        Ok(Pushed::Sent)
    }

    /// A request to the registry, or to where it sent us; what is secret goes to the registry only.
    fn request(&self, method: Method, url: &Url) -> RequestBuilder {
        self.request_by(&self.endpoint.0.own, &self.endpoint.0.elsewhere, method, url)
    }

    fn request_by(&self, own: &Client, elsewhere: &Client, method: Method, url: &Url) -> RequestBuilder {
        let inner = &self.endpoint.0;
        if !self.endpoint.is_own(url) {
            return elsewhere.request(method, url.clone());
        }
        let request = own.request(method, url.clone()).header(ACCEPT_ENCODING, "identity").headers(inner.host.headers.clone());
        let authorization = inner.authorization.lock().expect("no panic while the header is held").clone();
        match authorization {
            Some(authorization) => request.header(AUTHORIZATION, authorization.reveal()),
            None => request,
        }
    }

    /// Success, or what is to be done about the answer; `written` names what the request was to write.
    async fn judge(&self, response: &mut Response, written: Option<&str>) -> Result<(), Trouble> {
        let status = response.status();
        if status.is_success() {
            return Ok(());
        }
        let own = self.endpoint.is_own(response.url());
        if own && matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            let challenge = Challenge::in_headers(response.headers().get_all(WWW_AUTHENTICATE).iter().filter_map(|v| v.to_str().ok()));
            if let Some(challenge) = challenge {
                return Err(Trouble::Challenged(challenge, status));
            }
        }
        let host = self.endpoint.name().to_owned();
        let failure = Failure::status(response, false).await;
        let detail = match &failure {
            Failure::Status { detail, .. } => detail.clone(),
            _ => String::new(),
        };
        let denied = |login: String| {
            let what = format!("to write to its repository {}", self.reference.path());
            Trouble::Last(OciError::Denied { host: host.clone(), what, status: status.as_u16(), login: format!("{login}{detail}") })
        };
        Err(match (status, written) {
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) if own => denied(self.endpoint.refused()),
            (StatusCode::METHOD_NOT_ALLOWED, _) => {
                denied("to everybody: is it read-only, or a mirror? Push once that is over, or to another registry".to_owned())
            }
            (StatusCode::NOT_FOUND, _) if own => {
                let what = format!("repository {} that could be pushed to{detail}", self.reference.path());
                Trouble::Last(OciError::NotFound { place: host, what })
            }
            (StatusCode::BAD_REQUEST, Some(what)) if detail.contains("DIGEST_INVALID") => {
                Trouble::Last(OciError::Rejected { host, what: what.to_owned(), detail })
            }
            _ => Trouble::Failed(failure),
        })
    }
}

/// Where an upload goes on.
fn location(asked: &Url, response: &Response) -> Result<Url, Failure> {
    let location = header(response.headers(), LOCATION.as_str());
    let location = location.ok_or_else(|| Failure::BadUrl { reason: "it does not say where to upload to".to_owned() })?;
    let url = asked.join(location).map_err(|e| Failure::BadUrl { reason: format!("it wants the upload at {location:?}: {e}") })?;
    if url.scheme() == "https" || url.scheme() == "http" && asked.scheme() == "http" {
        return Ok(url);
    }
    Err(Failure::BadUrl { reason: format!("{} wants the upload unencrypted, at {}", origin(asked), origin(&url)) })
}

/// What is known of a body that is being sent.
#[derive(Default)]
struct Watch {
    /// Bytes taken from it.
    sent: AtomicU64,
    /// What went wrong with it.
    broken: Mutex<Option<io::Error>>,
}

/// The answer, or `None` if nothing was sent for too long. `tell` hears what was sent, from 0 on.
async fn unless_stalled<T>(answer: impl Future<Output = T>, sent: &AtomicU64, tell: Sent<'_>) -> Option<T> {
    let mut answer = std::pin::pin!(answer);
    let (mut told, mut moved) = (0, Instant::now());
    tell(0);
    loop {
        let answer = tokio::time::timeout(LOOK_EVERY, &mut answer).await;
        let now = sent.load(Ordering::Relaxed);
        if now != told {
            (told, moved) = (now, Instant::now());
            tell(now);
        }
        match answer {
            Ok(answer) => return Some(answer),
            Err(_) if moved.elapsed() >= STALL => return None,
            Err(_) => {}
        }
    }
}

/// A request body that ends only if everything in it was right, and what becomes of it.
fn outgoing(stream: BlobStream, check: Check) -> (Body, Arc<Watch>) {
    let watch = Arc::new(Watch::default());
    let state = (ReaderStream::with_capacity(stream, PIECE), check, None::<Bytes>, watch.clone());
    let pieces = stream::try_unfold(state, |(mut pieces, mut check, held, watch)| async move {
        match next_piece(&mut pieces, &mut check, held).await {
            Ok(Some((piece, held))) => {
                watch.sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
                Ok(Some((piece, (pieces, check, held, watch))))
            }
            Ok(None) => Ok(None),
            Err(error) => {
                *watch.broken.lock().expect("no panic while the error is held") = Some(error);
                Err(io::Error::other("the source failed"))
            }
        }
    });
    (Body::wrap_stream(pieces), watch)
}

/// The next piece to send and the one after it, which is kept back; the last is given only when all are verified.
async fn next_piece(pieces: &mut ReaderStream<BlobStream>, check: &mut Check, mut held: Option<Bytes>) -> io::Result<Option<(Bytes, Option<Bytes>)>> {
    while let Some(piece) = pieces.next().await.transpose()? {
        check.add(&piece)?;
        if let Some(before) = held.replace(piece.clone()) {
            return Ok(Some((before, Some(piece))));
        }
    }
    check.end()?;
    Ok(held.map(|last| (last, None)))
}

/// What a failure of the bytes themselves means.
fn from_source(error: io::Error, content: Content<'_>, what: &str) -> Trouble {
    if let (Some(_), Content::Layer(source, layer)) = (VerifyError::of(&error), content)
        && source.was_wrong(layer)
    {
        return Trouble::Failed(Failure::Short { detail: "; the source gave wrong bytes".to_owned() });
    }
    let place = match content {
        Content::Layer(source, _) => source.place(),
        Content::Bytes(_) => "this machine".to_owned(),
    };
    if let Some(wrong) = VerifyError::of(&error) {
        return Trouble::Last(OciError::Damaged { place, what: what.to_owned(), source: Box::new(wrong.clone()) });
    }
    Trouble::Last(match error.downcast::<OciError>() {
        Ok(ours) => ours,
        Err(error) => OciError::Malformed { what: format!("{what} at {place}"), reason: error.to_string() },
    })
}
