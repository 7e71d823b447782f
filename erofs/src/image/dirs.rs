//! How a directory is cut into blocks: shared by the plan, which needs the size, and emit, which needs the bytes.

use std::collections::BTreeMap;
use std::ops::Range;

use super::FileKind;
use super::format::DIRENT_LEN;
use crate::block::BLOCK_SIZE;
use crate::tree::{InodeIndex, Tree};

/// A name in a directory, `.` and `..` included.
#[derive(Clone, Copy, Debug)]
pub(super) struct Name<'t> {
    pub name: &'t [u8],
    pub inode: InodeIndex,
    pub kind: FileKind,
}

/// All names of directory `dir` in byte order. `.` and `..` have their place in that order too: `!` sorts before them.
pub(super) fn names<'t>(tree: &'t Tree, dir: InodeIndex, parent: InodeIndex, children: &'t BTreeMap<Vec<u8>, InodeIndex>) -> Vec<Name<'t>> {
    let name = |name, inode| Name { name, inode, kind: FileKind::of(&tree.inode(inode).body) };
    let mut names = Vec::with_capacity(children.len() + 2);
    let mut dots = [(&b"."[..], dir), (&b".."[..], parent)].into_iter().peekable();
    for (child, &inode) in children {
        while let Some((dot, inode)) = dots.next_if(|(dot, _)| *dot < child.as_slice()) {
            names.push(name(dot, inode));
        }
        names.push(name(child, inode));
    }
    names.extend(dots.map(|(dot, inode)| name(dot, inode)));
    names
}

/// Cuts `names` into blocks, each filled as far as it goes: the range of names and the bytes used.
pub(super) fn blocks<'n>(names: &'n [Name<'_>]) -> impl Iterator<Item = (Range<usize>, usize)> + 'n {
    let mut start = 0;
    std::iter::from_fn(move || {
        let mut used = 0;
        let mut end = start;
        while let Some(name) = names.get(end) {
            let len = DIRENT_LEN + name.name.len();
            if used + len > BLOCK_SIZE as usize {
                break;
            }
            used += len;
            end += 1;
        }
        let range = std::mem::replace(&mut start, end)..end;
        (!range.is_empty()).then_some((range, used))
    })
}

/// Size of the directory in bytes: every block counts whole but the last.
pub(super) fn size(names: &[Name<'_>]) -> u64 {
    let (whole, last) = blocks(names).fold((0, 0), |(blocks, _), (_, used)| (blocks + 1, used as u64));
    (whole - 1) * BLOCK_SIZE + last
}
