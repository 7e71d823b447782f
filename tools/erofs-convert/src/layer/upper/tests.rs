//! The table of cases that says what an archive leaves in its layer.

use super::*;

/// Applies entries: `path/` directory, `path=text` file, `path@target` symbolic link, `path>target` hard link, `path!` device 0:0,
/// anything else a name alone (for whiteouts). A mode in octal may follow after a space. Gives the layer's entries in the same form, with
/// `-path` for whiteouts, `path/:` for implied and `path/!` for opaque directories, or the rule that refused one.
fn apply(entries: &str) -> Result<String, String> {
    let mut upper = Upper::new();
    for text in entries.split(", ").filter(|e| !e.is_empty()) {
        let (text, mode) = text.split_once(' ').map_or((text, 0o700), |(text, mode)| (text, u16::from_str_radix(mode, 8).unwrap()));
        let attr = Attr { mode, ..Attr::default() };
        let inline = |text: &str| Body::Data(FileData::Inline(text.into()));
        let (path, what) = if let Some((path, target)) = text.split_once('>') {
            (path, Put::Link(attr, target.into()))
        } else if let Some((path, target)) = text.split_once('@') {
            (path, Put::File(attr, Body::Other(Content::Symlink(target.into()))))
        } else if let Some((path, bytes)) = text.split_once('=') {
            (path, Put::File(attr, inline(bytes)))
        } else if let Some(path) = text.strip_suffix('!') {
            (path, Put::File(attr, Body::Other(Content::Char(Device { major: 0, minor: 0 }))))
        } else if text.ends_with('/') {
            (text, Put::Dir(attr))
        } else {
            (text, Put::File(attr, inline("")))
        };
        let entered = upper.enter(path.as_bytes()).and_then(|intent| match intent {
            Intent::Put(place) => upper.put(place, what),
            Intent::Ignore | Intent::Done => Ok(()),
        });
        if let Err(Refusal::Malformed(rule) | Refusal::Unsupported(rule)) = entered {
            return Err(rule.into_owned());
        }
    }
    if let Some(path) = upper.ambiguous_link() {
        return Err(format!("ambiguous {}", path.escape_ascii()));
    }
    let entries = upper.into_entries(|body| match body {
        Body::Data(FileData::Inline(bytes)) => Content::Symlink([b"=", &bytes[..]].concat()),
        Body::Data(FileData::Chunked { .. }) => unreachable!("these files are tiny"),
        Body::Other(Content::Symlink(target)) => Content::Symlink([b"@", &target[..]].concat()),
        Body::Other(other) => other,
    });
    let mode = |attr: &Attr| if attr.mode == 0o700 { String::new() } else { format!(" {:o}", attr.mode) };
    let text = entries.iter().map(|entry| {
        let path = entry.path.escape_ascii();
        match &entry.kind {
            EntryKind::Dir { attr, opaque } => {
                let marks = if *opaque { "!" } else { "" }.to_owned() + if attr.is_none() { ":" } else { "" };
                format!("{path}/{marks}{}", attr.as_ref().map(mode).unwrap_or_default())
            }
            EntryKind::Node { attr, content: Content::Symlink(text) } => format!("{path}{}{}", text.escape_ascii(), mode(attr)),
            EntryKind::Node { content, .. } => format!("{path} {content:?}"),
            EntryKind::Link { target } => format!("{path}>{}", target.escape_ascii()),
            EntryKind::Whiteout => format!("-{path}"),
        }
    });
    Ok(text.collect::<Vec<_>>().join(", "))
}

fn check(entries: &str, expected: &str) {
    assert_eq!(apply(entries).unwrap_or_else(|rule| format!("ERROR {rule}")), expected, "{entries}");
}

const NOT_A_DIRECTORY: &str = "ERROR what it is in is not a directory";
const REMOVED: &str = "ERROR it is a hard link to what this layer removes";
const TO_DIRECTORY: &str = "ERROR it is a hard link to a directory";

#[test]
fn names_are_cleaned_and_clamped_to_the_root() {
    check("", "");
    for path in ["a/b=1", "./a/b=1", "/a/b=1", "//a/./b=1", "../a/b=1", "../../../a/b=1", "x/../a/b=1", "a/x/../../../a/b=1"] {
        check(path, "a/:, a/b=1");
    }
    for root in ["./", "/", ".", "..", "../", "a/..", ""] {
        assert!(matches!(Upper::new().enter(root.as_bytes()), Ok(Intent::Ignore)), "{root}");
    }
    check(&format!("{}=1", "n".repeat(256)), "ERROR its name is longer than 255 bytes, or its path longer than 32 KiB");
    for long in [format!("{}.wh.a", "n/".repeat(16384)), format!("{}.wh..wh..opq", "n/".repeat(16384)), format!("{}/.wh..wh.x", "n".repeat(256))] {
        check(&long, "ERROR its name is longer than 255 bytes, or its path longer than 32 KiB");
    }
    let (mut upper, path) = (Upper::new(), "n/".repeat(500_000));
    assert!(upper.enter(path.as_bytes()).is_err() && upper.size() == (0, 0), "nothing is made of it");
    let longest = "n".repeat(255);
    check(&format!(".wh.{longest}"), &format!("-{longest}"));
    check(&format!("{}n=1", "n/".repeat(16384)), "ERROR its name is longer than 255 bytes, or its path longer than 32 KiB");
}

#[test]
fn later_entries_replace_earlier_ones_and_directories_merge() {
    check("a=1, a=2", "a=2");
    check("d/, d/a=1, d/ 711", "d/ 711, d/a=1");
    check("d/a=1, d/ 711", "d/ 711, d/a=1");
    check("d/, d/a=1, d=2", "d=2");
    // What was below went when the file took its place, so the directory that comes back is opaque.
    check("d=1, d/", "d/!");
    check("d/, d/a=1, d=2, d/, d/b=3", "d/!, d/b=3");
    check("d@x, d/", "d/!");
    check("a=1, a/b=2", NOT_A_DIRECTORY);
    check("a=1, b>a, a=2", "a=2, b=1");
}

#[test]
fn symbolic_links_of_the_layer_are_followed_in_parents() {
    check("usr/lib/, lib@usr/lib, lib/a=1", "lib@usr/lib, usr/:, usr/lib/, usr/lib/a=1");
    check("lib@/usr/lib, lib/a=1", "lib@/usr/lib, usr/:, usr/lib/:, usr/lib/a=1");
    check("d/l@../../../../e, d/l/a=1", "d/:, d/l@../../../../e, e/:, e/a=1");
    check("d/l@../e/./f/.., d/l/a=1", "d/:, d/l@../e/./f/.., e/:, e/a=1");
    check("l@m, m@n, l/a=1", "l@m, m@n, n/:, n/a=1");
    check("l@., l/a=1", "a=1, l@.");
    check("l@l, l/a=1", "ERROR too many symbolic links lead to it");
    check("f=1, l@f, l/a=1", NOT_A_DIRECTORY);
    // The last name is never followed.
    check("l@m, l=1", "l=1");
    check("d/, l@d, l/", "d/, l/!");
    check("l@d, l/.wh.a", "d/:, -d/a, l@d");
}

#[test]
fn whiteouts_are_for_layers_below() {
    check(".wh.a", "-a");
    check("d/.wh.a", "d/:, -d/a");
    check("d/.wh.a/", "d/:, -d/a");
    check(".wh.a, .wh.a", "-a");
    // What the same layer holds stays, whichever comes first.
    check(".wh.a, a=1", "a=1");
    check("a=1, .wh.a", "a=1");
    check(".wh.d, d/, d/a=1", "d/!, d/a=1");
    check("d/, d/a=1, .wh.d", "d/!, d/a=1");
    check(".wh.d, d/a=1", "d/! 755, d/a=1");
    check("d/a=1, .wh.d", "d/!:, d/a=1");
    check(".wh.a, a@b", "a@b");
    // Of what is removed nothing need be removed, whichever comes first.
    check("d/.wh.a, .wh.d", "-d");
    check(".wh.d, d/.wh.a, d/.wh..wh..opq, d/e/.wh.f", "-d");
    check("d/e/.wh.a, d/e/f=1, .wh.d", "d/!:, d/e/:, d/e/f=1");
    check("d/e/.wh.a, d/f=1, .wh.d", "d/!:, d/f=1");
    check("d/.wh..wh..opq, d/.wh.a, d/e/.wh.b, d/g/", "d/!:, d/g/");
    // Directories that are only there for whiteouts, whatever was in them for a while.
    check("d/e/a=1, d/e/a!, .wh.d", "-d");
    check("d/e/a=1, d/e!, .wh.d", "-d");
    check("d/e/a=1, d/e/b=1, d/e/a!, .wh.d", "d/!:, d/e/:, d/e/b=1");
    check("d/e/a=1, d/e/b=1, d/e/a!, d/e/b!, .wh.d", "-d");
    check("d/e/a=1, d/e/a=2, d/e/a!, .wh.d", "-d");
    check("d/e/, d/e/a=1, d/e/a!, .wh.d", "d/!:, d/e/");
    check("d/e/a=1, d/e/ 711, d/e!, .wh.d", "-d");
    check("d/a>x, d/a!, .wh.d, d/b=1", "d/! 755, d/b=1");
    check("a!", "-a");
    check("a=1, a!", "-a");
    for bad in [".wh.", ".wh..", ".wh...", "d/.wh...", "d/.wh."] {
        check(bad, "ERROR it is a whiteout of no name");
    }
}

#[test]
fn opaque_markers_hide_what_is_below() {
    check("d/, d/.wh..wh..opq, d/a=1", "d/!, d/a=1");
    check("d/, d/a=1, d/.wh..wh..opq", "d/!, d/a=1");
    check("d/.wh..wh..opq", "d/!:");
    check("d/.wh..wh..opq, d/ 711", "d/! 711");
    check(".wh..wh..opq, a=1", "/!:, a=1");
    check(".wh..wh.plnk, .wh..wh.aufs, d/.wh..wh.x=1", "d/:");
}

#[test]
fn hard_links_name_files_of_the_layer_or_below() {
    check("a=1, b>a", "a=1, b>a");
    check("b=1, a>b", "a=1, b>a");
    check("a=1, b>./a, c>/b, d>../c", "a=1, b>a, c>a, d>a");
    check("a@x, b>a", "a@x, b>a");
    check("l@d, d/a=1, b>l/a", "b=1, d/:, d/a>b, l@d");
    // The link's attributes become the inode's, as containerd applies them.
    check("a=1 600, b>a 640", "a=1 640, b>a");
    check("a@x 777, b>a 640", "a@x 777, b>a");
    // Below.
    check("b>a", "b>a");
    check("b>d/a, c>b", "b>d/a, c>d/a");
    check("l@d, b>l/a", "b>d/a, l@d");
    check("b>a, .wh.a", "-a, b>a");
    check("d/b>d/a, d/.wh..wh..opq", "d/!:, d/b>d/a");
    // To itself: nothing happens.
    check("a=1, a>a", "a=1");
    check("a=1, ./a>/a", "a=1");
    // Not possible.
    check(".wh.a, b>a", REMOVED);
    check("d/.wh..wh..opq, b>d/a", REMOVED);
    check(".wh.d, b>d/a", REMOVED);
    check("d=1, b>d/a", REMOVED);
    check("d/, b>d", TO_DIRECTORY);
    check("b>d/", TO_DIRECTORY);
    check("b>.", TO_DIRECTORY);
    check("b>d/..", TO_DIRECTORY);
    check("b>", TO_DIRECTORY);
    // The fold would take the layer's own file for the target.
    check("b>a, a=2", "ERROR ambiguous a");
    check("b>d/a, d=2", "ERROR ambiguous d/a");
}

fn xattrs(names: &[&str]) -> Vec<Xattr> {
    names.iter().map(|name| Xattr { name: name.as_bytes().to_vec(), value: b"v".to_vec() }).collect()
}

/// The extended attributes of `f` after a hard link to it with others.
fn linked(content: Content, own: &[&str], link: &[&str]) -> String {
    let mut upper = Upper::new();
    for (path, what) in [
        ("f", Put::File(Attr { xattrs: xattrs(own), ..Attr::default() }, Body::Other(content))),
        ("l", Put::Link(Attr { xattrs: xattrs(link), ..Attr::default() }, b"f".to_vec())),
    ] {
        let Ok(Intent::Put(place)) = upper.enter(path.as_bytes()) else { panic!("{path} has a place") };
        assert!(upper.put(place, what).is_ok());
    }
    let entries = upper.into_entries(|body| match body {
        Body::Other(content) => content,
        Body::Data(_) => unreachable!("there is no data"),
    });
    let EntryKind::Node { attr, .. } = &entries[0].kind else { panic!("f comes first") };
    attr.xattrs.iter().map(|x| x.name.escape_ascii().to_string()).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_link_gives_the_inode_its_attributes_as_chown_and_setxattr_would() {
    let file = || Content::File(erofs::meta::Data::Inline(Vec::new()));
    let check = |own: &[&str], link: &[&str], expected: &str| assert_eq!(linked(file(), own, link), expected);
    check(&["security.capability", "security.selinux"], &[], "security.selinux");
    check(&["security.capability"], &["security.capability"], "security.capability");
    check(&["security.selinux"], &["security.capability"], "security.capability security.selinux");
    let symlink = Content::Symlink(b"x".to_vec());
    assert_eq!(linked(symlink, &["security.selinux"], &["system.posix_acl_access", "user.a", "security.a"]), "security.a security.selinux");
    assert_eq!(linked(Content::Fifo, &[], &["user.a", "security.a"]), "security.a");
}

/// Every entry of such an archive once asked for a pass over all names in the directory.
#[test]
fn whiteouts_of_one_directory_again_and_again_take_no_time() {
    let mut upper = Upper::new();
    for i in 0..50_000 {
        assert!(upper.enter(format!("d/.wh.{i:05}").as_bytes()).is_ok());
    }
    let Ok(Intent::Put(place)) = upper.enter(b"d/z") else { panic!("there is a place") };
    assert!(upper.put(place, Put::File(Attr::default(), Body::Other(Content::Fifo))).is_ok());
    let start = std::time::Instant::now();
    for _ in 0..50_000 {
        assert!(upper.enter(b".wh.d").is_ok());
    }
    assert!(start.elapsed().as_secs() < 10, "{:?}", start.elapsed());
    assert_eq!(upper.into_entries(|_| Content::Fifo).len(), 2);
}

#[test]
fn what_is_counted_includes_names_that_no_entry_lists() {
    let mut upper = Upper::new();
    assert!(upper.enter(b"a/b/c").is_ok());
    assert_eq!(upper.size(), (3, 1 + 3 + 5));
    assert!(upper.enter(b"a/b/.wh.d").is_ok());
    assert_eq!(upper.size(), (4, 1 + 3 + 5 + 5));
}
