//! Which bytes of a unit an ask needs, and which units one store read can bring. Pure.

use std::ops::Range;

use erofs::pack::PackTable;

use crate::cache::{Pack, UnitIndex};

/// Most stored bytes of one store read. Larger reads bring no more throughput from any store we know (NFS splits them at 1 MiB anyway)
/// and make whoever waits for their first unit wait for the last.
pub const MAX_RUN: usize = 2 << 20;

/// The bytes of `unit` among `len` bytes from `offset`, relative to the unit's start. The unit is one of [`Pack::units_in`] it.
pub fn part(pack: &Pack, unit: UnitIndex, offset: u64, len: u32) -> Range<usize> {
    let start = pack.unit_start(unit);
    let from = offset.saturating_sub(start) as usize;
    let to = (offset + u64::from(len) - start).min(pack.unit_len(unit) as u64) as usize;
    from..to
}

/// Units that lie one after the other in the pack file: one store read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The units.
    pub units: Range<u32>,
    /// Where the first begins in the pack file.
    pub offset: u64,
    /// From there to the end of the last.
    pub len: usize,
}

/// Groups units, given in ascending order, into runs. Units follow one another in the file at 4 KiB boundaries; larger gaps are not
/// bridged, as nothing we write has any.
pub fn runs(table: &PackTable, units: impl IntoIterator<Item = UnitIndex>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for unit in units {
        let Some(entry) = table.unit(unit.0) else { continue };
        let len = entry.stored_len as usize;
        match runs.last_mut() {
            Some(run) if run.units.end == unit.0 && follows(run, entry.offset) && (entry.offset - run.offset) as usize + len <= MAX_RUN => {
                run.units.end += 1;
                run.len = (entry.offset - run.offset) as usize + len;
            }
            _ => runs.push(Run { units: unit.0..unit.0 + 1, offset: entry.offset, len }),
        }
    }
    runs
}

fn follows(run: &Run, offset: u64) -> bool {
    let end = run.offset + run.len as u64;
    (end..end + 4096).contains(&offset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::fake::Sample;

    #[test]
    fn the_parts_of_an_ask_make_up_the_ask() {
        let pack = Sample::mixed(1, 139_264).pack();
        for (offset, len, expected) in
            [(10, 20, vec![10..30]), (65_535, 65_538, vec![65_535..65_536, 0..65_536, 0..1]), (131_072, 8192, vec![0..8192])]
        {
            let parts: Vec<_> = pack.units_in(offset, len).unwrap().map(|unit| part(&pack, UnitIndex(unit), offset, len)).collect();
            assert_eq!(parts, expected, "{len} from {offset}");
        }
    }

    #[test]
    fn neighbours_are_read_together_up_to_a_limit() {
        let sample = Sample::noise(2, 70 * 65_536);
        let table = sample.pack();
        let table = table.table();
        let check = |asked: &[u32], expected: &[Range<u32>]| {
            let runs = runs(table, asked.iter().map(|&unit| UnitIndex(unit)));
            assert_eq!(runs.iter().map(|run| run.units.clone()).collect::<Vec<_>>(), expected);
            for run in runs {
                let last = table.unit(run.units.end - 1).unwrap();
                assert_eq!(run.offset, table.unit(run.units.start).unwrap().offset);
                assert_eq!(run.offset + run.len as u64, last.offset + u64::from(last.stored_len));
                assert!(run.len <= MAX_RUN);
            }
        };
        check(&[], &[]);
        check(&[3], &[3..4]);
        check(&[3, 4, 6, 9, 10, 11], &[3..5, 6..7, 9..12]);
        check(&(0..70).collect::<Vec<_>>(), &[0..32, 32..64, 64..70]);
    }
}
