//! Signed records: what a chain of layers became, in a form one signature covers.
//!
//! A record is a payload in a signed `envelope`. The payload is JSON, written without white space and with its fields in this order:
//!
//! | field | content |
//! |---|---|
//! | `chain` | chain ID of layers 1..=n |
//! | `parent` | chain ID of layers 1..=n-1, `null` for a first layer |
//! | `diff_ids` | diff IDs of the layers, bottom first |
//! | `trees` | digests of the layer trees, bottom first; none if it stands for another chain |
//! | `framings` | digests of the layers' framings, bottom first; none if it stands for another chain, or was written before there were any |
//! | `metadata` | digest of the metadata image |
//! | `fold_version` | version of the fold that gave it |
//! | `packs` | `{"digest", "blocks", "unit_bits"}` of each pack, in device order |
//! | `sizes` | `{"metadata", "content", "inodes", "stored"}`, see [`Sizes`] |
//! | `top` | whether the chain is a whole image |
//! | `stands_for` | chain whose image this is, see [`Payload::stands_for`]; left out of all other records |
//! | `tool` | program and version that wrote it |
//! | `key` | id of the signing key |
//!
//! The file's name is the BLAKE3 of the payload's bytes. The key's id is part of the payload so that records by two keys of otherwise
//! the same content have two names, and neither overwrites the other. A reader refuses unknown fields: whatever a newer program says
//! with them, this one would ignore it; the record is then a miss.

use std::collections::BTreeSet;

use erofs::block::UnitBits;
use erofs::digest::Digest;
use erofs::fold::FOLD_VERSION;
use erofs::meta::PackRef;
use serde::{Deserialize, Serialize};

use super::envelope::{Envelope, Unproven};
use super::key::{KeyId, SigningKey};
use super::publish::Published;
use super::trust::Trust;
use super::{MAX_JSON, Name, Store, StoreError, layout, text};
use crate::oci::{ChainId, DiffId, chain_ids};

/// Packs an image may refer to: each is a device of its mount.
pub const MAX_PACKS: usize = 256;

/// What a record says about a chain. The same payload gives the same bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Payload {
    /// The chain of layers 1..=n this is about.
    pub chain: ChainId,
    /// The chain of layers 1..=n-1; `None` for a first layer.
    pub parent: Option<ChainId>,
    /// Diff IDs of the layers, bottom first.
    pub diff_ids: Vec<DiffId>,
    /// Layer trees, bottom first, one per layer; none with [`Payload::stands_for`].
    #[serde(with = "text::many")]
    pub trees: Vec<Digest>,
    /// Framings of the layers, bottom first, one for each of [`Payload::trees`]; or none, in records of programs that made none. Nodes have no
    /// use for them, and must go on using such records: what they committed by one stays committed.
    #[serde(default, with = "text::many")]
    pub framings: Vec<Digest>,
    /// Digest of the metadata image that folding the trees gives.
    #[serde(with = "text::one")]
    pub metadata: Digest,
    /// [`erofs::fold`]'s version that gave it.
    pub fold_version: u32,
    /// Packs the metadata image refers to, in device order.
    #[serde(with = "packs")]
    pub packs: Vec<PackRef>,
    /// How much there is of it.
    pub sizes: Sizes,
    /// The chain is a whole image: its metadata image lies in the store ready-made. Otherwise it is a prefix, folded on the node.
    pub top: bool,
    /// The chain of a compact image, of which this is the record: its only layer holds no files, and what is mounted for it is the image of
    /// this other chain. The key that signs this vouches for it as for any other record, so nobody has to believe what an image says of itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stands_for: Option<ChainId>,
    /// Name and version of the program that wrote the record, see [`tool`].
    pub tool: String,
    /// Key that signs this payload.
    #[serde(with = "text::one")]
    pub key: KeyId,
}

/// What the store has of a layer beside its packs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerFiles {
    /// Its layer tree.
    pub tree: Digest,
    /// Its framing.
    pub framing: Digest,
}

/// Sizes of what a chain or an image holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sizes {
    /// Bytes of the metadata image, uncompressed.
    pub metadata: u64,
    /// Bytes of all regular files, every inode counted once: what the image is worth unpacked.
    pub content: u64,
    /// Inodes.
    pub inodes: u64,
    /// Bytes of the packs' files in the store.
    pub stored: u64,
}

/// Packs as the payload writes them.
mod packs {
    use serde::{Deserializer, Serializer, de::Error as _};

    use super::*;

    #[derive(Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Line {
        #[serde(with = "text::one")]
        digest: Digest,
        blocks: u32,
        unit_bits: u8,
    }

    pub fn serialize<S: Serializer>(packs: &[PackRef], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(packs.iter().map(|pack| Line { digest: pack.digest, blocks: pack.blocks, unit_bits: pack.unit_bits.bits() }))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PackRef>, D::Error> {
        let pack = |line: Line| {
            let unit_bits = UnitBits::new(line.unit_bits).ok_or_else(|| D::Error::custom(format!("{} is no unit size", line.unit_bits)))?;
            Ok(PackRef { digest: line.digest, blocks: line.blocks, unit_bits })
        };
        Vec::<Line>::deserialize(deserializer)?.into_iter().map(pack).collect()
    }
}

/// Name and version of this program, as [`Payload::tool`] wants them.
pub fn tool() -> String {
    format!("slipway {}", env!("CARGO_PKG_VERSION"))
}

/// Why a record is passed over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordFault {
    /// It is not a record as this program writes them.
    #[error("it is no record this program understands: {0}")]
    Malformed(String),
    /// No trusted key has this id.
    #[error("it is signed by key {0}, which is not trusted here")]
    Untrusted(KeyId),
    /// The signature is not the key's signature of this payload.
    #[error("its signature does not fit its payload")]
    BadSignature,
}

impl From<Unproven> for RecordFault {
    fn from(unproven: Unproven) -> RecordFault {
        match unproven {
            Unproven::Untrusted(key) => RecordFault::Untrusted(key),
            Unproven::BadSignature => RecordFault::BadSignature,
        }
    }
}

impl Payload {
    /// The payload's JSON: what is signed, and whose BLAKE3 names the record.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a struct of strings, numbers and lists is JSON")
    }

    /// Reads a payload and checks that it agrees with itself.
    fn decode(bytes: &[u8]) -> Result<Payload, RecordFault> {
        let payload: Payload = serde_json::from_slice(bytes).map_err(|error| RecordFault::Malformed(error.to_string()))?;
        let malformed = |reason: &str| Err(RecordFault::Malformed(reason.to_owned()));
        let chains = chain_ids(&payload.diff_ids);
        if chains.last() != Some(&payload.chain) {
            return malformed("its chain ID is not that of its diff IDs");
        }
        if payload.parent.as_ref() != chains.iter().rev().nth(1) {
            return malformed("its parent is not the chain of the layers below the last");
        }
        match payload.stands_for {
            None if payload.trees.len() != payload.diff_ids.len() => return malformed("it has not one tree for each layer"),
            Some(_) if !payload.trees.is_empty() => return malformed("it stands for another chain and has trees of its own"),
            Some(_) if !payload.top || payload.diff_ids.len() != 1 => return malformed("it stands for another chain and is no image of one layer"),
            Some(other) if other == payload.chain => return malformed("it stands for itself"),
            _ => {}
        }
        if !payload.framings.is_empty() && payload.framings.len() != payload.trees.len() {
            return malformed("it has not one framing for each tree");
        }
        if payload.packs.len() > MAX_PACKS {
            return malformed("it refers to too many packs");
        }
        if payload.packs.iter().map(|pack| pack.digest).collect::<BTreeSet<_>>().len() != payload.packs.len() {
            return malformed("it names a pack twice");
        }
        Ok(payload)
    }

    /// Names of the store's files without which a node cannot use the chain.
    fn needs(&self) -> Vec<Name> {
        let packs = self.packs.iter().map(|pack| Name::Pack(pack.digest));
        if self.top { [Name::Meta(self.metadata)].into_iter().chain(packs).collect() } else { self.tree_names().chain(packs).collect() }
    }

    /// Every layer with its files, bottom first. None if the record has no framings: such layers are of no use to a conversion.
    pub fn layers(&self) -> impl Iterator<Item = (DiffId, LayerFiles)> {
        let files = self.trees.iter().zip(&self.framings).map(|(&tree, &framing)| LayerFiles { tree, framing });
        self.diff_ids.iter().copied().zip(files)
    }

    /// Names of the chain's layer trees, bottom first.
    pub fn tree_names(&self) -> impl Iterator<Item = Name> {
        self.diff_ids.iter().zip(&self.trees).map(|(&diff_id, &digest)| Name::Tree { diff_id, digest })
    }
}

/// Reads a record file: gives the payload only when a trusted key signed it. The second value is the record's name.
pub fn open_record(bytes: &[u8], trust: &Trust) -> Result<(Payload, Digest), RecordFault> {
    let malformed = |error: &dyn std::fmt::Display| RecordFault::Malformed(error.to_string());
    let envelope = Envelope::parse(bytes).map_err(|error| malformed(&error))?;
    // Nothing of the payload is looked at before its signature was seen to be good.
    let raw = envelope.open(trust)?;
    let payload = Payload::decode(raw)?;
    if payload.key != envelope.key {
        return Err(malformed(&"its payload names another key"));
    }
    Ok((payload, Digest::of(raw)))
}

/// A record found in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// What it says.
    pub payload: Payload,
    /// The record file itself, for keeping a copy that can be verified again.
    pub record: Vec<u8>,
}

impl Store {
    /// Signs and publishes a record. Everything the payload names must have been published before (invariant 2). A tombstone of the
    /// record is removed.
    ///
    /// Panics if the payload names another key: it would never be believed.
    pub fn put_record(&self, payload: &Payload, key: &SigningKey) -> Result<Published, StoreError> {
        assert_eq!(payload.key, key.public().id(), "a payload names the key that signs it");
        let raw = payload.encode();
        let digest = Digest::of(&raw);
        let (name, record) = (Name::Record { chain: payload.chain, digest }, Envelope::seal(&raw, key));
        self.check_size(&name, &record, MAX_JSON)?;
        let mut temp = self.temp()?;
        std::io::Write::write_all(&mut temp, &record).map_err(|error| StoreError::writing(temp.path(), error))?;
        let published = self.publish(temp, &name)?;
        self.remove(&layout::records_of(&payload.chain).join(layout::tombstone(&digest)))?;
        Ok(published)
    }

    /// The first record of `chain`, names in byte order, that `trust` vouches for, whose fold version is known, that is not tombstoned and
    /// of which nothing is missing: its packs, the metadata image of a top, the trees of a prefix. `None`: the store has no such record.
    ///
    /// Errors are trouble in reaching the store only; a record that is no good is passed over.
    pub fn find(&self, chain: &ChainId, trust: &Trust) -> Result<Option<Payload>, StoreError> {
        Ok(self.records(chain, trust)?.next().transpose()?.map(|found| found.payload))
    }

    /// The first record as [`Store::find`] gives it, and all that would do as well, in the same order: what a record names is there, but whether
    /// it is whole shows when it is read.
    pub fn records<'a>(
        &'a self,
        chain: &'a ChainId,
        trust: &'a Trust,
    ) -> Result<impl Iterator<Item = Result<Found, StoreError>> + use<'a>, StoreError> {
        let usable = |found: Result<Found, StoreError>| match found.and_then(|found| Ok((self.why_not(&found.payload)?, found))) {
            Ok((None, found)) => Some(Ok(found)),
            Ok((Some(reason), found)) => {
                tracing::debug!(chain = %found.payload.chain, reason, "passing over a record");
                None
            }
            Err(error) if error.is_about_content() => {
                tracing::debug!(%error, "passing over a record");
                None
            }
            Err(error) => Some(Err(error)),
        };
        Ok(self.signed_records(chain, trust)?.filter_map(usable))
    }

    /// All records of `chain` that `trust` vouches for and that are not tombstoned, names in byte order, whether or not they are of use here.
    ///
    /// Errors are trouble in reaching the store only: what someone put in a record's place must not keep others from being found.
    pub(super) fn signed_records<'a>(
        &'a self,
        chain: &'a ChainId,
        trust: &'a Trust,
    ) -> Result<impl Iterator<Item = Result<Found, StoreError>> + use<'a>, StoreError> {
        let names = self.names_passing_over(&layout::records_of(chain))?;
        let tombstoned = |digest: &Digest| names.binary_search(&layout::tombstone(digest)).is_ok();
        let digests = names.iter().filter_map(|name| name.strip_suffix(".json")?.parse::<Digest>().ok());
        let digests: Vec<Digest> = digests.filter(|digest| !tombstoned(digest)).collect();
        Ok(digests.into_iter().filter_map(move |digest| match self.signed_record(chain, &digest, trust) {
            Ok(Ok(found)) => Some(Ok(found)),
            Ok(Err(reason)) => {
                tracing::debug!(%chain, record = %digest, reason, "passing over a record");
                None
            }
            Err(error) if error.is_about_content() => {
                tracing::debug!(%chain, record = %digest, %error, "passing over a record");
                None
            }
            Err(error) => Some(Err(error)),
        }))
    }

    /// One record, or the reason why it is not to be believed.
    fn signed_record(&self, chain: &ChainId, digest: &Digest, trust: &Trust) -> Result<Result<Found, String>, StoreError> {
        let record = self.read_small(&Name::Record { chain: *chain, digest: *digest }.path(), MAX_JSON)?;
        Ok(match open_record(&record, trust) {
            Ok((payload, name)) if name == *digest && payload.chain == *chain => Ok(Found { payload, record }),
            Ok(_) => Err("it lies under another record's name".to_owned()),
            Err(fault) => Err(fault.to_string()),
        })
    }

    /// Why a chain cannot be used as this payload says, if so.
    fn why_not(&self, payload: &Payload) -> Result<Option<String>, StoreError> {
        if payload.fold_version != FOLD_VERSION {
            return Ok(Some(format!("its fold version {} is not known", payload.fold_version)));
        }
        for needed in payload.needs() {
            if self.file_len(&needed)?.is_none() {
                return Ok(Some(format!("{} is missing", needed.path().display())));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use proptest::prelude::*;

    use super::*;
    use crate::store::sample::{Sample, layers, payloads};

    #[test]
    fn a_payload_is_written_without_white_space_in_a_fixed_order() {
        let sample = Sample::new();
        let payload = payloads(&layers("a", 2), &sample.key).pop().unwrap();
        let Payload { chain, parent, diff_ids, trees, framings, metadata, key, packs, .. } = &payload;
        let size = payload.sizes.metadata;
        let expected = format!(
            "{{\"chain\":\"{chain}\",\"parent\":\"{}\",\"diff_ids\":[\"{}\",\"{}\"],\"trees\":[\"{}\",\"{}\"],\
             \"framings\":[\"{}\",\"{}\"],\"metadata\":\"{metadata}\",\
             \"fold_version\":{FOLD_VERSION},\"packs\":[{{\"digest\":\"{}\",\"blocks\":64,\"unit_bits\":18}}],\
             \"sizes\":{{\"metadata\":{size},\"content\":200000,\"inodes\":4,\"stored\":44}},\"top\":true,\"tool\":\"slipway 0.1.0\",\"key\":\"{key}\"}}",
            parent.unwrap(),
            diff_ids[0],
            diff_ids[1],
            trees[0],
            trees[1],
            framings[0],
            framings[1],
            packs[0].digest,
        );
        assert_eq!(String::from_utf8(payload.encode()).unwrap(), expected);
        assert_eq!(Payload::decode(&payload.encode()).unwrap(), payload);
    }

    /// What a converter would say of a compact image made of `of`'s.
    fn stand_in(of: &Payload) -> Payload {
        let diff_id = DiffId(crate::oci::Sha256::of(b"the layer of a compact image"));
        Payload {
            chain: ChainId(diff_id.0),
            parent: None,
            diff_ids: vec![diff_id],
            trees: Vec::new(),
            framings: Vec::new(),
            stands_for: Some(of.chain),
            ..of.clone()
        }
    }

    #[test]
    fn a_record_that_stands_for_another_chain_needs_the_image_and_no_trees() {
        let sample = Sample::new();
        let of = sample.publish(&layers("a", 2)).pop().unwrap();
        let payload = stand_in(&of);
        assert_eq!(sample.store.find(&payload.chain, &sample.trust()).unwrap(), None);
        sample.store.put_record(&payload, &sample.key).unwrap();
        let text = String::from_utf8(payload.encode()).unwrap();
        assert!(text.contains(&format!("\"trees\":[],\"framings\":[],\"metadata\":\"{}\"", of.metadata)), "{text}");
        assert!(text.contains(&format!("\"top\":true,\"stands_for\":\"{}\",\"tool\"", of.chain)), "{text}");
        for name in of.tree_names() {
            fs::remove_file(sample.store.dir().join(name.path())).unwrap();
        }
        assert_eq!(sample.store.find(&payload.chain, &sample.trust()).unwrap().as_ref(), Some(&payload));
        fs::remove_file(sample.store.dir().join(Name::Meta(of.metadata).path())).unwrap();
        assert_eq!(sample.store.find(&payload.chain, &sample.trust()).unwrap(), None);
    }

    #[test]
    fn a_payload_that_contradicts_itself_is_refused() {
        let sample = Sample::new();
        let good = payloads(&layers("a", 3), &sample.key).pop().unwrap();
        type Edit = fn(&mut Payload);
        let edits: [(Edit, &str); 14] = [
            (|p| p.chain = p.parent.unwrap(), "chain ID"),
            (|p| p.parent = None, "parent"),
            (|p| p.parent = Some(p.chain), "parent"),
            (|p| p.diff_ids.clear(), "chain ID"),
            (|p| p.trees.truncate(1), "one tree"),
            (|p| p.trees.clear(), "one tree"),
            (|p| p.framings.truncate(1), "one framing"),
            (|p| *p = Payload { framings: p.framings.clone(), ..stand_in(p) }, "one framing"),
            (|p| p.stands_for = Some(p.chain), "trees of its own"),
            (|p| *p = Payload { stands_for: p.parent, trees: Vec::new(), ..p.clone() }, "one layer"),
            (|p| *p = Payload { top: false, ..stand_in(p) }, "one layer"),
            (|p| *p = Payload { stands_for: Some(stand_in(p).chain), ..stand_in(p) }, "itself"),
            (|p| p.packs.push(p.packs[0]), "twice"),
            (|p| p.packs = vec![p.packs[0]; MAX_PACKS + 1], "too many"),
        ];
        for (edit, part) in edits {
            let mut payload = good.clone();
            edit(&mut payload);
            let fault = Payload::decode(&payload.encode()).unwrap_err();
            assert!(fault.to_string().contains(part), "{part}: {fault}");
        }
        let text = String::from_utf8(good.encode()).unwrap();
        for bad in [text.replace("\"top\"", "\"newer\":1,\"top\""), text.replace("\"unit_bits\":18", "\"unit_bits\":30"), text.replace(":true", ":1")]
        {
            assert!(matches!(Payload::decode(bad.as_bytes()), Err(RecordFault::Malformed(_))), "{bad}");
        }
    }

    #[test]
    fn only_what_a_trusted_key_signed_is_opened() {
        let (sample, other) = (Sample::new(), Sample::new());
        let payload = payloads(&layers("a", 1), &sample.key).remove(0);
        let raw = payload.encode();
        let record = Envelope::seal(&raw, &sample.key);
        assert_eq!(open_record(&record, &sample.trust()).unwrap(), (payload.clone(), Digest::of(&raw)));
        assert_eq!(open_record(&record, &Trust::default()), Err(RecordFault::Untrusted(sample.key.public().id())));
        assert_eq!(open_record(&record, &other.trust()), Err(RecordFault::Untrusted(sample.key.public().id())));
        // Another key's name over our signature, and another key's record of our payload.
        let text = String::from_utf8(record).unwrap();
        let forged = text.replace(&sample.key.public().id().to_string(), &other.key.public().id().to_string());
        assert_eq!(open_record(forged.as_bytes(), &other.trust()), Err(RecordFault::BadSignature));
        assert!(matches!(open_record(&Envelope::seal(&raw, &other.key), &other.trust()), Err(RecordFault::Malformed(_))));
        let changed = text.replace(&STANDARD.encode(&raw), &STANDARD.encode(raw.strip_suffix(b"}").unwrap()));
        assert_eq!(open_record(changed.as_bytes(), &sample.trust()), Err(RecordFault::BadSignature));
        assert!(matches!(open_record(text.replace("\"key\"", "\"more\":0,\"key\"").as_bytes(), &sample.trust()), Err(RecordFault::Malformed(_))));
    }

    #[test]
    fn a_chain_is_found_until_something_of_it_is_missing() {
        let remove = |sample: &Sample, name: Name| fs::remove_file(sample.store.dir().join(name.path())).unwrap();
        let record = |payload: &Payload| Name::Record { chain: payload.chain, digest: Digest::of(&payload.encode()) };
        let table: [(&str, bool, bool, &dyn Fn(&Sample, &Payload)); 10] = [
            ("nothing", true, true, &|_, _| {}),
            ("pack", false, false, &|sample, p| remove(sample, Name::Pack(p.packs[0].digest))),
            ("metadata", true, false, &|sample, p| {
                if p.top {
                    remove(sample, Name::Meta(p.metadata))
                }
            }),
            ("tree", false, true, &|sample, p| remove(sample, p.tree_names().next().unwrap())),
            ("framing", true, true, &|sample, p| remove(sample, Name::Framing { diff_id: p.diff_ids[0], digest: p.framings[0] })),
            ("record", false, false, &|sample, p| remove(sample, record(p))),
            ("record cut short", false, false, &|sample, p| fs::write(sample.store.dir().join(record(p).path()), b"{").unwrap()),
            ("tombstone", false, false, &|sample, p| fs::write(sample.store.dir().join(record(p).path()).with_extension("tomb"), b"").unwrap()),
            ("record linked elsewhere", false, false, &|sample, p| {
                let path = sample.store.dir().join(record(p).path());
                let away = sample.dir.path().join("away");
                fs::rename(&path, &away).unwrap();
                std::os::unix::fs::symlink(&away, &path).unwrap();
            }),
            ("record under another's name", false, false, &|sample, p| {
                let path = sample.store.dir().join(record(p).path());
                fs::rename(&path, path.with_file_name(format!("{}.json", Digest::of(b"x")))).unwrap();
            }),
        ];
        for (what, prefix, top, harm) in table {
            for (index, expected) in [(0, prefix), (1, top)] {
                let sample = Sample::new();
                let payload = sample.publish(&layers("a", 2)).swap_remove(index);
                harm(&sample, &payload);
                let found = sample.store.find(&payload.chain, &sample.trust()).unwrap();
                assert_eq!(found, expected.then_some(payload), "{what}, layer {index}");
            }
        }
    }

    #[test]
    fn a_record_from_before_there_were_framings_is_good_for_nodes_and_names_no_layers() {
        let sample = Sample::new();
        let old = sample.publish_without_framings(&layers("a", 2)).pop().unwrap();
        let found = sample.store.find(&old.chain, &sample.trust()).unwrap();
        assert_eq!(found.as_ref(), Some(&old));
        assert_eq!((old.trees.len(), old.framings.len(), old.layers().count()), (2, 0, 0));
    }

    #[test]
    fn the_first_usable_record_in_byte_order_wins() {
        let sample = Sample::new();
        let all = layers("a", 2);
        let mut records: Vec<Payload> = (0..4).map(|i| Payload { tool: format!("tool {i}"), ..sample.publish(&all).swap_remove(1) }).collect();
        for payload in &records {
            sample.store.put_record(payload, &sample.key).unwrap();
        }
        records.push(payloads(&all, &sample.key).swap_remove(1));
        records.sort_by_key(|payload| Digest::of(&payload.encode()).to_string());
        for payload in records {
            assert_eq!(sample.store.find(&payload.chain, &sample.trust()).unwrap().as_ref(), Some(&payload));
            let path = sample.store.dir().join(Name::Record { chain: payload.chain, digest: Digest::of(&payload.encode()) }.path());
            fs::write(path, b"damaged").unwrap();
        }
    }

    #[test]
    fn other_keys_and_fold_versions_are_passed_over() {
        let (sample, other) = (Sample::new(), Sample::new());
        let payload = sample.publish(&layers("a", 1)).remove(0);
        let theirs = Payload { key: other.key.public().id(), ..payload.clone() };
        sample.store.put_record(&theirs, &other.key).unwrap();
        assert_eq!(sample.store.find(&payload.chain, &other.trust()).unwrap(), Some(theirs));
        assert_eq!(sample.store.find(&payload.chain, &sample.trust()).unwrap(), Some(payload.clone()));
        assert_eq!(sample.store.find(&payload.chain, &Trust::default()).unwrap(), None);
        let newer = Sample::new();
        newer.publish(&layers("b", 1));
        let newest = Payload { fold_version: FOLD_VERSION + 1, key: newer.key.public().id(), ..payload.clone() };
        newer.store.put_record(&newest, &newer.key).unwrap();
        assert_eq!(newer.store.find(&payload.chain, &newer.trust()).unwrap(), None);
    }

    /// Or it would be a record that every reader passes over.
    #[test]
    fn a_record_longer_than_readers_take_is_not_written() {
        let sample = Sample::new();
        let payload = sample.publish(&layers("a", 1)).remove(0);
        let signed = |padding: usize| Payload { tool: "x".repeat(padding), ..payload.clone() };
        let shorter = signed(760_000);
        sample.store.put_record(&shorter, &sample.key).unwrap();
        assert!(sample.store.records(&payload.chain, &sample.trust()).unwrap().any(|found| found.unwrap().payload == shorter));
        let error = sample.store.put_record(&signed(800_000), &sample.key).unwrap_err();
        assert!(matches!(error, StoreError::TooLarge { .. }), "{error}");
        let record = Name::Record { chain: payload.chain, digest: Digest::of(&signed(800_000).encode()) };
        assert!(error.to_string().contains(record.path().to_str().unwrap()) && error.to_string().contains("1048576"), "{error}");
        assert_eq!(sample.store.file_len(&record).unwrap(), None);
    }

    #[test]
    fn publishing_a_record_again_removes_its_tombstone() {
        let sample = Sample::new();
        let payload = sample.publish(&layers("a", 1)).remove(0);
        let path = sample.store.dir().join(Name::Record { chain: payload.chain, digest: Digest::of(&payload.encode()) }.path());
        fs::write(path.with_extension("tomb"), b"").unwrap();
        assert_eq!(sample.store.find(&payload.chain, &sample.trust()).unwrap(), None);
        assert_eq!(sample.store.put_record(&payload, &sample.key).unwrap(), Published::Present);
        assert_eq!(sample.store.find(&payload.chain, &sample.trust()).unwrap(), Some(payload));
    }

    proptest! {
        #[test]
        fn hostile_records_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), payload in "\\PC{0,40}") {
            let sample_key = KeyId([0; 8]);
            let _ = open_record(&bytes, &Trust::default());
            let envelope = format!("{{\"payload\":\"{}\",\"key\":\"{sample_key}\",\"signature\":\"\"}}", STANDARD.encode(&payload));
            prop_assert_eq!(open_record(envelope.as_bytes(), &Trust::default()), Err(RecordFault::Untrusted(sample_key)));
            prop_assert!(Payload::decode(&bytes).is_err());
            prop_assert!(Payload::decode(payload.as_bytes()).is_err());
        }

        #[test]
        fn payloads_round_trip(seed: [[u8; 32]; 4], blocks: u32, bits in 16u8..=20, sizes: [u64; 4], top: bool, tool in "\\PC{0,20}") {
            let diff_ids: Vec<DiffId> = seed[..2].iter().map(|seed| DiffId(crate::oci::Sha256(*seed))).collect();
            let chains = chain_ids(&diff_ids);
            let payload = Payload {
                chain: chains[1],
                parent: Some(chains[0]),
                diff_ids,
                trees: vec![Digest(seed[2]), Digest(seed[3])],
                framings: vec![Digest(seed[0]), Digest(seed[2])],
                metadata: Digest(seed[0]),
                fold_version: blocks,
                packs: vec![PackRef { digest: Digest(seed[1]), blocks, unit_bits: UnitBits::new(bits).unwrap() }],
                sizes: Sizes { metadata: sizes[0], content: sizes[1], inodes: sizes[2], stored: sizes[3] },
                top,
                stands_for: None,
                tool,
                key: KeyId([7; 8]),
            };
            prop_assert_eq!(Payload::decode(&payload.encode()), Ok(payload));
        }
    }
}
