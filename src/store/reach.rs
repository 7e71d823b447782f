//! What the store's images vouch for: layers by diff ID, and packs, as far as trusted records name them.
//!
//! The walk begins at the image roots and not in `chains/`. A root leads to the record that names all layers of its image and the packs of its metadata,
//! where `chains/` has a record for every prefix; and what a root reaches is what stays in the store, while records that no root leads to are on their
//! way out. Whoever signed a root, it only says where to look: what is believed are the signed records of the chain it names.
//!
//! Packs that no file of the image is in any more, since a layer above replaced those files, are in the layers' trees and framings only, and
//! not reached here: not all that must stay is.
//!
//! Records that cannot be read, are tombstoned, or that no trusted key signed are passed over. Of any fold version are good: trees and packs do not
//! depend on it. Whether what a record names is still there, and whole, shows when it is used.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;

use erofs::digest::Digest;
use erofs::meta::PackRef;

use super::record::{LayerFiles, Payload};
use super::trust::Trust;
use super::{Name, Store, StoreError};
use crate::oci::{ChainId, DiffId};

/// Files read at once: on a network each costs a few round trips, and there are two for every image.
const READS_AT_ONCE: usize = 16;

/// Layers and packs that trusted records name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    layers: BTreeMap<DiffId, BTreeSet<LayerFiles>>,
    packs: BTreeMap<Digest, PackRef>,
}

impl Reach {
    /// The files that records name for a layer, in byte order.
    pub fn files(&self, diff_id: &DiffId) -> impl Iterator<Item = LayerFiles> {
        self.layers.get(diff_id).into_iter().flatten().copied()
    }

    /// The packs that records name, each once, in byte order.
    pub fn packs(&self) -> impl Iterator<Item = &PackRef> {
        self.packs.values()
    }

    fn add(&mut self, payload: &Payload, wanted: &BTreeSet<DiffId>) {
        for (diff_id, files) in payload.layers().filter(|(diff_id, _)| wanted.contains(diff_id)) {
            self.layers.entry(diff_id).or_default().insert(files);
        }
        for pack in &payload.packs {
            // Should records disagree on its length, all but one are wrong, and who opens the pack goes by its footer; one is chosen that does not
            // depend on which record was read first.
            let size = |pack: &PackRef| (pack.blocks, pack.unit_bits.bytes());
            let known = self.packs.entry(pack.digest).or_insert(*pack);
            if size(pack) < size(known) {
                *known = *pack;
            }
        }
    }
}

impl Store {
    /// Those of the layers `wanted` and all packs that records of the store's images name, as far as `trust` vouches for the records.
    ///
    /// Errors are trouble in reaching the store only.
    pub fn reach(&self, trust: &Trust, wanted: &BTreeSet<DiffId>) -> Result<Reach, StoreError> {
        let mut roots = self.files_below(Path::new("images"), 2)?;
        roots.retain(|path| matches!(path.to_str().and_then(Name::parse), Some(Name::Image { .. })));
        let chains = at_once(&roots, |path: &PathBuf| match self.read_root(path) {
            Ok((root, _)) => Ok(Some(root.chain)),
            Err(error) if error.is_about_content() => Ok(None),
            Err(error) => Err(error),
        })?;
        let chains: Vec<ChainId> = chains.into_iter().flatten().collect::<BTreeSet<_>>().into_iter().collect();
        // Taken up as they come: the records of a large store are too much to have all at once.
        let reach = Mutex::<Reach>::default();
        at_once(&chains, |chain| {
            let payloads = self.vouched(chain, trust)?;
            let mut reach = reach.lock().expect("no panic while it is held");
            payloads.iter().for_each(|payload| reach.add(payload, wanted));
            Ok(())
        })?;
        Ok(reach.into_inner().expect("no panic while it is held"))
    }

    /// What trusted records that are in use say of a chain.
    fn vouched(&self, chain: &ChainId, trust: &Trust) -> Result<Vec<Payload>, StoreError> {
        self.signed_records(chain, trust)?.map(|found| Ok(found?.payload)).collect()
    }
}

/// Does `work` on all `items` on several threads; the results in their order, or the first error.
fn at_once<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> Result<R, StoreError> + Sync) -> Result<Vec<R>, StoreError> {
    let share = items.len().div_ceil(READS_AT_ONCE).max(1);
    thread::scope(|scope| {
        let threads: Vec<_> = items.chunks(share).map(|items| scope.spawn(|| items.iter().map(&work).collect::<Result<Vec<R>, _>>())).collect();
        let mut results = Vec::with_capacity(items.len());
        for thread in threads {
            results.extend(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(results)
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::oci::Sha256;
    use crate::store::sample::{Sample, layers};
    use crate::store::{ImageRoot, layout};

    /// Publishes an image with its root; gives its top payload.
    fn image(sample: &Sample, name: &str) -> Payload {
        let payload = sample.publish(&layers(name, 2)).pop().unwrap();
        sample.store.put_image(&root(name, &payload), &sample.key).unwrap();
        payload
    }

    fn root(name: &str, payload: &Payload) -> ImageRoot {
        let digest = Sha256::of(name.as_bytes());
        let root = serde_json::json!({
            "source": name, "target": null, "platform": "linux/amd64", "manifest": digest, "chain": payload.chain,
            "metadata": payload.metadata.to_string(), "config": {"digest": digest, "bytes": ""}, "layers": [], "sizes": payload.sizes,
        });
        serde_json::from_value(root).unwrap()
    }

    #[test]
    fn layers_and_packs_of_every_image_are_reached() {
        let sample = Sample::new();
        assert_eq!(sample.store.reach(&sample.trust(), &BTreeSet::new()).unwrap(), Reach::default());
        let images: Vec<Payload> = (0..40).map(|i| image(&sample, &format!("example.com/{i}"))).collect();
        let wanted = images[..20].iter().flat_map(|payload| payload.layers()).map(|(diff_id, _)| diff_id).collect();
        let reach = sample.store.reach(&sample.trust(), &wanted).unwrap();
        for (number, payload) in images.iter().enumerate() {
            for (diff_id, files) in payload.layers() {
                let expected = if number < 20 { vec![files] } else { Vec::new() };
                assert_eq!(reach.files(&diff_id).collect::<Vec<_>>(), expected, "only layers that were asked for");
            }
            assert!(reach.packs().any(|pack| *pack == payload.packs[0]));
        }
        assert_eq!(reach.packs().count(), images.len());
        assert_eq!(reach.files(&DiffId(Sha256::of(b"unknown"))).count(), 0);
    }

    #[test]
    fn what_is_no_directory_keeps_nothing_else_from_being_reached() {
        let sample = Sample::new();
        let good = image(&sample, "example.com/good");
        let only_good = sample.store.reach(&sample.trust(), &BTreeSet::new()).unwrap();
        // In the place of a chain, of all chains that begin alike, and of image roots.
        for (name, up, linked) in [("file", 0, false), ("link", 0, true), ("files", 1, false), ("links", 1, true), ("roots", 3, true)] {
            let payload = image(&sample, &format!("example.com/{name}"));
            let records = sample.store.dir().join(layout::records_of(&payload.chain));
            let roots = sample.store.dir().join(root(&format!("example.com/{name}"), &payload).name().path());
            let place = if up == 3 { roots.parent().unwrap() } else { records.ancestors().nth(up).unwrap() };
            assert!(!sample.store.dir().join(layout::records_of(&good.chain)).starts_with(place), "another name would do");
            fs::remove_dir_all(place).unwrap();
            if linked {
                std::os::unix::fs::symlink("/etc", place).unwrap()
            } else {
                fs::write(place, b"").unwrap()
            }
            assert_eq!(sample.store.reach(&sample.trust(), &BTreeSet::new()).unwrap(), only_good, "{name}");
            assert_eq!(sample.store.find(&payload.chain, &sample.trust()).unwrap().is_some(), up == 3, "{name}");
        }
    }

    #[test]
    fn what_no_trusted_record_in_use_names_is_not_reached() {
        let sample = Sample::new();
        let good = image(&sample, "example.com/good");
        let names =
            |sample: &Sample| sample.store.reach(&sample.trust(), &BTreeSet::new()).unwrap().packs().map(|pack| pack.digest).collect::<Vec<_>>();
        let only_good = [good.packs[0].digest];
        // Records without a root.
        sample.publish(&layers("example.com/no-root", 2));
        assert_eq!(names(&sample), only_good);
        // A root whose record is of another key, damaged, or tombstoned.
        let stranger = Sample::new();
        let mut foreign = stranger.publish(&layers("example.com/stranger", 2)).pop().unwrap();
        sample.store.put_record(&foreign, &stranger.key).unwrap();
        sample.store.put_image(&root("example.com/stranger", &foreign), &sample.key).unwrap();
        assert_eq!(names(&sample), only_good);
        foreign.key = sample.key.public().id();
        sample.store.put_record(&foreign, &sample.key).unwrap();
        assert_eq!(names(&sample).len(), 2);
        let record = sample.store.dir().join(Name::Record { chain: foreign.chain, digest: Digest::of(&foreign.encode()) }.path());
        fs::write(record.with_extension("tomb"), b"").unwrap();
        assert_eq!(names(&sample), only_good);
        fs::remove_file(record.with_extension("tomb")).unwrap();
        fs::write(&record, b"{}").unwrap();
        assert_eq!(names(&sample), only_good);
        fs::remove_file(&record).unwrap();
        fs::create_dir(&record).unwrap();
        fs::write(sample.store.dir().join("images/README"), b"").unwrap();
        assert_eq!(names(&sample), only_good);
        assert_eq!(sample.store.reach(&Trust(Vec::new()), &BTreeSet::new()).unwrap(), Reach::default());
    }
}
