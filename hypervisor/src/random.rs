//! Seeded numbers: `SplitMix64`, the same sequence for the same seed on every machine.

use core::ops::Range;

/// A generator of 64-bit numbers.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence that belongs to `seed`; every value is a seed.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number, uniform over all 64-bit values.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    /// A number in `range`, which must not be empty; the bias is below 2^-32 for ranges that memory can hold.
    #[allow(clippy::cast_possible_truncation)] // below the end of the range
    pub fn below(&mut self, range: Range<usize>) -> usize {
        let width = (range.end - range.start) as u128;
        range.start + ((u128::from(self.draw()) * width) >> 64) as usize
    }

    /// Puts `items` into a random order, each as likely as another.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(0..last + 1);
            items.swap(last, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    #[test]
    fn the_sequence_is_the_published_one() {
        // The reference outputs for seed 1234567.
        let mut random = Random::new(1_234_567);
        let first: Vec<u64> = (0..3).map(|_| random.draw()).collect();
        assert_eq!(first, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn a_shuffle_keeps_every_item_and_repeats_with_its_seed() {
        let mut one: Vec<u32> = (0..1000).collect();
        let mut two = one.clone();
        Random::new(7).shuffle(&mut one);
        Random::new(7).shuffle(&mut two);
        assert_eq!(one, two);
        assert_ne!(one, (0..1000).collect::<Vec<u32>>());
        one.sort_unstable();
        assert_eq!(one, (0..1000).collect::<Vec<u32>>());
    }
}
