//! Images as OCI has them: digests, references, platforms, and reading an image from a registry or a layout directory.
//!
//! [`Source`] is the entrance: it finds the manifest for a platform, verifies manifest and configuration, and opens layers as
//! streams of compressed bytes. What a stream carries is untrusted until a [`VerifyReader`] has seen its end.
//!
//! Low to high: [`digest`], [`mod@reference`], [`platform`], [`verify`], [`manifest`], then the places an image can be, and [`source`] over
//! all of them. A [`registry`] is one or more endpoints (from [`hosts`]), each of them HTTP requests with [`tls`] and, when a
//! [`challenge`] asks for it, a [`login`]; a [`blob`] is a download that survives broken ones. A [`layout`] is a directory or an
//! [`archive`], which may also be a [`docker_archive`].

use std::io;
use std::path::PathBuf;

pub mod digest;
pub mod reference;
pub mod platform;
pub mod verify;
pub mod manifest;
mod tries;
pub mod login;
pub mod access;
pub mod tls;
pub mod hosts;
pub mod challenge;
mod endpoint;
mod auth;
pub mod registry;
pub mod blob;
pub mod archive;
pub mod layout;
pub mod docker_archive;
pub mod source;
pub mod push;
#[cfg(test)]
mod odd_logins;
#[cfg(test)]
mod odd_mirrors;
#[cfg(test)]
mod odd_pushes;
#[cfg(test)]
mod odd_registry;

pub use access::Access;
pub use digest::{ChainId, DiffId, Sha256, chain_ids};
pub use login::Logins;
pub use platform::Platform;
pub use push::Target;
pub use reference::Reference;
pub use source::{ListedImage, PlatformImage, Source, SourceImage, SourceImages, SourceLayer};
pub use verify::{VerifyError, VerifyReader};

/// Why an image could not be read. Variants are what a caller can do about it.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// The text names no image.
    #[error("{text:?} is not an image reference: {reason}")]
    BadReference {
        /// What was given.
        text: String,
        /// Which rule it breaks and what would do.
        reason: String,
    },
    /// The place answered that it does not have this.
    #[error("{place} has no {what}: check the name and the tag")]
    NotFound {
        /// Registry host or layout directory.
        place: String,
        /// Manifest or blob with its name.
        what: String,
    },
    /// The image exists, for other platforms.
    #[error("{reference} has no image for {wanted}; it has: {}; choose one of them with --platform", .available.join(", "))]
    MissingPlatform {
        /// The image.
        reference: String,
        /// The platform asked for.
        wanted: Platform,
        /// The platforms there are.
        available: Vec<String>,
    },
    /// The registry wants a login for this, or another one.
    #[error("{host} refuses {what} (HTTP status {status}) {login}")]
    Denied {
        /// Registry host.
        host: String,
        /// Manifest or blob with its name.
        what: String,
        /// Its answer.
        status: u16,
        /// As whom it was asked, where that login comes from, and what to do.
        login: String,
    },
    /// A file of containerd's that names a registry's hosts is wrong.
    #[error("{}{}: {reason}", .path.display(), .line.map(|line| format!(", line {line}")).unwrap_or_default())]
    HostsFile {
        /// The file.
        path: PathBuf,
        /// Where in it.
        line: Option<usize>,
        /// What is wrong.
        reason: String,
    },
    /// A file of certificates cannot be used.
    #[error("cannot use the certificate {}: {reason}", .path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Neither a mirror nor the registry helped.
    #[error("no host gave {what}:{}", each(.errors))]
    EveryHost {
        /// Manifest or blob with its name.
        what: String,
        /// Every host asked, in order, with its own reason.
        errors: Vec<(String, OciError)>,
    },
    /// No answer from the registry, or none that ended.
    #[error(
        "no usable answer from {host} for {what}, tried {tries} times: check the host name, the network, its certificate (--ca) and, for a registry without TLS, --plain-http"
    )]
    Unreachable {
        /// Host (of the registry, or where it sent us).
        host: String,
        /// Manifest or blob with its name.
        what: String,
        /// How many requests were made.
        tries: u32,
        /// The last failure.
        #[source]
        source: reqwest::Error,
    },
    /// The registry answered with something that is of no use.
    #[error("{host} answered HTTP status {status} to the request for {what}, after {tries} tries{detail}")]
    Status {
        /// Host (of the registry, or where it sent us).
        host: String,
        /// Manifest or blob with its name.
        what: String,
        /// Its answer.
        status: u16,
        /// How many requests were made.
        tries: u32,
        /// What the registry said, ready to append; may be empty.
        detail: String,
    },
    /// Bytes that are not what their digest says.
    #[error("{what} of {place} is damaged; copy or push the image again")]
    Damaged {
        /// Registry host or layout directory.
        place: String,
        /// Manifest, configuration or layer with its name.
        what: String,
        /// Both digests, or both lengths.
        #[source]
        source: Box<VerifyError>,
    },
    /// A registry got other bytes than were sent, or says so.
    #[error("{host} does not have {what} as it was sent{detail}; push it again")]
    Rejected {
        /// Registry host.
        host: String,
        /// Manifest or blob with its name.
        what: String,
        /// What it said, ready to append; may be empty.
        detail: String,
    },
    /// The document is not what the specification says.
    #[error("{what} is malformed: {reason}; build or push the image again")]
    Malformed {
        /// Which document of which image.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// Well-formed, but nothing that Slipway can use.
    #[error("{what} cannot be used: {reason}")]
    Unsupported {
        /// Which document of which image.
        what: String,
        /// What is not supported, and what is.
        reason: String,
    },
    /// A file of the layout cannot be read.
    #[error("cannot read {}: is it part of an OCI image layout, and readable?", .path.display())]
    Layout {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// A tar file with an image cannot be used.
    #[error("cannot use the archive {}: {reason}", .path.display())]
    Archive {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The HTTP client could not be set up.
    #[error("cannot set up the HTTP client: is there a CA bundle on this machine (Debian: ca-certificates)?")]
    Client {
        /// What it said.
        #[source]
        source: reqwest::Error,
    },
}

/// A line for each host, with everything that led to its failure.
fn each(errors: &[(String, OciError)]) -> String {
    let line = |(host, error): &(String, OciError)| {
        let mut line = format!("\n  {host}: {error}");
        let mut cause = std::error::Error::source(error);
        while let Some(source) = cause {
            line.push_str(&format!(": {source}"));
            cause = source.source();
        }
        line
    };
    errors.iter().map(line).collect()
}
