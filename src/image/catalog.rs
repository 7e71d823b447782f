//! The node's side of the store: from a chain ID to verified local files.
//!
//! Only the threads of its flights touch the store (invariant 3), see `flights`. A flight looks for a record ([`Store::records`]), copies what the record needs to local files, verifies it, and keeps the record
//! itself. So a chain that was found once can be mounted again by a later process, without the store's metadata.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use erofs::digest::Digest;
use erofs::fold::FOLD_VERSION;
use erofs::layer::LayerTree;
use erofs::meta::PackRef;

use super::flights::Flights;
use super::local::{Kept, LocalFiles};
use super::lock;
use super::wrong::{WrongRecord, check_devices, fold_image};
use crate::oci::ChainId;
use crate::store::record::{Found, open_record};
use crate::store::{Payload, Sizes, Store, StoreError, Trust, TrustFiles};

/// How long [`Catalog::local`] waits for files that have been lost locally. The caller is about to mount and has nothing better to do;
/// containerd gives up on a container after some minutes.
const LOCAL_WAIT: Duration = Duration::from_secs(30);

/// Answers "is chain X usable here?" and "where are its files?". Dropping it ends its threads as soon as the store lets go of them.
#[derive(Debug)]
pub struct Catalog {
    shared: Arc<Shared>,
    flights: Flights,
}

/// A chain's metadata image, local and verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalImage {
    /// Digest of the metadata image.
    pub digest: Digest,
    /// The image file, complete and read-only.
    pub meta: PathBuf,
    /// Packs, in the order of the image's device table.
    pub packs: Vec<PackRef>,
}

/// A chain's image cannot be made local.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CatalogError {
    /// Neither this node nor the store has the chain, or none of its records is trusted.
    #[error("the store {} has no trusted, complete record of chain {chain}: convert the image, or check the node's trusted keys", store.display())]
    NotInStore {
        /// The chain.
        chain: ChainId,
        /// The store asked.
        store: PathBuf,
    },
    /// The store did not answer in time. The question is still being worked on.
    #[error("the store {} did not answer about chain {chain} in time: try again when it does", store.display())]
    Slow {
        /// The chain.
        chain: ChainId,
        /// The store asked.
        store: PathBuf,
    },
    /// Asking failed for a bug of ours, which the log tells.
    #[error("the question about chain {chain} failed: see the log")]
    Panicked {
        /// The chain.
        chain: ChainId,
    },
    /// The store cannot be used.
    #[error("chain {chain} cannot be had from the store")]
    Store {
        /// The chain.
        chain: ChainId,
        /// What happened.
        #[source]
        source: Arc<StoreError>,
    },
    /// This node's disk refuses.
    #[error("chain {chain}: {} cannot be read or written; see to the node's disk", path.display())]
    Disk {
        /// The chain.
        chain: ChainId,
        /// The local file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: Arc<io::Error>,
    },
    /// What the record names does not fit together, though every part verifies: a fault of the converter that signed it.
    #[error("the record of chain {chain} is wrong: convert the image again")]
    Wrong {
        /// The chain.
        chain: ChainId,
        /// What does not fit.
        #[source]
        source: Arc<WrongRecord>,
    },
}

impl CatalogError {
    /// Whether the store answered, but what it has for this record is no good.
    fn is_about_content(&self) -> bool {
        match self {
            CatalogError::Store { source, .. } => source.is_about_content(),
            CatalogError::Wrong { .. } => true,
            _ => false,
        }
    }
}

#[derive(Debug)]
struct Shared {
    store_dir: PathBuf,
    trust: TrustFiles,
    files: LocalFiles,
    /// The store as last opened. Taken out and put back, never held while the store is touched.
    store: Mutex<Option<Arc<Store>>>,
    /// One fold at a time: each holds the trees of a whole image in memory.
    folding: Mutex<()>,
}

impl Catalog {
    /// A catalog over the store in `store` with its local files below `state`, of which there is one at a time: what a killed one left half
    /// written there is removed. Does not touch the store: one that is missing, broken or hung now is tried again with each question
    /// (invariant 4).
    pub fn new(store: PathBuf, state: PathBuf, trust: TrustFiles) -> Catalog {
        let files = LocalFiles::new(state);
        files.remove_unfinished();
        let shared = Arc::new(Shared { store_dir: store, trust, files, store: Mutex::default(), folding: Mutex::default() });
        let fetch = shared.clone();
        Catalog { shared, flights: Flights::new(move |chain| fetch.fetch(chain)) }
    }

    /// Whether `chain` can be committed: its record is trusted and, local and verified, its metadata image (a top) or layer trees (a
    /// prefix) are here. Returns by `deadline` whatever the store does (invariant 3); the fetch goes on in the background.
    pub fn known(&self, chain: &ChainId, deadline: Instant) -> Option<Arc<Payload>> {
        match self.flights.ask(chain, deadline) {
            Some(Ok(payload)) => Some(payload),
            Some(Err(error)) => {
                tracing::debug!(%chain, error = &error as &dyn std::error::Error, "not usable");
                None
            }
            None => {
                tracing::info!(%chain, store = %self.shared.store_dir.display(), "the store did not answer in time");
                None
            }
        }
    }

    /// The local files of a chain that was found before, also by an earlier process, fit to be mounted. Blocks: folds a prefix on first use,
    /// fetches again what has been lost locally, waits for the disk.
    pub fn local(&self, chain: &ChainId) -> Result<LocalImage, CatalogError> {
        let local = self.found(chain)?;
        let kept = Kept::Meta(local.digest);
        self.shared.files.make_durable(kept).map_err(|source| self.shared.disk(chain, kept, source))?;
        Ok(local)
    }

    fn found(&self, chain: &ChainId) -> Result<LocalImage, CatalogError> {
        if let Some(payload) = self.remembered(chain)
            && let Some(local) = self.shared.localise(&payload)?
        {
            return Ok(local);
        }
        let slow = || CatalogError::Slow { chain: *chain, store: self.shared.store_dir.clone() };
        let payload = self.flights.ask_anew(chain, Instant::now() + LOCAL_WAIT).ok_or_else(slow)??;
        // Lost once more between the fetch and now: someone is clearing the state directory under us.
        self.shared.localise(&payload)?.ok_or_else(|| self.shared.not_in_store(chain))
    }

    /// Sizes of a chain that was found before, also by an earlier process. Never touches the store.
    pub fn sizes(&self, chain: &ChainId) -> Option<Sizes> {
        self.remembered(chain).map(|payload| payload.sizes)
    }

    /// What was found of a chain, however long ago: the last hit, or the record an earlier process kept.
    fn remembered(&self, chain: &ChainId) -> Option<Arc<Payload>> {
        self.flights.last_hit(chain).or_else(|| self.shared.kept(chain))
    }
}

impl Shared {
    /// Asks the store for the chain and makes what its record needs local. Runs on the flights' threads only.
    fn fetch(&self, chain: &ChainId) -> Result<Arc<Payload>, CatalogError> {
        let (trust, errors) = self.trust.load_readable();
        for error in errors {
            tracing::debug!(error = &error as &dyn std::error::Error, "a trusted key cannot be read");
        }
        let store_error = |source| CatalogError::Store { chain: *chain, source: Arc::new(source) };
        let store = self.open_store().map_err(store_error)?;
        let fetched = self.keep_first(&store, chain, &trust);
        if let Err(CatalogError::Store { source, .. }) = &fetched
            && !source.is_about_content()
        {
            // Perhaps mounted anew meanwhile: the next flight opens the directory again.
            *lock(&self.store) = None;
        }
        fetched
    }

    fn open_store(&self) -> Result<Arc<Store>, StoreError> {
        let open = lock(&self.store).clone();
        if let Some(store) = open {
            return Ok(store);
        }
        let store = Arc::new(Store::open(&self.store_dir)?);
        *lock(&self.store) = Some(store.clone());
        Ok(store)
    }

    /// Keeps the first record of the chain of which everything is whole.
    fn keep_first(&self, store: &Store, chain: &ChainId, trust: &Trust) -> Result<Arc<Payload>, CatalogError> {
        let store_error = |source| CatalogError::Store { chain: *chain, source: Arc::new(source) };
        let mut first = None;
        for found in store.records(chain, trust).map_err(store_error)? {
            match self.keep(store, chain, found.map_err(store_error)?) {
                // Another record may name other files.
                Err(error) if error.is_about_content() => {
                    tracing::warn!(%chain, error = &error as &dyn std::error::Error, "passing over a record");
                    first.get_or_insert(error);
                }
                kept => return kept,
            }
        }
        Err(first.unwrap_or_else(|| self.not_in_store(chain)))
    }

    /// Copies what the record needs from the store: verified there, kept here, the record last.
    fn keep(&self, store: &Store, chain: &ChainId, found: Found) -> Result<Arc<Payload>, CatalogError> {
        let Found { payload, record } = found;
        let store_error = |source| CatalogError::Store { chain: *chain, source: Arc::new(source) };
        let has = |kept| self.files.has(kept).map_err(|source| self.disk(chain, kept, source));
        let put = |kept, bytes: &[u8]| self.files.put(kept, bytes).map_err(|source| self.disk(chain, kept, source));
        let meta = Kept::Meta(payload.metadata);
        if payload.top && !has(meta)? {
            let bytes = store.read_metadata(&payload.metadata).map_err(store_error)?;
            check_devices(&payload, &bytes).map_err(|source| CatalogError::Wrong { chain: *chain, source: Arc::new(source) })?;
            put(meta, &bytes)?;
        }
        for (diff_id, tree) in payload.diff_ids.iter().zip(&payload.trees).filter(|_| !payload.top) {
            if !has(Kept::Tree(*tree))? {
                put(Kept::Tree(*tree), &store.read_tree_bytes(diff_id, tree).map_err(store_error)?)?;
            }
        }
        let disk = |source| CatalogError::Disk { chain: *chain, path: self.files.record_path(chain), source: Arc::new(source) };
        self.files.put_record(chain, &record).map_err(disk)?;
        Ok(Arc::new(payload))
    }

    /// The record an earlier flight kept, if a key trusted now signed it. Never touches the store.
    fn kept(&self, chain: &ChainId) -> Option<Arc<Payload>> {
        let record = self.files.read_record(chain).ok()??;
        match open_record(&record, &self.trust.load_readable().0) {
            // Of any fold version: what was folded by another is as good as ever, and more of it is not promised here.
            Ok((payload, _)) if payload.chain == *chain => Some(Arc::new(payload)),
            Ok(_) => None,
            Err(fault) => {
                tracing::warn!(%chain, %fault, "the record kept of a chain is not used");
                None
            }
        }
    }

    /// The chain's metadata image from local files alone; `None` when some are missing.
    fn localise(&self, payload: &Payload) -> Result<Option<LocalImage>, CatalogError> {
        let meta = Kept::Meta(payload.metadata);
        let disk = |source| self.disk(&payload.chain, meta, source);
        let local = || LocalImage { digest: payload.metadata, meta: self.files.path(meta), packs: payload.packs.clone() };
        if self.files.has(meta).map_err(disk)? {
            return Ok(Some(local()));
        }
        if payload.top || payload.fold_version != FOLD_VERSION {
            return Ok(None);
        }
        let _one_at_a_time = lock(&self.folding);
        if self.files.has(meta).map_err(disk)? {
            return Ok(Some(local()));
        }
        let Some(trees) = self.local_trees(payload)? else { return Ok(None) };
        let bytes = fold_image(payload, &trees).map_err(|source| CatalogError::Wrong { chain: payload.chain, source: Arc::new(source) })?;
        self.files.put(meta, &bytes).map_err(disk)?;
        Ok(Some(local()))
    }

    fn local_trees(&self, payload: &Payload) -> Result<Option<Vec<LayerTree>>, CatalogError> {
        let mut trees = Vec::with_capacity(payload.trees.len());
        for &tree in &payload.trees {
            let kept = Kept::Tree(tree);
            let Some(bytes) = self.files.read(kept).map_err(|source| self.disk(&payload.chain, kept, source))? else { return Ok(None) };
            let wrong = |source| CatalogError::Wrong { chain: payload.chain, source: Arc::new(WrongRecord::Tree { tree, source }) };
            trees.push(LayerTree::decode(&bytes).map_err(wrong)?);
        }
        Ok(Some(trees))
    }

    fn disk(&self, chain: &ChainId, kept: Kept, source: io::Error) -> CatalogError {
        CatalogError::Disk { chain: *chain, path: self.files.path(kept), source: Arc::new(source) }
    }

    fn not_in_store(&self, chain: &ChainId) -> CatalogError {
        CatalogError::NotInStore { chain: *chain, store: self.store_dir.clone() }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use base64::Engine as _;
    use testbed::{need, require};
    use uapi::mount::{FuseOptions, Unmount, fuse_open, unmount};

    use super::*;
    use crate::store::Name;
    use crate::store::envelope::Envelope;
    use crate::store::sample::{Sample, layers, metadata, payloads};

    /// Longer than anything here takes: reaching it is a failure.
    fn patient() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    fn state(sample: &Sample) -> PathBuf {
        sample.dir.path().join("state")
    }

    fn catalog(sample: &Sample) -> Catalog {
        Catalog::new(sample.store.dir().to_owned(), state(sample), sample.trust_files())
    }

    #[test]
    fn every_chain_of_an_image_is_known_and_becomes_local() {
        let sample = Sample::new();
        let all = layers("a", 3);
        let payloads = sample.publish(&all);
        let catalog = catalog(&sample);
        for (n, payload) in payloads.iter().enumerate() {
            assert_eq!(catalog.sizes(&payload.chain), None);
            assert_eq!(catalog.known(&payload.chain, patient()).as_deref(), Some(payload));
            assert_eq!(catalog.sizes(&payload.chain), Some(payload.sizes));
            let local = catalog.local(&payload.chain).unwrap();
            assert_eq!((local.digest, &local.packs), (payload.metadata, &payload.packs));
            assert_eq!(fs::read(local.meta).unwrap(), metadata(&all[..=n]).bytes);
        }
    }

    #[test]
    fn a_later_process_needs_no_store_for_what_was_found() {
        let sample = Sample::new();
        let payloads = sample.publish(&layers("a", 2));
        let chains: Vec<ChainId> = payloads.iter().map(|payload| payload.chain).collect();
        let first = catalog(&sample);
        assert!(chains.iter().all(|chain| first.known(chain, patient()).is_some()));
        drop(first);
        fs::remove_dir_all(sample.store.dir()).unwrap();
        let later = catalog(&sample);
        for payload in &payloads {
            assert_eq!(later.local(&payload.chain).unwrap().digest, payload.metadata);
            assert_eq!(later.sizes(&payload.chain), Some(payload.sizes));
            assert!(later.known(&payload.chain, patient()).is_none(), "but nothing new is promised without the store");
            assert!(later.local(&payload.chain).is_ok(), "and a miss forgets nothing local");
        }
        // With the key, trust goes too.
        fs::remove_file(&sample.trust_files().0[0]).unwrap();
        assert!(catalog(&sample).local(&chains[1]).is_err());
    }

    /// What was committed by an earlier version has to be mounted by a later one, or pods that ran before a reboot do not start after it.
    #[test]
    fn a_record_that_an_earlier_version_kept_is_still_used() {
        let sample = Sample::new();
        let payloads = sample.publish_without_framings(&layers("a", 2));
        let first = catalog(&sample);
        for payload in &payloads {
            assert!(first.known(&payload.chain, patient()).is_some());
            first.local(&payload.chain).unwrap();
        }
        drop(first);
        let records = || fs::read_dir(state(&sample).join("records")).unwrap().map(|file| file.unwrap().path());
        for record in records() {
            let envelope: serde_json::Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
            let payload = base64::engine::general_purpose::STANDARD.decode(envelope["payload"].as_str().unwrap()).unwrap();
            assert!(!String::from_utf8(payload).unwrap().contains("framings"), "it is an old one");
        }
        fs::remove_dir_all(sample.store.dir()).unwrap();
        let later = catalog(&sample);
        for payload in &payloads {
            assert_eq!(later.local(&payload.chain).unwrap().digest, payload.metadata);
        }
    }

    #[test]
    fn what_another_fold_gave_is_still_used_while_it_is_here() {
        let sample = Sample::new();
        let payloads = sample.publish(&layers("a", 2));
        let first = catalog(&sample);
        for payload in &payloads {
            first.local(&payload.chain).unwrap();
        }
        drop(first);
        fs::remove_dir_all(sample.store.dir()).unwrap();
        let files = LocalFiles::new(state(&sample));
        let others: Vec<Payload> = payloads.into_iter().map(|payload| Payload { fold_version: FOLD_VERSION - 1, ..payload }).collect();
        for other in &others {
            files.put_record(&other.chain, &Envelope::seal(&other.encode(), &sample.key)).unwrap();
            assert_eq!(catalog(&sample).local(&other.chain).unwrap().digest, other.metadata);
        }
        // But a prefix is not folded anew by a fold that gives something else.
        fs::remove_file(state(&sample).join(format!("meta/{}.erofs", others[0].metadata))).unwrap();
        assert!(matches!(catalog(&sample).local(&others[0].chain), Err(CatalogError::Store { .. })));
    }

    #[test]
    fn what_was_lost_or_damaged_locally_is_fetched_again() {
        let sample = Sample::new();
        let payloads = sample.publish(&layers("a", 2));
        for payload in &payloads {
            for damage in [None, Some(&b"damaged"[..]), Some(b"")] {
                let first = catalog(&sample).local(&payload.chain).unwrap();
                for file in ["meta", "trees", "records"].into_iter().flat_map(|dir| fs::read_dir(state(&sample).join(dir)).into_iter().flatten()) {
                    match damage {
                        None => fs::remove_file(file.unwrap().path()).unwrap(),
                        Some(bytes) => fs::write(file.unwrap().path(), bytes).unwrap(),
                    }
                }
                let again = catalog(&sample).local(&payload.chain).unwrap();
                assert_eq!(again, first);
                assert_eq!(Digest::of(&fs::read(again.meta).unwrap()), payload.metadata);
            }
        }
    }

    #[test]
    fn what_is_not_usable_is_a_miss_and_asked_again() {
        let sample = Sample::new();
        let payload = payloads(&layers("a", 1), &sample.key).remove(0);
        let catalog = catalog(&sample);
        assert!(catalog.known(&payload.chain, patient()).is_none());
        let error = catalog.local(&payload.chain).unwrap_err();
        assert!(matches!(error, CatalogError::NotInStore { .. }), "{error}");
        sample.publish(&layers("a", 1));
        assert!(catalog.known(&payload.chain, patient()).is_some(), "misses are not remembered");
    }

    #[test]
    fn a_store_that_comes_later_is_found_and_one_that_breaks_is_a_miss() {
        let sample = Sample::new();
        let payloads = sample.publish(&layers("a", 2));
        let away = sample.dir.path().join("away");
        fs::rename(sample.store.dir(), &away).unwrap();
        let catalog = catalog(&sample);
        assert!(catalog.known(&payloads[0].chain, patient()).is_none());
        fs::create_dir(sample.store.dir()).unwrap();
        assert!(catalog.known(&payloads[0].chain, patient()).is_none(), "a directory that is no store yet");
        fs::remove_dir(sample.store.dir()).unwrap();
        fs::rename(&away, sample.store.dir()).unwrap();
        assert!(catalog.known(&payloads[0].chain, patient()).is_some());
        fs::write(sample.store.dir().join(Name::Meta(payloads[1].metadata).path()), b"damaged").unwrap();
        assert!(catalog.known(&payloads[1].chain, patient()).is_none());
        assert!(matches!(catalog.local(&payloads[1].chain), Err(CatalogError::Store { .. })));
    }

    #[test]
    fn a_node_that_cannot_write_its_state_misses() {
        let sample = Sample::new();
        let payload = sample.publish(&layers("a", 1)).remove(0);
        fs::write(state(&sample), b"a file where a directory should be").unwrap();
        let catalog = catalog(&sample);
        assert!(catalog.known(&payload.chain, patient()).is_none());
        assert!(matches!(catalog.local(&payload.chain), Err(CatalogError::Disk { .. })));
    }

    #[test]
    fn a_signed_record_that_is_wrong_is_an_error_not_an_image() {
        let check = |edit: &dyn Fn(&mut Payload), top: bool, part: &str| {
            let sample = Sample::new();
            let all = layers("a", 2);
            let mut payload = sample.publish(&all).swap_remove(usize::from(top));
            let honest = Name::Record { chain: payload.chain, digest: Digest::of(&payload.encode()) };
            fs::remove_file(sample.store.dir().join(honest.path())).unwrap();
            edit(&mut payload);
            sample.store.put_record(&payload, &sample.key).unwrap();
            let error = catalog(&sample).local(&payload.chain).unwrap_err();
            let CatalogError::Wrong { source, .. } = &error else { panic!("{error:?}") };
            assert!(source.to_string().contains(part), "{source}");
        };
        check(&|payload| payload.metadata = Digest::of(b"another image"), false, "it says");
        check(&|payload| payload.packs[0].blocks += 1, false, "devices");
        check(&|payload| payload.packs[0].blocks += 1, true, "devices");
        check(&|payload| payload.packs.clear(), true, "devices");
    }

    #[test]
    fn a_damaged_metadata_image_does_not_hide_a_record_of_another() {
        // The same chain twice, of two images: whichever record comes first, one is damaged in one round and the other in the other.
        for damaged in 0..2 {
            let sample = Sample::new();
            let all = layers("a", 2);
            let one = sample.publish(&all).pop().unwrap();
            let bytes = {
                // Another image of the same layers: one more file.
                let mut more = all.clone();
                more[1].1 = layers("a", 3).pop().unwrap().1;
                metadata(&more).bytes
            };
            let other = Payload { metadata: Digest::of(&bytes), ..one.clone() };
            sample.store.put_metadata(&bytes).unwrap();
            sample.store.put_record(&other, &sample.key).unwrap();
            let (bad, good) = if damaged == 0 { (&one, &other) } else { (&other, &one) };
            fs::write(sample.store.dir().join(Name::Meta(bad.metadata).path()), b"damaged").unwrap();
            let catalog = catalog(&sample);
            assert_eq!(catalog.known(&one.chain, patient()).as_deref(), Some(good), "number {damaged} is damaged");
            assert_eq!(catalog.local(&one.chain).unwrap().digest, good.metadata);
        }
    }

    #[test]
    fn whoever_asks_at_once_shares_one_flight() {
        let sample = Sample::new();
        let payload = sample.publish(&layers("a", 4)).pop().unwrap();
        let catalog = &catalog(&sample);
        let found: Vec<Arc<Payload>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..16).map(|_| scope.spawn(|| catalog.known(&payload.chain, patient()).unwrap())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(found.iter().all(|one| **one == payload));
        assert!(catalog.flights.threads() <= 4);
    }

    /// A FUSE mount nobody serves: whoever touches it waits until the device is closed, as on a dead file server.
    struct Hung {
        at: PathBuf,
        device: Option<std::os::fd::OwnedFd>,
    }

    impl Hung {
        fn over(at: &std::path::Path) -> Hung {
            let options = FuseOptions { source: "hung", subtype: "hung", max_read: 131_072 };
            Hung { at: at.to_owned(), device: Some(fuse_open(at, options).unwrap()) }
        }
    }

    impl Drop for Hung {
        fn drop(&mut self) {
            self.device = None;
            let _ = unmount(&self.at, Unmount::Detach);
        }
    }

    #[test]
    fn a_store_that_hangs_costs_a_miss_in_time_and_few_threads_and_is_used_when_it_answers() {
        require!(need::root(), need::path("/dev/fuse"));
        let sample = Sample::new();
        let payload = sample.publish(&layers("a", 1)).remove(0);
        let catalog = catalog(&sample);
        let hung = Hung::over(sample.store.dir());
        let chains = (0..100).map(|i| ChainId(crate::oci::Sha256::of(format!("{i}").as_bytes())));
        for chain in chains.chain([payload.chain]) {
            let deadline = Instant::now() + Duration::from_millis(20);
            assert!(catalog.known(&chain, deadline).is_none());
            // Far from the deadline only if the caller itself were waiting for the store.
            assert!(deadline.elapsed() < Duration::from_secs(10));
        }
        assert_eq!(catalog.flights.threads(), 4);
        drop(hung);
        assert!(catalog.known(&payload.chain, patient()).is_some());
        assert!(catalog.local(&payload.chain).is_ok());
    }

    #[test]
    fn a_chain_already_found_is_local_while_the_store_hangs() {
        require!(need::root(), need::path("/dev/fuse"));
        let sample = Sample::new();
        let payload = sample.publish(&layers("a", 2)).remove(0);
        catalog(&sample).known(&payload.chain, patient()).unwrap();
        let catalog = catalog(&sample);
        let _hung = Hung::over(sample.store.dir());
        assert_eq!(catalog.local(&payload.chain).unwrap().digest, payload.metadata);
        assert_eq!(catalog.sizes(&payload.chain), Some(payload.sizes));
        assert_eq!(catalog.flights.threads(), 0, "the store was not touched");
    }
}
