//! The worker's ways to mount images: found by trying, taken over from the worker before, started, stopped.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use erofs::digest::Digest;

use super::link::{HolderLink, KeptByName};
use super::protocol::FdName;
use crate::config::BackendChoice;
use crate::image::Ways;
use crate::image::mounts::Mounted;
use crate::mount::{Keeper, Lazy, PackDir, PackDirError, Start, Way, probe_file_backed};
use crate::serve::Engine;

/// Name of the kept descriptor that is the FUSE connection of the directory of packs.
const FUSE: &str = "fuse-blob";

/// How long the start waits for the tables of packs that were mounted before. They are local files; only lost ones come from the store, and
/// those must not hold up every other pack (invariant 3).
const ATTACH_WAIT: Duration = Duration::from_secs(3);

/// Time between attempts to get a mounted pack's lost tables from the store. Reads of it fail meanwhile.
const ATTACH_RETRY: Duration = Duration::from_secs(2);

/// What works on this machine, not started yet.
pub struct Backends {
    direct: bool,
    packs: Option<(Arc<PackDir>, Start)>,
    refused: Vec<(Way, String)>,
}

/// What runs.
pub struct Running {
    packs: Option<Arc<PackDir>>,
}

impl Backends {
    /// Tries what `choice` allows. `kept` loses what is used of it. A way that does not work is a reason, not an error: plain images still do.
    pub fn open(choice: BackendChoice, state: &Path, engine: &Arc<Engine>, kept: &mut KeptByName, holder: &Arc<HolderLink>) -> Backends {
        let mut refused = Vec::new();
        let file_backed = probe_file_backed(&state.join("probe")).map_err(|error| one_line(&error));
        let mut packs = None;
        match (choice, &file_backed) {
            (BackendChoice::Auto | BackendChoice::FuseBlob, Ok(())) => match open_pack_dir(state, engine, kept, holder) {
                Ok((dir, start)) => packs = Some((Arc::new(dir), start)),
                Err(error) => refused.push((Way::FuseBlob, one_line(&error))),
            },
            (BackendChoice::Auto | BackendChoice::FuseBlob, Err(why)) => refused.push((Way::FuseBlob, why.clone())),
            (BackendChoice::Fscache, _) => refused.push((Way::FuseBlob, "the configuration chooses another backend".to_owned())),
        }
        for (way, why) in &refused {
            tracing::warn!(%way, why, "this backend is not used");
        }
        Backends { direct: file_backed.is_ok(), packs, refused }
    }

    /// Whether mounts that an earlier worker made this way can still work.
    pub fn alive(&self, way: Way) -> bool {
        match way {
            Way::Direct => self.direct,
            Way::FuseBlob => self.packs.as_ref().is_some_and(|(dir, _)| dir.taken_over()),
            Way::Fscache => false,
        }
    }

    /// Starts to answer the kernel, after the packs of images found mounted are attached again.
    pub fn start(self, engine: &Arc<Engine>, found: &BTreeMap<Digest, Mounted>) -> Result<(Ways, Running), PackDirError> {
        let Backends { direct, packs, refused } = self;
        let mut lazy: Vec<Arc<dyn Lazy>> = Vec::new();
        let mut running = Running { packs: None };
        if let Some((dir, start)) = packs {
            let mounted = found.values().filter(|image| image.generations.iter().any(|generation| generation.way == Way::FuseBlob));
            attach_all(&dir, engine, mounted.flat_map(|image| image.packs.iter().copied()).collect());
            dir.serve(start)?;
            lazy.push(dir.clone());
            running.packs = Some(dir);
        }
        Ok((Ways { direct, lazy, refused }, running))
    }
}

impl Running {
    /// Takes no more requests from the kernel; those not taken wait there for the next worker.
    pub fn stop(&self) {
        if let Some(dir) = &self.packs {
            dir.stop();
        }
    }
}

fn open_pack_dir(state: &Path, engine: &Arc<Engine>, kept: &mut KeptByName, holder: &Arc<HolderLink>) -> Result<(PackDir, Start), PackDirError> {
    let name = FdName::new(FUSE).expect("the constant is a name");
    let connection = kept.remove(&name);
    let holder = holder.clone();
    let keep: Keeper = Box::new(move |fd, payload| holder.keep(&name, payload, fd));
    PackDir::open(&state.join("packs"), connection, engine.clone(), keep)
}

/// Attaches packs from a thread of its own, which goes on after [`ATTACH_WAIT`] with those that cannot be had.
fn attach_all(dir: &Arc<PackDir>, engine: &Arc<Engine>, mut packs: Vec<Digest>) {
    let (done, all_done) = mpsc::channel();
    let (dir, engine) = (dir.clone(), engine.clone());
    let attach = move || {
        loop {
            packs.retain(|digest| {
                match engine.pack(digest).map_err(|error| one_line(&error)).and_then(|pack| dir.attach(&pack).map_err(|error| one_line(&error))) {
                    Ok(()) => false,
                    Err(error) => {
                        tracing::warn!(pack = %digest, error, "a mounted pack cannot be read; trying again");
                        true
                    }
                }
            });
            if packs.is_empty() {
                // Nobody listens any more if it took too long.
                let _ = done.send(());
                return;
            }
            std::thread::sleep(ATTACH_RETRY);
        }
    };
    match std::thread::Builder::new().name("attach".to_owned()).spawn(attach) {
        Ok(_) => _ = all_done.recv_timeout(ATTACH_WAIT),
        Err(error) => tracing::error!(%error, "mounted packs cannot be attached"),
    }
}

/// An error with its causes.
pub(super) fn one_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
