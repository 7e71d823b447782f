//! An image as text.
#![allow(clippy::todo)]

use std::fmt;

use super::Image;

/// Writes `image` as text, one line per name, the same for the same image. A damaged image ends with a line that says what is wrong.
pub fn dump(_image: &Image<'_>, _out: &mut impl fmt::Write) -> fmt::Result {
    todo!()
}
