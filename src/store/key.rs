//! Ed25519 keys: the converter's signing key, made on first use, and the public keys others trust.

use std::path::Path;

/// First 16 hex digits of the SHA-256 of a public key's 32 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub [u8; 8]);

/// An Ed25519 public key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PublicKey(pub [u8; 32]);

/// A converter's signing key.
pub struct SigningKey {}

/// A key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {}

impl SigningKey {
    /// Reads the key from `path` (PKCS#8 PEM, as `openssl genpkey -algorithm ed25519` writes), or makes one there on first use: the
    /// file appears whole and with mode 0600, its directory is made with mode 0700. The public key lies beside it in `<path>.pub`.
    pub fn load_or_create(path: &Path) -> Result<SigningKey, KeyError> {
        let _ = path;
        todo!()
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        todo!()
    }
}

impl PublicKey {
    /// Reads a public key file (SubjectPublicKeyInfo PEM).
    pub fn load(path: &Path) -> Result<PublicKey, KeyError> {
        let _ = path;
        todo!()
    }

    /// The key's id.
    pub fn id(&self) -> KeyId {
        todo!()
    }
}
