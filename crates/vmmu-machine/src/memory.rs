//! Physical memory: 2^52 bytes, sparse, in pages of 64-bit words that are read and changed atomically.
//!
//! Every page exists and holds zeroes until it is written; only pages that were touched cost anything. Shared
//! by reference: processors, the code under test and a test's own thread may use it at once. Invariant: once
//! there, a page never moves and is never freed before the memory itself, so that
//! [`Memory::page`] may be kept as a pointer by whoever keeps the memory alive.

use crate::addr::{Hpa, Pfn};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// The words of one page, aligned as the page is.
#[repr(C, align(4096))]
struct Page([AtomicU64; 512]);

impl Page {
    fn zeroed() -> Self {
        Self([const { AtomicU64::new(0) }; 512])
    }
}

// A frame number has 40 bits: 12 and 11 choose a directory, 11 a bank, 6 the page in the bank.
const BANK_BITS: u32 = 6;
const LOW_BITS: u32 = 11;
const MIDDLE_BITS: u32 = 11;
const TOP_BITS: u32 = 12;
const _: () = assert!(BANK_BITS + LOW_BITS + MIDDLE_BITS + TOP_BITS == 40);

/// The pages of a naturally aligned block of 64.
struct Bank {
    pages: Box<[Page]>,
    /// Those that may hold something other than zeroes.
    touched: AtomicU64,
}

impl Bank {
    fn zeroed() -> Self {
        let pages = (0..1 << BANK_BITS).map(|_| Page::zeroed()).collect();
        Self { pages, touched: AtomicU64::new(0) }
    }
}

type Lazy<T> = OnceLock<Box<[T]>>;

fn directory<T>(bits: u32) -> Box<[OnceLock<T>]> {
    (0..1usize << bits).map(|_| OnceLock::new()).collect()
}

/// The bits of `pfn` that start at `at`.
fn digit(pfn: u64, at: u32, bits: u32) -> usize {
    (pfn >> at) as usize & ((1 << bits) - 1)
}

/// Physical memory. See the module.
pub struct Memory {
    top: Box<[Lazy<Lazy<OnceLock<Bank>>>]>,
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").finish_non_exhaustive()
    }
}

impl Memory {
    /// All zeroes.
    pub fn new() -> Self {
        Self { top: directory(TOP_BITS) }
    }

    /// Makes everything zeroes again; what was touched stays allocated, and where it is.
    pub fn clear(&mut self) {
        let middles = self.top.iter_mut().filter_map(OnceLock::get_mut).flatten();
        let lows = middles.filter_map(OnceLock::get_mut).flatten();
        for bank in lows.filter_map(OnceLock::get_mut) {
            let mut touched = std::mem::take(bank.touched.get_mut());
            while touched != 0 {
                let page = &mut bank.pages[touched.trailing_zeros() as usize];
                page.0.iter_mut().for_each(|word| *word.get_mut() = 0);
                touched &= touched - 1;
            }
        }
    }

    /// The page, if it was ever touched.
    #[inline]
    fn existing(&self, pfn: u64) -> Option<&Page> {
        if pfn >> 40 != 0 {
            return None;
        }
        let middle = self.top[(pfn >> (BANK_BITS + LOW_BITS + MIDDLE_BITS)) as usize].get()?;
        let low = middle[digit(pfn, BANK_BITS + LOW_BITS, MIDDLE_BITS)].get()?;
        let bank = low[digit(pfn, BANK_BITS, LOW_BITS)].get()?;
        Some(&bank.pages[digit(pfn, 0, BANK_BITS)])
    }

    /// The page, made if need be.
    fn made(&self, pfn: u64) -> Option<&Page> {
        if pfn >> 40 != 0 {
            return None;
        }
        let middle = self.top[(pfn >> (BANK_BITS + LOW_BITS + MIDDLE_BITS)) as usize]
            .get_or_init(|| directory(MIDDLE_BITS));
        let low = middle[digit(pfn, BANK_BITS + LOW_BITS, MIDDLE_BITS)].get_or_init(|| directory(LOW_BITS));
        let bank = low[digit(pfn, BANK_BITS, LOW_BITS)].get_or_init(Bank::zeroed);
        let page = digit(pfn, 0, BANK_BITS);
        if bank.touched.load(Ordering::Relaxed) >> page & 1 == 0 {
            bank.touched.fetch_or(1 << page, Ordering::Relaxed);
        }
        Some(&bank.pages[page])
    }

    /// The 512 words of a frame. Their address is a multiple of 4096 and stays as long as the memory; the
    /// pages of a naturally aligned block of 64 follow each other.
    ///
    /// # Panics
    /// If the frame lies past 2^52 bytes: no processor can name it.
    pub fn page(&self, pfn: Pfn) -> &[AtomicU64; 512] {
        let Some(page) = self.made(pfn.raw()) else { panic!("{pfn:?} is past 2^52 bytes") };
        &page.0
    }

    /// The word that holds `at`, whose low three bits are ignored. Past 2^52 bytes nothing answers, and a
    /// read is all ones, as on an empty bus.
    #[inline]
    pub fn read64(&self, at: Hpa) -> u64 {
        match self.existing(at.raw() >> 12) {
            Some(page) => page.0[digit(at.raw(), 3, 9)].load(Ordering::Acquire),
            None if at.raw() >> 52 != 0 => u64::MAX,
            None => 0,
        }
    }

    /// Writes the word that holds `at`, likewise.
    pub fn write64(&self, at: Hpa, value: u64) {
        if let Some(page) = self.made(at.raw() >> 12) {
            page.0[digit(at.raw(), 3, 9)].store(value, Ordering::Release);
        }
    }

    /// The aligned 32 bits that hold `at`.
    #[inline]
    pub fn read32(&self, at: Hpa) -> u32 {
        (self.read64(at) >> half(at)) as u32
    }

    /// Writes the aligned 32 bits that hold `at`; the other half of the word is untouched.
    pub fn write32(&self, at: Hpa, value: u32) {
        if let Some(page) = self.made(at.raw() >> 12) {
            let word = &page.0[digit(at.raw(), 3, 9)];
            let mut old = word.load(Ordering::Acquire);
            loop {
                let new = old & !(0xffff_ffff << half(at)) | u64::from(value) << half(at);
                match word.compare_exchange_weak(old, new, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => break,
                    Err(other) => old = other,
                }
            }
        }
    }

    /// Replaces the word at `at` if it is `old`; otherwise says what it is.
    pub fn compare_exchange64(&self, at: Hpa, old: u64, new: u64) -> Result<(), u64> {
        let Some(page) = self.made(at.raw() >> 12) else { return Err(u64::MAX) };
        let word = &page.0[digit(at.raw(), 3, 9)];
        word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire).map(drop)
    }

    /// Sets bits of the table entry at `at`, `bytes` (4 or 8) wide, in one step and only if the entry is
    /// still `seen` in all bits but those of `ignore`: what a walker does to set accessed and dirty.
    /// Whether it did.
    pub(crate) fn set_in_entry(&self, at: Hpa, bytes: u8, seen: u64, ignore: u64, bits: u64) -> bool {
        let (shift, mask) = if bytes == 4 { (half(at), 0xffff_ffff) } else { (0, u64::MAX) };
        let mut now = self.read64(at);
        loop {
            let entry = now >> shift & mask;
            if (entry ^ seen) & mask & !ignore != 0 {
                return false;
            }
            if entry & bits == bits {
                return true;
            }
            match self.compare_exchange64(at, now, now | bits << shift) {
                Ok(()) => return true,
                Err(other) => now = other,
            }
        }
    }
}

/// How far the aligned 32 bits at `at` are shifted within their word.
const fn half(at: Hpa) -> u32 {
    (at.raw() as u32 & 4) * 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_zero_until_written_and_nobody_answers_past_the_end() {
        let memory = Memory::new();
        assert_eq!(memory.read64(Hpa::new(0x1234_5678)), 0);
        memory.write64(Hpa::new((1 << 52) - 8), 7);
        assert_eq!(memory.read64(Hpa::new((1 << 52) - 8)), 7);
        memory.write64(Hpa::new(1 << 52), 7);
        assert_eq!(memory.read64(Hpa::new(1 << 52)), u64::MAX);
        assert_eq!(memory.compare_exchange64(Hpa::new(1 << 52), u64::MAX, 0), Err(u64::MAX));
    }

    #[test]
    fn cleared_memory_is_zeroes_in_place() {
        let mut memory = Memory::new();
        let (low, high) = (Hpa::new(0x1238), Hpa::new((1 << 52) - 8));
        memory.write64(low, 7);
        memory.page(Pfn::new(1))[3].store(8, Ordering::Relaxed);
        memory.write64(high, 9);
        let at = memory.page(Pfn::new(1)).as_ptr();
        memory.clear();
        assert_eq!((memory.read64(low), memory.read64(Hpa::new(0x1018)), memory.read64(high)), (0, 0, 0));
        assert_eq!(memory.page(Pfn::new(1)).as_ptr(), at);
    }

    #[test]
    fn halves_of_a_word_are_independent() {
        let memory = Memory::new();
        memory.write32(Hpa::new(0x1004), 0xaaaa_bbbb);
        memory.write32(Hpa::new(0x1000), 0xcccc_dddd);
        assert_eq!(memory.read64(Hpa::new(0x1000)), 0xaaaa_bbbb_cccc_dddd);
        assert_eq!(memory.read32(Hpa::new(0x1004)), 0xaaaa_bbbb);
        assert!(memory.set_in_entry(Hpa::new(0x1004), 4, 0xaaaa_bbbb, 0, 0x44));
        assert_eq!(memory.read64(Hpa::new(0x1000)), 0xaaaa_bbff_cccc_dddd);
    }

    #[test]
    fn a_changed_entry_is_not_marked() {
        let memory = Memory::new();
        let at = Hpa::new(0x2008);
        memory.write64(at, 0x3001);
        assert!(!memory.set_in_entry(at, 8, 0x4001, 0x60, 0x20));
        assert_eq!(memory.read64(at), 0x3001);
        memory.write64(at, 0x3041);
        assert!(memory.set_in_entry(at, 8, 0x3001, 0x60, 0x20));
        assert_eq!(memory.read64(at), 0x3061);
    }

    #[test]
    fn a_page_stays_where_it_is_and_blocks_are_contiguous() {
        let memory = Memory::new();
        let first = memory.page(Pfn::new(64)).as_ptr();
        memory.page(Pfn::new(1 << 30));
        assert_eq!(first, memory.page(Pfn::new(64)).as_ptr());
        assert_eq!(first.addr() % 4096, 0);
        assert_eq!(memory.page(Pfn::new(127)).as_ptr().addr() - first.addr(), 63 * 4096);
    }
}
