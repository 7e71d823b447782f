//! What each call does: ledger, directories and images together.
//!
//! A call that has begun runs to its end even if containerd hangs up, so nothing is left half done by an aborted pull.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::io;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::dirs::Dirs;
use super::ledger::{Kind, Ledger, LedgerError, Lineage, NewSnapshot, Row, SnapshotId, Stamp, Usage};
use super::lowers::{LowerError, LowerImages, Lowers};
use super::mounts::Layout;
use super::proto::Mount;
use super::{COMPACT_CHAIN, COMPACT_FILE, SnapshotError, TARGET_REF, VIEW_REF, check_state_path, usage, view_base};
use crate::image::NotKnown;
use crate::metrics::Metrics;
use crate::oci::{ChainId, Sha256};

/// Present when the kernel's overlayfs knows the option `index`.
const OVERLAY_INDEX: &str = "/sys/module/overlay/parameters/index";
/// The words of `/proc/self/uid_map` in the initial user namespace.
const WHOLE_ID_RANGE: [&str; 3] = ["0", "0", "4294967295"];
/// What is shown of a label that anybody may have written: a chain ID is shorter.
const MAX_SHOWN: usize = 80;

/// Why a call fails.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The ledger's rules or its disk.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// Not an error for containerd: it need not fetch or unpack this layer.
    #[error("the content of {name:?} is available already")]
    Available {
        /// The committed snapshot that holds it.
        name: String,
    },
    /// A compact image's layer, which is of no use unpacked.
    #[error(
        "{chain} cannot start lazily: {why}; it is the layer of a compact image, which holds no files but stands for those of chain {stands_for}: {}, or use the image it was made from, or a portable target of that",
        remedy(.why)
    )]
    Compact {
        /// Why it was not found.
        why: NotKnown,
        /// What was asked for.
        chain: String,
        /// What the layer says it stands for, fit to be shown.
        stands_for: String,
    },
    /// The same, unpacked because whoever pulls it did not say which chain it is.
    #[error(
        "{name:?} is the layer of a compact image, which holds no files but stands for another image's; it was pulled without the labels by which Slipway finds that: pull it the way Kubernetes does (crictl pull; ctr images pull of containerd 2 without --local), or use the image it was made from, or a portable target of that"
    )]
    CompactUnpacked {
        /// What it was to be committed as.
        name: String,
    },
    /// The image below is not mounted.
    #[error(transparent)]
    Lower(#[from] LowerError),
    /// The snapshot's own directory could not be used.
    #[error("the directory of snapshot {key:?} cannot be used: look at the disk of the state directory")]
    Directory {
        /// The key in question.
        key: String,
        /// What the file system says.
        #[source]
        source: io::Error,
    },
}

impl RequestError {
    /// The message with all its causes, as containerd's user will see it.
    pub fn text(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    }
}

/// The snapshots of this node.
#[derive(Clone)]
pub struct Snapshots {
    ledger: Arc<Ledger>,
    dirs: Arc<Dirs>,
    lowers: Arc<Lowers>,
    metrics: Arc<Metrics>,
}

impl Snapshots {
    /// Takes up what is below `state` (made if missing), clears what crashes left there, and tells `images` what is in use. Waits for the
    /// local disk only.
    pub fn open(state: &Path, images: Arc<dyn LowerImages>, metrics: Arc<Metrics>) -> Result<Snapshots, SnapshotError> {
        check_state_path(state)?;
        let layout = Layout::new(state, overlay_options());
        let dirs = Dirs::open(state, layout)?;
        let ledger = Arc::new(Ledger::open(&state.join("ledger.redb"))?);
        let failed = |source| SnapshotError::Directory { path: dirs.layout().snapshots().to_owned(), source };
        ledger.hold_ids(|ids| dirs.discard_orphans(ids))?.map_err(failed)?;
        images.recover(ledger.chains_in_use()?.into_iter().collect());
        let lowers = Arc::new(Lowers::new(images, ledger.clone()));
        Ok(Snapshots { ledger, dirs: Arc::new(dirs), lowers, metrics })
    }

    /// Prepare and View: adds a snapshot and returns its mounts, or commits a lazy one and says so.
    pub async fn create(&self, new: NewSnapshot) -> Result<Vec<Mount>, RequestError> {
        if new.kind == Kind::Active {
            let why = self.commit_lazily(&new).await?;
            refuse_compact(&new.labels, why)?;
        }
        let (kind, key) = (new.kind, new.key.clone());
        let make =
            move |this: &Snapshots| this.ledger.create(new, Stamp::now(), |id, lineage| this.dirs.make(kind, id, lineage.uppers.first().copied()));
        let (row, lineage) = self.blocking(make).await?;
        let Some(chain) = lineage.lower else {
            return Ok(self.dirs.layout().mounts(kind, row.id, &lineage.uppers, None));
        };
        let mounted = match self.lowers.mount(chain).await {
            Ok(lower) => self.settle_on(&key, row.id, &lineage.uppers, lower).await,
            Err(error) => Err(error.into()),
        };
        match mounted {
            Ok(lower) => Ok(self.dirs.layout().mounts(kind, row.id, &lineage.uppers, Some(&lower))),
            Err(error) => {
                tracing::warn!(%key, %chain, error = %error.text(), "no snapshot on top of an image");
                // It may be gone already: removed while the mount was under way.
                let _ = self.remove(&key, Some(row.id)).await;
                self.lowers.release_if_unused(chain);
                Err(error)
            }
        }
    }

    /// The handshake of a pull. Ok says why to go on as for a plain image (invariant 4), unless [`refuse_compact`] says no.
    async fn commit_lazily(&self, new: &NewSnapshot) -> Result<NotKnown, RequestError> {
        let chain_in = |label| new.labels.get(label).and_then(|text| text.parse::<ChainId>().ok());
        let (chain, name) = match (chain_in(TARGET_REF), chain_in(VIEW_REF)) {
            (Some(chain), _) => (chain, lazy_name(&chain, &new.parent)),
            (None, Some(chain)) => (chain, view_base(&chain)),
            (None, None) => return Ok(NotKnown::Missed),
        };
        let is_compact = new.labels.contains_key(COMPACT_CHAIN);
        let known = if is_compact { self.lowers.known_in_patience(chain).await } else { self.lowers.known(chain).await };
        if let Err(why) = known {
            self.metrics.chains_missed.bump();
            tracing::info!(%chain, reason = %why, "plain pull");
            return Ok(why);
        }
        let NewSnapshot { parent, labels, .. } = new.clone();
        let committed = {
            let name = name.clone();
            self.blocking(move |this| this.ledger.commit_lazy(&name, &parent, chain, labels, Stamp::now())).await
        };
        match committed {
            Ok(()) => tracing::info!(%chain, %name, "chain is in the store: nothing to pull"),
            Err(LedgerError::AlreadyExists { .. }) => {}
            // Which no plain pull could make up for.
            Err(error) if is_compact => return Err(error.into()),
            Err(error) => {
                self.metrics.chains_missed.bump();
                tracing::warn!(%chain, %error, "no lazy snapshot: plain pull");
                return Ok(NotKnown::Missed);
            }
        }
        self.metrics.chains_hit.bump();
        Err(RequestError::Available { name })
    }

    /// With the image mounted at `lower`: gives a new snapshot right on top of it the owner of the image's root. Fails if the snapshot has
    /// been removed meanwhile.
    async fn settle_on(&self, key: &str, id: SnapshotId, uppers: &[SnapshotId], lower: PathBuf) -> Result<PathBuf, RequestError> {
        let (key, on_image) = (key.to_owned(), uppers.is_empty());
        self.blocking(move |this| {
            this.still_there(&key, id)?;
            if on_image {
                this.dirs.set_owner(id, &lower).map_err(|source| RequestError::Directory { key, source })?;
            }
            Ok(lower)
        })
        .await
    }

    /// Whether `key` still is the snapshot it was before an image was mounted for it.
    fn still_there(&self, key: &str, id: SnapshotId) -> Result<(), LedgerError> {
        let row = self.ledger.get(key)?;
        if row.id == id { Ok(()) } else { Err(LedgerError::NotFound { key: key.to_owned() }) }
    }

    /// The mounts of an active snapshot or a view, its image mounted again if it is not any more.
    pub async fn mounts(&self, key: String) -> Result<Vec<Mount>, RequestError> {
        let (row, lineage) = {
            let key = key.clone();
            self.blocking(move |this| this.ledger.get_with_lineage(&key).map(|found| (key, found))).await.and_then(mountable)?
        };
        let Some(chain) = lineage.lower else {
            return Ok(self.dirs.layout().mounts(row.kind, row.id, &lineage.uppers, None));
        };
        let lower = self.lowers.mount(chain).await?;
        // A removal may have come in between, with its release ahead of this mount: then nobody else would undo it.
        if let Err(error) = self.blocking(move |this| this.still_there(&key, row.id)).await {
            self.lowers.release_if_unused(chain);
            return Err(error.into());
        }
        Ok(self.dirs.layout().mounts(row.kind, row.id, &lineage.uppers, Some(&lower)))
    }

    /// Turns the active snapshot `key` into the committed one `name`. Its content is on disk before the ledger says so: containerd never unpacks
    /// a committed layer again, so one that a power cut left with empty files would stay so.
    pub async fn commit(&self, key: String, name: String, parent: String, labels: BTreeMap<String, String>) -> Result<(), RequestError> {
        let held = self
            .blocking(move |this| {
                let row = this.ledger.get(&key)?;
                this.refuse_unpacked_compact(&key, &row, &name)?;
                let usage = this.measure(&key, &row)?;
                // Outside the ledger's transaction: other requests need not wait for this disk.
                if row.kind == Kind::Active {
                    this.dirs.make_durable(row.id).map_err(|source| RequestError::Directory { key: key.clone(), source })?;
                }
                Ok::<_, RequestError>(this.ledger.commit(&key, &name, &parent, labels, usage, Stamp::now())?)
            })
            .await?;
        held.into_iter().for_each(|chain| self.lowers.release_if_unused(chain));
        Ok(())
    }

    /// Fails if what is to be committed is a first layer that holds what a compact image's does: see [`COMPACT_CHAIN`]. Once committed it would stay
    /// for ever, and later pulls with labels would find it there.
    fn refuse_unpacked_compact(&self, key: &str, row: &Row, name: &str) -> Result<(), RequestError> {
        if row.kind != Kind::Active || !row.parent.is_empty() {
            return Ok(());
        }
        let only = self.dirs.holds_only(row.id, COMPACT_FILE);
        if only.map_err(|source| RequestError::Directory { key: key.to_owned(), source })? {
            let refusal = RequestError::CompactUnpacked { name: name.to_owned() };
            tracing::warn!(reason = %refusal, "no plain layer of a compact image");
            return Err(refusal);
        }
        Ok(())
    }

    /// Removes a snapshot nothing is built on; with `only`, just if it still is that one.
    pub async fn remove(&self, key: &str, only: Option<SnapshotId>) -> Result<(), RequestError> {
        let key = key.to_owned();
        let removed = self.blocking(move |this| {
            let removed = this.ledger.remove(&key, only)?;
            this.dirs.discard(removed.id);
            Ok::<_, LedgerError>(removed)
        });
        removed.await?.held.into_iter().for_each(|chain| self.lowers.release_if_unused(chain));
        Ok(())
    }

    /// What the ledger has on `key`.
    pub async fn stat(&self, key: String) -> Result<Row, RequestError> {
        Ok(self.blocking(move |this| this.ledger.get(&key)).await?)
    }

    /// Changes labels; see [`Ledger::update`].
    pub async fn update(&self, key: String, labels: BTreeMap<String, String>, paths: Vec<String>) -> Result<Row, RequestError> {
        Ok(self.blocking(move |this| this.ledger.update(&key, &labels, &paths, Stamp::now())).await?)
    }

    /// Every snapshot with its key.
    pub async fn list(&self) -> Result<Vec<(String, Row)>, RequestError> {
        Ok(self.blocking(|this| this.ledger.list()).await?)
    }

    /// What a snapshot takes. Only the content of active ones is counted when asked; the image below never is.
    pub async fn usage(&self, key: String) -> Result<Usage, RequestError> {
        self.blocking(move |this| {
            let row = this.ledger.get(&key)?;
            this.measure(&key, &row)
        })
        .await
    }

    /// Frees what belongs to no snapshot. The deleting itself goes on in the background.
    pub async fn cleanup(&self) -> Result<(), RequestError> {
        self.blocking(|this| {
            let moved = this.ledger.hold_ids(|ids| this.dirs.discard_orphans(ids))?;
            moved.map_err(|source| RequestError::Directory { key: String::new(), source })
        })
        .await
    }

    fn measure(&self, key: &str, row: &Row) -> Result<Usage, RequestError> {
        match row.kind {
            Kind::Active => {
                usage::of_directory(&self.dirs.layout().upper(row.id)).map_err(|source| RequestError::Directory { key: key.to_owned(), source })
            }
            Kind::View | Kind::Committed => Ok(row.usage),
        }
    }

    /// Runs work that waits for the local disk on a thread where that does no harm.
    async fn blocking<T, E>(&self, work: impl FnOnce(&Snapshots) -> Result<T, E> + Send + 'static) -> Result<T, E>
    where
        T: Send + 'static,
        E: Send + 'static,
    {
        let this = self.clone();
        let done = tokio::task::spawn_blocking(move || work(&this)).await;
        done.unwrap_or_else(|error| resume_unwind(error.into_panic()))
    }
}

/// Fails if what nothing lazy was found for is the layer of a compact image: see [`COMPACT_CHAIN`] for why invariant 4 does not hold there.
fn refuse_compact(labels: &BTreeMap<String, String>, why: NotKnown) -> Result<(), RequestError> {
    let Some(stands_for) = labels.get(COMPACT_CHAIN) else { return Ok(()) };
    let chain = labels.get(TARGET_REF).and_then(|text| text.parse::<ChainId>().ok());
    let chain = chain.map_or_else(|| "this layer".to_owned(), |chain| format!("chain {chain}"));
    let stands_for: String = stands_for.chars().filter(|c| c.is_ascii_graphic()).take(MAX_SHOWN).collect();
    let refusal = RequestError::Compact { why, chain, stands_for };
    tracing::warn!(reason = %refusal, "no plain pull of a compact image");
    Err(refusal)
}

/// What to do about it when nobody can pull plainly.
fn remedy(why: &NotKnown) -> &'static str {
    match why {
        NotKnown::NoWay { .. } => "see to the kernel and the configuration of this node",
        NotKnown::Missed => "check this node's store and trusted keys and convert the image again",
    }
}

/// Only active snapshots and views have mounts.
fn mountable((key, (row, lineage)): (String, (Row, Lineage))) -> Result<(Row, Lineage), LedgerError> {
    if row.kind == Kind::Committed {
        let reason = "it is committed: mounts are for active snapshots and views";
        return Err(LedgerError::FailedPrecondition { what: "mount", key, reason });
    }
    Ok((row, lineage))
}

/// The name of the lazy snapshot for `chain` on `parent`. The parent is part of it because the same chain may be asked for on top of the
/// plain and of the lazy form of the layer below, and containerd wants each with the parent it named. Hashed, since parents' names hold names.
fn lazy_name(chain: &ChainId, parent: &str) -> String {
    let parent = Sha256::of(parent.as_bytes()).to_string();
    format!("slipway/{chain}/{}", &parent[..32])
}

/// What every overlay gets besides its directories, as containerd's overlayfs snapshotter decides it.
fn overlay_options() -> Vec<String> {
    let mut options = Vec::new();
    if Path::new(OVERLAY_INDEX).exists() {
        options.push("index=off".to_owned());
    }
    let id_map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    if !id_map.is_empty() && !id_map.split_whitespace().eq(WHOLE_ID_RANGE) {
        // In a user namespace overlayfs cannot write trusted.* attributes.
        options.push("userxattr".to_owned());
    }
    options
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::task::{Context, Wake, Waker};

    use super::*;

    /// What was asked of the images, as it happens.
    struct Told(Mutex<Sender<&'static str>>);

    impl LowerImages for Told {
        fn known(&self, _: &ChainId, _: std::time::Instant) -> Result<(), NotKnown> {
            Ok(())
        }

        fn mount(&self, _: &ChainId) -> Result<PathBuf, Box<dyn Error + Send + Sync>> {
            self.0.lock().unwrap().send("mount").unwrap();
            Ok("/".into())
        }

        fn release(&self, _: &ChainId) {
            self.0.lock().unwrap().send("release").unwrap();
        }

        fn recover(&self, _: Vec<ChainId>) {}
    }

    /// Tells when the future it was given to can go on.
    struct Ready(Mutex<Sender<()>>);

    impl Wake for Ready {
        fn wake(self: Arc<Self>) {
            // The future may be over.
            let _ = self.0.lock().unwrap().send(());
        }
    }

    /// Mounts has read the ledger, then the snapshot is removed and its image released, and only then Mounts mounts the image: nothing would
    /// ever have released it.
    #[test]
    fn an_image_mounted_for_a_snapshot_just_removed_is_released() {
        let state = tempfile::tempdir().unwrap();
        let (told, calls): (_, Receiver<&str>) = channel();
        // One thread for what may block, so that this test decides when it works.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).max_blocking_threads(1).enable_all().build().unwrap();
        let _inside = runtime.enter();
        let snapshots = Snapshots::open(state.path(), Arc::new(Told(Mutex::new(told))), Arc::new(Metrics::new("none"))).unwrap();
        let chain = ChainId(Sha256([1; 32]));
        let container = || NewSnapshot { kind: Kind::Active, key: "container".into(), parent: "image".into(), labels: BTreeMap::new() };
        snapshots.ledger.commit_lazy("image", "", chain, BTreeMap::new(), Stamp::now()).unwrap();
        runtime.block_on(snapshots.create(container())).unwrap();
        assert_eq!(calls.recv().unwrap(), "mount");

        let (go_on, stopped) = channel::<()>();
        runtime.spawn_blocking(move || stopped.recv());
        let (ready, is_ready) = channel();
        let mut mounts = std::pin::pin!(snapshots.mounts("container".into()));
        let waker = Waker::from(Arc::new(Ready(Mutex::new(ready))));
        assert!(mounts.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        drop(go_on);
        // The thread has read the ledger; what comes of it waits for the next poll.
        is_ready.recv().unwrap();
        runtime.block_on(snapshots.remove("container", None)).unwrap();
        assert_eq!(calls.recv().unwrap(), "release");
        let outcome = runtime.block_on(mounts);
        assert!(matches!(outcome, Err(RequestError::Ledger(LedgerError::NotFound { .. }))), "{outcome:?}");
        assert_eq!([calls.recv().unwrap(), calls.recv().unwrap()], ["mount", "release"]);
    }
}
