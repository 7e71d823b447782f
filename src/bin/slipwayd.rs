//! `slipwayd`: the node daemon, and small tools to look at what it does.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use slipway::config::{BackendChoice, Config};
use slipway::node::client::{Client, mount_all};
use slipway::node::holder::{self, HolderOptions};
use slipway::node::worker;
use slipway::oci::ChainId;
use slipway::store::{Store, TrustFiles};
use tracing_subscriber::EnvFilter;
use uapi::mount::{Unmount, unmount};

/// Where the configuration is unless said otherwise.
const CONFIG: &str = "/etc/slipway/slipwayd.toml";

/// Exit status for a command line or a configuration that cannot be used, as clap's own.
const EXIT_USAGE: u8 = 2;

/// Exit status when the daemon or what is asked for is not there.
const EXIT_NOT_FOUND: u8 = 3;

/// The Slipway node daemon: containers start before their images arrive.
///
/// It serves containerd as a snapshotter on a unix socket and answers the kernel's read requests for images mounted lazily from the store.
/// Run as root by a service manager, ordered before containerd. SIGTERM stops it and leaves mounts in place; SIGHUP restarts the serving part,
/// which is also how an upgrade is put to work: containers only wait a moment.
#[derive(Parser)]
#[command(name = "slipwayd", version, arg_required_else_help = false)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    config: ConfigArg,
}

#[derive(Args, Clone)]
struct ConfigArg {
    /// The configuration file
    #[arg(long, short, global = true, value_name = "FILE", env = "SLIPWAYD_CONFIG", default_value = CONFIG)]
    config: PathBuf,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon (what happens without a command)
    Run,
    /// Check the configuration file and say what it sets
    ///
    /// What `run` would refuse is an error. What may come later, such as a store that is not mounted now, is a warning.
    CheckConfig,
    /// Mount an image of the store read-only at a directory, without containerd
    ///
    /// The image is a view of the running daemon, shown by overlayfs as a container would see it, until `slipwayd umount DIR`. A containerd on this
    /// node forgets views that are not its own at its next garbage collection; what is mounted at DIR stays readable.
    Mount {
        /// Chain ID of the image's top layer: sha256:<64 hex digits>, as `erofs-convert show` prints it
        chain: ChainId,
        /// An existing directory
        dir: PathBuf,
    },
    /// Undo `slipwayd mount`
    Umount {
        /// The directory given to `mount`
        dir: PathBuf,
    },
    /// The serving part; started by `run`
    #[command(hide = true)]
    Worker,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let config = match load(&cli.config.config) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("slipwayd: {error:#}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let done = match cli.command.unwrap_or(Command::Run) {
        Command::Run => run(&config, &cli.config.config),
        Command::Worker => work(&config),
        Command::CheckConfig => Ok(check_config(&config)),
        Command::Mount { chain, dir } => mount_view(&config, &chain, &dir),
        Command::Umount { dir } => unmount_view(&config, &dir),
    };
    done.unwrap_or_else(|error| {
        // With all causes: each line of the chain tells one step.
        eprintln!("slipwayd: {error:#}");
        ExitCode::FAILURE
    })
}

fn load(path: &Path) -> anyhow::Result<Config> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("the configuration file {} cannot be read: give one with --config", path.display()))?;
    Config::parse(&text).with_context(|| format!("the configuration file {} cannot be used", path.display()))
}

/// Every setting with its value, whether it was given or is a default.
fn settings(config: &Config) -> String {
    let Config { store, state, cache, run, socket, backend, trusted_keys, log } = config;
    let backend = match backend {
        BackendChoice::Auto => "auto",
        BackendChoice::FuseBlob => "fuse-blob",
        BackendChoice::Fscache => "fscache",
    };
    let paths = [("store", store), ("state", state), ("cache", cache), ("run", run), ("socket", socket)];
    let mut lines: Vec<String> = paths.iter().map(|(name, path)| format!("{name} = {path:?}")).collect();
    lines.extend([format!("backend = {backend:?}"), format!("trusted_keys = {trusted_keys:?}"), format!("log = {log:?}"), String::new()]);
    lines.join("\n")
}

fn check_config(config: &Config) -> ExitCode {
    print!("{}", settings(config));
    absent(config).iter().for_each(|warning| eprintln!("slipwayd: warning: {warning:#}"));
    let refused = refused(config);
    refused.iter().for_each(|error| eprintln!("slipwayd: {error:#}"));
    if refused.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_USAGE) }
}

/// What `run` would not start with.
fn refused(config: &Config) -> Vec<anyhow::Error> {
    let socket = std::os::unix::net::SocketAddr::from_pathname(&config.socket);
    let state = future_path(&config.state).and_then(|state| Ok(worker::check_state_path(&state)?));
    let others = [&config.cache, &config.run].map(|dir| future_path(dir).map(drop));
    let socket = socket.map(drop).with_context(|| format!("the socket {} cannot be made", config.socket.display()));
    [log_filter(config).map(drop), state, socket].into_iter().chain(others).filter_map(Result::err).collect()
}

/// What is not there, without which every pull is a plain one until it is.
fn absent(config: &Config) -> Vec<anyhow::Error> {
    let (trust, errors) = TrustFiles(config.trusted_keys.clone()).load_readable();
    let mut absent: Vec<anyhow::Error> = errors.into_iter().map(Into::into).collect();
    if trust.0.is_empty() {
        absent.push(anyhow::anyhow!("there is no key to trust: no image is used"));
    }
    absent.extend(Store::open(&config.store).err().map(anyhow::Error::from));
    absent
}

/// A directory's path without symlinks, also if it is still to be made.
fn future_path(dir: &Path) -> anyhow::Result<PathBuf> {
    let there = dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    if !there.is_dir() {
        bail!("{} cannot be made: {} is no directory", dir.display(), there.display());
    }
    let real = there.canonicalize().with_context(|| format!("{} cannot be looked at", there.display()))?;
    // Without the separator that joining nothing would add.
    let rest = dir.strip_prefix(there).unwrap_or(dir);
    Ok(if rest.as_os_str().is_empty() { real } else { real.join(rest) })
}

fn log_filter(config: &Config) -> anyhow::Result<EnvFilter> {
    EnvFilter::try_new(&config.log).with_context(|| format!("the log filter {:?} of the configuration cannot be used", config.log))
}

fn log_to_stderr(config: &Config) -> anyhow::Result<()> {
    let filter = log_filter(config)?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    // Otherwise a line that cannot be written (a full disk, a log that went away) is reported with `eprintln`, which panics for the same reason;
    // in the holder that would be the end of every mount.
    lines.log_internal_errors(false).init();
    Ok(())
}

fn run(config: &Config, config_file: &Path) -> anyhow::Result<ExitCode> {
    // First of all: these descriptors have numbers that anything opened later would take.
    let passed = uapi::process::take_passed_fds().context("passed descriptors cannot be taken")?;
    log_to_stderr(config)?;
    let limit = uapi::process::raise_open_file_limit().context("the limit of open files cannot be raised")?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), open_files = limit, "slipwayd");
    let config_file = std::path::absolute(config_file)?;
    let options = HolderOptions {
        run_dir: config.run.clone(),
        state_dir: config.state.clone(),
        cache_dir: config.cache.clone(),
        socket: config.socket.clone(),
        // By path, not /proc/self/exe: a restart of the worker runs what has been installed since.
        worker: std::env::current_exe().context("the path of this program is not known")?,
        fallback: Some("/proc/self/exe".into()),
        worker_args: vec![OsString::from("worker"), OsString::from("--config"), config_file.clone().into()],
        holder_args: vec![OsString::from("run"), OsString::from("--config"), config_file.into()],
    };
    holder::run(&options, passed)?;
    Ok(ExitCode::SUCCESS)
}

fn work(config: &Config) -> anyhow::Result<ExitCode> {
    uapi::process::unblock_signals().context("the holder's blocked signals cannot be let through")?;
    let holder = uapi::process::take_stdin().context("the holder's line cannot be taken")?;
    log_to_stderr(config)?;
    worker::run(config, holder)?;
    Ok(ExitCode::SUCCESS)
}

/// What a view is called that shows an image at `dir`.
fn view_key(dir: &Path) -> anyhow::Result<(PathBuf, String)> {
    let dir = dir.canonicalize().with_context(|| format!("{} is not a directory that can be used", dir.display()))?;
    let key = format!("slipwayd-mount {}", dir.display());
    Ok((dir, key))
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

fn mount_view(config: &Config, chain: &ChainId, dir: &Path) -> anyhow::Result<ExitCode> {
    let (dir, key) = view_key(dir)?;
    let trust = TrustFiles(config.trusted_keys.clone()).load().context("the trusted keys cannot be read")?;
    let store = Store::open(&config.store)?;
    if store.find(chain, &trust)?.is_none() {
        eprintln!("slipwayd: {} has no record of chain {} that a trusted key signed", config.store.display(), chain.oci());
        return Ok(ExitCode::from(EXIT_NOT_FOUND));
    }
    runtime()?.block_on(async {
        let mut client = Client::connect(&config.socket).await?;
        let mounts = client.view(&key, chain).await?;
        if let Err(error) = mount_all(&mounts, &dir) {
            client.remove_view(&key).await?;
            bail!(error);
        }
        Ok(ExitCode::SUCCESS)
    })
}

fn unmount_view(config: &Config, dir: &Path) -> anyhow::Result<ExitCode> {
    let (dir, key) = view_key(dir)?;
    unmount(&dir, Unmount::IfUnused)?;
    runtime()?.block_on(async {
        Client::connect(&config.socket).await?.remove_view(&key).await?;
        Ok(ExitCode::SUCCESS)
    })
}
