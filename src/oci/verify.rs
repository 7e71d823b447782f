//! A reader that knows what its bytes must be.

use std::io::{self, Read};

use super::digest::{Hasher, Sha256};

/// Bytes that are not what was announced.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// Right length or unknown length, wrong bytes.
    #[error("{what}: expected sha256:{expected}, but the bytes have sha256:{found}")]
    Digest {
        /// What was read.
        what: String,
        /// The digest it is known by.
        expected: Sha256,
        /// The digest of what came.
        found: Sha256,
    },
    /// Fewer bytes than announced.
    #[error("{what}: sha256:{expected} should have {announced} bytes, but it ended after {found}")]
    Truncated {
        /// What was read.
        what: String,
        /// The digest it is known by.
        expected: Sha256,
        /// Announced length.
        announced: u64,
        /// Bytes that came.
        found: u64,
    },
    /// More bytes than announced.
    #[error("{what}: sha256:{expected} should have {announced} bytes, but there are more")]
    TooLong {
        /// What was read.
        what: String,
        /// The digest it is known by.
        expected: Sha256,
        /// Announced length.
        announced: u64,
    },
}

impl VerifyError {
    /// The digest that the bytes should have had: whose check it was.
    pub fn expected(&self) -> Sha256 {
        match self {
            VerifyError::Digest { expected, .. } | VerifyError::Truncated { expected, .. } | VerifyError::TooLong { expected, .. } => *expected,
        }
    }

    /// The verification error inside an I/O error that came through a [`VerifyReader`], if it is one.
    pub fn of(error: &io::Error) -> Option<&VerifyError> {
        error.get_ref()?.downcast_ref()
    }
}

impl From<VerifyError> for io::Error {
    fn from(error: VerifyError) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, error)
    }
}

/// Checks a whole byte string against digest and, where known, length.
pub fn verify_bytes(what: &str, expected: Sha256, announced: Option<u64>, bytes: &[u8]) -> Result<(), VerifyError> {
    let len = bytes.len() as u64;
    match announced {
        Some(announced) if len < announced => return Err(VerifyError::Truncated { what: what.to_owned(), expected, announced, found: len }),
        Some(announced) if len > announced => return Err(VerifyError::TooLong { what: what.to_owned(), expected, announced }),
        _ => {}
    }
    let found = Sha256::of(bytes);
    if found == expected { Ok(()) } else { Err(VerifyError::Digest { what: what.to_owned(), expected, found }) }
}

/// What was seen so far of bytes that must have a digest and, where known, a length.
pub(super) struct Check {
    what: String,
    expected: Sha256,
    announced: Option<u64>,
    seen: u64,
    /// `None` once the end was verified.
    hasher: Option<Hasher>,
}

impl Check {
    pub(super) fn new(what: impl Into<String>, expected: Sha256, announced: Option<u64>) -> Check {
        Check { what: what.into(), expected, announced, seen: 0, hasher: Some(Hasher::new()) }
    }

    /// The next bytes.
    pub(super) fn add(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.seen += bytes.len() as u64;
        if let Some(announced) = self.announced.filter(|&announced| self.seen > announced) {
            return Err(VerifyError::TooLong { what: self.what.clone(), expected: self.expected, announced }.into());
        }
        match &mut self.hasher {
            Some(hasher) => hasher.update(bytes),
            None => return Err(io::Error::other(format!("{}: more bytes after the end", self.what))),
        }
        Ok(())
    }

    /// There are no more bytes.
    pub(super) fn end(&mut self) -> Result<(), VerifyError> {
        let Some(hasher) = &self.hasher else { return Ok(()) };
        if let Some(announced) = self.announced.filter(|&announced| self.seen < announced) {
            return Err(VerifyError::Truncated { what: self.what.clone(), expected: self.expected, announced, found: self.seen });
        }
        let found = hasher.clone().finish();
        if found != self.expected {
            return Err(VerifyError::Digest { what: self.what.clone(), expected: self.expected, found });
        }
        self.hasher = None;
        Ok(())
    }
}

/// Passes bytes through and reports the end only if everything that came has the expected length and digest; otherwise the
/// read that meets the end fails with a [`VerifyError`]. Read it to its end (see [`VerifyReader::drain`]), or nothing is proven.
pub struct VerifyReader<R> {
    inner: R,
    check: Check,
}

impl<R: Read> VerifyReader<R> {
    /// `what` names the thing in errors; `announced` is its length if that is known.
    pub fn new(inner: R, what: impl Into<String>, expected: Sha256, announced: Option<u64>) -> Self {
        VerifyReader { inner, check: Check::new(what, expected, announced) }
    }

    /// Reads and drops what is left, so that the digest covers everything.
    pub fn drain(&mut self) -> io::Result<()> {
        io::copy(self, &mut io::sink()).map(drop)
    }

    /// The end was reached and everything is as announced.
    pub fn verified(&self) -> bool {
        self.check.hasher.is_none()
    }
}

impl<R: Read> Read for VerifyReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let len = self.inner.read(buf)?;
        if len == 0 {
            self.check.end()?;
            return Ok(0);
        }
        self.check.add(&buf[..len])?;
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8], expected: Sha256, announced: Option<u64>) -> Result<Vec<u8>, VerifyError> {
        let mut reader = VerifyReader::new(bytes, "layer 1", expected, announced);
        let mut out = Vec::new();
        match reader.read_to_end(&mut out) {
            Ok(_) => {
                assert!(reader.verified());
                Ok(out)
            }
            Err(e) => {
                assert!(!reader.verified());
                Err(VerifyError::of(&e).expect("only verification can fail here").clone())
            }
        }
    }

    #[test]
    fn the_end_is_reported_only_for_the_announced_bytes() {
        let what = || "layer 1".to_owned();
        let right = Sha256::of(b"hello");
        let found = Sha256::of(b"hellO");
        for (bytes, announced, expected) in [
            (&b"hello"[..], Some(5), Ok(b"hello".to_vec())),
            (b"hello", None, Ok(b"hello".to_vec())),
            (b"hellO", Some(5), Err(VerifyError::Digest { what: what(), expected: right, found })),
            (b"hellO", None, Err(VerifyError::Digest { what: what(), expected: right, found })),
            (b"hell", Some(5), Err(VerifyError::Truncated { what: what(), expected: right, announced: 5, found: 4 })),
            (b"hello!", Some(5), Err(VerifyError::TooLong { what: what(), expected: right, announced: 5 })),
        ] {
            assert_eq!(read(bytes, right, announced), expected, "{bytes:?}");
            let whole = verify_bytes("layer 1", right, announced, bytes).map(|()| bytes.to_vec());
            assert_eq!(whole, expected, "{bytes:?} at once");
        }
    }

    #[test]
    fn a_failed_end_stays_failed() {
        let mut reader = VerifyReader::new(&b"x"[..], "x", Sha256::of(b"y"), None);
        assert!(reader.drain().is_err());
        assert!(reader.drain().is_err());
    }

    #[test]
    fn errors_name_the_thing_and_both_digests() {
        let error = verify_bytes("layer 2", Sha256::of(b"a"), None, b"b").unwrap_err().to_string();
        for part in ["layer 2", &Sha256::of(b"a").oci(), &Sha256::of(b"b").oci()] {
            assert!(error.contains(part), "{error}");
        }
    }
}
