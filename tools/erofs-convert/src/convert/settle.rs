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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use erofs::layer::LayerTree;
    use slipway::oci::{Access, Platform, Source};
    use slipway::store::{LayerFiles, Store};
    use testbed::{Compression, Entry, Image, Layer, Layout, noise};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::convert::Context;
    use crate::journal::Journal;
    use crate::layer::Stages;
    use crate::leftovers::Leftovers;
    use crate::progress::Progress;

    /// Converts the layers of `source` and has them settled in this order; gives their files and trees, from the lowest.
    fn settled(runtime: &tokio::runtime::Runtime, source: &Source, order: &[usize]) -> Vec<(LayerFiles, Arc<LayerTree>)> {
        let dir = tempfile::tempdir().unwrap();
        let made = |name: &str| {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            dir.path().join(name)
        };
        let (store, state) = (Store::create(&made("store")).unwrap(), made("state"));
        let (journal, leftovers) = (Journal::open(&state).unwrap(), Leftovers::take_over(&state, &Progress::Silent).unwrap());
        let (stop, stages) = (CancellationToken::new(), Stages::default());
        let image = runtime.block_on(source.resolve(&Platform::host())).unwrap();
        let context = Context { runtime: runtime.handle(), stop: &stop, progress: &Progress::Silent };
        let (image, store) = (&image, &store);
        let elsewhere = Elsewhere::NOTHING;
        let (journal, leftovers) = (&journal, &leftovers);
        let job = LayerJob { context: &context, source, image, store, journal, leftovers, elsewhere, stop: &stop, stages: &stages };
        let present = HashMap::new();
        let settling = Settling::new(&job, &present, 1..=image.layers.len());
        let mut taken = Vec::new();
        for number in order {
            settling.take(*number, job.convert(*number, &image.layers[*number - 1]).unwrap()).unwrap();
            taken.push(*number);
            // What can be settled is, and nothing else is in the store.
            let ready = (1..=image.layers.len()).take_while(|number| taken.contains(number)).count();
            assert_eq!(testbed::files_below(&store.dir().join("layers")).len(), 2 * ready, "{taken:?}");
        }
        let settled = settling.finish();
        assert_eq!(testbed::files_below(&store.dir().join("tmp")).len(), 0);
        image.layers.iter().map(|layer| settled[&layer.diff_id].clone()).map(|layer| (layer.files, layer.tree)).collect()
    }

    #[test]
    fn layers_are_the_same_in_whatever_order_they_are_converted() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(&dir.path().join("layout")).unwrap();
        let layer = |seeds: std::ops::Range<u64>| Layer::new(seeds.map(|i| Entry::file(&format!("f{i}"), noise(i, 100_000 + i as usize * 7000))));
        let layers = [layer(1..20), layer(30..35), layer(5..25), layer(3..35)];
        let image = layers.iter().fold(Image::new(), |image, layer| image.layer(layer, Compression::Plain));
        layout.add("1", &image).unwrap();
        let source = Source::parse(&format!("oci:{}:1", layout.path().display()), &Access::default()).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let first = settled(&runtime, &source, &[1, 2, 3, 4]);
        assert_eq!(first.iter().map(|(_, tree)| tree.packs.len()).collect::<Vec<_>>(), [1, 1, 2, 4], "they share what is worth it");
        for order in [[4, 3, 2, 1], [2, 4, 1, 3], [3, 1, 4, 2], [1, 4, 3, 2]] {
            assert!(settled(&runtime, &source, &order) == first, "{order:?}");
        }
    }
}
