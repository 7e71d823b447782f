//! One layer's tar stream becomes a layer tree, packs, and a framing that with the packs gives back the stream.
//!
//! An entry's way: `intake` frames the archive with `tar-core` and writes down what no pack gets, `header` decides what the entry is, `upper` puts
//! it where containerd would, `chunks` cuts its data, drops zeros and what the layer already has or what `runs` finds worth a reference to other
//! packs, and places the rest into units, which `compress` turns into packs. When the archive ends, every chunk has its place and the layer's directory
//! becomes the [`LayerTree`].
//!
//! The same tar gives the same tree, packs and framing, byte for byte, whatever the number of threads, as long as the same is [`known`] of other packs.
//!
//! What a container on overlayfs could not see is left out: the archive's root entry (containerd ignores it), access and change times,
//! user and group names, `trusted.*` extended attributes (among them `trusted.overlay.*`, which would speak to overlayfs), `user.*`
//! attributes of what is neither file nor directory, `SCHILY.acl.*` and `LIBARCHIVE.xattr.*` records (containerd does not read them; ACLs
//! come as `SCHILY.xattr.system.posix_acl_*`), and global PAX headers.
//!
//! What the file system that containerd unpacks to would do by itself is not done: what is made in a directory with a default ACL has no
//! ACL from it, and a directory that no entry lists has group 0 also when it is made in a set-group-ID directory of its layer. The archive
//! alone decides.
//!
//! Memory: about 2 units for every one of the `3 × threads + threads + 2` units under way, 1.5 MiB of buffers, 1 MiB of chunks that are held back,
//! 70 bytes per distinct chunk (of which 44 stay until the layer is settled), and the entries themselves (a few hundred bytes each, plus names,
//! attributes and inline data), bounded by [`Budget`].

mod acl;
mod chunks;
mod compress;
mod header;
mod intake;
pub mod known;
mod packing;
pub mod runs;
pub mod settle;
mod sink;
mod stages;
mod upper;

use std::borrow::Cow;
use std::io::{self, Read, Write};
use std::time::Duration;

use erofs::block::UnitBits;
use erofs::digest::Digest;
use erofs::framing::{FramingWriter, Places};
use erofs::layer::{LayerError, LayerTree};
use erofs::meta::{Content, PackRef};

pub use chunks::INLINE_LIMIT;
pub use compress::ZSTD_LEVEL;
pub use known::{ChunkTable, Elsewhere, Known};
pub use sink::{MemorySink, PackSink};
pub use stages::{STAGES, Stage, Stages, process_time};

use chunks::Chunker;
use header::{Member, MemberKind};
use intake::Archive;
use upper::{Body, Intent, Put, Upper};

/// How to convert, and how much a layer may cost.
#[derive(Clone, Debug)]
pub struct LayerOptions {
    /// Unit (and chunk) size.
    pub unit_bits: UnitBits,
    /// Compression threads, at least 1. The result does not depend on it.
    pub threads: usize,
    /// What the layer may cost.
    pub budget: Budget,
    /// Where the processor time of [`Stage::Compress`] and [`Stage::Write`] is counted.
    pub stages: Stages,
}

/// What one layer may cost: an archive of a few bytes can ask for much more than any real layer needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Entries, whether or not they end up in the tree.
    pub entries: u64,
    /// Bytes of all files as a reader sees them, holes included: a sparse file of a petabyte has four billion chunks.
    pub bytes: u64,
    /// Bytes kept in memory for entries: paths, link targets, extended attributes, inline data.
    pub metadata: u64,
    /// Bytes of the tar as it is read, with headers, extensions that are thrown away and what follows the archive's end: what a few megabytes of
    /// gzip can unpack to.
    pub stream: u64,
    /// Time from the first byte to the last. It decides only whether there is a result, never which.
    pub time: Duration,
}

impl Default for Budget {
    /// 4 million entries, 256 GiB in 288 GiB of tar, 1 GiB of metadata, 12 hours: far above a whole distribution or a large model in one layer, also
    /// over a slow line.
    fn default() -> Self {
        Budget { entries: 4_000_000, bytes: 256 << 30, metadata: 1 << 30, stream: 288 << 30, time: Duration::from_secs(12 * 3600) }
    }
}

impl Default for LayerOptions {
    /// Default unit size and budget, a compression thread for every core.
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        LayerOptions { unit_bits: UnitBits::DEFAULT, threads, budget: Budget::default(), stages: Stages::default() }
    }
}

/// Why a layer could not be converted.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The tar stream could not be read: the source's problem.
    #[error("cannot read the layer at byte {offset} of its tar; try again")]
    Read {
        /// Bytes of the uncompressed tar read so far.
        offset: u64,
        /// What the reader said.
        #[source]
        source: io::Error,
    },
    /// The archive is broken: build or push the image again.
    #[error("tar entry \"{path}\" at byte {offset}: {rule}; the layer is damaged, build the image again")]
    Malformed {
        /// Path of the entry, as far as it could be read.
        path: String,
        /// Where the entry begins in the uncompressed tar.
        offset: u64,
        /// What is wrong.
        rule: Cow<'static, str>,
    },
    /// The archive has something that no image can hold, or that this version does not know.
    #[error("tar entry \"{path}\" at byte {offset}: {what} cannot be converted; build the image without it")]
    Unsupported {
        /// Path of the entry.
        path: String,
        /// Where the entry begins in the uncompressed tar.
        offset: u64,
        /// What it has.
        what: Cow<'static, str>,
    },
    /// The layer costs more than it may.
    #[error("tar entry \"{path}\" at byte {offset}: the layer takes more than {limit} {what}; build the image with this layer split into several")]
    Budget {
        /// Path of the entry that was too much.
        path: String,
        /// Where the entry begins in the uncompressed tar.
        offset: u64,
        /// `entries`, `bytes of file data`, `bytes of metadata`, `bytes of tar` or `seconds to convert`.
        what: &'static str,
        /// The budget.
        limit: u64,
    },
    /// A pack or the framing could not be written to the store.
    #[error("cannot write what the layer holds to the store; check its space and permissions, then convert again")]
    Store {
        /// What the writer said.
        #[source]
        source: io::Error,
    },
    /// The entries together make no layer tree.
    #[error("the layer makes no tree; build the image again")]
    Tree {
        /// The rule they break.
        #[source]
        source: LayerError,
    },
}

/// A converted layer.
#[derive(Debug)]
pub struct Converted<W: Write> {
    /// Its tree.
    pub tree: LayerTree,
    /// Its framing, of which the places of the chunks are yet to be written.
    pub framing: FramingWriter<W>,
    /// Those places. They name all packs of the layer, also such as the tree does not.
    pub places: Places,
    /// Packs made for it. Its chunks may be in others as well.
    pub own: Vec<PackRef>,
    /// Digest and blocks of every chunk, by its number.
    pub chunks: Vec<(Digest, u32)>,
}

/// Converts one layer without a framing, for those who want nothing back but what it says.
pub fn convert_layer(reader: impl Read, sink: &mut impl PackSink, options: &LayerOptions) -> Result<LayerTree, ConvertError> {
    Ok(convert_layer_framed(reader, sink, io::sink(), options)?.tree)
}

/// Converts one layer all by itself, see [`convert_layer_beside`].
pub fn convert_layer_framed<W: Write>(
    reader: impl Read,
    sink: &mut impl PackSink,
    framing: W,
    options: &LayerOptions,
) -> Result<Converted<W>, ConvertError> {
    convert_layer_beside(Elsewhere::NOTHING, reader, sink, framing, options)
}

/// Converts one layer. `reader` gives the uncompressed tar and is read to its end, also past the archive's end marker (so that a
/// verifying reader sees every byte). Packs go to `sink` as they fill up; on an error some may have been published already. What goes to no pack
/// is written to `framing`. What is stored `elsewhere`, in packs of the same unit size, may be referred to there.
pub fn convert_layer_beside<W: Write>(
    elsewhere: Elsewhere<'_>,
    reader: impl Read,
    sink: &mut impl PackSink,
    framing: W,
    options: &LayerOptions,
) -> Result<Converted<W>, ConvertError> {
    let ((upper, framing, chunked), own) = compress::run(sink, options, |feeder| {
        let mut archive = Archive::new(reader, framing, options.unit_bits, &options.budget)?;
        let mut upper = Upper::new();
        let mut chunker = Chunker::new(options.unit_bits, feeder, elsewhere);
        let mut costs = Costs { budget: options.budget, entries: 0, bytes: 0, metadata: 0 };
        while let Some(member) = archive.next()? {
            costs.add(&archive, &member, upper.size())?;
            take(member, &mut archive, &mut upper, &mut chunker)?;
        }
        Ok((upper, archive.drain()?, chunker.finish()?))
    })?;
    if let Some(path) = upper.ambiguous_link() {
        let source = LayerError::Entry { path, rule: "a hard link meant what layers below have there, but this layer replaces it" };
        return Err(ConvertError::Tree { source });
    }
    let entries = upper.into_entries(|body| match body {
        Body::Data(data) => Content::File(chunked.data(data)),
        Body::Other(content) => content,
    });
    let packs: Vec<PackRef> = own.iter().chain(chunked.others()).copied().collect();
    let tree = LayerTree::new(packs.clone(), entries).map_err(|source| ConvertError::Tree { source })?;
    Ok(Converted { tree, framing, places: Places::new(packs, chunked.places()), own, chunks: chunked.chunks })
}

/// Puts one entry into the layer's directory, its data into chunks.
fn take(member: Member, archive: &mut Archive<impl Read, impl Write>, upper: &mut Upper, chunker: &mut Chunker<'_>) -> Result<(), ConvertError> {
    let Member { path, kind, attr, data_len, sparse } = member;
    let place = match upper.enter(&path) {
        Ok(Intent::Put(place)) => place,
        Ok(Intent::Ignore | Intent::Done) => return Ok(()),
        Err(refusal) => return Err(archive.refused(refusal)),
    };
    let other = |content| Body::Other(content);
    let what = match kind {
        MemberKind::Dir => Put::Dir(attr),
        MemberKind::Link(target) => Put::Link(attr, target),
        MemberKind::File => {
            let size = sparse.as_ref().map_or(data_len, |(_, real_size)| *real_size);
            let regions = sparse.as_ref().map(|(map, _)| &map[..]);
            Put::File(attr, Body::Data(chunker.file(archive, size, regions)?))
        }
        MemberKind::Symlink(target) => Put::File(attr, other(Content::Symlink(target))),
        MemberKind::Char(device) => Put::File(attr, other(Content::Char(device))),
        MemberKind::Block(device) => Put::File(attr, other(Content::Block(device))),
        MemberKind::Fifo => Put::File(attr, other(Content::Fifo)),
    };
    upper.put(place, what).map_err(|refusal| archive.refused(refusal))
}

/// What the layer has cost so far.
struct Costs {
    budget: Budget,
    entries: u64,
    bytes: u64,
    metadata: u64,
}

impl Costs {
    /// Counts one more entry; `upper` is the number of names and the length of their paths that the ones before came to.
    fn add(&mut self, archive: &Archive<impl Read, impl Write>, member: &Member, upper: (u64, u64)) -> Result<(), ConvertError> {
        let size = member.sparse.as_ref().map_or(member.data_len, |(_, real_size)| *real_size);
        let link = match &member.kind {
            MemberKind::Link(target) | MemberKind::Symlink(target) => target.len() as u64,
            _ => 0,
        };
        let xattrs: u64 = member.attr.xattrs.iter().map(|x| (x.name.len() + x.value.len()) as u64).sum();
        let inline = if size <= INLINE_LIMIT { size } else { 0 };
        self.entries += 1;
        self.bytes = self.bytes.saturating_add(size);
        self.metadata += link + xattrs + inline;
        for (cost, limit, what) in [
            (self.entries.max(upper.0), self.budget.entries, "entries"),
            (self.bytes, self.budget.bytes, "bytes of file data"),
            (self.metadata + upper.1, self.budget.metadata, "bytes of metadata"),
        ] {
            if cost > limit {
                return Err(archive.over_budget(what, limit));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod framing_tests;
#[cfg(test)]
mod tests;
