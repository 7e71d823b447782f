//! The envelope of signed files: `{"payload": …, "key": …, "signature": …}`.
//!
//! The payload's bytes in base64, the id of the signing key, and the Ed25519 signature of the payload's bytes in base64 (standard alphabet,
//! padded). Kinds of payload have different fields and unknown ones are refused, so that none is taken for another.

use serde::{Deserialize, Serialize};

use super::key::{KeyId, SigningKey};
use super::text;
use super::trust::Trust;

/// A signed file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Envelope {
    /// What was signed; not to be believed before [`Envelope::open`] gave it.
    #[serde(with = "text::base64")]
    pub payload: Vec<u8>,
    /// Key it is said to be signed with.
    #[serde(with = "text::one")]
    pub key: KeyId,
    #[serde(with = "text::base64")]
    signature: Vec<u8>,
}

/// Why nothing vouches for what is in an envelope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unproven {
    /// No trusted key has this id.
    Untrusted(KeyId),
    /// The signature is not the key's signature of this payload.
    BadSignature,
}

impl Envelope {
    /// The file of `payload`, signed.
    pub fn seal(payload: &[u8], key: &SigningKey) -> Vec<u8> {
        let envelope = Envelope { payload: payload.to_vec(), key: key.public().id(), signature: key.sign(payload).to_vec() };
        let mut bytes = serde_json::to_vec(&envelope).expect("a struct of strings is JSON");
        bytes.push(b'\n');
        bytes
    }

    /// Reads the form of a file only.
    pub fn parse(bytes: &[u8]) -> Result<Envelope, serde_json::Error> {
        serde_json::from_slice(bytes)
    }

    /// The payload, if a trusted key signed it.
    pub fn open(&self, trust: &Trust) -> Result<&[u8], Unproven> {
        let key = trust.key(self.key).ok_or(Unproven::Untrusted(self.key))?;
        if key.verifies(&self.payload, &self.signature) { Ok(&self.payload) } else { Err(Unproven::BadSignature) }
    }
}
