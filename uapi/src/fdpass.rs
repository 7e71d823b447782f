//! File descriptors between processes: `SOCK_SEQPACKET` pairs and `SCM_RIGHTS`.
//!
//! A message is some bytes with at most [`MAX_FDS`] descriptors; it arrives whole or not at all (`unix(7)`). Descriptors in a message that
//! nobody has received yet are kept alive by the socket's queue, so a sender may die right after [`send`].
//!
//! Facts: `kernel-notes.md`, "Processes and descriptors".

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketFlags, SocketType,
};

/// Most descriptors in one message. The kernel allows 253 (`SCM_MAX_FD`); a small number keeps the buffer on the stack.
pub const MAX_FDS: usize = 4;

/// Most bytes in one message. Well under the default socket buffer of 208 KiB, so that a send needs no large allocation in the kernel.
pub const MAX_BYTES: usize = 16 * 1024;

/// One received message.
#[derive(Debug)]
pub struct Received {
    /// Length of the message in the buffer given to [`receive`]; 0 means that the other side has closed its end.
    pub len: usize,
    /// Descriptors that came with it, close-on-exec, in the sender's order.
    pub fds: Vec<OwnedFd>,
}

/// `socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC)`: two connected ends that keep message boundaries.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// `sendmsg(SCM_RIGHTS)`: sends `bytes` (1..=[`MAX_BYTES`]) and copies of `fds` (at most [`MAX_FDS`]) as one message. Blocks while the other
/// side's queue is full; `EPIPE` when it is closed.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    if bytes.is_empty() || bytes.len() > MAX_BYTES || fds.len() > MAX_FDS {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("a message of {} bytes and {} descriptors", bytes.len(), fds.len())));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "control buffer too small"));
    }
    let sent = rustix::io::retry_on_intr(|| rustix::net::sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL))?;
    if sent == bytes.len() { Ok(()) } else { Err(io::Error::new(io::ErrorKind::WriteZero, "message sent in part")) }
}

/// `recvmsg(MSG_CMSG_CLOEXEC)`: waits for the next message. A message larger than `buffer`, or with more than [`MAX_FDS`] descriptors, is an
/// `InvalidData` error and is lost.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = rustix::io::retry_on_intr(|| rustix::net::recvmsg(&socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC))?;
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    if message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "message larger than the buffer for it"));
    }
    Ok(Received { len: message.bytes, fds })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    #[test]
    fn bytes_and_descriptors_arrive_together() {
        let (a, b) = pair().expect("socketpair");
        let mut file = tempfile::tempfile().expect("temporary file");
        file.write_all(b"kept").expect("write");
        for fds in 0..=MAX_FDS {
            let sent: Vec<_> = (0..fds).map(|_| file.as_fd()).collect();
            send(&a, b"hello", &sent).expect("send");
        }
        for fds in 0..=MAX_FDS {
            let mut buffer = [0; 16];
            let got = receive(&b, &mut buffer).expect("receive");
            assert_eq!((&buffer[..got.len], got.fds.len()), (&b"hello"[..], fds));
            for fd in got.fds {
                assert!(rustix::io::fcntl_getfd(&fd).expect("flags").contains(rustix::io::FdFlags::CLOEXEC));
                let mut copy = File::from(fd);
                copy.rewind().expect("rewind");
                let mut text = String::new();
                copy.read_to_string(&mut text).expect("read");
                assert_eq!(text, "kept");
            }
        }
    }

    #[test]
    fn a_message_outlives_its_sender_and_the_end_is_length_zero() {
        let (a, b) = pair().expect("socketpair");
        send(&a, b"last words", &[b.as_fd()]).expect("send");
        drop(a);
        let mut buffer = [0; 32];
        assert_eq!(receive(&b, &mut buffer).map(|m| (m.len, m.fds.len())).expect("message"), (10, 1));
        assert_eq!(receive(&b, &mut buffer).map(|m| (m.len, m.fds.len())).expect("end"), (0, 0));
    }

    #[test]
    fn what_does_not_fit_is_an_error_on_either_side() {
        let (a, b) = pair().expect("socketpair");
        assert!(send(&a, b"", &[]).is_err());
        assert!(send(&a, &vec![0; MAX_BYTES + 1], &[]).is_err());
        assert!(send(&a, b"x", &[a.as_fd(); MAX_FDS + 1]).is_err());
        send(&a, b"too long for it", &[]).expect("send");
        assert_eq!(receive(&b, &mut [0; 4]).map_err(|e| e.kind()).map(|m| m.len), Err(io::ErrorKind::InvalidData));
    }

    #[test]
    fn sending_to_a_closed_end_fails() {
        let (a, b) = pair().expect("socketpair");
        drop(b);
        assert_eq!(send(&a, b"x", &[]).map_err(|e| e.kind()), Err(io::ErrorKind::BrokenPipe));
    }
}
