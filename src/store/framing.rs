//! Framings of layers: zstd on the store, written and read as streams, verified by the BLAKE3 of their uncompressed bytes.
//!
//! What `erofs::framing` writes is as long as the headers of the layer's tar are, and longer where the tar has data that no file has; so it is
//! never in memory as a whole. Only a converter and `export` read it: no node does, and a record is usable without it.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek as _, Write};
use std::path::{Path, PathBuf};

use erofs::digest::{Digest, Hasher};
use erofs::framing::{FramingError, FramingReader, Places};

use super::content::MAX_WINDOW_LOG;
use super::error::Doing;
use super::publish::{Published, Temp};
use super::{Name, Store, StoreError, open};
use crate::oci::DiffId;

/// Uncompressed bytes that are read of a framing: it is not longer than its tar but for a few bytes per file, and the converter takes tars of at most
/// 288 GiB. A bomb on the store costs the time to unpack this much, and of memory what the places of the most chunks take.
const MAX_FRAMING: u64 = 320 << 30;

/// zstd level. A tar of Debian's /usr/share (528 MB, 54 644 entries) has 41 MB of framing; level 1 makes 1.72 MB of it at 950 MB/s, level 3
/// 1.60 MB at 800 MB/s, level 6 1.46 MB at 90 MB/s. The packs have 211 MB and the tree 0.72 MB, so level 3 adds 0.8 % to what is stored and,
/// with its BLAKE3, a tenth of a second of CPU to the several seconds that reading, hashing and packing the tar take. Of Go's sources (123 MB,
/// 13 024 entries): 10 MB, 0.36 MB, and 30 MB of packs.
const LEVEL: i32 = 3;

/// Bytes read or decompressed at a time.
const BUFFER: usize = 128 << 10;

/// A framing being written, temporary until [`Store::put_framing`]. Its errors carry a [`StoreError`]. In memory it is some 4 MiB, the compressor's,
/// as long as it lives.
pub struct FramingTemp {
    encoder: zstd::Encoder<'static, Temp>,
    hasher: Hasher,
}

impl FramingTemp {
    /// Where it lies, for messages and lists of temporary files.
    pub fn path(&self) -> &Path {
        self.encoder.get_ref().path()
    }
}

impl Write for FramingTemp {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.encoder.write(bytes).map_err(|error| io::Error::other(StoreError::writing(self.path(), error)))?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    /// Does nothing: what the compressor holds back would only make a worse file.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A framing of the store, verified.
#[derive(Debug)]
pub struct Framing {
    file: File,
    path: PathBuf,
    /// Where the layer's chunks are.
    pub places: Places,
}

impl Framing {
    /// Where it lies, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads it from the start, to give back the layer's tar.
    pub fn steps(&self) -> Result<FramingReader<impl BufRead + use<'_>>, StoreError> {
        let mut file = &self.file;
        file.rewind().map_err(|error| StoreError::from_io(Doing::Reading, &self.path, error))?;
        let decoder = decoder(file).map_err(|error| reading(&self.path, error))?;
        FramingReader::new(BufReader::with_capacity(BUFFER, decoder)).map_err(|error| self.failed(error))
    }

    /// What an error of [`Framing::steps`] means.
    pub fn failed(&self, error: FramingError) -> StoreError {
        failed(&self.path, error)
    }
}

impl Store {
    /// A framing to be written. Errors as for [`Store::temp`].
    pub fn framing_temp(&self) -> Result<FramingTemp, StoreError> {
        let temp = self.temp()?;
        let path = temp.path().to_owned();
        let encoder = zstd::Encoder::new(temp, LEVEL).map_err(|error| StoreError::writing(&path, error))?;
        Ok(FramingTemp { encoder, hasher: Hasher::new() })
    }

    /// Publishes a framing that was completely written; gives its digest.
    pub fn put_framing(&self, diff_id: &DiffId, framing: FramingTemp) -> Result<(Digest, Published), StoreError> {
        let (path, digest) = (framing.path().to_owned(), framing.hasher.finish());
        let temp = framing.encoder.finish().map_err(|error| StoreError::writing(&path, error))?;
        Ok((digest, self.publish(temp, &Name::Framing { diff_id: *diff_id, digest })?))
    }

    /// Opens a framing and verifies it from its first to its last byte. Errors as for [`Store::read_tree`].
    pub fn read_framing(&self, diff_id: &DiffId, digest: &Digest) -> Result<Framing, StoreError> {
        let path = Name::Framing { diff_id: *diff_id, digest: *digest }.path();
        let shown = self.shown(&path);
        let file = open::regular(&self.root, &path, &shown)?;
        let mut hashed = Hashed { inner: decoder(&file).map_err(|error| reading(&shown, error))?, hasher: Hasher::new() };
        let reader = FramingReader::new(BufReader::with_capacity(BUFFER, (&mut hashed).take(MAX_FRAMING)));
        let places = reader.and_then(FramingReader::places).map_err(|error| failed(&shown, error))?;
        let found = hashed.hasher.finish();
        if found != *digest {
            return Err(StoreError::Damaged { path: shown, reason: format!("its content has the digest {found}") });
        }
        Ok(Framing { file, path: shown, places })
    }
}

/// Whether `file` is a framing with this digest, or why not. `shown` is its path, for messages.
pub(super) fn verify(file: &File, digest: &Digest, shown: &Path) -> Result<(), StoreError> {
    let mut hashed = Hashed { inner: decoder(file).map_err(|error| reading(shown, error))?, hasher: Hasher::new() };
    io::copy(&mut (&mut hashed).take(MAX_FRAMING), &mut io::sink()).map_err(|error| reading(shown, error))?;
    let found = hashed.hasher.finish();
    if found == *digest { Ok(()) } else { Err(StoreError::Damaged { path: shown.to_owned(), reason: format!("its content has the digest {found}") }) }
}

fn decoder(file: &File) -> io::Result<zstd::Decoder<'static, BufReader<&File>>> {
    let mut decoder = zstd::Decoder::with_buffer(BufReader::with_capacity(BUFFER, file))?;
    decoder.window_log_max(MAX_WINDOW_LOG)?;
    Ok(decoder)
}

fn failed(shown: &Path, error: FramingError) -> StoreError {
    match error {
        FramingError::Read(error) => reading(shown, error),
        error => StoreError::Damaged { path: shown.to_owned(), reason: error.to_string() },
    }
}

/// The operating system's errors are trouble in reaching the store, those of the decompressor damage.
fn reading(shown: &Path, error: io::Error) -> StoreError {
    match error.raw_os_error() {
        Some(_) => StoreError::from_io(Doing::Reading, shown, error),
        None => StoreError::Damaged { path: shown.to_owned(), reason: error.to_string() },
    }
}

/// Hashes what is read through it.
struct Hashed<R> {
    inner: R,
    hasher: Hasher,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let len = self.inner.read(out)?;
        self.hasher.update(&out[..len]);
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use erofs::framing::Step;

    use super::*;
    use crate::oci::Sha256;
    use crate::store::sample::{Sample, framing_of};

    const DIFF_ID: DiffId = DiffId(Sha256([7; 32]));

    fn put(store: &Store, raw: &[u8]) -> Digest {
        let mut temp = store.framing_temp().unwrap();
        temp.write_all(&framing_of(raw)).unwrap();
        store.put_framing(&DIFF_ID, temp).unwrap().0
    }

    #[test]
    fn a_framing_comes_back_as_often_as_it_is_read() {
        let Sample { dir: _dir, store, .. } = Sample::new();
        let raw: Vec<u8> = (0..700_000u32).flat_map(|i| (i / 7).to_le_bytes()).collect();
        let digest = put(&store, &raw);
        assert_eq!(digest, Digest::of(&framing_of(&raw)));
        let framing = store.read_framing(&DIFF_ID, &digest).unwrap();
        assert_eq!(framing.places, Places::default());
        for _ in 0..2 {
            let (mut steps, mut back) = (framing.steps().unwrap(), Vec::new());
            while let Some(step) = steps.next().unwrap() {
                let Step::Raw(bytes) = step else { panic!("{step:?}") };
                back.extend_from_slice(bytes);
            }
            assert!(back == raw);
        }
        assert_eq!(fs::read_dir(store.dir().join("tmp")).unwrap().count(), 0);
    }

    #[test]
    fn damage_is_named_with_the_file() {
        let Sample { dir: _dir, store, .. } = Sample::new();
        let digest = put(&store, b"header");
        let path = store.dir().join(Name::Framing { diff_id: DIFF_ID, digest }.path());
        let good = fs::read(&path).unwrap();
        let check = |bytes: &[u8], part: &str| {
            fs::write(&path, bytes).unwrap();
            let error = store.read_framing(&DIFF_ID, &digest).unwrap_err();
            assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains(path.to_str().unwrap()) && text.contains(part), "{text}");
        };
        let zstd = |bytes: &[u8]| zstd::bulk::compress(bytes, 3).unwrap();
        check(b"", "not a framing");
        check(b"no zstd at all", "");
        check(&good[..good.len() - 1], "");
        check(&zstd(&framing_of(b"another")), "its content has the digest");
        check(&zstd(b"no framing"), "not a framing");
        check(&zstd(&[&framing_of(b"header")[..], b"more"].concat()), "something follows");
        fs::remove_file(&path).unwrap();
        assert!(matches!(store.read_framing(&DIFF_ID, &digest), Err(StoreError::Missing { .. })));
        fs::create_dir(&path).unwrap();
        assert!(matches!(store.read_framing(&DIFF_ID, &digest), Err(StoreError::Foreign { .. })));
    }

    #[test]
    fn a_taken_name_is_kept_when_whole_and_replaced_when_not() {
        for (there, expected) in [
            (zstd::bulk::compress(&framing_of(b"header"), 19).unwrap(), Published::Present),
            (zstd::bulk::compress(&framing_of(b"other"), 3).unwrap(), Published::Replaced),
            (b"damaged".to_vec(), Published::Replaced),
        ] {
            let Sample { dir: _dir, store, .. } = Sample::new();
            let path = store.dir().join(Name::Framing { diff_id: DIFF_ID, digest: Digest::of(&framing_of(b"header")) }.path());
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, &there).unwrap();
            let mut temp = store.framing_temp().unwrap();
            temp.write_all(&framing_of(b"header")).unwrap();
            let (digest, published) = store.put_framing(&DIFF_ID, temp).unwrap();
            assert_eq!(published, expected);
            assert_eq!(fs::read(&path).unwrap() == there, expected == Published::Present);
            store.read_framing(&DIFF_ID, &digest).unwrap();
        }
    }
}
