//! What a processor is: its vendor, its features, and the named ways in which some processors (or emulators)
//! depart from the manuals.
//!
//! Pure values, fixed for the life of a [`crate::Processor`]. Invariant: a quirk cites the section it
//! breaks; with [`Quirks::NONE`] the model is the manuals'.

/// Whose manual holds where the two differ.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Vendor {
    /// AMD64 Architecture Programmer's Manual volume 2 (APM). SVM, nested paging, ASIDs.
    Amd,
    /// Intel 64 and IA-32 Architectures Software Developer's Manual volume 3 (SDM). VMX, EPT, VPIDs.
    Intel,
}

/// The features of a processor, as CPUID and the capability registers tell them.
///
/// Start from [`Features::amd`] or [`Features::intel`], which have everything, and take away.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Features {
    /// Whose manual holds.
    pub vendor: Vendor,
    /// Bits of a physical address, MAXPHYADDR: 32 to 52 (CPUID `0x8000_0008` EAX 7:0). More count as 52.
    pub max_phys_bits: u8,
    /// 1 GiB pages in 4- and 5-level tables (CPUID `0x8000_0001` EDX 26).
    pub pages_1g: bool,
    /// Address bits above 32 in 4 MiB pages (CPUID 1 EDX 17).
    pub pse36: bool,
    /// 5-level paging (CPUID 7 ECX 16).
    pub la57: bool,
    /// Protection keys for user pages (CPUID 7 ECX 3).
    pub pku: bool,
    /// Execute-only EPT entries (`IA32_VMX_EPT_VPID_CAP` bit 0).
    pub ept_execute_only: bool,
    /// 2 MiB EPT pages (likewise, bit 16).
    pub ept_2m: bool,
    /// 1 GiB EPT pages (likewise, bit 17).
    pub ept_1g: bool,
    /// Accessed and dirty flags for EPT (likewise, bit 21).
    pub ept_accessed_dirty: bool,
    /// 5-level EPT (likewise, bit 7).
    pub ept_5_levels: bool,
}

impl Features {
    const fn all(vendor: Vendor, max_phys_bits: u8) -> Self {
        let ept = matches!(vendor, Vendor::Intel);
        Self {
            vendor,
            max_phys_bits,
            pages_1g: true,
            pse36: true,
            la57: true,
            pku: true,
            ept_execute_only: ept,
            ept_2m: ept,
            ept_1g: ept,
            ept_accessed_dirty: ept,
            ept_5_levels: ept,
        }
    }

    /// An AMD processor with every feature and this many physical address bits.
    pub const fn amd(max_phys_bits: u8) -> Self {
        Self::all(Vendor::Amd, max_phys_bits)
    }

    /// An Intel processor with every feature and this many physical address bits.
    pub const fn intel(max_phys_bits: u8) -> Self {
        Self::all(Vendor::Intel, max_phys_bits)
    }

    /// The bits of a 64-bit entry, from MAXPHYADDR to 51, that no address of this processor has.
    pub(crate) const fn beyond_physical(&self) -> u64 {
        let bits = if self.max_phys_bits > 52 { 52 } else { self.max_phys_bits };
        (1 << 52) - (1 << bits)
    }
}

/// Named departures from the manuals, for comparing the model with processors that have them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Quirks {
    /// A fault for a reserved bit reports P=0. Against APM 8.4.2 and SDM "Page-Fault Exceptions": RSVD set
    /// implies P set, since only a present entry has reserved bits.
    pub reserved_fault_without_present: bool,
    /// Bit 8 of a level-4 or level-5 entry is ignored by an AMD processor. Against APM 5.3.3 (the figures of
    /// the PML4E and PML5E: bits 8:7 must be zero).
    pub level4_bit8_ignored: bool,
    /// Bit 12 of a 2 MiB EPT leaf is not checked. Against SDM "EPT Misconfigurations" with the format of an
    /// EPT PDE that maps a 2 MiB page (bits 20:12 reserved).
    pub ept_2m_bit12_ignored: bool,
    /// Every entry to a guest and every exit from it flushes everything. Allowed, but more than APM 15.16 and
    /// SDM "Operations that Invalidate Cached Mappings" require: it hides missing flushes.
    pub world_switch_flushes: bool,
}

impl Quirks {
    /// The manuals, to the letter.
    pub const NONE: Self = Self {
        reserved_fault_without_present: false,
        level4_bit8_ignored: false,
        ept_2m_bit12_ignored: false,
        world_switch_flushes: false,
    };

    /// QEMU 7.2, TCG.
    pub const QEMU_7_2: Self = Self {
        reserved_fault_without_present: true,
        level4_bit8_ignored: true,
        world_switch_flushes: true,
        ..Self::NONE
    };

    /// Bochs 2.7.
    pub const BOCHS_2_7: Self = Self { ept_2m_bit12_ignored: true, world_switch_flushes: true, ..Self::NONE };

    /// The quirks that are on: name, and the section that each breaks or exceeds.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        [
            (
                self.reserved_fault_without_present,
                "reserved_fault_without_present",
                "APM vol. 2, 8.4.2 (#PF error code); SDM vol. 3, Page-Fault Exceptions",
            ),
            (self.level4_bit8_ignored, "level4_bit8_ignored", "APM vol. 2, 5.3.3 (PML4E: bits 8:7 MBZ)"),
            (
                self.ept_2m_bit12_ignored,
                "ept_2m_bit12_ignored",
                "SDM vol. 3, EPT Misconfigurations (EPT PDE of a 2 MiB page: bits 20:12 reserved)",
            ),
            (
                self.world_switch_flushes,
                "world_switch_flushes",
                "more than APM vol. 2, 15.16 and SDM vol. 3, Operations that Invalidate Cached Mappings, ask",
            ),
        ]
        .into_iter()
        .filter_map(|(on, name, section)| on.then_some((name, section)))
    }
}
