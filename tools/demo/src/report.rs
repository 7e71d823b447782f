//! The table the demo ends with.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::runs::{Measured, Run};

/// Everything that was measured.
#[derive(Debug)]
pub struct Report {
    /// Bytes of the uncompressed layers.
    pub image: u64,
    /// Bytes of the layers in the registry.
    pub compressed: u64,
    /// (a)
    pub ordinary: Measured,
    /// (a) once more, warm.
    pub ordinary_again: Run,
    /// (c)
    pub lazy: Measured,
    /// (d)
    pub lazy_again: Measured,
    /// Bytes in the node's cache at the end.
    pub cached: u64,
    /// What the converter reported.
    pub converted: Value,
    /// Seconds the conversion took.
    pub convert_seconds: f64,
}

impl Report {
    /// (pull + run) / Slipway: how much sooner the first output is there.
    pub fn speedup(&self) -> f64 {
        self.ordinary.total() / self.lazy.total()
    }

    /// (pull + run − warm run) / (Slipway − warm run): the same for what getting the image costs, without the workload's own time.
    /// The warm run is the ordinary one, so that whatever Slipway adds to a warm run counts against it.
    pub fn cost_ratio(&self) -> f64 {
        let warm = self.ordinary_again.first_output;
        (self.ordinary.total() - warm) / (self.lazy.total() - warm)
    }

    /// The figures as an aligned table with a few words on each.
    pub fn table(&self, style: &Style) -> String {
        let (a, c, d) = (&self.ordinary, &self.lazy, &self.lazy_again);
        let layer_bytes = |measured: &Measured| bytes(measured.registry.values().sum::<u64>());
        let rows: [(&str, [String; 4]); 7] = [
            ("", ["(a) ordinary".into(), "(a) again, warm".into(), "(c) Slipway, cold".into(), "(d) Slipway, warm".into()]),
            ("pull", [seconds(a.pull), "-".into(), seconds(c.pull), "-".into()]),
            ("container start", [seconds(a.run.started), seconds(self.ordinary_again.started), seconds(c.run.started), seconds(d.run.started)]),
            ("first output after start", {
                let after = |run: &Run| seconds(run.first_output - run.started);
                [after(&a.run), after(&self.ordinary_again), after(&c.run), after(&d.run)]
            }),
            ("from order to first output", [seconds(a.total()), seconds(self.ordinary_again.first_output), seconds(c.total()), seconds(d.total())]),
            ("blobs from the registry", [layer_bytes(a), "-".into(), layer_bytes(c), layer_bytes(d)]),
            ("read from the store's disk", ["-".into(), "-".into(), bytes(c.store), bytes(d.store)]),
        ];
        let mut out = String::new();
        for (number, (name, cells)) in rows.iter().enumerate() {
            let mut line = format!("{name:<28}");
            for cell in cells {
                let _ = write!(line, "{cell:>19}");
            }
            let line = if number == 0 || number == 4 { style.strong(&line) } else { line };
            let _ = writeln!(out, "{line}");
            if number == 0 || number == 4 {
                let _ = writeln!(out, "{}", "─".repeat(28 + 4 * 19));
            }
        }
        out + &self.words(style)
    }

    fn words(&self, style: &Style) -> String {
        let rate = self.image as f64 / 1e6 / self.convert_seconds;
        let stored = self.converted["sizes"]["stored"].as_u64().unwrap_or_default();
        let mut out = format!(
            "\nThe image is {} ({} in the registry). Converting it took {} ({rate:.0} MB/s) and {} in the store.\n",
            bytes(self.image),
            bytes(self.compressed),
            seconds(self.convert_seconds),
            bytes(stored)
        );
        let _ = writeln!(
            out,
            "Slipway's pull fetched manifest and configuration, no layer. The workload touched {:.1} % of the image: {} are cached now.",
            100.0 * self.cached as f64 / self.image as f64,
            bytes(self.cached)
        );
        let _ = writeln!(
            out,
            "{}",
            style.strong(&format!(
                "First output {:.1} times sooner; without the workload's own time (a warm run), getting the image costs {:.1} times less.",
                self.speedup(),
                self.cost_ratio()
            ))
        );
        let _ = write!(out, "Workload: {}", self.lazy.run.output);
        out
    }

    /// The figures for programs.
    pub fn json(&self) -> Value {
        let run = |run: &Run| json!({ "started": run.started, "firstOutput": run.first_output });
        let measured = |m: &Measured| json!({ "pull": m.pull, "run": run(&m.run), "total": m.total(), "registryBlobBytes": m.registry.values().sum::<u64>(), "storeBytesRead": m.store });
        json!({
            "imageBytes": self.image, "compressedBytes": self.compressed, "cachedBytes": self.cached,
            "ordinary": measured(&self.ordinary), "ordinaryAgain": run(&self.ordinary_again),
            "slipway": measured(&self.lazy), "slipwayAgain": measured(&self.lazy_again),
            "convertSeconds": self.convert_seconds, "converted": self.converted,
            "speedup": self.speedup(), "costRatio": self.cost_ratio(),
        })
    }
}

/// Whether output goes to a terminal that shows colours.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    /// Use them.
    pub colour: bool,
}

impl Style {
    /// A step's headline.
    pub fn step(&self, text: &str) -> String {
        if self.colour { format!("\x1b[1;36m▸\x1b[0m {text}") } else { format!("> {text}") }
    }

    fn strong(&self, text: &str) -> String {
        if self.colour { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// One phase in one line, said as soon as it is over.
pub fn line(measured: &Measured) -> String {
    let (run, registry) = (&measured.run, measured.registry.values().sum::<u64>());
    format!(
        "  pull {}, container runs after {}, first output after {}; {} of blobs from the registry, {} from the store",
        seconds(measured.pull),
        seconds(measured.pull + run.started),
        seconds(measured.total()),
        bytes(registry),
        bytes(measured.store)
    )
}

fn seconds(value: f64) -> String {
    format!("{value:.2} s")
}

/// Decimal units, three significant digits.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_shown_with_three_digits() {
        let check = |count: u64, expected: &str| assert_eq!(bytes(count), expected);
        check(0, "0 B");
        check(999, "999 B");
        check(1000, "1.00 kB");
        check(12_345, "12.3 kB");
        check(999_499, "999 kB");
        check(999_500, "1.00 MB");
        check(3_456_000_000, "3.46 GB");
    }

    #[test]
    fn the_warm_run_is_taken_off_both_sides() {
        let run = |first_output: f64| Run { started: 0.5, first_output, output: "x".into() };
        let measured = |pull: f64, first_output: f64| Measured { pull, run: run(first_output), registry: Default::default(), store: 1 };
        let report = Report {
            image: 1000,
            compressed: 500,
            ordinary: measured(50.0, 4.0),
            ordinary_again: run(2.0),
            lazy: measured(0.5, 5.5),
            lazy_again: measured(0.0, 2.0),
            cached: 100,
            converted: json!({}),
            convert_seconds: 10.0,
        };
        assert_eq!((report.speedup(), report.cost_ratio()), (9.0, 13.0));
        let table = report.table(&Style { colour: false });
        assert!(table.contains("10.0 % of the image") && table.contains("13.0 times less"), "{table}");
    }
}
