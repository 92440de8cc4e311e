//! Extended page tables (SDM "The Extended Page Table Mechanism"; "EPT Translation Mechanism" has the
//! figures).
//!
//! An entry is present if any of bits 2:0 (read, write, execute) is set. Reserved bits and impossible
//! settings make it *misconfigured* (SDM "EPT Misconfigurations"), an exit of its own. Mode-based execute
//! control is taken as off: bit 10 is ignored.

use super::{ADDRESS, Entry, Format, Leaf};
use crate::access::Rights;
use crate::addr::PageSize;

#[derive(Clone, Copy)]
pub(super) struct Ept {
    pub(super) accessed_dirty: bool,
    pub(super) execute_only: bool,
    pub(super) pages_2m: bool,
    pub(super) bit12_ignored: bool,
}

const PS: u64 = 1 << 7;

pub(super) const fn decode(format: &Format, ept: Ept, level: u8, raw: u64) -> Entry {
    let rwx = raw & 7;
    if rwx == 0 {
        return Entry::NotPresent;
    }
    // Writable and not readable; execute-only where that is not supported; address bits past MAXPHYADDR.
    if rwx & 3 == 2 || rwx == 4 && !ept.execute_only || raw & format.beyond != 0 {
        return Entry::Reserved;
    }
    let rights = Rights::READ
        .when(raw & 1 != 0)
        .or(Rights::WRITE.when(raw & 2 != 0))
        .or(Rights::EXECUTE.when(raw & 4 != 0))
        .or(Rights::USER);
    let (size, low) = match level {
        1 => (PageSize::Size4K, 0),
        2 if raw & PS != 0 => {
            let low = if ept.bit12_ignored { 0x001f_e000 } else { 0x001f_f000 };
            (PageSize::Size2M, if ept.pages_2m { low } else { PS })
        }
        3 if raw & PS != 0 => (PageSize::Size1G, if format.pages_1g { 0x3fff_f000 } else { PS }),
        2 | 3 => return table(raw, rights, 0x78),
        // PS is reserved at levels 4 and 5 too.
        _ => return table(raw, rights, 0xf8),
    };
    // Memory types 2, 3 and 7 do not exist (0 UC, 1 WC, 4 WT, 5 WP, 6 WB).
    let memory_type = (raw >> 3 & 7) as u8;
    if raw & low != 0 || matches!(memory_type, 2 | 3 | 7) {
        return Entry::Reserved;
    }
    Entry::Page(Leaf {
        at: raw & ADDRESS & !(size.bytes() - 1),
        size,
        rights,
        global: false,
        key: 0,
        caching: memory_type + (raw >> 6 & 1) as u8 * 8,
        dirty: !ept.accessed_dirty || raw & 1 << 9 != 0,
    })
}

const fn table(raw: u64, rights: Rights, reserved: u64) -> Entry {
    if raw & reserved != 0 {
        return Entry::Reserved;
    }
    Entry::Table { at: raw & ADDRESS, rights }
}
