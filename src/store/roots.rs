//! Image roots: what `ls` lists and what keeps an image's content alive.
//!
//! `images/<aa>/<sha256 of source reference>/<manifest digest>.json` holds, in a signed `envelope`, the JSON of an [`ImageRoot`], its fields in the
//! order of the struct.
//!
//! Who only lists images or keeps their content takes any root, whatever key signed it, or none as older programs left them: it says what to keep,
//! never what to believe. Who believes what a root says of its image, as `export` does, takes a [`TrustedRoot`]. The signature covers source
//! and manifest; not which of a source's manifests is the newest, which is told by the age of the file.

use std::cmp::Reverse;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use erofs::digest::Digest;
use rustix::fs::{AtFlags, Timespec, Timestamps, UTIME_NOW, utimensat};
use serde::{Deserialize, Serialize};

use super::envelope::{Envelope, Unproven};
use super::error::Doing;
use super::key::SigningKey;
use super::publish::Published;
use super::record::Sizes;
use super::targets::Made;
use super::trust::Trust;
use super::{Name, Store, StoreError, open, read_bounded, text};
use crate::oci::{ChainId, DiffId, Sha256};

/// Longest image root that is read: most of it is the configuration, which has at most 8 MiB and a third more in base64, twice.
const MAX_ROOT: u64 = 16 << 20;

/// One converted image of one platform.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageRoot {
    /// Canonical reference of the source.
    pub source: String,
    /// Reference of the target that was pushed last, if any. Not part of the root's file, see `targets`.
    #[serde(default, skip_serializing)]
    pub target: Option<String>,
    /// Platform, as `os/arch[/variant]`.
    pub platform: String,
    /// Digest of the source's platform manifest.
    pub manifest: Sha256,
    /// Chain of all its layers.
    pub chain: ChainId,
    /// Digest of the metadata image.
    #[serde(with = "text::one")]
    pub metadata: Digest,
    /// The image's configuration.
    pub config: RootConfig,
    /// The layers, bottom first.
    pub layers: Vec<RootLayer>,
    /// Sizes of the whole image.
    pub sizes: Sizes,
    /// Chains of the compact images that were made of it, whose records stand for [`ImageRoot::chain`]: kept as long as it is. More than one if
    /// the metadata image has changed since, as by a newer converter. Not part of the root's file, see `targets`.
    #[serde(default, skip_serializing)]
    pub compact: Vec<ChainId>,
}

/// The configuration of an image, as the source has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RootConfig {
    /// Its digest, also called the image's id.
    pub digest: Sha256,
    /// Its bytes, in base64 (standard alphabet, padded).
    #[serde(with = "text::base64")]
    pub bytes: Vec<u8>,
}

impl RootConfig {
    /// These bytes, and their digest.
    pub fn new(bytes: &[u8]) -> RootConfig {
        RootConfig { digest: Sha256::of(bytes), bytes: bytes.to_vec() }
    }
}

/// One layer of an image root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RootLayer {
    /// Digest of the layer blob in the registry.
    pub blob: Sha256,
    /// Bytes of that blob.
    pub size: u64,
    /// Diff ID.
    pub diff_id: DiffId,
    /// Layer tree in the store.
    #[serde(with = "text::one")]
    pub tree: Digest,
    /// Framing in the store: with the packs that it names (some of them perhaps no other file does) it gives back the layer's tar.
    #[serde(with = "text::one")]
    pub framing: Digest,
}

/// An image root that a trusted key signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustedRoot(ImageRoot);

impl TrustedRoot {
    /// What it says.
    pub fn root(&self) -> &ImageRoot {
        &self.0
    }
}

impl ImageRoot {
    /// Name of its file.
    pub fn name(&self) -> Name {
        Name::Image { source: Sha256::of(self.source.as_bytes()), manifest: self.manifest }
    }

    fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a struct of strings, numbers and lists is JSON")
    }
}

impl Store {
    /// Signs and publishes an image root, replacing what was said of the same source and manifest; from now on it is the newest of its source and platform.
    /// It comes last in a conversion: everything it names must have been published before (invariant 2).
    ///
    /// What was made of the image lies beside it and stays.
    pub fn put_image(&self, root: &ImageRoot, key: &SigningKey) -> Result<Published, StoreError> {
        let path = root.name().path();
        match self.read_root(&path) {
            // An older program wrote it into the root.
            Ok((earlier, _)) => {
                earlier.compact.iter().try_for_each(|chain| self.add_compact(root, *chain))?;
                earlier.target.iter().try_for_each(|target| self.add_target(root, target))?;
            }
            Err(error) if error.is_about_content() => {}
            Err(error) => return Err(error),
        }
        let sealed = Envelope::seal(&root.encode(), key);
        self.check_size(&root.name(), &sealed, MAX_ROOT)?;
        let mut temp = self.temp()?;
        temp.write_all(&sealed).map_err(|error| StoreError::writing(temp.path(), error))?;
        let published = self.publish(temp, &root.name())?;
        if published == Published::Present {
            self.renew(&path);
        }
        Ok(published)
    }

    /// The image's configuration as the source has it, verified.
    pub fn image_config<'a>(&self, root: &'a ImageRoot) -> Result<&'a [u8], StoreError> {
        let found = Sha256::of(&root.config.bytes);
        if found == root.config.digest {
            return Ok(&root.config.bytes);
        }
        let reason = format!("the configuration in it has the digest {found}, not {}", root.config.digest);
        Err(StoreError::Damaged { path: self.shown(&root.name().path()), reason })
    }

    /// Makes a file as young as one written now, by the store's own clock.
    pub(super) fn renew(&self, path: &Path) {
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let (dir, name) = (path.parent().expect("a root lies in a directory"), path.file_name().expect("a root has a name"));
        let renewed = open::directory(&self.root, dir, &self.shown(dir), Doing::Writing).and_then(|dir| {
            let times = Timestamps { last_access: now, last_modification: now };
            utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(|errno| StoreError::from_errno(Doing::Writing, &self.shown(path), errno))
        });
        if let Err(error) = renewed {
            tracing::warn!(%error, "a file stays as old as it was: another version of the image, or another target, may be taken for newer");
        }
    }

    /// All image roots, ordered by source reference, then platform, the newest first; then, as errors, the files there that are no image roots.
    pub fn images(&self) -> Result<Vec<Result<ImageRoot, StoreError>>, StoreError> {
        let (mut roots, mut made, mut errors) = (Vec::new(), Made::default(), Vec::new());
        for path in self.files_below(Path::new("images"), 2)? {
            let read = match made.take(self, &path) {
                Ok(true) => continue,
                Ok(false) => self.read_root(&path),
                Err(error) => Err(error),
            };
            match read {
                Ok(root) => roots.push(root),
                Err(error) if error.is_about_content() => errors.push(Err(error)),
                Err(error) => return Err(error),
            }
        }
        roots.sort_by(|(a, at), (b, bt)| (&a.source, &a.platform, Reverse(at), a.manifest).cmp(&(&b.source, &b.platform, Reverse(bt), b.manifest)));
        let told = roots.into_iter().map(|(mut root, _)| {
            made.tell(&mut root);
            Ok(root)
        });
        Ok(told.chain(errors).collect())
    }

    /// The root again of an image that was listed, if `trust` vouches for it now.
    pub fn trusted_image(&self, listed: &ImageRoot, trust: &Trust) -> Result<TrustedRoot, StoreError> {
        let path = listed.name().path();
        let (bytes, _) = self.read_aged(&path, MAX_ROOT)?;
        let shown = self.shown(&path);
        match Envelope::parse(&bytes).map(|envelope| envelope.open(trust).map(<[u8]>::to_vec)) {
            Ok(Ok(payload)) => self.decode_root(&path, &payload).map(TrustedRoot),
            Ok(Err(Unproven::Untrusted(key))) => Err(StoreError::Untrusted { path: shown, key }),
            Ok(Err(Unproven::BadSignature)) => Err(StoreError::Damaged { path: shown, reason: "its signature does not fit what it says".to_owned() }),
            Err(_) => self.decode_root(&path, &bytes).and(Err(StoreError::Unsigned { path: shown })),
        }
    }

    /// An image root, whoever signed it, and when it was published last.
    pub(super) fn read_root(&self, path: &Path) -> Result<(ImageRoot, SystemTime), StoreError> {
        let (bytes, modified) = self.read_aged(path, MAX_ROOT)?;
        // Older programs signed none.
        let payload = Envelope::parse(&bytes).map_or(bytes, |envelope| envelope.payload);
        Ok((self.decode_root(path, &payload)?, modified))
    }

    fn decode_root(&self, path: &Path, payload: &[u8]) -> Result<ImageRoot, StoreError> {
        let damaged = |reason: String| StoreError::Damaged { path: self.shown(path), reason };
        let root: ImageRoot = serde_json::from_slice(payload).map_err(|error| damaged(error.to_string()))?;
        if root.name().path() != path {
            return Err(damaged("it is the root of another image than its name says".to_owned()));
        }
        Ok(root)
    }

    /// A small file's bytes, and when it was written last.
    pub(super) fn read_aged(&self, path: &Path, max: u64) -> Result<(Vec<u8>, SystemTime), StoreError> {
        let shown = self.shown(path);
        let file = open::regular(&self.root, path, &shown)?;
        let modified = file.metadata().and_then(|metadata| metadata.modified());
        let modified = modified.map_err(|error| StoreError::from_io(Doing::Reading, &shown, error))?;
        Ok((read_bounded(file, max, &shown)?, modified))
    }

    /// Paths of what lies `depth` directories below `dir`. What is no directory on the way down is passed over, with a warning: so this says
    /// what there is, never what there is not.
    pub(super) fn files_below(&self, dir: &Path, depth: usize) -> Result<Vec<PathBuf>, StoreError> {
        let mut dirs = vec![dir.to_owned()];
        for _ in 0..=depth {
            let mut next = Vec::new();
            for dir in &dirs {
                next.extend(self.names_passing_over(dir)?.iter().map(|name| dir.join(name)));
            }
            dirs = next;
        }
        Ok(dirs)
    }
}

/// A root of a tiny image that is in the sample's store.
#[cfg(test)]
pub(super) fn sample_root(sample: &super::sample::Sample, source: &str) -> ImageRoot {
    let payload = sample.publish(&super::sample::layers(source, 2)).pop().unwrap();
    let blob = |text: &str| Sha256::of(text.as_bytes());
    ImageRoot {
        source: source.to_owned(),
        target: None,
        platform: "linux/amd64".to_owned(),
        manifest: blob(&format!("manifest of {source}")),
        chain: payload.chain,
        metadata: payload.metadata,
        config: RootConfig::new(source.as_bytes()),
        layers: payload
            .layers()
            .map(|(diff_id, super::LayerFiles { tree, framing })| RootLayer { blob: blob("b"), size: 7, diff_id, tree, framing })
            .collect(),
        sizes: payload.sizes,
        compact: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::store::sample::Sample;

    #[test]
    fn a_root_longer_than_readers_take_is_not_written() {
        let sample = Sample::new();
        let root = |config: usize| ImageRoot { config: RootConfig::new(&vec![0; config]), ..sample_root(&sample, "example.com/a:1") };
        // As large as a configuration may be.
        sample.store.put_image(&root(8 << 20), &sample.key).unwrap();
        assert_eq!(sample.store.images().unwrap().len(), 1);
        let error = sample.store.put_image(&root(10 << 20), &sample.key).unwrap_err();
        assert!(matches!(error, StoreError::TooLarge { .. }), "{error}");
    }

    #[test]
    fn images_are_listed_by_name_and_said_once() {
        let sample = Sample::new();
        assert!(sample.store.images().unwrap().is_empty());
        let (b, a) = (sample_root(&sample, "example.com/b:1"), sample_root(&sample, "example.com/a:1"));
        assert_eq!(sample.store.put_image(&b, &sample.key).unwrap(), Published::New);
        assert_eq!(sample.store.put_image(&a, &sample.key).unwrap(), Published::New);
        assert_eq!(sample.store.put_image(&a, &sample.key).unwrap(), Published::Present);
        let other = ImageRoot { metadata: b.metadata, ..a };
        assert_eq!(sample.store.put_image(&other, &sample.key).unwrap(), Published::Replaced);
        let listed: Vec<ImageRoot> = sample.store.images().unwrap().into_iter().map(Result::unwrap).collect();
        assert_eq!(listed, [other, b]);
    }

    #[test]
    fn of_one_name_the_version_converted_last_comes_first() {
        let sample = Sample::new();
        let one = sample_root(&sample, "example.com/a:1");
        let other = ImageRoot { manifest: Sha256::of(b"pushed later"), ..one.clone() };
        let arm = ImageRoot { platform: "linux/arm64".to_owned(), manifest: Sha256::of(b"arm"), ..one.clone() };
        let age = |root: &ImageRoot| {
            // As if this had been a while ago: two conversions may fall into one tick of the clock.
            let file = fs::File::options().write(true).open(sample.store.dir().join(root.name().path())).unwrap();
            file.set_modified(SystemTime::now() - std::time::Duration::from_secs(60)).unwrap();
        };
        for (converted, expected) in
            [(&one, vec![&one]), (&arm, vec![&one, &arm]), (&other, vec![&other, &one, &arm]), (&one, vec![&one, &other, &arm])]
        {
            sample.store.put_image(converted, &sample.key).unwrap();
            let listed: Vec<ImageRoot> = sample.store.images().unwrap().into_iter().map(Result::unwrap).collect();
            assert_eq!(listed.iter().collect::<Vec<_>>(), expected);
            listed.iter().for_each(age);
        }
    }

    /// The largest that containerd takes, of bytes that are no text.
    #[test]
    fn a_configuration_comes_back_as_it_was_or_is_named_as_damaged() {
        let sample = Sample::new();
        let bytes: Vec<u8> = (0..8u32 << 20).map(|i| (i.wrapping_mul(7919) >> 3) as u8).collect();
        let root = ImageRoot { config: RootConfig::new(&bytes), ..sample_root(&sample, "example.com/a:1") };
        sample.store.put_image(&root, &sample.key).unwrap();
        let mut read = sample.store.images().unwrap().remove(0).unwrap();
        assert!(sample.store.image_config(&read).unwrap() == bytes);
        read.config.bytes[5_000_000] ^= 1;
        let error = sample.store.image_config(&read).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }) && error.to_string().contains(&read.config.digest.to_string()), "{error}");
    }

    #[test]
    fn every_root_is_listed_and_only_those_of_trusted_keys_are_believed() {
        let (sample, stranger) = (Sample::new(), Sample::new());
        let root = sample_root(&sample, "example.com/a:1");
        let path = sample.store.dir().join(root.name().path());
        let check = |root: &ImageRoot, trust: &Trust, expected: Option<&[&str]>| {
            assert_eq!(sample.store.images().unwrap().remove(0).unwrap(), *root);
            match (sample.store.trusted_image(root, trust), expected) {
                (Ok(found), None) => assert_eq!(found.root(), root),
                (Err(error), Some(parts)) => {
                    let text = error.to_string();
                    assert!(parts.iter().all(|part| text.contains(part)) && text.contains(path.to_str().unwrap()), "{text}");
                }
                (found, expected) => panic!("{found:?} is not {expected:?}"),
            }
        };
        sample.store.put_image(&root, &sample.key).unwrap();
        check(&root, &sample.trust(), None);
        check(&root, &Trust::default(), Some(&["not trusted", &sample.key.public().id().to_string()]));
        sample.store.put_image(&root, &stranger.key).unwrap();
        check(&root, &sample.trust(), Some(&["not trusted", &stranger.key.public().id().to_string()]));
        check(&root, &stranger.trust(), None);
        // Another payload in a trusted key's envelope.
        let forged = ImageRoot { config: RootConfig::new(b"{\"config\":{\"Cmd\":[\"mine\"]}}"), ..root.clone() };
        let mut envelope = Envelope::parse(&Envelope::seal(&root.encode(), &sample.key)).unwrap();
        envelope.payload = forged.encode();
        fs::write(&path, serde_json::to_vec(&envelope).unwrap()).unwrap();
        check(&forged, &sample.trust(), Some(&["signature does not fit"]));
        // As older programs wrote them, and as those do who have no key.
        fs::write(&path, forged.encode()).unwrap();
        check(&forged, &sample.trust(), Some(&["not signed", "convert the image again"]));
        // A root of another image, or what is no root.
        fs::write(&path, Envelope::seal(&sample_root(&sample, "example.com/b:1").encode(), &sample.key)).unwrap();
        assert!(sample.store.trusted_image(&root, &sample.trust()).unwrap_err().to_string().contains("another image"));
        fs::write(&path, Envelope::seal(b"{}", &sample.key)).unwrap();
        assert!(matches!(sample.store.trusted_image(&root, &sample.trust()), Err(StoreError::Damaged { .. })));
    }

    #[test]
    fn a_file_that_is_no_root_is_named_and_hides_nothing() {
        let sample = Sample::new();
        let good = sample_root(&sample, "example.com/a:1");
        sample.store.put_image(&good, &sample.key).unwrap();
        let path = sample.store.dir().join(good.name().path());
        fs::copy(&path, path.with_file_name("other.json")).unwrap();
        fs::write(path.with_file_name("x"), b"{}").unwrap();
        fs::write(sample.store.dir().join("images/README"), b"").unwrap();
        let listed = sample.store.images().unwrap();
        assert_eq!(listed[0].as_ref().unwrap(), &good);
        let errors: Vec<String> = listed[1..].iter().map(|root| root.as_ref().unwrap_err().to_string()).collect();
        assert!(errors.len() == 2 && errors[0].contains("other.json") && errors[1].contains("/x "), "{errors:?}");
    }
}
