//! The translation regime of a processor at one moment: which tables in which formats, and whose cached
//! mappings.
//!
//! Pure values, made by the processor when registers or worlds change. Invariant: a regime says everything
//! that a search needs besides memory and caches.

use crate::access::{self, Access, Rights};
use crate::addr::{Gva, Hpa};
use crate::cache::{PhysicalTag, Tag};
use crate::features::{Features, Quirks, Vendor};
use crate::format::Format;
use crate::registers::{Mode, Paging, Registers};

/// The second stage.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Second {
    pub(crate) format: Format,
    pub(crate) root: Hpa,
    pub(crate) tag: PhysicalTag,
    pub(crate) kind: SecondKind,
}

/// Which second stage.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum SecondKind {
    /// Nested paging.
    Npt,
    /// Extended page tables, with or without accessed and dirty flags.
    Ept { accessed_dirty: bool },
}

impl Second {
    /// What the walker's own accesses to guest entries need, and whether they set the dirty flag.
    ///
    /// AMD: they are user writes (APM 15.25.5). Intel: reads, or writes with accessed and dirty flags for
    /// EPT (SDM "Accessed and Dirty Flags for EPT").
    pub(crate) const fn table_needs(&self) -> (Rights, bool) {
        match self.kind {
            SecondKind::Npt | SecondKind::Ept { accessed_dirty: true } => {
                (Rights::READ.or(Rights::WRITE).or(Rights::USER), true)
            }
            SecondKind::Ept { accessed_dirty: false } => (Rights::READ.or(Rights::USER), false),
        }
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Regime {
    pub(crate) vendor: Vendor,
    pub(crate) paging: Paging,
    pub(crate) registers: Registers,
    /// The format of CR3's tables; `None` without paging.
    pub(crate) first: Option<Format>,
    pub(crate) second: Option<Second>,
    /// ASID or VPID.
    pub(crate) space: u16,
    pub(crate) quirks: Quirks,
}

impl Regime {
    pub(crate) const fn new(
        registers: Registers,
        second: Option<Second>,
        space: u16,
        features: &Features,
        quirks: Quirks,
    ) -> Self {
        let paging = registers.paging();
        let first = Format::ordinary(&paging, features, &quirks);
        Self { vendor: features.vendor, paging, registers, first, second, space, quirks }
    }

    /// The EPT root that combined mappings are tagged by.
    pub(crate) const fn ept_root(&self) -> Option<Hpa> {
        match self.second {
            Some(Second { tag: PhysicalTag::EptRoot(root), .. }) => Some(root),
            _ => None,
        }
    }

    /// The tag of linear or combined mappings of the current process.
    pub(crate) const fn linear_tag(&self) -> Tag {
        Tag::Linear { space: self.space, root: self.ept_root(), pcid: self.registers.pcid() }
    }

    /// The tag of global translations.
    pub(crate) const fn global_tag(&self) -> Tag {
        Tag::Global { space: self.space, root: self.ept_root() }
    }

    /// Whether PAE's page-directory-pointer entries are read from memory at each walk: AMD, under nested
    /// paging (APM 15.25.10).
    pub(crate) const fn pdptes_in_memory(&self) -> bool {
        self.quirks.pdptes_walked || matches!(self.second, Some(Second { kind: SecondKind::Npt, .. }))
    }

    /// [`access::check`] with this regime's registers and quirks.
    pub(crate) fn check(&self, rights: Rights, key: u8, access: Access) -> Result<(), u32> {
        access::check(&self.paging, &self.quirks, rights, key, access)
    }

    /// Whether an entry with a reserved bit gets its accessed flag: never, but by a quirk.
    pub(crate) const fn marks_reserved(&self, format: &Format, level: u8, value: u64) -> bool {
        self.quirks.misaligned_page_accessed && format.maps_misaligned_page(level, value)
    }

    /// The linear address that the hardware sees: outside 64-bit mode addresses have 32 bits, and 64-bit
    /// mode has paging of four or five levels.
    pub(crate) const fn linear_address(&self, gva: Gva) -> Gva {
        match self.paging.mode {
            Mode::Off | Mode::Bits32 | Mode::Pae => Gva::new(gva.raw() & 0xffff_ffff),
            Mode::Levels4 | Mode::Levels5 => gva,
        }
    }

    /// Whether a linear address may be used: 4- and 5-level paging want bits 63:47 or 63:56 alike.
    pub(crate) const fn canonical(&self, gva: u64) -> bool {
        let unused = match self.paging.mode {
            Mode::Levels4 => 16,
            Mode::Levels5 => 7,
            Mode::Off | Mode::Bits32 | Mode::Pae => return true,
        };
        ((gva << unused).cast_signed() >> unused).cast_unsigned() == gva
    }
}
