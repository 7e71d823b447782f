//! The worker's ways to mount images: found by trying, taken over from the worker before, started, stopped.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use erofs::digest::Digest;
use uapi::cachefiles::Device;

use super::link::{HolderLink, KeptByName};
use super::protocol::FdName;
use crate::config::{BackendChoice, Config};
use crate::image::Ways;
use crate::image::mounts::Mounted;
use crate::mount::{CacheObjects, CacheObjectsError, Keeper, Lazy, PackDir, PackDirError, Start, Way, probe_file_backed};
use crate::serve::Engine;

/// Name of the kept descriptor that is the FUSE connection of the directory of packs.
const FUSE: &str = "fuse-blob";

/// Name of the kept descriptor that is the bound cachefiles device.
const CACHEFILES: &str = "cachefiles";

/// How long the start waits for the tables of packs that were mounted before. They are local files; only lost ones come from the store, and
/// those must not hold up every other pack (invariant 3).
const ATTACH_WAIT: Duration = Duration::from_secs(3);

/// Time between attempts to get a mounted pack's lost tables from the store. Reads of it fail meanwhile.
const ATTACH_RETRY: Duration = Duration::from_secs(2);

/// What works on this machine, not started yet.
pub struct Backends {
    direct: bool,
    objects: Option<Arc<CacheObjects>>,
    packs: Option<(Arc<PackDir>, Start)>,
    refused: Vec<(Way, String)>,
}

/// What runs.
pub struct Running {
    objects: Option<Arc<CacheObjects>>,
    packs: Option<Arc<PackDir>>,
}

impl Backends {
    /// Tries what the configuration allows. `kept` loses what is used of it. A way that does not work is a reason, not an error: plain images
    /// still do.
    pub fn open(config: &Config, state: &Path, engine: &Arc<Engine>, kept: &mut KeptByName, holder: &Arc<HolderLink>) -> Backends {
        let mut refused = Vec::new();
        let excluded = || "the configuration chooses another backend".to_owned();
        let file_backed = probe_file_backed(&state.join("probe")).map_err(|error| one_line(&error));
        let objects = match config.backend {
            BackendChoice::Auto | BackendChoice::Fscache => open_cache_objects(&config.cache, engine, kept, holder).map_err(|error| one_line(&error)),
            BackendChoice::FuseBlob => Err(excluded()),
        };
        let packs = match (config.backend, &file_backed) {
            (BackendChoice::Auto | BackendChoice::FuseBlob, Ok(())) => open_pack_dir(state, engine, kept, holder).map_err(|error| one_line(&error)),
            (BackendChoice::Auto | BackendChoice::FuseBlob, Err(why)) => Err(why.clone()),
            (BackendChoice::Fscache, _) => Err(excluded()),
        };
        let objects = objects.map(Arc::new).map_err(|why| refused.push((Way::Fscache, why))).ok();
        let packs = packs.map(|(dir, start)| (Arc::new(dir), start)).map_err(|why| refused.push((Way::FuseBlob, why))).ok();
        for (way, why) in &refused {
            tracing::info!(%way, why, "this backend is not used");
        }
        if objects.is_none() && packs.is_none() {
            tracing::warn!("no backend works here: every pull will be a plain one");
        }
        Backends { direct: file_backed.is_ok(), objects, packs, refused }
    }

    /// Whether mounts that an earlier worker made this way can still work.
    pub fn alive(&self, way: Way) -> bool {
        match way {
            Way::Direct => self.direct,
            Way::FuseBlob => self.packs.as_ref().is_some_and(|(dir, _)| dir.taken_over()),
            Way::Fscache => self.objects.as_ref().is_some_and(|objects| objects.taken_over()),
        }
    }

    /// Starts to answer the kernel, after the packs of images found mounted are attached again.
    pub fn start(self, engine: &Arc<Engine>, found: &BTreeMap<Digest, Mounted>) -> Result<(Ways, Running), PackDirError> {
        let Backends { direct, objects, packs, mut refused } = self;
        let mut lazy: Vec<Arc<dyn Lazy>> = Vec::new();
        let mut running = Running { objects: None, packs: None };
        let mounted = |way| found.iter().filter(move |(_, image)| image.generations.iter().any(|generation| generation.way == way));
        if let Some(objects) = objects {
            attach_objects(&objects, engine, mounted(Way::Fscache));
            match objects.serve() {
                Ok(()) => {
                    lazy.push(objects.clone());
                    running.objects = Some(objects);
                }
                Err(error) => refused.push((Way::Fscache, one_line(&error))),
            }
        }
        if let Some((dir, start)) = packs {
            attach_all(&dir, engine, mounted(Way::FuseBlob).flat_map(|(_, image)| image.packs.iter().copied()).collect());
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

    /// To be called when the engine has stopped: nothing is filled any more.
    pub fn settle(&self) {
        if let Some(objects) = &self.objects {
            objects.stop();
        }
    }
}

fn open_cache_objects(
    cache: &Path,
    engine: &Arc<Engine>,
    kept: &mut KeptByName,
    holder: &Arc<HolderLink>,
) -> Result<CacheObjects, CacheObjectsError> {
    let name = FdName::new(CACHEFILES).expect("the constant is a name");
    let device = kept.remove(&name).map(|(fd, _)| Device::from_kept(fd));
    let holder = holder.clone();
    let keep: Keeper = Box::new(move |fd, payload| holder.keep(&name, payload, fd));
    CacheObjects::open(&cache.join("fscache"), device, engine.clone(), keep)
}

/// Makes the objects of mounted images known again. One that cannot be: its reads fail until the image is mounted anew.
fn attach_objects<'a>(objects: &CacheObjects, engine: &Arc<Engine>, mounted: impl Iterator<Item = (&'a Digest, &'a Mounted)>) {
    for (digest, image) in mounted {
        let packs: Result<Vec<_>, _> = image.packs.iter().map(|pack| engine.pack(pack)).collect();
        let attached = packs
            .map_err(|error| one_line(&error))
            .and_then(|packs| objects.attach(digest, &image.metadata, &packs).map_err(|error| format!("{}: {error}", image.metadata.display())));
        if let Err(error) = attached {
            tracing::error!(image = %digest, error, "a mounted image cannot be served");
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
