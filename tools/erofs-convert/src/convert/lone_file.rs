//! An archive that holds one file: ustar, the same bytes every time.

const BLOCK: usize = 512;

/// The archive of a regular file of root's, made in 1970. Its name has at most 100 bytes, its data less than 8 GiB.
pub(super) fn archive(name: &[u8], mode: u16, data: &[u8]) -> Vec<u8> {
    let octal = |value: u64, digits: usize| format!("{value:0digits$o}").into_bytes();
    let mut out = vec![0; BLOCK];
    let mut put = |at: usize, value: &[u8]| out[at..at + value.len()].copy_from_slice(value);
    put(0, name);
    put(100, &octal(mode.into(), 7));
    put(108, &octal(0, 7));
    put(116, &octal(0, 7));
    put(124, &octal(data.len() as u64, 11));
    put(136, &octal(0, 11));
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    put(329, &octal(0, 7));
    put(337, &octal(0, 7));
    let sum: u64 = out.iter().map(|&byte| u64::from(byte)).sum();
    out[148..154].copy_from_slice(&octal(sum, 6));
    out[154] = 0;
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(BLOCK) + 2 * BLOCK, 0);
    out
}
