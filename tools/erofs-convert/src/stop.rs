//! Stopping early: a signal, or another layer's failure.

use std::io::{self, Read};

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit code after SIGINT or SIGTERM.
pub const INTERRUPTED: u8 = 130;

/// The work was told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stopped")]
pub struct Stopped;

/// Gives a token that the first SIGINT or SIGTERM cancels, so that everything unwinds and removes its temporary files. The second
/// ends the process at once (a store that hangs would hold the unwinding up); the next run removes what is left then.
pub fn on_signals(runtime: &Handle) -> io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let stop = token.clone();
    let _context = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    runtime.spawn(async move {
        for last in [false, true] {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if last {
                std::process::exit(INTERRUPTED.into());
            }
            stop.cancel();
        }
    });
    Ok(token)
}

/// Waits for `work` on a thread that is not the runtime's, unless told to stop.
pub fn wait<T>(runtime: &Handle, stop: &CancellationToken, work: impl Future<Output = T>) -> Result<T, Stopped> {
    runtime.block_on(async {
        tokio::select! {
            biased;
            () = stop.cancelled() => Err(Stopped),
            done = work => Ok(done),
        }
    })
}

/// A blocking reader over an asynchronous one that fails with [`Stopped`] when told to stop, also while it waits for the network.
pub struct StoppableReader<'a, R> {
    inner: R,
    runtime: &'a Handle,
    stop: &'a CancellationToken,
    /// Called with the number of bytes of every read.
    progress: &'a (dyn Fn(u64) + Sync),
}

impl<'a, R: AsyncRead + Unpin> StoppableReader<'a, R> {
    /// Reads `inner` on `runtime`.
    pub fn new(inner: R, runtime: &'a Handle, stop: &'a CancellationToken, progress: &'a (dyn Fn(u64) + Sync)) -> Self {
        StoppableReader { inner, runtime, stop, progress }
    }
}

impl<R: AsyncRead + Unpin> Read for StoppableReader<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = wait(self.runtime, self.stop, self.inner.read(buf)).map_err(io::Error::other)??;
        (self.progress)(len as u64);
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiting_reader_stops() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let stop = CancellationToken::new();
        // Nothing is ever written to the other end.
        let (mut theirs, ours) = tokio::io::duplex(16);
        runtime.block_on(tokio::io::AsyncWriteExt::write_all(&mut theirs, b"ab")).unwrap();
        let seen = std::sync::atomic::AtomicU64::new(0);
        let progress = |len| {
            seen.fetch_add(len, std::sync::atomic::Ordering::Relaxed);
            stop.cancel();
        };
        let mut reader = StoppableReader::new(ours, runtime.handle(), &stop, &progress);
        let mut out = Vec::new();
        let error = reader.read_to_end(&mut out).unwrap_err();
        assert_eq!(out, b"ab");
        assert!(error.get_ref().is_some_and(|e| e.is::<Stopped>()), "{error:?}");
        assert_eq!(seen.into_inner(), 2);
    }
}
