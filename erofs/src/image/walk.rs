//! One verified pass over all names of an image.
