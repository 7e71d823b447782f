//! Why a command failed, and the exit code that says so.

use std::error::Error;
use std::io;
use std::path::PathBuf;

use erofs::fold::FoldError;
use erofs::image::{ImageError, TreeError};
use serde_json::{Value, json};
use slipway::oci::{ChainId, OciError, VerifyError};
use slipway::store::key::KeyError;
use slipway::store::record::MAX_PACKS;
use slipway::store::{KeyId, StoreError};

use crate::layer::ConvertError;
use crate::printable::printable;
use crate::stop::{INTERRUPTED, Stopped};

/// A command's failure. Variants are by who has to act: the image's owner, the store's, the user.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The image cannot be read.
    #[error(transparent)]
    Source(Box<OciError>),
    /// The store cannot be used.
    #[error(transparent)]
    Store(StoreError),
    /// Nobody whom we trust vouches for an image.
    #[error(
        "{} is signed by key {key}, which is not trusted here: convert the image again, or give that converter's public key (its key.pem.pub) \
         with --trusted-key", .path.display()
    )]
    Untrusted {
        /// The image root's file.
        path: PathBuf,
        /// Whose it says it is.
        key: KeyId,
    },
    /// The signing key cannot be used.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A layer's bytes are not those its manifest or configuration promises.
    #[error("{layer} of {image} is damaged; nothing of it was published, copy or push the image again")]
    Damaged {
        /// The layer.
        layer: String,
        /// The image.
        image: String,
        /// Both digests.
        #[source]
        source: Box<VerifyError>,
    },
    /// A layer is what it should be, but not something that can be converted.
    #[error("{layer} of {image} cannot be converted; nothing of it was published")]
    Layer {
        /// The layer.
        layer: String,
        /// The image.
        image: String,
        /// Why.
        #[source]
        source: Box<ConvertError>,
    },
    /// The image has nothing in it.
    #[error("{image} has no layers: there is nothing to convert")]
    NoLayers {
        /// The image.
        image: String,
    },
    /// The image is one that a conversion made.
    #[error("{image} has the layer of a compact image: it holds no files, only the metadata of others; convert {made_from}")]
    Compact {
        /// The image.
        image: String,
        /// What to convert instead.
        made_from: String,
    },
    /// Layers do not fit together.
    #[error("the layers up to chain {chain} do not fit together; build the image again")]
    Fold {
        /// The chain.
        chain: ChainId,
        /// Why.
        #[source]
        source: FoldError,
    },
    /// The folded tree is something EROFS cannot hold.
    #[error("the layers up to chain {chain} cannot become an EROFS image")]
    Tree {
        /// The chain.
        chain: ChainId,
        /// Why.
        #[source]
        source: TreeError,
    },
    /// A record of it would be passed over by every node.
    #[error(
        "{image} cannot be converted: its layers up to chain {chain} have {count} packs of file data, and an image can have {MAX_PACKS}; \
         each layer with file data has at least one, and one more for each GiB: build the image with fewer layers or less data"
    )]
    TooManyPacks {
        /// The image.
        image: String,
        /// A chain that has too many.
        chain: ChainId,
        /// How many it has.
        count: usize,
    },
    /// Own files of the converter.
    #[error("cannot use {}: give a writable directory with --state", .path.display())]
    State {
        /// The file or directory.
        path: PathBuf,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// A metadata image of the store is not what it should be.
    #[error("metadata image {digest} of the store is damaged; convert the image again")]
    Metadata {
        /// Its digest.
        digest: erofs::digest::Digest,
        /// What is wrong.
        #[source]
        source: ImageError,
    },
    /// The store has no such image.
    #[error("{name} is not in the store {}; `erofs-convert ls` shows what is", .store.display())]
    NotConverted {
        /// What was asked for.
        name: String,
        /// The store.
        store: PathBuf,
    },
    /// Several images have the name.
    #[error("{name} is in the store for several platforms: {}; name one by its manifest digest", .choices.join(", "))]
    Ambiguous {
        /// What was asked for.
        name: String,
        /// What there is.
        choices: Vec<String>,
    },
    /// `check` found differences.
    #[error("{image} differs from its source in {count} places")]
    Differs {
        /// The image.
        image: String,
        /// How many differences.
        count: usize,
    },
    /// The image is in the store, its target not in the registry.
    #[error("{image} is converted, but {target} was not pushed: run the same command again, which will only push")]
    Push {
        /// The image.
        image: String,
        /// The target.
        target: String,
        /// Why.
        #[source]
        source: Box<OciError>,
    },
    /// Some platforms of an image could not be converted; the others are.
    #[error(
        "{image}: {} of {count} platforms failed ({}), the others are converted{}",
        .failed.len(),
        .failed.join(", "),
        .target.iter().map(|target| format!(", but {target} was not pushed, as it would lack some")).collect::<String>()
    )]
    Platforms {
        /// The image.
        image: String,
        /// Which.
        failed: Vec<String>,
        /// How many there are.
        count: usize,
        /// What should have been pushed.
        target: Option<String>,
        /// Why the first of them failed.
        #[source]
        first: Box<Failure>,
    },
    /// The tree to compare with cannot be looked at.
    #[error("cannot read {}: give --mount the directory where the image is mounted, as root", .path.display())]
    Mounted {
        /// The file or directory.
        path: PathBuf,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// The tree to compare with is not the image alone.
    #[error("another file system is mounted at {}: give --mount a directory with the image and nothing mounted in it", .path.display())]
    MountedBelow {
        /// Where.
        path: PathBuf,
    },
    /// The store does not give a layer's bytes.
    #[error("{layer} cannot be read from the store: {what}; remove the damaged file, then convert the image again")]
    Data {
        /// Which layer of which image.
        layer: String,
        /// What is wrong.
        what: String,
    },
    /// A file the user asked for cannot be written.
    #[error("cannot write {}", .path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// A result could not be written to stdout.
    #[error("cannot write the result")]
    Output(#[source] io::Error),
    /// A signal, or the failure of something else that is reported instead.
    #[error("stopped; run it again and it goes on with the finished layers")]
    Stopped,
}

impl From<Stopped> for Failure {
    fn from(_: Stopped) -> Self {
        Failure::Stopped
    }
}

impl From<OciError> for Failure {
    fn from(error: OciError) -> Self {
        Failure::Source(Box::new(error))
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Untrusted { path, key } => Failure::Untrusted { path, key },
            error => Failure::Store(error),
        }
    }
}

/// What was thrown through an I/O error by one of our own readers or writers.
pub enum Thrown {
    /// The bytes were wrong.
    Verify(VerifyError),
    /// The source failed.
    Source(OciError),
    /// The store failed.
    Store(StoreError),
    /// The work was stopped.
    Stopped,
    /// None of ours.
    Other(io::Error),
}

impl Thrown {
    /// Unwraps `error`.
    pub fn of(error: io::Error) -> Thrown {
        if error.get_ref().is_none() {
            return Thrown::Other(error);
        }
        let kind = error.kind();
        let inner = error.into_inner().expect("the error has an inner one");
        let inner = match inner.downcast::<VerifyError>() {
            Ok(ours) => return Thrown::Verify(*ours),
            Err(inner) => inner,
        };
        let inner = match inner.downcast::<OciError>() {
            Ok(ours) => return Thrown::Source(*ours),
            Err(inner) => inner,
        };
        let inner = match inner.downcast::<StoreError>() {
            Ok(ours) => return Thrown::Store(*ours),
            Err(inner) => inner,
        };
        match inner.downcast::<Stopped>() {
            Ok(_) => Thrown::Stopped,
            // Decoders wrap the errors of what they read from.
            Err(inner) => match inner.downcast::<io::Error>() {
                Ok(wrapped) => Thrown::of(*wrapped),
                Err(inner) => Thrown::Other(io::Error::new(kind, inner)),
            },
        }
    }
}

impl Failure {
    /// The process's exit code; stable, listed in `--help`.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Source(error) => source_exit_code(error),
            Failure::Store(StoreError::NoOpenat2 { .. }) => 7,
            Failure::Store(StoreError::Damaged { .. })
            | Failure::Damaged { .. }
            | Failure::Metadata { .. }
            | Failure::Data { .. }
            | Failure::Differs { .. } => 6,
            Failure::NotConverted { .. } => 3,
            Failure::Ambiguous { .. } => 2,
            Failure::Push { source, .. } => source_exit_code(source),
            Failure::Platforms { first, .. } => first.exit_code(),
            Failure::Stopped => INTERRUPTED,
            _ => 1,
        }
    }

    /// The same as [`Failure::report`] as one JSON object, for those who read progress as JSON.
    pub fn event(&self) -> Value {
        let mut causes = Vec::new();
        let mut cause: Option<&dyn Error> = self.source();
        while let Some(error) = cause {
            causes.push(error.to_string());
            cause = error.source();
        }
        json!({"event": "error", "message": self.to_string(), "causes": causes, "exitCode": self.exit_code()})
    }

    /// The message with everything that led to it, one cause per line, whatever an image's documents hold.
    pub fn report(&self) -> String {
        if let Failure::Source(error) = self
            && let OciError::EveryHost { what, errors } = &**error
        {
            // One line for each, as its own text has them; but each made printable by itself.
            let line = |(host, error): &(String, OciError)| {
                let (mut text, mut cause) = (error.to_string(), error.source());
                while let Some(error) = cause {
                    text.push_str(&format!(": {error}"));
                    cause = error.source();
                }
                format!("\n  {}: {}", printable(host), printable(&text))
            };
            return format!("error: no host gave {}:{}", printable(what), errors.iter().map(line).collect::<String>());
        }
        let mut text = format!("error: {}", printable(&self.to_string()));
        if let Failure::Platforms { first, .. } = self {
            return format!("{text}\n  because: {}", first.report().trim_start_matches("error: "));
        }
        let mut cause: Option<&dyn Error> = self.source();
        while let Some(error) = cause {
            text.push_str(&format!("\n  because: {}", printable(&error.to_string())));
            cause = error.source();
        }
        text
    }
}

fn source_exit_code(error: &OciError) -> u8 {
    match error {
        OciError::BadReference { .. } => 2,
        OciError::NotFound { .. } | OciError::MissingPlatform { .. } => 3,
        OciError::Denied { .. } => 4,
        OciError::Unreachable { .. } | OciError::Status { .. } => 5,
        OciError::Damaged { .. } | OciError::Rejected { .. } => 6,
        // What the registry itself said counts; the last host is the registry, unless that was found to be down before.
        OciError::EveryHost { errors, .. } => errors.last().map_or(1, |(_, error)| source_exit_code(error)),
        OciError::Malformed { .. }
        | OciError::Unsupported { .. }
        | OciError::Layout { .. }
        | OciError::Archive { .. }
        | OciError::HostsFile { .. }
        | OciError::Certificate { .. }
        | OciError::Client { .. } => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_image_says_of_itself_cannot_pass_for_a_message_of_ours() {
        let reason = "its media type is \u{1b}[2Jx\nerror: all is lost".to_owned();
        let inner = OciError::Unsupported { what: "the manifest of app:1\r".to_owned(), reason };
        let source = ConvertError::Read { offset: 0, source: io::Error::other("\u{1b}c\nerror: x") };
        let outer = Failure::Layer { layer: "layer 1".to_owned(), image: "app:1".to_owned(), source: Box::new(source) };
        let status = |detail: &str| OciError::Status { host: "h".to_owned(), what: "m".to_owned(), status: 500, tries: 1, detail: detail.to_owned() };
        let errors = vec![("mirror".to_owned(), status("; \u{1b}\nerror: x")), ("registry".to_owned(), status(""))];
        let every = OciError::EveryHost { what: "manifest 1".to_owned(), errors };
        for (failure, lines) in [(Failure::from(inner), 1), (outer, 3), (every.into(), 3)] {
            let report = failure.report();
            assert!(!report.chars().any(|c| c.is_control() && c != '\n'), "{report:?}");
            assert_eq!(report.lines().count(), lines, "{report:?}");
            assert!(report.contains("\\u{1b}") && report.contains("\\nerror: "), "{report:?}");
        }
    }
}
