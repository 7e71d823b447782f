//! `/dev/cachefiles` in on-demand mode: the kernel asks for parts of cache files, user space writes them (Linux 5.19 … 7.1).
//!
//! Sources: `include/uapi/linux/cachefiles.h`, `fs/cachefiles/{daemon,ondemand}.c`. What is easy to get wrong:
//! - `read` never blocks and gives one message or nothing: poll first (see [`crate::ring`]);
//! - a descriptor that comes with an `OPEN` is write-only and writes with `O_DIRECT`: offset page-aligned (6.1 silently rounds it down), length
//!   and buffer aligned for the file system below;
//! - a `READ` cannot be refused. Completing it without having written makes the kernel find the hole again, and the reader gets `EIO`;
//! - when the last copy of the device descriptor closes, the cache is dead for good. While a copy is kept, `restore` makes the kernel ask
//!   everything unanswered again.
//!
//! Facts: `kernel-notes.md`, "cachefiles on-demand".

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use rustix::fs::SeekFrom;

use crate::buffer::{Buffer, PAGE};

/// Largest message the kernel sends (`CACHEFILES_MSG_MAX_SIZE`). A smaller buffer risks `EMSGSIZE`.
pub const MESSAGE_MAX: usize = 1024;

/// Bytes of a message before its data: msg_id, opcode, len, object_id, each u32 (`struct cachefiles_msg`).
pub const HEADER_LEN: usize = OBJECT_ID + 4;

const MSG_ID: usize = 0;
const OPCODE: usize = MSG_ID + 4;
const LEN: usize = OPCODE + 4;
const OBJECT_ID: usize = LEN + 4;

/// `struct cachefiles_open`, after the header.
const VOLUME_KEY_SIZE: usize = 0;
const COOKIE_KEY_SIZE: usize = VOLUME_KEY_SIZE + 4;
const FD: usize = COOKIE_KEY_SIZE + 4;
const FLAGS: usize = FD + 4;
const OPEN_DATA: usize = FLAGS + 4;

/// `struct cachefiles_read`, after the header.
const READ_OFFSET: usize = 0;
const READ_LEN: usize = READ_OFFSET + 8;

/// `enum cachefiles_opcode`.
const OP_OPEN: u32 = 0;
const OP_CLOSE: u32 = 1;
const OP_READ: u32 = 2;

/// A request's number. The kernel uses a number again once its request is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MessageId(pub u32);

/// An open cache object's number. A reopened object has another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ObjectId(pub u32);

/// One request of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// The number to answer with.
    pub id: MessageId,
    /// The object it is about.
    pub object: ObjectId,
    /// What is asked.
    pub request: Request<'a>,
}

/// What the kernel asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// An object is opened; to be answered with [`Device::open_done`].
    Open {
        /// `erofs,<domain_id or fsid>`, without the NUL that the kernel counts.
        volume: &'a [u8],
        /// fsid of a primary device, tag of an extra device.
        cookie: &'a [u8],
        /// Number of a new descriptor of this process, not owned by this value: see [`OpenMessage`].
        fd: RawFd,
    },
    /// An object is closed; there is no answer.
    Close,
    /// A range is missing; to be answered with [`Object::read_complete`] after it was written.
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

/// Bytes that are no message of this protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a cachefiles message of {len} bytes is malformed: {what}")]
pub struct BadMessage {
    /// Bytes given.
    pub len: usize,
    /// What is wrong.
    pub what: &'static str,
}

impl<'a> Message<'a> {
    /// Parses one message, exactly as `read` gave it. Integers are in host order.
    pub fn parse(bytes: &'a [u8]) -> Result<Message<'a>, BadMessage> {
        let bad = |what| BadMessage { len: bytes.len(), what };
        let header = |at| u32_at(bytes, at).ok_or(bad("shorter than its header"));
        let (id, opcode, len, object) = (header(MSG_ID)?, header(OPCODE)?, header(LEN)?, header(OBJECT_ID)?);
        if len as usize != bytes.len() {
            return Err(bad("its length field is not its length"));
        }
        let data = &bytes[HEADER_LEN..];
        let request = match opcode {
            OP_OPEN => parse_open(data).map_err(bad)?,
            OP_CLOSE => Request::Close,
            OP_READ => {
                let field = |at| u64_at(data, at).ok_or(bad("shorter than a READ"));
                Request::Read { offset: field(READ_OFFSET)?, len: field(READ_LEN)? }
            }
            _ => return Err(bad("unknown opcode")),
        };
        Ok(Message { id: MessageId(id), object: ObjectId(object), request })
    }
}

fn parse_open(data: &[u8]) -> Result<Request<'_>, &'static str> {
    let field = |at| u32_at(data, at).ok_or("shorter than an OPEN");
    let (volume_len, cookie_len, fd) = (field(VOLUME_KEY_SIZE)? as usize, field(COOKIE_KEY_SIZE)? as usize, field(FD)?);
    field(FLAGS)?;
    let keys = &data[OPEN_DATA..];
    let volume = keys.get(..volume_len).ok_or("the volume key leaves the message")?;
    let cookie = keys[volume_len..].get(..cookie_len).ok_or("the cookie key leaves the message")?;
    let volume = volume.strip_suffix(&[0]).ok_or("the volume key has no NUL at its end")?;
    let fd = RawFd::try_from(fd).map_err(|_| "the descriptor is negative")?;
    Ok(Request::Open { volume, cookie, fd })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// How much of the cache file system's space and inodes stays free, in percent: below `stop` writes fail with `ENOBUFS`.
/// `cull < run` and `stop < cull` must hold (`fs/cachefiles/daemon.c`, `cachefiles_daemon_bind`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Culling is not wanted any more above this much free (`brun`, `frun`).
    pub run: u8,
    /// Culling is wanted below this much free (`bcull`, `fcull`).
    pub cull: u8,
    /// Writes fail below this much free (`bstop`, `fstop`).
    pub stop: u8,
}

impl Default for Limits {
    /// Half of the kernel's defaults of 7, 5 and 1: culling is ours in on-demand mode, only `stop` matters.
    fn default() -> Self {
        Limits { run: 4, cull: 3, stop: 1 }
    }
}

/// The device, or a kept copy of its descriptor.
#[derive(Debug)]
pub struct Device(File);

impl Device {
    /// `open("/dev/cachefiles", O_RDWR)`. `ENOENT` or `ENODEV`: this kernel has none; `EBUSY`: another daemon has it; `EPERM`: not privileged.
    pub fn open() -> io::Result<Device> {
        Ok(Device(File::options().read(true).write(true).open("/dev/cachefiles")?))
    }

    /// A device whose descriptor was kept from an earlier process: set up already, to be continued with [`Device::restore`].
    pub fn from_kept(fd: OwnedFd) -> Device {
        Device(File::from(fd))
    }

    /// Another descriptor of the same open device.
    pub fn try_clone_fd(&self) -> io::Result<OwnedFd> {
        self.0.as_fd().try_clone_to_owned()
    }

    /// Sets up the cache: `dir`, `tag`, limits, then `bind ondemand`. `dir` must be on a file system with `O_DIRECT`, tmpfiles and xattrs
    /// (ext4, XFS); `tag` names the cache and must be unique on the machine. Refused: `EINVAL` or `EOPNOTSUPP` from `bind` where on-demand mode
    /// is not configured.
    pub fn bind(&self, dir: &Path, tag: &str, limits: Limits) -> io::Result<()> {
        let mut dir_command = b"dir ".to_vec();
        dir_command.extend_from_slice(std::os::unix::ffi::OsStrExt::as_bytes(dir.as_os_str()));
        self.command(&dir_command)?;
        self.command(format!("tag {tag}").as_bytes())?;
        for kind in ['b', 'f'] {
            // Each is checked against the others as they are at that moment, the kernel's defaults at first: lowest first fits below those.
            for (name, percent) in [("stop", limits.stop), ("cull", limits.cull), ("run", limits.run)] {
                self.command(format!("{kind}{name} {percent}%").as_bytes())?;
            }
        }
        self.command(b"bind ondemand")
    }

    /// `restore`: every unanswered request is asked again, after an `OPEN` for each object that lost its descriptor. For a kept device only.
    /// Doing it twice before anything is read is no error. What a refusal means tells [`is_final`].
    pub fn restore(&self) -> io::Result<()> {
        self.command(b"restore")
    }

    /// `copen <id>,<size>`: answers an `OPEN` with the object's size in bytes, or with an errno.
    pub fn open_done(&self, id: MessageId, size: Result<u64, rustix::io::Errno>) -> io::Result<()> {
        self.command(open_answer(id, size).as_bytes())
    }

    /// Reads one request into `buffer` (at least [`MESSAGE_MAX`] bytes). `None`: nothing to ask at the moment.
    pub fn read<'a>(&self, buffer: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.0, &mut *buffer))? {
            0 => Ok(None),
            len => Ok(Some(&buffer[..len])),
        }
    }

    /// Reads one request and parses it, taking ownership of the descriptor that comes with an `OPEN`. A malformed message is an
    /// `InvalidData` error.
    pub fn next(&self, buffer: &mut [u8]) -> io::Result<Option<OpenMessage>> {
        let Some(bytes) = self.read(buffer)? else { return Ok(None) };
        let message = Message::parse(bytes).map_err(|bad| io::Error::new(io::ErrorKind::InvalidData, bad))?;
        Ok(Some(match message.request {
            Request::Open { volume, cookie, fd } => OpenMessage::Open {
                id: message.id,
                object: Object {
                    id: message.object,
                    // SAFETY: the kernel has just installed this descriptor in our table for the process that read the message
                    // (`cachefiles_ondemand_get_fd`), and this is the one place that takes it.
                    fd: unsafe { OwnedFd::from_raw_fd(fd) },
                },
                volume: volume.to_vec(),
                cookie: cookie.to_vec(),
            },
            Request::Close => OpenMessage::Close { object: message.object },
            Request::Read { offset, len } => OpenMessage::Read { id: message.id, object: message.object, offset, len },
        }))
    }

    fn command(&self, command: &[u8]) -> io::Result<()> {
        let written = rustix::io::retry_on_intr(|| rustix::io::write(&self.0, command)).map_err(|e| {
            io::Error::new(io::Error::from(e).kind(), CommandRefused { command: String::from_utf8_lossy(command).into_owned(), errno: e })
        })?;
        if written == command.len() { Ok(()) } else { Err(io::Error::new(io::ErrorKind::WriteZero, "cachefiles took a command in part")) }
    }
}

impl From<Device> for OwnedFd {
    fn from(device: Device) -> OwnedFd {
        device.0.into()
    }
}

/// Whether a refused command would be refused for ever: the kernel has declared the cache dead (`EIO`, as to every command from then on), or does
/// not know the command (`EOPNOTSUPP`, `EINVAL`).
pub fn is_final(error: &io::Error) -> bool {
    let refused = error.get_ref().and_then(|source| source.downcast_ref::<CommandRefused>());
    refused.is_some_and(|refused| matches!(refused.errno, rustix::io::Errno::IO | rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::INVAL))
}

/// The kernel refused a command.
#[derive(Debug, thiserror::Error)]
#[error("cachefiles refused the command {command:?}: {errno}")]
struct CommandRefused {
    command: String,
    errno: rustix::io::Errno,
}

/// A request that owns what came with it.
#[derive(Debug)]
pub enum OpenMessage {
    /// See [`Request::Open`].
    Open {
        /// The number to answer with.
        id: MessageId,
        /// The object, to be written through.
        object: Object,
        /// Volume key.
        volume: Vec<u8>,
        /// Cookie key.
        cookie: Vec<u8>,
    },
    /// See [`Request::Close`]. Drop the [`Object`].
    Close {
        /// The object's number.
        object: ObjectId,
    },
    /// See [`Request::Read`].
    Read {
        /// The number to answer with.
        id: MessageId,
        /// The object's number.
        object: ObjectId,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

/// An open cache object: write-only, `O_DIRECT`.
#[derive(Debug)]
pub struct Object {
    id: ObjectId,
    fd: OwnedFd,
}

/// `#define CACHEFILES_IOC_READ_COMPLETE _IOW(0x98, 1, int)`; the argument is the message id itself, not a pointer to it.
const READ_COMPLETE: libc::c_ulong = nix::request_code_write!(0x98, 1, size_of::<libc::c_int>()) as libc::c_ulong;

impl Object {
    /// The object's number.
    pub fn id(&self) -> ObjectId {
        self.id
    }

    /// Answers the `READ` with number `id`: the kernel looks at the file again. Nothing may be left to write for it.
    pub fn read_complete(&self, id: MessageId) -> io::Result<()> {
        // SAFETY: this ioctl takes its argument by value and touches no memory of ours.
        let done = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&self.fd), READ_COMPLETE, libc::c_ulong::from(id.0)) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Writes all of `data` at `offset`, both whole blocks: the file is open for direct I/O, and Linux 6.1 silently rounds an offset down
    /// to a page. `ENOBUFS`: the cache's file system has less free than [`Limits::stop`].
    pub fn write_at(&self, data: &Buffer, offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < data.len() {
            let written = rustix::io::retry_on_intr(|| rustix::io::pwrite(&self.fd, &data[done..], offset + done as u64))?;
            done = after_write(done, written, data.len()).ok_or(io::ErrorKind::WriteZero)?;
        }
        Ok(())
    }

    /// `lseek(SEEK_DATA)`: the first byte at or after `offset` that is stored, `None` when there is none.
    pub fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        match rustix::fs::seek(&self.fd, SeekFrom::Data(offset)) {
            Ok(at) => Ok(Some(at)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// `lseek(SEEK_HOLE)`: the first byte at or after `offset` that is not stored (at most the file's end), `None` past the end.
    pub fn next_hole(&self, offset: u64) -> io::Result<Option<u64>> {
        match rustix::fs::seek(&self.fd, SeekFrom::Hole(offset)) {
            Ok(at) => Ok(Some(at)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Object {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Where to go on when `done` of `len` bytes were written and then `written` more: at a page, so that a page written in part is written
/// again whole. `None` if that would be no progress.
fn after_write(done: usize, written: usize, len: usize) -> Option<usize> {
    let end = done + written;
    let next = if end == len { end } else { end & !(PAGE - 1) };
    (next > done).then_some(next)
}

/// Text of the answer to an `OPEN`: size, or negative errno.
fn open_answer(id: MessageId, size: Result<u64, rustix::io::Errno>) -> String {
    match size {
        Ok(size) => format!("copen {},{size}", id.0),
        Err(errno) => format!("copen {},-{}", id.0, errno.raw_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(id: u32, opcode: u32, object: u32, data: &[u8]) -> Vec<u8> {
        let len = (HEADER_LEN + data.len()) as u32;
        [id, opcode, len, object].iter().flat_map(|n| n.to_ne_bytes()).chain(data.iter().copied()).collect()
    }

    fn open_data(volume: &[u8], cookie: &[u8], fd: u32) -> Vec<u8> {
        let sizes = [volume.len() as u32, cookie.len() as u32, fd, 0];
        sizes.iter().flat_map(|n| n.to_ne_bytes()).chain(volume.iter().chain(cookie).copied()).collect()
    }

    #[test]
    fn messages_are_understood() {
        let check = |bytes: &[u8], expected| assert_eq!(Message::parse(bytes), Ok(expected), "{bytes:?}");
        let open = open_data(b"erofs,dom\0", b"tag", 9);
        check(
            &message(1, 0, 2, &open),
            Message { id: MessageId(1), object: ObjectId(2), request: Request::Open { volume: b"erofs,dom", cookie: b"tag", fd: 9 } },
        );
        check(&message(0, 1, 3, &[]), Message { id: MessageId(0), object: ObjectId(3), request: Request::Close });
        let read: Vec<u8> = [8192u64, 65536].iter().flat_map(|n| n.to_ne_bytes()).collect();
        check(&message(5, 2, 4, &read), Message { id: MessageId(5), object: ObjectId(4), request: Request::Read { offset: 8192, len: 65536 } });
    }

    #[test]
    fn malformed_messages_are_refused() {
        let good = message(1, 0, 2, &open_data(b"erofs,x\0", b"tag", 9));
        let mut wrong_len = good.clone();
        wrong_len[LEN] += 1;
        let cases: &[(&[u8], &str)] = &[
            (&[], "header"),
            (&good[..HEADER_LEN - 1], "header"),
            (&good[..good.len() - 1], "length field"),
            (&wrong_len, "length field"),
            (&message(1, 0, 2, &[0; 15]), "shorter than an OPEN"),
            (&message(1, 0, 2, &open_data(b"no nul", b"tag", 9)), "NUL"),
            (&message(1, 0, 2, &open_data(b"", b"tag", 9)), "NUL"),
            (&message(1, 0, 2, &open_data(b"v\0", b"tag", u32::MAX)), "negative"),
            (&message(1, 0, 2, &[255; 16]), "volume key leaves"),
            (&message(1, 2, 2, &[0; READ_LEN + 7]), "shorter than a READ"),
            (&message(1, 3, 2, &[]), "opcode"),
        ];
        for (bytes, what) in cases {
            let error = Message::parse(bytes).expect_err(what);
            assert!(error.what.contains(what), "{error} should say {what:?}");
        }
    }

    #[test]
    fn a_short_write_is_continued_at_a_page() {
        for (done, written, expected) in [
            (0, 16_384, Some(16_384)),
            (0, 8192, Some(8192)),
            (0, 8704, Some(8192)),
            (8192, 4097, Some(12_288)),
            (12_288, 4096, Some(16_384)),
            (8192, 4095, None),
            (0, 0, None),
        ] {
            assert_eq!(after_write(done, written, 16_384), expected, "{written} after {done}");
        }
        assert_eq!(after_write(4096, 512, 4608), Some(4608), "the end is the end");
    }

    #[test]
    fn answers_and_numbers_are_the_kernels() {
        assert_eq!(open_answer(MessageId(7), Ok(1 << 33)), "copen 7,8589934592");
        assert_eq!(open_answer(MessageId(7), Err(rustix::io::Errno::NOENT)), "copen 7,-2");
        // _IOC(_IOC_WRITE = 1, 0x98, 1, 4) on every architecture with the generic layout.
        assert_eq!(READ_COMPLETE, 0x4004_9801);
    }

    #[test]
    fn refused_commands_say_which() {
        let null = Device(File::options().read(true).write(true).open("/dev/full").expect("/dev/full"));
        let error = null.bind(Path::new("/nowhere"), "t", Limits::default()).expect_err("/dev/full takes nothing");
        assert!(error.to_string().contains("dir /nowhere"), "{error}");
    }

    proptest! {
        #[test]
        fn parsing_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
            let _ = Message::parse(&bytes);
        }

        #[test]
        fn parsing_never_panics_behind_a_true_header(opcode in 0u32..4, data in proptest::collection::vec(any::<u8>(), 0..128)) {
            let _ = Message::parse(&message(1, opcode, 2, &data));
        }

        #[test]
        fn an_open_round_trips(volume in "[a-z,]{0,40}", cookie in "[a-z0-9]{0,64}", fd in 0u32..1 << 31) {
            let keyed = format!("{volume}\0");
            let bytes = message(1, 0, 2, &open_data(keyed.as_bytes(), cookie.as_bytes(), fd));
            let request = Message::parse(&bytes).expect("a true message").request;
            prop_assert_eq!(request, Request::Open { volume: volume.as_bytes(), cookie: cookie.as_bytes(), fd: fd as RawFd });
        }
    }
}
