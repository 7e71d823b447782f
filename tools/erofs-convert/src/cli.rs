//! The command line.

use std::path::PathBuf;
use std::thread::available_parallelism;

use clap::{Args, Parser, Subcommand, ValueEnum};
use erofs_convert::convert::target::TargetKind;
use erofs_convert::export::Target;
use slipway::oci::access::{CONTAINERD_CERTS, DOCKER_CERTS};
use slipway::oci::{Access, Logins, Platform};
use slipway::store::key::public_path;
use slipway::store::{KeyError, Trust, TrustFiles};

/// Convert OCI images into a Slipway store, and look at what is in one.
#[derive(Debug, Parser)]
#[command(name = "erofs-convert", version, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    #[command(flatten)]
    pub progress: ProgressArgs,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 image or platform not found, 4 the registry refuses access, 5 registry or network \
failed, 6 bytes are not what their digests say or an image differs from its source, 7 this machine cannot do it, 130 interrupted.

Results go to stdout; progress, warnings and errors to stderr. SLIPWAY_LOG filters the log (info, debug); NO_COLOR is respected.";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Convert an image: afterwards nodes that use the store start it lazily.
    ///
    /// SOURCE is a registry reference (debian:12, registry.example.com:5000/team/app:1.2, docker://…), oci:DIR[:TAG],
    /// oci-archive:FILE[:TAG], docker-archive:FILE[:REFERENCE|:@NUMBER] as `docker save` writes it (uncompressed), or a directory that is
    /// an OCI image layout. Layers already in the store are not downloaded again; after an interruption run the same command again.
    ///
    /// Logins of `docker login` and `podman login` are used, credential helpers included, and mirrors of containerd's hosts.toml.
    Convert(Convert),
    /// List the images in a store.
    Ls {
        #[command(flatten)]
        store: StoreArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Show one image: layers, packs, sizes.
    Show {
        /// Reference, or digest of the platform's manifest.
        image: String,
        #[command(flatten)]
        store: StoreArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Print a metadata image as text, one line per inode.
    Dump {
        /// Reference, digest of the platform's manifest, or digest of a metadata image.
        image: String,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Prove that a converted image is its source: reads the source's layers again and compares every file with what the store gives.
    ///
    /// With --mount, with what the kernel shows of it instead: content, all metadata, hard links. `slipwayd mount CHAIN DIR` mounts it.
    Check {
        /// Reference, or digest of the platform's manifest, of the converted image.
        image: String,
        #[command(flatten)]
        source: SourceArgs,
        /// Compare the tree mounted at DIR, rather than what the store has
        #[arg(long, value_name = "DIR")]
        mount: Option<PathBuf>,
        #[command(flatten)]
        store: StoreArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Write a converted image as a plain OCI image layout, from the store alone.
    ///
    /// With the source's configuration and the very bytes of its layers, so image ID and diff IDs are the source's. The layers are compressed
    /// anew, so their blobs and the manifest have digests of their own. Nothing is written unless all of it is right, and what says which
    /// configuration and layers are the image's must be signed by this converter's key or one that --trusted-key names.
    Export {
        /// Reference, or digest of the platform's manifest
        image: String,
        /// A directory that is empty or missing
        #[arg(value_name = "oci:DIR[:TAG]")]
        target: Target,
        #[command(flatten)]
        trust: TrustArgs,
        #[command(flatten)]
        store: StoreArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Print a shell's completion script.
    ///
    /// For bash: erofs-convert completion bash > /usr/share/bash-completion/completions/erofs-convert
    Completion {
        /// The shell
        shell: Shell,
    },
    /// Write the manual pages into a directory.
    #[command(hide = true)]
    Man {
        /// An existing directory
        dir: PathBuf,
    },
}

/// Shells that completion scripts are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// GNU bash
    Bash,
    /// The Z shell
    Zsh,
    /// fish
    Fish,
}

/// Arguments of `convert`.
#[derive(Debug, Args)]
pub struct Convert {
    #[command(flatten)]
    pub source: SourceArgs,
    #[command(flatten)]
    pub store: StoreArgs,
    /// Convert every Linux platform of an image for several; with --json the result is an array
    #[arg(long, conflicts_with = "platform")]
    pub all_platforms: bool,
    /// Push the image under this name too when it is converted, with a manifest that says what it was made from. Layers in the same registry
    /// are taken over, others copied. With --all-platforms the name is that of an index of them all
    #[arg(long, value_name = "REFERENCE")]
    pub target: Option<String>,
    /// What the target holds
    #[arg(long, value_name = "KIND", default_value = "portable", requires = "target")]
    pub target_kind: Kind,
    #[command(flatten)]
    pub own: OwnArgs,
    /// Layers converted at once [default: number of processors]
    #[arg(short, long, value_name = "N")]
    pub jobs: Option<std::num::NonZero<usize>>,
    #[command(flatten)]
    pub output: OutputArgs,
}

/// What this converter has of its own.
#[derive(Debug, Args)]
pub struct OwnArgs {
    /// This converter's directory, for its journal and key [default: /var/lib/slipway-convert for root, else below ~/.local/state]
    #[arg(long, value_name = "DIR", env = "SLIPWAY_CONVERT_STATE")]
    pub state: Option<PathBuf>,
    /// This converter's Ed25519 key, which signs what is published; made by the first conversion, its public half in FILE.pub [default: STATE/key.pem]
    #[arg(long, value_name = "FILE", env = "SLIPWAY_KEY")]
    pub key: Option<PathBuf>,
}

/// Whom to believe.
#[derive(Debug, Args)]
pub struct TrustArgs {
    #[command(flatten)]
    pub own: OwnArgs,
    /// Public key (key.pem.pub) of another converter to believe beside this one's own; may be given several times
    #[arg(long, value_name = "FILE")]
    pub trusted_key: Vec<PathBuf>,
}

/// What a target holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// The source's layers: runs anywhere, lazily where the source does
    Portable,
    /// No data: a manifest of a few kilobytes and the image's metadata. Runs only on nodes that have the store
    Compact,
}

impl From<Kind> for TargetKind {
    fn from(kind: Kind) -> TargetKind {
        match kind {
            Kind::Portable => TargetKind::Portable,
            Kind::Compact => TargetKind::Compact,
        }
    }
}

/// Where an image comes from.
#[derive(Debug, Args)]
pub struct SourceArgs {
    /// The image's source.
    #[arg(value_name = "SOURCE")]
    pub source: String,
    /// Platform to take from an image for several [default: this machine's; for check, that of the converted image]
    #[arg(long, value_name = "OS/ARCH")]
    pub platform: Option<Platform>,
    /// Use HTTP without TLS also for a registry that is not on this machine; logins are then sent unencrypted too
    #[arg(long)]
    pub plain_http: bool,
    /// CA certificates (PEM) to believe beside the system's; may be given several times. A registry on this machine is then asked over HTTPS
    #[arg(long, value_name = "FILE")]
    pub ca: Vec<PathBuf>,
    /// Directory of hosts.toml files and certificates, as containerd has it [default: /etc/containerd/certs.d, if it exists]
    #[arg(long, value_name = "DIR")]
    pub hosts_dir: Option<PathBuf>,
}

/// Which store.
#[derive(Debug, Args)]
pub struct StoreArgs {
    /// Directory of the store; for convert, an empty directory becomes one (a missing one is not made: its file system may not be mounted)
    #[arg(long, value_name = "DIR", env = "SLIPWAY_STORE")]
    pub store: PathBuf,
}

/// How results are printed.
#[derive(Debug, Args)]
pub struct OutputArgs {
    /// How to print the result
    #[arg(short, long, value_name = "FORMAT", env = "SLIPWAY_OUTPUT", default_value = "text")]
    output: Output,
    /// The same as --output json
    #[arg(long)]
    json: bool,
}

/// Forms of a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people
    Text,
    /// One JSON object
    Json,
}

/// What is shown while a command runs.
#[derive(Debug, Args)]
pub struct ProgressArgs {
    /// How to show progress on stderr
    #[arg(long, global = true, value_name = "HOW", env = "SLIPWAY_PROGRESS", default_value = "auto")]
    pub progress: Show,
    /// Show nothing but the result and errors: no progress, no warnings
    #[arg(short, long, global = true)]
    pub quiet: bool,
}

/// Ways of showing progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Show {
    /// Bars if stderr is a terminal, else plain
    Auto,
    /// A line for each event
    Plain,
    /// A JSON object for each event, also for log lines and the error
    Json,
    /// Nothing but warnings and errors
    None,
}

impl OutputArgs {
    /// A result is wanted as JSON.
    pub fn json(&self) -> bool {
        self.json || self.output == Output::Json
    }
}

impl SourceArgs {
    /// How registries are reached: as the arguments and this machine's files say.
    pub fn access(&self) -> Access {
        Access {
            plain_http: self.plain_http,
            ca: self.ca.clone(),
            hosts_dir: self.hosts_dir.clone().or_else(|| Some(PathBuf::from(CONTAINERD_CERTS)).filter(|dir| dir.is_dir())),
            docker_certs: Some(DOCKER_CERTS.into()),
            logins: Logins::of_environment(|name| std::env::var_os(name)),
        }
    }
}

impl OwnArgs {
    /// The state directory.
    pub fn state_dir(&self) -> PathBuf {
        if let Some(state) = &self.state {
            return state.clone();
        }
        let var = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = || var("HOME").map(|home| home.join(".local/state"));
        let root = rustix::process::geteuid().is_root();
        match if root { None } else { var("XDG_STATE_HOME").or_else(home) } {
            Some(dir) => dir.join("slipway-convert"),
            None => PathBuf::from("/var/lib/slipway-convert"),
        }
    }

    /// The key file.
    pub fn key_file(&self) -> PathBuf {
        self.key.clone().unwrap_or_else(|| self.state_dir().join("key.pem"))
    }
}

impl TrustArgs {
    /// The keys.
    pub fn load(&self) -> Result<Trust, KeyError> {
        let own = public_path(&self.own.key_file());
        // Who never converted has none.
        let own = own.exists().then_some(own);
        TrustFiles(own.into_iter().chain(self.trusted_key.iter().cloned()).collect()).load()
    }
}

impl Convert {
    /// Layers at once.
    pub fn jobs(&self) -> usize {
        self.jobs.map_or_else(|| available_parallelism().map_or(1, std::num::NonZero::get), std::num::NonZero::get)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn spellings_and_what_they_mean() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' ')).map_err(|e| e.exit_code());
        for line in [
            "erofs-convert convert debian:12 --store /s",
            "erofs-convert convert debian:12 --store /s --platform linux/arm64 --plain-http --json -j 3 --state /t --key /k",
            "erofs-convert convert debian:12 --store /s --all-platforms --ca /a --ca /b --hosts-dir /h",
            "erofs-convert convert debian:12 --store /s --target example.com/debian:12-acc",
            "erofs-convert convert debian:12 --store /s --target example.com/debian:12-acc --target-kind compact",
            "erofs-convert convert a --store /s --all-platforms --target b",
            "erofs-convert ls --store /s --json",
            "erofs-convert ls --store /s -o text -q",
            "erofs-convert --progress json show debian:12 --store /s --output json",
            "erofs-convert completion fish",
            "erofs-convert export debian:12 oci:/out:1 --store /s",
            "erofs-convert export debian:12 oci:/out:1 --store /s --state /t --trusted-key /a --trusted-key /b",
            "erofs-convert show debian:12 --store /s",
            "erofs-convert dump debian:12 --store /s",
            "erofs-convert check debian:12 oci:/img --store /s",
            "erofs-convert check debian:12 oci:/img --store /s --mount /mnt",
        ] {
            assert!(parse(line).is_ok(), "{line}");
        }
        for line in [
            "erofs-convert",
            "erofs-convert convert --store /s",
            "erofs-convert convert a --store /s --all-platforms --platform linux/arm64",
            "erofs-convert convert a --store /s --target b --target-kind small",
            "erofs-convert convert a --store /s --target-kind compact",
            "erofs-convert convert a --store /s -j 0",
            "erofs-convert ls --store /s x",
            "erofs-convert ls --store /s -o yaml",
            "erofs-convert ls --store /s --progress loud",
            "erofs-convert completion tcsh",
            "erofs-convert export debian:12 /out --store /s",
        ] {
            assert_eq!(parse(line).err(), Some(2), "{line}");
        }
        let Ok(Cli { command: Command::Convert(convert), .. }) = parse("erofs-convert convert a --store /s --state /t") else { panic!() };
        assert_eq!((convert.own.state_dir(), convert.own.key_file()), ("/t".into(), "/t/key.pem".into()));
    }
}
