//! What a conversion says when it is done.

use serde_json::{Value, json};

use super::Converted;
use crate::printable::printable;
use crate::progress::bytes;

/// For people.
pub fn text(done: &Converted) -> String {
    let root = &done.root;
    let reused = done.reused.iter().filter(|&&reused| reused).count();
    format!(
        "{} ({})\n  manifest  sha256:{}\n  chain     sha256:{}\n  metadata  {} ({})\n  layers    {} ({reused} reused)\n  \
         content   {} in {} inodes\n  stored    {} in {} packs\n  seconds   {:.1}\n",
        printable(&root.source),
        printable(&root.platform),
        root.manifest,
        root.chain,
        root.metadata,
        bytes(root.sizes.metadata),
        root.layers.len(),
        bytes(root.sizes.content),
        root.sizes.inodes,
        bytes(root.sizes.stored),
        done.packs.len(),
        done.seconds,
    )
}

/// For programs.
pub fn json(done: &Converted) -> Value {
    let root = &done.root;
    let layers = root.layers.iter().zip(&done.reused).map(|(layer, reused)| {
        json!({"digest": layer.blob.oci(), "size": layer.size, "diffId": layer.diff_id.oci(), "tree": layer.tree.to_string(), "reused": reused})
    });
    json!({
        "source": root.source,
        "platform": root.platform,
        "manifest": root.manifest.oci(),
        "chain": root.chain.oci(),
        "metadata": root.metadata.to_string(),
        "layers": layers.collect::<Vec<_>>(),
        "packs": done.packs.iter().map(|(digest, len)| json!({"digest": digest.to_string(), "size": len})).collect::<Vec<_>>(),
        "sizes": root.sizes,
        "seconds": done.seconds,
    })
}
