//! What a conversion says when it is done.

use serde_json::{Value, json};
use slipway::oci::push::Pushed;

use super::Converted;
use super::platforms::{AllConverted, Outcome};
use super::target::PushedTarget;
use crate::failure::Failure;
use crate::printable::printable;
use crate::progress::bytes;

/// For people.
pub fn text(done: &Converted) -> String {
    let root = &done.root;
    let reused = done.reused.iter().filter(|&&reused| reused).count();
    let target = done.target.iter().map(|target| {
        let sent: u64 = target.blobs.iter().filter(|(how, _)| *how == Pushed::Sent).map(|(_, size)| size).sum();
        let kind = target.kind.word();
        format!("  target    {}@{} ({kind}, {} sent)\n", printable(&target.reference), target.digest.oci(), bytes(sent))
    });
    let target: String = target.collect();
    format!(
        "{} ({})\n  manifest  sha256:{}\n  chain     sha256:{}\n  metadata  {} ({})\n  layers    {} ({reused} reused)\n  \
         content   {} in {} inodes\n  stored    {} in {} packs\n  new       {} for {} of data, {} were there ({:.1} %)\n{target}  seconds   {:.1}\n",
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
        bytes(done.savings.stored),
        bytes(done.savings.new),
        bytes(done.savings.present),
        100.0 * done.savings.ratio(),
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
        "data": done.savings.json(),
        "target": done.target.as_ref().map(target_json),
        "seconds": done.seconds,
        "processorSeconds": done.cost.json(),
        "peakMemory": done.cost.peak_memory,
    })
}

fn target_json(target: &PushedTarget) -> Value {
    let count = |wanted: Pushed| target.blobs.iter().filter(|(how, _)| *how == wanted).count();
    let sent: u64 = target.blobs.iter().filter(|(how, _)| *how == Pushed::Sent).map(|(_, size)| size).sum();
    json!({
        "reference": target.reference,
        "kind": target.kind.word(),
        "digest": target.digest.oci(),
        "index": target.index.map(|index| index.oci()),
        "present": count(Pushed::Present),
        "mounted": count(Pushed::Mounted),
        "sent": count(Pushed::Sent),
        "sentBytes": sent,
    })
}

/// All platforms of an image, for people.
pub fn all_text(source: &str, all: &AllConverted) -> String {
    let one = |outcome: &Outcome| match &outcome.result {
        Ok(done) => text(done),
        Err(failure) => {
            format!("{} ({})\n  failed    {}\n", printable(source), printable(&platform(outcome)), failure.report().trim_start_matches("error: "))
        }
    };
    let index = match (&all.target, &all.index) {
        (Some(target), Some(Ok(digest))) => format!("{}@{}: index of {} platforms\n", printable(target), digest.oci(), all.outcomes.len()),
        _ => String::new(),
    };
    all.outcomes.iter().map(one).chain([index]).collect()
}

/// All platforms of an image, for programs: what [`json()`] says of each, or why it failed.
pub fn all_json(source: &str, all: &AllConverted) -> Value {
    let one = |outcome: &Outcome| match &outcome.result {
        Ok(done) => json(done),
        Err(failure) => {
            let error = failure.report();
            json!({"source": source, "platform": outcome.platform.as_ref().map(ToString::to_string), "error": error.trim_start_matches("error: ")})
        }
    };
    all.outcomes.iter().map(one).collect()
}

/// The failure of the command, if a platform failed, or their index.
pub fn all_failure(source: &str, all: AllConverted) -> Result<(), Failure> {
    let AllConverted { outcomes, target, index } = all;
    let count = outcomes.len();
    let mut failed = Vec::new();
    let mut first = None;
    for outcome in outcomes {
        let platform = platform(&outcome);
        if let Err(failure) = outcome.result {
            failed.push(platform);
            first.get_or_insert(failure);
        }
    }
    match first {
        None => index.map_or(Ok(()), |pushed| pushed.map(drop)),
        Some(first) => Err(Failure::Platforms { image: source.to_owned(), failed, count, target, first: Box::new(first) }),
    }
}

fn platform(outcome: &Outcome) -> String {
    outcome.platform.as_ref().map_or_else(|| "unknown platform".to_owned(), ToString::to_string)
}
