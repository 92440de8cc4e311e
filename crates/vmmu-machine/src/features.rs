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

/// One of [`Quirks`] that is on, as [`Quirks::named`] gives it.
#[derive(Clone, Copy, Debug)]
pub struct Quirk {
    name: &'static str,
    section: &'static str,
    of: fn(&mut Quirks) -> &mut bool,
}

impl Quirk {
    /// Its name.
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// The section that it breaks or exceeds.
    pub const fn section(&self) -> &'static str {
        self.section
    }
}

/// Declares [`Quirks`] and the table of their names and sections.
macro_rules! quirks {
    ($($(#[$doc:meta])* $name:ident: $section:literal,)*) => {
        /// Named departures from the manuals, for comparing the model with processors that have them.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        #[non_exhaustive]
        pub struct Quirks {
            $($(#[$doc])* pub $name: bool,)*
        }

        impl Quirks {
            /// The manuals, to the letter.
            pub const NONE: Self = Self { $($name: false,)* };

            /// The quirks that are on.
            pub fn named(&self) -> impl Iterator<Item = Quirk> {
                let all = [$((
                    self.$name,
                    Quirk {
                        name: stringify!($name),
                        section: $section,
                        of: |quirks| &mut quirks.$name,
                    },
                ),)*];
                all.into_iter().filter_map(|(on, quirk)| on.then_some(quirk))
            }

            /// The same but for this one.
            #[must_use]
            pub fn without(mut self, quirk: Quirk) -> Self {
                *(quirk.of)(&mut self) = false;
                self
            }
        }
    };
}

quirks! {
    /// A fault for a reserved bit reports P=0. Against APM 8.4.2 and SDM "Page-Fault Exceptions": RSVD set
    /// implies P set, since only a present entry has reserved bits.
    reserved_fault_without_present:
        "APM vol. 2, 8.4.2 (#PF error code); SDM vol. 3, Page-Fault Exceptions",
    /// Bit 8 of a level-4 or level-5 entry is ignored by an AMD processor. Against APM 5.3.3 (the figures of
    /// the PML4E and PML5E: bits 8:7 must be zero).
    level4_bit8_ignored: "APM vol. 2, 5.3.3 (PML4E: bits 8:7 MBZ)",
    /// Bit 12 of a 2 MiB EPT leaf is not checked. Against SDM "EPT Misconfigurations" with the format of an
    /// EPT PDE that maps a 2 MiB page (bits 20:12 reserved).
    ept_2m_bit12_ignored:
        "SDM vol. 3, EPT Misconfigurations (EPT PDE of a 2 MiB page: bits 20:12 reserved)",
    /// Every entry to a guest and every exit from it flushes everything. Allowed, but more than APM 15.16 and
    /// SDM "Operations that Invalidate Cached Mappings" require: it hides missing flushes.
    world_switch_flushes:
        "more than APM vol. 2, 15.16 and SDM vol. 3, Operations that Invalidate Cached Mappings, ask",
    /// An entry that maps a large page gets its accessed flag before its address is found to have reserved
    /// bits. Against SDM 4.8 (the flag is set in an entry that is used for a translation; APM 5.4.2
    /// likewise) and 4.7 (one with a reserved bit is used for none).
    misaligned_page_accessed: "SDM vol. 3, 4.7 and 4.8; APM vol. 2, 5.4.2 (accessed)",
    /// RFLAGS.AC lets the processor's own accesses at CPL 0 to 2 through SMAP. Against SDM 4.6.1 and APM
    /// "Supervisor Mode Access Prevention": implicit accesses to user-mode addresses are refused whatever AC
    /// is.
    ac_helps_implicit: "SDM vol. 3, 4.6.1; APM vol. 2, Supervisor Mode Access Prevention",
    /// The same of the processor's own accesses at CPL 3.
    ac_helps_implicit_of_user: "SDM vol. 3, 4.6.1; APM vol. 2, Supervisor Mode Access Prevention",
    /// PAE's page-directory-pointer entries are read from memory at each walk and get accessed flags, like
    /// entries of other levels, and a reserved bit faults when it is met. Against SDM 4.4.1 (MOV to CR3 loads
    /// and checks them) and APM 5.2.3.
    pdptes_walked: "SDM vol. 3, 4.4.1 (PDPTE registers); APM vol. 2, 5.2.3",
    /// Bits 8:5 and 2:1 of theirs are ignored. Against SDM 4.4.1 and APM 5.2.3: they are reserved.
    pdpte_low_bits_ignored: "SDM vol. 3, 4.4.1 (PDPTE: bits 8:5 and 2:1 reserved); APM vol. 2, 5.2.3",
    /// Protection keys bind accesses to supervisor-mode addresses. Against SDM 4.6.2 and APM "Memory
    /// Protection Keys": they control accesses to user-mode addresses only.
    keys_of_supervisor_pages: "SDM vol. 3, 4.6.2; APM vol. 2, Memory Protection Keys",
    /// The access-disable bit of a key does not bind supervisor accesses. Against SDM 4.6.2 and APM
    /// "Memory Protection Keys": it forbids any data access to a user-mode address.
    access_disable_spares_supervisor: "SDM vol. 3, 4.6.2; APM vol. 2, Memory Protection Keys",
    /// Bits 20:13 of an entry that maps 4 MiB are address bits 39:32, also without PSE-36 and past MAXPHYADDR.
    /// Against SDM 4.3 (table 4-4: those past M, and without PSE-36 all of them, are reserved).
    large_pages_of_40_bits: "SDM vol. 3, 4.3 (4 MiB pages: bits 21:(M-19) reserved)",
    /// EXITINFO1 does not tell a fetch while the host's EFER.NXE is clear. Against APM 15.25.6, which makes no
    /// condition for bit 4, as 8.4.2 does for page faults.
    nested_fetch_told_by_nx: "APM vol. 2, 15.25.6 (EXITINFO1 bit 4)",
}

impl Quirks {
    /// QEMU 7.2, TCG.
    pub const QEMU_7_2: Self = Self {
        reserved_fault_without_present: true,
        level4_bit8_ignored: true,
        world_switch_flushes: true,
        misaligned_page_accessed: true,
        ac_helps_implicit: true,
        pdptes_walked: true,
        pdpte_low_bits_ignored: true,
        large_pages_of_40_bits: true,
        nested_fetch_told_by_nx: true,
        ..Self::NONE
    };

    /// Bochs 2.7.
    pub const BOCHS_2_7: Self = Self {
        ept_2m_bit12_ignored: true,
        world_switch_flushes: true,
        level4_bit8_ignored: true,
        ac_helps_implicit: true,
        ac_helps_implicit_of_user: true,
        keys_of_supervisor_pages: true,
        access_disable_spares_supervisor: true,
        large_pages_of_40_bits: true,
        ..Self::NONE
    };
}
