//! Images through a store and back: what is exported has the source's configuration and diff IDs.

use std::fs;
use std::path::Path;

use erofs_convert::convert::{Context, Options, convert};
use erofs_convert::export::{Target, export};
use erofs_convert::progress::Progress;
use slipway::oci::{Access, Platform, Source};
use slipway::store::{Store, TrustFiles};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

/// A store that images go through.
pub struct Way {
    dir: tempfile::TempDir,
    runtime: Runtime,
    stop: CancellationToken,
}

impl Way {
    pub fn new() -> Way {
        // In memory, if possible: on a disk most of the time would be spent on making things durable.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        fs::create_dir(dir.path().join("store")).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        Way { dir, runtime, stop: CancellationToken::new() }
    }

    /// Converts the image of a layout and exports it; fails unless it is the same again.
    pub fn assert_comes_back(&self, layout: &Path, what: &str) {
        let at = |name: &str| self.dir.path().join(name);
        let context = Context { runtime: self.runtime.handle(), stop: &self.stop, progress: &Progress::Silent };
        let options = Options {
            source: Source::parse(&format!("oci:{}:t", layout.display()), &Access::default()).unwrap(),
            platform: Platform { os: "linux".to_owned(), architecture: "amd64".to_owned(), variant: None },
            store: at("store"),
            state: at("state"),
            key: at("key"),
            jobs: 2,
            target: None,
        };
        let converted = convert(&context, &options).unwrap_or_else(|failure| panic!("{what}: {}", failure.report()));
        let target = Target { dir: at("out"), tag: None };
        let store = Store::open(&at("store")).unwrap();
        let trust = TrustFiles(vec![at("key.pub")]).load().unwrap();
        let root = store.trusted_image(&converted.root, &trust).unwrap();
        let exported = export(&context, &store, &root, &target).unwrap_or_else(|failure| panic!("{what}: {}", failure.report()));
        let source = config_of(layout);
        assert!(config_of(&target.dir) == source, "{what}: another configuration");
        let config: serde_json::Value = serde_json::from_slice(&source).unwrap();
        let diff_ids: Vec<_> = exported.layers.iter().map(|layer| serde_json::Value::from(layer.diff_id.0.oci())).collect();
        assert_eq!(config["rootfs"]["diff_ids"].as_array(), Some(&diff_ids), "{what}");
        fs::remove_dir_all(target.dir).unwrap();
    }
}

/// The configuration of a layout's only image.
fn config_of(layout: &Path) -> Vec<u8> {
    let blob =
        |descriptor: &serde_json::Value| fs::read(layout.join("blobs").join(descriptor["digest"].as_str().unwrap().replace(':', "/"))).unwrap();
    let json = |bytes: Vec<u8>| serde_json::from_slice::<serde_json::Value>(&bytes).unwrap();
    let index = json(fs::read(layout.join("index.json")).unwrap());
    blob(&json(blob(&index["manifests"][0]))["config"])
}
