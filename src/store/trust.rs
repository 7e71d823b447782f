//! Which keys a node or converter believes. Trusted keys come from its own configuration, never from the store.

use std::path::PathBuf;

use super::key::{KeyError, KeyId, PublicKey};

/// The public keys whose records are believed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trust(pub Vec<PublicKey>);

impl Trust {
    /// The trusted key with this id.
    pub fn key(&self, id: KeyId) -> Option<&PublicKey> {
        self.0.iter().find(|key| key.id() == id)
    }
}

/// The files trusted keys are read from. Kept as files so that a key made after the node started (the local converter's, on first use)
/// is found without a restart, and one that is taken away stops being trusted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustFiles(pub Vec<PathBuf>);

impl TrustFiles {
    /// Reads every file. An error names the file that cannot be used.
    pub fn load(&self) -> Result<Trust, KeyError> {
        self.0.iter().map(|path| PublicKey::load(path)).collect::<Result<_, _>>().map(Trust)
    }

    /// The keys that can be read now, and what is wrong with the others: one bad file must not take the other keys along.
    pub fn load_readable(&self) -> (Trust, Vec<KeyError>) {
        let mut keys = Vec::new();
        let mut errors = Vec::new();
        for path in &self.0 {
            match PublicKey::load(path) {
                Ok(key) => keys.push(key),
                Err(error) => errors.push(error),
            }
        }
        (Trust(keys), errors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::key::{SigningKey, public_path};

    #[test]
    fn keys_are_found_by_id_and_one_bad_file_spoils_only_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let files = TrustFiles(vec![dir.path().join("none"), public_path(&path)]);
        assert!(files.load_readable().0.0.is_empty());
        let key = SigningKey::load_or_create(&path).unwrap().public();
        let (trust, errors) = files.load_readable();
        assert_eq!(trust.key(key.id()), Some(&key));
        assert_eq!(trust.key(KeyId([0; 8])), None);
        assert_eq!(errors.len(), 1);
        assert!(files.load().unwrap_err().to_string().contains("none"));
    }
}
