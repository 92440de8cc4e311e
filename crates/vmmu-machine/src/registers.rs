//! The registers that decide how a linear address is translated, and the paging mode that they select.
//!
//! Pure values. Invariant: everything else learns of control-register bits through [`Paging`], which is made
//! only of registers that [`Registers::check`] accepted; what the mode makes meaningless is off in it.

use crate::features::Features;
use std::fmt;

/// CR0.WP: supervisor writes respect R/W.
pub const CR0_WP: u64 = 1 << 16;
/// CR0.PG: paging is on.
pub const CR0_PG: u64 = 1 << 31;
/// CR4.PSE: 4 MiB pages in 32-bit paging.
pub const CR4_PSE: u64 = 1 << 4;
/// CR4.PAE: 64-bit entries.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4.PGE: global pages.
pub const CR4_PGE: u64 = 1 << 7;
/// CR4.LA57: five levels.
pub const CR4_LA57: u64 = 1 << 12;
/// CR4.PCIDE: process-context identifiers.
pub const CR4_PCIDE: u64 = 1 << 17;
/// CR4.SMEP: no supervisor fetch from user pages.
pub const CR4_SMEP: u64 = 1 << 20;
/// CR4.SMAP: no supervisor data access to user pages.
pub const CR4_SMAP: u64 = 1 << 21;
/// CR4.PKE: protection keys for user pages.
pub const CR4_PKE: u64 = 1 << 22;
/// CR4.CET: shadow stacks. Refused by this model.
pub const CR4_CET: u64 = 1 << 23;
/// CR4.PKS: protection keys for supervisor pages. Refused by this model.
pub const CR4_PKS: u64 = 1 << 24;
/// EFER.LME: long mode is enabled.
pub const EFER_LME: u64 = 1 << 8;
/// EFER.LMA: long mode is active.
pub const EFER_LMA: u64 = 1 << 10;
/// EFER.NXE: bit 63 of an entry forbids fetches.
pub const EFER_NXE: u64 = 1 << 11;
/// EFER.TCE (AMD): INVLPG drops only the upper-level entries on the way to its page (APM 5.5.3).
pub const EFER_TCE: u64 = 1 << 15;
/// The bit of MOV to CR3's operand that asks to keep the translations of the PCID (SDM 4.10.4.1).
pub const CR3_KEEP: u64 = 1 << 63;

/// The registers of one world, host or guest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Registers {
    /// CR0.
    pub cr0: u64,
    /// CR3, without [`CR3_KEEP`].
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// The rights of user pages by protection key.
    pub pkru: u32,
    /// The page-directory-pointer entries that MOV to CR3 loaded; PAE paging only (SDM 4.4.1).
    pub pdptes: [u64; 4],
}

/// Registers that this model does not run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum UnsupportedRegisters {
    /// CR4.PKS is set: protection keys of supervisor pages are not modelled.
    SupervisorKeys,
    /// CR4.CET is set: shadow stacks are not modelled.
    ShadowStacks,
    /// EFER.LMA under paging without CR4.PAE: no processor gets there.
    LongModeWithoutPae,
    /// CR4.PCIDE outside long mode (SDM 4.10.1).
    PcidOutsideLongMode,
    /// A bit of CR4 whose feature the processor lacks.
    FeatureMissing(u64),
}

impl fmt::Display for UnsupportedRegisters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SupervisorKeys => {
                f.write_str("CR4.PKS is set, and supervisor protection keys are not modelled")
            }
            Self::ShadowStacks => f.write_str("CR4.CET is set, and shadow stacks are not modelled"),
            Self::LongModeWithoutPae => f.write_str("EFER.LMA is set and CR4.PAE is not"),
            Self::PcidOutsideLongMode => f.write_str("CR4.PCIDE is set outside long mode"),
            Self::FeatureMissing(bit) => {
                write!(f, "CR4 bit {bit:#x} is set, and the processor lacks its feature")
            }
        }
    }
}

impl std::error::Error for UnsupportedRegisters {}

impl Registers {
    /// Paging off.
    pub const OFF: Self = Self { cr0: 0, cr3: 0, cr4: 0, efer: 0, pkru: 0, pdptes: [0; 4] };

    /// A usual 64-bit kernel's: 4-level paging, WP, NX, global pages.
    pub const fn long_mode(cr3: u64) -> Self {
        Self {
            cr0: CR0_PG | CR0_WP | 1,
            cr3,
            cr4: CR4_PAE | CR4_PGE,
            efer: EFER_LMA | EFER_LME | EFER_NXE,
            ..Self::OFF
        }
    }

    /// A usual 32-bit kernel's: 32-bit paging with 4 MiB pages, WP, global pages.
    pub const fn legacy(cr3: u64) -> Self {
        Self { cr0: CR0_PG | CR0_WP | 1, cr3, cr4: CR4_PSE | CR4_PGE, ..Self::OFF }
    }

    /// A usual 32-bit PAE kernel's: WP, NX, global pages. The page-directory-pointer entries are loaded by
    /// [`crate::Processor::mov_cr3`], or filled in by the caller.
    pub const fn pae(cr3: u64) -> Self {
        Self { cr0: CR0_PG | CR0_WP | 1, cr3, cr4: CR4_PAE | CR4_PGE, efer: EFER_NXE, ..Self::OFF }
    }

    /// Whether this model runs these registers on a processor with `features`.
    pub const fn check(&self, features: &Features) -> Result<(), UnsupportedRegisters> {
        if self.cr4 & CR4_PKS != 0 {
            return Err(UnsupportedRegisters::SupervisorKeys);
        }
        if self.cr4 & CR4_CET != 0 {
            return Err(UnsupportedRegisters::ShadowStacks);
        }
        if self.cr4 & CR4_LA57 != 0 && !features.la57 {
            return Err(UnsupportedRegisters::FeatureMissing(CR4_LA57));
        }
        if self.cr4 & CR4_PKE != 0 && !features.pku {
            return Err(UnsupportedRegisters::FeatureMissing(CR4_PKE));
        }
        if self.cr0 & CR0_PG != 0 && self.efer & EFER_LMA != 0 && self.cr4 & CR4_PAE == 0 {
            return Err(UnsupportedRegisters::LongModeWithoutPae);
        }
        if self.cr4 & CR4_PCIDE != 0 && self.efer & EFER_LMA == 0 {
            return Err(UnsupportedRegisters::PcidOutsideLongMode);
        }
        Ok(())
    }

    /// What of the registers matters to translation.
    pub const fn paging(&self) -> Paging {
        let on = self.cr0 & CR0_PG != 0;
        let mode = match (on, self.efer & EFER_LMA != 0, self.cr4 & CR4_PAE != 0) {
            (false, ..) => Mode::Off,
            (true, true, _) if self.cr4 & CR4_LA57 != 0 => Mode::Levels5,
            (true, true, _) => Mode::Levels4,
            (true, false, true) => Mode::Pae,
            (true, false, false) => Mode::Bits32,
        };
        let long = matches!(mode, Mode::Levels4 | Mode::Levels5);
        Paging {
            mode,
            pse: self.cr4 & CR4_PSE != 0,
            // The SDM (4.1.1) has NXE apply wherever entries have 64 bits.
            nx: self.efer & EFER_NXE != 0 && (long || matches!(mode, Mode::Pae)),
            wp: self.cr0 & CR0_WP != 0,
            smep: on && self.cr4 & CR4_SMEP != 0,
            smap: on && self.cr4 & CR4_SMAP != 0,
            // Protection keys exist in 4- and 5-level paging only (SDM 4.6.2, APM 5.6.6).
            pke: long && self.cr4 & CR4_PKE != 0,
            global: on && self.cr4 & CR4_PGE != 0,
            pkru: self.pkru,
        }
    }

    /// The current PCID: zero unless CR4.PCIDE is set (SDM 4.10.1).
    pub const fn pcid(&self) -> u16 {
        if self.cr4 & CR4_PCIDE != 0 { self.cr3 as u16 & 0xfff } else { 0 }
    }
}

/// The paging modes (SDM 4.1.1, APM 5.1).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Mode {
    /// No paging: a linear address is a physical one.
    Off,
    /// 32-bit entries, two levels.
    Bits32,
    /// 64-bit entries; two levels below four page-directory-pointer entries.
    Pae,
    /// 64-bit entries, four levels.
    Levels4,
    /// 64-bit entries, five levels.
    Levels5,
}

/// What of the registers matters to translation: made by [`Registers::paging`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Paging {
    /// The mode.
    pub mode: Mode,
    /// 4 MiB pages, in 32-bit paging.
    pub pse: bool,
    /// Bit 63 forbids fetches; otherwise it is reserved.
    pub nx: bool,
    /// Supervisor writes respect R/W.
    pub wp: bool,
    /// No supervisor fetches from user pages.
    pub smep: bool,
    /// No supervisor data accesses to user pages.
    pub smap: bool,
    /// Protection keys of user pages apply.
    pub pke: bool,
    /// The G bit of leaves counts.
    pub global: bool,
    /// Their rights: two bits a key, access disable and write disable.
    pub pkru: u32,
}
