//! Packs: file data as compressed, verified units in one immutable file.
//!
//! A pack file, start to end (all integers little-endian):
//!
//! 1. units, each starting at a 4 KiB-aligned offset, zeros in between;
//! 2. from the next 4 KiB boundary the unit table (`table`), directly after it the chunk table;
//! 3. at the next 4 KiB boundary the footer, [`FOOTER_LEN`] bytes, the end of the file.
//!
//! The pack's name is the BLAKE3 of the footer. The footer holds the BLAKE3 of both tables and the unit table that of every unit, so
//! whoever knows the name can verify any unit alone. A node reads footer and unit table only; the chunk table is for converters, which
//! look for data that is already stored.
//!
//! - `table`: footer, unit table and chunk table, bytes to values and back;
//! - `unit`: one unit compressed and verified;
//! - `place`: chunks of files to units, pure;
//! - `writer`: units to a pack file.

mod place;
mod table;
mod unit;
mod writer;

pub use place::{Piece, PlacedUnit, Placer};
pub use table::{ChunkEntry, Codec, Footer, PackError, PackTable, UnitEntry};
pub use unit::{EncodedUnit, UnitEncoder, UnitError, decode_unit, encode_unit};
pub use writer::{FinishedPack, PackWriter, WriteError};

/// Length of the footer, and of what to read from the end of a pack to begin with.
pub const FOOTER_LEN: u64 = 4096;

/// The most a pack holds, uncompressed: small enough that moving, repairing or dropping one is a matter of seconds, large enough that
/// a big image refers to few (an image may refer to 256).
pub const MAX_PACK_BYTES: u64 = 1 << 30;
