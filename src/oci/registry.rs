//! An image's repository over all hosts that serve it: mirrors in their order, then the registry itself.
//!
//! A host that cannot be reached, does not have something, refuses it or gives wrong bytes is passed over for the next.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use super::access::Access;
use super::blob::{self, BlobStream};
use super::digest::Sha256;
use super::endpoint::{Endpoint, Expected, Fetched};
use super::manifest::Document;
use super::reference::Reference;
use super::tries::{MAX_TRIES, TRIES_BEFORE_NEXT};
use super::{OciError, hosts};

/// One repository of a registry. Cheap to clone.
#[derive(Clone)]
pub struct Registry(Arc<Inner>);

struct Inner {
    reference: Reference,
    endpoints: Vec<Endpoint>,
    blobs: Mutex<Blobs>,
}

/// Which endpoints gave bytes of which blobs, and which of them gave wrong ones.
#[derive(Default)]
struct Blobs {
    gave: HashSet<(Sha256, usize)>,
    wrong: HashSet<(Sha256, usize)>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Registry({})", self.0.reference)
    }
}

impl Registry {
    /// A client for `reference`'s repository.
    pub fn new(reference: Reference, access: &Access) -> Result<Registry, OciError> {
        let hosts = hosts::find(&reference, access)?;
        let endpoints = hosts.into_iter().map(|host| Endpoint::new(host, reference.path(), access)).collect::<Result<_, _>>()?;
        Ok(Registry(Arc::new(Inner { reference, endpoints, blobs: Mutex::default() })))
    }

    /// The image this client was made for.
    pub fn reference(&self) -> &Reference {
        &self.0.reference
    }

    /// The manifest or index called `target`: a tag or, if `expected`, a digest.
    pub async fn manifest(&self, target: &str, expected: Option<(Sha256, Option<u64>)>) -> Result<Fetched, OciError> {
        let what = format!("manifest {target} of {}", self.0.reference.path());
        // Which image a tag means is only believed of hosts that were named for it.
        let asked = self.candidates(|endpoint| if expected.is_some() { endpoint.pulls() } else { endpoint.resolves() });
        let mut failures = Failures::new(&self.0.reference, &what);
        for (i, (_, endpoint)) in asked.iter().enumerate() {
            match endpoint.manifest(target, expected, most(i, &asked)).await {
                Ok(fetched) => match Document::parse(&what, fetched.media_type.as_deref(), &fetched.bytes) {
                    // A page of some proxy, say. The last one's is for the caller to complain about.
                    Err(error) if i + 1 < asked.len() => failures.add(endpoint, error),
                    _ => return Ok(fetched),
                },
                Err(error) => failures.add(endpoint, error),
            }
        }
        Err(failures.into_error())
    }

    /// The whole blob, of at most `limit` bytes: for configurations.
    pub async fn blob_bytes(&self, expected: Expected, limit: u64) -> Result<Vec<u8>, OciError> {
        let asked = self.candidates(Endpoint::pulls);
        let mut failures = Failures::new(&self.0.reference, &format!("blob {} of {}", expected.0.oci(), self.0.reference.path()));
        for (i, (_, endpoint)) in asked.iter().enumerate() {
            match endpoint.blob_bytes(expected, limit, most(i, &asked)).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => failures.add(endpoint, error),
            }
        }
        Err(failures.into_error())
    }

    /// The blob `digest` of `size` bytes as a stream, unverified. The first answer is awaited, so that a missing blob is an
    /// error here.
    pub async fn open_blob(&self, digest: Sha256, size: u64) -> Result<BlobStream, OciError> {
        blob::open(self.clone(), digest, size).await
    }

    /// Hosts to ask, with their numbers, in order: those that were down lately at the end.
    pub(super) fn candidates(&self, can: impl Fn(&Endpoint) -> bool) -> Vec<(usize, Endpoint)> {
        let mut found: Vec<(usize, Endpoint)> = self.0.endpoints.iter().cloned().enumerate().filter(|(_, endpoint)| can(endpoint)).collect();
        found.sort_by_key(|(_, endpoint)| endpoint.is_down());
        found
    }

    /// Hosts to ask for a blob: those that gave wrong bytes for it are left out.
    pub(super) fn blob_candidates(&self, digest: Sha256) -> Vec<(usize, Endpoint)> {
        let mut found = self.candidates(Endpoint::pulls);
        let blobs = self.0.blobs.lock().expect("no panic while the lists are held");
        found.retain(|(number, _)| !blobs.wrong.contains(&(digest, *number)));
        found
    }

    /// Remembers that bytes of the blob came from endpoint `number`.
    pub(super) fn note(&self, digest: Sha256, number: usize) {
        self.0.blobs.lock().expect("no panic while the lists are held").gave.insert((digest, number));
    }

    /// What the blob's stream gave was not the blob. `true`: another host can be asked, and the next stream will.
    pub fn was_wrong(&self, digest: Sha256) -> bool {
        {
            let mut blobs = self.0.blobs.lock().expect("no panic while the lists are held");
            // If several gave parts of it, the mirror is the likelier culprit.
            let first =
                (0..self.0.endpoints.len()).find(|number| blobs.gave.contains(&(digest, *number)) && !blobs.wrong.contains(&(digest, *number)));
            let Some(first) = first else { return false };
            blobs.wrong.insert((digest, first));
            let host = self.0.endpoints[first].name();
            tracing::warn!(host, digest = %digest.oci(), "a host gave wrong bytes for a blob");
        }
        !self.blob_candidates(digest).is_empty()
    }

    /// The registry itself, for messages.
    pub(super) fn host(&self) -> &str {
        self.0.endpoints.last().map_or(self.0.reference.host(), Endpoint::name)
    }
}

/// Requests to candidate `i`.
pub(super) fn most(i: usize, asked: &[(usize, Endpoint)]) -> u32 {
    if i + 1 < asked.len() { TRIES_BEFORE_NEXT } else { MAX_TRIES }
}

/// Why one host after the other did not help.
pub(super) struct Failures {
    reference: String,
    what: String,
    errors: Vec<(String, OciError)>,
}

impl Failures {
    pub(super) fn new(reference: &Reference, what: &str) -> Failures {
        Failures { reference: reference.to_string(), what: what.to_owned(), errors: Vec::new() }
    }

    pub(super) fn add(&mut self, endpoint: &Endpoint, error: OciError) {
        endpoint.learn(&error);
        tracing::debug!(host = endpoint.name(), %error, "a host did not help");
        self.errors.push((endpoint.name().to_owned(), error));
    }

    /// The error of the only host, or one that names them all.
    pub(super) fn into_error(mut self) -> OciError {
        match self.errors.len() {
            0 => {
                let reason = "no host is left to ask: see the capabilities in hosts.toml".to_owned();
                OciError::Unsupported { what: format!("{} ({})", self.reference, self.what), reason }
            }
            1 => self.errors.remove(0).1,
            _ => OciError::EveryHost { what: self.what, errors: self.errors },
        }
    }
}
