//! 32-bit paging: two levels of 4-byte entries, 1024 a table (SDM 4.3, APM 5.2.2).
//!
//! With CR4.PSE an entry of the page directory may map 4 MiB; with PSE-36 such an entry carries
//! physical-address bits 32 to 39 in its bits 13 to 20. There is no execute-disable bit.

use super::{Entry, ordinary_leaf, ordinary_rights};
use crate::addr::PageSize;

pub(super) const fn decode(pse: bool, large_bits: u8, level: u8, raw: u32) -> Entry {
    let raw = raw as u64;
    if raw & 1 == 0 {
        return Entry::NotPresent;
    }
    if level == 1 {
        // A PTE has no reserved bits where the PAT is supported, as it is everywhere since 1999.
        return ordinary_leaf(raw, raw & 0xffff_f000, PageSize::Size4K, false, 7, 0);
    }
    // PS counts only under CR4.PSE.
    if pse && raw & 1 << 7 != 0 {
        return large(large_bits, raw);
    }
    Entry::Table { at: raw & 0xffff_f000, rights: ordinary_rights(raw, false) }
}

/// Bits 21:13 of a 4 MiB PDE (SDM table 4-4): with M = min(40, MAXPHYADDR), bits (M-20):13 are address bits
/// (M-1):32, and bits 21:(M-19) are reserved; without PSE-36, all of 21:13 are.
const fn large(address_bits: u8, raw: u64) -> Entry {
    let high_bits = address_bits - 32;
    let high = raw >> 13 & 0x1ff;
    if high >> high_bits != 0 {
        return Entry::Reserved;
    }
    ordinary_leaf(raw, high << 32 | raw & 0xffc0_0000, PageSize::Size4M, false, 12, 0)
}
