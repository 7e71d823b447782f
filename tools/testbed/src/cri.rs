//! The Container Runtime Interface as the kubelet uses it, reduced to images.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use proto::image_service_client::ImageServiceClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

#[allow(missing_docs, clippy::all, reason = "generated from proto/cri.proto")]
mod proto {
    tonic::include_proto!("runtime.v1");
}

/// A CRI image service client on a unix socket. Its calls block; not for use inside an async runtime.
#[derive(Debug)]
pub struct Cri {
    runtime: tokio::runtime::Runtime,
    client: ImageServiceClient<Channel>,
}

/// An image as CRI lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CriImage {
    /// `sha256:` and the digest of the configuration.
    pub id: String,
    /// References with a tag.
    pub tags: Vec<String>,
    /// References with a digest.
    pub digests: Vec<String>,
    /// Bytes of manifest, configuration and layers as they are in the registry.
    pub size: u64,
}

/// Connects to a gRPC server on a unix socket.
pub async fn grpc_channel(socket: &Path) -> Result<Channel> {
    let path = PathBuf::from(socket);
    // The address is never used: the connector ignores it.
    let endpoint = Endpoint::from_static("http://localhost");
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    endpoint.connect_with_connector(connector).await.with_context(|| format!("{} does not answer", socket.display()))
}

/// A runtime for blocking calls of a client.
pub(crate) fn client_runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().context("no runtime for a client")
}

impl Cri {
    /// Connects to containerd's socket.
    pub fn connect(socket: &Path) -> Result<Cri> {
        let runtime = client_runtime()?;
        let client = ImageServiceClient::new(runtime.block_on(grpc_channel(socket))?);
        Ok(Cri { runtime, client })
    }

    /// Pulls an image as the kubelet does and returns its id (`sha256:…`).
    pub fn pull(&mut self, reference: &str) -> Result<String> {
        let request = proto::PullImageRequest { image: spec(reference) };
        let answer = self.runtime.block_on(self.client.pull_image(request)).map_err(plain).with_context(|| format!("PullImage {reference}"))?;
        Ok(answer.into_inner().image_ref)
    }

    /// Removes an image under all its names; containerd frees its snapshots before this returns.
    pub fn remove(&mut self, reference: &str) -> Result<()> {
        let request = proto::RemoveImageRequest { image: spec(reference) };
        self.runtime.block_on(self.client.remove_image(request)).map_err(plain).with_context(|| format!("RemoveImage {reference}"))?;
        Ok(())
    }

    /// What CRI knows of one image; nothing when it has none of that name.
    pub fn status(&mut self, reference: &str) -> Result<Option<CriImage>> {
        let request = proto::ImageStatusRequest { image: spec(reference) };
        let answer = self.runtime.block_on(self.client.image_status(request)).map_err(plain).with_context(|| format!("ImageStatus {reference}"))?;
        Ok(answer.into_inner().image.map(CriImage::from))
    }

    /// All images CRI knows, unpacked ones only.
    pub fn images(&mut self) -> Result<Vec<CriImage>> {
        let answer = self.runtime.block_on(self.client.list_images(proto::ListImagesRequest {})).map_err(plain).context("ListImages")?;
        Ok(answer.into_inner().images.into_iter().map(CriImage::from).collect())
    }
}

fn spec(reference: &str) -> Option<proto::ImageSpec> {
    Some(proto::ImageSpec { image: reference.to_owned() })
}

/// tonic's own text repeats metadata nobody needs; code and message are what containerd said.
fn plain(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{:?}: {}", status.code(), status.message())
}

impl From<proto::Image> for CriImage {
    fn from(image: proto::Image) -> CriImage {
        CriImage { id: image.id, tags: image.repo_tags, digests: image.repo_digests, size: image.size }
    }
}
