//! From an image to a store: resolve, reuse what is there, convert the other layers, fold, publish.
//!
//! Nothing is made anywhere before the image has been found. What becomes visible, and when (invariant 2): a layer's packs, framing and tree once all its digests were verified, then the top's metadata
//! image, then signed records from the lowest chain to the top, and the image root last. Layers come in order, from the lowest. A conversion that stops
//! anywhere leaves whole files that no record names, which the next run finds through the journal; what is lost are layers that
//! were not finished or waited for one below them.

pub(crate) mod compact;
pub mod cost;
mod layer_job;
mod lone_file;
pub mod platforms;
mod publish;
pub mod report;
mod reuse;
mod room;
pub mod savings;
mod settle;
pub mod target;

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use erofs::digest::Digest;
use erofs::layer::LayerTree;
use slipway::oci::{DiffId, Platform, Source, SourceImage, SourceLayer};
use slipway::store::{ImageRoot, LayerFiles, Reach, SigningKey, Store, StoreError, Trust};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::dictionary::Dictionary;
use crate::failure::Failure;
use crate::journal::Journal;
use crate::layer::{Elsewhere, LayerOptions};
use crate::leftovers::Leftovers;
use crate::parallel::in_parallel;
use crate::progress::Progress;
use crate::stop;

use compact::CompactLayer;
use cost::{Cost, Meter};
use layer_job::LayerJob;
pub(crate) use layer_job::layer_failure;
use savings::Savings;
use settle::Settling;
use target::{PushedTarget, TargetKind, TargetOptions, Under};

/// What to convert and where to.
#[derive(Clone, Debug)]
pub struct Options {
    /// The image.
    pub source: Source,
    /// Which of its platforms.
    pub platform: Platform,
    /// The store's directory.
    pub store: PathBuf,
    /// Where the converter keeps its journal and, unless `key` says otherwise, its key.
    pub state: PathBuf,
    /// The signing key's file.
    pub key: PathBuf,
    /// Layers converted at once.
    pub jobs: usize,
    /// What to push when it is converted.
    pub target: Option<TargetOptions>,
}

/// What a conversion runs with.
pub struct Context<'a> {
    /// For the network and for signals.
    pub runtime: &'a Handle,
    /// Cancelled when the user wants it to stop.
    pub stop: &'a CancellationToken,
    /// What the user sees.
    pub progress: &'a Progress,
}

/// A finished conversion.
#[derive(Clone, Debug)]
pub struct Converted {
    /// The image root, as published.
    pub root: ImageRoot,
    /// For every layer: it was in the store before.
    pub reused: Vec<bool>,
    /// Packs of the image's metadata, in device order, with the length of their files.
    pub packs: Vec<(Digest, u64)>,
    /// What of it was stored already.
    pub savings: Savings,
    /// What was pushed.
    pub target: Option<PushedTarget>,
    /// How long it took.
    pub seconds: f64,
    /// What it took of this machine.
    pub cost: Cost,
}

/// A layer in the store.
#[derive(Clone)]
struct Finished {
    files: LayerFiles,
    tree: Arc<LayerTree>,
    reused: bool,
    /// Packs that are new in the store with it, with the length of their files.
    new_packs: Vec<(Digest, u64)>,
}

/// Converts an image.
pub fn convert(context: &Context<'_>, options: &Options) -> Result<Converted, Failure> {
    let started = Instant::now();
    needs_new_store(options)?;
    let image = stop::wait(context.runtime, context.stop, options.source.resolve(&options.platform))??;
    convert_image(context, options, image, started, Under::Tag)
}

/// Whether the store is yet to be made; that it can be is found out before anything is downloaded.
fn needs_new_store(options: &Options) -> Result<bool, Failure> {
    match Store::open(&options.store) {
        Ok(_) => Ok(false),
        // Perhaps empty, and then it becomes one.
        Err(StoreError::NotAStore { .. }) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Converts an image and pushes its target, if one is wanted, `under` its tag or for an index to come.
fn convert_image(context: &Context<'_>, options: &Options, image: SourceImage, started: Instant, under: Under) -> Result<Converted, Failure> {
    let (meter, new_store) = (Meter::start(), needs_new_store(options)?);
    if image.layers.is_empty() {
        return Err(Failure::NoLayers { image: image.name });
    }
    compact::refuse(&image)?;
    context.progress.say(&format!("{} ({}): {} layers", image.name, image.platform, image.layers.len()));
    make_state_dir(&options.state)?;
    let key = SigningKey::load_or_create(&options.key)?;
    let journal = Journal::open(&options.state).map_err(state_failure)?;
    let leftovers = Leftovers::take_over(&options.state, context.progress).map_err(state_failure)?;
    let store = Store::create(&options.store)?;
    if new_store {
        context.progress.say(&format!("made a new store in {}", store.dir().display()));
    }
    let trust = Trust(vec![key.public()]);
    let (mut finished, reach) = reuse::find(&store, &journal, &trust, &image)?;
    let todo = missing_layers(&image, &finished);
    context.progress.say(&format!("{} of {} layers are in the store", image.layers.len() - todo.len(), image.layers.len()));
    // A failing layer stops the others, but the user's own token stays as it is.
    let stop = context.stop.child_token();
    let job = LayerJob {
        context,
        source: &options.source,
        image: &image,
        store: &store,
        journal: &journal,
        leftovers: &leftovers,
        elsewhere: Elsewhere::NOTHING,
        stop: &stop,
        stages: &meter.stages,
    };
    convert_layers(&job, options, &reach, todo, &mut finished)?;
    compact::refuse_layers(&image, finished.values().map(|layer| &*layer.tree))?;
    let savings = Savings::of(&image, &finished);
    let published = meter.fold(|| publish::publish(context, options.jobs, &store, &key, &image, finished));
    let (root, top, packs, reused) = published?;
    // Last, so that a push that fails leaves the image converted.
    let mut target = None;
    if let Some(options_of_it) = &options.target {
        let compact = match options_of_it.kind {
            TargetKind::Compact => Some(CompactLayer::publish(&store, &key, &top)?),
            TargetKind::Portable => None,
        };
        if let Some(compact) = &compact {
            store.add_compact(&root, compact.chain())?;
        }
        let pushed = target::push(context, options_of_it, &options.source, &image, compact.as_ref(), under)?;
        if under == Under::Tag {
            store.add_target(&root, &pushed.reference)?;
        }
        target = Some(pushed);
    }
    Ok(Converted { root, reused, packs, savings, target, seconds: started.elapsed().as_secs_f64(), cost: meter.cost() })
}

/// Converts the layers `todo`, referring to what the packs that `reach` has hold already.
fn convert_layers<'a>(
    job: &LayerJob<'a>,
    options: &Options,
    reach: &Reach,
    todo: Vec<(usize, &'a SourceLayer)>,
    finished: &mut HashMap<DiffId, Finished>,
) -> Result<(), Failure> {
    let LayerJob { context, image, store, stop, .. } = *job;
    if !todo.is_empty() {
        let dictionary = Dictionary::open(store, reach, LayerOptions::default().unit_bits, &options.state, context.progress, stop)?;
        let is_named = |diff_id: &DiffId, files| reach.files(diff_id).any(|named| named == files);
        let elsewhere = Elsewhere { known: &dictionary, max_packs: room::share(image, finished, is_named) };
        let job = LayerJob { elsewhere, ..*job };
        let settling = Settling::new(&job, finished, todo.iter().map(|(number, _)| *number));
        let begun = begin_order(todo, options.jobs);
        in_parallel(options.jobs, begun, stop, |(number, layer)| settling.take(number, job.convert(number, layer)?))?;
        let settled = settling.finish();
        finished.extend(settled);
    }
    let crowded = room::crowded(image, finished);
    if !crowded.is_empty() {
        context.progress.say(&format!("the image refers to too many packs: converting {} layers without the packs of others", crowded.len()));
        let alone = |(number, layer): (usize, &'a SourceLayer)| Ok((layer.diff_id, job.publish(job.convert(number, layer)?)?));
        for (diff_id, mut layer) in in_parallel(options.jobs, crowded, stop, alone)? {
            // What the first attempt put into the store stays there.
            layer.new_packs.extend(finished.remove(&diff_id).into_iter().flat_map(|before| before.new_packs));
            finished.insert(diff_id, layer);
        }
    }
    Ok(())
}

/// The layers to convert with their numbers (from 1): each diff ID once, from the lowest.
fn missing_layers<'a>(image: &'a SourceImage, finished: &HashMap<DiffId, Finished>) -> Vec<(usize, &'a SourceLayer)> {
    let mut missing: Vec<(usize, &SourceLayer)> = Vec::new();
    for (i, layer) in image.layers.iter().enumerate() {
        if !finished.contains_key(&layer.diff_id) && !missing.iter().any(|(_, other)| other.diff_id == layer.diff_id) {
            missing.push((i + 1, layer));
        }
    }
    missing
}

/// The order in which layers are begun: from the lowest, since a layer comes into the store after those below it. But one that would keep the
/// others waiting at the end, being as large as what each of the others' threads has left, goes first.
fn begin_order(mut todo: Vec<(usize, &SourceLayer)>, jobs: usize) -> Vec<(usize, &SourceLayer)> {
    let mut order = Vec::with_capacity(todo.len());
    while !todo.is_empty() {
        let total: u64 = todo.iter().map(|(_, layer)| layer.size).sum();
        let long = todo.iter().position(|(_, layer)| layer.size.saturating_mul(jobs as u64) >= total);
        order.push(todo.remove(long.unwrap_or(0)));
    }
    order
}

/// The state directory holds a private key.
fn make_state_dir(state: &Path) -> Result<(), Failure> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(state);
    made.map_err(|source| Failure::State { path: state.to_owned(), source })
}

fn state_failure((path, source): (PathBuf, std::io::Error)) -> Failure {
    Failure::State { path, source }
}
