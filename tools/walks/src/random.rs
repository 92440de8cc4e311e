//! The numbers that walks are drawn from: `SplitMix64`, started anew for each walk.
//!
//! Pure. The payload has the same in C (`guests/walks/draw.c`); its README has both in words.

/// The finalizer of `SplitMix64`.
pub(crate) const fn mix(mut z: u64) -> u64 {
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// One walk's numbers.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// Those of walk `index` of a seed, in a mode.
    pub(crate) const fn of_walk(seed: u64, mode: u32, index: u64) -> Self {
        Self(mix(mix(seed ^ mode as u64).wrapping_add(index)))
    }

    const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// 32 random bits.
    pub(crate) const fn bits(&mut self) -> u32 {
        (self.next() >> 32) as u32
    }

    /// One of `0..n`.
    pub(crate) const fn below(&mut self, n: u32) -> u32 {
        (self.bits() as u64 * n as u64 >> 32) as u32
    }

    /// True once in `n` times.
    pub(crate) const fn one_in(&mut self, n: u32) -> bool {
        self.below(n) == 0
    }
}
