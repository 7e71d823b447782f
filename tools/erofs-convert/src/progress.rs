//! What a conversion shows while it runs: bars on a terminal, plain lines otherwise, always on stderr.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::printable::printable;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// A long layer says something this often where there are no bars: seldom enough for a log, often enough to see that it lives.
const LINE_EVERY: Duration = Duration::from_secs(15);

/// How a conversion reports.
pub enum Progress {
    /// Bars that are redrawn.
    Bars(MultiProgress),
    /// A line per event.
    Lines,
    /// Nothing, for tests and library use.
    Silent,
}

/// One layer's part of it.
pub struct LayerProgress<'a> {
    progress: &'a Progress,
    title: String,
    total: u64,
    done: AtomicU64,
    started: Instant,
    last_line: Mutex<Instant>,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Bars if stderr is a terminal, else lines.
    pub fn new() -> Progress {
        if std::io::stderr().is_terminal() { Progress::Bars(MultiProgress::new()) } else { Progress::Lines }
    }

    /// A line that stays.
    pub fn say(&self, line: &str) {
        let line = &printable(line);
        match self {
            // With the terminal or the pipe gone there is nobody to tell, which is no reason to stop. (`eprintln!` would panic.)
            Progress::Bars(bars) => drop(bars.println(line)),
            Progress::Lines => drop(writeln!(std::io::stderr(), "{line}")),
            Progress::Silent => {}
        }
    }

    /// A layer of `total` blob bytes begins.
    pub fn layer(&self, title: String, total: u64) -> LayerProgress<'_> {
        let bar = match self {
            Progress::Bars(bars) => {
                let template = "{prefix:36!} [{bar:30}] {bytes:>10}/{total_bytes} {binary_bytes_per_sec:>12} {eta:>4}";
                let style = ProgressStyle::with_template(template).expect("the template is well-formed");
                let bar = bars.add(ProgressBar::new(total).with_style(style.progress_chars("=> ")));
                bar.set_prefix(title.clone());
                Some(bar)
            }
            Progress::Lines | Progress::Silent => None,
        };
        if bar.is_none() {
            self.say(&format!("{title}: {}", bytes(total)));
        }
        let now = Instant::now();
        LayerProgress { progress: self, title, total, done: AtomicU64::new(0), started: now, last_line: Mutex::new(now), bar }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Progress::new()
    }
}

impl LayerProgress<'_> {
    /// More bytes of the blob were read.
    pub fn advance(&self, more: u64) {
        let done = self.done.fetch_add(more, Ordering::Relaxed) + more;
        if let Some(bar) = &self.bar {
            bar.inc(more);
            return;
        }
        let mut last = self.last_line.lock().expect("no panic while the time is held");
        if last.elapsed() >= LINE_EVERY {
            *last = Instant::now();
            self.progress.say(&format!("{}: {} of {}", self.title, bytes(done), bytes(self.total)));
        }
    }

    /// The layer is in the store.
    pub fn finish(self) {
        let line = format!("{}: done in {:.1} s", self.title, self.started.elapsed().as_secs_f64());
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.progress.say(&line);
    }
}

/// A size for people: at most one decimal, binary units.
pub fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_readable() {
        for (count, expected) in [(0, "0 B"), (1023, "1023 B"), (1 << 20, "1.00 MiB"), (3 << 30, "3.00 GiB")] {
            assert_eq!(bytes(count), expected);
        }
    }
}
