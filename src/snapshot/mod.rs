//! The snapshotter: what containerd talks to. A `snapshots/v1` proxy plugin over a unix socket.
//!
//! Plain images behave exactly as with containerd's own overlayfs snapshotter. A pull announces each layer with the label
//! [`TARGET_REF`] = chain X; when the image of chain X can be had ([`LowerImages::known`]), a *lazy* snapshot is committed at once and
//! containerd is told it exists already, so it fetches and unpacks nothing. The image is mounted when something is put on top of it.
//!
//! Low to high: [`proto`] (the wire), [`ledger`] (what exists), [`filter`] (what a listing asks for), [`mounts`] (which mounts a
//! snapshot needs), [`dirs`] (where plain content lives), [`usage`] (what it takes), [`lowers`] (images mounted while in use),
//! [`requests`] (what each call does) and [`service`] (the calls themselves).

use std::path::{Path, PathBuf};

pub mod proto;
pub mod ledger;
pub mod filter;
pub mod mounts;
mod durable;
pub mod dirs;
pub mod usage;
pub mod lowers;
pub mod requests;
pub mod service;

pub use lowers::LowerImages;
pub use requests::Snapshots;
pub use service::serve;

use crate::oci::ChainId;
use ledger::LedgerError;

/// Label by which containerd names the chain a snapshot is prepared for (`core/snapshots/snapshotter.go`), as `sha256:<hex>`.
pub const TARGET_REF: &str = "containerd.io/snapshot.ref";

/// Label of the only layer of a *compact image*, from its descriptor's annotation: the chain, as `sha256:<hex>`, whose image it stands for.
///
/// Such a layer holds no files, just the metadata image; unpacked plainly it is a root file system without any program. That is what a node
/// without Slipway gets: the pull succeeds there, and every container fails before it runs, since its program is not found. Here a miss would
/// leave the same behind for ever, as containerd never asks again for a layer that it has; so the pull fails instead, with a message that says
/// why, and whoever pulls again (the kubelet does by itself) has it once the store does. This is the exception to invariant 4. Not every pull
/// hands on labels (`ctr images pull` of containerd 1 does not), so what was unpacked is looked at before it is committed: [`COMPACT_FILE`].
///
/// Nobody believes the label, which an image's author can write as they like: which image a chain has is for signed records to say, and the
/// compact image's own chain has one. All that the label can do is make the pull of its own image fail, and only where that chain is a miss.
pub const COMPACT_CHAIN: &str = "containerd.io/snapshot/slipway.chain";

/// The only file of a compact image's layer, in its root. Nobody can run or change it.
pub const COMPACT_FILE: &str = "slipway-metadata.erofs";

/// Label by which `slipwayd mount` asks for the image of a chain, as [`TARGET_REF`] does for a pull. What is committed then has a name of its own
/// and no [`TARGET_REF`], so that containerd never takes it for its own and it can go with the last view.
pub const VIEW_REF: &str = "slipway/view-of";

/// Begins the names of the lazy snapshots that [`VIEW_REF`] asks for, and no others.
const VIEW_BASES: &str = "slipway/view/";

/// The name of the lazy snapshot that [`VIEW_REF`] asks for.
pub fn view_base(chain: &ChainId) -> String {
    format!("{VIEW_BASES}{chain}")
}

/// Whether a snapshot of this name was made for views alone.
pub fn is_view_base(name: &str) -> bool {
    name.starts_with(VIEW_BASES)
}

/// Why the snapshotter cannot run.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Its record of snapshots cannot be used.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// A directory it needs cannot be made or read.
    #[error("{}: cannot be set up as a directory for snapshots: check that the state directory is writable", .path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the file system says.
        #[source]
        source: std::io::Error,
    },
    /// Overlayfs could not be told this path.
    #[error("{}: a state directory must be UTF-8 without ':', ',' or '\\', which mean something else in overlayfs options: choose another", .path.display())]
    UnfitPath {
        /// The state directory.
        path: PathBuf,
    },
    /// The gRPC server stopped.
    #[error("serving the snapshots API failed")]
    Serve {
        /// What the server says.
        #[source]
        source: tonic::transport::Error,
    },
}

/// Whether overlayfs can be told a state directory of this path.
pub fn check_state_path(state: &Path) -> Result<(), SnapshotError> {
    match state.to_str() {
        Some(text) if !text.contains([':', ',', '\\']) => Ok(()),
        _ => Err(SnapshotError::UnfitPath { path: state.to_owned() }),
    }
}
