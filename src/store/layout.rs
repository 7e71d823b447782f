//! Names of the store's files and where they lie; `slipway.json`.
//!
//! Digests in paths are lowercase hex without prefix. `<aa>` is the first two hex digits of the path part that follows it: it keeps
//! directories at a size every file system lists quickly.

use std::path::PathBuf;

use erofs::digest::Digest;
use serde::{Deserialize, Serialize};

use crate::oci::{ChainId, DiffId, Sha256};

/// A file of the store, by what it is. [`Name::path`] says where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Name {
    /// File data: `packs/<aa>/<digest>.pack`, the digest being the BLAKE3 of the pack's footer.
    Pack(Digest),
    /// A layer tree, zstd: `layers/<aa>/<diff id>.<digest>.tree.zst`, the digest being the BLAKE3 of the uncompressed bytes.
    Tree {
        /// Diff ID of the layer the tree was made from.
        diff_id: DiffId,
        /// BLAKE3 of the uncompressed tree.
        digest: Digest,
    },
    /// A layer's framing, zstd: `layers/<aa>/<diff id>.<digest>.framing.zst`, the digest being the BLAKE3 of the uncompressed bytes.
    Framing {
        /// Diff ID of the layer, which is the SHA-256 of what framing and packs give back.
        diff_id: DiffId,
        /// BLAKE3 of the uncompressed framing.
        digest: Digest,
    },
    /// A metadata image, zstd: `meta/<aa>/<digest>.erofs.zst`, the digest being the BLAKE3 of the uncompressed bytes.
    Meta(Digest),
    /// A signed record: `chains/<aa>/<chain id>/<digest>.json`, the digest being the BLAKE3 of the payload.
    Record {
        /// The chain the record is about.
        chain: ChainId,
        /// BLAKE3 of the payload.
        digest: Digest,
    },
    /// A signed image root: `images/<aa>/<sha256 of the source reference>/<manifest digest>.json`.
    Image {
        /// SHA-256 of the canonical source reference.
        source: Sha256,
        /// Digest of the platform manifest.
        manifest: Sha256,
    },
    /// A compact image that was made of an image: `images/<aa>/<sha256 of the source reference>/<manifest digest>.<chain id>.compact`.
    Compact {
        /// SHA-256 of the canonical source reference.
        source: Sha256,
        /// Digest of the platform manifest.
        manifest: Sha256,
        /// Chain of the compact image.
        chain: ChainId,
    },
    /// A name an image was pushed under: `images/<aa>/<sha256 of the source reference>/<manifest digest>.<sha256 of that name>.target`.
    Target {
        /// SHA-256 of the canonical source reference.
        source: Sha256,
        /// Digest of the platform manifest.
        manifest: Sha256,
        /// SHA-256 of the target's reference.
        reference: Sha256,
    },
}

impl Name {
    /// Path below the store's directory.
    pub fn path(&self) -> PathBuf {
        match self {
            Name::Pack(digest) => below("packs", &format!("{digest}.pack")),
            Name::Tree { diff_id, digest } => below("layers", &format!("{diff_id}.{digest}.tree.zst")),
            Name::Framing { diff_id, digest } => below("layers", &format!("{diff_id}.{digest}.framing.zst")),
            Name::Meta(digest) => below("meta", &format!("{digest}.erofs.zst")),
            Name::Record { chain, digest } => records_of(chain).join(format!("{digest}.json")),
            Name::Image { source, manifest } => below("images", &source.to_string()).join(format!("{manifest}.json")),
            Name::Compact { source, manifest, chain } => below("images", &source.to_string()).join(format!("{manifest}.{chain}.compact")),
            Name::Target { source, manifest, reference } => below("images", &source.to_string()).join(format!("{manifest}.{reference}.target")),
        }
    }

    /// The name whose [`Name::path`] this is, or `None` for any other text.
    pub fn parse(path: &str) -> Option<Name> {
        let parts: Vec<&str> = path.split('/').collect();
        let name = match *parts.as_slice() {
            ["packs", _, file] => Name::Pack(file.strip_suffix(".pack")?.parse().ok()?),
            ["layers", _, file] => {
                let (diff_id, rest) = file.split_once('.')?;
                let (diff_id, (digest, kind)) = (diff_id.parse().ok()?, rest.split_once('.')?);
                let digest = digest.parse().ok()?;
                match kind {
                    "tree.zst" => Name::Tree { diff_id, digest },
                    "framing.zst" => Name::Framing { diff_id, digest },
                    _ => return None,
                }
            }
            ["meta", _, file] => Name::Meta(file.strip_suffix(".erofs.zst")?.parse().ok()?),
            ["chains", _, chain, file] => Name::Record { chain: chain.parse().ok()?, digest: file.strip_suffix(".json")?.parse().ok()? },
            ["images", _, source, file] => {
                let (source, (manifest, rest)) = (source.parse().ok()?, file.split_once('.')?);
                let manifest = manifest.parse().ok()?;
                match rest.split_once('.') {
                    None if rest == "json" => Name::Image { source, manifest },
                    Some((chain, "compact")) => Name::Compact { source, manifest, chain: chain.parse().ok()? },
                    Some((reference, "target")) => Name::Target { source, manifest, reference: reference.parse().ok()? },
                    _ => return None,
                }
            }
            _ => return None,
        };
        // Settles `<aa>` and the forms of a digest that parse but are not how we write it.
        (name.path().to_str() == Some(path)).then_some(name)
    }
}

/// Directory that holds the records of `chain`: `chains/<aa>/<chain id>`.
pub(super) fn records_of(chain: &ChainId) -> PathBuf {
    below("chains", &chain.to_string())
}

/// Name, in the directory of a chain's records, of the mark that takes a record out of use.
pub(super) fn tombstone(record: &Digest) -> String {
    format!("{record}.tomb")
}

fn below(top: &str, part: &str) -> PathBuf {
    PathBuf::from(top).join(&part[..2]).join(part)
}

/// The directories every store has, made with it.
pub(super) const DIRECTORIES: [&str; 9] = ["packs", "layers", "meta", "chains", "images", "nodes", "converters", "tmp", "trash"];

/// File that makes a directory a store.
pub(super) const DESCRIPTOR: &str = "slipway.json";
/// Version of the store's format that this program reads and writes.
pub(super) const FORMAT: u64 = 1;

/// What `slipway.json` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Descriptor {
    /// Version of everything this module describes.
    pub format: u64,
    /// 32 random hex digits, made with the store.
    pub id: String,
    /// What digests, compression and signatures are.
    pub algorithms: Algorithms,
}

/// Ids of the algorithms a store uses. There is one choice of each in format 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Algorithms {
    /// Names of what Slipway makes, and digests of units.
    pub content: String,
    /// Names of what OCI makes: manifests, layers, diff IDs, chains.
    pub source: String,
    /// Trees, framings, metadata images, units.
    pub compression: String,
    /// Records and image roots.
    pub signature: String,
}

/// Why `slipway.json` cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum DescriptorFault {
    Newer(u64),
    Bad(String),
}

impl Descriptor {
    pub fn new(id: String) -> Descriptor {
        let algorithms = Algorithms { content: "blake3".into(), source: "sha256".into(), compression: "zstd".into(), signature: "ed25519".into() };
        Descriptor { format: FORMAT, id, algorithms }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("a struct of strings and numbers is JSON");
        bytes.push(b'\n');
        bytes
    }

    /// The version is looked at first: a newer store may have fields this program does not know.
    pub fn parse(bytes: &[u8]) -> Result<Descriptor, DescriptorFault> {
        #[derive(Deserialize)]
        struct Version {
            format: u64,
        }
        let bad = |error: serde_json::Error| DescriptorFault::Bad(format!("it is not what Slipway writes: {error}"));
        let Version { format } = serde_json::from_slice(bytes).map_err(bad)?;
        if format > FORMAT {
            return Err(DescriptorFault::Newer(format));
        }
        let found: Descriptor = serde_json::from_slice(bytes).map_err(bad)?;
        let known = Descriptor::new(found.id.clone());
        if found != known {
            return Err(DescriptorFault::Bad(format!("format {format} with algorithms {:?} does not exist", found.algorithms)));
        }
        if found.id.len() != 32 || !found.id.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(DescriptorFault::Bad(format!("the store id {:?} is not 32 hex digits", found.id)));
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: &str = "aa00000000000000000000000000000000000000000000000000000000000000";
    const B: &str = "bb11111111111111111111111111111111111111111111111111111111111111";

    #[test]
    fn every_kind_has_its_path_and_back() {
        let (a, b): (Digest, Digest) = (A.parse().unwrap(), B.parse().unwrap());
        let (sha_a, sha_b) = (Sha256(a.0), Sha256(b.0));
        for (name, expected) in [
            (Name::Pack(a), format!("packs/aa/{A}.pack")),
            (Name::Tree { diff_id: DiffId(sha_b), digest: a }, format!("layers/bb/{B}.{A}.tree.zst")),
            (Name::Framing { diff_id: DiffId(sha_b), digest: a }, format!("layers/bb/{B}.{A}.framing.zst")),
            (Name::Meta(b), format!("meta/bb/{B}.erofs.zst")),
            (Name::Record { chain: ChainId(sha_a), digest: b }, format!("chains/aa/{A}/{B}.json")),
            (Name::Image { source: sha_b, manifest: sha_a }, format!("images/bb/{B}/{A}.json")),
            (Name::Compact { source: sha_b, manifest: sha_a, chain: ChainId(sha_b) }, format!("images/bb/{B}/{A}.{B}.compact")),
            (Name::Target { source: sha_b, manifest: sha_a, reference: sha_b }, format!("images/bb/{B}/{A}.{B}.target")),
        ] {
            assert_eq!(name.path().to_str(), Some(expected.as_str()));
            assert_eq!(Name::parse(&expected), Some(name));
        }
    }

    #[test]
    fn other_paths_are_no_names() {
        for path in [
            "".to_owned(),
            "slipway.json".to_owned(),
            format!("packs/bb/{A}.pack"),
            format!("packs/aa/{A}"),
            format!("/packs/aa/{A}.pack"),
            format!("packs/aa/{A}.pack/"),
            format!("packs/aa/{}.pack", A.to_uppercase()),
            format!("chains/aa/{A}/{B}.tomb"),
            format!("chains/sh/sha256:{A}/{B}.json"),
            format!("layers/aa/{A}.tree.zst"),
            format!("layers/aa/{A}.{B}.zst"),
            format!("images/aa/{A}/{B}"),
            format!("images/aa/{A}/{B}.compact"),
            format!("images/aa/{A}/{B}.{A}.json"),
        ] {
            assert_eq!(Name::parse(&path), None, "{path}");
        }
    }

    #[test]
    fn a_descriptor_round_trips_and_others_are_told_apart() {
        let good = Descriptor::new("0123456789abcdef0123456789abcdef".into());
        let text = String::from_utf8(good.encode()).unwrap();
        assert_eq!(Descriptor::parse(text.as_bytes()), Ok(good));
        let newer = text.replace("\"format\": 1", "\"format\": 2, \"more\": true");
        assert_eq!(Descriptor::parse(newer.as_bytes()), Err(DescriptorFault::Newer(2)));
        for bad in [
            "",
            "[]",
            "{}",
            "{\"format\":1}",
            &text.replace("blake3", "md5"),
            &text.replace("0123", "xyz "),
            &text.replace("\"format\": 1", "\"format\": 0"),
        ] {
            assert!(matches!(Descriptor::parse(bad.as_bytes()), Err(DescriptorFault::Bad(_))), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn hostile_names_never_panic(
            top in "(packs|layers|meta|chains|images|\\PC{0,4})/\\PC{0,3}/(\\PC{0,70}/)?",
            file in "(\\PC{0,70}|[0-9a-f]{63,65}\\.[0-9a-f]{63,65}|[0-9a-f]{0,3}\\.\\PC{0,9})",
            end in "(\\.pack|\\.json|\\.tree\\.zst|\\.framing\\.zst|\\.erofs\\.zst|\\.compact|\\.target|\\.zst|)",
        ) {
            let path = format!("{top}{file}{end}");
            if let Some(name) = Name::parse(&path) {
                prop_assert_eq!(name.path(), PathBuf::from(path));
            }
        }

        #[test]
        fn names_round_trip(a: [u8; 32], b: [u8; 32], c: [u8; 32]) {
            let (source, manifest, chain) = (Sha256(a), Sha256(b), ChainId(Sha256(c)));
            for name in [
                Name::Pack(Digest(a)),
                Name::Tree { diff_id: DiffId(Sha256(a)), digest: Digest(b) },
                Name::Framing { diff_id: DiffId(Sha256(a)), digest: Digest(b) },
                Name::Meta(Digest(a)),
                Name::Record { chain, digest: Digest(b) },
                Name::Image { source, manifest },
                Name::Compact { source, manifest, chain },
                Name::Target { source, manifest, reference: Sha256(c) },
            ] {
                prop_assert_eq!(Name::parse(name.path().to_str().unwrap()), Some(name));
            }
        }

        #[test]
        fn hostile_descriptors_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), text in "\\{\"format\":[0-9]{1,20}(,\"id\":\"\\PC{0,9}\")?\\}") {
            let _ = Descriptor::parse(&bytes);
            let _ = Descriptor::parse(text.as_bytes());
        }
    }
}
