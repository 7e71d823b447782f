//! A snapshotter in this process, behind a socket, and a client of it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use slipway::metrics::Metrics;
use slipway::snapshot::proto::snapshots_client::SnapshotsClient;
use slipway::snapshot::proto::*;
use slipway::snapshot::{Snapshots, TARGET_REF, serve};
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::trees::Trees;

/// Ends when dropped.
pub struct Server {
    pub trees: Arc<Trees>,
    pub client: Client,
    pub metrics: Arc<Metrics>,
    _stop: oneshot::Sender<()>,
}

impl Server {
    /// On what is in `state`, with images of its own.
    pub async fn start(state: &Path, trees: Arc<Trees>) -> Server {
        let socket = state.join("socket");
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).expect("a socket");
        let metrics = Arc::new(Metrics::new("none"));
        let snapshots = Snapshots::open(&state.join("state"), trees.clone(), metrics.clone()).expect("opened");
        let (stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(async move {
            let stopped = async { drop(stopped.await) };
            serve(listener, snapshots, stopped).await.expect("served");
        });
        Server { trees, client: Client::connect(&socket).await, metrics, _stop: stop }
    }

    /// With an empty state and no image known.
    pub async fn new() -> (Server, TempDir) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let server = Server::start(dir.path(), Arc::new(Trees::new(None))).await;
        server.trees.calls();
        (server, dir)
    }
}

/// Calls with fewer words.
#[derive(Clone)]
pub struct Client(SnapshotsClient<Channel>);

/// What `Prepare` and others came to.
pub type Outcome<T> = Result<T, Code>;

impl Client {
    pub async fn connect(socket: &Path) -> Client {
        Client(SnapshotsClient::new(testbed::grpc_channel(socket).await.expect("connected")))
    }

    /// As for a container: without a label.
    pub async fn prepare(&self, key: &str, parent: &str) -> Outcome<Vec<Mount>> {
        self.prepare_raw(key, parent, HashMap::new()).await.map_err(|status| status.code())
    }

    /// As for a layer of an image.
    pub async fn pull(&self, key: &str, parent: &str, target: &str) -> Outcome<Vec<Mount>> {
        self.prepare_raw(key, parent, target_label(target)).await.map_err(|status| status.code())
    }

    pub async fn prepare_raw(&self, key: &str, parent: &str, labels: HashMap<String, String>) -> Result<Vec<Mount>, Status> {
        let request = PrepareSnapshotRequest { snapshotter: "slipway".into(), key: key.into(), parent: parent.into(), labels };
        Ok(self.0.clone().prepare(request).await?.into_inner().mounts)
    }

    pub async fn view(&self, key: &str, parent: &str) -> Outcome<Vec<Mount>> {
        let request = ViewSnapshotRequest { snapshotter: "slipway".into(), key: key.into(), parent: parent.into(), labels: HashMap::new() };
        self.0.clone().view(request).await.map(|reply| reply.into_inner().mounts).map_err(|status| status.code())
    }

    pub async fn mounts(&self, key: &str) -> Outcome<Vec<Mount>> {
        let request = MountsRequest { snapshotter: "slipway".into(), key: key.into() };
        self.0.clone().mounts(request).await.map(|reply| reply.into_inner().mounts).map_err(|status| status.code())
    }

    pub async fn commit(&self, name: &str, key: &str, labels: HashMap<String, String>) -> Outcome<()> {
        let request = CommitSnapshotRequest { snapshotter: "slipway".into(), name: name.into(), key: key.into(), labels, parent: String::new() };
        self.0.clone().commit(request).await.map(drop).map_err(|status| status.code())
    }

    pub async fn remove(&self, key: &str) -> Outcome<()> {
        let request = RemoveSnapshotRequest { snapshotter: "slipway".into(), key: key.into() };
        self.0.clone().remove(request).await.map(drop).map_err(|status| status.code())
    }

    pub async fn stat(&self, key: &str) -> Outcome<Info> {
        let request = StatSnapshotRequest { snapshotter: "slipway".into(), key: key.into() };
        let reply = self.0.clone().stat(request).await.map_err(|status| status.code())?;
        Ok(reply.into_inner().info.expect("Stat answers with an info"))
    }

    pub async fn usage(&self, key: &str) -> Outcome<(i64, i64)> {
        let request = UsageRequest { snapshotter: "slipway".into(), key: key.into() };
        self.0.clone().usage(request).await.map(|reply| (reply.get_ref().size, reply.get_ref().inodes)).map_err(|status| status.code())
    }

    pub async fn list(&self, filters: &[String]) -> Vec<Info> {
        let request = ListSnapshotsRequest { snapshotter: "slipway".into(), filters: filters.to_vec() };
        let mut stream = self.0.clone().list(request).await.expect("listed").into_inner();
        let mut infos = Vec::new();
        while let Some(batch) = stream.message().await.expect("listed") {
            infos.extend(batch.info);
        }
        infos
    }

    pub async fn cleanup(&self) {
        self.0.clone().cleanup(CleanupRequest { snapshotter: "slipway".into() }).await.expect("cleaned up");
    }

    /// What containerd's metadata layer does after ALREADY_EXISTS: the name of the snapshot it goes on with.
    pub async fn target(&self, parent: &str, target: &str) -> Option<String> {
        let filters = [format!(r#"labels."{TARGET_REF}"=={target},parent=="{parent}""#)];
        let found = self.list(&filters).await;
        let fits = |info: &&Info| {
            info.kind() == Kind::Committed && info.parent == parent && info.labels.get(TARGET_REF).is_some_and(|label| label == target)
        };
        found.iter().find(fits).map(|info| info.name.clone())
    }
}

pub fn target_label(target: &str) -> HashMap<String, String> {
    HashMap::from([(TARGET_REF.to_owned(), target.to_owned())])
}

/// The value of an overlay option.
pub fn option<'a>(mounts: &'a [Mount], name: &str) -> Option<&'a str> {
    mounts.first()?.options.iter().find_map(|option| option.strip_prefix(name)?.strip_prefix('='))
}
