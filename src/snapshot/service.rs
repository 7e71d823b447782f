//! The gRPC side: containerd's calls to [`Snapshots`], its results and errors back on the wire.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::pin::Pin;

use prost_types::Timestamp;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_stream::{Iter, iter};
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status};

use super::SnapshotError;
use super::filter::Filters;
use super::ledger::{self, LedgerError, NewSnapshot, Row, Stamp};
use super::proto::snapshots_server::{Snapshots as SnapshotsRpc, SnapshotsServer};
use super::proto::*;
use super::requests::{RequestError, Snapshots};

/// Snapshots per message of a listing, as containerd's own service sends them (`contrib/snapshotservice`).
const LIST_BATCH: usize = 100;

/// Answers containerd on `listener` until `shutdown` is done and the calls under way have been answered.
pub async fn serve(listener: UnixListener, snapshots: Snapshots, shutdown: impl Future<Output = ()>) -> Result<(), SnapshotError> {
    let incoming = UnixListenerStream::new(listener);
    let served = Server::builder().add_service(SnapshotsServer::new(snapshots)).serve_with_incoming_shutdown(incoming, shutdown);
    served.await.map_err(|source| SnapshotError::Serve { source })
}

#[tonic::async_trait]
impl SnapshotsRpc for Snapshots {
    async fn prepare(&self, request: Request<PrepareSnapshotRequest>) -> Result<Response<PrepareSnapshotResponse>, Status> {
        let PrepareSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let new = NewSnapshot { kind: ledger::Kind::Active, key, parent, labels: sorted(labels) };
        let mounts = self.to_its_end(|this| Box::pin(async move { this.create(new).await })).await?;
        Ok(Response::new(PrepareSnapshotResponse { mounts }))
    }

    async fn view(&self, request: Request<ViewSnapshotRequest>) -> Result<Response<ViewSnapshotResponse>, Status> {
        let ViewSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let new = NewSnapshot { kind: ledger::Kind::View, key, parent, labels: sorted(labels) };
        let mounts = self.to_its_end(|this| Box::pin(async move { this.create(new).await })).await?;
        Ok(Response::new(ViewSnapshotResponse { mounts }))
    }

    async fn mounts(&self, request: Request<MountsRequest>) -> Result<Response<MountsResponse>, Status> {
        let key = request.into_inner().key;
        let mounts = self.to_its_end(|this| Box::pin(async move { this.mounts(key).await })).await?;
        Ok(Response::new(MountsResponse { mounts }))
    }

    async fn commit(&self, request: Request<CommitSnapshotRequest>) -> Result<Response<()>, Status> {
        let CommitSnapshotRequest { name, key, labels, parent, .. } = request.into_inner();
        let labels = sorted(labels);
        self.to_its_end(|this| Box::pin(async move { this.commit(key, name, parent, labels).await })).await?;
        Ok(Response::new(()))
    }

    async fn remove(&self, request: Request<RemoveSnapshotRequest>) -> Result<Response<()>, Status> {
        let key = request.into_inner().key;
        self.to_its_end(|this| Box::pin(async move { this.remove(&key, None).await })).await?;
        Ok(Response::new(()))
    }

    async fn stat(&self, request: Request<StatSnapshotRequest>) -> Result<Response<StatSnapshotResponse>, Status> {
        let key = request.into_inner().key;
        let row = Snapshots::stat(self, key.clone()).await?;
        Ok(Response::new(StatSnapshotResponse { info: Some(info(key, row)) }))
    }

    async fn update(&self, request: Request<UpdateSnapshotRequest>) -> Result<Response<UpdateSnapshotResponse>, Status> {
        let UpdateSnapshotRequest { info: wanted, update_mask, .. } = request.into_inner();
        let Info { name, labels, .. } = wanted.ok_or_else(|| Status::invalid_argument("an update needs the info it shall set"))?;
        let (key, labels, paths) = (name.clone(), sorted(labels), update_mask.unwrap_or_default().paths);
        let row = self.to_its_end(|this| Box::pin(async move { this.update(key, labels, paths).await })).await?;
        Ok(Response::new(UpdateSnapshotResponse { info: Some(info(name, row)) }))
    }

    type ListStream = Iter<std::vec::IntoIter<Result<ListSnapshotsResponse, Status>>>;

    async fn list(&self, request: Request<ListSnapshotsRequest>) -> Result<Response<Self::ListStream>, Status> {
        let filters = Filters::parse(&request.into_inner().filters);
        let rows = Snapshots::list(self).await?;
        let infos: Vec<_> = rows.into_iter().filter(|(name, row)| filters.pass(name, row)).map(|(name, row)| info(name, row)).collect();
        let batches: Vec<_> = infos.chunks(LIST_BATCH).map(|batch| Ok(ListSnapshotsResponse { info: batch.to_vec() })).collect();
        Ok(Response::new(iter(batches)))
    }

    async fn usage(&self, request: Request<UsageRequest>) -> Result<Response<UsageResponse>, Status> {
        let ledger::Usage { size, inodes } = Snapshots::usage(self, request.into_inner().key).await?;
        Ok(Response::new(UsageResponse { size, inodes }))
    }

    async fn cleanup(&self, _: Request<CleanupRequest>) -> Result<Response<()>, Status> {
        self.to_its_end(|this| Box::pin(async move { this.cleanup().await })).await?;
        Ok(Response::new(()))
    }
}

/// A call on its way.
type Call<T> = Pin<Box<dyn Future<Output = Result<T, RequestError>> + Send>>;

impl Snapshots {
    /// Runs a call that changes something as a task of its own: tonic drops the handler when containerd hangs up, the task goes on.
    async fn to_its_end<T: Send + 'static>(&self, call: impl FnOnce(Snapshots) -> Call<T>) -> Result<T, Status> {
        match tokio::spawn(call(self.clone())).await {
            Ok(result) => Ok(result?),
            Err(panicked) => Err(Status::internal(format!("the snapshotter has a bug: {panicked}"))),
        }
    }
}

impl From<RequestError> for Status {
    fn from(error: RequestError) -> Status {
        let code = match &error {
            RequestError::Available { .. } => Code::AlreadyExists,
            RequestError::Lower(_) | RequestError::Compact { .. } | RequestError::CompactUnpacked { .. } => Code::Unavailable,
            RequestError::Directory { .. } => Code::Internal,
            RequestError::Ledger(error) => match error {
                LedgerError::NotFound { .. } => Code::NotFound,
                LedgerError::AlreadyExists { .. } => Code::AlreadyExists,
                LedgerError::FailedPrecondition { .. } => Code::FailedPrecondition,
                LedgerError::InvalidArgument { .. } => Code::InvalidArgument,
                _ => Code::Internal,
            },
        };
        Status::new(code, error.text())
    }
}

fn info(name: String, row: Row) -> Info {
    let kind = match row.kind {
        ledger::Kind::View => Kind::View,
        ledger::Kind::Active => Kind::Active,
        ledger::Kind::Committed => Kind::Committed,
    };
    Info {
        name,
        parent: row.parent,
        kind: kind.into(),
        created_at: Some(timestamp(row.created)),
        updated_at: Some(timestamp(row.updated)),
        labels: row.labels.into_iter().collect(),
    }
}

fn timestamp(stamp: Stamp) -> Timestamp {
    Timestamp { seconds: stamp.seconds, nanos: stamp.nanos.cast_signed() }
}

fn sorted(labels: HashMap<String, String>) -> BTreeMap<String, String> {
    labels.into_iter().collect()
}
