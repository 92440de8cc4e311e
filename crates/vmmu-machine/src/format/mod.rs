//! The formats of table entries: what one entry means. The single step from which every walk is made.
//!
//! | room | format | sections |
//! |---|---|---|
//! | `bits32` | 32-bit paging, PSE, PSE-36 | SDM 4.3; APM 5.2 |
//! | `pae` | PAE paging, with its page-directory-pointer entries | SDM 4.4; APM 5.2.3, 5.5.3 |
//! | `long` | 4- and 5-level paging; also nested paging | SDM 4.5; APM 5.3, 15.25 |
//! | `ept` | extended page tables | SDM "The Extended Page Table Mechanism" |
//!
//! Pure: a raw value and its level in, its meaning out; no memory, no caches, no permissions of accesses.
//! Invariant: an entry that is not present has no other meaning, and a reserved bit makes a present entry
//! mean nothing else.

mod bits32;
mod ept;
mod long;
mod pae;

use crate::access::Rights;
use crate::addr::PageSize;
use crate::features::{Features, Quirks, Vendor};
use crate::registers::{Mode, Paging};

pub use pae::PdpteError;

/// What an entry means.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Entry {
    /// Not present: nothing in it counts.
    NotPresent,
    /// Present, with a reserved bit set; for EPT, misconfigured.
    Reserved,
    /// It names the next table.
    Table {
        /// The address of the table, in the space in which the tables live.
        at: u64,
        /// What the entry grants.
        rights: Rights,
    },
    /// It maps a page.
    Page(Leaf),
}

/// An entry that maps a page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Leaf {
    /// The first byte of the page, in the space in which the tables live.
    pub at: u64,
    /// Its size.
    pub size: PageSize,
    /// What the entry grants.
    pub rights: Rights,
    /// G: the translation is global, where CR4.PGE is set. Never for EPT.
    pub global: bool,
    /// The protection key; 0 in formats without.
    pub key: u8,
    /// How memory is cached: PAT, PCD, PWT as an index of three bits into the PAT (SDM 4.9.2); for EPT the
    /// memory type, with 8 added if the guest's PAT is ignored.
    pub caching: u8,
    /// The dirty flag is set. Always, in formats or modes that have none.
    pub dirty: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Kind {
    /// `large_bits`: of the address of a 4 MiB page.
    Bits32 {
        pse: bool,
        large_bits: u8,
    },
    Pae,
    Long,
    Ept {
        accessed_dirty: bool,
        execute_only: bool,
        pages_2m: bool,
        bit12_ignored: bool,
    },
}

/// A format as a processor with these features and modes reads it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Format {
    kind: Kind,
    /// The level of the topmost table.
    levels: u8,
    /// Bit 63 forbids fetches; otherwise it is reserved.
    nx: bool,
    pages_1g: bool,
    /// Bit 8 is reserved at levels 4 and 5.
    level4_bit8_reserved: bool,
    /// PAE's page-directory-pointer entries have accessed flags, and no reserved bits below their address.
    pdptes_walked: bool,
    pdpte_low_bits_ignored: bool,
    /// The address bits that the processor does not have.
    beyond: u64,
}

impl Format {
    const fn new(kind: Kind, levels: u8, nx: bool, features: &Features, quirks: &Quirks) -> Self {
        Self {
            kind,
            levels,
            nx,
            pages_1g: features.pages_1g,
            level4_bit8_reserved: matches!(features.vendor, Vendor::Amd) && !quirks.level4_bit8_ignored,
            pdptes_walked: quirks.pdptes_walked,
            pdpte_low_bits_ignored: quirks.pdpte_low_bits_ignored,
            beyond: features.beyond_physical(),
        }
    }

    /// The format of ordinary tables in a paging mode; `None` without paging.
    pub const fn ordinary(paging: &Paging, features: &Features, quirks: &Quirks) -> Option<Self> {
        let (kind, levels) = match paging.mode {
            Mode::Off => return None,
            Mode::Bits32 => {
                let forty = quirks.large_pages_of_40_bits;
                let bits = match (features.pse36, features.max_phys_bits) {
                    _ if forty => 40,
                    (false, _) | (_, ..32) => 32,
                    (true, 40..) => 40,
                    (true, bits) => bits,
                };
                (Kind::Bits32 { pse: paging.pse, large_bits: bits }, 2)
            }
            Mode::Pae => (Kind::Pae, 3),
            Mode::Levels4 => (Kind::Long, 4),
            Mode::Levels5 => (Kind::Long, 5),
        };
        Some(Self::new(kind, levels, paging.nx, features, quirks))
    }

    /// The format of nested tables under SVM: those of the host's own mode (APM 15.25.3), here 4 or 5
    /// levels. `nx` is the host's EFER.NXE.
    pub const fn nested(five_levels: bool, nx: bool, features: &Features, quirks: &Quirks) -> Self {
        Self::new(Kind::Long, if five_levels { 5 } else { 4 }, nx, features, quirks)
    }

    /// The format of extended page tables.
    pub const fn ept(five_levels: bool, accessed_dirty: bool, features: &Features, quirks: &Quirks) -> Self {
        let kind = Kind::Ept {
            accessed_dirty,
            execute_only: features.ept_execute_only,
            pages_2m: features.ept_2m,
            bit12_ignored: quirks.ept_2m_bit12_ignored,
        };
        let mut format = Self::new(kind, if five_levels { 5 } else { 4 }, false, features, quirks);
        format.pages_1g = features.ept_1g;
        format
    }

    /// What `raw` means in a table of `level`, 1 being the lowest.
    pub const fn decode(&self, level: u8, raw: u64) -> Entry {
        match self.kind {
            Kind::Bits32 { pse, large_bits } => bits32::decode(pse, large_bits, level, raw as u32),
            Kind::Pae if level == 3 => pae::decode_pdpte(self, raw),
            Kind::Pae => pae::decode(self, level, raw),
            Kind::Long => long::decode(self, level, raw),
            Kind::Ept { accessed_dirty, execute_only, pages_2m, bit12_ignored } => {
                let how = ept::Ept { accessed_dirty, execute_only, pages_2m, bit12_ignored };
                ept::decode(self, how, level, raw)
            }
        }
    }

    /// Whether bit 63 forbids fetches.
    pub(crate) const fn has_nx(&self) -> bool {
        self.nx
    }

    /// Whether `raw` would map a large page, were it not for address bits below the page's size.
    pub(crate) const fn maps_misaligned_page(&self, level: u8, raw: u64) -> bool {
        let below = match (self.kind, level) {
            (Kind::Bits32 { pse: true, .. }, 2) => 0x003f_e000,
            (Kind::Pae | Kind::Long, 2) => 0x001f_e000,
            (Kind::Long, 3) => 0x3fff_e000,
            _ => return false,
        };
        matches!(self.decode(level, raw), Entry::Reserved)
            && matches!(self.decode(level, raw & !below), Entry::Page(_))
    }

    /// The level of the topmost table: 2 to 5. In PAE paging 3, the table of page-directory-pointer entries.
    pub const fn levels(&self) -> u8 {
        self.levels
    }

    /// log2 of the bytes that one entry of `level` covers.
    pub const fn entry_shift(&self, level: u8) -> u32 {
        12 + self.index_bits() * (level as u32 - 1)
    }

    /// log2 of the bytes that a whole table of `level` covers.
    pub const fn table_shift(&self, level: u8) -> u32 {
        self.entry_shift(level + 1)
    }

    const fn index_bits(&self) -> u32 {
        if matches!(self.kind, Kind::Bits32 { .. }) { 10 } else { 9 }
    }

    /// 4 or 8.
    pub const fn entry_bytes(&self) -> u8 {
        if matches!(self.kind, Kind::Bits32 { .. }) { 4 } else { 8 }
    }

    /// The distance, in a table of `level`, of the entry for `address` from the table's start.
    pub const fn entry_offset(&self, level: u8, address: u64) -> u64 {
        let bits = if matches!(self.kind, Kind::Pae) && level == 3 { 2 } else { self.index_bits() };
        let index = address >> self.entry_shift(level) & ((1 << bits) - 1);
        index * self.entry_bytes() as u64
    }

    /// The address of the topmost table in CR3 or in an EPT pointer (SDM tables 4-3, 4-7, 4-12; APM 5.2,
    /// 5.3).
    pub const fn root(&self, cr3: u64) -> u64 {
        match self.kind {
            Kind::Bits32 { .. } => cr3 & 0xffff_f000,
            Kind::Pae => cr3 & 0xffff_ffe0,
            Kind::Long | Kind::Ept { .. } => cr3 & 0x000f_ffff_ffff_f000,
        }
    }

    /// The accessed flag in an entry of `level`; 0 where there is none.
    pub const fn accessed(&self, level: u8) -> u64 {
        match self.kind {
            Kind::Pae if level == 3 && !self.pdptes_walked => 0,
            Kind::Bits32 { .. } | Kind::Pae | Kind::Long => 1 << 5,
            Kind::Ept { accessed_dirty: true, .. } => 1 << 8,
            Kind::Ept { .. } => 0,
        }
    }

    /// The dirty flag in a leaf; 0 where there is none.
    pub const fn dirty(&self) -> u64 {
        match self.kind {
            Kind::Bits32 { .. } | Kind::Pae | Kind::Long => 1 << 6,
            Kind::Ept { accessed_dirty: true, .. } => 1 << 9,
            Kind::Ept { .. } => 0,
        }
    }

    /// Whether the tables can translate `address` at all: nested and extended tables of four levels end at
    /// 2^48, of five at 2^57 (SDM "EPT Overview": wider addresses are violations).
    pub const fn covers(&self, address: u64) -> bool {
        address >> self.table_shift(self.levels) == 0
    }
}

/// The address field of a 64-bit entry.
pub(crate) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// What bits 1, 2 and 63 of an ordinary entry grant.
const fn ordinary_rights(raw: u64, nx: bool) -> Rights {
    Rights::READ
        .or(Rights::WRITE.when(raw & 2 != 0))
        .or(Rights::USER.when(raw & 4 != 0))
        .or(Rights::EXECUTE.when(!(nx && raw >> 63 != 0)))
}

/// An ordinary leaf; `pat` is the bit that holds PAT.
const fn ordinary_leaf(raw: u64, at: u64, size: PageSize, nx: bool, pat: u32, key: u8) -> Entry {
    Entry::Page(Leaf {
        at,
        size,
        rights: ordinary_rights(raw, nx),
        global: raw & 1 << 8 != 0,
        key,
        caching: (raw >> pat & 1) as u8 * 4 + (raw >> 3 & 3) as u8,
        dirty: raw & 1 << 6 != 0,
    })
}
