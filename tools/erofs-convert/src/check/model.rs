//! What the image must be: the layers' archives applied, one after another, to a tree in memory.
//!
//! This is a second implementation of what `layer` and `erofs::fold` do together, in another way, so that a mistake in one of them shows.
//! Entries go straight into the merged tree; every name remembers the layer that put it there. Whiteouts take away what is from below at
//! once. Where their own layer has something, and for opaque markers, they wait until the layer has ended and then take away what no
//! entry of it put there.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};

use erofs::digest::Digest;
use erofs::meta::{Device, Time};

use super::archive::{Archive, Member};

/// As many as containerd follows on the way to an entry.
const MAX_SYMLINKS: usize = 255;

/// Number of a node.
pub type NodeId = usize;

/// The root's number.
pub const ROOT: NodeId = 0;

/// An inode.
#[derive(Clone, Debug)]
pub struct Node {
    /// What it is.
    pub body: Body,
    /// Its attributes.
    pub attr: Attr,
    /// The layer that last listed it, as a directory; what is only implied keeps what it had.
    listed: Option<usize>,
}

/// Attributes as `stat` and `listxattr` would show them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attr {
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Time,
    /// Extended attributes.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// Kinds of inode.
#[derive(Clone, Debug)]
pub enum Body {
    /// Names, each with its node and the layer that put it there or wrote below it.
    Dir(BTreeMap<Vec<u8>, (NodeId, usize)>),
    /// Size and BLAKE3 of all bytes.
    File(u64, Digest),
    /// Target.
    Symlink(Vec<u8>),
    /// Character device.
    Char(Device),
    /// Block device.
    Block(Device),
    /// Named pipe.
    Fifo,
}

/// The tree so far.
#[derive(Clone)]
pub struct Model {
    /// All nodes, also those that no name reaches any more.
    pub nodes: Vec<Node>,
    layer: usize,
}

/// What a layer takes away.
#[derive(Default)]
struct Removals {
    /// Names it removed and has not put anything at since.
    gone: BTreeSet<(NodeId, Vec<u8>)>,
    /// Directories that nothing from below shows through, once the layer has ended.
    opaque: Vec<NodeId>,
}

fn bad<T>(path: &[u8], what: &str) -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::InvalidData, format!("entry \"{}\": {what}", path.escape_ascii())))
}

fn names(path: &[u8]) -> Vec<Vec<u8>> {
    let mut names = Vec::new();
    for name in path.split(|&b| b == b'/').filter(|name| !name.is_empty() && *name != b".") {
        if name == b".." { drop(names.pop()) } else { names.push(name.to_vec()) }
    }
    names
}

impl Default for Attr {
    /// Of directories that nothing lists.
    fn default() -> Attr {
        Attr { mode: 0o755, uid: 0, gid: 0, mtime: Time::default(), xattrs: BTreeMap::new() }
    }
}

impl Default for Model {
    fn default() -> Model {
        Model { nodes: vec![Node { body: Body::Dir(BTreeMap::new()), attr: Attr::default(), listed: None }], layer: 0 }
    }
}

impl Model {
    /// Applies the next layer.
    pub fn apply(&mut self, tar: impl Read) -> io::Result<()> {
        self.layer += 1;
        let below = self.clone();
        let mut removals = Removals::default();
        let mut archive = Archive::new(tar);
        while let Some(member) = archive.next_member()? {
            self.enter(&member, &mut archive, &below, &mut removals)?;
        }
        for dir in removals.opaque {
            self.prune(dir);
        }
        Ok(())
    }

    fn enter(&mut self, member: &Member, archive: &mut Archive<impl Read>, below: &Model, removals: &mut Removals) -> io::Result<()> {
        let mut way = names(&member.path);
        // The archive's root entry is ignored, as containerd does.
        let Some(name) = way.pop() else { return Ok(()) };
        // Below what the layer removed there is nothing to remove.
        if name.starts_with(b".wh.") && self.is_gone(&self.follow(&member.path, &way)?, removals) {
            return Ok(());
        }
        let (dir, way) = self.make_dirs(&member.path, &way, below, removals)?;
        if name == b".wh..wh..opq" {
            removals.opaque.push(dir);
        } else if name.starts_with(b".wh..wh.") {
        } else if let Some(hidden) = name.strip_prefix(b".wh.") {
            self.white_out(dir, hidden, removals);
        } else if member.kind == b'1' {
            self.link(member, dir, &way, name, below)?;
        } else if member.kind == b'5' {
            self.directory(dir, name, attr_of(member), removals);
        } else {
            let body = match member.kind {
                b'0' => {
                    let mut hasher = blake3::Hasher::new();
                    archive.data(member.size, |piece| {
                        hasher.update(piece);
                    })?;
                    Body::File(member.size, Digest(*hasher.finalize().as_bytes()))
                }
                b'2' => Body::Symlink(member.link.clone()),
                // To overlayfs this is a whiteout.
                b'3' if member.device == (Device { major: 0, minor: 0 }) => {
                    self.children(dir).map(|children| children.remove(&name));
                    removals.gone.insert((dir, name));
                    return Ok(());
                }
                b'3' => Body::Char(member.device),
                b'4' => Body::Block(member.device),
                b'6' => Body::Fifo,
                _ => return bad(&member.path, "an entry of an unknown type"),
            };
            let node = self.add(Node { body, attr: attr_of(member), listed: None });
            self.name(dir, name, node);
        }
        Ok(())
    }

    fn white_out(&mut self, dir: NodeId, name: &[u8], removals: &mut Removals) {
        match self.child(dir, name) {
            // The layer's own: only what shows through a directory goes.
            Some((node, layer)) if layer == self.layer && !self.is_hollow(node) => {
                if self.is_dir(node) {
                    removals.opaque.push(node);
                }
            }
            _ => {
                self.children(dir).map(|children| children.remove(name));
                removals.gone.insert((dir, name.to_vec()));
            }
        }
    }

    /// The layer removed a directory on the way and has not made it again.
    fn is_gone(&self, way: &[Vec<u8>], removals: &Removals) -> bool {
        let mut dir = ROOT;
        for name in way {
            match self.child(dir, name) {
                Some((node, _)) => dir = node,
                None => return removals.gone.contains(&(dir, name.clone())),
            }
        }
        false
    }

    /// A directory that this layer has only because of whiteouts in it.
    fn is_hollow(&self, node: NodeId) -> bool {
        let Body::Dir(children) = &self.nodes[node].body else { return false };
        self.nodes[node].listed != Some(self.layer) && children.values().all(|&(child, layer)| layer != self.layer || self.is_hollow(child))
    }

    fn directory(&mut self, dir: NodeId, name: Vec<u8>, attr: Attr, removals: &mut Removals) {
        let layer = self.layer;
        let node = match self.child(dir, &name) {
            Some((node, _)) if self.is_dir(node) => node,
            there => {
                let node = self.add(Node { body: Body::Dir(BTreeMap::new()), attr: Attr::default(), listed: None });
                if there.is_some_and(|(_, put)| put == layer) || removals.gone.contains(&(dir, name.clone())) {
                    removals.opaque.push(node);
                }
                node
            }
        };
        let old = &mut self.nodes[node];
        // Listed twice in one layer: the later entry's attributes, and the extended ones of both.
        let kept = if old.listed == Some(layer) { std::mem::take(&mut old.attr.xattrs) } else { BTreeMap::new() };
        *old = Node { attr: merged(attr, kept), listed: Some(layer), body: std::mem::replace(&mut old.body, Body::Fifo) };
        self.name(dir, name, node);
    }

    fn link(&mut self, member: &Member, dir: NodeId, way: &[Vec<u8>], name: Vec<u8>, below: &Model) -> io::Result<()> {
        let (parent, last) = match member.link.iter().rposition(|&b| b == b'/') {
            Some(slash) => (&member.link[..slash], &member.link[slash + 1..]),
            None => (&b""[..], &member.link[..]),
        };
        let target_way = self.follow(&member.path, &names(parent))?;
        if target_way == way && last == name {
            return Ok(());
        }
        let own = self.walk(&target_way).and_then(|dir| self.child(dir, last)).filter(|(_, layer)| *layer == self.layer);
        if let Some((node, _)) = own {
            let old = &mut self.nodes[node];
            let mut new = attr_of(member);
            match old.body {
                Body::Dir(_) => return bad(&member.path, "a hard link to a directory"),
                Body::Symlink(_) => {
                    new.mode = old.attr.mode;
                    new.xattrs.retain(|name, _| !name.starts_with(b"system."));
                }
                _ => {}
            }
            if !matches!(old.body, Body::File(..)) {
                new.xattrs.retain(|name, _| !name.starts_with(b"user."));
            }
            let mut kept = std::mem::take(&mut old.attr.xattrs);
            // A link to a file of a lower layer made in this layer leaves that file as it is.
            if node < below.nodes.len() {
                old.attr.xattrs = kept;
            } else {
                // Lost to the change of owner.
                kept.remove(&b"security.capability"[..]);
                old.attr = merged(new, kept);
            }
            self.name(dir, name, node);
            return Ok(());
        }
        let lower = below.resolve(&target_way).and_then(|dir| below.child(dir, last));
        match lower {
            Some((node, _)) if !below.is_dir(node) => self.name(dir, name, node),
            _ => return bad(&member.path, "a hard link to nothing"),
        }
        Ok(())
    }

    /// The directory at the end of the way, through this layer's symbolic links, and the way there without them. Makes what is missing.
    fn make_dirs(&mut self, path: &[u8], way: &[Vec<u8>], below: &Model, removals: &mut Removals) -> io::Result<(NodeId, Vec<Vec<u8>>)> {
        let way = self.follow(path, way)?;
        let mut dir = ROOT;
        for (depth, name) in way.iter().enumerate() {
            let node = match self.child(dir, name) {
                Some((node, _)) if self.is_dir(node) => node,
                Some((_, layer)) if layer == self.layer => return bad(path, "its parent is not a directory"),
                // In place of what the layer removed it is a new directory, as good as listed.
                None if removals.gone.contains(&(dir, name.clone())) => {
                    let node = self.add(Node { body: Body::Dir(BTreeMap::new()), attr: Attr::default(), listed: Some(self.layer) });
                    removals.opaque.push(node);
                    node
                }
                // Otherwise like the directory that is there below, also by way of symbolic links.
                _ => {
                    let like = below.resolve(&way[..=depth]).map(|node| below.nodes[node].attr.clone());
                    self.add(Node { body: Body::Dir(BTreeMap::new()), attr: like.unwrap_or_default(), listed: None })
                }
            };
            self.name(dir, name.clone(), node);
            dir = node;
        }
        Ok((dir, way))
    }

    /// Replaces symbolic links that this layer put on the way.
    fn follow(&self, path: &[u8], way: &[Vec<u8>]) -> io::Result<Vec<Vec<u8>>> {
        let own_link = |way: &[Vec<u8>]| {
            let (last, parent) = way.split_last()?;
            let (node, layer) = self.child(self.walk(parent)?, last)?;
            match &self.nodes[node].body {
                Body::Symlink(target) if layer == self.layer => Some(target),
                _ => None,
            }
        };
        follow_links(way, own_link).map_or_else(|| bad(path, "too many symbolic links"), Ok)
    }

    /// The directory at a path through whatever symbolic links there are.
    fn resolve(&self, way: &[Vec<u8>]) -> Option<NodeId> {
        let any_link = |way: &[Vec<u8>]| {
            let (last, parent) = way.split_last()?;
            match &self.nodes[self.child(self.walk(parent)?, last)?.0].body {
                Body::Symlink(target) => Some(target),
                _ => None,
            }
        };
        self.walk(&follow_links(way, any_link)?)
    }

    /// The directory at a path without symbolic links.
    fn walk(&self, way: &[Vec<u8>]) -> Option<NodeId> {
        way.iter().try_fold(ROOT, |dir, name| self.child(dir, name).map(|(node, _)| node)).filter(|&node| self.is_dir(node))
    }

    /// Takes away what this layer did not put there, and what is only there for whiteouts, of which none is needed here. Directories
    /// that the layer only implies keep the attributes they have from below.
    fn prune(&mut self, dir: NodeId) {
        let Body::Dir(children) = &self.nodes[dir].body else { return };
        let kept: BTreeMap<_, _> = children
            .iter()
            .filter(|(_, (node, put))| *put == self.layer && !self.is_hollow(*node))
            .map(|(name, there)| (name.clone(), *there))
            .collect();
        let nodes: Vec<NodeId> = kept.values().map(|(node, _)| *node).collect();
        self.nodes[dir].body = Body::Dir(kept);
        nodes.into_iter().for_each(|node| self.prune(node));
    }

    fn add(&mut self, node: Node) -> NodeId {
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    fn name(&mut self, dir: NodeId, name: Vec<u8>, node: NodeId) {
        let layer = self.layer;
        self.children(dir).map(|children| children.insert(name, (node, layer)));
    }

    fn child(&self, dir: NodeId, name: &[u8]) -> Option<(NodeId, usize)> {
        match &self.nodes[dir].body {
            Body::Dir(children) => children.get(name).copied(),
            _ => None,
        }
    }

    fn children(&mut self, dir: NodeId) -> Option<&mut BTreeMap<Vec<u8>, (NodeId, usize)>> {
        match &mut self.nodes[dir].body {
            Body::Dir(children) => Some(children),
            _ => None,
        }
    }

    fn is_dir(&self, node: NodeId) -> bool {
        matches!(self.nodes[node].body, Body::Dir(_))
    }
}

/// Follows links from left to right; `None` when there are too many.
fn follow_links<'a>(way: &[Vec<u8>], link_at: impl Fn(&[Vec<u8>]) -> Option<&'a Vec<u8>>) -> Option<Vec<Vec<u8>>> {
    let mut todo: Vec<Vec<u8>> = way.iter().rev().cloned().collect();
    let mut done: Vec<Vec<u8>> = Vec::new();
    let mut links = 0;
    while let Some(name) = todo.pop() {
        match &name[..] {
            b"" | b"." => continue,
            b".." => drop(done.pop()),
            _ => done.push(name),
        }
        if let Some(target) = link_at(&done) {
            links += 1;
            if links > MAX_SYMLINKS {
                return None;
            }
            done.pop();
            if target.starts_with(b"/") {
                done.clear();
            }
            todo.extend(target.split(|&b| b == b'/').rev().map(<[u8]>::to_vec));
        }
    }
    Some(done)
}

fn merged(mut attr: Attr, kept: BTreeMap<Vec<u8>, Vec<u8>>) -> Attr {
    for (name, value) in kept {
        attr.xattrs.entry(name).or_insert(value);
    }
    settled(attr)
}

/// ACLs as they are once the mode is set, which comes last: what stands for the mode's bits follows it, and one with nothing else is gone.
fn settled(mut attr: Attr) -> Attr {
    let tag_of = |entry: &[u8]| u16::from_le_bytes([entry[0], entry[1]]);
    let mode = attr.mode;
    attr.xattrs.retain(|name, acl| match &name[..] {
        b"system.posix_acl_default" => acl.len() > 4,
        b"system.posix_acl_access" => {
            let tags: BTreeSet<u16> = acl.chunks_exact(4).skip(1).step_by(2).map(tag_of).collect();
            for entry in acl.get_mut(4..).unwrap_or_default().chunks_exact_mut(8) {
                let bits = match tag_of(entry) {
                    0x01 => mode >> 6,
                    0x10 => mode >> 3,
                    0x04 if !tags.contains(&0x10) => mode >> 3,
                    0x20 => mode,
                    _ => continue,
                };
                entry[2..4].copy_from_slice(&(bits & 7).to_le_bytes());
            }
            !tags.is_subset(&BTreeSet::from([0x01, 0x04, 0x20]))
        }
        _ => true,
    });
    attr
}

/// An entry's attributes as a container would see them: the kernel refuses some extended attributes on some files, and containerd
/// drops `trusted.*`.
fn attr_of(member: &Member) -> Attr {
    let (link, dir) = (member.kind == b'2', member.kind == b'5');
    let visible = |name: &[u8]| match name {
        b"system.posix_acl_access" => !link,
        b"system.posix_acl_default" => dir,
        _ if name.starts_with(b"user.") => matches!(member.kind, b'0' | b'1' | b'5'),
        _ => name.starts_with(b"security."),
    };
    let xattrs = member.xattrs.iter().filter(|(name, _)| visible(name)).map(|(name, value)| (name.clone(), value.clone())).collect();
    let mode = if link { 0o777 } else { member.mode };
    settled(Attr { mode, uid: member.uid, gid: member.gid, mtime: member.mtime, xattrs })
}

#[cfg(test)]
mod tests {
    use testbed::{Entry, Layer};

    use super::*;

    /// All paths with modes unless they are 0644 for files and 0755 for directories; files show the layer's text by its digest.
    fn paths(model: &Model) -> Vec<String> {
        let mut out = Vec::new();
        let mut todo = vec![(String::new(), ROOT)];
        while let Some((path, id)) = todo.pop() {
            let node = &model.nodes[id];
            if let Body::Dir(children) = &node.body {
                todo.extend(children.iter().rev().map(|(name, (id, _))| (format!("{path}/{}", name.escape_ascii()), *id)));
            }
            let usual = if matches!(node.body, Body::Dir(_)) { 0o755 } else { 0o644 };
            let mode = if node.attr.mode == usual { String::new() } else { format!(" {:o}", node.attr.mode) };
            out.push(format!("{path}{mode}"));
        }
        out.split_off(1)
    }

    fn check(layers: &[&[Entry]], expected: &str) {
        let mut model = Model::default();
        for layer in layers {
            model.apply(&Layer::new(layer.iter().cloned()).tar()[..]).unwrap();
        }
        assert_eq!(paths(&model).join(" "), expected);
    }

    #[test]
    fn layers_are_applied_as_containers_see_them() {
        let f = |path: &str| Entry::file(path, path);
        let d = |path: &str| Entry::dir(path).mode(0o711);
        let w = Entry::whiteout;
        check(&[&[f("a"), f("b")], &[w("a")]], "/b");
        check(&[&[d("d"), f("d/a")], &[w("d"), f("d/b")]], "/d /d/b");
        check(&[&[d("d"), f("d/a")], &[f("d/b"), w("d")]], "/d 711 /d/b");
        check(&[&[d("d"), f("d/a")], &[w("d")], &[f("d/b")]], "/d /d/b");
        check(&[&[d("d"), f("d/a")], &[f("d/b"), Entry::opaque("d")]], "/d 711 /d/b");
        check(&[&[d("d"), d("d/e"), f("d/e/a")], &[f("d/e/b"), Entry::opaque("d")]], "/d 711 /d/e 711 /d/e/b");
        check(&[&[d("d"), f("d/a")], &[w("d/a"), w("d")]], "");
        check(&[&[d("d"), f("d/a")], &[w("d"), w("d/a")]], "");
        check(&[&[d("d"), f("d/a"), f("d/c")], &[w("d/a"), f("d/b"), w("d")]], "/d 711 /d/b");
        check(&[&[f("b")], &[w("x/y")]], "/b /x");
        check(&[&[f("a")], &[f("a"), w("a")]], "/a");
        check(&[&[d("d"), f("d/a")], &[f("d")]], "/d");
        check(&[&[d("u"), f("u/a"), Entry::symlink("l", "u")], &[f("l/b")]], "/l 711 /l/b /u 711 /u/a");
        check(&[&[d("u"), Entry::symlink("l", "u"), f("l/b")]], "/l 777 /u 711 /u/b");
        check(&[&[f("a")], &[w("a"), Entry::hard_link("b", "a")]], "/b");
        check(&[&[f("../../a"), f("./b/../c")]], "/a /c");
    }

    #[test]
    fn a_link_s_owner_and_mode_change_capabilities_and_acls() {
        let entry = |tag: u8, perm: u8| [tag, 0, perm, 0, 255, 255, 255, 255];
        let acl = |mask: &[[u8; 8]], owner| [&[2, 0, 0, 0][..], &entry(1, owner), &entry(4, 5), &mask.concat(), &entry(32, 0)].concat();
        let name = b"system.posix_acl_access";
        let check = |mask: &[[u8; 8]], expected: Option<Vec<u8>>| {
            let file = Entry::file("a", "").xattr("system.posix_acl_access", &acl(mask, 7)).xattr("security.capability", b"c");
            let mut model = Model::default();
            model.apply(&Layer::new([file, Entry::hard_link("b", "a").mode(0o430)]).tar()[..]).unwrap();
            let xattrs = &model.nodes[1].attr.xattrs;
            assert_eq!((xattrs.get(&name[..]), xattrs.len()), (expected.as_ref(), usize::from(expected.is_some())));
        };
        check(&[], None);
        check(&[entry(16, 7)], Some(acl(&[entry(16, 3)], 4)));
    }

    #[test]
    fn hard_links_share_a_node() {
        let mut model = Model::default();
        model.apply(&Layer::new([Entry::file("a", "1"), Entry::hard_link("b", "a")]).tar()[..]).unwrap();
        model.apply(&Layer::new([Entry::hard_link("c", "b"), Entry::whiteout("a")]).tar()[..]).unwrap();
        let Body::Dir(children) = &model.nodes[ROOT].body else { panic!() };
        let ids: Vec<_> = children.iter().map(|(name, (id, _))| (name.clone(), *id)).collect();
        assert_eq!(ids.len(), 2);
        assert_eq!(ids[0].1, ids[1].1);
    }
}
