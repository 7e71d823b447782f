//! Counters and histograms of the node, bumped without allocating or locking, rendered as OpenMetrics text.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Zero.
    pub const fn new() -> Counter {
        Counter(AtomicU64::new(0))
    }

    /// Adds one.
    pub fn bump(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Upper bounds of a [`Histogram`]'s buckets in microseconds: from a cached answer (tens of µs) over a store's round trip (ms) to a
/// store that hangs (seconds).
pub const BUCKETS_US: [u64; 12] = [50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 50_000, 250_000, 1_000_000, 10_000_000];

/// How long something took, in fixed buckets.
#[derive(Debug)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS_US.len() + 1],
    sum_us: AtomicU64,
}

impl Histogram {
    /// Empty.
    pub const fn new() -> Histogram {
        Histogram { buckets: [const { AtomicU64::new(0) }; BUCKETS_US.len() + 1], sum_us: AtomicU64::new(0) }
    }

    /// Counts one duration.
    pub fn observe(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.buckets[BUCKETS_US.partition_point(|&bound| bound < us)].fetch_add(1, Relaxed);
        self.sum_us.fetch_add(us, Relaxed);
    }

    /// How many durations were counted.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Relaxed)).sum()
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

/// What a node counts. One per process, handed to those who bump it as an `Arc`.
#[derive(Debug)]
pub struct Metrics {
    backend: &'static str,
    /// Read requests of the kernel.
    pub asks: Counter,
    /// Requests answered with an error.
    pub asks_failed: Counter,
    /// Requests dropped unanswered and answered EIO by the guard: always a bug (invariant 8).
    pub asks_dropped: Counter,
    /// From taking a request to its answer.
    pub ask_time: Histogram,
    /// Runs of units fetched.
    pub fills: Counter,
    /// Fills that failed.
    pub fills_failed: Counter,
    /// Units decompressed, verified and written to the cache.
    pub units_filled: Counter,
    /// Units whose bytes did not match their digest.
    pub units_damaged: Counter,
    /// Reads of the store.
    pub store_reads: Counter,
    /// Bytes read from the store.
    pub store_bytes: Counter,
    /// From submitting a read of the store to its bytes.
    pub store_read_time: Histogram,
    /// Bytes written to the cache.
    pub cache_bytes: Counter,
    /// Workers the holder started after the first.
    pub worker_restarts: Counter,
    /// Prepare calls answered with a chain found in the store.
    pub chains_hit: Counter,
    /// Prepare calls for a chain that became a plain snapshot.
    pub chains_missed: Counter,
    /// EROFS mounts made.
    pub mounts: Counter,
}

impl Metrics {
    /// All zero; `backend` becomes the label of the data path's families.
    pub const fn new(backend: &'static str) -> Metrics {
        Metrics {
            backend,
            asks: Counter::new(),
            asks_failed: Counter::new(),
            asks_dropped: Counter::new(),
            ask_time: Histogram::new(),
            fills: Counter::new(),
            fills_failed: Counter::new(),
            units_filled: Counter::new(),
            units_damaged: Counter::new(),
            store_reads: Counter::new(),
            store_bytes: Counter::new(),
            store_read_time: Histogram::new(),
            cache_bytes: Counter::new(),
            worker_restarts: Counter::new(),
            chains_hit: Counter::new(),
            chains_missed: Counter::new(),
            mounts: Counter::new(),
        }
    }

    /// The whole set as OpenMetrics text, ending in `# EOF`.
    pub fn render(&self) -> String {
        let label = format!("{{backend=\"{}\"}}", self.backend);
        let mut out = String::new();
        for (name, labels, help, counter) in [
            ("asks", label.as_str(), "Read requests of the kernel.", &self.asks),
            ("asks_failed", &label, "Read requests answered with an error.", &self.asks_failed),
            ("asks_dropped", &label, "Read requests dropped unanswered: a bug.", &self.asks_dropped),
            ("fills", &label, "Runs of units fetched from the store.", &self.fills),
            ("fills_failed", &label, "Fetches that failed.", &self.fills_failed),
            ("units_filled", &label, "Units verified and written to the cache.", &self.units_filled),
            ("units_damaged", &label, "Units whose bytes did not match their digest.", &self.units_damaged),
            ("store_reads", "", "Reads of the store.", &self.store_reads),
            ("store_read_bytes", "", "Bytes read from the store.", &self.store_bytes),
            ("cache_written_bytes", "", "Bytes written to the cache.", &self.cache_bytes),
            ("worker_restarts", "", "Workers started after the first.", &self.worker_restarts),
            ("chains_hit", "", "Chains found in the store at Prepare.", &self.chains_hit),
            ("chains_missed", "", "Chains that became plain snapshots at Prepare.", &self.chains_missed),
            ("mounts", "", "EROFS mounts made.", &self.mounts),
        ] {
            let value = counter.get();
            let _ = write!(out, "# TYPE slipway_{name} counter\n# HELP slipway_{name} {help}\nslipway_{name}_total{labels} {value}\n");
        }
        render_histogram(&mut out, "ask_seconds", "From taking a read request to its answer.", &self.ask_time);
        render_histogram(&mut out, "store_read_seconds", "From submitting a read of the store to its bytes.", &self.store_read_time);
        out.push_str("# EOF\n");
        out
    }
}

/// Writing to a `String` cannot fail, hence the ignored results.
fn render_histogram(out: &mut String, name: &str, help: &str, histogram: &Histogram) {
    let _ = write!(out, "# TYPE slipway_{name} histogram\n# UNIT slipway_{name} seconds\n# HELP slipway_{name} {help}\n");
    let mut total = 0;
    for (index, bucket) in histogram.buckets.iter().enumerate() {
        total += bucket.load(Relaxed);
        let bound = BUCKETS_US.get(index).map_or_else(|| "+Inf".to_owned(), |&us| seconds(us));
        let _ = writeln!(out, "slipway_{name}_bucket{{le=\"{bound}\"}} {total}");
    }
    let sum = seconds(histogram.sum_us.load(Relaxed));
    let _ = write!(out, "slipway_{name}_sum {sum}\nslipway_{name}_count {total}\n");
}

/// Microseconds as exact decimal seconds, with the decimal point OpenMetrics wants in bucket bounds.
fn seconds(us: u64) -> String {
    let text = format!("{}.{:06}", us / 1_000_000, us % 1_000_000);
    let trimmed = text.trim_end_matches('0');
    if trimmed.ends_with('.') { format!("{trimmed}0") } else { trimmed.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_render_with_type_help_and_label() {
        let metrics = Metrics::new("fuse-blob");
        metrics.asks.bump();
        metrics.store_bytes.add(4096);
        let text = metrics.render();
        for line in [
            "# TYPE slipway_asks counter",
            "slipway_asks_total{backend=\"fuse-blob\"} 1",
            "slipway_store_read_bytes_total 4096",
            "slipway_asks_dropped_total{backend=\"fuse-blob\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} not in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn every_line_is_a_comment_or_a_sample_and_families_appear_once() {
        let text = Metrics::new("fscache").render();
        let mut families = std::collections::BTreeSet::new();
        for line in text.lines() {
            match line.strip_prefix("# TYPE ") {
                Some(family) => assert!(families.insert(family), "{family} twice"),
                None => assert!(line.starts_with('#') || line.split(' ').count() == 2 && line.starts_with("slipway_"), "{line}"),
            }
        }
        assert_eq!(families.len(), 16);
    }

    #[test]
    fn a_duration_falls_into_the_first_bucket_that_holds_it() {
        for (us, bucket) in [(0, 0), (50, 0), (51, 1), (1_000, 4), (10_000_000, 11), (10_000_001, 12), (u64::MAX, 12)] {
            let histogram = Histogram::new();
            histogram.observe(Duration::from_micros(us));
            assert_eq!(histogram.buckets.iter().position(|b| b.load(Relaxed) == 1), Some(bucket), "{us}");
            assert_eq!(histogram.count(), 1);
        }
    }

    #[test]
    fn histograms_are_cumulative_and_in_seconds() {
        let metrics = Metrics::new("fuse-blob");
        metrics.ask_time.observe(Duration::from_micros(60));
        metrics.ask_time.observe(Duration::from_millis(2_000));
        let text = metrics.render();
        for line in [
            "slipway_ask_seconds_bucket{le=\"0.00005\"} 0",
            "slipway_ask_seconds_bucket{le=\"0.0001\"} 1",
            "slipway_ask_seconds_bucket{le=\"10.0\"} 2",
            "slipway_ask_seconds_bucket{le=\"+Inf\"} 2",
            "slipway_ask_seconds_sum 2.00006",
            "slipway_ask_seconds_count 2",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} not in\n{text}");
        }
    }
}
