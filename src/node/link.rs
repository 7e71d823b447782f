//! The worker's end of the line to its holder.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use super::protocol::{self, FdName, Message};

/// The line. Messages may be sent from any thread: each is one system call that the kernel keeps whole.
#[derive(Debug)]
pub struct HolderLink(OwnedFd);

/// What the holder kept, by name.
pub type KeptByName = BTreeMap<FdName, (OwnedFd, Vec<u8>)>;

impl HolderLink {
    /// Takes in everything the holder has kept. An error if the holder is gone.
    pub fn open(socket: OwnedFd) -> io::Result<(HolderLink, KeptByName)> {
        let mut kept = KeptByName::new();
        loop {
            match protocol::receive(&socket)? {
                Some(Message::Fd { name, payload, fd }) => _ = kept.insert(name, (fd, payload)),
                Some(Message::Done) => return Ok((HolderLink(socket), kept)),
                Some(Message::Forget { name }) => return Err(io::Error::other(format!("the holder asks the worker to forget {name}"))),
                None => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the holder is gone")),
            }
        }
    }

    /// The holder keeps `fd` and `payload` for the next worker from now on, even if this process ends right after this call.
    pub fn keep(&self, name: &FdName, payload: &[u8], fd: BorrowedFd<'_>) -> io::Result<()> {
        protocol::send_fd(&self.0, name, payload, fd)
    }

    /// The holder closes its copy.
    pub fn forget(&self, name: &FdName) -> io::Result<()> {
        protocol::send_forget(&self.0, name)
    }

    /// Requests are answered from now on.
    pub fn ready(&self) -> io::Result<()> {
        protocol::send_done(&self.0)
    }

    /// Blocks until the holder is gone.
    pub fn wait_for_end(&self) {
        // The holder has nothing to say after its first words: whatever ends the wait means that the line cannot be used any more.
        while let Ok(Some(_)) = protocol::receive(&self.0) {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn everything_kept_is_taken_in_before_work_begins() {
        let (holder, worker) = uapi::fdpass::pair().expect("socketpair");
        let name = |text| FdName::new(text).expect("a name");
        protocol::send_fd(&holder, &name("a"), b"1", holder.as_fd()).expect("send");
        protocol::send_fd(&holder, &name("b"), b"2", holder.as_fd()).expect("send");
        protocol::send_done(&holder).expect("send");
        let (link, kept) = HolderLink::open(worker).expect("open");
        let payloads: Vec<_> = kept.iter().map(|(name, (_, payload))| (name.as_str(), payload.as_slice())).collect();
        assert_eq!(payloads, [("a", &b"1"[..]), ("b", &b"2"[..])]);
        link.ready().expect("ready");
        assert!(matches!(protocol::receive(&holder), Ok(Some(Message::Done))));
        drop((holder, kept));
        link.wait_for_end();
    }

    #[test]
    fn a_holder_that_died_is_noticed_at_the_start() {
        let (holder, worker) = uapi::fdpass::pair().expect("socketpair");
        drop(holder);
        assert_eq!(HolderLink::open(worker).map_err(|error| error.kind()).map(|_| ()), Err(io::ErrorKind::UnexpectedEof));
    }
}
