//! PAE paging: 64-bit entries in 32-bit mode, two levels below four page-directory-pointer entries (SDM 4.4,
//! APM 5.2.3).
//!
//! The four PDPTEs live in registers, loaded and checked by MOV to CR3 (SDM 4.4.1). An AMD processor that
//! runs a guest with nested paging does not load them: it reads them from memory at each walk, like any
//! entry, and a reserved bit is a page fault at the point of use (APM 5.5.3 "Handling of PDPT Entries in
//! PAE Mode", APM 15.25.10).

use super::{ADDRESS, Entry, Format, ordinary_leaf, ordinary_rights};
use crate::access::Rights;
use crate::addr::PageSize;
use std::fmt;

/// Bits 2:1 and 8:5 of a PDPTE.
const PDPTE_RESERVED: u64 = 0b1_1110_0110;
/// Bits 62:52: ignored in long mode, reserved here.
const HIGH_RESERVED: u64 = 0x7ff << 52;

pub(super) const fn decode_pdpte(format: &Format, raw: u64) -> Entry {
    if raw & 1 == 0 {
        return Entry::NotPresent;
    }
    let reserved = if format.pdpte_low_bits_ignored { 0 } else { PDPTE_RESERVED };
    if raw & (reserved | HIGH_RESERVED | 1 << 63 | format.beyond) != 0 {
        return Entry::Reserved;
    }
    Entry::Table { at: raw & ADDRESS, rights: Rights::ALL }
}

pub(super) const fn decode(format: &Format, level: u8, raw: u64) -> Entry {
    if raw & 1 == 0 {
        return Entry::NotPresent;
    }
    let no_nx = if format.nx { 0 } else { 1 << 63 };
    if raw & (HIGH_RESERVED | no_nx | format.beyond) != 0 {
        return Entry::Reserved;
    }
    if level == 1 {
        return ordinary_leaf(raw, raw & ADDRESS, PageSize::Size4K, format.nx, 7, 0);
    }
    // PS counts whatever CR4.PSE is (SDM 4.4.2).
    if raw & 1 << 7 == 0 {
        return Entry::Table { at: raw & ADDRESS, rights: ordinary_rights(raw, format.nx) };
    }
    if raw & 0x001f_e000 != 0 {
        return Entry::Reserved;
    }
    ordinary_leaf(raw, raw & ADDRESS & !0x1f_ffff, PageSize::Size2M, format.nx, 12, 0)
}

/// A PDPTE that MOV to CR3 refuses with #GP (SDM 4.4.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PdpteError {
    /// Which of the four.
    pub index: u8,
    /// Its value, present and with a reserved bit set.
    pub value: u64,
}

impl fmt::Display for PdpteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page-directory-pointer entry {} has a reserved bit set: {:#x}", self.index, self.value)
    }
}

impl std::error::Error for PdpteError {}

impl Format {
    /// Checks the four PDPTEs as MOV to CR3 does.
    pub(crate) fn check_pdptes(&self, pdptes: &[u64; 4]) -> Result<(), PdpteError> {
        match (0u8..).zip(pdptes).find(|&(_, &raw)| decode_pdpte(self, raw) == Entry::Reserved) {
            Some((index, &value)) => Err(PdpteError { index, value }),
            None => Ok(()),
        }
    }
}
