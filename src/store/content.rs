//! Layer trees and metadata images: zstd on the store, verified by the BLAKE3 of their uncompressed bytes.

use std::fs::File;
use std::io::{self, BufReader, Read as _, Write as _};
use std::path::Path;

use erofs::digest::Digest;
use erofs::layer::LayerTree;

use super::error::Doing;
use super::publish::Published;
use super::{Name, Store, StoreError, open};
use crate::oci::DiffId;

/// Uncompressed bytes a tree or metadata image may have: the metadata of some four million files. What is read is bounded by it, so a
/// bomb on the store costs this much memory and no more.
pub const MAX_UNCOMPRESSED: u64 = 1 << 30;

/// zstd window accepted, as log2: the largest a decoder allows by itself; no level we write with needs more.
pub(super) const MAX_WINDOW_LOG: u32 = 27;

/// Half of such a file is digests, which do not compress; the rest does so at the lowest levels already.
const LEVEL: i32 = 3;

impl Store {
    /// The layer tree of this name, its bytes verified against `digest`. Errors: [`StoreError::Missing`], [`StoreError::Damaged`], trouble reaching it.
    pub fn read_tree(&self, diff_id: &DiffId, digest: &Digest) -> Result<LayerTree, StoreError> {
        let bytes = self.read_tree_bytes(diff_id, digest)?;
        LayerTree::decode(&bytes).map_err(|error| StoreError::Damaged {
            path: self.shown(&Name::Tree { diff_id: *diff_id, digest: *digest }.path()),
            reason: format!("it verifies, but is no layer tree: {error}"),
        })
    }

    /// The same as [`Store::read_tree`], as the encoded bytes.
    pub fn read_tree_bytes(&self, diff_id: &DiffId, digest: &Digest) -> Result<Vec<u8>, StoreError> {
        self.read_compressed(&Name::Tree { diff_id: *diff_id, digest: *digest }, digest)
    }

    /// Publishes a layer tree; gives its digest.
    pub fn put_tree(&self, diff_id: &DiffId, tree: &LayerTree) -> Result<(Digest, Published), StoreError> {
        let bytes = tree.encode();
        let digest = Digest::of(&bytes);
        Ok((digest, self.put_compressed(&bytes, &Name::Tree { diff_id: *diff_id, digest })?))
    }

    /// The metadata image of this name: its uncompressed bytes, verified. Errors as for [`Store::read_tree`].
    pub fn read_metadata(&self, digest: &Digest) -> Result<Vec<u8>, StoreError> {
        self.read_compressed(&Name::Meta(*digest), digest)
    }

    /// Publishes a metadata image; gives its digest.
    pub fn put_metadata(&self, bytes: &[u8]) -> Result<(Digest, Published), StoreError> {
        let digest = Digest::of(bytes);
        Ok((digest, self.put_compressed(bytes, &Name::Meta(digest))?))
    }

    fn read_compressed(&self, name: &Name, digest: &Digest) -> Result<Vec<u8>, StoreError> {
        let path = name.path();
        let shown = self.shown(&path);
        decompress(open::regular(&self.root, &path, &shown)?, digest, &shown)
    }

    fn put_compressed(&self, bytes: &[u8], name: &Name) -> Result<Published, StoreError> {
        if bytes.len() as u64 > MAX_UNCOMPRESSED {
            let reason = format!("{} bytes are more than the {MAX_UNCOMPRESSED} a reader accepts", bytes.len());
            return Err(StoreError::TooLarge { path: self.shown(&name.path()), reason });
        }
        let mut temp = self.temp()?;
        let written = write_compressed(&mut temp, bytes);
        written.map_err(|error| StoreError::writing(temp.path(), error))?;
        self.publish(temp, name)
    }
}

fn write_compressed(out: impl io::Write, bytes: &[u8]) -> io::Result<()> {
    let mut encoder = zstd::Encoder::new(out, LEVEL)?;
    encoder.set_pledged_src_size(Some(bytes.len() as u64))?;
    encoder.write_all(bytes)?;
    encoder.finish()?.flush()
}

/// Decompresses `file` and verifies it. `shown` is its path, for messages.
pub(super) fn decompress(file: File, digest: &Digest, shown: &Path) -> Result<Vec<u8>, StoreError> {
    decompress_at_most(MAX_UNCOMPRESSED, file, digest, shown)
}

fn decompress_at_most(max: u64, file: impl io::Read, digest: &Digest, shown: &Path) -> Result<Vec<u8>, StoreError> {
    let damaged = |reason: String| StoreError::Damaged { path: shown.to_owned(), reason };
    let failed = |error: io::Error| match error.raw_os_error() {
        Some(_) => StoreError::from_io(Doing::Reading, shown, error),
        None => damaged(error.to_string()),
    };
    let mut decoder = zstd::Decoder::with_buffer(BufReader::with_capacity(1 << 20, file)).map_err(failed)?;
    decoder.window_log_max(MAX_WINDOW_LOG).map_err(failed)?;
    let mut bytes = Vec::new();
    decoder.take(max + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > max {
        return Err(damaged(format!("it decompresses to more than {max} bytes")));
    }
    let found = Digest::of(&bytes);
    if found != *digest {
        return Err(damaged(format!("its content has the digest {found}")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;
    use crate::store::sample::{Sample, layers};

    #[test]
    fn trees_and_images_come_back_as_they_were() {
        let Sample { dir: _dir, store, .. } = Sample::new();
        let (diff_id, tree) = layers("a", 1).remove(0);
        let (digest, published) = store.put_tree(&diff_id, &tree).unwrap();
        assert_eq!((digest, published), (Digest::of(&tree.encode()), Published::New));
        assert_eq!(store.read_tree(&diff_id, &digest).unwrap(), tree);
        let (digest, _) = store.put_metadata(b"").unwrap();
        assert_eq!(store.read_metadata(&digest).unwrap(), b"");
    }

    #[test]
    fn damage_is_named_with_the_file() {
        let Sample { dir: _dir, store, .. } = Sample::new();
        let (diff_id, tree) = layers("a", 1).remove(0);
        let (digest, _) = store.put_tree(&diff_id, &tree).unwrap();
        let path = store.dir().join(Name::Tree { diff_id, digest }.path());
        let good = fs::read(&path).unwrap();
        let check = |bytes: &[u8], part: &str| {
            fs::write(&path, bytes).unwrap();
            let error = store.read_tree(&diff_id, &digest).unwrap_err();
            assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains(path.to_str().unwrap()) && text.contains(part), "{text}");
        };
        check(b"", "incomplete frame");
        check(b"no zstd at all", "");
        check(&good[..good.len() - 1], "incomplete frame");
        check(&zstd::bulk::compress(b"other", 3).unwrap(), "its content has the digest");
        fs::remove_file(&path).unwrap();
        assert!(matches!(store.read_tree(&diff_id, &digest), Err(StoreError::Missing { .. })));
        // Bytes that verify and yet are no tree: a converter's fault, not the disk's.
        let mut temp = store.temp().unwrap();
        temp.write_all(&zstd::bulk::compress(b"no tree", 3).unwrap()).unwrap();
        let digest = Digest::of(b"no tree");
        store.publish(temp, &Name::Tree { diff_id, digest }).unwrap();
        assert!(store.read_tree(&diff_id, &digest).unwrap_err().to_string().contains("no layer tree"));
    }

    #[test]
    fn a_bomb_costs_no_more_than_the_limit() {
        let zeros = vec![0; 100_000];
        let bomb = zstd::bulk::compress(&zeros, 3).unwrap();
        let read = |max| decompress_at_most(max, &bomb[..], &Digest::of(&zeros), Path::new("bomb"));
        assert_eq!(read(100_000).unwrap(), zeros);
        assert!(read(99_999).unwrap_err().to_string().contains("more than 99999 bytes"));
        let mut wide = zstd::Encoder::new(Vec::new(), 3).unwrap();
        wide.window_log(MAX_WINDOW_LOG + 1).unwrap();
        wide.write_all(&zeros).unwrap();
        let wide = wide.finish().unwrap();
        assert!(matches!(decompress_at_most(100_000, &wide[..], &Digest::of(&zeros), Path::new("wide")), Err(StoreError::Damaged { .. })));
    }

    proptest! {
        #[test]
        fn flipped_bytes_never_pass(at: prop::sample::Index, bit in 0u8..8) {
            let bytes: Vec<u8> = (0..5000u32).flat_map(u32::to_le_bytes).collect();
            let mut stored = zstd::bulk::compress(&bytes, 3).unwrap();
            let at = at.index(stored.len());
            stored[at] ^= 1 << bit;
            match decompress_at_most(1 << 20, &stored[..], &Digest::of(&bytes), Path::new("f")) {
                Ok(read) => prop_assert_eq!(read, bytes),
                Err(error) => prop_assert!(error.is_about_content(), "{error}"),
            }
        }
    }
}
