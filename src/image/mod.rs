//! From a chain ID to a mounted image: what the snapshotter asks for.
//!
//! [`Images`] joins three things: the catalog (which chains the store has, and their verified local files), the engine that serves packs,
//! and the mount tree. Its methods block: call them from a thread that may wait, never from an async one.
//!
//! A mount is keyed by the digest of its metadata image and a generation: when all packs of an image have become complete, the next
//! container gets a new `direct` mount while earlier ones stay on the mount they started with.

pub mod catalog;
mod flights;
mod local;
pub mod mounts;
mod release;
pub mod wrong;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use erofs::digest::Digest;

use crate::cache::Pack;
use crate::kernel::Serve;
use crate::mount::{Lazy, Source, Way, mount_image};
use crate::oci::ChainId;
use crate::serve::Engine;
use catalog::{Catalog, CatalogError};
use mounts::{Generation, MountDir, Mounted};
use release::Cleaner;

/// Why a chain could not be mounted. Variants are what the caller can do about it.
#[derive(Debug, thiserror::Error)]
pub enum ImageMountError {
    /// The chain's data is not on this node, and could not be had from the store.
    #[error(
        "the data of chain {chain} is not on this node and the store does not give it; if the store has lost it, remove the image and pull it again"
    )]
    Unavailable {
        /// The chain asked for.
        chain: ChainId,
        /// What the store said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No way of mounting works on this machine.
    #[error("chain {chain} cannot be mounted on this machine: {reasons}")]
    NoBackend {
        /// The chain asked for.
        chain: ChainId,
        /// For each backend why not.
        reasons: String,
    },
    /// A backend should work, and the kernel or the disk refused.
    #[error("mounting chain {chain} failed")]
    Refused {
        /// The chain asked for.
        chain: ChainId,
        /// The refusal.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Why the image of a chain cannot be promised.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotKnown {
    /// No way of mounting works on this machine, whatever the store has.
    #[error("no way into the kernel works on this node ({reasons})")]
    NoWay {
        /// For each way why not.
        reasons: String,
    },
    /// The store does not have it, or did not say so in time.
    #[error("it is not in the store, or the store did not answer in time")]
    Missed,
}

/// How images can be mounted on this machine.
#[derive(Default)]
pub struct Ways {
    /// Complete packs can be mounted from the local cache.
    pub direct: bool,
    /// What serves the rest, best first.
    pub lazy: Vec<Arc<dyn Lazy>>,
    /// What only goes on serving the images it has.
    pub retired: Vec<Arc<dyn Lazy>>,
    /// Why the others do not work.
    pub refused: Vec<(Way, String)>,
}

/// What [`Images`] works with.
pub struct ImagesOptions {
    /// Chains and their local files.
    pub catalog: Arc<Catalog>,
    /// Serves packs.
    pub engine: Arc<Engine>,
    /// What works here.
    pub ways: Ways,
    /// Where images are mounted.
    pub mount_dir: MountDir,
    /// What [`MountDir::recover`] found, its packs attached already.
    pub found: BTreeMap<Digest, Mounted>,
}

/// The images of this node. One per worker; share it as `Arc<Images>`.
pub struct Images {
    shared: Arc<Shared>,
    cleaner: Cleaner,
}

struct Shared {
    catalog: Arc<Catalog>,
    engine: Arc<Engine>,
    ways: Ways,
    mount_dir: MountDir,
    index: Mutex<Index>,
    /// How many mounts of a lazy way have a pack among their devices. Held while a pack is attached or released, so that the two never cross.
    pack_users: Mutex<HashMap<(Way, Digest), usize>>,
}

/// Entries stay for the worker's life: an image that is not mounted any more has no generations. Each image has its own lock, held while
/// it is mounted or unmounted, so that images do not wait for each other.
#[derive(Default)]
struct Index {
    images: HashMap<Digest, Arc<Mutex<Mounted>>>,
    chains: HashMap<ChainId, Digest>,
}

impl Images {
    /// Images as an earlier worker left them.
    pub fn start(options: ImagesOptions) -> std::io::Result<Images> {
        let ImagesOptions { catalog, engine, ways, mount_dir, found } = options;
        let mut index = Index::default();
        let mut pack_users = HashMap::new();
        for (digest, image) in found {
            for generation in image.generations.iter().filter(|generation| generation.way != Way::Direct) {
                for pack in &image.packs {
                    *pack_users.entry((generation.way, *pack)).or_default() += 1;
                }
            }
            index.chains.extend(image.chains.iter().map(|chain| (*chain, digest)));
            index.images.insert(digest, Arc::new(Mutex::new(image)));
        }
        let shared = Arc::new(Shared { catalog, engine, ways, mount_dir, index: Mutex::new(index), pack_users: Mutex::new(pack_users) });
        Ok(Images { cleaner: Cleaner::start(shared.clone())?, shared })
    }

    /// Whether a snapshot of this chain may be committed without its layers: its metadata (or, for a prefix, its layer trees) are local and
    /// verified, and this machine can mount it. Answers by `deadline`: a store that takes longer is a "no" (invariant 3), and the fetch goes
    /// on for the next time.
    pub fn known(&self, chain: &ChainId, deadline: Instant) -> Result<(), NotKnown> {
        if self.shared.ways.lazy.is_empty() {
            return Err(NotKnown::NoWay { reasons: self.shared.ways.reasons() });
        }
        self.shared.catalog.known(chain, deadline).map(drop).ok_or(NotKnown::Missed)
    }

    /// Mounts the chain's file system read-only, unless it is mounted already, and gives the directory it is mounted at: an overlay lower
    /// layer. The chain counts as used until [`Images::release`]. Two calls may give different directories of the same content.
    pub fn mount(&self, chain: &ChainId) -> Result<PathBuf, ImageMountError> {
        let image = self.shared.image_of(chain)?;
        let (digest, mut image) = (image.0, lock(&image.1));
        if image.chains.insert(*chain) {
            self.shared.mount_dir.update(&image).map_err(|error| refused(chain, error))?;
        }
        self.shared.mounted(chain, &digest, &mut image)
    }

    /// The last snapshot that used this chain's mount is gone. Returns at once; unmounting happens in the background. A chain that is not
    /// mounted is no error.
    pub fn release(&self, chain: &ChainId) {
        let image = {
            let index = lock(&self.shared.index);
            index.chains.get(chain).and_then(|digest| Some((*digest, index.images.get(digest)?.clone())))
        };
        if let Some((digest, image)) = image {
            let mut image = lock(&image);
            image.chains.remove(chain);
            if image.chains.is_empty() {
                self.cleaner.unmount(digest);
            }
        }
    }

    /// To be called once, when the ledger has been read: `in_use` are the chains whose mounts live snapshots refer to. Mounts found from an
    /// earlier worker stay if one of these uses them and are released otherwise; chains in use that are not mounted (after a reboot) are
    /// mounted at their next [`Images::mount`].
    pub fn recover(&self, in_use: Vec<ChainId>) {
        let images: Vec<_> = lock(&self.shared.index).images.iter().map(|(digest, image)| (*digest, image.clone())).collect();
        for (digest, image) in images {
            let mut image = lock(&image);
            image.chains.retain(|chain| in_use.contains(chain));
            if image.chains.is_empty() {
                self.cleaner.unmount(digest);
            }
        }
    }
}

impl Shared {
    /// The entry of the chain's image, made if it is new.
    fn image_of(&self, chain: &ChainId) -> Result<(Digest, Arc<Mutex<Mounted>>), ImageMountError> {
        let known = |index: &Index| index.chains.get(chain).and_then(|digest| Some((*digest, index.images.get(digest)?.clone())));
        if let Some(found) = known(&lock(&self.index)) {
            return Ok(found);
        }
        let local = self.catalog.local(chain).map_err(|error| not_local(chain, error))?;
        let packs = local.packs.iter().map(|pack| pack.digest).collect();
        let mut index = lock(&self.index);
        index.chains.insert(*chain, local.digest);
        let new = || Arc::new(Mutex::new(Mounted { metadata: local.meta, packs, ..Mounted::default() }));
        Ok((local.digest, index.images.entry(local.digest).or_insert_with(new).clone()))
    }

    /// A directory where the image is mounted: the best mount there is, or a new one.
    fn mounted(&self, chain: &ChainId, digest: &Digest, image: &mut Mounted) -> Result<PathBuf, ImageMountError> {
        self.forget_lost(image).map_err(|error| refused(chain, error))?;
        if let Some(direct) = image.generations.iter().find(|generation| generation.way == Way::Direct) {
            return Ok(direct.at.clone());
        }
        let packs: Result<Vec<Arc<Pack>>, _> = image.packs.iter().map(|pack| self.engine.pack(pack)).collect();
        let complete = self.ways.direct && packs.as_ref().is_ok_and(|packs| packs.iter().all(|pack| self.engine.is_complete(pack)));
        let current = image.generations.last().map(|generation| generation.at.clone());
        match current {
            Some(at) if !complete => Ok(at),
            Some(at) => Ok(self.mount_new(chain, digest, image, &packs.unwrap_or_default(), true).unwrap_or_else(|error| {
                tracing::warn!(%chain, error = &error as &dyn std::error::Error, "staying on the lazy mount");
                at
            })),
            None => {
                let packs = packs.map_err(|error| unavailable(chain, error));
                let mounted = packs.and_then(|packs| self.mount_new(chain, digest, image, &packs, complete));
                mounted.inspect_err(|_| self.close_unused(&image.packs))
            }
        }
    }

    /// Makes another generation: `direct` if the packs are complete, else by the first lazy way that takes the image.
    fn mount_new(
        &self,
        chain: &ChainId,
        digest: &Digest,
        image: &mut Mounted,
        packs: &[Arc<Pack>],
        complete: bool,
    ) -> Result<PathBuf, ImageMountError> {
        // Invariant 5: whatever is mounted has been verified in this worker's life, which is what `local` promises.
        image.metadata = self.catalog.local(chain).map_err(|error| not_local(chain, error))?.meta;
        if complete {
            let files = packs.iter().map(|pack| self.engine.local_file(&pack.digest())).collect();
            return self.mount_as(digest, image, Way::Direct, &Source::Files(files)).map_err(|error| refused_boxed(chain, error));
        }
        let mut failure = None;
        for lazy in &self.ways.lazy {
            match self.mount_lazily(lazy.as_ref(), digest, image) {
                Ok(at) => return Ok(at),
                Err(error) => {
                    tracing::warn!(%chain, way = %lazy.way(), error = error.as_ref() as &dyn std::error::Error, "this backend does not take the image");
                    failure = Some(error);
                }
            }
        }
        match failure {
            Some(error) => Err(refused_boxed(chain, error)),
            None => Err(ImageMountError::NoBackend { chain: *chain, reasons: self.ways.reasons() }),
        }
    }

    fn mount_lazily(&self, lazy: &dyn Lazy, digest: &Digest, image: &mut Mounted) -> Result<PathBuf, Failure> {
        let prepared = self.prepare_lazily(lazy, digest, image);
        let mounted = prepared.and_then(|source| self.mount_as(digest, image, lazy.way(), &source));
        mounted.inspect_err(|_| self.release_packs(lazy.way(), &image.packs))
    }

    /// Counts a use of the image's packs, also if it fails: a part of them may be attached then. To be undone by [`Shared::release_packs`].
    fn prepare_lazily(&self, lazy: &dyn Lazy, digest: &Digest, image: &Mounted) -> Result<Source, Failure> {
        let mut users = lock(&self.pack_users);
        for pack in &image.packs {
            *users.entry((lazy.way(), *pack)).or_default() += 1;
        }
        // Now that none can be closed: what was found of them before may be. Their tables are local by now.
        let packs = image.packs.iter().map(|pack| self.engine.pack(pack)).collect::<Result<Vec<_>, _>>()?;
        Ok(lazy.prepare(digest, &image.metadata, &packs)?)
    }

    fn mount_as(&self, digest: &Digest, image: &mut Mounted, way: Way, source: &Source) -> Result<PathBuf, Failure> {
        let generation = self.mount_dir.prepare(digest, image, way)?;
        if let Err(error) = mount_image(&image.metadata, source, &generation.at) {
            self.mount_dir.discard(&generation.at)?;
            return Err(error.into());
        }
        self.engine.metrics().mounts.bump();
        tracing::info!(image = %digest, %way, at = %generation.at.display(), "mounted");
        let at = generation.at.clone();
        image.generations.push(generation);
        Ok(at)
    }

    /// Takes out generations that somebody else unmounted.
    fn forget_lost(&self, image: &mut Mounted) -> Result<(), Failure> {
        if image.generations.is_empty() {
            return Ok(());
        }
        let mounts = uapi::mount::mounts()?;
        let there = |at: &Path| mounts.iter().any(|entry| entry.mount_point == at);
        let (kept, lost): (Vec<Generation>, Vec<Generation>) = image.generations.drain(..).partition(|generation| there(&generation.at));
        image.generations = kept;
        for generation in lost {
            tracing::warn!(at = %generation.at.display(), "somebody unmounted an image");
            self.forget(image, &generation)?;
        }
        Ok(())
    }

    /// Cleans up after a generation that is not mounted any more.
    fn forget(&self, image: &Mounted, generation: &Generation) -> Result<(), Failure> {
        self.release_packs(generation.way, &image.packs);
        Ok(self.mount_dir.discard(&generation.at)?)
    }

    /// A mount with these packs is gone: those in no other mount of a lazy way are released and closed.
    fn release_packs(&self, way: Way, packs: &[Digest]) {
        if let Some(lazy) = self.ways.lazy.iter().chain(&self.ways.retired).find(|lazy| lazy.way() == way) {
            let mut users = lock(&self.pack_users);
            let mut unused = Vec::new();
            for pack in packs {
                let count = users.entry((way, *pack)).or_default();
                *count = count.saturating_sub(1);
                if *count == 0 {
                    users.remove(&(way, *pack));
                    unused.push(*pack);
                }
            }
            lazy.release(&unused);
        }
        self.close_unused(packs);
    }

    /// Closes those of these packs that are in no mount of a lazy way.
    fn close_unused(&self, packs: &[Digest]) {
        // Waits for the disk, so not while others want to mount. Whoever mounts meanwhile gets these very packs, and they are not closed.
        self.engine.flush_packs(packs);
        let users = lock(&self.pack_users);
        let unused: Vec<Digest> = packs.iter().filter(|pack| users.keys().all(|(_, used)| used != *pack)).copied().collect();
        self.engine.close(&unused);
    }
}

impl Ways {
    /// Why nothing works, in one line.
    fn reasons(&self) -> String {
        let reasons: Vec<_> = self.refused.iter().map(|(way, reason)| format!("{way}: {reason}")).collect();
        if reasons.is_empty() { "no backend is configured".to_owned() } else { reasons.join("; ") }
    }
}

/// Any reason why a mount was not made or undone.
type Failure = Box<dyn std::error::Error + Send + Sync>;

fn refused(chain: &ChainId, error: impl Into<Failure>) -> ImageMountError {
    ImageMountError::Refused { chain: *chain, source: error.into() }
}

fn refused_boxed(chain: &ChainId, source: Failure) -> ImageMountError {
    ImageMountError::Refused { chain: *chain, source }
}

/// What the node's own disk refuses is no fault of the store.
fn not_local(chain: &ChainId, error: CatalogError) -> ImageMountError {
    match error {
        CatalogError::Disk { .. } => refused(chain, error),
        other => unavailable(chain, other),
    }
}

fn unavailable(chain: &ChainId, error: impl Into<Failure>) -> ImageMountError {
    ImageMountError::Unavailable { chain: *chain, source: error.into() }
}

/// What these locks guard is changed in single steps, so a panic elsewhere leaves it whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
