//! Two readers' worth of work on two threads: what is behind a [`Pipe`] runs ahead of what is in front of it.
//!
//! Hashing and inflating a gzip layer costs about as much as hashing, cutting and packing its tar, so the two halves of a layer's
//! way run side by side.

use std::io::{self, Read};
use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded};

/// Bytes that change hands at once.
const PIECE: usize = 256 << 10;
/// Pieces the back may be ahead. Enough to ride out a slow moment on either side; 4 MiB per layer in flight.
const AHEAD: usize = 16;

/// The front end: gives what the back end read, errors included, in order.
pub struct Pipe {
    pieces: Receiver<io::Result<Vec<u8>>>,
    /// Pieces that were read go back to be filled again: a new one would have to be zeroed, and its pages mapped.
    emptied: Sender<Vec<u8>>,
    piece: Vec<u8>,
    at: usize,
}

/// Reads `back` to its end on a thread of its own, as far as `front` takes it from the [`Pipe`]. Gives `front`'s result, and `back`
/// with whatever was left in it.
pub fn run<R: Read + Send, T>(back: R, front: impl FnOnce(&mut Pipe) -> T) -> (T, R) {
    let (sender, pieces) = bounded(AHEAD);
    let (emptied, empty) = bounded(AHEAD);
    thread::scope(|scope| {
        let pump = scope.spawn(move || pump(back, &sender, &empty));
        let mut pipe = Pipe { pieces, emptied, piece: Vec::new(), at: 0 };
        let result = front(&mut pipe);
        // Tells the pump that nobody listens any more.
        drop(pipe);
        (result, pump.join().expect("the pump runs only the reader, and readers do not panic"))
    })
}

fn pump<R: Read>(mut back: R, pieces: &Sender<io::Result<Vec<u8>>>, empty: &Receiver<Vec<u8>>) -> R {
    loop {
        let mut piece = empty.try_recv().unwrap_or_default();
        piece.resize(PIECE, 0);
        let mut len = 0;
        let end = loop {
            match back.read(&mut piece[len..]) {
                Ok(0) => break Some(Ok(())),
                Ok(more) => len += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Some(Err(error)),
            }
            if len == PIECE {
                break None;
            }
        };
        piece.truncate(len);
        if len > 0 && pieces.send(Ok(piece)).is_err() {
            return back;
        }
        match end {
            None => {}
            Some(Ok(())) => return back,
            Some(Err(error)) => {
                // Whether anyone still wants to know does not matter.
                let _ = pieces.send(Err(error));
                return back;
            }
        }
    }
}

impl Read for Pipe {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.at == self.piece.len() {
            match self.pieces.recv() {
                Ok(piece) => {
                    let emptied = std::mem::replace(&mut self.piece, piece?);
                    self.at = 0;
                    // Full or gone: then it is simply dropped.
                    let _ = self.emptied.try_send(emptied);
                }
                // The pump is done: the end.
                Err(_) => return Ok(0),
            }
        }
        let len = buf.len().min(self.piece.len() - self.at);
        buf[..len].copy_from_slice(&self.piece[self.at..self.at + len]);
        self.at += len;
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_bytes_arrive_in_order() {
        let bytes: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
        let (out, rest) = run(&bytes[..], |pipe| {
            let mut out = Vec::new();
            pipe.read_to_end(&mut out).map(|_| out)
        });
        assert_eq!(out.unwrap(), bytes);
        assert!(rest.is_empty());
    }

    #[test]
    fn a_front_that_stops_early_stops_the_back() {
        let ((), mut rest) = run(io::repeat(7), |pipe| pipe.read_exact(&mut [0; 10]).unwrap());
        let mut next = [0];
        rest.read_exact(&mut next).unwrap();
        assert_eq!(next, [7]);
    }

    #[test]
    fn an_error_comes_after_the_bytes_before_it() {
        struct Fails;
        impl Read for Fails {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("broken"))
            }
        }
        let (result, _) = run((&b"abc"[..]).chain(Fails), |pipe| {
            let mut out = Vec::new();
            let error = pipe.read_to_end(&mut out).unwrap_err();
            (out, error.to_string())
        });
        assert_eq!(result, (b"abc".to_vec(), "broken".to_owned()));
    }
}
