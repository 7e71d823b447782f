//! `/dev/fuse`: messages in, replies out, by several threads at once.
//!
//! All threads share one open file. Cloned device files (`FUSE_DEV_IOC_CLONE`) would each keep their own list of requests being worked on,
//! and closing one fails those requests (`fs/fuse/dev.c`, `fuse_dev_release`); with a single open file that a second process keeps, a
//! server may die and its successor asks for the unanswered requests again.
//!
//! Facts: `kernel-notes.md`, "FUSE".

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::{Errno, Unique, out_header};

/// `FUSE_NOTIFY_RESEND`: every request that was read and not answered becomes readable again (6.9+).
const NOTIFY_RESEND: i32 = 7;

/// Parts of a reply that need no allocation: a 1 MiB read over 64 KiB units touches 17.
const INLINE_PARTS: usize = 24;

/// An open connection to the kernel.
#[derive(Debug)]
pub struct Device {
    fuse: OwnedFd,
    /// Readable from [`Device::stop`] on.
    stopped: OwnedFd,
}

/// One thread's place in the queue for messages. Waiters are woken one at a time.
#[derive(Debug)]
pub struct Waiter {
    epoll: OwnedFd,
}

/// What waiting for a message brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// A message of this many bytes.
    Message(usize),
    /// [`Device::stop`] was called; unread messages stay where they are.
    Stopped,
    /// The mount is gone; nothing will come any more.
    Gone,
}

const FUSE: epoll::EventData = epoll::EventData::new_u64(0);
const STOPPED: epoll::EventData = epoll::EventData::new_u64(1);

impl Device {
    /// Takes the descriptor that a mount was made with. It becomes non-blocking for everyone who holds the same open file.
    pub fn new(fuse: OwnedFd) -> Result<Device, Errno> {
        fcntl_setfl(&fuse, fcntl_getfl(&fuse)? | OFlags::NONBLOCK)?;
        Ok(Device { fuse, stopped: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    /// The descriptor, for whoever keeps a duplicate.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fuse.as_fd()
    }

    /// A waiter for one thread.
    pub fn waiter(&self) -> Result<Waiter, Errno> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        // Exclusive, so that one message wakes one thread.
        epoll::add(&epoll, &self.fuse, FUSE, epoll::EventFlags::IN | epoll::EventFlags::EXCLUSIVE)?;
        epoll::add(&epoll, &self.stopped, STOPPED, epoll::EventFlags::IN)?;
        Ok(Waiter { epoll })
    }

    /// Waits for a message and copies it to the front of `buffer`, which has at least [`super::REQUEST_MAX`] bytes.
    pub fn receive(&self, waiter: &Waiter, buffer: &mut [u8]) -> Result<Received, Errno> {
        loop {
            // Under load there is a message already, and asking for it costs no more than asking whether it is there.
            match rustix::io::read(&self.fuse, &mut *buffer) {
                Ok(len) => return Ok(Received::Message(len)),
                Err(Errno::AGAIN) => {
                    if waiter.wait()? {
                        return Ok(Received::Stopped);
                    }
                }
                // The request was interrupted before it was copied, or a signal came.
                Err(Errno::NOENT | Errno::INTR) => {}
                Err(Errno::NODEV | Errno::CONNABORTED) => return Ok(Received::Gone),
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Answers a request. `Ok` also when the kernel no longer waits for it: its asker was killed, or the mount is gone.
    pub fn reply(&self, unique: Unique, result: Result<&[IoSlice<'_>], Errno>) -> Result<(), Errno> {
        let (parts, error) = match result {
            Ok(parts) => (parts, 0),
            Err(errno) => (&[][..], -errno.raw_os_error()),
        };
        let header = out_header(unique, error, parts.iter().map(|part| part.len()).sum());
        let sent = if parts.len() < INLINE_PARTS {
            let mut all = [IoSlice::new(&[]); INLINE_PARTS];
            all[0] = IoSlice::new(&header);
            all[1..=parts.len()].copy_from_slice(parts);
            rustix::io::writev(&self.fuse, &all[..=parts.len()])
        } else {
            let mut all = Vec::with_capacity(parts.len() + 1);
            all.push(IoSlice::new(&header));
            all.extend_from_slice(parts);
            rustix::io::writev(&self.fuse, &all)
        };
        match sent {
            Ok(_) | Err(Errno::NOENT | Errno::NODEV | Errno::CONNABORTED) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Makes every request that was read but not answered readable again. Requests answered meanwhile are not repeated.
    pub fn resend(&self) -> Result<(), Errno> {
        let header = out_header(Unique(0), NOTIFY_RESEND, 0);
        rustix::io::write(&self.fuse, &header).map(drop)
    }

    /// Ends every [`Device::receive`], now and later. The mount stays; messages wait for a successor.
    pub fn stop(&self) {
        // An eventfd refuses only when its counter is full, and then it is readable already.
        let _ = rustix::io::write(&self.stopped, &1u64.to_ne_bytes());
    }
}

impl Waiter {
    /// Sleeps until there may be a message; `true` if the device was stopped.
    fn wait(&self) -> Result<bool, Errno> {
        let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: FUSE }; 2];
        match epoll::wait(&self.epoll, &mut events, None) {
            Ok(count) => Ok(events[..count].iter().any(|event| event.data.u64() == STOPPED.u64())),
            Err(Errno::INTR) => Ok(false),
            Err(errno) => Err(errno),
        }
    }
}
