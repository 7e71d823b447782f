//! `slipwayd`'s configuration: TOML text in, [`Config`] out. Reading the file is the caller's job.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Public half of the key that root's `erofs-convert` makes on this machine unless told otherwise. A node whose configuration names no key
/// trusts it: the single-machine set-up.
pub const LOCAL_PUBLIC_KEY: &str = "/var/lib/slipway-convert/key.pem.pub";

const VERSION: u32 = 1;

/// The settings of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The store's directory on the shared file system.
    pub store: PathBuf,
    /// Private state that survives restarts: ledger, local metadata, mount points. Default `/var/lib/slipway`.
    pub state: PathBuf,
    /// Local copies of file data. Default `cache` below the state directory; on a file system of its own in production.
    pub cache: PathBuf,
    /// Runtime files. Default `/run/slipway`.
    pub run: PathBuf,
    /// The gRPC socket containerd connects to. Default `slipway.sock` in the run directory.
    pub socket: PathBuf,
    /// How the kernel's read requests are got. Default `auto`.
    pub backend: BackendChoice,
    /// Files of the public keys whose records this node believes. Default: the local converter's, [`LOCAL_PUBLIC_KEY`].
    pub trusted_keys: Vec<PathBuf>,
    /// Log filter in the syntax of `tracing-subscriber`'s `EnvFilter`. Default `info`.
    pub log: String,
}

/// Setting `backend`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackendChoice {
    /// The best that a probe finds working.
    #[default]
    Auto,
    /// File-backed EROFS with packs on our FUSE mount.
    FuseBlob,
    /// EROFS over fscache.
    Fscache,
}

/// The configuration cannot be used. Line and column count from 1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {message}")]
pub struct ConfigError {
    /// Line of the fault.
    pub line: usize,
    /// Column of the fault, in characters.
    pub column: usize,
    /// What is wrong and what is expected.
    pub message: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    version: toml::Spanned<u32>,
    store: toml::Spanned<PathBuf>,
    state: Option<toml::Spanned<PathBuf>>,
    cache: Option<toml::Spanned<PathBuf>>,
    run: Option<toml::Spanned<PathBuf>>,
    socket: Option<toml::Spanned<PathBuf>>,
    #[serde(default)]
    backend: BackendChoice,
    trusted_keys: Option<Vec<toml::Spanned<PathBuf>>>,
    log: Option<String>,
}

impl Config {
    /// Parses the text of a configuration file. Unknown settings, relative paths and other versions are errors.
    pub fn parse(text: &str) -> Result<Config, ConfigError> {
        let raw: Text = toml::from_str(text).map_err(|e| ConfigError::at(text, e.span().map_or(0, |s| s.start), e.message().to_owned()))?;
        if *raw.version.get_ref() != VERSION {
            let message = format!("configuration version {} is not known: this slipwayd reads version {VERSION}", raw.version.get_ref());
            return Err(ConfigError::at(text, raw.version.span().start, message));
        }
        let absolute = |path: toml::Spanned<PathBuf>| {
            if path.get_ref().is_absolute() {
                return Ok(path.into_inner());
            }
            let message = format!("{:?} is not an absolute path: start it with /", path.get_ref());
            Err(ConfigError::at(text, path.span().start, message))
        };
        let or = |path: Option<toml::Spanned<PathBuf>>, default: &dyn Fn() -> PathBuf| path.map_or_else(|| Ok(default()), absolute);
        let state = or(raw.state, &|| Path::new("/var/lib/slipway").to_owned())?;
        let run = or(raw.run, &|| Path::new("/run/slipway").to_owned())?;
        Ok(Config {
            store: absolute(raw.store)?,
            cache: or(raw.cache, &|| state.join("cache"))?,
            socket: or(raw.socket, &|| run.join("slipway.sock"))?,
            backend: raw.backend,
            trusted_keys: match raw.trusted_keys {
                Some(keys) => keys.into_iter().map(absolute).collect::<Result<_, _>>()?,
                None => vec![LOCAL_PUBLIC_KEY.into()],
            },
            log: raw.log.unwrap_or_else(|| "info".to_owned()),
            state,
            run,
        })
    }
}

impl ConfigError {
    fn at(text: &str, offset: usize, message: String) -> ConfigError {
        let before = text.get(..offset).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        ConfigError { line: before.matches('\n').count() + 1, column: before[line_start..].chars().count() + 1, message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_store_alone_is_enough() {
        let config = Config::parse("version = 1\nstore = \"/mnt/ufs\"\n").unwrap();
        assert_eq!(
            config,
            Config {
                store: "/mnt/ufs".into(),
                state: "/var/lib/slipway".into(),
                cache: "/var/lib/slipway/cache".into(),
                run: "/run/slipway".into(),
                socket: "/run/slipway/slipway.sock".into(),
                backend: BackendChoice::Auto,
                trusted_keys: vec![LOCAL_PUBLIC_KEY.into()],
                log: "info".into(),
            }
        );
    }

    #[test]
    fn every_setting_is_taken_and_defaults_follow_the_directories() {
        let text = "version = 1\nstore = \"/s\"\nstate = \"/st\"\nrun = \"/r\"\nbackend = \"fuse-blob\"\ntrusted_keys = [\"/a\", \"/b\"]\nlog = \"slipway=debug\"";
        let config = Config::parse(text).unwrap();
        assert_eq!((config.cache, config.socket), ("/st/cache".into(), "/r/slipway.sock".into()));
        assert_eq!((config.backend, config.log.as_str()), (BackendChoice::FuseBlob, "slipway=debug"));
        assert_eq!(config.trusted_keys, [PathBuf::from("/a"), PathBuf::from("/b")]);
        let text = "version = 1\nstore = \"/s\"\ncache = \"/c\"\nsocket = \"/k\"\nbackend = \"fscache\"\ntrusted_keys = []";
        let config = Config::parse(text).unwrap();
        assert_eq!((config.cache, config.socket, config.backend, config.trusted_keys), ("/c".into(), "/k".into(), BackendChoice::Fscache, vec![]));
    }

    #[test]
    fn mistakes_are_named_with_line_and_column() {
        let check = |text: &str, line: usize, column: usize, part: &str| {
            let error = Config::parse(text).unwrap_err();
            assert_eq!((error.line, error.column), (line, column), "{text:?}: {error}");
            assert!(error.message.contains(part), "{text:?}: {error}");
        };
        check("", 1, 1, "missing field `version`");
        check("version = 1", 1, 1, "missing field `store`");
        check("version = 2\nstore = \"/s\"", 1, 11, "version 2");
        check("version = 1\nstore = \"s\"", 2, 9, "absolute");
        check("version = 1\nstore = 3", 2, 9, "string");
        check("version = 1\nstore = \"/s\"\nsotre = \"/s\"", 3, 1, "unknown field `sotre`");
        check("version = 1\nstore = \"/s\"\nbackend = \"nbd\"", 3, 11, "unknown variant `nbd`");
        check("version = 1\nstore = \"/s\"\ntrusted_keys = [\"/é\", \"k\"]", 3, 23, "absolute");
        check("version = 1\nstore = \"/s", 2, 12, "");
    }

    proptest! {
        #[test]
        fn any_text_is_a_config_or_an_error(text in "(version = 1\n)?(store = \"/s\"\n)?\\PC{0,40}") {
            let _ = Config::parse(&text);
        }
    }
}
