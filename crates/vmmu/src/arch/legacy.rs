//! The entries of a guest's own tables: 4-byte entries of 32-bit paging, 8-byte entries of PAE, 4- and 5-level
//! paging, and page-directory-pointer entries.
//!
//! Pure decoding; no memory. Layouts: Intel SDM volume 3, 4.3 to 4.5; AMD64 manual volume 2, 5.2 and 5.3.
//! Invariant: the order of an entry's checks is here and nowhere else: not present outranks reserved bits, and
//! an entry with reserved bits grants nothing (S38, S41).

use super::paging::{CpuRole, PagingMode, PagingState, Rights};
use crate::addr::{Gpa, Level, PAGE_SHIFT};

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const PAGE_SIZE: u64 = 1 << 7;
const BIT_8: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = bits(12, 51);
const KEY_SHIFT: u32 = 59;

/// Bits `low` to `high`, both included.
const fn bits(low: u32, high: u32) -> u64 {
    (u64::MAX >> (63 - high)) & (u64::MAX << low)
}

/// Bits `low` to `high`, both included; none where `low` is the greater.
const fn bits_or_none(low: u32, high: u32) -> u64 {
    if low > high { 0 } else { bits(low, high) }
}

/// What an entry of a guest's table says.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum GuestEntry {
    /// Nothing.
    NotPresent,
    /// It is present with a bit set that must be clear.
    Reserved,
    /// The next lower table is at `at`.
    Table {
        /// Its guest-physical address.
        at: Gpa,
        /// What this entry grants.
        rights: Rights,
    },
    /// A page of the size of the entry's level starts at `at`.
    Page {
        /// Its guest-physical address.
        at: Gpa,
        /// What this entry grants.
        rights: Rights,
        /// The protection key; it counts only where [`CpuRole::pke`] says so.
        key: u8,
    },
}

/// A format of guest entries.
pub trait GuestFormat {
    /// log2 of the entries in a table.
    const INDEX_BITS: u32;
    /// log2 of the bytes in an entry.
    const ENTRY_SHIFT: u32;

    /// What the entry `raw` at `level` says. Entries of 4 bytes are zero-extended.
    fn decode(&self, raw: u64, level: Level) -> GuestEntry;

    /// log2 of the bytes that an entry at `level` covers.
    #[inline]
    fn span_shift(level: Level) -> u32 {
        PAGE_SHIFT + Self::INDEX_BITS * (u32::from(level.number()) - 1)
    }

    /// The address, in the table at `table`, of the entry at `level` that covers linear address `linear`.
    #[inline]
    fn entry_address(table: Gpa, linear: u64, level: Level) -> Gpa {
        let index = (linear >> Self::span_shift(level)) & ((1 << Self::INDEX_BITS) - 1);
        Gpa::new(table.raw() | index << Self::ENTRY_SHIFT)
    }
}

/// Entries of 32-bit paging (S21).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Legacy32 {
    pse: bool,
}

impl Legacy32 {
    /// The format under CR4.PSE.
    #[inline]
    pub const fn new(role: &CpuRole) -> Self {
        Self { pse: role.pse }
    }

    /// Where CR3 points.
    #[inline]
    pub const fn root(cr3: u64) -> Gpa {
        Gpa::new(cr3 & bits(12, 31))
    }
}

impl GuestFormat for Legacy32 {
    const INDEX_BITS: u32 = 10;
    const ENTRY_SHIFT: u32 = 2;

    #[inline]
    fn decode(&self, raw: u64, level: Level) -> GuestEntry {
        /// Of a 4 MiB page: physical address bits 35:32 (PSE-36), and what is reserved above them.
        const HIGH_ADDRESS: u64 = bits(13, 16);
        const RESERVED: u64 = bits(17, 21);

        if raw & PRESENT == 0 {
            return GuestEntry::NotPresent;
        }
        let rights = rights(raw);
        if level == Level::L1 {
            return GuestEntry::Page { at: Gpa::new(raw & bits(12, 31)), rights, key: 0 };
        }
        if !self.pse || raw & PAGE_SIZE == 0 {
            return GuestEntry::Table { at: Gpa::new(raw & bits(12, 31)), rights };
        }
        if raw & RESERVED != 0 {
            return GuestEntry::Reserved;
        }
        let at = Gpa::new(raw & bits(22, 31) | (raw & HIGH_ADDRESS) << (32 - 13));
        GuestEntry::Page { at, rights, key: 0 }
    }
}

/// Entries of 8 bytes below the page-directory-pointer table of PAE paging, and of all levels of 4- and 5-level
/// paging.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Legacy64 {
    /// Reserved bits by [bit 7 of the entry][level − 1] (S30, S31).
    reserved: [[u64; 5]; 2],
}

impl Legacy64 {
    /// The format under `role`, whose mode is not [`PagingMode::Off`] or [`PagingMode::Bits32`], on the
    /// processor of `state`.
    #[inline]
    pub const fn new(role: &CpuRole, state: &PagingState) -> Self {
        let nx = if role.nx { 0 } else { NO_EXECUTE };
        // In long mode bits 62:52 are ignored or hold the protection key; PAE reserves them.
        let high = match role.mode {
            PagingMode::Pae => beyond(state.max_phys_bits) | bits(52, 62) | nx,
            _ => beyond(state.max_phys_bits) | nx,
        };
        let top = high | PAGE_SIZE | if state.amd_compatible { BIT_8 } else { 0 };
        let no_1g = if state.has_1g_pages { 0 } else { PAGE_SIZE };
        Self {
            reserved: [
                [high, high, high, top, top],
                [high, high | bits(13, 20), high | bits(13, 29) | no_1g, top, top],
            ],
        }
    }

    /// Where CR3 points in 4- and 5-level paging.
    #[inline]
    pub const fn root(cr3: u64) -> Gpa {
        Gpa::new(cr3 & ADDRESS)
    }
}

impl GuestFormat for Legacy64 {
    const INDEX_BITS: u32 = 9;
    const ENTRY_SHIFT: u32 = 3;

    #[inline]
    fn decode(&self, raw: u64, level: Level) -> GuestEntry {
        if raw & PRESENT == 0 {
            return GuestEntry::NotPresent;
        }
        let large = raw & PAGE_SIZE != 0;
        if raw & self.reserved[usize::from(large)][usize::from(level.number() - 1)] != 0 {
            return GuestEntry::Reserved;
        }
        let mut rights = rights(raw);
        if raw & NO_EXECUTE != 0 {
            rights = rights.difference(Rights::EXECUTE);
        }
        if !large && level != Level::L1 {
            return GuestEntry::Table { at: Gpa::new(raw & ADDRESS), rights };
        }
        // Bit 12 of a large page is its PAT bit: below the page's own alignment.
        let at = Gpa::new(raw & ADDRESS & u64::MAX << Self::span_shift(level));
        let key = (raw >> KEY_SHIFT) as u8 & 15;
        GuestEntry::Page { at, rights, key }
    }
}

/// What the R/W and U/S bits of an entry grant; execution always.
#[inline]
const fn rights(raw: u64) -> Rights {
    let mut rights = Rights::EXECUTE;
    if raw & WRITABLE != 0 {
        rights = rights.union(Rights::WRITE);
    }
    if raw & USER != 0 {
        rights = rights.union(Rights::USER);
    }
    rights
}

/// Address bits that a processor with `max_phys_bits` does not have.
#[inline]
const fn beyond(max_phys_bits: u8) -> u64 {
    bits_or_none(max_phys_bits as u32, 51)
}

/// The page-directory-pointer table of PAE paging (S22).
pub mod pdpte {
    use super::{ADDRESS, Gpa, GuestEntry, NO_EXECUTE, PRESENT, Rights, beyond, bits};

    /// Entries in the table.
    pub const COUNT: usize = 4;
    /// Bytes in the table, which is aligned to its size.
    pub const TABLE_BYTES: u64 = 32;

    /// Where CR3 points.
    #[inline]
    pub const fn root(cr3: u64) -> Gpa {
        Gpa::new(cr3 & bits(5, 31))
    }

    /// Which entry covers the linear address `linear`.
    #[inline]
    pub const fn index(linear: u64) -> usize {
        (linear >> 30 & 3) as usize
    }

    /// What the entry `raw` says. It has no rights of its own, so it grants all.
    #[inline]
    pub const fn decode(raw: u64, max_phys_bits: u8) -> GuestEntry {
        let reserved = NO_EXECUTE | bits(52, 62) | beyond(max_phys_bits) | bits(5, 8) | bits(1, 2);
        if raw & PRESENT == 0 {
            GuestEntry::NotPresent
        } else if raw & reserved != 0 {
            GuestEntry::Reserved
        } else {
            GuestEntry::Table { at: Gpa::new(raw & ADDRESS), rights: Rights::all() }
        }
    }
}

#[cfg(test)]
mod tests;
