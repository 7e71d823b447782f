//! Everything a user can see of a directory tree, for comparing two of them.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result};
use rustix::io::Errno;

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeKind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// One file, directory, link or device of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// What it is.
    pub kind: NodeKind,
    /// Permission bits with set-id and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970 and nanoseconds.
    pub mtime: (i64, u32),
    /// Bytes of a file or of a symbolic link's target; 0 for everything else (a directory's size means nothing).
    pub size: u64,
    /// BLAKE3 of a file's content or of a symbolic link's target.
    pub content: Option<blake3::Hash>,
    /// Extended attributes.
    pub xattrs: BTreeMap<String, Vec<u8>>,
    /// For a file with several names: the first of them in path order. The same for all of them.
    pub link_group: Option<String>,
    /// Major and minor number of a device.
    pub device: Option<(u32, u32)>,
}

/// A whole tree: path below its root (the root itself is the empty path) → node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TreeDigest {
    nodes: BTreeMap<String, Node>,
}

/// One difference between two trees; printed as one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The path below the roots.
    pub path: String,
    /// What differs, both values told.
    pub what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "/{}: {}", self.path, self.what)
    }
}

impl TreeDigest {
    /// Reads a whole tree, every byte of it, without crossing into other mounts' directories by symbolic links. Paths that are not
    /// UTF-8 are shown with replacement characters.
    pub fn of(root: &Path) -> Result<TreeDigest> {
        let mut nodes = BTreeMap::new();
        let mut names_of: BTreeMap<(u64, u64), Vec<String>> = BTreeMap::new();
        let mut pending = vec![root.to_path_buf()];
        while let Some(path) = pending.pop() {
            let relative = path.strip_prefix(root).expect("everything pending lies below the root").to_string_lossy().into_owned();
            let metadata = fs::symlink_metadata(&path).with_context(|| format!("{} cannot be looked at", path.display()))?;
            if metadata.is_dir() {
                for entry in fs::read_dir(&path).with_context(|| format!("{} cannot be listed", path.display()))? {
                    pending.push(entry.with_context(|| format!("{} cannot be listed", path.display()))?.path());
                }
            } else if metadata.nlink() > 1 {
                names_of.entry((metadata.dev(), metadata.ino())).or_default().push(relative.clone());
            }
            let node = node(&path, &metadata).with_context(|| format!("{} cannot be read", path.display()))?;
            nodes.insert(relative, node);
        }
        for mut names in names_of.into_values().filter(|names| names.len() > 1) {
            names.sort();
            for name in &names {
                nodes.get_mut(name).expect("every name of a group was visited").link_group = Some(names[0].clone());
            }
        }
        Ok(TreeDigest { nodes })
    }

    /// The node at a path below the root.
    pub fn get(&self, path: &str) -> Option<&Node> {
        self.nodes.get(path)
    }

    /// All nodes in path order.
    pub fn nodes(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(path, node)| (path.as_str(), node))
    }

    /// How many nodes there are, the root included.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether nothing was read at all.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Every difference of `other` from this tree, in path order.
    pub fn differences(&self, other: &TreeDigest) -> Vec<Difference> {
        let mut paths: Vec<&String> = self.nodes.keys().chain(other.nodes.keys()).collect();
        paths.sort();
        paths.dedup();
        let mut found = Vec::new();
        for path in paths {
            let mut differ = |what: String| found.push(Difference { path: path.clone(), what });
            match (self.nodes.get(path), other.nodes.get(path)) {
                (Some(one), Some(two)) => compare(one, two, differ),
                (Some(one), None) => differ(format!("{:?} is missing in the second tree", one.kind)),
                (None, Some(two)) => differ(format!("{:?} is only in the second tree", two.kind)),
                (None, None) => unreachable!("the path came from one of them"),
            }
        }
        found
    }

    /// Panics with the differences (the first few of them) unless `other` is the same tree.
    pub fn assert_same(&self, other: &TreeDigest) {
        const SHOWN: usize = 25;
        let differences = self.differences(other);
        let shown: Vec<String> = differences.iter().take(SHOWN).map(Difference::to_string).collect();
        assert!(
            differences.is_empty(),
            "{} differences between two trees of {} and {} nodes:\n{}",
            differences.len(),
            self.len(),
            other.len(),
            shown.join("\n")
        );
    }
}

fn compare(one: &Node, two: &Node, mut differ: impl FnMut(String)) {
    if one.kind != two.kind {
        // Everything else then differs as well and says nothing.
        return differ(format!("{:?} became {:?}", one.kind, two.kind));
    }
    let mut field = |name: &str, one: String, two: String| {
        if one != two {
            differ(format!("{name} {one} became {two}"));
        }
    };
    field("mode", format!("{:04o}", one.mode), format!("{:04o}", two.mode));
    field("owner", format!("{}:{}", one.uid, one.gid), format!("{}:{}", two.uid, two.gid));
    field("mtime", format!("{}.{:09}", one.mtime.0, one.mtime.1), format!("{}.{:09}", two.mtime.0, two.mtime.1));
    field("size", one.size.to_string(), two.size.to_string());
    field("content", format!("{:?}", one.content), format!("{:?}", two.content));
    field("xattrs", format!("{:?}", one.xattrs), format!("{:?}", two.xattrs));
    field("hard link group", format!("{:?}", one.link_group), format!("{:?}", two.link_group));
    field("device", format!("{:?}", one.device), format!("{:?}", two.device));
}

fn node(path: &Path, metadata: &Metadata) -> Result<Node> {
    let kind_of = metadata.file_type();
    let kind = if kind_of.is_file() {
        NodeKind::File
    } else if kind_of.is_dir() {
        NodeKind::Dir
    } else if kind_of.is_symlink() {
        NodeKind::Symlink
    } else if kind_of.is_char_device() {
        NodeKind::CharDevice
    } else if kind_of.is_block_device() {
        NodeKind::BlockDevice
    } else if kind_of.is_fifo() {
        NodeKind::Fifo
    } else {
        NodeKind::Socket
    };
    let content = match kind {
        NodeKind::File => Some(blake3::Hasher::new().update_reader(File::open(path)?)?.finalize()),
        NodeKind::Symlink => Some(blake3::hash(fs::read_link(path)?.as_os_str().as_bytes())),
        _ => None,
    };
    let is_device = matches!(kind, NodeKind::CharDevice | NodeKind::BlockDevice);
    Ok(Node {
        kind,
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: (metadata.mtime(), u32::try_from(metadata.mtime_nsec()).context("nanoseconds are less than a second")?),
        size: if content.is_some() { metadata.size() } else { 0 },
        content,
        xattrs: xattrs(path)?,
        link_group: None,
        device: is_device.then(|| (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()))),
    })
}

/// All extended attributes of a file itself, symbolic links not followed.
fn xattrs(path: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    // What the kernel gives for one list or value at most (XATTR_LIST_MAX, XATTR_SIZE_MAX).
    let mut buffer = vec![0; 1 << 16];
    let length = match rustix::fs::llistxattr(path, &mut buffer[..]) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => 0,
        Err(errno) => return Err(errno).context("its extended attributes cannot be listed"),
    };
    let names = buffer[..length].to_vec();
    let mut found = BTreeMap::new();
    for name in names.split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        let name = OsStr::from_bytes(name);
        let length = rustix::fs::lgetxattr(path, name, &mut buffer[..]).with_context(|| format!("its extended attribute {name:?} cannot be read"))?;
        found.insert(name.to_string_lossy().into_owned(), buffer[..length].to_vec());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Scratch;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn sample(scratch: &Scratch, name: &str) -> std::path::PathBuf {
        let root = scratch.make_dir(name).expect("a directory");
        fs::create_dir(root.join("d")).expect("a directory");
        fs::write(root.join("d/one"), b"content").expect("a file");
        fs::hard_link(root.join("d/one"), root.join("d/two")).expect("a hard link");
        fs::write(root.join("alone"), b"").expect("a file");
        symlink("d/one", root.join("soft")).expect("a symbolic link");
        let time = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_nanos(1_500_000_000_123_456_789));
        for path in ["d/one", "alone", "d", ""] {
            File::open(root.join(path)).and_then(|file| file.set_times(time)).expect("times can be set");
        }
        let zero = rustix::fs::Timestamps {
            last_access: rustix::fs::Timespec { tv_sec: 0, tv_nsec: 0 },
            last_modification: rustix::fs::Timespec { tv_sec: 5, tv_nsec: 0 },
        };
        rustix::fs::utimensat(rustix::fs::CWD, root.join("soft"), &zero, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).expect("times can be set");
        root
    }

    #[test]
    fn equal_trees_have_no_differences_and_every_change_is_told() {
        let scratch = Scratch::new("tree").expect("a scratch directory");
        let one = TreeDigest::of(&sample(&scratch, "one")).expect("a tree");
        let root = sample(&scratch, "two");
        one.assert_same(&TreeDigest::of(&root).expect("a tree"));
        assert_eq!(one.get("d/one").and_then(|node| node.link_group.clone()), Some("d/one".into()));
        assert_eq!(one.get("alone").and_then(|node| node.link_group.clone()), None);

        let time = fs::metadata(root.join("alone")).and_then(|metadata| metadata.modified()).expect("a time");
        fs::remove_file(root.join("d/two")).expect("removed");
        fs::write(root.join("d/one"), b"c0ntent").expect("written");
        fs::set_permissions(root.join("alone"), fs::Permissions::from_mode(0o600)).expect("a mode");
        fs::write(root.join("new"), b"").expect("a file");
        fs::remove_file(root.join("soft")).expect("removed");
        fs::create_dir(root.join("soft")).expect("a directory");
        for path in ["d/one", "d", ""] {
            File::open(root.join(path)).and_then(|file| file.set_modified(time)).expect("a time");
        }
        let told: Vec<String> = one.differences(&TreeDigest::of(&root).expect("a tree")).iter().map(Difference::to_string).collect();
        let expected = [
            "/alone: mode 0644 became 0600",
            "/d/one: content",
            "/d/one: hard link group",
            "/d/two: File is missing",
            "/new: File is only",
            "/soft: Symlink became Dir",
        ];
        assert_eq!(told.len(), expected.len(), "{told:#?}");
        for (told, expected) in told.iter().zip(expected) {
            assert!(told.starts_with(expected), "{told:?} does not begin with {expected:?}");
        }
    }
}
