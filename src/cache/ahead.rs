//! Recognises readers that go through a pack in order, and says how far to fetch ahead of them. Pure.
//!
//! The kernel asks in small steps and never looks ahead across them, so the daemon must. A reader is sequential when it misses
//! where the last fetch on its behalf ended. It then gets a window after what it asked for, twice as large each time. The first unit of
//! a window is *marked*: touching it (a hit, by then) means that the reader has arrived, and the next window is fetched while it
//! consumes this one.

use std::ops::Range;

use erofs::block::UnitBits;

use super::UnitIndex;

/// Window of a reader just found to be sequential: two of the kernel's largest read-ahead steps (128 KiB).
pub const FIRST_WINDOW: u64 = 256 << 10;

/// Largest window. One is consumed while the next is fetched, so this covers a store of 5 ms latency at 800 MB/s.
pub const MAX_WINDOW: u64 = 4 << 20;

/// How far out of order the requests of one sequential reader may come: the kernel has several of one read under way, and several threads
/// take them.
const SLACK: u64 = 512 << 10;

/// Readers remembered per pack. More than this many files read in turn, each in order, look like random access.
const READERS: usize = 16;

/// Sequential readers of one pack.
#[derive(Debug)]
pub struct Streams {
    units: u32,
    unit_bits: UnitBits,
    /// Least recently used first.
    recent: Vec<Stream>,
}

#[derive(Debug)]
struct Stream {
    /// End of everything fetched for this reader: a miss here continues the stream.
    next: u32,
    /// Last window in bytes; 0 before the second miss.
    window: u64,
    /// First unit of the last window.
    mark: Option<u32>,
}

/// Units to fetch ahead; mark the first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window(pub Range<u32>);

impl Streams {
    /// Nobody has read yet. The pack has `units` units of this size.
    pub fn new(units: u32, unit_bits: UnitBits) -> Streams {
        Streams { units, unit_bits, recent: Vec::new() }
    }

    /// A reader asked for `demand`, and something of it was missing.
    pub fn missed(&mut self, demand: &Range<u32>) -> Option<Window> {
        let slack = (SLACK >> self.unit_bits.bits()).max(1) as u32;
        let near = |stream: &Stream| {
            let slack = if stream.window == 0 { 0 } else { slack };
            demand.contains(&stream.next) || (stream.next.saturating_sub(slack)..=stream.next.saturating_add(slack)).contains(&demand.start)
        };
        match self.recent.iter().position(near) {
            Some(at) if demand.end <= self.recent[at].next => None,
            Some(at) => {
                self.recent[at].next = demand.end;
                self.grow(at)
            }
            None => {
                if self.recent.len() == READERS {
                    self.recent.remove(0);
                }
                self.recent.push(Stream { next: demand.end, window: 0, mark: None });
                None
            }
        }
    }

    /// A reader touched the marked unit.
    pub fn touched(&mut self, unit: UnitIndex) -> Option<Window> {
        let at = self.recent.iter().position(|stream| stream.mark == Some(unit.0))?;
        self.grow(at)
    }

    fn grow(&mut self, at: usize) -> Option<Window> {
        let mut stream = self.recent.remove(at);
        stream.window = (stream.window * 2).clamp(FIRST_WINDOW, MAX_WINDOW);
        let count = (stream.window >> self.unit_bits.bits()).max(1) as u32;
        let window = stream.next..self.units.min(stream.next.saturating_add(count));
        stream.next = window.end;
        stream.mark = Some(window.start);
        self.recent.push(stream);
        (!window.is_empty()).then_some(Window(window))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    enum Event {
        Miss(Range<u32>),
        Touch(u32),
    }
    use Event::{Miss, Touch};

    /// Feeds events to a pack of 1000 units of 256 KiB; gives the windows.
    #[track_caller]
    fn check(events: impl IntoIterator<Item = (Event, Option<Range<u32>>)>) {
        let mut streams = Streams::new(1000, UnitBits::DEFAULT);
        for (number, (event, expected)) in events.into_iter().enumerate() {
            let got = match &event {
                Miss(demand) => streams.missed(demand),
                Touch(unit) => streams.touched(UnitIndex(*unit)),
            };
            assert_eq!(got.map(|window| window.0), expected, "event {number}: {event:?}");
        }
    }

    #[test]
    fn random_misses_fetch_nothing_ahead() {
        check([(Miss(5..6), None), (Miss(7..8), None), (Miss(500..501), None), (Miss(4..5), None)]);
    }

    #[test]
    fn a_reader_in_order_gets_growing_windows() {
        check([
            (Miss(5..6), None),
            (Miss(6..7), Some(7..8)),
            (Touch(7), Some(8..10)),
            (Touch(8), Some(10..14)),
            (Touch(10), Some(14..22)),
            (Touch(14), Some(22..38)),
            (Touch(22), Some(38..54)),
        ]);
    }

    #[test]
    fn a_reader_that_outruns_its_window_goes_on_growing() {
        check([(Miss(0..1), None), (Miss(1..2), Some(2..3)), (Miss(3..4), Some(4..6)), (Miss(6..7), Some(7..11))]);
    }

    #[test]
    fn a_demand_that_overlaps_the_end_of_the_last_continues_it() {
        check([(Miss(0..4), None), (Miss(3..7), Some(7..8))]);
    }

    #[test]
    fn requests_of_a_reader_may_overtake_each_other() {
        check([(Miss(0..1), None), (Miss(1..2), Some(2..3)), (Miss(4..5), Some(5..7)), (Miss(3..4), None), (Miss(9..10), Some(10..14))]);
        check([(Miss(1..2), None), (Miss(0..1), None), (Miss(3..4), None), (Miss(2..3), Some(3..4))]);
    }

    #[test]
    fn windows_end_with_the_pack() {
        check([(Miss(996..997), None), (Miss(997..998), Some(998..999)), (Touch(998), Some(999..1000)), (Touch(999), None), (Touch(999), None)]);
        check([(Miss(998..999), None), (Miss(999..1000), None)]);
    }

    #[test]
    fn readers_are_told_apart_and_old_ones_forgotten() {
        check([(Miss(0..1), None), (Miss(100..101), None), (Miss(1..2), Some(2..3)), (Miss(101..102), Some(102..103)), (Touch(2), Some(3..5))]);
        let others = (0..READERS as u32).map(|i| (Miss(100 + 2 * i..101 + 2 * i), None));
        check([(Miss(0..1), None)].into_iter().chain(others).chain([(Miss(1..2), None)]));
    }

    #[test]
    fn a_mark_nobody_knows_any_more_is_ignored() {
        check([(Touch(3), None)]);
    }
}
