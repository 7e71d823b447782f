//! Every Linux platform of an image, one after the other, and the index that leads to what was pushed of them.

use std::time::Instant;

use serde_json::{Value, json};
use slipway::oci::{OciError, Platform, PlatformImage, Sha256, SourceImages, Target};
use slipway::store::Store;

use super::target::{self, TargetOptions, Under};
use super::{Context, Converted, Options, convert_image, needs_new_store};
use crate::failure::Failure;
use crate::stop;

const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// One platform of an image, converted or not.
#[derive(Debug)]
pub struct Outcome {
    /// The platform, if it is known.
    pub platform: Option<Platform>,
    /// What the source's index says of it.
    stated: Option<Value>,
    /// What became of it.
    pub result: Result<Converted, Failure>,
}

/// All platforms of an image.
#[derive(Debug)]
pub struct AllConverted {
    /// Each platform, in the order of the source's index.
    pub outcomes: Vec<Outcome>,
    /// The target's name.
    pub target: Option<String>,
    /// What became of the index under that name: not even tried if a platform failed, since what was there before is better than a part.
    pub index: Option<Result<Sha256, Failure>>,
}

/// Converts an image for every Linux platform it has, one after the other. A platform that fails does not keep the next from being
/// converted.
pub fn convert_all(context: &Context<'_>, options: &Options) -> Result<AllConverted, Failure> {
    needs_new_store(options)?;
    let SourceImages { index, images } = stop::wait(context.runtime, context.stop, options.source.list_all())??;
    let mut outcomes: Vec<Outcome> = Vec::new();
    for listed in images {
        let started = Instant::now();
        let resolved = stop::wait(context.runtime, context.stop, options.source.resolve_one(listed))?;
        let Some(PlatformImage { platform, stated, image }) = resolved else { continue };
        if platform.is_some() && outcomes.iter().any(|other| other.platform == platform) {
            continue;
        }
        let result = match image {
            Ok(image) => convert_image(context, options, image, started, Under::Digest),
            Err(error) => Err(error.into()),
        };
        match result {
            Err(Failure::Stopped) if context.stop.is_cancelled() => return Err(Failure::Stopped),
            result => outcomes.push(Outcome { platform, stated, result }),
        }
    }
    if outcomes.is_empty() {
        return Err(options.source.not_for_linux().into());
    }
    let mut all = AllConverted { outcomes, target: options.target.as_ref().map(|target| target.reference.to_string()), index: None };
    if let Some(target) = &options.target
        && all.outcomes.iter().all(|outcome| outcome.result.is_ok())
    {
        all.index = match push_index(context, options, target, index.as_deref(), &mut all.outcomes) {
            Err(Failure::Stopped) => return Err(Failure::Stopped),
            result => Some(result),
        };
    }
    Ok(all)
}

/// Pushes the index of all platforms, and has the store say so of each.
fn push_index(
    context: &Context<'_>,
    options: &Options,
    target: &TargetOptions,
    original: Option<&[u8]>,
    outcomes: &mut [Outcome],
) -> Result<Sha256, Failure> {
    let name = target.reference.to_string();
    let failed = |source: OciError| Failure::Push { image: options.source.name(), target: name.clone(), source: Box::new(source) };
    let registry = Target::new(target.reference.clone(), &target.access, &options.source)?;
    let document = document(options, original, outcomes).map_err(failed)?;
    let digest = stop::wait(context.runtime, context.stop, registry.push_manifest(OCI_INDEX, &document))?.map_err(failed)?;
    context.progress.say(&format!("pushed the index of {} platforms", outcomes.len()));
    let store = Store::open(&options.store)?;
    for converted in outcomes.iter_mut().filter_map(|outcome| outcome.result.as_mut().ok()) {
        store.add_target(&converted.root, &name)?;
        if let Some(pushed) = &mut converted.target {
            pushed.index = Some(digest);
        }
    }
    Ok(digest)
}

/// The index: the source's, with the manifests that were pushed in place of its own.
fn document(options: &Options, original: Option<&[u8]>, outcomes: &[Outcome]) -> Result<Vec<u8>, OciError> {
    let malformed = |error: serde_json::Error| OciError::Malformed { what: options.source.name(), reason: error.to_string() };
    let converted: Vec<(&Outcome, &Converted)> = outcomes.iter().filter_map(|outcome| Some((outcome, outcome.result.as_ref().ok()?))).collect();
    let manifests = converted.iter().filter_map(|(outcome, converted)| {
        let pushed = converted.target.as_ref()?;
        let platform = outcome.stated.clone().unwrap_or_else(|| platform_json(&converted.root.platform));
        Some(json!({"mediaType": target::OCI_MANIFEST, "digest": pushed.digest.oci(), "size": pushed.size, "platform": platform}))
    });
    let manifests: Vec<Value> = manifests.collect();
    let (mut annotations, digest) = match (original, &converted[..]) {
        (Some(bytes), _) => (target::annotations_of(&serde_json::from_slice(bytes).map_err(malformed)?), Some(Sha256::of(bytes))),
        (None, [(_, only)]) => (Default::default(), Some(only.root.manifest)),
        // Several entries of a layout: no one document leads to them.
        (None, _) => (Default::default(), None),
    };
    if let Some(digest) = digest {
        annotations.insert(target::SOURCE.to_owned(), target::made_from(&options.source, digest).into());
    }
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests, "annotations": annotations});
    Ok(index.to_string().into_bytes())
}

/// A platform as indexes have it, from `os/arch[/variant]`.
fn platform_json(text: &str) -> Value {
    let mut parts = text.split('/');
    let mut platform = json!({"os": parts.next(), "architecture": parts.next()});
    if let Some(variant) = parts.next() {
        platform["variant"] = variant.into();
    }
    platform
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_platform_without_a_variant_has_none() {
        assert_eq!(platform_json("linux/arm/v7"), json!({"os": "linux", "architecture": "arm", "variant": "v7"}));
        assert_eq!(platform_json("linux/amd64"), json!({"os": "linux", "architecture": "amd64"}));
    }
}
