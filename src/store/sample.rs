//! A tiny converted image for tests: real layer trees, a real metadata image, records of every prefix.

use std::io::Write as _;

use erofs::block::UnitBits;
use erofs::digest::Digest;
use erofs::fold::{FOLD_VERSION, fold};
use erofs::framing::{FramingWriter, Places};
use erofs::image::{Built, Checked, write};
use erofs::layer::{Entry, EntryKind, LayerTree};
use erofs::meta::{Attr, Chunk, Content, Data, PackRef};
use tempfile::TempDir;

use super::record::tool;
use super::{Name, Payload, SigningKey, Sizes, Store, Trust, TrustFiles, key};
use crate::oci::{DiffId, Sha256, chain_ids};

/// A store in a directory of its own, and a key.
pub(crate) struct Sample {
    pub dir: TempDir,
    pub store: Store,
    pub key: SigningKey,
}

impl Sample {
    pub fn new() -> Sample {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("store")).unwrap();
        let store = Store::create(&dir.path().join("store")).unwrap();
        let key = SigningKey::load_or_create(&dir.path().join("key")).unwrap();
        Sample { dir, store, key }
    }

    pub fn trust(&self) -> Trust {
        Trust(vec![self.key.public()])
    }

    pub fn trust_files(&self) -> TrustFiles {
        TrustFiles(vec![key::public_path(&self.dir.path().join("key"))])
    }

    /// Publishes the image made of `layers`, its records bottom to top, and gives their payloads.
    pub fn publish(&self, layers: &[(DiffId, LayerTree)]) -> Vec<Payload> {
        let payloads = payloads(layers, &self.key);
        for (diff_id, tree) in layers {
            self.store.put_tree(diff_id, tree).unwrap();
            let mut framing = self.store.framing_temp().unwrap();
            framing.write_all(&framing_of(&diff_id.0.0)).unwrap();
            self.store.put_framing(diff_id, framing).unwrap();
            for pack in &tree.packs {
                let mut temp = self.store.temp().unwrap();
                temp.write_all(b"the units of a pack, which nobody here reads").unwrap();
                self.store.publish(temp, &Name::Pack(pack.digest)).unwrap();
            }
        }
        self.store.put_metadata(&metadata(layers).bytes).unwrap();
        for payload in &payloads {
            self.store.put_record(payload, &self.key).unwrap();
        }
        payloads
    }

    /// The same as a program wrote it that knew of no framings.
    pub fn publish_without_framings(&self, layers: &[(DiffId, LayerTree)]) -> Vec<Payload> {
        let mut payloads = self.publish(layers);
        for payload in &mut payloads {
            let dir = self.store.dir().join(super::layout::records_of(&payload.chain));
            std::fs::remove_dir_all(&dir).unwrap();
            std::fs::create_dir(&dir).unwrap();
            payload.framings.clear();
            let text = String::from_utf8(payload.encode()).unwrap();
            let old = text.replace("\"framings\":[],", "");
            assert_ne!(old, text);
            std::fs::write(dir.join(format!("{}.json", Digest::of(old.as_bytes()))), super::envelope::Envelope::seal(old.as_bytes(), &self.key))
                .unwrap();
        }
        payloads
    }
}

/// The framing of a tar that holds these bytes and no file.
pub(crate) fn framing_of(raw: &[u8]) -> Vec<u8> {
    let mut writer = FramingWriter::new(Vec::new(), UnitBits::DEFAULT).unwrap();
    writer.raw(raw).unwrap();
    writer.finish(&Places::default()).unwrap()
}

/// `count` layers. Number i has a small file `file<i>` and, to tell images apart, `name`; the lowest has a file in a pack as well.
pub(crate) fn layers(name: &str, count: usize) -> Vec<(DiffId, LayerTree)> {
    let attr = || Attr { mode: 0o644, ..Attr::default() };
    let file = |path: String, data| Entry { path: path.into_bytes(), kind: EntryKind::Node { attr: attr(), content: Content::File(data) } };
    (0..count)
        .map(|i| {
            let mut entries = vec![file(format!("file{i}"), Data::Inline(format!("{name} {i}").into_bytes()))];
            let mut packs = Vec::new();
            if i == 0 {
                packs.push(PackRef { digest: Digest::of(name.as_bytes()), blocks: 64, unit_bits: UnitBits::DEFAULT });
                let chunks = vec![Chunk::At { pack: 0, block: 0 }];
                entries.push(file("big".to_owned(), Data::Chunked { size: 200_000, unit_bits: UnitBits::DEFAULT, chunks }));
            }
            (DiffId(Sha256::of(format!("{name} {i}").as_bytes())), LayerTree::new(packs, entries).unwrap())
        })
        .collect()
}

pub(crate) fn metadata(layers: &[(DiffId, LayerTree)]) -> Built {
    let trees: Vec<LayerTree> = layers.iter().map(|(_, tree)| tree.clone()).collect();
    write(&Checked::new(fold(&trees).unwrap()).unwrap())
}

/// What a converter would say of every prefix of `layers`.
pub(crate) fn payloads(layers: &[(DiffId, LayerTree)], key: &SigningKey) -> Vec<Payload> {
    let diff_ids: Vec<DiffId> = layers.iter().map(|(diff_id, _)| *diff_id).collect();
    let chains = chain_ids(&diff_ids);
    (1..=layers.len())
        .map(|n| {
            let built = metadata(&layers[..n]);
            Payload {
                chain: chains[n - 1],
                parent: n.checked_sub(2).map(|below| chains[below]),
                diff_ids: diff_ids[..n].to_vec(),
                trees: layers[..n].iter().map(|(_, tree)| Digest::of(&tree.encode())).collect(),
                framings: layers[..n].iter().map(|(diff_id, _)| Digest::of(&framing_of(&diff_id.0.0))).collect(),
                metadata: built.digest,
                fold_version: FOLD_VERSION,
                packs: layers[0].1.packs.clone(),
                sizes: Sizes { metadata: built.bytes.len() as u64, content: 200_000, inodes: n as u64 + 2, stored: 44 },
                top: n == layers.len(),
                stands_for: None,
                tool: tool(),
                key: key.public().id(),
            }
        })
        .collect()
}
