//! The only way from bytes to verified bytes (invariant 5): whatever reaches a reader or the cache file is a [`Verified`].

use erofs::digest::Digest;
use erofs::pack::{PackTable, UnitError, decode_unit};
use uapi::buffer::{Buffer, Shared};

use super::UnitIndex;

/// The bytes of one whole unit, matching their digest.
#[derive(Clone, Debug)]
pub struct Verified {
    unit: UnitIndex,
    bytes: Shared,
}

impl Verified {
    /// Decompresses `stored` into `out` and verifies it. `out` is as long as the unit.
    pub fn decode(table: &PackTable, unit: UnitIndex, stored: &[u8], mut out: Buffer) -> Result<Verified, UnitError> {
        let entry = table.unit(unit.0).expect("units come from the pack they are decoded for");
        decode_unit(entry, stored, &mut out)?;
        Ok(Verified { unit, bytes: out.share() })
    }

    /// Verifies bytes that came from the local file; `None` if they are not the unit's.
    pub fn check(table: &PackTable, unit: UnitIndex, bytes: Buffer) -> Option<Verified> {
        let entry = table.unit(unit.0)?;
        let right = bytes.len() == table.unit_len(unit.0) && Digest::of(&bytes) == entry.digest;
        right.then(|| Verified { unit, bytes: bytes.share() })
    }

    /// Which unit it is.
    pub fn unit(&self) -> UnitIndex {
        self.unit
    }

    /// The bytes.
    pub fn bytes(&self) -> &Shared {
        &self.bytes
    }
}
