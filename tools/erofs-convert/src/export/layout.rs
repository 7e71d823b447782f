//! The directory that an export makes: nothing of it stays unless all of it is there.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use slipway::oci::Sha256;
use slipway::oci::digest::Hasher;

use crate::failure::Failure;

/// Name, among the blobs, of the one being written.
const UNFINISHED: &str = ".unfinished";

/// An OCI image layout being written. Dropped before [`Layout::finish`], it takes away what it has made.
pub(super) struct Layout {
    dir: PathBuf,
    blobs: PathBuf,
    /// The directory was not there before.
    made: bool,
    finished: bool,
}

impl Layout {
    /// Begins a layout in a directory that is empty or missing.
    pub fn begin(dir: &Path) -> Result<Layout, Failure> {
        let made = match fs::read_dir(dir).map(|mut entries| entries.next().is_none()) {
            Ok(true) => false,
            Ok(false) => return Err(failed(dir)(io::ErrorKind::DirectoryNotEmpty.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => true,
            Err(error) => return Err(failed(dir)(error)),
        };
        let layout = Layout { dir: dir.to_owned(), blobs: dir.join("blobs/sha256"), made, finished: false };
        fs::create_dir_all(&layout.blobs).map_err(failed(&layout.blobs))?;
        Ok(layout)
    }

    /// A blob to be written, one at a time.
    pub fn blob(&self) -> Result<Blob<'_>, Failure> {
        let path = self.blobs.join(UNFINISHED);
        let file = File::create(&path).map_err(failed(&path))?;
        Ok(Blob { layout: self, out: Hashed::new(file), path })
    }

    /// Writes a small blob; gives its digest.
    pub fn put(&self, bytes: &[u8]) -> Result<Sha256, Failure> {
        let mut blob = self.blob()?;
        blob.write_all(bytes).map_err(failed(&blob.path))?;
        Ok(blob.finish()?.0)
    }

    /// Makes a layout of it.
    pub fn finish(mut self, index: &str) -> Result<(), Failure> {
        // The index makes the layout one, so it comes last.
        for (name, text) in [("oci-layout", "{\"imageLayoutVersion\":\"1.0.0\"}"), ("index.json", index)] {
            fs::write(self.dir.join(name), text).map_err(failed(&self.dir.join(name)))?;
        }
        self.finished = true;
        Ok(())
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        // What stays is in the way of the next export, which says so.
        for name in ["index.json", "oci-layout"] {
            let _ = fs::remove_file(self.dir.join(name));
        }
        let _ = fs::remove_dir_all(self.dir.join("blobs"));
        if self.made {
            let _ = fs::remove_dir(&self.dir);
        }
    }
}

/// A blob being written.
pub(super) struct Blob<'a> {
    layout: &'a Layout,
    out: Hashed<File>,
    path: PathBuf,
}

impl Blob<'_> {
    /// Where it lies for now, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it its name; gives its digest and length.
    pub fn finish(self) -> Result<(Sha256, u64), Failure> {
        self.out.inner.sync_data().map_err(failed(&self.path))?;
        let (digest, len) = (self.out.hasher.finish(), self.out.len);
        let path = self.layout.blobs.join(digest.to_string());
        fs::rename(&self.path, &path).map_err(failed(&path))?;
        Ok((digest, len))
    }
}

impl Write for Blob<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// What cannot be written means that.
pub(super) fn failed(path: &Path) -> impl Fn(io::Error) -> Failure + use<> {
    let path = path.to_owned();
    move |source| Failure::Write { path: path.clone(), source }
}

/// Hashes what is written through it.
pub(super) struct Hashed<W> {
    pub inner: W,
    pub hasher: Hasher,
    pub len: u64,
}

impl<W> Hashed<W> {
    pub fn new(inner: W) -> Hashed<W> {
        Hashed { inner, hasher: Hasher::new(), len: 0 }
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..len]);
        self.len += len as u64;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
