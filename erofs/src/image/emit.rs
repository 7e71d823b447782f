//! The bytes of a plan. Decides nothing.

use std::borrow::Cow;

use super::dirs::{self, Name};
use super::format::{
    CHECKSUM_AT, CHUNK_INDEX_LEN, DEVICE_SLOT_LEN, DEVICE_TABLE_AT, DIRENT_LEN, Layout, RawDirent, SUPERBLOCK_AT, UUID_AT, UUID_LEN, XATTR_UNIT,
    checksum, encode_chunk, encode_xattr_header, split_xattr_name,
};
use super::plan::{Placed, Plan, raw_xattr};
use crate::block::BLOCK_SIZE;
use crate::digest::Digest;
use crate::meta::{Content, Data, Xattr};
use crate::tree::Body;

/// Writes the image.
pub(super) fn emit(plan: &Plan<'_>) -> Vec<u8> {
    let mut out = vec![0; plan.len as usize];
    put(&mut out, SUPERBLOCK_AT, &plan.superblock.encode());
    for (i, device) in plan.devices.iter().enumerate() {
        put(&mut out, DEVICE_TABLE_AT + i * DEVICE_SLOT_LEN, &device.encode());
    }
    let mut at = plan.shared_at as usize;
    for xattr in &plan.shared {
        at += put_xattr(&mut out, at, xattr);
    }
    for placed in &plan.inodes {
        put_inode(&mut out, plan, placed);
    }
    let uuid = Digest::of(&out).0;
    put(&mut out, UUID_AT, &uuid[..UUID_LEN]);
    let sum = checksum(out.first_chunk::<{ BLOCK_SIZE as usize }>().expect("an image has at least one block"));
    put(&mut out, CHECKSUM_AT, &sum.to_le_bytes());
    out
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Writes an xattr at `at`; gives the bytes it takes with padding.
fn put_xattr(out: &mut [u8], at: usize, xattr: &Xattr) -> usize {
    let raw = raw_xattr(xattr);
    let header = raw.encode();
    let (_, name) = split_xattr_name(&xattr.name).expect("Checked lets only known prefixes through");
    put(out, at, &header);
    put(out, at + header.len(), name);
    put(out, at + header.len() + name.len(), &xattr.value);
    raw.padded_len()
}

/// Writes an inode, its xattrs, and its data or chunk indexes.
fn put_inode(out: &mut [u8], plan: &Plan<'_>, placed: &Placed) {
    let tree = plan.checked.tree();
    let inode = tree.inode(placed.step.inode);
    let mut at = placed.at as usize;
    placed.raw.encode(&mut out[at..at + placed.raw.form.len()]);
    at += placed.raw.form.len();
    if placed.raw.xattr_count > 0 {
        let xattrs = plan.xattrs(&inode.attr);
        let header = encode_xattr_header(xattrs.shared.len() as u8);
        put(out, at, &header);
        at += header.len();
        for id in &xattrs.shared {
            put(out, at, &id.to_le_bytes());
            at += XATTR_UNIT;
        }
        for xattr in &xattrs.own {
            at += put_xattr(out, at, xattr);
        }
    }
    let bytes: Cow<'_, [u8]> = match &inode.body {
        Body::Dir(children) => dir_bytes(plan, &dirs::names(tree, placed.step.inode, placed.step.parent, children)).into(),
        Body::Content(Content::Symlink(target)) => target.into(),
        Body::Content(Content::File(Data::Inline(bytes))) => bytes.into(),
        Body::Content(Content::File(Data::Chunked { chunks, .. })) => {
            for (i, &chunk) in chunks.iter().enumerate() {
                put(out, placed.rest_at as usize + i * CHUNK_INDEX_LEN, &encode_chunk(chunk));
            }
            return;
        }
        Body::Content(Content::Char(_) | Content::Block(_) | Content::Fifo | Content::Socket) => return,
    };
    let tail = if placed.raw.layout == Layout::Inline { bytes.len() % BLOCK_SIZE as usize } else { 0 };
    let (blocks, tail) = bytes.split_at(bytes.len() - tail);
    put(out, placed.raw.union as usize * BLOCK_SIZE as usize, blocks);
    put(out, placed.rest_at as usize, tail);
}

/// A directory's content: in each block the entries, then their names.
fn dir_bytes(plan: &Plan<'_>, names: &[Name<'_>]) -> Vec<u8> {
    let mut out = vec![0; dirs::size(names) as usize];
    for (i, (range, _)) in dirs::blocks(names).enumerate() {
        let block = &mut out[i * BLOCK_SIZE as usize..];
        let mut name_at = range.len() * DIRENT_LEN;
        for (j, name) in names[range].iter().enumerate() {
            let entry = RawDirent { nid: plan.nids[name.inode.0 as usize].0, name_at: name_at as u16, kind: name.kind.dirent_code() };
            put(block, j * DIRENT_LEN, &entry.encode());
            put(block, name_at, name.name);
            name_at += name.name.len();
        }
    }
    out
}
