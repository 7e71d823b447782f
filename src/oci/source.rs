//! Where images come from: a registry or a layout directory, with everything about the manifest verified.
#![allow(clippy::todo)]

use tokio::io::AsyncRead;

use super::digest::{ChainId, DiffId, Sha256};
use super::platform::Platform;
use super::OciError;

/// A place to read one image from.
#[derive(Clone, Debug)]
pub enum Source {
    /// An image in a registry.
    Registry(()),
    /// An image in a layout directory.
    Layout(()),
}

/// An image for one platform whose manifest and configuration match their digests. Layers are not read yet.
#[derive(Clone, Debug)]
pub struct SourceImage {
    /// Canonical name: the full reference, or `oci:<absolute directory>[:<tag>]`.
    pub name: String,
    /// Digest of the platform's manifest.
    pub manifest_digest: Sha256,
    /// The platform's manifest, as it came.
    pub manifest_bytes: Vec<u8>,
    /// The configuration, as it came.
    pub config_bytes: Vec<u8>,
    /// The platform found.
    pub platform: Platform,
    /// Layers, lowest first.
    pub layers: Vec<SourceLayer>,
}

/// One layer as manifest and configuration describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceLayer {
    /// SHA-256 of the blob.
    pub digest: Sha256,
    /// Bytes of the blob.
    pub size: u64,
    /// Media type, one of those known.
    pub media_type: String,
    /// SHA-256 of the uncompressed tar.
    pub diff_id: DiffId,
    /// Chain ID of this layer and all below it.
    pub chain_id: ChainId,
}

/// A blob's bytes as they come: untrusted.
pub type BlobStream = Box<dyn AsyncRead + Send + Unpin>;

impl Source {
    /// What `text` names: `oci:DIR[:TAG]`, `docker://REFERENCE`, a directory that is an OCI layout (its presence is looked up),
    /// or a reference. `plain_http` allows HTTP without TLS to hosts that are not this machine.
    pub fn parse(text: &str, plain_http: bool) -> Result<Source, OciError> {
        todo!("{text} {plain_http}")
    }

    /// The image for `platform`, with manifest and configuration verified and every layer named.
    pub async fn resolve(&self, platform: &Platform) -> Result<SourceImage, OciError> {
        todo!("{platform}")
    }

    /// The blob of a layer from its start. It survives broken connections; whether the bytes are right is for a
    /// [`super::VerifyReader`] to say.
    pub async fn open_layer(&self, layer: &SourceLayer) -> Result<BlobStream, OciError> {
        todo!("{layer:?}")
    }
}
