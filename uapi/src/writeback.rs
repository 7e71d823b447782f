//! Having the kernel begin to write a file's dirty pages, without waiting for it.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// `sync_file_range(fd, offset, len, SYNC_FILE_RANGE_WRITE)`: begins to write the dirty pages of these bytes to disk (or to the server), and makes
/// nothing durable: `fsync` does that, and then finds little to wait for. It waits only for room in the device's queue.
pub fn begin(file: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    let range = i64::try_from(offset).ok().zip(i64::try_from(len).ok());
    let Some((offset, len)) = range else { return Err(io::ErrorKind::InvalidInput.into()) };
    // SAFETY: the call takes numbers only; the descriptor is open for as long as `file` is borrowed.
    let result = unsafe { libc::sync_file_range(file.as_fd().as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn files_take_it_and_pipes_do_not() {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&[7; 100_000]).expect("written");
        begin(&file, 0, 65536).expect("begun");
        begin(&file, 65536, 0).expect("to the end");
        assert_eq!(begin(&file, u64::MAX, 1).expect_err("no such offset").kind(), io::ErrorKind::InvalidInput);
        let (_reader, writer) = std::io::pipe().expect("a pipe");
        assert_eq!(begin(&writer, 0, 1).expect_err("nothing to write back").raw_os_error(), Some(libc::ESPIPE));
    }
}
