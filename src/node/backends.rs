//! The worker's ways to mount images: found by trying, taken over from the worker before, started, stopped.
//!
//! A descriptor that the holder kept may be all that running containers read through. So it is taken over whatever the configuration says now and
//! whatever a trial mount says today; both decide about new mounts only. If it cannot be taken over the worker ends, readers go on waiting, and the
//! holder tries again: giving up would make their wait endless.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use erofs::digest::Digest;
use uapi::cachefiles::{self, Device};
use uapi::mount::is_mount_point;

use super::link::{HolderLink, KeptByName};
use super::protocol::FdName;
use crate::config::{BackendChoice, Config};
use crate::image::Ways;
use crate::image::mounts::Mounted;
use crate::mount::{CacheObjects, Keeper, Lazy, PackDir, Way, probe_file_backed};
use crate::serve::Engine;

/// Name of the kept descriptor that is the FUSE connection of the directory of packs.
const FUSE: &str = "fuse-blob";

/// Name of the kept descriptor that is the bound cachefiles device.
const CACHEFILES: &str = "cachefiles";

/// How long the start waits for tables that must come from the store. Packs whose tables are local are attached before and do not need this; but
/// they are not answered meanwhile, so it is short.
const ATTACH_WAIT: Duration = Duration::from_secs(3);

/// Time between attempts to get a mounted pack's lost tables from the store. Reads of it fail meanwhile.
const ATTACH_RETRY: Duration = Duration::from_secs(2);

/// What mounts of earlier workers depend on cannot be taken over.
#[derive(Debug, thiserror::Error)]
#[error("what serves the {way} mounts of earlier workers cannot be taken over; their readers wait for a worker that can")]
pub struct TakeOverError {
    way: Way,
    #[source]
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl TakeOverError {
    fn of(way: Way) -> impl Fn(Box<dyn std::error::Error + Send + Sync>) -> TakeOverError {
        move |source| TakeOverError { way, source }
    }
}

/// What runs.
pub struct Running {
    objects: Option<Arc<CacheObjects>>,
    packs: Option<Arc<PackDir>>,
}

/// Gives up a kept cachefiles device that can never be taken over: its readers get EIO, where they and those of every other way would wait for
/// ever. To be called before [`alive`] is asked, so that mounts on it are not used again.
pub fn forget_dead(kept: &mut KeptByName, holder: &HolderLink) {
    let name = name(CACHEFILES);
    let Some((fd, payload)) = kept.remove(&name) else { return };
    let device = Device::from_kept(fd);
    match device.restore() {
        Err(error) if cachefiles::is_final(&error) => {
            tracing::warn!(%error, "the kept cachefiles device cannot be taken over by any worker; closing it, and what reads through it gets EIO");
            if let Err(error) = holder.forget(&name) {
                tracing::warn!(%error, "the holder cannot be told to close the cachefiles device");
            }
        }
        // Any other error is seen again when it is taken over.
        _ => _ = kept.insert(name, (device.into(), payload)),
    }
}

/// Whether mounts that an earlier worker made this way can still work. What is kept is taken over, or the worker ends.
pub fn alive(way: Way, kept: &KeptByName) -> bool {
    match way {
        // Nothing of ours is in their path.
        Way::Direct => true,
        Way::FuseBlob => kept.contains_key(&name(FUSE)),
        Way::Fscache => kept.contains_key(&name(CACHEFILES)),
    }
}

/// Takes over what is kept, opens what else the configuration allows, attaches the packs of the images `found` mounted, and starts to answer the
/// kernel. A way that does not work here is a reason, not an error: plain images still do.
pub fn start(
    config: &Config,
    state: &Path,
    engine: &Arc<Engine>,
    mut kept: KeptByName,
    holder: &Arc<HolderLink>,
    found: &BTreeMap<Digest, Mounted>,
) -> Result<(Ways, Running), TakeOverError> {
    let mut start = Starter { config, state, engine, holder, found, ways: Ways::default() };
    // First what can be served without the device.
    let packs = start.packs(kept.remove(&name(FUSE)))?;
    let objects = start.objects(kept.remove(&name(CACHEFILES))).inspect_err(|_| packs.iter().for_each(|dir| dir.stop()))?;
    let mut ways = start.ways;
    // A mount without FUSE below it is the better one.
    ways.lazy.sort_by_key(|lazy| lazy.way() != Way::Fscache);
    for name in kept.keys() {
        // Of a version that knew more. Its mounts may live, so it is not closed (invariant 7).
        tracing::warn!(%name, "the holder keeps a descriptor that is not known here; leaving it");
    }
    for (way, why) in &ways.refused {
        tracing::info!(%way, why, "this backend takes no new images");
    }
    if ways.lazy.is_empty() {
        tracing::warn!("no backend takes new images: every pull will be a plain one");
    }
    Ok((ways, Running { objects, packs }))
}

/// What starting needs, and the ways to mount that it found.
struct Starter<'a> {
    config: &'a Config,
    state: &'a Path,
    engine: &'a Arc<Engine>,
    holder: &'a Arc<HolderLink>,
    found: &'a BTreeMap<Digest, Mounted>,
    ways: Ways,
}

/// A descriptor with what was kept beside it.
type Kept = (OwnedFd, Vec<u8>);

impl Starter<'_> {
    fn objects(&mut self, kept: Option<Kept>) -> Result<Option<Arc<CacheObjects>>, TakeOverError> {
        let failed = TakeOverError::of(Way::Fscache);
        let (allowed, is_taken_over) = (self.allowed(Way::Fscache), kept.is_some());
        let opened = match (kept, &allowed) {
            (Some((fd, payload)), _) => CacheObjects::take_over(Device::from_kept(fd), &payload, self.engine.clone()),
            (None, Err(why)) => return Ok(self.refuse(Way::Fscache, why.clone())),
            (None, Ok(())) => match CacheObjects::bind(&self.config.cache.join("fscache"), self.engine.clone(), self.keeper(CACHEFILES)) {
                Ok(objects) => objects,
                Err(error) => return Ok(self.refuse(Way::Fscache, one_line(&error))),
            },
        };
        let objects = Arc::new(opened);
        self.attach_objects(&objects);
        match objects.serve() {
            Ok(()) => self.offer(objects.clone(), allowed),
            Err(error) if is_taken_over => return Err(failed(error.into())),
            Err(error) => return Ok(self.refuse(Way::Fscache, one_line(&error))),
        }
        Ok(Some(objects))
    }

    fn attach_objects(&self, objects: &Arc<CacheObjects>) {
        for (digest, image) in self.mounted(Way::Fscache) {
            if let Err(error) = objects.attach_metadata(digest, &image.metadata) {
                tracing::error!(image = %digest, metadata = %image.metadata.display(), %error, "a mounted image's metadata cannot be served");
            }
        }
        let (objects, engine) = (objects.clone(), self.engine.clone());
        attach_all(self.packs_of(Way::Fscache), move |digest, look| {
            let table = match look {
                Look::Local => engine.local_table(digest),
                Look::Store => Some(engine.table(digest).map_err(|error| one_line(&error))?),
            };
            Ok(table.map(|table| objects.attach(&table)).is_some())
        });
    }

    fn packs(&mut self, kept: Option<Kept>) -> Result<Option<Arc<PackDir>>, TakeOverError> {
        let failed = TakeOverError::of(Way::FuseBlob);
        let at = self.state.join("packs");
        let in_use = self.mounted(Way::FuseBlob).next().is_some();
        // What cannot be seen counts as there. A connection that has lost its directory still serves what was mounted through it.
        let there = is_mount_point(&at).unwrap_or(true);
        let kept = kept.filter(|_| in_use || there);
        let is_taken_over = kept.is_some();
        let allowed = match self.allowed(Way::FuseBlob) {
            Ok(()) if is_taken_over && !there => Err(format!("somebody unmounted {}, and images mounted before still read through it", at.display())),
            other => other,
        };
        let file_backed = self.file_backed(is_taken_over);
        let (dir, start) = match (kept, allowed.clone().and(file_backed)) {
            (Some((fd, payload)), _) => PackDir::take_over(&at, fd, &payload, self.engine.clone()).map_err(|error| failed(error.into()))?,
            (None, Err(why)) => return Ok(self.refuse(Way::FuseBlob, why)),
            (None, Ok(())) => match PackDir::mount(&at, self.engine.clone(), self.keeper(FUSE)) {
                Ok(mounted) => mounted,
                Err(error) => return Ok(self.refuse(Way::FuseBlob, one_line(&error))),
            },
        };
        let dir = Arc::new(dir);
        self.attach_packs(&dir);
        match dir.serve(start) {
            Ok(()) => {}
            Err(error) if is_taken_over => return Err(failed(error.into())),
            Err(error) => return Ok(self.refuse(Way::FuseBlob, one_line(&error))),
        }
        match allowed {
            Err(why) if !in_use && dir.unmount_unused() => {
                if let Err(error) = self.holder.forget(&name(FUSE)) {
                    tracing::warn!(%error, "the holder cannot be told to close the FUSE connection");
                }
                Ok(self.refuse(Way::FuseBlob, why))
            }
            allowed => {
                self.offer(dir.clone(), allowed);
                Ok(Some(dir))
            }
        }
    }

    fn attach_packs(&self, dir: &Arc<PackDir>) {
        let (dir, engine) = (dir.clone(), self.engine.clone());
        attach_all(self.packs_of(Way::FuseBlob), move |digest, look| {
            let pack = match look {
                Look::Local => engine.local_pack(digest),
                Look::Store => engine.pack(digest).map(Some),
            };
            match pack.map_err(|error| one_line(&error))? {
                Some(pack) => dir.attach(&pack).map(|()| true).map_err(|error| one_line(&error)),
                None => Ok(false),
            }
        });
    }

    /// Whether file-backed mounts work. A FUSE connection that was kept was made after a trial mount had succeeded, on this same kernel.
    fn file_backed(&mut self, is_taken_over: bool) -> Result<(), String> {
        let probed = if is_taken_over { Ok(()) } else { probe_file_backed(&self.state.join("probe")).map_err(|error| one_line(&error)) };
        self.ways.direct = probed.is_ok();
        probed.inspect_err(|why| self.ways.refused.push((Way::Direct, why.clone())))
    }

    /// Whether the configuration wants new mounts of a lazy way, or why not.
    fn allowed(&self, way: Way) -> Result<(), String> {
        match (self.config.backend, way) {
            (BackendChoice::Auto, _) | (BackendChoice::FuseBlob, Way::FuseBlob) | (BackendChoice::Fscache, Way::Fscache) => Ok(()),
            _ => Err("the configuration chooses another backend".to_owned()),
        }
    }

    /// Lets new images use a way that runs, or only those that do already.
    fn offer(&mut self, way: Arc<dyn Lazy>, allowed: Result<(), String>) {
        match allowed {
            Ok(()) => self.ways.lazy.push(way),
            Err(why) => {
                self.ways.refused.push((way.way(), why));
                self.ways.retired.push(way);
            }
        }
    }

    fn refuse<T>(&mut self, way: Way, why: String) -> Option<T> {
        self.ways.refused.push((way, why));
        None
    }

    fn keeper(&self, kept: &'static str) -> Keeper {
        let (holder, name) = (self.holder.clone(), name(kept));
        Box::new(move |fd, payload| holder.keep(&name, payload, fd))
    }

    fn mounted(&self, way: Way) -> impl Iterator<Item = (&Digest, &Mounted)> {
        self.found.iter().filter(move |(_, image)| image.generations.iter().any(|generation| generation.way == way))
    }

    fn packs_of(&self, way: Way) -> Vec<Digest> {
        let packs: BTreeSet<Digest> = self.mounted(way).flat_map(|(_, image)| image.packs.iter().copied()).collect();
        packs.into_iter().collect()
    }
}

/// Where a pack's tables may come from.
#[derive(Clone, Copy)]
enum Look {
    Local,
    Store,
}

/// Attaches packs: first all whose tables are local, so that none of them waits for the store (invariant 3); then the others from a thread of its
/// own, which goes on after [`ATTACH_WAIT`]. `attach` says whether the tables were there.
fn attach_all(mut packs: Vec<Digest>, attach: impl Fn(&Digest, Look) -> Result<bool, String> + Send + 'static) {
    let is_missing = move |digest: &Digest, look| {
        attach(digest, look).map(|attached| !attached).unwrap_or_else(|error| {
            tracing::warn!(pack = %digest, error, "a mounted pack cannot be read; trying again");
            true
        })
    };
    packs.retain(|digest| is_missing(digest, Look::Local));
    if packs.is_empty() {
        return;
    }
    let (done, all_done) = mpsc::channel();
    let fetch = move || {
        loop {
            packs.retain(|digest| is_missing(digest, Look::Store));
            if packs.is_empty() {
                // Nobody listens any more if it took too long.
                let _ = done.send(());
                return;
            }
            std::thread::sleep(ATTACH_RETRY);
        }
    };
    match std::thread::Builder::new().name("attach".to_owned()).spawn(fetch) {
        Ok(_) => _ = all_done.recv_timeout(ATTACH_WAIT),
        Err(error) => tracing::error!(%error, "mounted packs cannot be attached"),
    }
}

fn name(constant: &'static str) -> FdName {
    FdName::new(constant).expect("the constant is a name")
}

impl Running {
    /// Takes no more requests from the kernel, or answers none of them with an error: they wait there for the next worker.
    pub fn stop(&self) {
        if let Some(objects) = &self.objects {
            objects.stop();
        }
        if let Some(dir) = &self.packs {
            dir.stop();
        }
    }

    /// To be called when the engine has stopped: nothing is filled any more.
    pub fn settle(&self) {
        if let Some(objects) = &self.objects {
            objects.settle();
        }
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

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::super::protocol::{self, Message};
    use super::*;

    /// Files that refuse the kernel's word for taking over, as a dead device does and as one does that may do better later.
    #[test]
    fn a_device_that_can_never_be_taken_over_is_closed_everywhere_and_others_are_tried_again() {
        let (full, short) = (std::fs::File::options().write(true).open("/dev/full"), rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()));
        for (fd, is_dead) in [(OwnedFd::from(full.expect("/dev/full")), false), (short.expect("an eventfd"), true)] {
            let (holder, worker) = uapi::fdpass::pair().expect("a pair");
            protocol::send_fd(&holder, &name(CACHEFILES), b"payload", fd.as_fd()).expect("sent");
            protocol::send_done(&holder).expect("sent");
            let (link, mut kept) = HolderLink::open(worker).expect("opened");
            forget_dead(&mut kept, &link);
            assert_eq!(alive(Way::Fscache, &kept), !is_dead);
            assert_eq!(kept.get(&name(CACHEFILES)).map(|(_, payload)| payload.as_slice()), (!is_dead).then_some(&b"payload"[..]));
            drop(link);
            let told = protocol::receive(&holder).expect("received");
            assert_eq!(matches!(&told, Some(Message::Forget { name: told }) if *told == name(CACHEFILES)), is_dead, "{told:?}");
        }
    }
}
