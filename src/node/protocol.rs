//! What holder and worker say to each other: one `SOCK_SEQPACKET` message per [`Message`].
//!
//! ```text
//! holder → worker:  Fd* Done          everything kept, then "that was all"
//! worker → holder:  (Fd | Forget)* Done (Fd | Forget)*     Done = "I answer requests now"
//! ```
//!
//! Bytes: kind u8 | name length u8 | name | payload. An `Fd` comes with exactly one descriptor, the others with none.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use uapi::fdpass;

const KIND: usize = 0;
const NAME_LEN: usize = KIND + 1;
const NAME: usize = NAME_LEN + 1;

const KIND_FD: u8 = 1;
const KIND_FORGET: u8 = 2;
const KIND_DONE: u8 = 3;

/// Longest payload. What is kept beside a descriptor is small: negotiated parameters, not data.
pub const PAYLOAD_MAX: usize = 8 * 1024;

/// Name of a kept descriptor: 1..=64 of `a-z`, `0-9`, `.` and `-`, so that it can be a file name and a name in the service manager's fd store.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FdName(String);

impl FdName {
    /// Longest name.
    pub const MAX: usize = 64;

    /// `name` if it has the form of a name.
    pub fn new(name: &str) -> Option<FdName> {
        let good = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'.' || c == b'-';
        let fits = !name.is_empty() && name.len() <= Self::MAX && !name.starts_with('.');
        (fits && name.bytes().all(good)).then(|| FdName(name.to_owned()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for FdName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// One message.
#[derive(Debug)]
pub enum Message {
    /// Keep this (to the holder), or: this was kept (to the worker). An earlier descriptor of the name is replaced.
    Fd {
        /// What it is called.
        name: FdName,
        /// What the next worker needs to know of it.
        payload: Vec<u8>,
        /// The descriptor.
        fd: OwnedFd,
    },
    /// Close your copy of this descriptor. One that is not kept is no error.
    Forget {
        /// What it is called.
        name: FdName,
    },
    /// To the worker: that was all. To the holder: I answer requests now.
    Done,
}

/// Bytes that are no message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message between holder and worker is malformed: {what}")]
pub struct BadMessage {
    /// What is wrong.
    pub what: &'static str,
}

/// Kind, name and payload of a message, before its descriptor is attached.
#[derive(Debug, PartialEq, Eq)]
enum Text<'a> {
    Fd { name: FdName, payload: &'a [u8] },
    Forget { name: FdName },
    Done,
}

fn parse(bytes: &[u8]) -> Result<Text<'_>, BadMessage> {
    let bad = |what| BadMessage { what };
    let (Some(kind), Some(name_len)) = (bytes.get(KIND), bytes.get(NAME_LEN)) else { return Err(bad("shorter than its header")) };
    let name_end = NAME + usize::from(*name_len);
    let name = bytes.get(NAME..name_end).ok_or(bad("the name leaves the message"))?;
    let payload = &bytes[name_end..];
    let name = || std::str::from_utf8(name).ok().and_then(FdName::new).ok_or(bad("not a name"));
    match *kind {
        KIND_FD if payload.len() <= PAYLOAD_MAX => Ok(Text::Fd { name: name()?, payload }),
        KIND_FD => Err(bad("payload too long")),
        KIND_FORGET if payload.is_empty() => Ok(Text::Forget { name: name()? }),
        KIND_DONE if bytes.len() == NAME => Ok(Text::Done),
        KIND_FORGET | KIND_DONE => Err(bad("longer than its kind")),
        _ => Err(bad("unknown kind")),
    }
}

fn encode(kind: u8, name: &str, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(NAME + name.len() + payload.len());
    bytes.extend_from_slice(&[kind, name.len() as u8]);
    bytes.extend_from_slice(name.as_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// Sends [`Message::Fd`] with a copy of `fd`. `payload` may have [`PAYLOAD_MAX`] bytes.
pub fn send_fd(socket: impl AsFd, name: &FdName, payload: &[u8], fd: BorrowedFd<'_>) -> io::Result<()> {
    if payload.len() > PAYLOAD_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("the payload of {name} has {} bytes", payload.len())));
    }
    fdpass::send(socket, &encode(KIND_FD, name.as_str(), payload), &[fd])
}

/// Sends [`Message::Forget`].
pub fn send_forget(socket: impl AsFd, name: &FdName) -> io::Result<()> {
    fdpass::send(socket, &encode(KIND_FORGET, name.as_str(), &[]), &[])
}

/// Sends [`Message::Done`].
pub fn send_done(socket: impl AsFd) -> io::Result<()> {
    fdpass::send(socket, &encode(KIND_DONE, "", &[]), &[])
}

/// Waits for the next message. `None`: the other process is gone. Malformed messages are `InvalidData` errors.
pub fn receive(socket: impl AsFd) -> io::Result<Option<Message>> {
    let mut buffer = [0; NAME + FdName::MAX + PAYLOAD_MAX];
    let received = match fdpass::receive(socket, &mut buffer) {
        // The other end was closed with messages of ours unread in it.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
        other => other?,
    };
    if received.len == 0 {
        return Ok(None);
    }
    let invalid = |bad: BadMessage| io::Error::new(io::ErrorKind::InvalidData, bad);
    let mut fds = received.fds.into_iter();
    let message = match parse(&buffer[..received.len]).map_err(invalid)? {
        Text::Fd { name, payload } => {
            let fd = fds.next().ok_or_else(|| invalid(BadMessage { what: "its descriptor is missing" }))?;
            Message::Fd { name, payload: payload.to_vec(), fd }
        }
        Text::Forget { name } => Message::Forget { name },
        Text::Done => Message::Done,
    };
    match fds.next() {
        Some(_) => Err(invalid(BadMessage { what: "more descriptors than its kind has" })),
        None => Ok(Some(message)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_are_safe_as_file_names_and_in_the_fd_store() {
        for (name, good) in [
            ("fuse", true),
            ("fuse-blob.2", true),
            ("", false),
            (".", false),
            ("..", false),
            (".x", false),
            ("a/b", false),
            ("a:b", false),
            ("A", false),
            ("a b", false),
            (&"x".repeat(64), true),
            (&"x".repeat(65), false),
        ] {
            assert_eq!(FdName::new(name).is_some(), good, "{name:?}");
        }
    }

    #[test]
    fn malformed_messages_are_refused() {
        let long = encode(KIND_FD, "a", &[0; PAYLOAD_MAX + 1]);
        let cases: &[(&[u8], &str)] = &[
            (&[], "header"),
            (&[KIND_FD], "header"),
            (&[KIND_FD, 1], "leaves"),
            (&[KIND_FD, 0], "not a name"),
            (&[KIND_FD, 1, b'/'], "not a name"),
            (&[KIND_FD, 1, 255], "not a name"),
            (&long, "payload"),
            (&[KIND_FORGET, 1, b'a', 0], "longer"),
            (&[KIND_DONE, 0, 0], "longer"),
            (&[KIND_DONE, 1, b'a'], "longer"),
            (&[0, 0], "unknown kind"),
        ];
        for (bytes, what) in cases {
            assert!(parse(bytes).expect_err(what).what.contains(what), "{bytes:?} should be refused with {what}");
        }
    }

    #[test]
    fn messages_travel_with_their_descriptors() {
        let (a, b) = fdpass::pair().expect("socketpair");
        let name = FdName::new("fuse").expect("a name");
        send_fd(&a, &name, b"parameters", a.as_fd()).expect("send");
        send_forget(&a, &name).expect("send");
        send_done(&a).expect("send");
        fdpass::send(&a, &encode(KIND_FD, "fuse", b""), &[]).expect("send");
        fdpass::send(&a, &encode(KIND_DONE, "", b""), &[a.as_fd()]).expect("send");
        drop(a);
        assert!(matches!(receive(&b), Ok(Some(Message::Fd { name, payload, .. })) if name.as_str() == "fuse" && payload == b"parameters"));
        assert!(matches!(receive(&b), Ok(Some(Message::Forget { name })) if name.as_str() == "fuse"));
        assert!(matches!(receive(&b), Ok(Some(Message::Done))));
        assert!(receive(&b).is_err(), "a descriptor is missing");
        assert!(receive(&b).is_err(), "a descriptor too many");
        assert!(matches!(receive(&b), Ok(None)));
    }

    proptest! {
        #[test]
        fn parsing_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn messages_round_trip(name in "[a-z0-9-][a-z0-9.-]{0,63}", payload in proptest::collection::vec(any::<u8>(), 0..200)) {
            let bytes = encode(KIND_FD, &name, &payload);
            prop_assert_eq!(parse(&bytes), Ok(Text::Fd { name: FdName::new(&name).expect("a name"), payload: &payload }));
        }
    }
}
