//! From a store back to a plain OCI image layout: one layer per layer of the source, with the same tree.
//!
//! The store keeps what a layer says, not the bytes of its archive nor the source's configuration. So the archives are new ones, and
//! their diff IDs are their own: those in the image's configuration, not those of the source. Nothing is unpacked; every unit is verified
//! as it is read.

pub(crate) mod tar;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use erofs::layer::LayerTree;
use erofs::meta::Attr;
use erofs::tree::{Body, Tree};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use slipway::oci::digest::Hasher;
use slipway::oci::{Platform, Sha256};
use slipway::store::{ImageRoot, Store};

use crate::check::data::{DataReader, ReadError};
use crate::convert::Context;
use crate::failure::Failure;
use crate::pack_file::PackFile;

/// An exported image.
pub struct Exported {
    /// Digest of its manifest.
    pub manifest: Sha256,
    /// Digest, size and diff ID of every layer.
    pub layers: Vec<(Sha256, u64, Sha256)>,
}

/// Where to export to: `oci:DIR[:TAG]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The layout's directory.
    pub dir: PathBuf,
    /// Its name for the image.
    pub tag: Option<String>,
}

impl std::str::FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Target, String> {
        let path = text.strip_prefix("oci:").filter(|path| !path.is_empty()).ok_or("write it as oci:DIR or oci:DIR:TAG")?;
        let (dir, tag) = path.split_once(':').map_or((path, None), |(dir, tag)| (dir, Some(tag.to_owned())));
        Ok(Target { dir: dir.into(), tag })
    }
}

/// Writes the image of `root` as an OCI image layout into a new or empty directory.
pub fn export(context: &Context<'_>, store: &Store, root: &ImageRoot, target: &Target) -> Result<Exported, Failure> {
    let dir = &target.dir;
    let blobs = dir.join("blobs/sha256");
    let empty = fs::read_dir(dir).map_or(true, |mut entries| entries.next().is_none());
    if !empty {
        return Err(failed(dir)(io::ErrorKind::DirectoryNotEmpty.into()));
    }
    fs::create_dir_all(&blobs).map_err(failed(&blobs))?;
    let trees = root.layers.iter().map(|layer| Ok(store.read_tree(&layer.diff_id, &layer.tree)?)).collect::<Result<Vec<_>, Failure>>()?;
    let mut layers = Vec::new();
    for (i, tree) in trees.iter().enumerate() {
        let progress = context.progress.layer(i + 1, trees.len(), root.layers[i].blob, root.layers[i].size);
        let below = erofs::fold::fold(&trees[..i]).map_err(|source| Failure::Fold { chain: root.chain, source })?;
        layers.push(layer(context, store, tree, &below, &blobs)?);
        progress.finish();
    }
    let put = |value: &Value| {
        let bytes = value.to_string().into_bytes();
        let digest = Sha256::of(&bytes);
        let path = blobs.join(digest.to_string());
        fs::write(&path, &bytes).map_err(failed(&path)).map(|()| (digest, bytes.len()))
    };
    let platform = root.platform.parse().unwrap_or_else(|_| Platform::host());
    let diff_ids: Vec<String> = layers.iter().map(|(_, _, diff_id)| diff_id.oci()).collect();
    let mut config =
        json!({"architecture": platform.architecture, "os": platform.os, "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}});
    if let Some(variant) = platform.variant {
        config["variant"] = variant.into();
    }
    let (config, size) = put(&config)?;
    let layer_json = |(digest, size, _): &(Sha256, u64, Sha256)| json!({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest.oci(), "size": size});
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    let (manifest, size) = put(&json!({
        "schemaVersion": 2,
        "mediaType": manifest_type,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config.oci(), "size": size},
        "layers": layers.iter().map(layer_json).collect::<Vec<_>>(),
    }))?;
    let mut descriptor = json!({"mediaType": manifest_type, "digest": manifest.oci(), "size": size});
    if let Some(tag) = &target.tag {
        descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
    }
    let index = json!({"schemaVersion": 2, "manifests": [descriptor]}).to_string();
    // The index makes the layout one, so it comes last.
    for (name, text) in [("oci-layout", "{\"imageLayoutVersion\":\"1.0.0\"}"), ("index.json", &index)] {
        fs::write(dir.join(name), text).map_err(failed(&dir.join(name)))?;
    }
    Ok(Exported { manifest, layers })
}

fn failed(path: &Path) -> impl Fn(io::Error) -> Failure {
    let path = path.to_owned();
    move |source| Failure::Write { path: path.clone(), source }
}

/// Writes one layer's blob; gives its digest, size and diff ID.
fn layer(context: &Context<'_>, store: &Store, tree: &LayerTree, below: &Tree, blobs: &Path) -> Result<(Sha256, u64, Sha256), Failure> {
    let packs = tree.packs.iter().map(|pack| PackFile::open(store, pack)).collect::<Result<Vec<_>, _>>()?;
    let mut reader = DataReader::new(&packs);
    let temp = blobs.join(".layer");
    let file = File::create(&temp).map_err(failed(&temp))?;
    let mut out = Hashed::new(GzEncoder::new(Hashed::new(file), Compression::default()));
    let written = tar::write(
        &mut out,
        tree,
        |path| attr_at(below, path),
        |out, entry, data| {
            if context.stop.is_cancelled() {
                return Err(Broken::Failure(Failure::Stopped));
            }
            reader.read(data, |piece| out.write_all(piece)).map_err(|error| match error {
                ReadError::Sink(error) => Broken::Io(error),
                ReadError::Data(what) => Broken::Failure(Failure::Data { path: entry.path.escape_ascii().to_string(), what }),
            })
        },
    );
    let finish = || -> Result<(Sha256, u64, Sha256), Broken> {
        written?;
        let blob = out.inner.finish()?;
        blob.inner.sync_data()?;
        let (digest, diff_id) = (blob.hasher.finish(), out.hasher.finish());
        fs::rename(&temp, blobs.join(digest.to_string()))?;
        Ok((digest, blob.len, diff_id))
    };
    finish().map_err(|broken| match broken {
        Broken::Io(error) => failed(&temp)(error),
        Broken::Failure(failure) => failure,
    })
}

enum Broken {
    Io(io::Error),
    Failure(Failure),
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Broken {
        Broken::Io(error)
    }
}

fn attr_at(tree: &Tree, path: &[u8]) -> Option<Attr> {
    let mut inode = tree.inode(Tree::ROOT);
    for name in path.split(|&b| b == b'/') {
        let Body::Dir(children) = &inode.body else { return None };
        inode = tree.inode(*children.get(name)?);
    }
    Some(inode.attr.clone())
}

/// Hashes what goes through it.
struct Hashed<W> {
    inner: W,
    hasher: Hasher,
    len: u64,
}

impl<W> Hashed<W> {
    fn new(inner: W) -> Hashed<W> {
        Hashed { inner, hasher: Hasher::new(), len: 0 }
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..len]);
        self.len += len as u64;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// The result for people.
pub fn text(done: &Exported) -> String {
    let layers = done.layers.iter().map(|(digest, size, _)| format!("  layer     {} ({})\n", digest.oci(), crate::progress::bytes(*size)));
    format!("manifest  {}\n{}", done.manifest.oci(), layers.collect::<String>())
}

/// The result for programs.
pub fn json(done: &Exported) -> Value {
    let layer = |(digest, size, diff_id): &(Sha256, u64, Sha256)| json!({"digest": digest.oci(), "size": size, "diffId": diff_id.oci()});
    json!({"manifest": done.manifest.oci(), "layers": done.layers.iter().map(layer).collect::<Vec<_>>()})
}
