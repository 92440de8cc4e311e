//! Seeded choices: one generator for everything that a history decides.
//!
//! Invariant: the same seed asks the same questions and gets the same answers.

/// Steele, Lea and Flood's generator of 64 bits of state.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// A generator.
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }
    /// Sixty-four bits.
    pub(crate) const fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    /// A number below `n`, which is not 0.
    pub(crate) const fn below(&mut self, n: u64) -> u64 {
        // The high half of the product: a division is what a simulation would spend most of its time on.
        ((self.bits() as u128 * n as u128) >> 64) as u64
    }
    /// True once in `n`; never where `n` is 0.
    pub(crate) const fn one_in(&mut self, n: u64) -> bool {
        n != 0 && self.below(n) == 0
    }
    /// One of `choices`.
    pub(crate) fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}
