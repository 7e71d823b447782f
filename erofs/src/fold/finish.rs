//! The draft in its final order: reachable inodes depth first by name, packs by first use.

use super::draft::Draft;
use crate::meta::{Chunk, Content, Data};
use crate::tree::{Body, Inode, InodeIndex, Tree};

pub(super) fn finish(draft: Draft) -> Tree {
    let Draft { inodes, packs: all_packs, .. } = draft;
    let mut inodes: Vec<Option<Inode>> = inodes.into_iter().map(Some).collect();
    let mut number: Vec<Option<InodeIndex>> = vec![None; inodes.len()];
    let mut pack_number: Vec<Option<u32>> = vec![None; all_packs.len()];
    let mut packs = Vec::new();
    let mut out = Vec::with_capacity(inodes.len());
    // No recursion: trees may be many thousands of levels deep.
    let mut todo = vec![Tree::ROOT];
    while let Some(index) = todo.pop() {
        // A second name of an inode finds it numbered.
        let Some(mut inode) = inodes[index.0 as usize].take() else { continue };
        number[index.0 as usize] = Some(InodeIndex(out.len() as u32));
        match &mut inode.body {
            Body::Dir(children) => todo.extend(children.values().rev()),
            Body::Content(Content::File(Data::Chunked { chunks, .. })) => {
                for chunk in chunks {
                    let Chunk::At { pack, .. } = chunk else { continue };
                    *pack = *pack_number[*pack as usize].get_or_insert_with(|| {
                        packs.push(all_packs[*pack as usize]);
                        packs.len() as u32 - 1
                    });
                }
            }
            Body::Content(_) => (),
        }
        out.push(inode);
    }
    for inode in &mut out {
        if let Body::Dir(children) = &mut inode.body {
            for child in children.values_mut() {
                *child = number[child.0 as usize].expect("every child of a reached directory was reached");
            }
        }
    }
    Tree { packs, inodes: out }
}
