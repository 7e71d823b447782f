//! A client of our own gRPC socket: to know that it answers, and to look at an image without containerd.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status};

use crate::oci::ChainId;
use crate::snapshot::proto::snapshots_client::SnapshotsClient;
use crate::snapshot::proto::{Mount, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest, ViewSnapshotRequest};
use crate::snapshot::{VIEW_REF, is_view_base, view_base};

/// How long a connection to a socket on this machine may take: the worker may just be starting.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a request to the daemon failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers.
    #[error("slipwayd does not answer at {}: is it running, and is the configuration the one it runs with?", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
    /// It answered with a refusal.
    #[error("slipwayd refused to {what}: {}", status.message())]
    Refused {
        /// What was asked.
        what: String,
        /// Its answer.
        status: Box<Status>,
    },
    /// The chain cannot be had.
    #[error("chain {chain} is not known to this node: neither its store nor its local files have it")]
    Unknown {
        /// The chain.
        chain: ChainId,
    },
    /// The mounts that were handed out cannot be made.
    #[error("mounting at {} failed", at.display())]
    Mount {
        /// Where.
        at: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A connection to the daemon.
pub struct Client {
    snapshots: SnapshotsClient<Channel>,
}

impl Client {
    /// Connects to the daemon's socket.
    pub async fn connect(socket: &Path) -> Result<Client, ClientError> {
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The address is not used: the connector knows the socket.
        let endpoint = Endpoint::from_static("http://slipwayd").connect_timeout(CONNECT_TIMEOUT);
        let channel = endpoint.connect_with_connector(connector).await;
        let channel = channel.map_err(|source| ClientError::Connect { socket: socket.to_owned(), source })?;
        Ok(Client { snapshots: SnapshotsClient::new(channel) })
    }

    /// Asks something that needs an answer from the ledger.
    pub async fn ping(&mut self) -> Result<(), ClientError> {
        let request = StatSnapshotRequest { snapshotter: String::new(), key: "slipwayd/ping".to_owned() };
        match self.snapshots.stat(request).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::NotFound => Ok(()),
            Err(status) => Err(refused("answer", status)),
        }
    }

    /// Makes a view of the image of `chain`, called `key`, and gives the mounts that show it. Works for chains that are in the store.
    pub async fn view(&mut self, key: &str, chain: &ChainId) -> Result<Vec<Mount>, ClientError> {
        self.commit(chain).await?;
        let request = ViewSnapshotRequest { key: key.to_owned(), parent: view_base(chain), ..Default::default() };
        let response = self.snapshots.view(request).await.map_err(|status| refused("show the image", status))?;
        Ok(response.into_inner().mounts)
    }

    /// Removes the view called `key` and, when it was the last one of its image, what it was made on; no error if there is none.
    pub async fn remove_view(&mut self, key: &str) -> Result<(), ClientError> {
        let stat = self.snapshots.stat(StatSnapshotRequest { key: key.to_owned(), ..Default::default() }).await;
        let base = match stat {
            // The parent of anything else is somebody's image.
            Ok(found) => found.into_inner().info.map(|info| info.parent).filter(|parent| is_view_base(parent)),
            Err(status) if status.code() == Code::NotFound => None,
            Err(status) => return Err(refused("look up the view", status)),
        };
        self.remove(key).await?;
        match base {
            Some(base) => self.remove(&base).await,
            None => Ok(()),
        }
    }

    /// Removes a snapshot; no error if there is none or others are built on it.
    async fn remove(&mut self, key: &str) -> Result<(), ClientError> {
        let request = RemoveSnapshotRequest { key: key.to_owned(), ..Default::default() };
        match self.snapshots.remove(request).await {
            Err(status) if !matches!(status.code(), Code::NotFound | Code::FailedPrecondition) => Err(refused("remove the view", status)),
            _ => Ok(()),
        }
    }

    /// Has the image of a chain committed for views.
    async fn commit(&mut self, chain: &ChainId) -> Result<(), ClientError> {
        let key = format!("slipwayd/view {chain}");
        let labels = [(VIEW_REF.to_owned(), chain.oci())].into();
        let request = PrepareSnapshotRequest { key: key.clone(), labels, ..Default::default() };
        match self.snapshots.prepare(request).await {
            Ok(_) => {
                // A plain snapshot: the chain is not known. Nothing of it is to stay.
                self.remove(&key).await?;
                Err(ClientError::Unknown { chain: *chain })
            }
            Err(status) if status.code() == Code::AlreadyExists => Ok(()),
            Err(status) => Err(refused("prepare the image", status)),
        }
    }
}

/// Makes `mounts` as containerd would, one after the other at `at`.
pub fn mount_all(mounts: &[Mount], at: &Path) -> Result<(), ClientError> {
    for mount in mounts {
        uapi::mount::mount_with_options(&mount.r#type, &mount.source, at, &mount.options)
            .map_err(|source| ClientError::Mount { at: at.to_owned(), source })?;
    }
    Ok(())
}

fn refused(what: &str, status: Status) -> ClientError {
    ClientError::Refused { what: what.to_owned(), status: Box::new(status) }
}
