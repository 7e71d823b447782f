//! Numbers in our own file forms: LEB128, seven bits to a byte, least significant first, shortest form only.

/// What [`read`] says of bytes that are no number.
pub(crate) const NO_NUMBER: &str = "a number is too large or not in its shortest form";

/// Appends `value`.
pub(crate) fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends `value` so that small numbers of either sign are short: 0, -1, 1, -2, ...
pub(crate) fn put_signed(out: &mut Vec<u8>, value: i64) {
    put(out, unsigned(value));
}

/// `value` as a number that is small where `value` is, whatever its sign.
pub(crate) fn unsigned(value: i64) -> u64 {
    (value << 1 ^ value >> 63) as u64
}

/// Reads what [`put`] wrote. Calls for bytes as long as there are more; `None` if they are no number.
pub(crate) fn read<E>(mut byte: impl FnMut() -> Result<u8, E>) -> Result<Option<u64>, E> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = byte()?;
        let bits = u64::from(byte & 0x7f);
        if bits << shift >> shift != bits || (byte == 0 && shift > 0) {
            return Ok(None);
        }
        value |= bits << shift;
        if byte < 0x80 {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// The value that [`unsigned`] made this of.
pub(crate) fn signed(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}
