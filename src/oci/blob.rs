//! A blob as a stream that survives what registries do to connections: a broken one is resumed where it broke.

use std::io;

use bytes::{Buf, Bytes};
use futures_util::stream;
use reqwest::header::CONTENT_RANGE;
use reqwest::{Response, StatusCode};
use tokio::io::AsyncRead;
use tokio_util::io::StreamReader;

use super::OciError;
use super::digest::Sha256;
use super::endpoint::Endpoint;
use super::registry::{Failures, Registry, most};
use super::tries::{Failure, Tries};

/// A blob's bytes as they come: untrusted.
pub type BlobStream = Box<dyn AsyncRead + Send + Unpin>;

/// Broken connections survived per blob. Each must have brought bytes (or [`Tries`] ends it earlier); a connection that
/// breaks every few MB over a 10 GB layer still gets through, one that gives a byte at a time does not go on for ever.
const MAX_RESUMES: u32 = 1000;

struct Download {
    registry: Registry,
    digest: Sha256,
    what: String,
    size: u64,
    /// Bytes handed out so far.
    offset: u64,
    /// Bytes that a server without Range support sends again.
    skip: u64,
    response: Option<Response>,
    resumes: u32,
    /// Hosts to ask with their numbers, and which of them is being asked.
    hosts: Vec<(usize, Endpoint)>,
    at: usize,
    tries: Tries,
    failures: Failures,
}

/// Opens blob `digest`, whose descriptor says `size` bytes, and waits for the first answer.
pub(super) async fn open(registry: Registry, digest: Sha256, size: u64) -> Result<BlobStream, OciError> {
    let what = format!("blob {} of {}", digest.oci(), registry.reference().path());
    let hosts = registry.blob_candidates(digest);
    let failures = Failures::new(registry.reference(), &what);
    let Some((_, first)) = hosts.first() else { return Err(failures.into_error()) };
    let tries = Tries::new(first.name(), &what, most(0, &hosts));
    let mut download = Download { registry, digest, what, size, offset: 0, skip: 0, response: None, resumes: 0, hosts, at: 0, tries, failures };
    download.connect().await?;
    let pieces = stream::try_unfold(download, |mut download| async move {
        match download.next().await {
            Ok(Some(piece)) => Ok(Some((piece, download))),
            Ok(None) => Ok(None),
            Err(error) => Err(io::Error::other(error)),
        }
    });
    Ok(Box::new(StreamReader::new(Box::pin(pieces))))
}

impl Download {
    /// Asks one host after the other for what is still missing.
    async fn connect(&mut self) -> Result<(), OciError> {
        loop {
            match self.connect_here().await {
                Ok(()) => return Ok(()),
                Err(error) => self.next_host(error)?,
            }
        }
    }

    /// Gives the current host up for the next, which goes on where this one ended, or says that there is none.
    fn next_host(&mut self, error: OciError) -> Result<(), OciError> {
        let Some((_, endpoint)) = self.hosts.get(self.at) else { return Err(error) };
        self.failures.add(endpoint, error);
        self.at += 1;
        match self.hosts.get(self.at) {
            Some((_, next)) => {
                self.tries = Tries::new(next.name(), &self.what, most(self.at, &self.hosts));
                Ok(())
            }
            None => Err(std::mem::replace(&mut self.failures, Failures::new(self.registry.reference(), &self.what)).into_error()),
        }
    }

    async fn connect_here(&mut self) -> Result<(), OciError> {
        let from = (self.offset > 0).then_some(self.offset);
        let (number, endpoint) = &self.hosts[self.at];
        let response = endpoint.get(&format!("blobs/{}", self.digest.oci()), "*/*", from, &mut self.tries).await?;
        self.skip = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range = response.headers().get(CONTENT_RANGE).and_then(|v| v.to_str().ok()).unwrap_or("nothing");
                if range.strip_prefix("bytes ").and_then(|r| r.split('-').next()).and_then(|start| start.parse().ok()) != Some(self.offset) {
                    let reason = format!("asked to go on at byte {}, the registry sent range {range:?}", self.offset);
                    return Err(OciError::Malformed { what: format!("{} at {}", self.what, endpoint.name()), reason });
                }
                0
            }
            // The whole blob again, from a server that does not know ranges.
            _ => self.offset,
        };
        self.registry.note(self.digest, *number);
        self.response = Some(response);
        Ok(())
    }

    /// The next bytes; `None` at the end of what the registry has, be that too early or too late.
    async fn next(&mut self) -> Result<Option<Bytes>, OciError> {
        loop {
            let Some(response) = &mut self.response else {
                self.connect().await?;
                continue;
            };
            let framed = response.content_length().is_some();
            let failure = match response.chunk().await {
                Ok(Some(mut piece)) => {
                    let skipped = self.skip.min(piece.len() as u64);
                    self.skip -= skipped;
                    piece.advance(skipped as usize);
                    if piece.is_empty() {
                        continue;
                    }
                    self.offset += piece.len() as u64;
                    self.tries.progress();
                    return Ok(Some(piece));
                }
                // An answer with a length that has all its bytes is the registry's last word, however few they are: the reader's
                // check will report a truncated blob. Without a length it may be a broken connection.
                Ok(None) if framed || self.offset >= self.size => return Ok(None),
                Ok(None) => Failure::Short { detail: format!("; the answer ended after {} of {} bytes", self.offset, self.size) },
                Err(error) => Failure::Transport(error),
            };
            self.response = None;
            self.resumes += 1;
            let failed = if self.resumes > MAX_RESUMES {
                let detail = format!("; the connection broke {} times, the last time after {} of {} bytes", self.resumes, self.offset, self.size);
                let (host, what) = (self.hosts[self.at].1.name().to_owned(), self.what.clone());
                Err(OciError::Status { host, what, status: 200, tries: self.resumes, detail })
            } else {
                self.tries.failed(failure).await
            };
            if let Err(error) = failed {
                self.next_host(error)?;
            }
        }
    }
}
