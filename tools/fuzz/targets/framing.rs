//! Framings: any bytes are decoded or refused without panic; what is decoded costs no more than its bytes allow, names no chunk without a
//! place, and written again it is the same framing.
#![no_main]

use erofs::framing::{FramingError, FramingReader, FramingWriter, Places, Step};
use libfuzzer_sys::fuzz_target;

/// A step that owns its bytes.
#[derive(PartialEq)]
enum Piece {
    Raw(Vec<u8>),
    Data(Option<u32>, u32, u32),
}

fn decode(bytes: &[u8]) -> Result<(Vec<Piece>, Places), FramingError> {
    let mut reader = FramingReader::new(bytes)?;
    let unit = reader.unit_bits().bytes();
    let mut pieces = Vec::new();
    while let Some(step) = reader.next()? {
        pieces.push(match step {
            Step::Raw(raw) => Piece::Raw(raw.to_vec()),
            Step::Data { chunk, from, len } => {
                assert!(len > 0 && u64::from(from) + u64::from(len) <= unit, "a step reaches beyond its chunk");
                Piece::Data(chunk, from, len)
            }
        });
        assert!(pieces.len() <= bytes.len(), "more steps than bytes");
    }
    let places = reader.places()?;
    let named = pieces.iter().filter_map(|piece| if let Piece::Data(chunk, ..) = piece { *chunk } else { None }).max();
    assert_eq!(named.map_or(0, |id| id as usize + 1), places.chunks.len(), "a chunk has no place");
    assert!(places.chunks.iter().all(|place| place.block < places.packs[place.pack as usize].blocks), "a chunk lies outside its pack");
    Ok((pieces, places))
}

/// The same steps, each piece of data as a file of its own.
fn encode(pieces: &[Piece], places: &Places, like: &[u8]) -> Vec<u8> {
    let unit_bits = FramingReader::new(like).expect("it was read before").unit_bits();
    let mut writer = FramingWriter::new(Vec::new(), unit_bits).expect("a Vec takes everything");
    for piece in pieces {
        let written = match piece {
            Piece::Raw(raw) => writer.raw(raw),
            Piece::Data(chunk, from, len) => writer.file(&[((*from).into(), (*len).into())]).and_then(|()| writer.chunk(*chunk)),
        };
        written.expect("a Vec takes everything");
    }
    writer.finish(places).expect("a Vec takes everything")
}

fuzz_target!(|input: &[u8]| {
    let _ = decode(input);
    // With the beginning made right, so that the fuzzer need not guess it.
    let bytes = [b"SLWYFRAM\x01\0\0\0\x10", input].concat();
    let Ok((pieces, places)) = decode(&bytes) else { return };
    let again = encode(&pieces, &places, &bytes);
    assert!(decode(&again).is_ok_and(|again| again == (pieces, places)), "a framing changes when written");
});
