//! The parts of the demo, which the benchmarks use as well: its image, the measured runs, the table.

pub mod image;
pub mod report;
pub mod runs;
