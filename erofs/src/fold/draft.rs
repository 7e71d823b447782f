//! The tree while layers are being put on it.

use std::collections::{BTreeMap, HashMap};

use super::FoldError;
use crate::digest::Digest;
use crate::layer::{EntryKind, LayerTree, split};
use crate::meta::{Attr, Chunk, Content, Data, PackRef};
use crate::tree::{Body, Inode, InodeIndex, Tree};

/// What a directory is that nothing describes.
const IMPLICIT_MODE: u16 = 0o755;

/// Symbolic links followed while resolving one path; containerd's bound (continuity, `fs/path.go`).
const MAX_SYMLINKS: usize = 255;

/// Inodes, among them some that no name leads to any more.
pub(super) struct Draft {
    pub inodes: Vec<Inode>,
    pub packs: Vec<PackRef>,
    pack_numbers: HashMap<Digest, u32>,
}

/// What a layer needs to know of the layers below, looked up before it changes them.
struct Below<'a> {
    /// Inodes that links of this layer name by path.
    links: HashMap<&'a [u8], InodeIndex>,
    /// Attributes that directories which this layer implies have below, for where the layer hides them or a link leads to them.
    implied: HashMap<&'a [u8], Attr>,
}

fn implicit_attr() -> Attr {
    Attr { mode: IMPLICIT_MODE, ..Attr::default() }
}

impl Draft {
    pub fn new() -> Draft {
        let root = Inode { attr: implicit_attr(), body: Body::Dir(BTreeMap::new()) };
        Draft { inodes: vec![root], packs: Vec::new(), pack_numbers: HashMap::new() }
    }

    /// Puts layer `number` on top.
    pub fn apply(&mut self, number: usize, layer: &LayerTree) -> Result<(), FoldError> {
        let packs = self.add_packs(number, layer)?;
        let mut below = self.look_below(number, layer)?;
        let mut own: HashMap<&[u8], InodeIndex> = HashMap::new();
        let mut links = Vec::new();
        let targets: std::collections::HashSet<&[u8]> = link_targets(layer).map(|(_, target)| target).collect();
        // The directories that the current entry is in, outermost first. LayerTree's rules say that they are listed before it.
        let mut dirs: Vec<(&[u8], InodeIndex)> = vec![(&[], Tree::ROOT)];
        for entry in &layer.entries {
            let path = &entry.path[..];
            let place = split(path).map(|(parent, name)| {
                while dirs.last().expect("an entry's parent is listed before it").0 != parent {
                    dirs.pop();
                }
                (dirs.last().expect("an entry's parent is listed before it").1, name)
            });
            match (&entry.kind, place) {
                (EntryKind::Dir { attr, opaque }, None) => self.merge_dir(Tree::ROOT, attr.as_ref(), *opaque),
                (EntryKind::Dir { attr, opaque }, Some((parent, name))) => {
                    let index = match self.child(parent, name) {
                        Some(index) if self.is_dir(index) => {
                            self.merge_dir(index, attr.as_ref(), *opaque);
                            index
                        }
                        _ => {
                            let attr = attr.clone().or_else(|| below.implied.remove(path)).unwrap_or_else(implicit_attr);
                            self.put(parent, name, Inode { attr, body: Body::Dir(BTreeMap::new()) })
                        }
                    };
                    dirs.push((path, index));
                }
                (EntryKind::Node { attr, content }, Some((parent, name))) => {
                    let content = renumbered(content, &packs);
                    let index = self.put(parent, name, Inode { attr: attr.clone(), body: Body::Content(content) });
                    if targets.contains(path) {
                        own.insert(path, index);
                    }
                }
                (EntryKind::Whiteout, Some((parent, name))) => {
                    self.children(parent).remove(name);
                }
                (EntryKind::Link { target }, Some((parent, name))) => links.push((parent, name, &target[..])),
                (_, None) => unreachable!("the root entry is a directory"),
            }
        }
        for (parent, name, target) in links {
            let index = *own.get(target).or_else(|| below.links.get(target)).expect("look_below found every target that is not the layer's own");
            self.children(parent).insert(name.to_vec(), index);
        }
        Ok(())
    }

    fn look_below<'a>(&self, number: usize, layer: &'a LayerTree) -> Result<Below<'a>, FoldError> {
        let mut below = Below { links: HashMap::new(), implied: HashMap::new() };
        let targets: HashMap<&[u8], &[u8]> = link_targets(layer).map(|(path, target)| (target, path)).collect();
        let own: std::collections::HashSet<&[u8]> = layer
            .entries
            .iter()
            .filter(|entry| matches!(entry.kind, EntryKind::Node { .. }) && targets.contains_key(&entry.path[..]))
            .map(|entry| &entry.path[..])
            .collect();
        for (path, target) in link_targets(layer).filter(|(_, target)| !own.contains(target)) {
            match self.resolve(target, false).filter(|&index| !self.is_dir(index)) {
                Some(index) => below.links.insert(target, index),
                None => return Err(FoldError::LinkTarget { layer: number, path: path.to_vec(), target: target.to_vec() }),
            };
        }
        for entry in &layer.entries {
            if let EntryKind::Dir { attr: None, .. } = entry.kind
                && let Some(index) = self.resolve(&entry.path, true)
                && self.is_dir(index)
            {
                below.implied.insert(&entry.path, self.inodes[index.0 as usize].attr.clone());
            }
        }
        Ok(below)
    }

    /// Numbers of the layer's packs in `self.packs`.
    fn add_packs(&mut self, layer: usize, tree: &LayerTree) -> Result<Vec<u32>, FoldError> {
        let mut numbers = Vec::with_capacity(tree.packs.len());
        for pack in &tree.packs {
            let number = *self.pack_numbers.entry(pack.digest).or_insert_with(|| {
                self.packs.push(*pack);
                self.packs.len() as u32 - 1
            });
            if self.packs[number as usize] != *pack {
                return Err(FoldError::Pack { layer, pack: pack.digest });
            }
            numbers.push(number);
        }
        Ok(numbers)
    }

    fn is_dir(&self, index: InodeIndex) -> bool {
        matches!(self.inodes[index.0 as usize].body, Body::Dir(_))
    }

    fn child(&self, dir: InodeIndex, name: &[u8]) -> Option<InodeIndex> {
        match &self.inodes[dir.0 as usize].body {
            Body::Dir(children) => children.get(name).copied(),
            Body::Content(_) => None,
        }
    }

    fn children(&mut self, dir: InodeIndex) -> &mut BTreeMap<Vec<u8>, InodeIndex> {
        match &mut self.inodes[dir.0 as usize].body {
            Body::Dir(children) => children,
            Body::Content(_) => unreachable!("only directories are kept as parents"),
        }
    }

    fn merge_dir(&mut self, dir: InodeIndex, attr: Option<&Attr>, opaque: bool) {
        if let Some(attr) = attr {
            self.inodes[dir.0 as usize].attr = attr.clone();
        }
        if opaque {
            self.children(dir).clear();
        }
    }

    fn put(&mut self, parent: InodeIndex, name: &[u8], inode: Inode) -> InodeIndex {
        let index = InodeIndex(u32::try_from(self.inodes.len()).expect("memory ends before inode numbers"));
        self.inodes.push(inode);
        self.children(parent).insert(name.to_vec(), index);
        index
    }

    /// What `path` leads to, through symbolic links in its parents and, with `follow`, also at its end. `..` of a link never leaves the
    /// root.
    fn resolve(&self, path: &[u8], follow: bool) -> Option<InodeIndex> {
        let mut todo: Vec<&[u8]> = path.split(|&b| b == b'/').rev().collect();
        let mut way = vec![Tree::ROOT];
        let mut followed = 0;
        while let Some(name) = todo.pop() {
            let dir = *way.last().expect("the way begins at the root and never loses it");
            if !self.is_dir(dir) {
                return None;
            }
            match name {
                b"" | b"." => continue,
                b".." if way.len() > 1 => _ = way.pop(),
                b".." => continue,
                _ => {
                    let child = self.child(dir, name)?;
                    match &self.inodes[child.0 as usize].body {
                        Body::Content(Content::Symlink(target)) if follow || !todo.is_empty() => {
                            followed += 1;
                            if followed > MAX_SYMLINKS {
                                return None;
                            }
                            if target.first() == Some(&b'/') {
                                way.truncate(1);
                            }
                            todo.extend(target.split(|&b| b == b'/').rev());
                        }
                        _ => way.push(child),
                    }
                }
            }
        }
        way.pop()
    }
}

/// Path and target of every link.
fn link_targets(layer: &LayerTree) -> impl Iterator<Item = (&[u8], &[u8])> {
    layer.entries.iter().filter_map(|entry| match &entry.kind {
        EntryKind::Link { target } => Some((&entry.path[..], &target[..])),
        _ => None,
    })
}

/// `content` with pack numbers of the layer turned into those of the draft.
fn renumbered(content: &Content, packs: &[u32]) -> Content {
    let mut content = content.clone();
    if let Content::File(Data::Chunked { chunks, .. }) = &mut content {
        for chunk in chunks {
            if let Chunk::At { pack, .. } = chunk {
                *pack = packs[*pack as usize];
            }
        }
    }
    content
}
