//! Putting images into the mount tree: the ways to do it, what works on this machine, and the mount itself.
//!
//! An image is EROFS metadata in a local, verified file plus one device per pack. The ways differ in where the kernel reads the devices:
//! `direct` has them complete in the local cache; a [`Lazy`] way gets the kernel's requests and answers them. What works is found out by doing
//! it ([`probe_file_backed`], [`PackDir::mount`]), never by a version number.

mod cache_objects;
mod pack_dir;

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use erofs::digest::Digest;
use erofs::image::Checked;
use erofs::meta::Attr;
use erofs::tree::{Body, Inode, Tree};
use serde::{Deserialize, Serialize};
use uapi::mount::{MountError, Unmount, erofs_file_backed, erofs_fscache, unmount};

use crate::cache::Pack;

pub use cache_objects::{CacheObjects, CacheObjectsError};
pub use pack_dir::{Keeper, PackDir, PackDirError, Start};

/// A way to mount an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// File-backed EROFS whose devices are the complete packs of the local cache. Nothing of ours is in the path.
    Direct,
    /// File-backed EROFS whose devices are files of our FUSE directory.
    FuseBlob,
    /// EROFS over `/dev/cachefiles` in on-demand mode.
    Fscache,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Way::Direct => "direct",
            Way::FuseBlob => "fuse-blob",
            Way::Fscache => "fscache",
        })
    }
}

/// What EROFS is to be told about where an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Files for the extra devices, in the order of the image's device table. The metadata is its own local file.
    Files(Vec<PathBuf>),
    /// Cache objects of `/dev/cachefiles`: the metadata under `fsid`, the devices under their tags.
    Fscache {
        /// Cookie of the metadata.
        fsid: String,
        /// Mounts of one domain share devices.
        domain: Option<String>,
    },
}

/// A way whose data comes on demand. One per worker and way.
pub trait Lazy: Send + Sync {
    /// Which way this is.
    fn way(&self) -> Way;

    /// Makes an image mountable: its packs (in the order of its device table) and, where the kernel does not read it from a file, its metadata
    /// `digest` at `metadata`, which is verified. Blocks. Doing it again is no error.
    fn prepare(&self, digest: &Digest, metadata: &Path, packs: &[Arc<Pack>]) -> Result<Source, PrepareError>;

    /// These packs are in no mount any more.
    fn release(&self, packs: &[Digest]);
}

/// A lazy way could not take an image on.
#[derive(Debug, thiserror::Error)]
#[error("the backend {way} cannot serve this image")]
pub struct PrepareError {
    /// Which way.
    pub way: Way,
    /// Why.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// Mounts the image whose verified metadata is the file `metadata` at the existing directory `at`: read-only, without devices, set-user-id or
/// symlinks that are followed, because only overlayfs is to look at it.
pub fn mount_image(metadata: &Path, source: &Source, at: &Path) -> Result<(), MountError> {
    match source {
        Source::Files(devices) => erofs_file_backed(metadata, devices, at),
        Source::Fscache { fsid, domain } => erofs_fscache(fsid, domain.as_deref(), at),
    }
}

/// A way that does not work on this machine, and why.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// The kernel refused a mount that should work.
    #[error("a trial mount was refused")]
    Refused(#[from] MountError),
    /// The trial could not be set up.
    #[error("a trial mount could not be set up at {}", path.display())]
    Setup {
        /// What was being made or read.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Mounts an empty image of 4 KiB from a file in `dir` (made if missing) and looks into it: what `direct` and `fuse-blob` need of the kernel.
pub fn probe_file_backed(dir: &Path) -> Result<(), Unusable> {
    let setup = |path: &Path| {
        let path = path.to_owned();
        move |source| Unusable::Setup { path, source }
    };
    let (image, at) = (dir.join("empty.erofs"), dir.join("at"));
    unmount(&at, Unmount::Detach)?;
    fs::create_dir_all(&at).map_err(setup(&at))?;
    fs::write(&image, empty_image()).map_err(setup(&image))?;
    mount_image(&image, &Source::Files(Vec::new()), &at)?;
    let seen = fs::read_dir(&at).map(Iterator::count).map_err(setup(&at));
    // Detached, because it is over: somebody who looks at every new mount may be in it.
    unmount(&at, Unmount::Detach)?;
    match seen? {
        0 => Ok(()),
        _ => Err(setup(&at)(io::Error::other("the empty image does not look empty"))),
    }
}

/// The smallest image: a root directory with nothing in it.
fn empty_image() -> Vec<u8> {
    let root = Inode { attr: Attr { mode: 0o755, ..Attr::default() }, body: Body::Dir(std::collections::BTreeMap::new()) };
    let checked = Checked::new(Tree { packs: Vec::new(), inodes: vec![root] }).expect("an empty root directory is a valid tree");
    erofs::image::write(&checked).bytes
}

/// The text is no way to mount.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no backend: it is one of direct, fuse-blob, fscache")]
pub struct BadWay(String);

impl FromStr for Way {
    type Err = BadWay;

    fn from_str(text: &str) -> Result<Way, BadWay> {
        match text {
            "direct" => Ok(Way::Direct),
            "fuse-blob" => Ok(Way::FuseBlob),
            "fscache" => Ok(Way::Fscache),
            _ => Err(BadWay(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_have_one_name_everywhere() {
        for (way, name) in [(Way::Direct, "direct"), (Way::FuseBlob, "fuse-blob"), (Way::Fscache, "fscache")] {
            assert_eq!(way.to_string(), name);
            assert_eq!(name.parse::<Way>().ok(), Some(way));
            assert_eq!(serde_json::to_value(way).expect("json"), name);
        }
        assert!("overlay".parse::<Way>().is_err());
    }
}
