//! What a conversion shows while it runs: bars on a terminal, plain lines otherwise, or JSON events, always on stderr.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use slipway::oci::Sha256;

use crate::printable::printable;

/// A long layer says something this often where there are no bars: seldom enough for a log, often enough to see that it lives.
const LINE_EVERY: Duration = Duration::from_secs(15);

/// The same for programs, which may draw bars of it.
const EVENT_EVERY: Duration = Duration::from_secs(1);

/// How a conversion reports.
pub enum Progress {
    /// Bars that are redrawn.
    Bars(MultiProgress),
    /// A line per event.
    Lines,
    /// A JSON object per event, each on a line of its own.
    Events,
    /// Nothing.
    Silent,
}

/// One layer's part of it.
pub struct LayerProgress<'a> {
    progress: &'a Progress,
    title: String,
    /// What every JSON event about this layer has.
    event: Value,
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
        let text = &printable(line);
        match self {
            // With the terminal or the pipe gone there is nobody to tell, which is no reason to stop. (`eprintln!` would panic.)
            Progress::Bars(bars) => drop(bars.println(text)),
            Progress::Lines => drop(writeln!(std::io::stderr(), "{text}")),
            Progress::Events => self.event(&json!({"event": "message", "message": line})),
            Progress::Silent => {}
        }
    }

    /// A JSON event, for those who asked for such.
    pub fn event(&self, event: &Value) {
        if let Progress::Events = self {
            // One write, so that lines of several threads do not mix.
            drop(std::io::stderr().write_all(format!("{event}\n").as_bytes()));
        }
    }

    /// Layer `number` of `count`, of `total` blob bytes, begins.
    pub fn layer(&self, number: usize, count: usize, digest: Sha256, total: u64) -> LayerProgress<'_> {
        let event = json!({"event": "layer", "layer": number, "layers": count, "digest": digest.oci(), "size": total});
        self.begin(layer_title(number, count, digest), event, total)
    }

    /// The same for sending it to a registry.
    pub fn push(&self, number: usize, count: usize, digest: Sha256, total: u64) -> LayerProgress<'_> {
        let event = json!({"event": "push", "layer": number, "layers": count, "digest": digest.oci(), "size": total});
        self.begin(push_title(number, count, digest), event, total)
    }

    fn begin(&self, title: String, event: Value, total: u64) -> LayerProgress<'_> {
        let bar = match self {
            Progress::Bars(bars) => {
                let template = "{prefix:36!} [{bar:30}] {bytes:>10}/{total_bytes} {binary_bytes_per_sec:>12} {eta:>4}";
                let style = ProgressStyle::with_template(template).expect("the template is well-formed");
                let bar = bars.add(ProgressBar::new(total).with_style(style.progress_chars("=> ")));
                bar.set_prefix(title.clone());
                Some(bar)
            }
            Progress::Lines => {
                self.say(&format!("{title}: {}", bytes(total)));
                None
            }
            Progress::Events | Progress::Silent => None,
        };
        let now = Instant::now();
        let layer = LayerProgress { progress: self, title, event, total, done: AtomicU64::new(0), started: now, last_line: Mutex::new(now), bar };
        layer.event("started", 0);
        layer
    }
}

/// How messages call a layer.
pub fn layer_title(number: usize, count: usize, digest: Sha256) -> String {
    format!("layer {number}/{count} {}", &digest.to_string()[..12])
}

/// How messages call the sending of a layer.
pub fn push_title(number: usize, count: usize, digest: Sha256) -> String {
    format!("pushing {}", layer_title(number, count, digest))
}

impl Default for Progress {
    fn default() -> Self {
        Progress::new()
    }
}

impl LayerProgress<'_> {
    /// More bytes of the blob were read.
    pub fn advance(&self, more: u64) {
        self.show(self.done.fetch_add(more, Ordering::Relaxed) + more);
    }

    /// So many bytes of it were sent: fewer than before if sending began anew.
    pub fn reach(&self, done: u64) {
        self.done.store(done, Ordering::Relaxed);
        self.show(done);
    }

    fn show(&self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            return;
        }
        let every = if let Progress::Events = self.progress { EVENT_EVERY } else { LINE_EVERY };
        let mut last = self.last_line.lock().expect("no panic while the time is held");
        if last.elapsed() >= every {
            *last = Instant::now();
            match self.progress {
                Progress::Events => self.event("running", done),
                progress => progress.say(&format!("{}: {} of {}", self.title, bytes(done), bytes(self.total))),
            }
        }
    }

    /// The layer is done.
    pub fn finish(self) {
        self.end("done");
    }

    /// The layer is sent.
    pub fn finish_push(self) {
        self.end(&format!("{} sent", bytes(self.total)));
    }

    fn end(&self, what: &str) {
        let seconds = self.started.elapsed().as_secs_f64();
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        match self.progress {
            Progress::Events => self.event("done", self.done.load(Ordering::Relaxed)),
            progress => progress.say(&format!("{}: {what} in {seconds:.1} s", self.title)),
        }
    }

    fn event(&self, state: &str, done: u64) {
        let mut event = self.event.clone();
        event["state"] = state.into();
        event["done"] = done.into();
        event["seconds"] = self.started.elapsed().as_secs_f64().into();
        self.progress.event(&event);
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
