//! A mounted image as the system calls show it, in the form that is compared: what a container would see, through the kernel and the node.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use erofs::block::UnitBits;
use erofs::digest::Digest;
use erofs::meta::{Attr, Content, Data, Device, Time, Xattr};
use erofs::tree::{Body, Inode, InodeIndex, Tree};
use rustix::fs::{major, minor};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use crate::failure::Failure;

/// What is read of a file at once.
const PIECE: usize = 1 << 20;

/// What the kernel gives for one list or value of extended attributes at most (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const XATTRS: usize = 64 << 10;

/// The tree below a directory. Regular files have a size and no chunks: their bytes are read with [`Mounted::digest`].
pub struct Mounted {
    /// Everything but file data.
    pub tree: Tree,
    /// A path of every inode.
    paths: Vec<PathBuf>,
}

impl Mounted {
    /// Walks the tree at `dir`.
    pub fn walk(dir: &Path, stop: &CancellationToken) -> Result<Mounted, Failure> {
        let mut walk = Walk { mounted: Mounted { tree: Tree { packs: Vec::new(), inodes: Vec::new() }, paths: Vec::new() }, known: HashMap::new() };
        let device = fs::metadata(dir).map_err(failed(dir))?.dev();
        walk.add(dir.to_owned(), &fs::metadata(dir).map_err(failed(dir))?)?;
        // Directories come after their parents, and are visited when their number is reached.
        let mut next = 0;
        while next < walk.mounted.paths.len() {
            if stop.is_cancelled() {
                return Err(Failure::Stopped);
            }
            if let Body::Dir(_) = walk.mounted.tree.inodes[next].body {
                walk.directory(next, device)?;
            }
            next += 1;
        }
        Ok(walk.mounted)
    }

    /// BLAKE3 of a file's bytes as read(2) gives them.
    pub fn digest(&self, inode: InodeIndex) -> io::Result<Digest> {
        let mut file = File::open(&self.paths[inode.0 as usize])?;
        let (mut hasher, mut piece) = (blake3::Hasher::new(), vec![0; PIECE]);
        loop {
            match file.read(&mut piece) {
                Ok(0) => return Ok(Digest(*hasher.finalize().as_bytes())),
                Ok(len) => drop(hasher.update(&piece[..len])),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

struct Walk {
    mounted: Mounted,
    /// Files with several names, by device and inode number.
    known: HashMap<(u64, u64), InodeIndex>,
}

impl Walk {
    fn directory(&mut self, index: usize, device: u64) -> Result<(), Failure> {
        let dir = self.mounted.paths[index].clone();
        let mut children = BTreeMap::new();
        for entry in fs::read_dir(&dir).map_err(failed(&dir))? {
            let entry = entry.map_err(failed(&dir))?;
            let path = entry.path();
            let metadata = fs::symlink_metadata(&path).map_err(failed(&path))?;
            if metadata.is_dir() && metadata.dev() != device {
                return Err(Failure::MountedBelow { path });
            }
            let name = entry.file_name().into_vec();
            let inode = match self.known.get(&(metadata.dev(), metadata.ino())) {
                Some(known) if metadata.nlink() > 1 && !metadata.is_dir() => *known,
                _ => self.add(path, &metadata)?,
            };
            children.insert(name, inode);
        }
        self.mounted.tree.inodes[index].body = Body::Dir(children);
        Ok(())
    }

    fn add(&mut self, path: PathBuf, metadata: &Metadata) -> Result<InodeIndex, Failure> {
        let number = u32::try_from(self.mounted.paths.len()).map_err(|_| failed(&path)(io::ErrorKind::FileTooLarge.into()))?;
        let inode = Inode { attr: attr(&path, metadata).map_err(failed(&path))?, body: body(&path, metadata).map_err(failed(&path))? };
        self.mounted.tree.inodes.push(inode);
        self.mounted.paths.push(path);
        if !metadata.is_dir() {
            self.known.insert((metadata.dev(), metadata.ino()), InodeIndex(number));
        }
        Ok(InodeIndex(number))
    }
}

fn failed(path: &Path) -> impl Fn(io::Error) -> Failure {
    let path = path.to_owned();
    move |source| Failure::Mounted { path: path.clone(), source }
}

fn body(path: &Path, metadata: &Metadata) -> io::Result<Body> {
    let kind = metadata.file_type();
    let device = Device { major: major(metadata.rdev()), minor: minor(metadata.rdev()) };
    let content = match () {
        () if kind.is_dir() => return Ok(Body::Dir(BTreeMap::new())),
        () if kind.is_file() => Content::File(Data::Chunked { size: metadata.size(), unit_bits: UnitBits::MIN, chunks: Vec::new() }),
        () if kind.is_symlink() => Content::Symlink(fs::read_link(path)?.into_os_string().into_vec()),
        () if kind.is_char_device() => Content::Char(device),
        () if kind.is_block_device() => Content::Block(device),
        () if kind.is_fifo() => Content::Fifo,
        () => Content::Socket,
    };
    Ok(Body::Content(content))
}

fn attr(path: &Path, metadata: &Metadata) -> io::Result<Attr> {
    Ok(Attr {
        mode: (metadata.mode() & 0o7777) as u16,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: Time { sec: metadata.mtime(), nsec: metadata.mtime_nsec() as u32 },
        xattrs: xattrs(path)?,
    })
}

/// The attributes of a file itself, sorted by name.
fn xattrs(path: &Path) -> io::Result<Vec<Xattr>> {
    let mut buffer = vec![0; XATTRS];
    let len = match rustix::fs::llistxattr(path, &mut buffer[..]) {
        Ok(len) => len,
        Err(Errno::OPNOTSUPP) => 0,
        Err(errno) => return Err(errno.into()),
    };
    let names = buffer[..len].to_vec();
    let mut found = Vec::new();
    for name in names.split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        let len = rustix::fs::lgetxattr(path, std::ffi::OsStr::from_bytes(name), &mut buffer[..])?;
        found.push(Xattr { name: name.to_vec(), value: buffer[..len].to_vec() });
    }
    found.sort();
    Ok(found)
}
