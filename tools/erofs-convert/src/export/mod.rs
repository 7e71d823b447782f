//! From a store back to a plain OCI image layout: the source's configuration and, layer by layer, the very bytes of the source's tars.
//!
//! So image id (the digest of the configuration), diff IDs and chain are those of the source, and nothing becomes visible before each of them was
//! seen to be. The layers are compressed anew, so their blobs and the manifest have digests of their own. Nothing is unpacked; every unit is
//! verified as it is read.

mod layer;
mod layout;

use std::path::PathBuf;

use serde_json::{Value, json};
use slipway::oci::{ChainId, DiffId, Sha256, chain_ids, manifest};
use slipway::store::{ImageRoot, Store, StoreError, TrustedRoot};

use crate::convert::Context;
use crate::failure::Failure;
use layer::StoredLayer;
use layout::Layout;

/// An exported image.
pub struct Exported {
    /// Digest of its manifest.
    pub manifest: Sha256,
    /// Digest of its configuration: the image's id, the same as the source's.
    pub config: Sha256,
    /// Its layers.
    pub layers: Vec<ExportedLayer>,
}

/// One layer of it.
pub struct ExportedLayer {
    /// Digest of the blob.
    pub digest: Sha256,
    /// Length of the blob.
    pub size: u64,
    /// The same as the source's.
    pub diff_id: DiffId,
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
pub fn export(context: &Context<'_>, store: &Store, root: &TrustedRoot, target: &Target) -> Result<Exported, Failure> {
    let root = root.root();
    let config = config(store, root)?;
    let layout = Layout::begin(&target.dir)?;
    let name = |i: usize| format!("layer {} (diff ID {}) of {}", i + 1, root.layers[i].diff_id.0.oci(), root.source);
    // All of them first: what is missing is better known before the first layer is compressed.
    let stored = root.layers.iter().enumerate().map(|(i, layer)| StoredLayer::open(store, layer, name(i)));
    let stored = stored.collect::<Result<Vec<_>, _>>()?;
    let mut layers = Vec::new();
    for (i, (stored, of)) in stored.iter().zip(&root.layers).enumerate() {
        let progress = context.progress.layer(i + 1, root.layers.len(), of.blob, of.size);
        let (digest, size) = stored.write(store, &layout, context.stop)?;
        layers.push(ExportedLayer { digest, size, diff_id: of.diff_id });
        progress.finish();
    }
    let (manifest, index) = documents(root, config, &layers, target);
    let exported = Exported { config: layout.put(config)?, manifest: layout.put(manifest.as_bytes())?, layers };
    layout.finish(&index)?;
    Ok(exported)
}

/// The image's configuration. It must be the one of these layers, whatever its converter signed.
fn config<'a>(store: &Store, root: &'a ImageRoot) -> Result<&'a [u8], Failure> {
    let config = store.image_config(root)?;
    let diff_ids: Vec<DiffId> = root.layers.iter().map(|layer| layer.diff_id).collect();
    let found = manifest::diff_ids(&root.source, config)?;
    if found == diff_ids && chain_ids(&diff_ids).last() == Some(&root.chain) {
        return Ok(config);
    }
    let (chain, path): (ChainId, _) = (root.chain, store.dir().join(root.name().path()));
    let reason = format!("its layers, its configuration and its chain {chain} do not belong together");
    Err(StoreError::Damaged { path, reason }.into())
}

/// Manifest and index.
fn documents(root: &ImageRoot, config: &[u8], layers: &[ExportedLayer], target: &Target) -> (String, String) {
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    let layer =
        |layer: &ExportedLayer| json!({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": layer.digest.oci(), "size": layer.size});
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": manifest_type,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": root.config.digest.oci(), "size": config.len()},
        "layers": layers.iter().map(layer).collect::<Vec<_>>(),
    });
    let manifest = manifest.to_string();
    let mut descriptor = json!({"mediaType": manifest_type, "digest": Sha256::of(manifest.as_bytes()).oci(), "size": manifest.len()});
    if let Some(tag) = &target.tag {
        descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
    }
    (manifest, json!({"schemaVersion": 2, "manifests": [descriptor]}).to_string())
}

/// The result for people.
pub fn text(done: &Exported) -> String {
    let layers = done.layers.iter().map(|layer| format!("  layer     {} ({})\n", layer.digest.oci(), crate::progress::bytes(layer.size)));
    format!("manifest  {}\nimage id  {}\n{}", done.manifest.oci(), done.config.oci(), layers.collect::<String>())
}

/// The result for programs.
pub fn json(done: &Exported) -> Value {
    let layer = |layer: &ExportedLayer| json!({"digest": layer.digest.oci(), "size": layer.size, "diffId": layer.diff_id.0.oci()});
    json!({
        "manifest": done.manifest.oci(),
        "config": done.config.oci(),
        "layers": done.layers.iter().map(layer).collect::<Vec<_>>(),
    })
}
