//! 4- and 5-level paging: 64-bit entries, 512 a table (SDM 4.5, APM 5.3). Nested page tables have the same
//! entries (APM 15.25).
//!
//! | level | entry | may map |
//! |---|---|---|
//! | 5 | PML5E | – |
//! | 4 | PML4E | – |
//! | 3 | PDPTE | 1 GiB |
//! | 2 | PDE | 2 MiB |
//! | 1 | PTE | 4 KiB |

use super::{ADDRESS, Entry, Format, ordinary_leaf, ordinary_rights};
use crate::addr::PageSize;

const PS: u64 = 1 << 7;

pub(super) const fn decode(format: &Format, level: u8, raw: u64) -> Entry {
    if raw & 1 == 0 {
        return Entry::NotPresent;
    }
    // Bits 51:MAXPHYADDR are reserved; bit 63 is unless EFER.NXE; bits 62:52 are ignored or hold the key.
    let no_nx = if format.nx { 0 } else { 1 << 63 };
    if raw & (no_nx | format.beyond) != 0 {
        return Entry::Reserved;
    }
    let table = Entry::Table { at: raw & ADDRESS, rights: ordinary_rights(raw, format.nx) };
    let key = (raw >> 59 & 15) as u8;
    match level {
        1 => ordinary_leaf(raw, raw & ADDRESS, PageSize::Size4K, format.nx, 7, key),
        2 if raw & PS == 0 => table,
        3 if raw & PS == 0 => table,
        // Bits 20:13, between PAT and the address.
        2 if raw & 0x001f_e000 != 0 => Entry::Reserved,
        2 => ordinary_leaf(raw, raw & ADDRESS & !0x1f_ffff, PageSize::Size2M, format.nx, 12, key),
        // Bits 29:13; without 1 GiB pages PS itself is reserved.
        3 if !format.pages_1g || raw & 0x3fff_e000 != 0 => Entry::Reserved,
        3 => ordinary_leaf(raw, raw & ADDRESS & !0x3fff_ffff, PageSize::Size1G, format.nx, 12, key),
        // PS is reserved at levels 4 and 5; AMD reserves bit 8 too, Intel ignores it.
        _ if raw & PS != 0 => Entry::Reserved,
        _ if format.level4_bit8_reserved && raw & 1 << 8 != 0 => Entry::Reserved,
        _ => table,
    }
}
