//! A small, fast and deterministic hasher: keys are page numbers and tags that nobody chooses to collide,
//! and two runs of one seed must walk their maps alike.
//!
//! Pure.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Multiply and rotate, a word at a time.
#[derive(Clone, Copy, Default)]
pub(crate) struct WordHasher(u64);

/// A map with [`WordHasher`].
pub(crate) type Map<K, V> = HashMap<K, V, BuildHasherDefault<WordHasher>>;

impl Hasher for WordHasher {
    fn finish(&self) -> u64 {
        // The map takes its bucket from the low bits: bring the well-mixed high bits there.
        self.0.rotate_left(26)
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(byte.into());
        }
    }
    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }
    fn write_u16(&mut self, value: u16) {
        self.write_u64(value.into());
    }
    fn write_u32(&mut self, value: u32) {
        self.write_u64(value.into());
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }
}

/// The generator behind every seeded choice: `SplitMix64`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choice(u64);

impl Choice {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// One of `0..n`; 0 if `n` is 0.
    pub(crate) const fn below(&mut self, n: usize) -> usize {
        if n < 2 { 0 } else { (self.next() >> 32) as usize % n }
    }
}
