//! The FUSE wire protocol as a read-only, flat directory of files needs it (`include/uapi/linux/fuse.h`, protocol 7.31 and later).
//!
//! [`Request::parse`] turns one message of the kernel into a value, the `*_reply` functions turn values into reply bodies, and
//! [`device`] moves both over `/dev/fuse`. All integers are in host byte order, as the kernel's are. Writing operations are not decoded:
//! the mount is read-only, so they arrive as [`Operation::Other`] if at all.
//!
//! Facts: `kernel-notes.md`, "FUSE".

pub mod device;

pub use rustix::io::Errno;

/// Protocol version this module speaks. The kernel answers an older one by behaving as that version did (`fs/fuse/inode.c`, `process_init_reply`).
pub const MAJOR: u32 = 7;
/// Minor version: 7.36 is the first with the second word of INIT flags; every kernel with file-backed EROFS (6.12 on) has it.
pub const MINOR: u32 = 36;

/// Node of the directory itself (`FUSE_ROOT_ID`).
pub const ROOT: NodeId = NodeId(1);

/// `struct fuse_in_header`.
const IN_HEADER: usize = 40;
/// `struct fuse_out_header`.
const OUT_HEADER: usize = 16;

/// Smallest buffer `read(2)` of /dev/fuse accepts (`FUSE_MIN_READ_BUFFER`), with `max_write` at its least. No request of a read-only mount is longer.
pub const REQUEST_MAX: usize = 8192;

/// Data bytes of one READ at most: 256 pages, what [`init_reply`] asks for as `max_pages`.
pub const READ_MAX: usize = 1 << 20;

/// INIT flags that are wanted when the kernel offers them (`fuse.h`, "INIT request/reply flags").
pub mod flag {
    /// Reads of one file may be under way at the same time.
    pub const ASYNC_READ: u64 = 1 << 0;
    /// Direct reads submitted with a completion callback do not wait for each other.
    pub const ASYNC_DIO: u64 = 1 << 15;
    /// Lookups and readdir of one directory run in parallel.
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    /// `max_pages` of the reply counts; without it a read is at most 32 pages.
    pub const MAX_PAGES: u64 = 1 << 22;
    /// The second word of flags is meant.
    pub const INIT_EXT: u64 = 1 << 30;
    /// The kernel resends what was read but not answered when told so (6.9+).
    pub const HAS_RESEND: u64 = 1 << 39;
}

const WANTED: u64 = flag::ASYNC_READ | flag::ASYNC_DIO | flag::PARALLEL_DIROPS | flag::MAX_PAGES | flag::INIT_EXT | flag::HAS_RESEND;

/// Open flag: reads bypass the FUSE page cache (`FOPEN_DIRECT_IO`).
pub const OPEN_DIRECT_IO: u32 = 1 << 0;

/// A request's number, to be repeated in its reply. A resent request carries its old number with the top bit set; it is repeated as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Unique(pub u64);

/// The server's number of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u64);

/// One message of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// Number to answer to.
    pub unique: Unique,
    /// File it is about.
    pub node: NodeId,
    /// What is asked.
    pub operation: Operation<'a>,
}

/// What the kernel asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation<'a> {
    /// First message of a connection.
    Init(Init),
    /// Find `name` in the directory.
    Lookup {
        /// Name without the closing NUL.
        name: &'a [u8],
    },
    /// Attributes of a file.
    Getattr,
    /// Open a file.
    Open,
    /// Open the directory.
    Opendir,
    /// Read bytes of a file.
    Read {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        size: u32,
    },
    /// Read directory entries.
    Readdir {
        /// Cookie of the last entry already read, 0 at the start.
        offset: u64,
        /// Room for the reply in bytes.
        size: u32,
    },
    /// Statistics of the file system.
    Statfs,
    /// Last close of a file or directory, flush at a close, permission check, or end of the connection: answered with success.
    Formality,
    /// Needs no answer: forget and interrupt. (A read that nobody waits for any more is answered all the same; the kernel drops the answer.)
    Silent,
    /// Anything else, to be refused with `ENOSYS`.
    Other(u32),
}

/// A message that is not what `fuse.h` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    /// Not even the header is there, so there is nothing to answer to.
    #[error("a FUSE message of {len} bytes is shorter than its 40-byte header; the kernel and this program disagree about the protocol")]
    NoHeader {
        /// Length of the message.
        len: usize,
    },
    /// The header is whole, the rest is not. Answer `EINVAL`.
    #[error("FUSE request {} with opcode {opcode} is malformed; the kernel and this program disagree about the protocol", unique.0)]
    Body {
        /// Number to answer to.
        unique: Unique,
        /// Its opcode.
        opcode: u32,
    },
}

impl<'a> Request<'a> {
    /// Reads one message. Trailing bytes are allowed, as newer kernels append fields.
    pub fn parse(message: &'a [u8]) -> Result<Request<'a>, BadRequest> {
        let (header, body) = message.split_at_checked(IN_HEADER).ok_or(BadRequest::NoHeader { len: message.len() })?;
        let opcode = u32_at(header, 4).unwrap_or_default();
        let unique = Unique(u64_at(header, 8).unwrap_or_default());
        let node = NodeId(u64_at(header, 16).unwrap_or_default());
        let whole = u32_at(header, 0).is_some_and(|len| len as usize == message.len());
        let operation = if whole { operation(opcode, body) } else { None };
        operation.map(|operation| Request { unique, node, operation }).ok_or(BadRequest::Body { unique, opcode })
    }
}

/// `enum fuse_opcode`.
fn operation(opcode: u32, body: &[u8]) -> Option<Operation<'_>> {
    Some(match opcode {
        1 => Operation::Lookup { name: body.split(|&b| b == 0).next().filter(|name| name.len() < body.len() && !name.is_empty())? },
        3 => Operation::Getattr,
        14 => Operation::Open,
        15 => Operation::Read { offset: u64_at(body, 8)?, size: u32_at(body, 16)? },
        17 => Operation::Statfs,
        26 => Operation::Init(Init::parse(body)?),
        27 => Operation::Opendir,
        28 => Operation::Readdir { offset: u64_at(body, 8)?, size: u32_at(body, 16)? },
        // RELEASE, FLUSH, RELEASEDIR, ACCESS, DESTROY
        18 | 25 | 29 | 34 | 38 => Operation::Formality,
        // FORGET, INTERRUPT, BATCH_FORGET
        2 | 36 | 42 => Operation::Silent,
        other => Operation::Other(other),
    })
}

/// What the kernel offers at the start (`struct fuse_init_in`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Init {
    /// Protocol major version of the kernel.
    pub major: u32,
    /// Protocol minor version of the kernel.
    pub minor: u32,
    /// Read-ahead in bytes the kernel would do.
    pub max_readahead: u32,
    /// Offered features, both words.
    pub flags: u64,
}

impl Init {
    fn parse(body: &[u8]) -> Option<Init> {
        let low = u64::from(u32_at(body, 12)?);
        let high = if low & flag::INIT_EXT != 0 { u64::from(u32_at(body, 16)?) } else { 0 };
        Some(Init { major: u32_at(body, 0)?, minor: u32_at(body, 4)?, max_readahead: u32_at(body, 8)?, flags: low | high << 32 })
    }

    /// What both sides will use.
    pub fn negotiate(&self) -> Negotiated {
        Negotiated { minor: self.minor.min(MINOR), max_readahead: self.max_readahead, flags: self.flags & WANTED }
    }
}

/// Outcome of INIT. The kernel sends INIT once per connection, so a process that takes a connection over must have been given this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// Minor version in use.
    pub minor: u32,
    /// Read-ahead in bytes.
    pub max_readahead: u32,
    /// Features in use.
    pub flags: u64,
}

impl Negotiated {
    /// Length of [`Negotiated::to_bytes`].
    pub const LEN: usize = 16;

    /// For keeping beside the descriptor: minor u32, read-ahead u32, flags u64, little-endian.
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[..4].copy_from_slice(&self.minor.to_le_bytes());
        out[4..8].copy_from_slice(&self.max_readahead.to_le_bytes());
        out[8..].copy_from_slice(&self.flags.to_le_bytes());
        out
    }

    /// The reverse; `None` for anything but exactly [`Negotiated::LEN`] bytes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Negotiated> {
        let bytes: &[u8; Self::LEN] = bytes.try_into().ok()?;
        let [m0, m1, m2, m3, r0, r1, r2, r3, flags @ ..] = *bytes;
        Some(Negotiated {
            minor: u32::from_le_bytes([m0, m1, m2, m3]),
            max_readahead: u32::from_le_bytes([r0, r1, r2, r3]),
            flags: u64::from_le_bytes(flags),
        })
    }

    /// Whether unanswered requests can be asked for again.
    pub fn can_resend(&self) -> bool {
        self.flags & flag::HAS_RESEND != 0
    }
}

/// Requests in the background (read-ahead, asynchronous reads) the kernel keeps under way: enough 128 KiB reads to cover 8 MiB of look-ahead.
const MAX_BACKGROUND: u16 = 64;
/// Above this many the kernel calls the device congested and stops reading ahead.
const CONGESTION: u16 = 48;

/// `struct fuse_init_out`.
pub fn init_reply(with: &Negotiated) -> [u8; 64] {
    let mut out = Body::new();
    out.u32(MAJOR).u32(with.minor).u32(with.max_readahead).u32(low_word(with.flags));
    out.u16(MAX_BACKGROUND).u16(CONGESTION);
    // max_write: nothing is written, so the least the kernel accepts, which keeps the request buffer small.
    out.u32(4096);
    // time_gran in ns; max_pages; map_alignment; second word of flags.
    out.u32(1).u16((READ_MAX / 4096) as u16).u16(0).u32((with.flags >> 32) as u32);
    out.done()
}

fn low_word(flags: u64) -> u32 {
    (flags & u64::from(u32::MAX)) as u32
}

/// What a file looks like. Everything is owned by root, read-only and of the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attr {
    /// The directory.
    Directory,
    /// A file of this many bytes.
    File {
        /// Its node, used as inode number as well.
        node: NodeId,
        /// Its length.
        size: u64,
    },
}

/// How long the kernel may remember names and attributes, in seconds. Files never change; an hour bounds how long a name outlives its file.
const VALID: u64 = 3600;

fn put_attr<const N: usize>(out: &mut Body<N>, attr: &Attr) {
    let (ino, size, mode, nlink) = match *attr {
        Attr::Directory => (ROOT.0, 0, 0o040_500, 2),
        Attr::File { node, size } => (node.0, size, 0o100_400, 1),
    };
    out.u64(ino).u64(size).u64(size.div_ceil(512));
    // atime, mtime, ctime and their nanoseconds
    out.u64(0).u64(0).u64(0).u32(0).u32(0).u32(0);
    // mode, nlink, uid, gid, rdev, blksize, flags
    out.u32(mode).u32(nlink).u32(0).u32(0).u32(0).u32(4096).u32(0);
}

/// `struct fuse_entry_out`.
pub fn entry_reply(node: NodeId, attr: &Attr) -> [u8; 128] {
    let mut out = Body::new();
    // nodeid, generation, entry_valid, attr_valid, their nanoseconds
    out.u64(node.0).u64(0).u64(VALID).u64(VALID).u32(0).u32(0);
    put_attr(&mut out, attr);
    out.done()
}

/// `struct fuse_attr_out`.
pub fn attr_reply(attr: &Attr) -> [u8; 104] {
    let mut out = Body::new();
    out.u64(VALID).u32(0).u32(0);
    put_attr(&mut out, attr);
    out.done()
}

/// `struct fuse_open_out` with file handle 0: reads name the node, which survives a change of server.
pub fn open_reply(open_flags: u32) -> [u8; 16] {
    let mut out = Body::new();
    out.u64(0).u32(open_flags).u32(0);
    out.done()
}

/// `struct fuse_statfs_out`: `blocks` of 4 KiB, none free.
pub fn statfs_reply(blocks: u64, files: u64) -> [u8; 80] {
    let mut out = Body::new();
    out.u64(blocks).u64(0).u64(0).u64(files).u64(0).u32(4096).u32(255).u32(4096);
    out.done()
}

/// Appends a `struct fuse_dirent` to a READDIR reply that may grow to `room` bytes; `false` if it does not fit. `next` is the cookie that
/// makes READDIR go on after this entry.
pub fn push_dirent(out: &mut Vec<u8>, room: usize, node: NodeId, next: u64, name: &[u8], directory: bool) -> bool {
    let kind: u32 = if directory { 4 } else { 8 };
    let end = (out.len() + 24 + name.len()).next_multiple_of(8);
    if end > room {
        return false;
    }
    out.extend_from_slice(&node.0.to_ne_bytes());
    out.extend_from_slice(&next.to_ne_bytes());
    out.extend_from_slice(&(name.len() as u32).to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(name);
    out.resize(end, 0);
    true
}

/// `struct fuse_out_header` before `body_len` bytes. `error` is 0 or a negative errno; in a notification it is the code.
fn out_header(unique: Unique, error: i32, body_len: usize) -> [u8; OUT_HEADER] {
    let mut out = Body::new();
    out.u32((OUT_HEADER + body_len) as u32).u32(error.cast_unsigned()).u64(unique.0);
    out.done()
}

/// A reply body written front to back; what is never written stays zero.
struct Body<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Body<N> {
    fn new() -> Body<N> {
        Body { bytes: [0; N], at: 0 }
    }

    fn put(&mut self, field: &[u8]) -> &mut Body<N> {
        self.bytes[self.at..][..field.len()].copy_from_slice(field);
        self.at += field.len();
        self
    }

    fn u16(&mut self, value: u16) -> &mut Body<N> {
        self.put(&value.to_ne_bytes())
    }

    fn u32(&mut self, value: u32) -> &mut Body<N> {
        self.put(&value.to_ne_bytes())
    }

    fn u64(&mut self, value: u64) -> &mut Body<N> {
        self.put(&value.to_ne_bytes())
    }

    fn done(&self) -> [u8; N] {
        self.bytes
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes)
}

#[cfg(all(test, target_endian = "little"))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A message with opcode `op`, unique 0x0807060504030201 and node 0x11, around `body`.
    fn message(op: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![40 + body.len() as u8, 0, 0, 0, op, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0x11, 0, 0, 0, 0, 0, 0, 0];
        bytes.resize(40, 0);
        bytes.extend_from_slice(body);
        bytes
    }

    #[track_caller]
    fn check(message: &[u8], expected: Option<Operation<'_>>) {
        match (Request::parse(message), expected) {
            (Ok(request), Some(operation)) => {
                assert_eq!(request, Request { unique: Unique(0x0807_0605_0403_0201), node: NodeId(0x11), operation });
            }
            (Err(BadRequest::Body { unique, opcode }), None) => {
                assert_eq!((unique, opcode), (Unique(0x0807_0605_0403_0201), u32::from(message[4])));
            }
            (got, expected) => panic!("{got:?}, expected {expected:?}"),
        }
    }

    #[test]
    fn messages_are_read_as_the_header_file_lays_them_out() {
        let init = [7, 0, 0, 0, 0x2d, 0, 0, 0, 0, 0, 2, 0, 1, 0, 0, 0x40, 0x80, 0, 0, 0];
        check(&message(26, &init), Some(Operation::Init(Init { major: 7, minor: 45, max_readahead: 131_072, flags: 0x80_4000_0001 })));
        check(&message(26, &init[..16]), None);
        let old = [7, 0, 0, 0, 31, 0, 0, 0, 0, 0, 2, 0, 1, 0, 0, 0];
        check(&message(26, &old), Some(Operation::Init(Init { major: 7, minor: 31, max_readahead: 131_072, flags: 1 })));
        check(&message(1, b"name\0"), Some(Operation::Lookup { name: b"name" }));
        check(&message(1, b"name"), None);
        check(&message(1, b"\0"), None);
        check(&message(1, b""), None);
        check(&message(3, &[0; 16]), Some(Operation::Getattr));
        check(&message(14, &[0; 8]), Some(Operation::Open));
        check(&message(27, &[0; 8]), Some(Operation::Opendir));
        let read = [9, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 1, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0];
        check(&message(15, &read), Some(Operation::Read { offset: 0x1_0000_1000, size: 131_072 }));
        check(&message(15, &read[..19]), None);
        check(&message(28, &read), Some(Operation::Readdir { offset: 0x1_0000_1000, size: 131_072 }));
        check(&message(28, &[]), None);
        check(&message(17, &[]), Some(Operation::Statfs));
        for formality in [18, 25, 29, 34, 38] {
            check(&message(formality, &[]), Some(Operation::Formality));
        }
        for silent in [2, 36, 42] {
            check(&message(silent, &[0; 8]), Some(Operation::Silent));
        }
        for other in [0, 4, 16, 22, 23, 46, 52, 255] {
            check(&message(other, &[]), Some(Operation::Other(u32::from(other))));
        }
        let mut wrong_length = message(17, &[]);
        wrong_length[0] = 41;
        check(&wrong_length, None);
        assert_eq!(Request::parse(&[0; 39]), Err(BadRequest::NoHeader { len: 39 }));
    }

    #[test]
    fn only_what_both_sides_know_is_used_and_it_survives_being_kept() {
        let offered = Init { major: 7, minor: 45, max_readahead: 131_072, flags: u64::MAX };
        let negotiated = offered.negotiate();
        assert_eq!(negotiated, Negotiated { minor: 36, max_readahead: 131_072, flags: WANTED });
        assert_eq!(Negotiated::from_bytes(&negotiated.to_bytes()), Some(negotiated));
        assert_eq!(Negotiated::from_bytes(&negotiated.to_bytes()[1..]), None);
        let old = Init { major: 7, minor: 31, max_readahead: 4096, flags: 1 }.negotiate();
        assert_eq!((old.minor, old.flags, old.can_resend()), (31, 1, false));
    }

    #[test]
    fn replies_have_the_bytes_of_the_header_file() {
        let init = init_reply(&Negotiated { minor: 36, max_readahead: 131_072, flags: flag::HAS_RESEND | flag::INIT_EXT | 1 });
        assert_eq!(
            init[..36],
            [7, 0, 0, 0, 36, 0, 0, 0, 0, 0, 2, 0, 1, 0, 0, 0x40, 64, 0, 48, 0, 0, 0x10, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0x80, 0, 0, 0]
        );
        let entry = entry_reply(NodeId(0x1122), &Attr::File { node: NodeId(0x1122), size: 8192 });
        assert_eq!(entry[..8], [0x22, 0x11, 0, 0, 0, 0, 0, 0]);
        assert_eq!(entry[16..24], [0x10, 0x0e, 0, 0, 0, 0, 0, 0]);
        assert_eq!(entry[40..64], [0x22, 0x11, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(entry[100..108], [0, 0x81, 0, 0, 1, 0, 0, 0], "mode 0100400, one link");
        let attr = attr_reply(&Attr::Directory);
        assert_eq!(attr[16..24], [1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(attr[76..84], [0x40, 0x41, 0, 0, 2, 0, 0, 0], "mode 040500, two links");
        assert_eq!(open_reply(OPEN_DIRECT_IO), [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(statfs_reply(3, 2)[..8], [3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(out_header(Unique(5), -5, 0), [16, 0, 0, 0, 0xfb, 0xff, 0xff, 0xff, 5, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(out_header(Unique(5), 0, 4)[..4], [20, 0, 0, 0]);
    }

    #[test]
    fn directory_entries_are_padded_and_stop_where_the_room_ends() {
        let mut out = Vec::new();
        assert!(push_dirent(&mut out, 64, NodeId(1), 1, b".", true));
        assert_eq!(out, [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0, b'.', 0, 0, 0, 0, 0, 0, 0]);
        assert!(push_dirent(&mut out, 64, NodeId(2), 2, b"12345678", false));
        assert_eq!(out.len(), 64);
        assert!(!push_dirent(&mut out, 64, NodeId(3), 3, b"x", false));
        assert_eq!(out.len(), 64);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), op in 0u8..60) {
            let _ = Request::parse(&bytes);
            let _ = Request::parse(&message(op, &bytes));
        }
    }
}
