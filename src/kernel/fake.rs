//! A fake kernel, stricter than the real one: it fails the test for an ask that is answered twice or never, with success and bytes that
//! are not the pack's, or (where the kernel reads the file itself) with success before those bytes are in the file.

use std::collections::HashMap;
use std::io::IoSlice;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use erofs::digest::Digest;

use super::{Ask, AskId, Channel, Errno, Serve, Wants};
use crate::cache::Pack;
use crate::cache::fake::{FakeDisk, Sample};

/// How long an answer may take before the test fails: far longer than any deadline a test sets.
const PATIENCE: Duration = Duration::from_secs(60);

/// A kernel that asks, and checks the answers.
pub struct FakeKernel {
    serve: Arc<dyn Serve>,
    channel: Arc<FakeChannel>,
    next: AtomicU64,
}

struct FakeChannel {
    wants: Wants,
    /// To see whether bytes are in the file when an answer says so.
    disk: FakeDisk,
    asks: Mutex<HashMap<AskId, Asked>>,
    answered: Condvar,
}

struct Asked {
    pack: Digest,
    offset: u64,
    expected: Vec<u8>,
    /// What went wrong with the answer is kept for the thread that runs the test, as the answering thread's panic would be lost.
    answer: Option<Result<Result<(), Errno>, String>>,
}

impl FakeKernel {
    /// A kernel whose asks go to `serve`.
    pub fn new(wants: Wants, disk: FakeDisk, serve: Arc<dyn Serve>) -> FakeKernel {
        let channel = FakeChannel { wants, disk, asks: Mutex::default(), answered: Condvar::new() };
        FakeKernel { serve, channel: Arc::new(channel), next: AtomicU64::new(0) }
    }

    /// Asks for `len` bytes from `offset`.
    pub fn ask(&self, sample: &Sample, pack: &Arc<Pack>, offset: u64, len: u32) -> AskId {
        let id = AskId(self.next.fetch_add(1, Ordering::Relaxed));
        let expected = sample.bytes.get(offset as usize..offset as usize + len as usize).unwrap_or_default().to_vec();
        self.channel.lock().insert(id, Asked { pack: sample.digest(), offset, expected, answer: None });
        let channel = Arc::clone(&self.channel) as Arc<dyn Channel>;
        self.serve.submit(Ask::new(Arc::clone(pack), offset, len, id, channel, Arc::clone(self.serve.metrics())));
        id
    }

    /// Waits for the answer to an ask: `Ok` if its bytes were right. Panics if there was anything wrong with it.
    pub fn wait(&self, id: AskId) -> Result<(), Errno> {
        let start = Instant::now();
        let mut asks = self.channel.lock();
        loop {
            let asked = asks.get(&id).expect("waited for an ask that was made");
            if let Some(answer) = &asked.answer {
                return answer.clone().unwrap_or_else(|wrong| panic!("ask {}: {wrong}", id.0));
            }
            let left = PATIENCE.checked_sub(start.elapsed()).unwrap_or_else(|| panic!("ask {} was never answered", id.0));
            asks = self.channel.answered.wait_timeout(asks, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Asks and waits.
    pub fn read(&self, sample: &Sample, pack: &Arc<Pack>, offset: u64, len: u32) -> Result<(), Errno> {
        self.wait(self.ask(sample, pack, offset, len))
    }
}

impl FakeChannel {
    fn lock(&self) -> MutexGuard<'_, HashMap<AskId, Asked>> {
        self.asks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn judge(&self, asked: &Asked, parts: &[IoSlice<'_>]) -> Result<(), String> {
        match self.wants {
            Wants::Bytes => {
                let got: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
                if got != asked.expected {
                    let at = got.iter().zip(&asked.expected).position(|(a, b)| a != b);
                    return Err(format!("{} bytes, expected {}; first difference {at:?}", got.len(), asked.expected.len()));
                }
            }
            Wants::Stored if !parts.is_empty() => return Err("bytes that nobody wants".into()),
            Wants::Stored => {
                if !self.disk.holds(&asked.pack, asked.offset as usize, &asked.expected) {
                    return Err("answered before the bytes were in the file".into());
                }
            }
        }
        Ok(())
    }
}

impl Channel for FakeChannel {
    fn wants(&self) -> Wants {
        self.wants
    }

    fn answer(&self, id: AskId, result: Result<&[IoSlice<'_>], Errno>) {
        let mut asks = self.lock();
        let Some(asked) = asks.get_mut(&id) else { return };
        let answer = match (&asked.answer, result) {
            (Some(_), _) => Err("answered twice".into()),
            (None, Ok(parts)) => self.judge(asked, parts).map(Ok),
            (None, Err(errno)) => Ok(Err(errno)),
        };
        asked.answer = Some(answer);
        drop(asks);
        self.answered.notify_all();
    }
}

impl Drop for FakeKernel {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let ids: Vec<AskId> = self.channel.lock().keys().copied().collect();
        for id in ids {
            // Right or wrong in its own way, but answered.
            let _ = self.wait(id);
        }
    }
}
