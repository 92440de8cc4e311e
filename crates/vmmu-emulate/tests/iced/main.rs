//! Lengths, operations and addresses compared with iced-x86: every opcode with every `ModRM` byte under many
//! prefixes, and random bytes, in all three modes.
//!
//! iced-x86 is the oracle for what is defined and how long it is. What it calls invalid and this crate does not
//! is in [`excused`], with the manual's section.

mod meaning;

use iced_x86::{Decoder, DecoderOptions};
use meaning::{check_addresses, expected_op};
use vmmu_emulate::{CpuMode, DecodeError, Instruction, Op, decode};

const MODES: [(CpuMode, u32); 3] = [(CpuMode::Bits16, 16), (CpuMode::Bits32, 32), (CpuMode::Bits64, 64)];

/// A small generator of numbers, the same on every machine (splitmix64).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn byte(&mut self) -> u8 {
        self.next() as u8
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// What the comparisons counted, so that a generator that produces nothing is seen.
#[derive(Default, Debug)]
struct Tally {
    both_valid: u64,
    named: u64,
    only_here: u64,
    too_long: u64,
}

/// Compares one instruction, and says whether it is valid for iced-x86 and whether it is here.
fn compare(bytes: &[u8], mode: CpuMode, bitness: u32, tally: &mut Tally) -> (bool, bool) {
    let theirs = Decoder::with_ip(bitness, bytes, meaning::RIP, DecoderOptions::NONE).decode();
    let ours = decode(bytes, mode);
    let context = || format!("{bytes:02x?} in {mode:?}: {ours:?}, iced {:?} {}", theirs.code(), theirs.len());

    if theirs.is_invalid() {
        match ours {
            Err(DecodeError::TooLong) => tally.too_long += 1,
            Ok(instruction) => {
                tally.only_here += 1;
                assert!(instruction.op() == Op::Other || excused(&instruction), "{}", context());
            }
            Err(_) => {}
        }
        return (false, ours.is_ok());
    }
    let instruction = ours.unwrap_or_else(|_| panic!("{}", context()));
    assert_eq!(usize::from(instruction.len()), theirs.len(), "{}", context());
    tally.both_valid += 1;
    tally.named += u64::from(instruction.op() != Op::Other);
    let expected = expected_op(&instruction, &theirs).unwrap_or(Op::Other);
    assert_eq!(instruction.op(), expected, "{}", context());
    check_addresses(&instruction, &theirs, &context);
    (true, true)
}

/// Named operations in encodings that iced-x86 calls invalid.
fn excused(instruction: &Instruction) -> bool {
    match instruction.op() {
        // AMD's way to CR8 outside 64-bit mode: LOCK MOV CR0 (APM volume 3, MOV CRn).
        Op::MovToCr { cr: 8, .. } | Op::MovFromCr { cr: 8, .. } => instruction.is_locked(),
        _ => false,
    }
}

/// The prefixes before each enumerated opcode.
const PREFIXES: [&[u8]; 25] = [
    &[],
    &[0x66],
    &[0x67],
    &[0xf2],
    &[0xf3],
    &[0xf0],
    &[0x2e],
    &[0x64],
    &[0x66, 0x67],
    &[0x66, 0xf2],
    &[0xf3, 0x66],
    &[0xf2, 0xf3],
    &[0x65, 0x3e],
    &[0x36, 0x26],
    &[0x40],
    &[0x48],
    &[0x41],
    &[0x44],
    &[0x4f],
    &[0x66, 0x48],
    &[0x66, 0x4d],
    &[0x48, 0x66],
    &[0xf3, 0x48],
    &[0xf2, 0x4c],
    &[0xf0, 0x67, 0x42],
];

#[test]
fn every_opcode_and_modrm() {
    let mut tally = Tally::default();
    let mut rng = Rng(1);
    for (mode, bitness) in MODES {
        for map in [&[][..], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]] {
            for opcode in 0..=255_u8 {
                let (mut valid, mut valid_here) = (false, false);
                for (prefixes, modrm) in PREFIXES.iter().flat_map(|p| (0..=255_u8).map(move |m| (*p, m))) {
                    let mut bytes: [u8; 24] = core::array::from_fn(|_| rng.byte());
                    let start = [prefixes, map, &[opcode, modrm]].concat();
                    bytes[..start.len()].copy_from_slice(&start);
                    let (theirs, ours) = compare(&bytes, mode, bitness, &mut tally);
                    valid |= theirs;
                    valid_here |= ours;
                }
                // An opcode of the first two maps that is undefined under all prefixes and operands is so here.
                if map.len() < 2 {
                    assert_eq!(valid_here, valid, "{map:02x?} {opcode:02x} in {mode:?}");
                }
            }
        }
    }
    assert!(tally.both_valid > 5_000_000 && tally.named > 500_000, "{tally:?}");
}

#[test]
fn vector_encodings() {
    let mut tally = Tally::default();
    let mut rng = Rng(2);
    for _ in 0..3_000_000 {
        let mut bytes: [u8; 20] = core::array::from_fn(|_| rng.byte());
        let map = [1, 2, 3, 5, 6, 8, 9, 10][rng.below(8) as usize];
        match rng.below(4) {
            0 => bytes[0] = 0xc5,
            1 => {
                bytes[0] = 0xc4;
                bytes[1] = bytes[1] & 0xe0 | map;
            }
            2 => {
                bytes[0] = 0x62;
                bytes[1] = bytes[1] & 0xf0 | map & 7;
                bytes[2] |= 4;
            }
            _ => {
                bytes[0] = 0x8f;
                bytes[1] = bytes[1] & 0xe0 | map;
            }
        }
        // In 16- and 32-bit modes the top bits tell the prefix from LES, LDS and BOUND.
        if rng.below(4) != 0 {
            bytes[1] |= 0xc0;
        }
        let (mode, bitness) = MODES[rng.below(3) as usize];
        compare(&bytes, mode, bitness, &mut tally);
    }
    assert!(tally.both_valid > 100_000, "{tally:?}");
}

#[test]
fn random_bytes() {
    const PREFIX: [u8; 14] =
        [0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x2e, 0x3e, 0x26, 0x36, 0x64, 0x65, 0x48, 0x41, 0x4f];
    let mut tally = Tally::default();
    let mut rng = Rng(3);
    for _ in 0..3_000_000 {
        let mut bytes: [u8; 24] = core::array::from_fn(|_| rng.byte());
        let prefixes = match rng.below(8) {
            0..4 => 0,
            4..7 => rng.below(4),
            _ => rng.below(15),
        };
        for byte in bytes.iter_mut().take(prefixes as usize) {
            *byte = PREFIX[rng.below(PREFIX.len() as u64) as usize];
        }
        for (mode, bitness) in MODES {
            compare(&bytes, mode, bitness, &mut tally);
        }
    }
    assert!(tally.both_valid > 3_000_000 && tally.too_long > 1000, "{tally:?}");
}

/// Whatever is cut off asks for more, never for more than is needed, and then decodes to the same.
#[test]
fn prefixes_of_instructions_are_too_short() {
    let mut rng = Rng(4);
    let mut seen = 0_u64;
    for _ in 0..300_000 {
        let bytes: [u8; 16] = core::array::from_fn(|_| rng.byte());
        for (mode, _) in MODES {
            let Ok(whole) = decode(&bytes, mode) else { continue };
            let len = usize::from(whole.len());
            assert_eq!(decode(&bytes[..len], mode), Ok(whole));
            for cut in 0..len {
                match decode(&bytes[..cut], mode) {
                    Err(DecodeError::TooShort { at_least }) => {
                        assert!(cut < usize::from(at_least) && usize::from(at_least) <= len);
                    }
                    other => panic!("{bytes:02x?} cut to {cut} in {mode:?}: {other:?}"),
                }
            }
            seen += 1;
        }
    }
    assert!(seen > 100_000, "{seen}");
}
