//! One layer given back: framing and packs → tar → gzip, its diff ID checked.

use std::io::{self, Write};

use erofs::framing::Step;
use flate2::Compression;
use flate2::write::GzEncoder;
use slipway::oci::Sha256;
use slipway::store::{Framing, RootLayer, Store};
use tokio_util::sync::CancellationToken;

use super::layout::{Hashed, Layout, failed};
use crate::check::data::DataReader;
use crate::failure::Failure;
use crate::layer::Budget;
use crate::pack_file::PackFile;

/// A layer that the store has all files of.
pub(super) struct StoredLayer<'a> {
    layer: &'a RootLayer,
    /// Which one of which image, for messages.
    name: String,
    framing: Framing,
}

impl<'a> StoredLayer<'a> {
    /// Opens and verifies its framing, and sees that its packs are there.
    pub fn open(store: &Store, layer: &'a RootLayer, name: String) -> Result<StoredLayer<'a>, Failure> {
        let stored = StoredLayer { layer, name, framing: store.read_framing(&layer.diff_id, &layer.framing)? };
        // Not kept open: layers of an image may refer to hundreds of packs each.
        for pack in &stored.framing.places.packs {
            PackFile::open(store, pack)?;
        }
        Ok(stored)
    }

    /// Writes it as a blob; gives digest and length. A blob whose tar has another diff ID gets no name.
    pub fn write(&self, store: &Store, layout: &Layout, stop: &CancellationToken) -> Result<(Sha256, u64), Failure> {
        let packs = self.framing.places.packs.iter().map(|pack| PackFile::open(store, pack)).collect::<Result<Vec<_>, _>>()?;
        let blob = layout.blob()?;
        let path = blob.path().to_owned();
        let mut tar = Hashed::new(GzEncoder::new(blob, Compression::default()));
        self.tar(DataReader::new(&packs), &mut tar, stop, &failed(&path))?;
        let found = tar.hasher.finish();
        if found != self.layer.diff_id.0 {
            return Err(self.damaged(format!("{} and the packs it names give a tar with the digest {found}", self.framing.path().display())));
        }
        tar.inner.finish().map_err(failed(&path))?.finish()
    }

    /// Writes the tar, every unit verified.
    fn tar(
        &self,
        mut data: DataReader<'_>,
        out: &mut Hashed<impl Write>,
        stop: &CancellationToken,
        failed: &dyn Fn(io::Error) -> Failure,
    ) -> Result<(), Failure> {
        // A framing that the converter made stands for no more, and zeros are cheap to ask for.
        let longest = Budget::default().stream;
        let mut steps = self.framing.steps()?;
        let unit_bits = steps.unit_bits();
        let zeros = vec![0; unit_bits.bytes() as usize];
        while let Some(step) = steps.next().map_err(|error| self.framing.failed(error))? {
            if stop.is_cancelled() {
                return Err(Failure::Stopped);
            }
            let bytes = match step {
                Step::Raw(bytes) => bytes,
                Step::Data { chunk: None, len, .. } => &zeros[..len as usize],
                Step::Data { chunk: Some(id), from, len } => {
                    // The file was read before, and may have been written to since.
                    let place = self
                        .framing
                        .places
                        .chunks
                        .get(id as usize)
                        .ok_or_else(|| self.damaged(format!("{} has just changed", self.framing.path().display())))?;
                    data.piece(place.pack, place.block, unit_bits, from as usize, len as usize).map_err(|what| self.damaged(what))?
                }
            };
            if out.len + bytes.len() as u64 > longest {
                return Err(self.damaged(format!("{} stands for more than {longest} bytes of tar", self.framing.path().display())));
            }
            out.write_all(bytes).map_err(failed)?;
        }
        Ok(())
    }

    fn damaged(&self, what: String) -> Failure {
        Failure::Data { layer: self.name.clone(), what }
    }
}
