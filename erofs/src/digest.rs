//! BLAKE3 digests: the names of packs, trees and metadata images, and what units are verified against.

use std::fmt;
use std::str::FromStr;

/// A BLAKE3-256 digest. Written as 64 lowercase hex digits, without prefix.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

/// The text is not 64 lowercase hex digits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a digest: expected 64 lowercase hex digits")]
pub struct BadDigest(pub String);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(*blake3::hash(bytes).as_bytes())
    }

    /// The digest of `bytes` followed by zeros up to `padded_len` bytes in all (how chunks and units are named).
    pub fn of_padded(bytes: &[u8], padded_len: u64) -> Digest {
        const ZEROS: [u8; 4096] = [0; 4096];
        let mut hasher = blake3::Hasher::new();
        hasher.update(bytes);
        let mut missing = padded_len.saturating_sub(bytes.len() as u64);
        while missing > 0 {
            let step = missing.min(ZEROS.len() as u64);
            hasher.update(&ZEROS[..step as usize]);
            missing -= step;
        }
        Digest(*hasher.finalize().as_bytes())
    }
}

/// The digest of bytes that come piece by piece.
#[derive(Clone, Debug, Default)]
pub struct Hasher(blake3::Hasher);

impl Hasher {
    /// Nothing hashed yet.
    pub fn new() -> Hasher {
        Hasher::default()
    }

    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of everything added.
    pub fn finish(&self) -> Digest {
        Digest(*self.0.finalize().as_bytes())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = BadDigest;

    fn from_str(text: &str) -> Result<Self, BadDigest> {
        let bad = || BadDigest(text.to_owned());
        let hex = |c: u8| match c {
            b'0'..=b'9' => Ok(c - b'0'),
            b'a'..=b'f' => Ok(c - b'a' + 10),
            _ => Err(bad()),
        };
        let ascii: &[u8; 64] = text.as_bytes().try_into().map_err(|_| bad())?;
        let mut out = [0u8; 32];
        for (byte, pair) in out.iter_mut().zip(ascii.chunks_exact(2)) {
            *byte = hex(pair[0])? << 4 | hex(pair[1])?;
        }
        Ok(Digest(out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips_and_bad_text_is_refused() {
        let digest = Digest::of(b"slipway");
        assert_eq!(digest.to_string().parse(), Ok(digest));
        let upper = digest.to_string().to_uppercase();
        for bad in ["", "00", upper.as_str(), &"g".repeat(64), &"é".repeat(32)] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn padding_counts() {
        let mut padded = b"abc".to_vec();
        padded.resize(8192, 0);
        assert_eq!(Digest::of_padded(b"abc", 8192), Digest::of(&padded));
        assert_eq!(Digest::of_padded(b"abc", 3), Digest::of(b"abc"));
    }
}
