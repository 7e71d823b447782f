//! Page-aligned memory that io_uring, `O_DIRECT` and the CPU can all work on, and the pool that fills reuse it from.
//!
//! A [`Buffer`] is owned by one party at a time: the kernel during an operation (`tokio-uring` takes it by value and gives it back),
//! otherwise whoever holds it. Its bytes are always initialised, so there is no "filled part" to keep track of: its length is what an
//! operation may touch. Once its content is final it can be frozen into a [`Shared`], which many may read while the kernel writes it out.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio_uring::buf::{IoBuf, IoBufMut};

/// Alignment and granule of every buffer. `O_DIRECT` needs the logical block size of the disk (512 or 4096) and fscache whole pages.
pub const PAGE: usize = 4096;

/// Memory the pool keeps when nobody uses it. Two look-ahead windows of stored and decoded bytes fit, so a steady stream allocates nothing;
/// what a burst needed beyond that goes back to the system.
const POOL_KEEP: usize = 32 << 20;

/// A page-aligned allocation. Its bytes are initialised for its whole life.
struct Pages {
    start: NonNull<u8>,
    capacity: usize,
}

// SAFETY: `Pages` owns its allocation exclusively and has no thread-bound state; moving it or sharing `&Pages` moves or shares plain bytes.
unsafe impl Send for Pages {}
// SAFETY: as above; `&Pages` gives no way to write.
unsafe impl Sync for Pages {}

impl Pages {
    fn layout(capacity: usize) -> Layout {
        Layout::from_size_align(capacity, PAGE).expect("a power-of-two alignment and a length far below isize::MAX make a layout")
    }

    /// `capacity` is a multiple of [`PAGE`] and not 0.
    fn new(capacity: usize) -> Pages {
        let layout = Pages::layout(capacity);
        // SAFETY: the layout's size is not 0.
        let start = unsafe { alloc_zeroed(layout) };
        match NonNull::new(start) {
            Some(start) => Pages { start, capacity },
            None => handle_alloc_error(layout),
        }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: `start` came from `alloc_zeroed` with this very layout and is freed only here.
        unsafe { dealloc(self.start.as_ptr(), Pages::layout(self.capacity)) }
    }
}

/// An owned, page-aligned, always initialised byte buffer. Fresh memory is zero; memory from a [`Pool`] holds what its last user left.
pub struct Buffer {
    /// `None` only while dropping.
    pages: Option<Pages>,
    len: usize,
    home: Weak<Pool>,
}

impl Buffer {
    /// A buffer of `len` bytes outside any pool.
    pub fn new(len: usize) -> Buffer {
        Buffer { pages: Some(Pages::new(rounded(len))), len, home: Weak::new() }
    }

    /// Shortens or lengthens the buffer within what was allocated. Panics beyond [`Buffer::capacity`].
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity(), "a buffer of {} bytes cannot become {len} bytes long", self.capacity());
        self.len = len;
    }

    /// Bytes that were allocated: a multiple of [`PAGE`].
    pub fn capacity(&self) -> usize {
        self.pages().capacity
    }

    /// Freezes the content, so that several readers and a write to disk can use it at once.
    pub fn share(self) -> Shared {
        Shared(Arc::new(self))
    }

    fn pages(&self) -> &Pages {
        self.pages.as_ref().expect("pages are taken only by drop")
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `start` points to `capacity >= len` initialised bytes, owned by self and unchanged while `&self` lives.
        unsafe { std::slice::from_raw_parts(self.pages().start.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.pages().start.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let (Some(pages), Some(pool)) = (self.pages.take(), self.home.upgrade()) {
            pool.put(pages);
        }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} of {} bytes)", self.len, self.capacity())
    }
}

// SAFETY: the bytes live on the heap, so the pointer stays the same when the Buffer moves; all `len` bytes are initialised.
unsafe impl IoBuf for Buffer {
    fn stable_ptr(&self) -> *const u8 {
        self.pages().start.as_ptr()
    }

    fn bytes_init(&self) -> usize {
        self.len
    }

    fn bytes_total(&self) -> usize {
        self.len
    }
}

// SAFETY: as for `IoBuf`; `bytes_total` bytes from the pointer are owned and writable.
unsafe impl IoBufMut for Buffer {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.pages().start.as_ptr()
    }

    // Nothing to note: every byte is initialised from the start, and an operation never changes the length.
    unsafe fn set_init(&mut self, _pos: usize) {}
}

/// A buffer whose content is final. Clones share it; the memory goes home when the last is dropped.
#[derive(Clone, Debug)]
pub struct Shared(Arc<Buffer>);

impl Deref for Shared {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

// SAFETY: the bytes are on the heap behind an Arc that this value keeps alive, and nobody can write to them any more.
unsafe impl IoBuf for Shared {
    fn stable_ptr(&self) -> *const u8 {
        self.0.stable_ptr()
    }

    fn bytes_init(&self) -> usize {
        self.0.len
    }

    fn bytes_total(&self) -> usize {
        self.0.len
    }
}

/// Where dropped buffers wait for their next use. Shared by threads: buffers are filled by one, decoded by another, written by a third.
#[derive(Default)]
pub struct Pool {
    /// Held for a push or a scan over a few dozen entries, never across a system call.
    free: Mutex<Free>,
}

#[derive(Default)]
struct Free {
    pages: Vec<Pages>,
    bytes: usize,
}

impl Pool {
    /// An empty pool.
    pub fn new() -> Arc<Pool> {
        Arc::default()
    }

    /// A buffer of `len` bytes with unspecified (but initialised) content. Sizes are rounded up to a power of two, so that a few sizes
    /// serve every run.
    pub fn get(self: &Arc<Pool>, len: usize) -> Buffer {
        let capacity = rounded(len).next_power_of_two();
        let reused = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            let found = free.pages.iter().rposition(|pages| pages.capacity == capacity);
            found.map(|at| {
                free.bytes -= capacity;
                free.pages.swap_remove(at)
            })
        };
        Buffer { pages: Some(reused.unwrap_or_else(|| Pages::new(capacity))), len, home: Arc::downgrade(self) }
    }

    fn put(&self, pages: Pages) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.bytes + pages.capacity <= POOL_KEEP {
            free.bytes += pages.capacity;
            free.pages.push(pages);
        }
    }
}

fn rounded(len: usize) -> usize {
    len.next_multiple_of(PAGE).max(PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_zero_aligned_and_as_long_as_asked() {
        for (len, capacity) in [(0, 4096), (1, 4096), (4096, 4096), (4097, 8192), (1 << 20, 1 << 20)] {
            let buffer = Buffer::new(len);
            assert_eq!((buffer.len(), buffer.capacity()), (len, capacity));
            assert!(buffer.iter().all(|&b| b == 0));
            assert_eq!(buffer.stable_ptr() as usize % PAGE, 0);
        }
    }

    #[test]
    fn a_dropped_buffer_is_used_again_and_the_last_share_counts_as_its_drop() {
        let pool = Pool::new();
        let mut first = pool.get(10_000);
        assert_eq!(first.capacity(), 16_384);
        first.fill(7);
        let at = first.stable_ptr();
        let (one, two) = {
            let shared = first.share();
            (shared.clone(), shared)
        };
        drop(one);
        assert_ne!(pool.get(16_384).stable_ptr(), at, "still in use by the second share");
        assert_eq!(two[9_999], 7);
        drop(two);
        assert_eq!(pool.get(16_384).stable_ptr(), at);
    }

    #[test]
    fn the_pool_keeps_a_bounded_amount() {
        let pool = Pool::new();
        let many: Vec<Buffer> = (0..40).map(|_| pool.get(1 << 20)).collect();
        drop(many);
        assert_eq!(pool.free.lock().expect("no panic under the lock").bytes, POOL_KEEP);
    }

    #[test]
    fn a_buffer_outlives_its_pool() {
        let pool = Pool::new();
        let buffer = pool.get(5);
        drop(pool);
        assert_eq!(buffer.len(), 5);
    }

    #[test]
    #[should_panic(expected = "cannot become")]
    fn a_buffer_never_grows_beyond_its_memory() {
        Buffer::new(1).set_len(4097);
    }

    #[test]
    fn the_ring_reads_into_and_writes_from_it() {
        let file = tempfile::tempfile().expect("a temporary file");
        tokio_uring::start(async {
            let file = tokio_uring::fs::File::from_std(file);
            let mut out = Buffer::new(5000);
            out[4999] = 9;
            let (result, _) = file.write_at(out.share(), 0).submit().await;
            assert_eq!(result.expect("written"), 5000);
            let (result, back) = file.read_exact_at(Buffer::new(5000), 0).await;
            result.expect("read");
            assert_eq!(back[4999], 9);
        });
    }
}
