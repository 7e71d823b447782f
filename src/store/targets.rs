//! What was made of an image after its conversion: the names it was pushed under, and the chains of its compact images.
//!
//! Each is a file of its own beside the image's root and never changes: `<manifest digest>.<chain>.compact`, which is empty, and
//! `<manifest digest>.<sha256 of reference>.target`, which holds the reference. So converters that push one image at the same time lose nothing
//! of each other's, whatever the file system; and since the root stays as it is, pushing an older version of an image makes it no younger.
//!
//! They are not signed, and nobody believes them: a compact chain is kept alive, a target is shown.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::Path;
use std::time::SystemTime;

use super::publish::Published;
use super::{ImageRoot, MAX_JSON, Name, Store, StoreError};
use crate::oci::{ChainId, Sha256};

impl Store {
    /// Has the store keep a compact image, made of `root`'s, as long as it keeps that. Its record must have been published before (invariant 2).
    pub fn add_compact(&self, root: &ImageRoot, chain: ChainId) -> Result<(), StoreError> {
        let Name::Image { source, manifest } = root.name() else { unreachable!("a root has the name of one") };
        self.publish(self.temp()?, &Name::Compact { source, manifest, chain }).map(drop)
    }

    /// Says that the image of `root` was pushed under this name, which is then the newest of its targets.
    pub fn add_target(&self, root: &ImageRoot, reference: &str) -> Result<(), StoreError> {
        let Name::Image { source, manifest } = root.name() else { unreachable!("a root has the name of one") };
        let name = Name::Target { source, manifest, reference: Sha256::of(reference.as_bytes()) };
        let mut temp = self.temp()?;
        temp.write_all(reference.as_bytes()).map_err(|error| StoreError::writing(temp.path(), error))?;
        if self.publish(temp, &name)? == Published::Present {
            self.renew(&name.path());
        }
        Ok(())
    }

    /// The reference in a target's file, and when it was pushed last.
    fn read_target(&self, path: &Path, digest: &Sha256) -> Result<(SystemTime, String), StoreError> {
        let (bytes, modified) = self.read_aged(path, MAX_JSON)?;
        match String::from_utf8(bytes) {
            Ok(reference) if Sha256::of(reference.as_bytes()) == *digest => Ok((modified, reference)),
            _ => Err(StoreError::Damaged { path: self.shown(path), reason: "it holds another reference than its name says".to_owned() }),
        }
    }
}

/// What was made of the images whose files were [taken](Made::take).
#[derive(Default)]
pub(super) struct Made {
    compact: BTreeMap<Name, BTreeSet<ChainId>>,
    targets: BTreeMap<Name, (SystemTime, String)>,
}

impl Made {
    /// Looks at a file below `images`. Gives `false` if it is none of these.
    pub fn take(&mut self, store: &Store, path: &Path) -> Result<bool, StoreError> {
        match path.to_str().and_then(Name::parse) {
            Some(Name::Compact { source, manifest, chain }) => {
                self.compact.entry(Name::Image { source, manifest }).or_default().insert(chain);
            }
            Some(Name::Target { source, manifest, reference }) => {
                let found = store.read_target(path, &reference)?;
                let newest = self.targets.entry(Name::Image { source, manifest }).or_insert_with(|| found.clone());
                *newest = found.max(newest.clone());
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Tells a root of it.
    pub fn tell(&self, root: &mut ImageRoot) {
        let name = root.name();
        if let Some(chains) = self.compact.get(&name) {
            root.compact = root.compact.iter().chain(chains).copied().collect::<BTreeSet<_>>().into_iter().collect();
        }
        if let Some((_, newest)) = self.targets.get(&name) {
            root.target = Some(newest.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::Barrier;
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::store::roots::sample_root;
    use crate::store::sample::Sample;

    fn images(sample: &Sample) -> Vec<ImageRoot> {
        sample.store.images().unwrap().into_iter().map(Result::unwrap).collect()
    }

    fn age(sample: &Sample, name: &Name) {
        // As if it had been a while ago: two writes may fall into one tick of the clock.
        let file = fs::File::options().write(true).open(sample.store.dir().join(name.path())).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(60)).unwrap();
    }

    #[test]
    fn pushing_an_older_version_makes_it_no_younger() {
        let sample = Sample::new();
        let older = sample_root(&sample, "example.com/a:1");
        let newer = ImageRoot { manifest: Sha256::of(b"pushed later"), ..older.clone() };
        sample.store.put_image(&older, &sample.key).unwrap();
        age(&sample, &older.name());
        sample.store.put_image(&newer, &sample.key).unwrap();
        sample.store.add_compact(&older, newer.chain).unwrap();
        sample.store.add_target(&older, "example.com/a:old").unwrap();
        let told = ImageRoot { compact: vec![newer.chain], target: Some("example.com/a:old".to_owned()), ..older };
        assert_eq!(images(&sample), [newer, told]);
    }

    #[test]
    fn the_target_pushed_last_is_shown() {
        let sample = Sample::new();
        let root = sample_root(&sample, "example.com/a:1");
        sample.store.put_image(&root, &sample.key).unwrap();
        for target in ["example.com/a:x", "example.com/a:y", "example.com/a:x"] {
            sample.store.add_target(&root, target).unwrap();
            assert_eq!(images(&sample)[0].target.as_deref(), Some(target));
            let Name::Image { source, manifest } = root.name() else { unreachable!() };
            age(&sample, &Name::Target { source, manifest, reference: Sha256::of(target.as_bytes()) });
        }
    }

    #[test]
    fn converters_of_one_image_lose_nothing_of_each_others() {
        const CONVERTERS: u8 = 8;
        let sample = Sample::new();
        let root = sample_root(&sample, "example.com/a:1");
        let chain = |converter: u8, round: u8| ChainId(Sha256::of(&[converter, round]));
        let start = Barrier::new(CONVERTERS.into());
        thread::scope(|scope| {
            for converter in 0..CONVERTERS {
                let (sample, root, start) = (&sample, &root, &start);
                scope.spawn(move || {
                    let store = Store::open(sample.store.dir()).unwrap();
                    start.wait();
                    for round in 0..8 {
                        store.put_image(root, &sample.key).unwrap();
                        store.add_compact(root, chain(converter, round)).unwrap();
                        store.add_target(root, &format!("example.com/{converter}:{round}")).unwrap();
                    }
                });
            }
        });
        let mut all: Vec<ChainId> = (0..CONVERTERS).flat_map(|converter| (0..8).map(move |round| chain(converter, round))).collect();
        all.sort();
        assert_eq!(images(&sample)[0].compact, all);
        let lies = fs::read_dir(sample.store.dir().join(root.name().path()).parent().unwrap()).unwrap();
        let targets = lies.filter(|entry| entry.as_ref().unwrap().file_name().to_str().unwrap().ends_with(".target"));
        assert_eq!(targets.count(), usize::from(CONVERTERS) * 8);
        assert_eq!(fs::read_dir(sample.store.dir().join("tmp")).unwrap().count(), 0);
    }

    #[test]
    fn a_target_that_says_something_else_than_its_name_is_named() {
        let sample = Sample::new();
        let root = sample_root(&sample, "example.com/a:1");
        sample.store.put_image(&root, &sample.key).unwrap();
        let Name::Image { source, manifest } = root.name() else { unreachable!() };
        let path = Name::Target { source, manifest, reference: Sha256::of(b"example.com/a:x") }.path();
        fs::write(sample.store.dir().join(&path), b"example.com/a:y").unwrap();
        let listed = sample.store.images().unwrap();
        assert_eq!(listed[0].as_ref().unwrap(), &root);
        let error = listed[1].as_ref().unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }

    /// An older program wrote both into the root.
    #[test]
    fn what_an_older_root_says_was_made_of_it_stays() {
        let sample = Sample::new();
        let root = sample_root(&sample, "example.com/a:1");
        sample.store.put_image(&root, &sample.key).unwrap();
        let path = sample.store.dir().join(root.name().path());
        let mut old = serde_json::to_value(&root).unwrap();
        old["target"] = "example.com/a:x".into();
        old["compact"] = serde_json::json!([root.chain]);
        fs::write(&path, old.to_string()).unwrap();
        let told = ImageRoot { target: Some("example.com/a:x".to_owned()), compact: vec![root.chain], ..root.clone() };
        assert_eq!(images(&sample), std::slice::from_ref(&told));
        sample.store.put_image(&root, &sample.key).unwrap();
        assert_eq!(images(&sample), [told]);
        assert!(!fs::read_to_string(&path).unwrap().contains("a:x"));
    }
}
