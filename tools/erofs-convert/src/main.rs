//! `erofs-convert`: converts OCI images into a Slipway store and looks at what is in one.

mod cli;
mod docs;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::Parser;
use erofs_convert::check::{self, Differences};
use erofs_convert::convert::platforms::convert_all;
use erofs_convert::convert::target::TargetOptions;
use erofs_convert::convert::{Context, Options, convert, report};
use erofs_convert::export;
use erofs_convert::failure::Failure;
use erofs_convert::inspect;
use erofs_convert::progress::Progress;
use erofs_convert::stop;
use slipway::oci::{Platform, Source};
use slipway::store::Store;
use tracing_subscriber::EnvFilter;

use cli::{Cli, Command, ProgressArgs, Show};

fn main() -> ExitCode {
    let Cli { command, progress } = Cli::parse();
    start_log(&progress);
    let progress = match progress.progress {
        _ if progress.quiet => Progress::Silent,
        Show::Auto => Progress::new(),
        Show::Plain => Progress::Lines,
        Show::Json => Progress::Events,
        Show::None => Progress::Silent,
    };
    uapi::process::limit_malloc_arenas(MALLOC_ARENAS);
    // Layers that wait for those below them keep their packs open, and 1024 files are soon too few. Should it stay at that, most images convert.
    if let Err(error) = uapi::process::raise_open_file_limit() {
        tracing::warn!(%error, "the limit of open files cannot be raised");
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(RUNTIME_THREADS).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: cannot start threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    match run(command, runtime.handle(), &progress) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of our output has gone: nothing is wrong on our side.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(failure) => {
            // The exit code says it too, should nobody be reading.
            match progress {
                Progress::Events => progress.event(&failure.event()),
                _ => drop(writeln!(io::stderr(), "{}", failure.report())),
            }
            ExitCode::from(failure.exit_code())
        }
    }
}

/// Warnings on stderr, or what SLIPWAY_LOG asks for; as JSON beside JSON events.
fn start_log(progress: &ProgressArgs) {
    let level = if progress.quiet { "error" } else { "warn" };
    let filter = EnvFilter::try_from_env("SLIPWAY_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    if progress.progress == Show::Json && !progress.quiet {
        return log.json().flatten_event(true).init();
    }
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    log.with_ansi(io::stderr().is_terminal() && !no_color).init();
}

/// The runtime only moves bytes from sockets and files to the threads that do the work.
const RUNTIME_THREADS: usize = 2;

/// Units are allocated by one thread and freed by another, so every arena grows to what any of them held. Converting 4.7 GB on two
/// processors: 187 MB resident and 8.0 s of system time (page faults) with glibc's default, 139 MB and 2.6 s with two arenas.
const MALLOC_ARENAS: u16 = 2;

fn run(command: Command, runtime: &tokio::runtime::Handle, progress: &Progress) -> Result<(), Failure> {
    let stop = stop::on_signals(runtime).map_err(|source| Failure::State { path: "signal handlers".into(), source })?;
    let context = Context { runtime, stop: &stop, progress };
    let (text, json) = match command {
        Command::Convert(args) => {
            let source = Source::parse(&args.source.source, &args.source.access())?;
            let (name, platform) = (source.name(), args.source.platform.clone().unwrap_or_else(Platform::host));
            let (state, key, jobs) = (args.own.state_dir(), args.own.key_file(), args.jobs());
            let target =
                args.target.as_deref().map(|text| TargetOptions::parse(text, args.target_kind.into(), &args.source.access(), &source)).transpose()?;
            let options = Options { source, platform, store: args.store.store, state, key, jobs, target };
            if args.all_platforms {
                let done = convert_all(&context, &options)?;
                print(&report::all_text(&name, &done), args.output.json().then(|| report::all_json(&name, &done)))?;
                return report::all_failure(&name, done);
            }
            let done = convert(&context, &options)?;
            (report::text(&done), args.output.json().then(|| report::json(&done)))
        }
        Command::Ls { store, output } => {
            let images = inspect::images(&Store::open(&store.store)?)?;
            (inspect::list_text(&images), output.json().then(|| inspect::list_json(&images)))
        }
        Command::Show { image, store, output } => {
            let shown = inspect::show(&Store::open(&store.store)?, &image)?;
            (inspect::show_text(&shown), output.json().then(|| inspect::show_json(&shown)))
        }
        Command::Dump { image, store } => (inspect::dump(&Store::open(&store.store)?, &image)?, None),
        Command::Check { image, source, mount, store, output } => {
            let store = Store::open(&store.store)?;
            let root = inspect::find(&store, &image)?;
            // What was converted is compared, whatever this machine is.
            let converted = root.platform.parse().unwrap_or_else(|_| Platform::host());
            let platform = source.platform.clone().unwrap_or(converted);
            let source = Source::parse(&source.source, &source.access())?;
            let differences = check::check(&context, &store, &root, &source, &platform, mount.as_deref())?;
            print(&check::text(&differences), output.json().then(|| check::json(&differences)))?;
            return verdict(root.source, &differences);
        }
        Command::Export { image, target, trust, store, output } => {
            let (store, trust) = (Store::open(&store.store)?, trust.load()?);
            let root = store.trusted_image(&inspect::find(&store, &image)?, &trust)?;
            let done = export::export(&context, &store, &root, &target)?;
            (export::text(&done), output.json().then(|| export::json(&done)))
        }
        Command::Completion { shell } => (docs::completion(shell), None),
        Command::Man { dir } => {
            docs::write_man_pages(&dir).map_err(|source| Failure::Write { path: dir, source })?;
            (String::new(), None)
        }
    };
    print(&text, json)
}

fn verdict(image: String, differences: &Differences) -> Result<(), Failure> {
    match differences.count {
        0 => Ok(()),
        count => Err(Failure::Differs { image, count }),
    }
}

fn print(text: &str, json: Option<serde_json::Value>) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    let written = match json {
        Some(json) => writeln!(out, "{json}"),
        None => write!(out, "{text}"),
    };
    written.and_then(|()| out.flush()).map_err(Failure::Output)
}
