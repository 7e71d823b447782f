//! Contents for files, and a look at which files there are.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Numbers that look random and are the same for the same seed (splitmix64).
#[derive(Debug, Clone)]
pub struct Noise(pub u64);

impl Noise {
    /// The next number.
    #[allow(clippy::should_implement_trait, reason = "it never ends, so callers would only have an Option more")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Bytes that no compressor makes smaller, the same for the same seed and others for another.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut noise = Noise(seed);
    let mut bytes = Vec::with_capacity(len + size_of::<u64>());
    while bytes.len() < len {
        bytes.extend_from_slice(&noise.next().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// All files below a directory that are no directories themselves, relative to it; none when it does not exist.
pub fn files_below(dir: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(at) = pending.pop() {
        for entry in std::fs::read_dir(&at).into_iter().flatten() {
            let entry = entry.expect("a directory entry");
            if entry.file_type().expect("a type").is_dir() {
                pending.push(entry.path());
            } else {
                found.insert(entry.path().strip_prefix(dir).expect("it is below").to_owned());
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_depends_on_the_seed_alone_and_does_not_compress() {
        let one = noise(1, 100_000);
        assert_eq!(one.len(), 100_000);
        assert_eq!(noise(1, 1001), one[..1001]);
        assert!(!noise(2, 2000).windows(64).any(|window| window == &one[64..128]), "the sequences of two seeds do not overlap");
        assert!(zstd::encode_all(&one[..], 3).expect("compressed").len() >= one.len());
    }

    #[test]
    fn all_files_are_found_by_their_path_below() {
        let scratch = crate::Scratch::new("files").expect("a scratch directory");
        scratch.make_dir("a/empty").expect("a directory");
        std::fs::write(scratch.join("a/b"), b"").expect("a file");
        std::fs::write(scratch.join("c"), b"").expect("a file");
        assert_eq!(files_below(scratch.path()), BTreeSet::from(["a/b".into(), "c".into()]));
        assert_eq!(files_below(&scratch.join("absent")), BTreeSet::new());
    }
}
