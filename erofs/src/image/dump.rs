//! An image as text, for people and for golden files.

use std::fmt;

use super::format::{Form, Layout};
use super::reader::{Chunks, Image};
use super::walk::{Visit, Walk};
use super::{DataView, FileKind, ImageError};
use crate::digest::Digest;
use crate::meta::{Chunk, Xattr};

/// Bytes of an xattr value that are shown; more are only counted.
const VALUE_SHOWN: usize = 32;
/// Bytes of a path that are shown, of the last name all. The rest is left out from the front: a hostile image could be as deep as it is long,
/// and the text would grow with the square.
const PATH_SHOWN: usize = 1024;

/// Writes `image` as text: what the superblock and the device table say, then a line per name in directory order. The same image gives
/// the same text. A damaged image's text ends with a line that says what is wrong.
pub fn dump(image: &Image<'_>, out: &mut impl fmt::Write) -> fmt::Result {
    let bytes = image.bytes();
    writeln!(out, "image {} bytes {} inodes {} root {}", Digest::of(bytes), bytes.len(), image.inode_count(), image.root())?;
    for (i, device) in image.devices().iter().enumerate() {
        writeln!(out, "device {} pack {} blocks {}", i + 1, device.digest, device.blocks)?;
    }
    let mut path: Vec<&[u8]> = Vec::new();
    for visit in Walk::new(*image) {
        let line = visit.and_then(|visit| {
            path.truncate(visit.depth.saturating_sub(1));
            if visit.depth > 0 {
                path.push(visit.name);
            }
            line(image, &visit, &path)
        });
        match line {
            Ok(line) => out.write_str(&line)?,
            Err(error) => return writeln!(out, "damaged: {error}"),
        }
    }
    Ok(())
}

/// The line of one name. A second name of an inode says only that.
fn line(image: &Image<'_>, visit: &Visit<'_>, path: &[&[u8]]) -> Result<String, ImageError> {
    let inode = &visit.inode;
    let mut text = format!("nid {} ", inode.nid);
    if visit.first {
        let located = image.locate(inode.nid)?;
        let mtime = inode.mtime;
        text += &format!("at {} {} {:04o} {}:{} links {} ", located.at, inode.kind, inode.mode, inode.uid, inode.gid, inode.nlink);
        text += &format!("size {} mtime {}.{:09} ", inode.size, mtime.sec, mtime.nsec);
        text += match located.raw.form {
            Form::Compact => "compact ",
            Form::Extended => "extended ",
        };
        text += match located.raw.layout {
            Layout::Plain => "plain ",
            Layout::Inline => "inline ",
            Layout::Chunked => "chunked ",
        };
    } else {
        text += "again ";
    }
    text += &shown_path(path);
    if visit.first {
        text += &content(image, visit)?;
        text += &xattrs(&visit.xattrs);
    }
    text.push('\n');
    Ok(text)
}

fn shown_path(path: &[&[u8]]) -> String {
    let mut len = 0;
    let fits = |name: &&&[u8]| {
        len += name.len() + 1;
        len <= PATH_SHOWN
    };
    let shown = path.iter().rev().take_while(fits).count();
    let mut text = String::new();
    if path.len() > shown {
        text.push('…');
    }
    for name in &path[path.len() - shown..] {
        text += &format!("/{}", name.escape_ascii());
    }
    if text.is_empty() { "/".to_owned() } else { text }
}

fn content(image: &Image<'_>, visit: &Visit<'_>) -> Result<String, ImageError> {
    let inode = &visit.inode;
    Ok(match (inode.kind, image.data(inode.nid)?) {
        (FileKind::Char | FileKind::Block, _) => format!(" device {}:{}", inode.device.major, inode.device.minor),
        (FileKind::Symlink, DataView::Inline(flat)) => format!(" -> {}", flat.to_vec().escape_ascii()),
        (FileKind::File, DataView::Chunks(chunks)) => format!(" units {} [{}]", chunks.unit_bits().bytes(), runs(&chunks)?),
        _ => String::new(),
    })
}

/// Chunks as `device:block`, with `+n` for n more that follow each other on the device without a gap.
fn runs(chunks: &Chunks<'_>) -> Result<String, ImageError> {
    let unit = u64::from(chunks.unit_bits().blocks());
    let mut runs: Vec<(Chunk, u64)> = Vec::new();
    for i in 0..chunks.count() {
        let chunk = chunks.get(i)?;
        match (runs.last_mut(), chunk) {
            (Some((Chunk::Hole, more)), Chunk::Hole) => *more += 1,
            (Some((Chunk::At { pack, block }, more)), Chunk::At { pack: p, block: b })
                if *pack == p && u64::from(*block) + (*more + 1) * unit == u64::from(b) =>
            {
                *more += 1;
            }
            _ => runs.push((chunk, 0)),
        }
    }
    let texts: Vec<String> = runs
        .iter()
        .map(|(first, more)| {
            let first = match first {
                Chunk::Hole => "hole".to_owned(),
                Chunk::At { pack, block } => format!("{}:{block}", pack + 1),
            };
            if *more > 0 { format!("{first}+{more}") } else { first }
        })
        .collect();
    Ok(texts.join(" "))
}

fn xattrs(xattrs: &[Xattr]) -> String {
    let mut text = String::new();
    for Xattr { name, value } in xattrs {
        text += &format!(" {}=\"{}\"", name.escape_ascii(), value[..value.len().min(VALUE_SHOWN)].escape_ascii());
        if value.len() > VALUE_SHOWN {
            text += &format!("…{}", value.len());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_paths_are_cut_at_the_front() {
        let check = |path: &[&[u8]], expected: &str| assert_eq!(shown_path(path), expected);
        check(&[], "/");
        check(&[b"a", b"b\n"], "/a/b\\n");
        let name = &[b'n'; 255][..];
        let shown = ["/", &"n".repeat(255)].concat().repeat(4);
        check(&[name; 4], &shown);
        check(&[name; 5], &format!("…{shown}"));
        check(&[&b"n"[..]; 10_000], &format!("…{}", "/n".repeat(512)));
    }
}
