//! A layer blob's bytes become its tar: gzip, zstd or none, told by the first bytes.
//!
//! containerd looks at the bytes, not at the media type (`pkg/archive/compression`), and so do we; the diff ID proves the result.

use std::io::{self, BufReader, Chain, Cursor, Read};

use flate2::bufread::MultiGzDecoder;

/// What is read from the blob in one go: large enough that the socket or file read is not what costs.
const READ_SIZE: usize = 256 << 10;
const MAGIC_LEN: u64 = 4;
/// How far back a zstd frame may refer, which is memory for every layer under way: 128 MiB, what `zstd -d` takes unasked. Up to level 22 zstd uses no
/// more; only `--long` can ask for it.
const ZSTD_WINDOW_LOG: u32 = 27;
const GZIP_MAGIC: [u8; 3] = [0x1f, 0x8b, 8];
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Skippable zstd frames (RFC 8878 §3.1.2) are `0x184D2A5?`, little-endian. A blob may begin with one.
const ZSTD_SKIPPABLE: [u8; 3] = [0x2a, 0x4d, 0x18];

/// Reads the tar of a layer and checks the blob on the way: the end is reported only after the whole blob, including what follows
/// the compressed stream, had the expected digest.
pub struct Unpack<R: Read> {
    decoder: Decoder<R>,
}

type Blob<R> = BufReader<Chain<Cursor<Vec<u8>>, R>>;

enum Decoder<R: Read> {
    /// Several members in one file are one stream, as in gzip(1) and eStargz.
    Gzip(Box<MultiGzDecoder<Blob<R>>>),
    Zstd(Box<zstd::stream::read::Decoder<'static, Blob<R>>>),
    Plain(Box<Blob<R>>),
}

impl<R: Read> Unpack<R> {
    /// Looks at the first bytes of `blob`, whose reader must check them (a [`slipway::oci::VerifyReader`]).
    pub fn new(mut blob: R) -> io::Result<Unpack<R>> {
        let mut head = Vec::new();
        (&mut blob).take(MAGIC_LEN).read_to_end(&mut head)?;
        let gzip = head.starts_with(&GZIP_MAGIC);
        let zstd = head == ZSTD_MAGIC || head.first().is_some_and(|b| b >> 4 == 5) && head[1..] == ZSTD_SKIPPABLE;
        let blob = BufReader::with_capacity(READ_SIZE, Cursor::new(head).chain(blob));
        let decoder = if gzip {
            Decoder::Gzip(Box::new(MultiGzDecoder::new(blob)))
        } else if zstd {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(blob)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            Decoder::Zstd(Box::new(decoder))
        } else {
            Decoder::Plain(Box::new(blob))
        };
        Ok(Unpack { decoder })
    }

    /// Reads the rest of the blob without unpacking it: its digest is checked also where unpacking failed.
    pub fn drain_blob(&mut self) -> io::Result<()> {
        let blob = match &mut self.decoder {
            Decoder::Gzip(decoder) => decoder.get_mut(),
            Decoder::Zstd(decoder) => decoder.get_mut(),
            Decoder::Plain(blob) => blob,
        };
        io::copy(blob.get_mut().get_mut().1, &mut io::sink()).map(drop)
    }
}

impl<R: Read> Read for Unpack<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = match &mut self.decoder {
            Decoder::Gzip(decoder) => decoder.read(buf),
            Decoder::Zstd(decoder) => decoder.read(buf).map_err(window_told),
            Decoder::Plain(blob) => blob.read(buf),
        }?;
        if len == 0 && !buf.is_empty() {
            self.drain_blob()?;
        }
        Ok(len)
    }
}

/// zstd's own words for a window that is too large have no figure.
fn window_told(error: io::Error) -> io::Error {
    if !error.to_string().contains("too much memory") {
        return error;
    }
    let limit = (1u64 << ZSTD_WINDOW_LOG) >> 20;
    io::Error::new(error.kind(), format!("its zstd frame needs a window of more than {limit} MiB; compress the layer without --long"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use slipway::oci::{Sha256, VerifyError, VerifyReader};

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn unpack(blob: &[u8], expected: Sha256) -> io::Result<Vec<u8>> {
        let mut unpack = Unpack::new(VerifyReader::new(blob, "layer", expected, None))?;
        let mut out = Vec::new();
        unpack.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn every_compression_is_recognised() {
        let text = b"hello ".repeat(100_000);
        let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 1).unwrap();
        let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 7, 7][..], &zstd(&text)].concat();
        let halves = text.split_at(1000);
        for (name, blob, expected) in [
            ("plain", text.clone(), &text[..]),
            ("gzip", gzip(&text), &text),
            ("gzip members", [gzip(halves.0), gzip(halves.1)].concat(), &text),
            ("zstd", zstd(&text), &text),
            ("zstd frames", [zstd(halves.0), zstd(halves.1)].concat(), &text),
            ("zstd after a skippable frame", skippable, &text),
            ("empty", Vec::new(), b""),
            ("short", b"ab".to_vec(), b"ab"),
            ("empty gzip", gzip(b""), b""),
        ] {
            assert_eq!(unpack(&blob, Sha256::of(&blob)).unwrap(), expected, "{name}");
        }
    }

    /// A frame of a few bytes that asks for a window of 2 GiB, and one of the largest that is taken.
    #[test]
    fn a_zstd_frame_with_a_huge_window_is_refused_with_the_figure() {
        // Magic, a descriptor without anything, window 2^(10 + (byte >> 3)), a last raw block of one byte.
        let frame = |window_log: u8| [&ZSTD_MAGIC[..], &[0, (window_log - 10) << 3, 0b1001, 0, 0, b'x']].concat();
        let read = |frame: &[u8]| unpack(frame, Sha256::of(frame));
        assert_eq!(read(&frame(27)).unwrap(), b"x");
        for window_log in [28, 31] {
            let error = read(&frame(window_log)).unwrap_err().to_string();
            assert_eq!(error, "its zstd frame needs a window of more than 128 MiB; compress the layer without --long");
        }
    }

    #[test]
    fn the_end_waits_for_the_digest() {
        let blob = gzip(b"hello");
        let error = unpack(&blob, Sha256::of(b"other")).unwrap_err();
        assert!(matches!(VerifyError::of(&error), Some(VerifyError::Digest { .. })), "{error:?}");
    }

    #[test]
    fn a_damaged_stream_can_still_be_checked() {
        let mut blob = gzip(&b"hello ".repeat(10_000));
        let right = Sha256::of(&blob);
        let middle = blob.len() / 2;
        blob[middle] ^= 0xff;
        let mut unpack = Unpack::new(VerifyReader::new(&blob[..], "layer", right, None)).unwrap();
        assert!(io::copy(&mut unpack, &mut io::sink()).is_err());
        let error = unpack.drain_blob().unwrap_err();
        assert!(matches!(VerifyError::of(&error), Some(VerifyError::Digest { .. })), "{error:?}");
    }

    #[test]
    fn a_truncated_stream_is_an_error() {
        for blob in [gzip(b"hello hello"), zstd::encode_all(&b"hello hello"[..], 1).unwrap()] {
            let short = &blob[..blob.len() - 5];
            assert!(unpack(short, Sha256::of(short)).is_err());
        }
    }
}
