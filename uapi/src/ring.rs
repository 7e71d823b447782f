//! One io_uring ring that watches one descriptor with a multishot poll.
//!
//! For descriptors whose `read` never blocks but says "nothing yet", such as `/dev/cachefiles`: one submission keeps reporting
//! (`IORING_POLL_ADD_MULTI`, Linux 5.13) until the kernel says that it will not (`IORING_CQE_F_MORE` missing), then it is submitted again.
//!
//! Facts: `kernel-notes.md`, "io_uring".

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use io_uring::{IoUring, cqueue, opcode, types};

/// Entries of the submission queue: one poll is all that is ever submitted. The completion queue has twice as many; one that overflows only
/// ends the multishot poll, which is then submitted again.
const ENTRIES: u32 = 4;

/// What a watched descriptor is ready for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready(u32);

impl Ready {
    /// There is something to read (`POLLIN`).
    pub fn readable(self) -> bool {
        self.0 & libc::POLLIN as u32 != 0
    }

    /// It takes writes (`POLLOUT`); what this means is the descriptor's own affair.
    pub fn writable(self) -> bool {
        self.0 & libc::POLLOUT as u32 != 0
    }

    /// The other side is gone or the descriptor is broken (`POLLHUP`, `POLLERR`).
    pub fn closed(self) -> bool {
        self.0 & (libc::POLLHUP | libc::POLLERR) as u32 != 0
    }
}

/// A ring that polls one descriptor for reading. The ring goes first when dropped, so the poll never outlives its descriptor.
pub struct PollRing {
    ring: IoUring,
    armed: bool,
    fd: OwnedFd,
}

impl PollRing {
    /// A ring that watches `fd`, which it keeps open. Errors are those of `io_uring_setup(2)`: `ENOSYS` or `EPERM` where io_uring is
    /// missing or forbidden.
    pub fn new(fd: OwnedFd) -> io::Result<PollRing> {
        Ok(PollRing { ring: IoUring::new(ENTRIES)?, armed: false, fd })
    }

    /// Waits until the descriptor is ready and says for what. Since the poll is edge-like once armed, the caller reads until "nothing yet"
    /// before it waits again.
    pub fn wait(&mut self) -> io::Result<Ready> {
        loop {
            if !self.armed {
                self.arm()?;
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            let mut ready = 0;
            let mut failed = None;
            for entry in self.ring.completion() {
                self.armed &= cqueue::more(entry.flags());
                match entry.result() {
                    error if error < 0 => failed = Some(io::Error::from_raw_os_error(-error)),
                    events => ready |= events as u32,
                }
            }
            match failed {
                Some(error) => return Err(error),
                None if ready != 0 => return Ok(Ready(ready)),
                None => {}
            }
        }
    }

    fn arm(&mut self) -> io::Result<()> {
        let poll = opcode::PollAdd::new(types::Fd(self.fd.as_fd().as_raw_fd()), libc::POLLIN as u32).multi(true).build();
        // SAFETY: the entry refers to no memory of ours, only to `self.fd`, which stays open until the ring is gone (field order).
        unsafe { self.ring.submission().push(&poll) }.map_err(|_| io::Error::other("the submission queue of a poll ring is full"))?;
        self.armed = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_is_reported_and_then_the_end() {
        let (a, b) = crate::fdpass::pair().expect("socketpair");
        let reader = b.try_clone().expect("dup");
        let mut ring = PollRing::new(b).expect("io_uring");
        for _ in 0..50 {
            crate::fdpass::send(&a, b"x", &[]).expect("send");
            assert!(ring.wait().expect("wait").readable());
            assert_eq!(crate::fdpass::receive(&reader, &mut [0; 8]).expect("receive").len, 1);
        }
        drop(a);
        let mut ready = ring.wait().expect("wait");
        while !ready.closed() {
            ready = ring.wait().expect("wait");
        }
        assert!(ready.readable(), "the end can be read");
    }

    #[test]
    fn what_was_there_before_is_reported() {
        let (a, b) = crate::fdpass::pair().expect("socketpair");
        crate::fdpass::send(&a, b"x", &[]).expect("send");
        assert!(PollRing::new(b).expect("io_uring").wait().expect("wait").readable());
    }
}
