//! Units to packs: compressed on several threads, written by one, in order.
//!
//! ```text
//! reader ──unit──▶ compressors ──one channel per unit──┐
//!    └────────────those channels, in order──────────▶ writer ──▶ sink
//! ```
//!
//! The writer waits for units in the order they were sent, so the packs do not depend on which thread was faster. The queue of channels is
//! bounded, and with it the number of units in memory.

use std::io::{self, BufWriter};
use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded};
use erofs::block::UnitBits;
use erofs::digest::Digest;
use erofs::meta::PackRef;
use erofs::pack::{EncodedUnit, PackWriter, UnitEncoder, WriteError};

use super::{ConvertError, LayerOptions, PackSink, Stage};

/// zstd's level. Measured on 350 MB of /usr in units of 256 KiB, MB per CPU second and size of the packs (2.5 GHz Cascade Lake): level 1
/// 245 to 365 and 40.6 %, level 2 178 to 200 and 39.3 %, level 3 124 to 155 and 38.5 %. Decoding costs the same at each. Conversion is
/// bound by this stage, and reading more by the store's latency than by its bytes.
pub const ZSTD_LEVEL: i32 = 1;

/// Units that may wait for or be under compression, per thread: enough that no thread waits while the reader reads a big entry.
const UNITS_PER_THREAD: usize = 3;

/// What the writer collects before it writes.
const WRITE_BUFFER: usize = 1 << 20;

/// A unit to be compressed and written.
pub(super) struct Unit {
    /// Uncompressed.
    pub data: Vec<u8>,
    /// Its BLAKE3, if known.
    pub digest: Option<Digest>,
    /// Chunks in it: digest, first block in the unit, blocks.
    pub chunks: Vec<(Digest, u32, u32)>,
}

/// The way in for units.
pub(super) struct Feeder {
    units: Sender<Job>,
    order: Sender<Message>,
    spare: Spare,
    free: Receiver<Vec<u8>>,
    unit_len: usize,
}

/// A unit, its BLAKE3 if known, and where it is waited for.
type Job = (Vec<u8>, Option<Digest>, Sender<EncodedUnit>);

/// Takes buffers that nobody needs any more. A new one would have to be zeroed, and what one thread frees does not serve another: converting a
/// layer of 3.5 GB on two processors left 66 MB resident with this and 103 MB without.
#[derive(Clone)]
struct Spare {
    buffers: Sender<Vec<u8>>,
    unit_len: usize,
}

impl Spare {
    fn give(&self, buffer: Vec<u8>) {
        if buffer.len() == self.unit_len {
            // There are enough already.
            let _ = self.buffers.try_send(buffer);
        }
    }
}

enum Message {
    Unit(Vec<(Digest, u32, u32)>, Receiver<EncodedUnit>),
    /// All units were sent. Without this the writer knows that the layer failed, and publishes nothing more.
    End,
}

impl Feeder {
    /// A buffer of a unit's length with anything in it.
    pub fn buffer(&self) -> Vec<u8> {
        self.free.try_recv().unwrap_or_else(|_| vec![0; self.unit_len])
    }

    /// Takes a buffer back whose content is of no use.
    pub fn give_back(&self, buffer: Vec<u8>) {
        self.spare.give(buffer);
    }

    /// Hands a unit over; waits while too many are under way.
    pub fn send(&self, unit: Unit) -> Result<(), ConvertError> {
        // The writer's own error takes the place of this one.
        let stopped = || ConvertError::Store { source: io::Error::other("the pack writer has stopped") };
        let (done, encoded) = bounded(1);
        self.order.send(Message::Unit(unit.chunks, encoded)).map_err(|_| stopped())?;
        self.units.send((unit.data, unit.digest, done)).map_err(|_| stopped())
    }
}

/// Runs `feed`, compresses and writes what it feeds, and gives its result with the packs made.
pub(super) fn run<S: PackSink, T>(
    sink: &mut S,
    options: &LayerOptions,
    feed: impl FnOnce(&Feeder) -> Result<T, ConvertError>,
) -> Result<(T, Vec<PackRef>), ConvertError> {
    let (threads, unit_bits, stages) = (options.threads.max(1), options.unit_bits, &options.stages);
    let (units, todo) = bounded::<Job>(threads * UNITS_PER_THREAD);
    let (order, in_order) = bounded(threads * UNITS_PER_THREAD);
    let (buffers, free) = bounded(threads * UNITS_PER_THREAD);
    let unit_len = unit_bits.bytes() as usize;
    let spare = Spare { buffers, unit_len };
    thread::scope(|scope| {
        for _ in 0..threads {
            let (todo, spare) = (todo.clone(), spare.clone());
            scope.spawn(move || stages.time(Stage::Compress, || compress(todo, &spare)));
        }
        drop(todo);
        let after = spare.clone();
        let writer = scope.spawn(move || stages.time(Stage::Write, || write(sink, unit_bits, in_order, &after)));
        let feeder = Feeder { units, order, spare, free, unit_len };
        let fed = feed(&feeder);
        if fed.is_ok() {
            // If the writer is gone, its own result says why.
            let _ = feeder.order.send(Message::End);
        }
        drop(feeder);
        let written = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        match (fed, written) {
            (Ok(fed), Ok(packs)) => Ok((fed, packs)),
            (Err(error), Ok(_)) | (_, Err(error)) => Err(error),
        }
    })
}

/// Compresses units as they come.
fn compress(todo: Receiver<Job>, spare: &Spare) {
    let mut encoder = UnitEncoder::new(ZSTD_LEVEL);
    for (mut data, digest, done) in todo {
        let digest = digest.unwrap_or_else(|| Digest::of(&data));
        // Nobody waits for it only if the writer has failed, which `run` reports.
        let _ = done.send(encoder.encode(&mut data, digest));
        spare.give(data);
    }
}

/// Writes units to packs as they come; gives the packs if the end was reached.
fn write<S: PackSink>(sink: &mut S, unit_bits: UnitBits, units: Receiver<Message>, spare: &Spare) -> Result<Vec<PackRef>, ConvertError> {
    let mut packs = Vec::new();
    let mut open: Option<PackWriter<BufWriter<S::Temp>>> = None;
    for message in units {
        let (chunks, encoded) = match message {
            Message::Unit(chunks, encoded) => (chunks, encoded),
            Message::End => {
                packs.extend(open.take().map(|pack| publish(sink, pack)).transpose()?);
                return Ok(packs);
            }
        };
        let unit = encoded.recv().map_err(|_| ConvertError::Store { source: io::Error::other("a compression thread has died") })?;
        let pack = match &mut open {
            Some(pack) => pack,
            none => none.insert(PackWriter::new(BufWriter::with_capacity(WRITE_BUFFER, sink.create().map_err(store)?), unit_bits)),
        };
        pack.push(&unit, &chunks).map_err(pack_error)?;
        spare.give(unit.stored);
        if pack.room() == 0
            && let Some(full) = open.take()
        {
            packs.push(publish(sink, full)?);
        }
    }
    Ok(packs)
}

fn publish<S: PackSink>(sink: &mut S, pack: PackWriter<BufWriter<S::Temp>>) -> Result<PackRef, ConvertError> {
    let finished = pack.finish().map_err(pack_error)?;
    let temp = finished.out.into_inner().map_err(|error| store(error.into_error()))?;
    sink.publish(temp, finished.pack.digest).map_err(store)?;
    Ok(finished.pack)
}

fn store(source: io::Error) -> ConvertError {
    ConvertError::Store { source }
}

fn pack_error(error: WriteError) -> ConvertError {
    match error {
        WriteError::Io(source) => store(source),
        WriteError::Full => unreachable!("a pack is published as soon as it is full"),
    }
}
