//! Layers that need not be converted, nor even downloaded, because the store has them.
//!
//! A tree is believed for one of two reasons: a record signed by a trusted key names it, be it of this image's chain or of any other image
//! that has the layer, or this converter's own journal does. In both cases it is read and verified now, and its packs must be there. What records
//! name comes first, so that two converters of one store choose alike.

use std::collections::HashMap;

use erofs::digest::Digest;
use slipway::oci::{DiffId, SourceImage};
use slipway::store::{LayerFiles, Name, Reach, Store, StoreError, Trust};

use super::Finished;
use crate::failure::Failure;
use crate::journal::Journal;
use crate::pack_file::PackFile;

/// The layers of `image` that the store has, and, unless these are all, what trusted records of all the store's images name: to look through
/// them costs a few round trips for each image.
pub(super) fn find(store: &Store, journal: &Journal, trust: &Trust, image: &SourceImage) -> Result<(HashMap<DiffId, Finished>, Reach), Failure> {
    let mut finished = HashMap::new();
    // The highest chain with a record names the files of every layer below, unless the record is from before there were framings.
    for top in (0..image.layers.len()).rev() {
        let Some(found) = store.find(&image.layers[top].chain_id, trust)?.filter(|found| !found.framings.is_empty()) else { continue };
        for (diff_id, files) in found.layers() {
            add(store, &mut finished, diff_id, files)?;
        }
        break;
    }
    if image.layers.iter().all(|layer| finished.contains_key(&layer.diff_id)) {
        return Ok((finished, Reach::default()));
    }
    let reach = store.reach(trust, &image.layers.iter().map(|layer| layer.diff_id).collect())?;
    for layer in &image.layers {
        for files in reach.files(&layer.diff_id) {
            add(store, &mut finished, layer.diff_id, files)?;
        }
        if let Some(files) = journal.find(store.id(), layer.diff_id) {
            add(store, &mut finished, layer.diff_id, files)?;
        }
    }
    Ok((finished, reach))
}

fn add(store: &Store, finished: &mut HashMap<DiffId, Finished>, diff_id: DiffId, files: LayerFiles) -> Result<(), Failure> {
    if finished.contains_key(&diff_id) {
        return Ok(());
    }
    let read = || Ok((store.read_tree(&diff_id, &files.tree)?, store.read_framing(&diff_id, &files.framing)?.places));
    let (tree, places) = match read() {
        Ok(read) => read,
        // Gone or damaged: the layer is converted anew, which also repairs the store.
        Err(error) if StoreError::is_about_content(&error) => {
            tracing::warn!(%diff_id, %error, "a finished layer cannot be reused");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    // Those of the framing are all of the tree's, and packs that only files were in which the layer itself replaces.
    for pack in tree.packs.iter().chain(places.packs.iter().filter(|pack| !tree.packs.contains(pack))) {
        // Its tables, not its data: finding a flipped bit means reading everything, which is what check does.
        match PackFile::open(store, pack) {
            Ok(_) => {}
            Err(error) if error.is_about_content() => {
                tracing::warn!(%diff_id, pack = %pack.digest, %error, "a finished layer cannot be reused");
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        }
    }
    finished.insert(diff_id, Finished { files, tree: tree.into(), reused: true, new_packs: Vec::new() });
    Ok(())
}

/// The length of a pack's file.
pub(super) fn pack_len(store: &Store, digest: Digest) -> Result<u64, Failure> {
    let name = Name::Pack(digest);
    store.file_len(&name)?.ok_or_else(|| Failure::Store(StoreError::Missing { path: store.dir().join(name.path()) }))
}
