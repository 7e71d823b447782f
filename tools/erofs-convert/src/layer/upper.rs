//! What applying an archive leaves in the layer's own directory, entry by entry, without touching a file system.
//!
//! This follows containerd's `archive.Apply` (`pkg/archive/tar.go`) on an overlayfs upper directory: names are cleaned and clamped to the
//! root, symbolic links *of this layer* in an entry's parents are followed, missing parents are made, a later entry replaces an earlier
//! one except that directories merge. Where its outcome depends on the order of entries in ways the OCI image specification rules out
//! ("whiteouts apply to lower layers only"), the specification and umoci are followed:
//!
//! - A whiteout never removes what the same layer holds, whichever comes first; a directory that the layer both whites out and lists is
//!   opaque. (containerd on overlayfs fails, or shows the lower directory's content again, depending on the order.)
//! - A directory in place of a non-directory of the same layer is opaque too: what was below went when the other took its place.
//! - An opaque marker hides what is below, never what the layer lists, also on the root.
//! - What takes the place of a directory that the layer listed has its own time. (containerd sets the times of listed directories by name when the
//!   layer ends, so a file there gets the directory's, and where nothing is there any more it fails.)
//! - A whiteout of nothing is in nobody's way. (containerd fails when a later layer implies a directory below that name.)
//! - A character device 0:0 is a whiteout, because to overlayfs it is one.

use std::collections::BTreeMap;

use erofs::layer::{Entry, EntryKind, MAX_NAME, MAX_PATH};
use erofs::meta::{Attr, Content, Device, Xattr};

use super::acl;
use super::chunks::FileData;
use super::header::Refusal;

/// Symbolic links followed for one path, as in containerd (continuity, `fs/path.go`).
const MAX_SYMLINKS: usize = 255;

/// Permissions of a directory that nothing describes, as in containerd (mkparent).
const NEW_DIR_MODE: u16 = 0o755;

const WHITEOUT: &[u8] = b".wh.";
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct DirId(usize);

#[derive(Clone, Copy)]
struct FileId(usize);

/// The layer's directory.
pub(super) struct Upper {
    dirs: Vec<Dir>,
    files: Vec<File>,
    names: u64,
    paths: u64,
}

#[derive(Default)]
struct Dir {
    /// The root is its own.
    parent: DirId,
    attr: Option<Attr>,
    opaque: bool,
    /// Changed by [`Upper::set_child`] only.
    children: BTreeMap<Vec<u8>, Child>,
    /// How many of the children are more than whiteouts or directories for whiteouts only, and one more if an entry lists the directory. Counted
    /// as things change: an archive may ask for it with every entry.
    solid: usize,
}

struct File {
    attr: Attr,
    content: Body,
}

/// What a name stands for.
enum Child {
    Dir(DirId),
    File(FileId),
    /// Another name of something that a layer below has at this path.
    LowerLink(Vec<u8>),
    Whiteout,
}

/// What a file that is no directory holds.
pub(super) enum Body {
    /// A regular file, its data on the way to packs.
    Data(FileData),
    /// Anything else.
    Other(Content),
}

/// What an entry puts at its path.
pub(super) enum Put {
    Dir(Attr),
    File(Attr, Body),
    /// Hard link to this path, and the attributes that the inode has from then on.
    Link(Attr, Vec<u8>),
}

/// Where an entry goes.
pub(super) struct Place {
    parent: DirId,
    /// The parent's path, without symbolic links.
    way: Vec<Vec<u8>>,
    name: Vec<u8>,
}

/// What an entry's name asks for.
pub(super) enum Intent {
    /// Nothing: the root itself, or a marker of AUFS.
    Ignore,
    /// An entry to put here.
    Put(Place),
    /// A whiteout, already done.
    Done,
}

fn malformed<T>(rule: &'static str) -> Result<T, Refusal> {
    Err(Refusal::Malformed(rule.into()))
}

/// The names of a path in lexically clean form, `..` clamped at the front. (Go's `filepath.Clean` under a root.)
fn clean(path: &[u8]) -> Vec<&[u8]> {
    let mut names: Vec<&[u8]> = Vec::new();
    for name in path.split(|&b| b == b'/') {
        match name {
            b"" | b"." => (),
            b".." => _ = names.pop(),
            name => names.push(name),
        }
    }
    names
}

/// Whether the path can be; of a whiteout's name what it removes counts. Before anything is made of it: a path of a megabyte would be half a
/// million directories.
fn check_length(way: &[Vec<u8>], name: &[u8]) -> Result<(), Refusal> {
    let name = name.strip_prefix(WHITEOUT).unwrap_or(name);
    let long_name = way.iter().map(|n| &n[..]).chain([name]).any(|name| name.len() > MAX_NAME);
    if long_name || way.iter().map(|n| n.len() + 1).sum::<usize>() + name.len() > MAX_PATH {
        return malformed("its name is longer than 255 bytes, or its path longer than 32 KiB");
    }
    Ok(())
}

impl Upper {
    pub fn new() -> Upper {
        Upper { dirs: vec![Dir::default()], files: Vec::new(), names: 0, paths: 0 }
    }

    const ROOT: DirId = DirId(0);

    /// Finds where an entry of this name goes, making parents; acts on whiteouts.
    pub fn enter(&mut self, path: &[u8]) -> Result<Intent, Refusal> {
        let mut names = clean(path);
        let Some(name) = names.pop() else { return Ok(Intent::Ignore) };
        let (way, _) = self.resolve(&names)?;
        check_length(&way, name)?;
        if name.starts_with(WHITEOUT) && self.is_whited_out(&way) {
            return Ok(Intent::Done);
        }
        let parent = self.make_dirs(&way)?;
        if name == OPAQUE {
            self.dirs[parent.0].opaque = true;
        } else if name.starts_with(WHITEOUT_META) {
            return Ok(Intent::Ignore);
        } else if let Some(name) = name.strip_prefix(WHITEOUT) {
            if matches!(name, b"" | b"." | b"..") {
                return malformed("it is a whiteout of no name");
            }
            self.count(&way, name.len());
            self.white_out(parent, name);
        } else {
            self.count(&way, name.len());
            return Ok(Intent::Put(Place { parent, way, name: name.to_vec() }));
        }
        Ok(Intent::Done)
    }

    /// Puts something there, in place of what was.
    pub fn put(&mut self, place: Place, what: Put) -> Result<(), Refusal> {
        let Place { parent, way, name } = place;
        match what {
            Put::Dir(attr) => self.put_dir(parent, name, attr),
            Put::File(_, Body::Other(Content::Char(Device { major: 0, minor: 0 }))) => self.set_child(parent, name, Child::Whiteout),
            Put::File(attr, content) => {
                self.files.push(File { attr, content });
                self.set_child(parent, name, Child::File(FileId(self.files.len() - 1)));
            }
            Put::Link(attr, target) => return self.put_link(parent, &way, name, attr, &target),
        }
        Ok(())
    }

    /// Names made so far, and the length of all their paths: what the layer tree will take, also of names that no entry lists.
    pub fn size(&self) -> (u64, u64) {
        (self.names, self.paths)
    }

    fn count(&mut self, way: &[Vec<u8>], name: usize) {
        self.names += 1;
        self.paths += way.iter().map(|n| n.len() as u64 + 1).sum::<u64>() + name as u64;
    }

    fn white_out(&mut self, parent: DirId, name: &[u8]) {
        match self.dirs[parent.0].children.get(name) {
            Some(&Child::Dir(dir)) if !self.is_hollow(dir) => self.dirs[dir.0].opaque = true,
            None | Some(Child::Dir(_)) => self.set_child(parent, name.to_vec(), Child::Whiteout),
            Some(_) => (),
        }
    }

    /// Puts a child in place of what was there.
    fn set_child(&mut self, dir: DirId, name: Vec<u8>, child: Child) {
        let solid = self.is_solid(&child);
        let was_solid = self.dirs[dir.0].children.insert(name, child).is_some_and(|old| self.is_solid(&old));
        self.count_solid(dir, was_solid, solid);
    }

    fn is_solid(&self, child: &Child) -> bool {
        match child {
            Child::Dir(dir) => !self.is_hollow(*dir),
            Child::Whiteout => false,
            Child::File(_) | Child::LowerLink(_) => true,
        }
    }

    /// Counts one of what a directory has as solid now and before, and where that makes a difference the directory in its parent, and so on.
    fn count_solid(&mut self, mut dir: DirId, mut before: bool, mut now: bool) {
        while before != now {
            let Dir { parent, solid, .. } = &mut self.dirs[dir.0];
            before = *solid > 0;
            *solid = if now { *solid + 1 } else { *solid - 1 };
            now = *solid > 0;
            if dir == Self::ROOT {
                break;
            }
            dir = *parent;
        }
    }

    /// Whether this layer removes something on the way, so that there is nothing at its end to remove.
    fn is_whited_out(&self, way: &[Vec<u8>]) -> bool {
        let mut dir = Self::ROOT;
        for name in way {
            match self.dirs[dir.0].children.get(name) {
                Some(&Child::Dir(child)) => dir = child,
                Some(Child::Whiteout) => return true,
                Some(_) | None => return false,
            }
        }
        false
    }

    /// Whether the directory is only there for whiteouts in it.
    fn is_hollow(&self, dir: DirId) -> bool {
        self.dirs[dir.0].solid == 0
    }

    fn put_dir(&mut self, parent: DirId, name: Vec<u8>, attr: Attr) {
        match self.dirs[parent.0].children.get(&name) {
            Some(&Child::Dir(dir)) => match &mut self.dirs[dir.0].attr {
                Some(old) => set_attr(old, attr),
                none => {
                    *none = Some(attr);
                    self.count_solid(dir, false, true);
                }
            },
            there => {
                let opaque = there.is_some();
                _ = self.new_dir(parent, name, Some(attr), opaque);
            }
        }
    }

    fn put_link(&mut self, parent: DirId, way: &[Vec<u8>], name: Vec<u8>, attr: Attr, target: &[u8]) -> Result<(), Refusal> {
        let (target_parent, target_name) = target.iter().rposition(|&b| b == b'/').map_or((&[][..], target), |at| (&target[..at], &target[at + 1..]));
        if matches!(target_name, b"" | b"." | b"..") {
            return malformed("it is a hard link to a directory");
        }
        let (target_way, target_dir) = self.resolve(&clean(target_parent))?;
        if target_way == way && target_name == name {
            // `tar f f` writes the second f as a link to the first.
            return Ok(());
        }
        let child = match target_dir.and_then(|dir| self.dirs[dir.0].children.get(target_name)) {
            Some(&Child::File(file)) => {
                let File { attr: old, content } = &mut self.files[file.0];
                let is_data = matches!(content, Body::Data(_));
                let is_symlink = matches!(content, Body::Other(Content::Symlink(_)));
                let mode = if is_symlink { old.mode } else { attr.mode };
                let possible = |x: &Xattr| (is_data || !x.name.starts_with(b"user.")) && !(is_symlink && x.name.starts_with(b"system."));
                let xattrs = attr.xattrs.into_iter().filter(possible).collect();
                // containerd gives the inode the link's owner, and chown(2) takes capabilities away.
                old.xattrs.retain(|x| x.name != b"security.capability");
                set_attr(old, Attr { mode, xattrs, ..attr });
                Child::File(file)
            }
            Some(Child::LowerLink(target)) => Child::LowerLink(target.clone()),
            Some(Child::Dir(_)) => return malformed("it is a hard link to a directory"),
            Some(Child::Whiteout) => return malformed("it is a hard link to what this layer removes"),
            None => {
                self.check_visible_below(&target_way)?;
                let mut path = target_way.join(&b'/');
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(target_name);
                Child::LowerLink(path)
            }
        };
        self.set_child(parent, name, child);
        Ok(())
    }

    /// Whether what layers below have in this directory shows through this one.
    fn check_visible_below(&self, way: &[Vec<u8>]) -> Result<(), Refusal> {
        let mut dir = Self::ROOT;
        for name in way.iter().map(Some).chain([None]) {
            if self.dirs[dir.0].opaque {
                return malformed("it is a hard link to what this layer removes");
            }
            match name.and_then(|name| self.dirs[dir.0].children.get(name)) {
                Some(&Child::Dir(child)) => dir = child,
                Some(_) => return malformed("it is a hard link to what this layer removes"),
                None => break,
            }
        }
        Ok(())
    }

    /// Follows symbolic links of this layer: the names that lead there without any, and the directory if this layer has it already.
    fn resolve(&self, names: &[&[u8]]) -> Result<(Vec<Vec<u8>>, Option<DirId>), Refusal> {
        let mut todo: Vec<Vec<u8>> = names.iter().rev().map(|n| n.to_vec()).collect();
        let mut way: Vec<Vec<u8>> = Vec::new();
        // The directory at each step of the way, as far as there are any.
        let mut dirs: Vec<Option<DirId>> = vec![Some(Self::ROOT)];
        let mut followed = 0;
        while let Some(name) = todo.pop() {
            if name == b".." {
                if way.pop().is_some() {
                    dirs.pop();
                }
                continue;
            }
            let here = *dirs.last().expect("the root is never left");
            let child = here.and_then(|dir| self.dirs[dir.0].children.get(&name));
            if let Some(&Child::File(file)) = child
                && let Body::Other(Content::Symlink(target)) = &self.files[file.0].content
            {
                followed += 1;
                if followed > MAX_SYMLINKS {
                    return malformed("too many symbolic links lead to it");
                }
                if target.starts_with(b"/") {
                    way.clear();
                    dirs.truncate(1);
                }
                todo.extend(clean_relative(target).into_iter().rev().map(<[u8]>::to_vec));
                continue;
            }
            dirs.push(match child {
                Some(&Child::Dir(dir)) => Some(dir),
                _ => None,
            });
            way.push(name);
        }
        Ok((way, dirs.pop().flatten()))
    }

    /// The directory at the end of the way, made with its parents where it does not exist.
    fn make_dirs(&mut self, way: &[Vec<u8>]) -> Result<DirId, Refusal> {
        let mut dir = Self::ROOT;
        for (depth, name) in way.iter().enumerate() {
            dir = match self.dirs[dir.0].children.get(name) {
                Some(&Child::Dir(child)) => child,
                Some(Child::File(_) | Child::LowerLink(_)) => return malformed("what it is in is not a directory"),
                there => {
                    // In place of a whiteout it is new; otherwise it may be there below, and only the fold knows.
                    let opaque = there.is_some();
                    let attr = opaque.then(|| Attr { mode: NEW_DIR_MODE, ..Attr::default() });
                    let child = self.new_dir(dir, name.clone(), attr, opaque);
                    self.count(&way[..depth], name.len());
                    child
                }
            };
        }
        Ok(dir)
    }

    fn new_dir(&mut self, parent: DirId, name: Vec<u8>, attr: Option<Attr>, opaque: bool) -> DirId {
        let dir = DirId(self.dirs.len());
        let solid = usize::from(attr.is_some());
        self.dirs.push(Dir { parent, attr, opaque, children: BTreeMap::new(), solid });
        self.set_child(parent, name, Child::Dir(dir));
        dir
    }

    /// Drops whiteouts, and directories that are only there for them, where the layer hides what is below anyway.
    fn prune(&mut self) {
        let mut todo = vec![(Self::ROOT, false)];
        while let Some((dir, hidden)) = todo.pop() {
            let hidden = hidden || self.dirs[dir.0].opaque;
            let mut children = std::mem::take(&mut self.dirs[dir.0].children);
            children.retain(|_, child| match child {
                Child::Dir(child) if hidden && self.is_hollow(*child) => false,
                Child::Dir(child) => {
                    todo.push((*child, hidden));
                    true
                }
                Child::Whiteout => !hidden,
                Child::File(_) | Child::LowerLink(_) => true,
            });
            self.dirs[dir.0].children = children;
        }
    }

    /// The layer's entries in path order, contents by way of `content`. The first name of a file holds it, further ones link to that.
    pub fn into_entries(mut self, mut content: impl FnMut(Body) -> Content) -> Vec<Entry> {
        self.prune();
        let Upper { dirs, files, .. } = self;
        let mut dirs: Vec<Option<Dir>> = dirs.into_iter().map(Some).collect();
        let mut files: Vec<Option<File>> = files.into_iter().map(Some).collect();
        let mut first_name: Vec<Vec<u8>> = vec![Vec::new(); files.len()];
        let mut out = Vec::new();
        let mut todo = vec![(Vec::new(), Child::Dir(Self::ROOT))];
        while let Some((path, child)) = todo.pop() {
            let kind = match child {
                Child::Dir(dir) => {
                    let Dir { mut attr, opaque, children, .. } = dirs[dir.0].take().expect("a directory has one name");
                    let join = |name: Vec<u8>| if path.is_empty() { name } else { [&path[..], b"/", &name].concat() };
                    todo.extend(children.into_iter().rev().map(|(name, child)| (join(name), child)));
                    if path.is_empty() && !opaque {
                        continue;
                    }
                    attr.iter_mut().for_each(acl::chmod);
                    EntryKind::Dir { attr, opaque }
                }
                Child::File(file) => match files[file.0].take() {
                    Some(File { mut attr, content: body }) => {
                        acl::chmod(&mut attr);
                        first_name[file.0].clone_from(&path);
                        EntryKind::Node { attr, content: content(body) }
                    }
                    None => EntryKind::Link { target: first_name[file.0].clone() },
                },
                Child::LowerLink(target) => EntryKind::Link { target },
                Child::Whiteout => EntryKind::Whiteout,
            };
            out.push(Entry { path, kind });
        }
        out
    }

    /// The first hard link to a lower layer's file at whose path this layer came to hold something itself, if any: to the fold it would
    /// look like a link to that.
    pub fn ambiguous_link(&self) -> Option<Vec<u8>> {
        let targets = self.dirs.iter().flat_map(|dir| dir.children.values()).filter_map(|child| match child {
            Child::LowerLink(target) => Some(target),
            _ => None,
        });
        targets.filter(|target| self.holds(target)).min().cloned()
    }

    fn holds(&self, path: &[u8]) -> bool {
        let mut dir = Self::ROOT;
        for name in path.split(|&b| b == b'/') {
            match self.dirs[dir.0].children.get(name) {
                Some(&Child::Dir(child)) => dir = child,
                Some(Child::Whiteout) | None => return false,
                Some(_) => return true,
            }
        }
        true
    }
}

/// The names of a symbolic link's target: clean, with `..` at the front kept when it is relative.
fn clean_relative(target: &[u8]) -> Vec<&[u8]> {
    let mut names: Vec<&[u8]> = Vec::new();
    for name in target.split(|&b| b == b'/') {
        match name {
            b"" | b"." => (),
            b".." if names.last().is_some_and(|last| *last != b"..") => _ = names.pop(),
            b".." if target.starts_with(b"/") => (),
            name => names.push(name),
        }
    }
    names
}

/// Gives what exists the attributes of a later entry; extended ones are added to those it has.
fn set_attr(attr: &mut Attr, new: Attr) {
    let Attr { mode, uid, gid, mtime, xattrs } = new;
    *attr = Attr { mode, uid, gid, mtime, xattrs: std::mem::take(&mut attr.xattrs) };
    for xattr in xattrs {
        match attr.xattrs.binary_search_by(|x| x.name.cmp(&xattr.name)) {
            Ok(at) => attr.xattrs[at] = xattr,
            Err(at) => attr.xattrs.insert(at, xattr),
        }
    }
}

#[cfg(test)]
mod tests;
