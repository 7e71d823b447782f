//! One layer's way from the source into the store.
//!
//! blob bytes → blob digest → unpacking │ → diff ID → tar → units → packs, framing (temporary) → both digests right → settled beside the layers
//! below → packs, framing, tree, journal. The bar is where one thread hands over to another.

use std::io::{self, Write};
use std::thread::available_parallelism;

use erofs::digest::Digest;
use erofs::meta::PackRef;
use slipway::oci::{Source, SourceImage, SourceLayer, VerifyReader};
use slipway::store::{FramingTemp, LayerFiles, Name, Published, Store, StoreError, Temp};
use tokio_util::sync::CancellationToken;

use super::{Context, Finished, reuse, state_failure};
use crate::failure::{Failure, Thrown};
use crate::journal::{Entry, Journal};
use crate::layer::settle::Before;
use crate::layer::{ConvertError, Converted, Elsewhere, LayerOptions, PackSink, Stage, Stages, convert_layer_beside};
use crate::leftovers::Leftovers;
use crate::pack_file::{BlockReader, PackFile};
use crate::pipe;
use crate::progress::{LayerProgress, bytes, layer_title};
use crate::stop::{self, StoppableReader, Stopped};
use crate::unpack::Unpack;

/// Compression threads per layer. Inflating and hashing feed one layer with a few hundred MB/s at most, and one thread of zstd level 1
/// takes about 300: more would only wait.
const MAX_THREADS: usize = 4;

/// What converting any layer of an image needs.
#[derive(Clone, Copy)]
pub(super) struct LayerJob<'a> {
    pub context: &'a Context<'a>,
    pub source: &'a Source,
    pub image: &'a SourceImage,
    pub store: &'a Store,
    pub journal: &'a Journal,
    pub leftovers: &'a Leftovers,
    /// What the store has of the layers' data.
    pub elsewhere: Elsewhere<'a>,
    pub stop: &'a CancellationToken,
    pub stages: &'a Stages,
}

/// A converted layer that is not in the store yet.
pub(super) struct Waiting<'a> {
    number: usize,
    layer: &'a SourceLayer,
    converted: Converted<FramingTemp>,
    packs: Vec<(SinkFile, Digest)>,
    progress: LayerProgress<'a>,
}

impl<'a> LayerJob<'a> {
    /// Converts layer `number`; both its digests are right then.
    pub(super) fn convert(&self, number: usize, layer: &'a SourceLayer) -> Result<Waiting<'a>, Failure> {
        let count = self.image.layers.len();
        loop {
            let progress = self.context.progress.layer(number, count, layer.digest, layer.size);
            let blob = stop::wait(self.context.runtime, self.stop, self.source.open_layer(layer))??;
            let advance = |more| progress.advance(more);
            let blob = self.stages.reader(Stage::Fetch, StoppableReader::new(blob, self.context.runtime, self.stop, &advance));
            let mut sink = self.sink();
            match self.read(number, layer, blob, &mut sink) {
                Ok(converted) => {
                    for (temp, _) in &sink.finished {
                        // While other layers are at work, and not when it is this one's turn to be published.
                        temp.0.file().sync_data().map_err(|error| StoreError::writing(temp.0.path(), error))?;
                    }
                    return Ok(Waiting { number, layer, converted, packs: sink.finished, progress });
                }
                // A wrong diff ID is the image's fault, and every host's blob will have it.
                Err(Failure::Damaged { source, .. }) if source.expected() == layer.digest && self.source.was_wrong(layer) => {
                    let title = layer_title(number, count, layer.digest);
                    self.context.progress.say(&format!("{title}: wrong bytes, asking another host"));
                }
                Err(failure) => return Err(failure),
            }
        }
    }

    /// Takes out of a layer's packs what the layers `below` have, if that is worth it.
    pub(super) fn settle(&self, waiting: &mut Waiting<'_>, below: Elsewhere<'_>) -> Result<(), Failure> {
        let Waiting { number, layer, converted, packs, .. } = waiting;
        let failed = |error| layer_failure(self.image, *number, layer, error);
        let before = Before { chunks: &converted.chunks, places: &converted.places, own: &converted.own };
        let shared = self.stages.time(Stage::Cut, || before.shared(below));
        let Some(shared) = shared.map_err(|source| failed(ConvertError::Store { source }))? else { return Ok(()) };
        let title = layer_title(*number, self.image.layers.len(), layer.digest);
        self.context.progress.say(&format!("{title}: packing again without {} that layers below it have", bytes(shared.bytes())));
        let mut sink = self.sink();
        let mut reader = BlockReader::new(|pack: &PackRef| {
            let temp = packs.iter().find(|(_, name)| *name == pack.digest).map(|(temp, _)| &temp.0).expect("it was made just now");
            let file = temp.file().try_clone().map_err(|error| StoreError::reading(temp.path(), error))?;
            PackFile::of(file, temp.path().to_owned(), pack)
        });
        let read = |pack: &PackRef, block, blocks| {
            if self.stop.is_cancelled() { Err(io::Error::other(Stopped)) } else { reader.read(pack, block, blocks) }
        };
        let moves = self.stages.time(Stage::Cut, || before.without(&shared, &mut sink, &self.options(), read)).map_err(failed)?;
        drop(reader);
        converted.tree = moves.tree(std::mem::take(&mut converted.tree)).map_err(failed)?;
        moves.places(&mut converted.places);
        converted.own.clone_from(&moves.own);
        *packs = sink.finished;
        Ok(())
    }

    /// Puts a layer into the store.
    pub(super) fn publish(&self, waiting: Waiting<'_>) -> Result<Finished, Failure> {
        let Waiting { number, layer, converted, packs, progress } = waiting;
        let mut new_packs = Vec::new();
        for (temp, name) in packs {
            if self.stop.is_cancelled() {
                return Err(Failure::Stopped);
            }
            if self.store.publish(temp.0, &Name::Pack(name))? != Published::Present {
                new_packs.push((name, reuse::pack_len(self.store, name)?));
            }
        }
        let Converted { tree, framing, places, .. } = converted;
        let written = framing.finish(&places).map_err(|source| layer_failure(self.image, number, layer, ConvertError::Store { source }))?;
        let (framing, _) = self.store.put_framing(&layer.diff_id, written)?;
        let (digest, _) = self.store.put_tree(&layer.diff_id, &tree)?;
        let files = LayerFiles { tree: digest, framing };
        let entry = Entry { store: self.store.id().to_owned(), diff_id: layer.diff_id, files };
        self.journal.add(&entry).map_err(state_failure)?;
        progress.finish();
        Ok(Finished { files, tree: tree.into(), reused: false, new_packs })
    }

    fn options(&self) -> LayerOptions {
        let threads = available_parallelism().map_or(1, |n| n.get().min(MAX_THREADS));
        LayerOptions { threads, stages: self.stages.clone(), ..LayerOptions::default() }
    }

    fn sink(&self) -> StoreSink<'a> {
        StoreSink { store: self.store, leftovers: self.leftovers, finished: Vec::new() }
    }

    /// The layer, with its packs complete in `sink`, if blob digest and diff ID are right.
    fn read(
        &self,
        number: usize,
        layer: &SourceLayer,
        blob: impl io::Read + Send,
        sink: &mut StoreSink<'_>,
    ) -> Result<Converted<FramingTemp>, Failure> {
        let failed = |error| layer_failure(self.image, number, layer, error);
        let read_error = |source| ConvertError::Read { offset: 0, source };
        let blob = VerifyReader::new(blob, "the layer's blob", layer.digest, Some(layer.size));
        let blob = self.stages.reader(Stage::BlobDigest, blob);
        let unpack = self.stages.reader(Stage::Unpack, Unpack::new(blob).map_err(read_error).map_err(failed)?);
        let options = self.options();
        let framing = self.store.framing_temp()?;
        self.leftovers.note(framing.path()).map_err(|source| failed(ConvertError::Store { source }))?;
        let (result, unpack) = pipe::run(unpack, |tar| {
            let mut tar = VerifyReader::new(tar, "the layer's tar", layer.diff_id.0, None);
            let counted = self.stages.reader(Stage::TarDigest, &mut tar);
            let converted = self.stages.time(Stage::Cut, || convert_layer_beside(self.elsewhere, counted, sink, framing, &options))?;
            tar.drain().map_err(read_error)?;
            Ok(converted)
        });
        let mut unpack = unpack.into_inner();
        let failure = match result.map_err(failed) {
            Err(failure @ Failure::Layer { .. }) => failure,
            result => return result,
        };
        // What looks like a malformed archive is more often a damaged blob: the digest decides.
        match unpack.drain_blob().map_err(|error| failed(read_error(error))) {
            Err(damaged @ Failure::Damaged { .. }) => Err(damaged),
            _ => Err(failure),
        }
    }
}

/// What the failure of a layer is to the user: I/O errors of our own readers and writers are what they carry.
pub(crate) fn layer_failure(image: &SourceImage, number: usize, layer: &SourceLayer, error: ConvertError) -> Failure {
    let name = format!("layer {number} ({})", layer.digest.oci());
    let image = image.name.clone();
    let (thrown, rebuild): (_, &dyn Fn(io::Error) -> ConvertError) = match error {
        ConvertError::Read { offset, source } => (Thrown::of(source), &move |source| ConvertError::Read { offset, source }),
        ConvertError::Store { source } => (Thrown::of(source), &|source| ConvertError::Store { source }),
        other => return Failure::Layer { layer: name, image, source: Box::new(other) },
    };
    match thrown {
        Thrown::Verify(source) => Failure::Damaged { layer: name, image, source: Box::new(source) },
        Thrown::Source(error) => error.into(),
        Thrown::Store(error) => error.into(),
        Thrown::Stopped => Failure::Stopped,
        Thrown::Other(source) => Failure::Layer { layer: name, image, source: Box::new(rebuild(source)) },
    }
}

/// Packs of one layer: complete ones wait as temporary files until the layer is verified.
struct StoreSink<'a> {
    store: &'a Store,
    leftovers: &'a Leftovers,
    finished: Vec<(SinkFile, Digest)>,
}

/// A pack being written. Its errors are the store's.
struct SinkFile(Temp);

impl PackSink for StoreSink<'_> {
    type Temp = SinkFile;

    fn create(&mut self) -> io::Result<SinkFile> {
        let temp = self.store.temp().map_err(io::Error::other)?;
        self.leftovers.note(temp.path())?;
        Ok(SinkFile(temp))
    }

    fn publish(&mut self, temp: SinkFile, name: Digest) -> io::Result<()> {
        self.finished.push((temp, name));
        Ok(())
    }
}

impl Write for SinkFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).map_err(|error| io::Error::other(StoreError::writing(self.0.path(), error)))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(|error| io::Error::other(StoreError::writing(self.0.path(), error)))
    }
}
