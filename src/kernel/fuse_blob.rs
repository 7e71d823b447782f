//! Backend `fuse-blob`: a flat, read-only FUSE directory of packs by digest, whose files are `device=` files of EROFS mounts.
//!
//! Ready units are answered in the reader thread that got the request, from the local file through the thread's own buffer: no other
//! thread, no allocation. Everything else becomes an [`Ask`]. When the process dies while another keeps /dev/fuse open, readers wait;
//! the successor attaches the same packs (a pack's node is the first 8 bytes of its digest, so nodes mean the same) and asks the kernel
//! for the unanswered requests again.

use std::collections::BTreeMap;
use std::io::IoSlice;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use erofs::digest::Digest;
use uapi::buffer::Buffer;
use uapi::fuse::device::{Device, Received, Waiter};
use uapi::fuse::{self, Attr, BadRequest, Errno, Init, Negotiated, NodeId, Operation, Request, Unique};

use super::vital::{self, Vital};
use super::{Ask, AskId, Channel, Serve, Wants};
use crate::cache::local::read_ready;
use crate::cache::{Pack, UnitIndex};

/// A FUSE connection being served. Dropping it stops the reader threads; the mount stays for whoever else holds the descriptor.
pub struct FuseBlob {
    shared: Arc<Connection>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// The directory cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum FuseBlobError {
    /// The descriptor does not behave like /dev/fuse.
    #[error("cannot {action} on the FUSE device; check that /dev/fuse is the kernel's own and that the process may use it")]
    Device {
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: Errno,
    },
    /// The system refuses a thread.
    #[error("cannot start a thread to read FUSE requests; raise the limit on threads (ulimit -u, systemd TasksMax)")]
    Thread {
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Another attached pack has the same first 8 bytes, or the pack's are a number the protocol reserves.
    #[error("pack {pack} cannot be served: FUSE node {:#x} is taken; convert the image again with another unit size", node.0)]
    NodeTaken {
        /// The pack to attach.
        pack: Digest,
        /// Its node.
        node: NodeId,
    },
}

/// Told what was agreed with the kernel, before the kernel is.
pub type Agreed = Box<dyn FnMut(&Negotiated) + Send>;

/// How the connection began.
pub enum Begin {
    /// A new mount: the kernel's INIT is to be answered. The function gets what was agreed, before the answer goes out; whoever keeps the
    /// descriptor keeps this with it.
    New(Agreed),
    /// A connection taken over: what was agreed at its start. Unanswered requests are asked for again when serving starts.
    TakenOver(Negotiated),
}

/// What the reader threads and the answering threads share.
struct Connection {
    device: Device,
    serve: Arc<dyn Serve>,
    /// Read by every request, written when an image is mounted or unmounted.
    packs: RwLock<BTreeMap<NodeId, Arc<Pack>>>,
    agreed: Mutex<Agreed>,
}

/// What an open of a pack answers: reads bypass the FUSE page cache. EROFS has one above and the local file one below, a third only costs:
/// with it, reading 256 MiB cold through EROFS took 2.9 instead of 2.0 ms of CPU per MiB, from the local file 1.1 instead of 0.6 (6.18).
const OPEN_FLAGS: u32 = fuse::OPEN_DIRECT_IO;

/// The node of a pack.
fn node_of(pack: &Digest) -> NodeId {
    let [a, b, c, d, e, f, g, h, ..] = pack.0;
    NodeId(u64::from_be_bytes([a, b, c, d, e, f, g, h]))
}

impl FuseBlob {
    /// Prepares to serve the connection `device`. Nothing is read from it before [`FuseBlob::serve`], so packs can be attached first.
    pub fn new(device: OwnedFd, serve: Arc<dyn Serve>) -> Result<FuseBlob, FuseBlobError> {
        let device = Device::new(device).map_err(|source| FuseBlobError::Device { action: "set non-blocking reads", source })?;
        let shared = Arc::new(Connection { device, serve, packs: RwLock::default(), agreed: Mutex::new(Box::new(|_| ())) });
        Ok(FuseBlob { shared, threads: Mutex::default() })
    }

    /// Starts `threads` reader threads.
    pub fn serve(&self, begin: Begin, threads: usize) -> Result<(), FuseBlobError> {
        let failed = |action| move |source| FuseBlobError::Device { action, source };
        match begin {
            Begin::New(agreed) => *self.shared.agreed.lock().unwrap_or_else(PoisonError::into_inner) = agreed,
            // Before anything is read, so that only the predecessor's requests come again.
            Begin::TakenOver(negotiated) if negotiated.can_resend() => {
                self.shared.device.resend().map_err(failed("ask for unanswered requests again"))?;
            }
            Begin::TakenOver(_) => tracing::warn!("this kernel cannot repeat requests; what the last worker left unanswered waits for an abort"),
        }
        for number in 0..threads {
            let waiter = self.shared.device.waiter().map_err(failed("wait for requests"))?;
            let shared = Arc::clone(&self.shared);
            let thread = thread::Builder::new().name(format!("fuse-{number}")).spawn(move || Reader::new(shared, waiter).run());
            self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread.map_err(|source| FuseBlobError::Thread { source })?);
        }
        Ok(())
    }

    /// The connection's descriptor, for whoever keeps a duplicate.
    pub fn device(&self) -> BorrowedFd<'_> {
        self.shared.device.fd()
    }

    /// Makes a pack appear under its digest. Attaching it again changes nothing.
    pub fn attach(&self, pack: &Arc<Pack>) -> Result<(), FuseBlobError> {
        let (digest, node) = (pack.digest(), node_of(&pack.digest()));
        let mut packs = self.shared.packs.write().unwrap_or_else(PoisonError::into_inner);
        let other = packs.get(&node).is_some_and(|other| other.digest() != digest);
        if other || node.0 == 0 || node == fuse::ROOT {
            return Err(FuseBlobError::NodeTaken { pack: digest, node });
        }
        packs.insert(node, Arc::clone(pack));
        Ok(())
    }

    /// Makes a pack disappear. Reads through files that are still open fail.
    pub fn detach(&self, pack: &Digest) {
        self.shared.packs.write().unwrap_or_else(PoisonError::into_inner).remove(&node_of(pack));
    }

    /// Stops the reader threads and waits for them. Requests not yet read wait in the kernel, for a successor or for the end of the mount.
    pub fn stop(&self) {
        self.shared.device.stop();
        for thread in self.threads.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // A reader that panics ends the process.
            let _ = thread.join();
        }
    }
}

impl Drop for FuseBlob {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Connection {
    fn pack(&self, node: NodeId) -> Option<Arc<Pack>> {
        self.packs.read().unwrap_or_else(PoisonError::into_inner).get(&node).cloned()
    }

    /// A reply that the kernel has no memory for would leave its reader waiting, so that nothing but an abort could end it: an error is smaller.
    fn reply(&self, unique: Unique, result: Result<&[IoSlice<'_>], Errno>) {
        let Err(errno) = self.device.reply(unique, result) else { return };
        tracing::error!(unique = unique.0, %errno, "the kernel refused a FUSE reply; answering EIO");
        if let Err(errno) = self.device.reply(unique, Err(Errno::IO)) {
            tracing::error!(unique = unique.0, %errno, "the kernel refused even an error; the reader waits for the next worker");
        }
    }
}

impl Channel for Connection {
    fn wants(&self) -> Wants {
        Wants::Bytes
    }

    fn answer(&self, id: AskId, result: Result<&[IoSlice<'_>], Errno>) {
        self.reply(Unique(id.0), result);
    }
}

/// One thread that reads requests.
struct Reader {
    shared: Arc<Connection>,
    waiter: Waiter,
    message: Buffer,
    data: Buffer,
}

impl Reader {
    fn new(shared: Arc<Connection>, waiter: Waiter) -> Reader {
        Reader { shared, waiter, message: Buffer::new(fuse::REQUEST_MAX), data: Buffer::new(fuse::READ_MAX) }
    }

    fn run(mut self) {
        let _vital = Vital::thread("reading FUSE requests");
        loop {
            match self.shared.device.receive(&self.waiter, &mut self.message) {
                Ok(Received::Message(len)) => match Request::parse(&self.message[..len]) {
                    Ok(request) => serve_one(&self.shared, &request, &mut self.data),
                    Err(error @ BadRequest::Body { unique, .. }) => {
                        tracing::error!(%error);
                        self.shared.reply(unique, Err(Errno::INVAL));
                    }
                    Err(error @ BadRequest::NoHeader { .. }) => tracing::error!(%error),
                },
                Ok(Received::Stopped | Received::Gone) => return,
                Err(errno) => vital::end("reading FUSE requests", errno),
            }
        }
    }
}

/// Answers one request, or hands it on: every arm replies, except where the kernel expects no reply.
fn serve_one(shared: &Arc<Connection>, request: &Request<'_>, data: &mut [u8]) {
    let Request { unique, node, operation } = *request;
    let ok = |body: &[u8]| shared.reply(unique, Ok(&[IoSlice::new(body)]));
    let fail = |errno| shared.reply(unique, Err(errno));
    match operation {
        Operation::Read { offset, size } => match shared.pack(node) {
            Some(pack) => read(shared, unique, &pack, offset, size, data),
            None => fail(Errno::STALE),
        },
        Operation::Init(init) => ok(&begin(shared, &init)),
        Operation::Lookup { name } => match lookup(shared, name) {
            Some((node, attr)) => ok(&fuse::entry_reply(node, &attr)),
            None => fail(Errno::NOENT),
        },
        Operation::Getattr => match attr(shared, node) {
            Some(attr) => ok(&fuse::attr_reply(&attr)),
            None => fail(Errno::STALE),
        },
        Operation::Open if node == fuse::ROOT => fail(Errno::ISDIR),
        Operation::Open => match shared.pack(node) {
            Some(_) => ok(&fuse::open_reply(OPEN_FLAGS)),
            None => fail(Errno::STALE),
        },
        Operation::Opendir => ok(&fuse::open_reply(0)),
        Operation::Readdir { offset, size } => ok(&list(shared, offset, size)),
        Operation::Statfs => ok(&statfs(shared)),
        Operation::Formality => shared.reply(unique, Ok(&[])),
        Operation::Silent => {}
        Operation::Other(_) => fail(Errno::NOSYS),
    }
}

/// A read: from the local file if every unit of it is Ready, else by whoever serves asks. (A read beyond the end is short, as of any file.)
fn read(shared: &Arc<Connection>, unique: Unique, pack: &Arc<Pack>, offset: u64, size: u32, data: &mut [u8]) {
    let len = pack.len().saturating_sub(offset).min(u64::from(size)).min(data.len() as u64) as u32;
    let Some(units) = pack.units_in(offset, len) else {
        shared.reply(unique, Ok(&[]));
        return;
    };
    let data = &mut data[..len as usize];
    let (metrics, asked) = (shared.serve.metrics(), Instant::now());
    if units.clone().all(|unit| pack.units().is_ready(UnitIndex(unit))) && read_ready(pack, offset, data).is_ok() {
        shared.reply(unique, Ok(&[IoSlice::new(data)]));
        // The rest after the reply, so that it delays no reader.
        metrics.asks.bump();
        metrics.ask_time.observe(asked.elapsed());
        for unit in units.map(UnitIndex) {
            if pack.units().take_mark(unit) {
                shared.serve.look_ahead(pack, unit);
            }
        }
        return;
    }
    let channel = Arc::clone(shared) as Arc<dyn Channel>;
    shared.serve.submit(Ask::new(Arc::clone(pack), offset, len, AskId(unique.0), channel, Arc::clone(metrics)));
}

fn begin(shared: &Connection, init: &Init) -> [u8; 64] {
    let negotiated = init.negotiate();
    (shared.agreed.lock().unwrap_or_else(PoisonError::into_inner))(&negotiated);
    fuse::init_reply(&negotiated)
}

/// Names are digests of attached packs.
fn lookup(shared: &Connection, name: &[u8]) -> Option<(NodeId, Attr)> {
    let digest: Digest = std::str::from_utf8(name).ok()?.parse().ok()?;
    let node = node_of(&digest);
    let pack = shared.pack(node).filter(|pack| pack.digest() == digest)?;
    Some((node, Attr::File { node, size: pack.len() }))
}

fn attr(shared: &Connection, node: NodeId) -> Option<Attr> {
    if node == fuse::ROOT {
        return Some(Attr::Directory);
    }
    shared.pack(node).map(|pack| Attr::File { node, size: pack.len() })
}

/// Entries number `offset` on: `.`, `..`, then the packs by node.
fn list(shared: &Connection, offset: u64, room: u32) -> Vec<u8> {
    let packs = shared.packs.read().unwrap_or_else(PoisonError::into_inner);
    let dots = [b".".as_slice(), b".."].into_iter().map(|name| (fuse::ROOT, name.to_vec(), true));
    let files = packs.iter().map(|(node, pack)| (*node, pack.digest().to_string().into_bytes(), false));
    let mut out = Vec::new();
    for (cookie, (node, name, directory)) in (1..).zip(dots.chain(files)).skip(usize::try_from(offset).unwrap_or(usize::MAX)) {
        if !fuse::push_dirent(&mut out, room as usize, node, cookie, &name, directory) {
            break;
        }
    }
    out
}

fn statfs(shared: &Connection) -> [u8; 80] {
    let packs = shared.packs.read().unwrap_or_else(PoisonError::into_inner);
    fuse::statfs_reply(packs.values().map(|pack| u64::from(pack.table().blocks())).sum(), packs.len() as u64)
}
