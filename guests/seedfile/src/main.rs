//! `seedfile BYTES SEED`: writes BYTES bytes that SEED determines to its output.
//!
//! The same program runs on the host and, linked statically, inside a guest: if the guest's memory is sound, both
//! files are equal. Every 8-byte word is a bijective mix of its own number, so no two words of one file are equal:
//! a page that shows up in the place of another cannot go unnoticed.

use std::io::{self, Write};
use std::process::ExitCode;

/// Words that are written at once.
const CHUNK: usize = 8192;

/// Word `number` of the file: the output function of the `SplitMix64` generator over an arithmetic sequence.
fn word(seed: u64, number: u64) -> u64 {
    let mut x = seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Writes the first `bytes` bytes of the file that `seed` determines.
fn write(out: &mut impl Write, bytes: u64, seed: u64) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK * 8];
    let (mut number, mut left) = (0, bytes);
    while left > 0 {
        for piece in buffer.chunks_exact_mut(8) {
            piece.copy_from_slice(&word(seed, number).to_le_bytes());
            number += 1;
        }
        let now = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        out.write_all(&buffer[..now])?;
        left -= now as u64;
    }
    out.flush()
}

fn main() -> ExitCode {
    let numbers: Option<Vec<u64>> = std::env::args().skip(1).map(|word| word.parse().ok()).collect();
    let Some(&[bytes, seed]) = numbers.as_deref() else {
        eprintln!("usage: seedfile BYTES SEED (two decimal numbers)");
        return ExitCode::from(2);
    };
    match write(&mut io::stdout().lock(), bytes, seed) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("seedfile: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn file(bytes: u64, seed: u64) -> Vec<u8> {
        let mut out = Vec::new();
        write(&mut out, bytes, seed).unwrap();
        out
    }

    #[test]
    fn a_shorter_file_is_the_beginning_of_a_longer_one() {
        let long = file(200_003, 7);
        assert_eq!(long.len(), 200_003);
        for length in [0, 1, 8, 65_536, 65_537] {
            assert_eq!(file(length, 7), long[..usize::try_from(length).unwrap()]);
        }
    }

    #[test]
    fn no_word_comes_twice_and_seeds_differ() {
        let words: HashSet<u64> = (0..100_000).map(|number| word(1, number)).collect();
        assert_eq!(words.len(), 100_000);
        assert_ne!(file(64, 1), file(64, 2));
    }

    #[test]
    fn the_first_words_are_the_reference_generator_s() {
        // SplitMix64 seeded with 1234567, as published with the generator.
        assert_eq!(
            [word(1_234_567, 0), word(1_234_567, 1)],
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]
        );
    }
}
