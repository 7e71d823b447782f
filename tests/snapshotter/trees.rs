//! Images stood in for by directories: which chains are known is up to the test, and so is how badly the store behaves.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use slipway::image::NotKnown;
use slipway::oci::{ChainId, Sha256};
use slipway::snapshot::LowerImages;

/// Far more than anything waited for here takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What the snapshotter asked of the images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    Known(ChainId),
    Mount(ChainId),
    Release(ChainId),
    Recover(Vec<ChainId>),
}

/// How the store behaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Store {
    #[default]
    Well,
    /// Whoever asks waits until it behaves otherwise.
    Hanging,
    /// Nothing can be mounted.
    Broken,
}

#[derive(Debug, Default)]
struct State {
    trees: BTreeMap<ChainId, PathBuf>,
    mounted: BTreeSet<ChainId>,
    calls: Vec<Call>,
    store: Store,
    recovered: bool,
}

/// Stricter than real images: it panics when used before `recover` or when recovered twice.
#[derive(Debug)]
pub struct Trees {
    /// Where trees are bind-mounted; `None` gives out the trees themselves, for which no one needs to be root.
    mount_points: Option<PathBuf>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Trees {
    /// No chain known.
    pub fn new(mount_points: Option<PathBuf>) -> Trees {
        Trees { mount_points, state: Mutex::default(), changed: Condvar::new() }
    }

    /// From now on `chain` is known, with this content.
    pub fn add(&self, chain: ChainId, tree: &Path) {
        self.state().trees.insert(chain, tree.to_owned());
    }

    pub fn forget(&self, chain: ChainId) {
        self.state().trees.remove(&chain);
    }

    pub fn behave(&self, store: Store) {
        self.state().store = store;
        self.changed.notify_all();
    }

    /// The calls since the last time this was asked.
    pub fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.state().calls)
    }

    /// Waits until this has been called.
    pub fn wait_for(&self, call: &Call) {
        self.wait_until(&format!("{call:?}"), |state| state.calls.contains(call));
    }

    /// Waits until nothing is mounted.
    pub fn wait_until_unmounted(&self) {
        self.wait_until("everything is unmounted", |state| state.mounted.is_empty());
    }

    fn wait_until(&self, what: &str, done: impl Fn(&State) -> bool) {
        let waited = self.changed.wait_timeout_while(self.state(), PATIENCE, |state| !done(state));
        let (state, timeout) = waited.unwrap_or_else(|poisoned| poisoned.into_inner());
        let (mounted, calls) = (state.mounted.clone(), state.calls.clone());
        drop(state);
        assert!(!timeout.timed_out(), "gave up after {PATIENCE:?} waiting for: {what}\nmounted: {mounted:?}\ncalls: {calls:?}");
    }

    pub fn mounted(&self) -> Vec<ChainId> {
        self.state().mounted.iter().copied().collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn note(&self, call: Call) -> MutexGuard<'_, State> {
        let mut state = self.state();
        assert!(state.recovered, "{call:?} before recover");
        state.calls.push(call);
        self.changed.notify_all();
        state
    }

    fn wait_while_hanging<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait_while(state, |state| state.store == Store::Hanging).expect("the trees' lock")
    }
}

impl LowerImages for Trees {
    fn known(&self, chain: &ChainId, _: Instant) -> Result<(), NotKnown> {
        let state = self.note(Call::Known(*chain));
        let state = self.wait_while_hanging(state);
        if state.store == Store::Broken {
            return Err(NotKnown::NoWay { reasons: "it is a test".into() });
        }
        state.trees.contains_key(chain).then_some(()).ok_or(NotKnown::Missed)
    }

    fn mount(&self, chain: &ChainId) -> Result<PathBuf, Box<dyn Error + Send + Sync>> {
        let state = self.note(Call::Mount(*chain));
        let mut state = self.wait_while_hanging(state);
        if state.store == Store::Broken {
            return Err("the store has lost it".into());
        }
        let tree = state.trees.get(chain).ok_or("no such chain")?.clone();
        let Some(points) = &self.mount_points else {
            state.mounted.insert(*chain);
            return Ok(tree);
        };
        let at = points.join(chain.to_string());
        if state.mounted.insert(*chain) {
            std::fs::create_dir_all(&at)?;
            let (tree, at) = (tree.to_str().ok_or("not UTF-8")?, at.to_str().ok_or("not UTF-8")?);
            testbed::run("mount", ["--bind", tree, at])?;
            testbed::run("mount", ["-o", "remount,bind,ro,nodev,nosuid", at])?;
        }
        Ok(at)
    }

    fn release(&self, chain: &ChainId) {
        let mut state = self.note(Call::Release(*chain));
        if state.mounted.remove(chain)
            && let Some(points) = &self.mount_points
        {
            testbed::run("umount", [points.join(chain.to_string())]).expect("unmounted");
        }
        self.changed.notify_all();
    }

    fn recover(&self, in_use: Vec<ChainId>) {
        let mut state = self.state();
        assert!(!std::mem::replace(&mut state.recovered, true), "recovered twice");
        state.calls.push(Call::Recover(in_use));
    }
}

/// Some chain, always the same for the same number.
pub fn chain(number: u8) -> ChainId {
    ChainId(Sha256([number; 32]))
}
