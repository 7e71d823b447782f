//! SHA-256 digests, the names OCI gives to everything, and chain IDs.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::digest;

/// A SHA-256 digest. Displayed as 64 lowercase hex digits; [`Sha256::oci`] adds the prefix.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sha256(pub [u8; 32]);

/// SHA-256 of a layer's uncompressed tar (image-spec `config.md`, "Layer DiffID").
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiffId(pub Sha256);

/// Name of a stack of layers (image-spec `config.md`, "Layer ChainID"); what containerd calls `containerd.io/snapshot.ref`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChainId(pub Sha256);

/// The text is no SHA-256 digest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a SHA-256 digest: expected 64 lowercase hex digits, with or without \"sha256:\" before them")]
pub struct BadSha256(pub String);

impl Sha256 {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Sha256 {
        let mut hasher = Hasher::new();
        hasher.update(bytes);
        hasher.finish()
    }

    /// With the algorithm before it, as OCI documents write it: `sha256:<hex>`.
    pub fn oci(&self) -> String {
        format!("sha256:{self}")
    }
}

/// SHA-256 of bytes that come piece by piece.
#[derive(Clone)]
pub struct Hasher(digest::Context);

impl Hasher {
    /// Nothing hashed yet.
    pub fn new() -> Hasher {
        Hasher(digest::Context::new(&digest::SHA256))
    }

    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of everything added.
    pub fn finish(self) -> Sha256 {
        let digest = self.0.finish();
        Sha256(digest.as_ref().try_into().expect("SHA-256 has 32 bytes"))
    }
}

impl Default for Hasher {
    fn default() -> Self {
        Hasher::new()
    }
}

impl fmt::Display for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // 64 hex digits, however many there are: OCI digests and ours look the same in paths.
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Sha256 {
    type Err = BadSha256;

    fn from_str(text: &str) -> Result<Self, BadSha256> {
        let hex = text.strip_prefix("sha256:").unwrap_or(text);
        // The rules for hex digits are those of our own digests.
        let same_form: erofs::digest::Digest = hex.parse().map_err(|_| BadSha256(text.to_owned()))?;
        Ok(Sha256(same_form.0))
    }
}

impl fmt::Debug for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for Sha256 {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Sha256 {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Gives a kind of digest the text forms of [`Sha256`].
macro_rules! like_sha256 {
    ($name:ident) => {
        impl $name {
            /// With the algorithm before it: `sha256:<hex>`.
            pub fn oci(&self) -> String {
                self.0.oci()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = BadSha256;

            fn from_str(text: &str) -> Result<Self, BadSha256> {
                text.parse().map($name)
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                self.0.serialize(serializer)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Sha256::deserialize(deserializer).map($name)
            }
        }
    };
}

like_sha256!(DiffId);
like_sha256!(ChainId);

/// The chain ID of every prefix of `diff_ids` (lowest layer first); the last is the image's.
///
/// `ChainID(L0) = DiffID(L0)`, `ChainID(L0|…|Ln) = SHA256(ChainID(L0|…|Ln-1) + " " + DiffID(Ln))`, both in `sha256:<hex>` form
/// (image-spec `config.md`).
pub fn chain_ids(diff_ids: &[DiffId]) -> Vec<ChainId> {
    let mut chain: Option<ChainId> = None;
    diff_ids
        .iter()
        .map(|diff_id| {
            let next = match chain {
                None => ChainId(diff_id.0),
                Some(below) => ChainId(Sha256::of(format!("{} {}", below.oci(), diff_id.oci()).as_bytes())),
            };
            chain = Some(next);
            next
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_of_known_bytes() {
        for (bytes, expected) in [
            (&b""[..], "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
            (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        ] {
            assert_eq!(Sha256::of(bytes).to_string(), expected);
            assert_eq!(Sha256::of(bytes).oci(), format!("sha256:{expected}"));
        }
    }

    #[test]
    fn both_text_forms_parse_and_others_are_refused() {
        let digest = Sha256::of(b"abc");
        assert_eq!(digest.to_string().parse(), Ok(digest));
        assert_eq!(digest.oci().parse(), Ok(digest));
        let upper = digest.to_string().to_uppercase();
        for bad in ["", "sha256:", "sha256:00", "sha512:00", &upper, &format!("sha256:sha256:{digest}"), &format!("{digest}0")] {
            assert_eq!(bad.parse::<Sha256>(), Err(BadSha256(bad.to_owned())));
        }
    }

    #[test]
    fn json_is_the_bare_form() {
        let id = DiffId(Sha256::of(b"abc"));
        let json = serde_json::to_string(&id).unwrap();
        assert_eq!(json, format!("\"{id}\""));
        assert_eq!(serde_json::from_str::<DiffId>(&json).unwrap(), id);
        assert_eq!(serde_json::from_str::<DiffId>(&format!("\"{}\"", id.oci())).unwrap(), id);
    }

    #[test]
    fn chain_ids_follow_the_image_spec() {
        let ids: Vec<DiffId> = [&b"a"[..], b"b", b"c"].iter().map(|b| DiffId(Sha256::of(b))).collect();
        let chains = chain_ids(&ids);
        assert_eq!(chains[0].0, ids[0].0);
        let second = Sha256::of(format!("sha256:{} sha256:{}", ids[0], ids[1]).as_bytes());
        assert_eq!(chains[1].0, second);
        assert_eq!(chains[2].0, Sha256::of(format!("sha256:{second} sha256:{}", ids[2]).as_bytes()));
        assert_eq!(chain_ids(&[]), []);
    }
}
