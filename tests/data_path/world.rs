//! A store, a cache and mounts in a scratch directory: what the data path's tests and benchmark stand on.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use erofs::block::UnitBits;
use erofs::image::{Checked, write};
use erofs::meta::{Attr, Chunk, Content, Data};
use erofs::tree::{Body, Inode, InodeIndex, Tree};
use slipway::cache::fake::Sample;
use slipway::kernel::fuse_blob::{Begin, FuseBlob};
use slipway::metrics::Metrics;
use slipway::serve::{Engine, EngineOptions};
use slipway::store::chunks::{ChunkStore, StoreHandle, UfsChunks};
use slipway::store::{Name, Store};
use testbed::Scratch;
use uapi::mount::{FuseOptions, erofs_file_backed, fuse_open};

/// What outlives a worker.
pub struct World {
    pub scratch: Scratch,
    pub store: PathBuf,
    pub cache: PathBuf,
}

/// One life of a worker's data path.
pub struct Life {
    pub engine: Arc<Engine>,
    pub metrics: Arc<Metrics>,
}

impl World {
    pub fn new(label: &str) -> World {
        let scratch = Scratch::new(label).expect("a scratch directory");
        let store = scratch.make_dir("store").expect("a directory");
        Store::create(&store).expect("a store");
        World { cache: scratch.join("cache"), store, scratch }
    }

    /// Puts a pack into the store, on the disk and out of the page cache.
    pub fn put(&self, sample: &Sample) {
        let path = self.pack_file(sample);
        fs::create_dir_all(path.parent().expect("packs lie in directories")).expect("a directory");
        fs::write(&path, &sample.file).expect("a pack file");
        File::open(&path).and_then(|file| file.sync_all()).expect("a pack file on disk");
    }

    pub fn pack_file(&self, sample: &Sample) -> PathBuf {
        self.store.join(Name::Pack(sample.digest()).path())
    }

    /// Flips bits of one byte of the pack in the store.
    pub fn flip(&self, sample: &Sample, at: u64) {
        let file = File::options().read(true).write(true).open(self.pack_file(sample)).expect("the pack file");
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("a byte");
        file.write_all_at(&[byte[0] ^ 0x40], at).expect("a byte");
    }

    pub fn begin(&self) -> Life {
        let store = Arc::new(StoreHandle::new(self.store.clone()));
        self.begin_over(move || UfsChunks::new(Arc::clone(&store)))
    }

    /// A life whose units come from `chunks`.
    pub fn begin_over<S: ChunkStore + 'static>(&self, chunks: impl Fn() -> S + Clone + Send + 'static) -> Life {
        let metrics = Arc::new(Metrics::new("fuse-blob"));
        let options = EngineOptions { store_dir: self.store.clone(), cache_dir: self.cache.clone(), data_threads: 0, metrics: Arc::clone(&metrics) };
        Life { engine: Engine::start_over(options, chunks).expect("an engine"), metrics }
    }

    /// Mounts the directory of packs.
    pub fn mount_packs(&self) -> (PathBuf, OwnedFd) {
        let at = self.scratch.make_dir("packs").expect("a directory");
        let device = fuse_open(&at, FuseOptions { source: "slipway-test", subtype: "slipway", max_read: 1 << 20 }).expect("a FUSE mount");
        (at, device)
    }

    /// Mounts an image whose one file, `data`, is the whole pack that the file `device` holds. Gives the path of `data`.
    pub fn mount_image(&self, sample: &Sample, device: &Path, name: &str) -> PathBuf {
        let pack = sample.pack().table().pack_ref();
        let chunks = (0..pack.blocks).step_by(pack.unit_bits.blocks() as usize).map(|block| Chunk::At { pack: 0, block }).collect();
        let data = Data::Chunked { size: sample.bytes.len() as u64, unit_bits: pack.unit_bits, chunks };
        let root = Inode { attr: Attr { mode: 0o755, ..Attr::default() }, body: Body::Dir([(b"data".to_vec(), InodeIndex(1))].into()) };
        let file = Inode { attr: Attr { mode: 0o644, ..Attr::default() }, body: Body::Content(Content::File(data)) };
        let tree = Tree { packs: vec![pack], inodes: vec![root, file] };
        let built = write(&Checked::new(tree).expect("a tree that can be written"));
        let meta = self.scratch.join(format!("{name}.erofs"));
        fs::write(&meta, built.bytes).expect("a metadata image");
        let at = self.scratch.make_dir(name).expect("a directory");
        erofs_file_backed(&meta, &[device], &at).expect("an EROFS mount");
        at.join("data")
    }
}

impl Life {
    /// Serves `samples` through `device`.
    pub fn serve(&self, device: OwnedFd, begin: Begin, samples: &[&Sample]) -> FuseBlob {
        let serve = Arc::clone(&self.engine) as Arc<dyn slipway::kernel::Serve>;
        let fuse = FuseBlob::new(device, serve).expect("a FUSE server");
        for sample in samples {
            fuse.attach(&self.engine.pack(&sample.digest()).expect("a pack")).expect("a free node");
        }
        fuse.serve(begin, 4).expect("reader threads");
        fuse
    }
}

/// A pack of `mib` MiB in units of 256 KiB, half of it noise.
pub fn sample(seed: u64, mib: usize) -> Sample {
    Sample::of(Sample::mixed(seed, mib << 20).bytes, UnitBits::DEFAULT)
}

/// Forgets what the kernel's page cache holds of a file.
pub fn drop_cached(path: &Path) {
    let file = File::open(path).expect("the file");
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("advice");
}
