//! Layers that were converted at the same time come into the store one after the other, from the lowest.
//!
//! A layer that is converted before one below it waits, its packs being temporary files. When its turn comes, it is compared with all the packs that the
//! layers below refer to; what they have as well is taken out of its packs where that is worth it (`layer::settle`). Then it is published and
//! journaled. So a layer depends on the store's content and on the layers below it, and not on which was converted first.
//!
//! A conversion that is killed loses the layers that waited: they are converted again. Layers are begun in an order that lets few wait
//! ([`super::begin_order`]).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Mutex;

use erofs::digest::Digest;
use erofs::meta::PackRef;
use slipway::oci::DiffId;
use slipway::store::record::MAX_PACKS;

use super::Finished;
use super::layer_job::{LayerJob, Waiting};
use crate::dictionary::Dictionary;
use crate::failure::Failure;
use crate::layer::{Elsewhere, LayerOptions};

/// The layers of an image on their way into the store.
pub(super) struct Settling<'a> {
    job: &'a LayerJob<'a>,
    /// Layers that were in the store before.
    present: &'a HashMap<DiffId, Finished>,
    line: Mutex<Line<'a>>,
}

/// Who waits for what.
struct Line<'a> {
    /// Numbers of the layers whose turn is yet to come, the next one last.
    turns: Vec<usize>,
    waiting: BTreeMap<usize, Waiting<'a>>,
    settled: HashMap<DiffId, Finished>,
    /// The chunks below the next layer. Away while a thread settles one.
    below: Option<Dictionary<'a>>,
}

impl<'a> Settling<'a> {
    /// For the layers of these numbers.
    pub fn new(job: &'a LayerJob<'a>, present: &'a HashMap<DiffId, Finished>, numbers: impl Iterator<Item = usize>) -> Settling<'a> {
        let mut turns: Vec<usize> = numbers.collect();
        turns.sort_unstable_by(|a, b| b.cmp(a));
        let below = Some(Dictionary::empty(job.store, LayerOptions::default().unit_bits));
        let line = Line { turns, waiting: BTreeMap::new(), settled: HashMap::new(), below };
        Settling { job, present, line: Mutex::new(line) }
    }

    /// Takes a converted layer. It is settled now, with those that waited for it, or by the thread that is at it, or when those below have come.
    pub fn take(&self, number: usize, layer: Waiting<'a>) -> Result<(), Failure> {
        self.lock().waiting.insert(number, layer);
        loop {
            let (number, mut layer, mut below, packs) = {
                let mut line = self.lock();
                let next = line.turns.last().copied().and_then(|number| Some((number, line.waiting.remove(&number)?)));
                let Some((number, layer)) = next else { return Ok(()) };
                let Some(below) = line.below.take() else {
                    line.waiting.insert(number, layer);
                    return Ok(());
                };
                (number, layer, below, self.packs_below(number, &line.settled))
            };
            below.add(&packs, self.job.stop)?;
            self.job.settle(&mut layer, Elsewhere { known: &below, max_packs: MAX_PACKS })?;
            let finished = self.job.publish(layer)?;
            let mut line = self.lock();
            line.turns.pop();
            line.settled.insert(self.job.image.layers[number - 1].diff_id, finished);
            line.below = Some(below);
        }
    }

    /// Packs that the layers below this one refer to.
    fn packs_below(&self, number: usize, settled: &HashMap<DiffId, Finished>) -> Vec<PackRef> {
        let mut seen: HashSet<Digest> = HashSet::new();
        let below = self.job.image.layers[..number - 1].iter().filter_map(|layer| settled.get(&layer.diff_id).or(self.present.get(&layer.diff_id)));
        below.flat_map(|layer| &layer.tree.packs).filter(|pack| seen.insert(pack.digest)).copied().collect()
    }

    /// The layers, when all were taken.
    pub fn finish(self) -> HashMap<DiffId, Finished> {
        self.line.into_inner().expect("no panic while it is held").settled
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Line<'a>> {
        self.line.lock().expect("no panic while it is held")
    }
}
