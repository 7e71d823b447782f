//! Ed25519 keys: the converter's signing key, made on first use, and the public keys others trust.
//!
//! Files are PEM as OpenSSL writes them: PKCS#8 for the signing key (`openssl genpkey -algorithm ed25519`, RFC 8410 section 7),
//! SubjectPublicKeyInfo for the public one (`openssl pkey -pubout`, RFC 8410 section 4).

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::oci::Sha256;

/// Bytes of an Ed25519 signature.
pub const SIGNATURE_LEN: usize = 64;

/// Everything of a SubjectPublicKeyInfo before the 32 bytes of an Ed25519 key (RFC 8410 section 4).
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

const PRIVATE: &str = "PRIVATE KEY";
const PUBLIC: &str = "PUBLIC KEY";

/// A key file is under 200 bytes; anything longer is another file.
const MAX_FILE: u64 = 16 * 1024;

/// First 8 bytes of the SHA-256 of a public key's 32 bytes, written as 16 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub [u8; 8]);

/// The text is not 16 lowercase hex digits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a key id: expected 16 lowercase hex digits")]
pub struct BadKeyId(pub String);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for KeyId {
    type Err = BadKeyId;

    fn from_str(text: &str) -> Result<Self, BadKeyId> {
        if text.len() != 16 || !text.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(BadKeyId(text.to_owned()));
        }
        let number = u64::from_str_radix(text, 16).map_err(|_| BadKeyId(text.to_owned()))?;
        Ok(KeyId(number.to_be_bytes()))
    }
}

/// An Ed25519 public key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PublicKey(pub [u8; 32]);

/// A converter's signing key.
pub struct SigningKey {
    pair: Ed25519KeyPair,
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({})", self.public().id())
    }
}

/// A key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// It cannot be read.
    #[error("cannot read the key file {}: give the path of a readable key", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A new key cannot be kept.
    #[error("cannot write the key file {}: choose a writable place for the key", path.display())]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It holds something else.
    #[error("{} holds no {wanted} ({reason}): make one with `openssl genpkey -algorithm ed25519`, or give another file", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        wanted: &'static str,
        /// What does not fit.
        reason: String,
    },
}

impl SigningKey {
    /// Reads the key from `path`, or makes one there on first use: the file appears whole and with mode 0600, missing directories are
    /// made with mode 0700. The public key lies beside it in `<path>.pub` and is written when it is not there.
    pub fn load_or_create(path: &Path) -> Result<SigningKey, KeyError> {
        let text = match read(path) {
            Ok(text) => text,
            Err(KeyError::Unreadable { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                make(path).map_err(|source| KeyError::Unwritable { path: path.to_owned(), source })?;
                // Read back what is there: of two converters that start at once, one makes the key both use.
                read(path)?
            }
            Err(error) => return Err(error),
        };
        let malformed = |reason: String| KeyError::Malformed { path: path.to_owned(), wanted: "Ed25519 signing key", reason };
        let der = pem_decode(PRIVATE, &text).map_err(malformed)?;
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(&der).map_err(|error| malformed(error.to_string()))?;
        let key = SigningKey { pair };
        let public = public_path(path);
        if !public.exists() {
            let text = key.public().to_pem();
            put(&public, 0o644, text.as_bytes()).map_err(|source| KeyError::Unwritable { path: public, source })?;
        }
        Ok(key)
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.pair.public_key().as_ref().try_into().expect("an Ed25519 public key has 32 bytes"))
    }

    /// The signature of `message`. The same message gives the same signature (RFC 8032 section 5.1.6).
    pub fn sign(&self, message: &[u8]) -> [u8; SIGNATURE_LEN] {
        self.pair.sign(message).as_ref().try_into().expect("an Ed25519 signature has 64 bytes")
    }
}

impl PublicKey {
    /// Reads a public key file.
    pub fn load(path: &Path) -> Result<PublicKey, KeyError> {
        let text = read(path)?;
        PublicKey::from_pem(&text).map_err(|reason| KeyError::Malformed { path: path.to_owned(), wanted: "Ed25519 public key", reason })
    }

    /// The key's id.
    pub fn id(&self) -> KeyId {
        let digest = Sha256::of(&self.0);
        KeyId(digest.0[..8].try_into().expect("8 of 32 bytes"))
    }

    /// Whether `signature` is this key's signature of `message`.
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, self.0).verify(message, signature).is_ok()
    }

    fn from_pem(text: &str) -> Result<PublicKey, String> {
        let der = pem_decode(PUBLIC, text)?;
        let key = der.strip_prefix(&SPKI_PREFIX).and_then(|key| key.try_into().ok()).ok_or("it is a key of another kind")?;
        Ok(PublicKey(key))
    }

    fn to_pem(self) -> String {
        pem_encode(PUBLIC, &[&SPKI_PREFIX[..], &self.0].concat())
    }
}

/// Where the public half of the signing key in `path` lies.
pub fn public_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".pub");
    name.into()
}

fn read(path: &Path) -> Result<String, KeyError> {
    let unreadable = |source| KeyError::Unreadable { path: path.to_owned(), source };
    let meta = fs::metadata(path).map_err(unreadable)?;
    if !meta.is_file() || meta.len() > MAX_FILE {
        return Err(unreadable(io::Error::new(io::ErrorKind::InvalidInput, "not a key file: too long, or no regular file")));
    }
    fs::read_to_string(path).map_err(unreadable)
}

fn make(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
    }
    let pair = Ed25519KeyPair::generate().map_err(|_| io::Error::other("the random number generator failed"))?;
    let der = pair.to_pkcs8v1().map_err(|_| io::Error::other("the new key cannot be encoded"))?;
    put(path, 0o600, pem_encode(PRIVATE, der.as_ref()).as_bytes())
}

/// Makes `path` appear with these bytes and mode, durably, unless it is there already.
fn put(path: &Path, mode: u32, bytes: &[u8]) -> io::Result<()> {
    let mut temp = path.as_os_str().to_owned();
    temp.push(format!(".{}", super::random_hex()));
    let temp = PathBuf::from(temp);
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temp)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        match fs::hard_link(&temp, path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        }
    })();
    let _ = fs::remove_file(&temp);
    written?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

fn pem_encode(label: &str, der: &[u8]) -> String {
    let body = STANDARD.encode(der);
    let lines: Vec<&str> = body.as_bytes().chunks(64).map(|line| str::from_utf8(line).expect("base64 is ASCII")).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// The bytes of the first block with this label. Text before and after it is allowed (RFC 7468 section 2).
fn pem_decode(label: &str, text: &str) -> Result<Vec<u8>, String> {
    let (begin, end) = (format!("-----BEGIN {label}-----"), format!("-----END {label}-----"));
    let (_, rest) = text.split_once(&begin).ok_or_else(|| format!("it has no line \"{begin}\""))?;
    let (body, _) = rest.split_once(&end).ok_or_else(|| format!("it has no line \"{end}\""))?;
    let body: String = body.split_whitespace().collect();
    STANDARD.decode(body).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use proptest::prelude::*;

    use super::*;

    // Key pair of RFC 8410 section 10.
    const RFC_PRIVATE: &str =
        "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n-----END PRIVATE KEY-----\n";
    const RFC_PUBLIC: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n-----END PUBLIC KEY-----\n";

    #[test]
    fn the_first_use_makes_a_private_file_and_later_uses_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er/signing.key");
        let made = SigningKey::load_or_create(&path).unwrap().public();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        assert_eq!(SigningKey::load_or_create(&path).unwrap().public(), made);
        assert_eq!(PublicKey::load(&public_path(&path)).unwrap(), made);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 2, "no temporary file stays");
        fs::remove_file(public_path(&path)).unwrap();
        SigningKey::load_or_create(&path).unwrap();
        assert_eq!(PublicKey::load(&public_path(&path)).unwrap(), made);
    }

    #[test]
    fn converters_that_start_at_once_share_one_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = &dir.path().join("key");
        let keys: Vec<PublicKey> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(move || SigningKey::load_or_create(path).unwrap().public())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(keys.iter().all(|key| *key == keys[0]));
    }

    #[test]
    fn keys_made_by_openssl_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(&path, RFC_PRIVATE).unwrap();
        let key = SigningKey::load_or_create(&path).unwrap();
        assert_eq!(fs::read_to_string(public_path(&path)).unwrap(), RFC_PUBLIC);
        let signature = key.sign(b"message");
        assert!(key.public().verifies(b"message", &signature));
        assert!(!key.public().verifies(b"massage", &signature));
        assert!(!key.public().verifies(b"message", &signature[1..]));
    }

    #[test]
    fn other_files_are_refused_with_their_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        for (text, reason) in [("", "no line"), (RFC_PUBLIC, "no line"), (&RFC_PRIVATE.replace("MC4", "MC5"), "("), (&"x".repeat(20_000), "too long")]
        {
            fs::write(&path, text).unwrap();
            let error = SigningKey::load_or_create(&path).unwrap_err();
            let text = format!("{error} {}", std::error::Error::source(&error).map_or_else(String::new, ToString::to_string));
            assert!(text.contains(reason) && text.contains(path.to_str().unwrap()), "{text}");
        }
        assert!(matches!(PublicKey::load(&dir.path().join("none")), Err(KeyError::Unreadable { .. })));
        fs::write(&path, RFC_PRIVATE).unwrap();
        assert!(matches!(PublicKey::load(&path), Err(KeyError::Malformed { .. })));
    }

    #[test]
    fn a_key_id_is_the_start_of_the_keys_sha256() {
        let key = PublicKey::from_pem(RFC_PUBLIC).unwrap();
        assert!(Sha256::of(&key.0).to_string().starts_with(&key.id().to_string()));
        assert_eq!(key.id().to_string().parse(), Ok(key.id()));
        for bad in ["", "0123456789abcde", "0123456789ABCDEF", "+123456789abcdef", "é123456789abcde"] {
            assert!(bad.parse::<KeyId>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn hostile_key_files_never_panic(text in "(-----BEGIN PUBLIC KEY-----)?[A-Za-z0-9+/=\n\\PC]{0,80}(-----END PUBLIC KEY-----)?") {
            let _ = PublicKey::from_pem(&text);
        }
    }
}
