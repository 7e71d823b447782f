//! Packs: any footer, unit table, chunk table and stored unit is read without panic.
//!
//! An input is edits of a true pack's tables and footer. Digests are then made right, as a hostile writer would, so that the fuzzer gets
//! past them.
#![no_main]

use std::sync::OnceLock;

use erofs::block::UnitBits;
use erofs::digest::Digest;
use erofs::pack::{Codec, FOOTER_LEN, PackTable, PackWriter, UnitEntry, decode_unit, encode_unit};
use libfuzzer_sys::fuzz_target;

const FOOTER: usize = FOOTER_LEN as usize;
/// Where the footer keeps the digests of the unit table and of the chunk table.
const UNIT_TABLE_DIGEST: usize = 64;
const CHUNK_TABLE_DIGEST: usize = 96;

/// A pack of a raw unit, a compressed one and a short one, and where its unit table begins.
fn pack() -> &'static (Vec<u8>, usize) {
    static PACK: OnceLock<(Vec<u8>, usize)> = OnceLock::new();
    PACK.get_or_init(|| {
        let noise: Vec<u8> = (0..2048u32).flat_map(|i| Digest::of(&i.to_le_bytes()).0).collect();
        let mut writer = PackWriter::new(Vec::new(), UnitBits::MIN);
        for (data, blocks) in [(noise, 16), (vec![7; 65536], 16), (vec![8; 8192], 2)] {
            let digest = Digest::of(&data);
            writer.push(&encode_unit(&data, 3), &[(digest, 0, 1), (digest, 1, blocks - 1)]).expect("a Vec takes everything");
        }
        let finished = writer.finish().expect("a Vec takes everything");
        let footer = &finished.out[finished.out.len() - FOOTER..];
        let (unit_table, _) = PackTable::parse_footer(&finished.pack.digest, footer).expect("what was written can be read").unit_table();
        (finished.out, unit_table as usize)
    })
}

fn read(bytes: &[u8]) {
    let mut footer = bytes[bytes.len() - FOOTER..].to_vec();
    // The footer says where the tables are, and holds their digests: the first parse is for the places.
    let Ok(draft) = PackTable::parse_footer(&Digest::of(&footer), &footer) else { return };
    let table = |(at, len): (u64, usize)| usize::try_from(at).ok().and_then(|at| bytes.get(at..at.checked_add(len)?));
    let (Some(units), Some(chunks)) = (table(draft.unit_table()), table(draft.chunk_table())) else { return };
    footer[UNIT_TABLE_DIGEST..][..32].copy_from_slice(&Digest::of(units).0);
    footer[CHUNK_TABLE_DIGEST..][..32].copy_from_slice(&Digest::of(chunks).0);
    let parsed = PackTable::parse_footer(&Digest::of(&footer), &footer).expect("only digests have changed");
    let _ = parsed.parse_chunks(chunks);
    let Ok(table) = PackTable::parse(parsed, units) else { return };
    for i in 0..table.unit_count().min(8) {
        let unit = table.unit(i).expect("a unit below the count");
        let mut out = vec![0; table.unit_len(i)];
        if let Some(stored) = bytes.get(unit.offset as usize..).and_then(|rest| rest.get(..unit.stored_len as usize)) {
            let _ = decode_unit(unit, stored, &mut out);
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let _ = PackTable::parse_footer(&Digest::of(input), input);
    let unit = UnitEntry { offset: 0, stored_len: input.len() as u32, codec: Codec::Zstd, digest: Digest::of(b"") };
    let _ = decode_unit(&unit, input, &mut [0; 4096]);
    let (pack, tables) = pack();
    let mut bytes = pack.clone();
    for edit in input.chunks_exact(3) {
        let at = tables + usize::from(u16::from_le_bytes([edit[0], edit[1]])) % (bytes.len() - tables);
        bytes[at] = edit[2];
    }
    read(&bytes);
});
