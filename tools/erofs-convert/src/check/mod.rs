//! Proof that a converted image is its source: the source's layers are read again, by code that the converter does not use, and
//! compared with the image as our reader and the packs give it back, or as the kernel shows it where it is mounted.

pub mod archive;
pub mod compare;
pub(crate) mod data;
pub mod model;
pub mod mounted;

use std::io;
use std::path::Path;
use std::thread::available_parallelism;

use erofs::digest::Digest;
use erofs::image::Image;
use erofs::meta::Content;
use erofs::tree::{Body, InodeIndex, Tree};
use serde_json::{Value, json};
use slipway::oci::{Platform, Source, SourceImage, SourceLayer, VerifyReader};
use slipway::store::{ImageRoot, Store};

pub use compare::Differences;
use compare::{FileToRead, compare};
use data::DataReader;
use model::Model;
use mounted::Mounted;

use crate::convert::{Context, compact, layer_failure};
use crate::failure::Failure;
use crate::layer::ConvertError;
use crate::pack_file::PackFile;
use crate::parallel::in_parallel;
use crate::pipe;
use crate::printable::printable;
use crate::stop::{self, StoppableReader};
use crate::unpack::Unpack;

/// Files whose data one thread reads before it takes the next: neighbours share units.
const FILES_AT_ONCE: usize = 500;

/// Compares the image of `root` with `source`: as the store has it, or as it is mounted at a directory.
pub fn check(
    context: &Context<'_>,
    store: &Store,
    root: &ImageRoot,
    source: &Source,
    platform: &Platform,
    mounted: Option<&Path>,
) -> Result<Differences, Failure> {
    let image = stop::wait(context.runtime, context.stop, source.resolve(platform))??;
    compact::refuse(&image)?;
    let mut differences = Differences::default();
    if image.manifest_digest != root.manifest {
        let what = format!("the source's manifest is {}, the image was made from {}", image.manifest_digest.oci(), root.manifest.oci());
        differences.add(b"", what);
    }
    let model = loop {
        let mut model = Model::default();
        let mut layers = image.layers.iter().enumerate();
        let failed = layers.find_map(|(i, layer)| Some((layer, apply(context, source, &image, i + 1, layer, &mut model).err()?)));
        match failed {
            None => break model,
            // A mirror's fault is no difference: from the start, without it.
            Some((layer, Failure::Damaged { source: wrong, .. })) if wrong.expected() == layer.digest && source.was_wrong(layer) => {}
            Some((_, failure)) => return Err(failure),
        }
    };
    context.progress.say("comparing");
    match mounted {
        None => compare_stored(context, store, root, &model, &mut differences)?,
        Some(dir) => compare_mounted(context, dir, &model, &mut differences)?,
    }
    Ok(differences)
}

/// Applies one layer of the source, all digests verified.
fn apply(context: &Context<'_>, source: &Source, image: &SourceImage, number: usize, layer: &SourceLayer, model: &mut Model) -> Result<(), Failure> {
    let progress = context.progress.layer(number, image.layers.len(), layer.digest, layer.size);
    let blob = stop::wait(context.runtime, context.stop, source.open_layer(layer))??;
    let advance = |more| progress.advance(more);
    let blob = StoppableReader::new(blob, context.runtime, context.stop, &advance);
    let blob = VerifyReader::new(blob, "the layer's blob", layer.digest, Some(layer.size));
    let failed = |source: io::Error| layer_failure(image, number, layer, ConvertError::Read { offset: 0, source });
    let unpack = Unpack::new(blob).map_err(failed)?;
    let (result, mut unpack) = pipe::run(unpack, |tar| {
        let mut tar = VerifyReader::new(tar, "the layer's tar", layer.diff_id.0, None);
        model.apply(&mut tar)?;
        tar.drain()
    });
    if let Err(failure) = result.map_err(failed) {
        // What looks like a malformed archive is more often a damaged blob: the digest decides.
        let blob = if matches!(failure, Failure::Layer { .. }) { unpack.drain_blob().map_err(failed) } else { Ok(()) };
        return Err(blob.err().filter(|blob| matches!(blob, Failure::Damaged { .. })).unwrap_or(failure));
    }
    progress.finish();
    Ok(())
}

fn read_image(store: &Store, root: &ImageRoot) -> Result<Tree, Failure> {
    let bytes = store.read_metadata(&root.metadata)?;
    let tree = Image::open(&bytes).and_then(|image| image.to_tree());
    tree.map_err(|source| Failure::Metadata { digest: root.metadata, source })
}

fn compare_stored(context: &Context<'_>, store: &Store, root: &ImageRoot, model: &Model, differences: &mut Differences) -> Result<(), Failure> {
    let tree = read_image(store, root)?;
    let files = compare(model, &tree, differences);
    let packs = tree.packs.iter().map(|pack| PackFile::open(store, pack)).collect::<Result<Vec<_>, _>>()?;
    compare_data(context, model, files, differences, || {
        let mut reader = DataReader::new(&packs);
        let tree = &tree;
        move |inode| match &tree.inode(inode).body {
            Body::Content(Content::File(data)) => {
                reader.digest(data).map_err(|what| format!("cannot be read from the store: {what}; remove that file, then convert the image again"))
            }
            _ => Err("is no file".to_owned()),
        }
    })
}

fn compare_mounted(context: &Context<'_>, dir: &Path, model: &Model, differences: &mut Differences) -> Result<(), Failure> {
    let mounted = Mounted::walk(dir, context.stop)?;
    let files = compare(model, &mounted.tree, differences);
    compare_data(context, model, files, differences, || {
        |inode| mounted.digest(inode).map_err(|error| format!("cannot be read below {}: {error}", dir.display()))
    })
}

/// Compares the bytes of `files`. Every thread has a reader of its own, made by `new_reader`, which gives an inode's digest or what is wrong.
fn compare_data<R: FnMut(InodeIndex) -> Result<Digest, String>>(
    context: &Context<'_>,
    model: &Model,
    mut files: Vec<FileToRead>,
    differences: &mut Differences,
    new_reader: impl Fn() -> R + Sync,
) -> Result<(), Failure> {
    let mut parts = Vec::new();
    while !files.is_empty() {
        let rest = files.split_off(files.len().min(FILES_AT_ONCE));
        parts.push(std::mem::replace(&mut files, rest));
    }
    let stop = context.stop.child_token();
    let jobs = available_parallelism().map_or(1, std::num::NonZero::get);
    let parts = in_parallel(jobs, parts, &stop, |part: Vec<FileToRead>| {
        let mut read = new_reader();
        let (mut found, mut bytes) = (Vec::new(), 0);
        for file in part {
            let model::Body::File(size, expected) = &model.nodes[file.node].body else { continue };
            bytes += size;
            match read(file.inode) {
                Ok(digest) if digest == *expected => {}
                Ok(digest) => found.push((file.path, format!("has content with BLAKE3 {expected} in the source, {digest} in the image"))),
                Err(what) => found.push((file.path, what)),
            }
        }
        Ok((found, bytes))
    })?;
    for (found, bytes) in parts {
        differences.bytes += bytes;
        found.into_iter().for_each(|(path, what)| differences.add(&path, what));
    }
    Ok(())
}

/// The result for people: one line per difference, then a summary.
pub fn text(differences: &Differences) -> String {
    let mut text: String = differences.shown.iter().map(|d| format!("{}: {}\n", printable(&d.path), printable(&d.what))).collect();
    if differences.count > differences.shown.len() {
        text.push_str(&format!("… and {} more\n", differences.count - differences.shown.len()));
    }
    let size = crate::progress::bytes(differences.bytes);
    text.push_str(&format!("{} names and {size} of file data compared, {} differences\n", differences.names, differences.count));
    text
}

/// The result for programs.
pub fn json(differences: &Differences) -> Value {
    let shown = differences.shown.iter().map(|d| json!({"path": d.path, "what": d.what}));
    json!({
        "names": differences.names,
        "bytes": differences.bytes,
        "differences": differences.count,
        "shown": shown.collect::<Vec<_>>(),
    })
}
