//! Images as OCI has them: digests, references, platforms, and reading an image from a registry or a layout directory.
//!
//! [`Source`] is the entrance: it finds the manifest for a platform, verifies manifest and configuration, and opens layers as
//! streams of compressed bytes. What a stream carries is untrusted until a [`VerifyReader`] has seen its end.
//!
//! Low to high: [`digest`], [`reference`], [`platform`], [`verify`], [`manifest`], then the two places an image can be:
//! [`registry`] (with [`challenge`] and [`blob`]) and [`layout`], and [`source`] over both.

use std::io;
use std::path::PathBuf;

pub mod digest;
pub mod reference;
pub mod platform;
pub mod verify;
pub mod manifest;
pub mod challenge;
pub mod registry;
pub mod blob;
pub mod layout;
pub mod source;
#[cfg(test)]
mod odd_registry;

pub use digest::{ChainId, DiffId, Sha256, chain_ids};
pub use platform::Platform;
pub use reference::Reference;
pub use source::{Source, SourceImage, SourceLayer};
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
    /// The registry wants a login for this.
    #[error(
        "{host} refuses anonymous access to {what} (HTTP status {status}): images are read without login, so make the repository public or check its name"
    )]
    Denied {
        /// Registry host.
        host: String,
        /// Manifest or blob with its name.
        what: String,
        /// Its answer.
        status: u16,
    },
    /// No answer from the registry, or none that ended.
    #[error(
        "no usable answer from {host} for {what}, tried {tries} times: check the host name, the network and, for a registry without TLS, --plain-http"
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
    /// The HTTP client could not be set up.
    #[error("cannot set up the HTTP client: is there a CA bundle on this machine (Debian: ca-certificates)?")]
    Client {
        /// What it said.
        #[source]
        source: reqwest::Error,
    },
}
