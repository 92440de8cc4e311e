//! Writes of control registers by the world that the processor is in, and what they flush.
//!
//! | write | flushes, at least | section |
//! |---|---|---|
//! | CR3, PCIDs off | PCID 0 but globals | SDM 4.10.4.1, APM 5.5.3 |
//! | CR3, PCIDs on, bit 63 clear | the new PCID but globals | likewise |
//! | CR3, PCIDs on, bit 63 set | nothing | likewise |
//! | CR0.PG cleared | everything of the space | likewise |
//! | CR0.PG set | Intel nothing, AMD everything of the space | likewise |
//! | CR4.PGE changed, CR4.PCIDE cleared | everything of the space | likewise |
//! | CR4.PAE changed | AMD everything of the space; Intel the current PCID but globals | likewise |
//! | CR4.PSE changed | AMD everything of the space | APM 5.5.3 |
//! | CR4.SMEP set | Intel the current PCID but globals | SDM 4.10.4.1 |
//! | EFER, PKRU | nothing | – |
//!
//! "The space" is the current VPID or ASID; on Intel the combined mappings of all EPT roots go with it (SDM
//! "Operations that Invalidate Cached Mappings"). Guest-physical mappings stay.

use super::Processor;
use crate::access::AccessKind;
use crate::addr::{Gpa, Hpa};
use crate::features::Vendor;
use crate::format::PdpteError;
use crate::memory::Memory;
use crate::outcome::Outcome;
use crate::outcomes::NotChosen;
use crate::regime::Regime;
use crate::registers::{
    CR0_PG, CR3_KEEP, CR4_PAE, CR4_PCIDE, CR4_PGE, CR4_PSE, CR4_SMEP, Mode, Registers, UnsupportedRegisters,
};
use std::fmt;

/// Why a write of a control register did not happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ControlFault {
    /// Registers that the model does not run.
    Registers(UnsupportedRegisters),
    /// #GP: PAE's page-directory-pointer entries have reserved bits set.
    Pdptes(PdpteError),
    /// They could not be read: an exit to the hypervisor.
    Exit(Outcome),
    /// #GP: CR4.PCIDE cannot be set while CR3's bits 11:0 are not zero (SDM 4.10.1).
    PcidInCr3(u64),
}

impl fmt::Display for ControlFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registers(why) => why.fmt(f),
            Self::Pdptes(why) => why.fmt(f),
            Self::Exit(outcome) => write!(f, "loading the page-directory-pointer entries: {outcome}"),
            Self::PcidInCr3(cr3) => write!(f, "CR4.PCIDE is set while CR3 is {cr3:#x}"),
        }
    }
}

impl std::error::Error for ControlFault {}

impl From<UnsupportedRegisters> for ControlFault {
    fn from(why: UnsupportedRegisters) -> Self {
        Self::Registers(why)
    }
}

impl Processor {
    /// Installs registers in the world that the processor is in.
    fn install(&mut self, registers: Registers) {
        self.changes += 1;
        match &mut self.guest {
            Some(guest) => *guest.registers_mut() = registers,
            None => self.host = registers,
        }
        let regime = &self.regime;
        self.regime = Regime::new(registers, regime.second, regime.space, &self.features, self.quirks);
    }

    /// Everything of the current space, globals included.
    pub(super) fn flush_space(&mut self) {
        let space = self.regime.space;
        self.caches.clear(|tag| tag.space() == Some(space));
    }

    /// One PCID of the current space, but for globals.
    pub(super) fn flush_pcid(&mut self, wanted: u16) {
        let mine = self.regime.space;
        self.caches.clear(|tag| tag.is_of(mine, wanted));
    }

    /// MOV to CR3, [`CR3_KEEP`] included. In PAE paging it loads the page-directory-pointer entries from
    /// memory (SDM 4.4.1), unless nested paging leaves them there (APM 15.25.10); `seed` chooses among what
    /// that load may find.
    pub fn mov_cr3(&mut self, memory: &Memory, value: u64, seed: u64) -> Result<(), ControlFault> {
        let mut registers = *self.registers();
        registers.cr3 = value & !CR3_KEEP;
        self.load_pdptes(memory, &mut registers, seed)?;
        let keep = registers.cr4 & CR4_PCIDE != 0 && value & CR3_KEEP != 0;
        self.install(registers);
        if !keep {
            self.flush_pcid(registers.pcid());
        }
        Ok(())
    }

    fn load_pdptes(
        &mut self,
        memory: &Memory,
        registers: &mut Registers,
        seed: u64,
    ) -> Result<(), ControlFault> {
        if registers.paging().mode != Mode::Pae || self.regime.pdptes_in_memory() {
            return Ok(());
        }
        let wanted = Regime::new(*registers, None, 0, &self.features, self.quirks);
        let Some(format) = wanted.first else { return Ok(()) };
        let gpa = Gpa::new(format.root(registers.cr3));
        let at = self.physical_read(memory, gpa, seed).map_err(ControlFault::Exit)?;
        let pdptes = [0, 8, 16, 24].map(|offset| memory.read64(at.plus(offset)));
        format.check_pdptes(&pdptes).map_err(ControlFault::Pdptes)?;
        registers.pdptes = pdptes;
        Ok(())
    }

    fn physical_read(&mut self, memory: &Memory, gpa: Gpa, seed: u64) -> Result<Hpa, Outcome> {
        loop {
            match self.access_physical(memory, gpa, AccessKind::Read).choose(self, memory, seed) {
                Ok(Outcome::Translated(translation)) => return Ok(translation.hpa),
                Ok(outcome) => return Err(outcome),
                Err(NotChosen::MemoryChanged(_)) => {}
                Err(error @ (NotChosen::ProcessorChanged | NotChosen::NotInSet)) => {
                    unreachable!("a search that was just made has its own outcomes: {error}")
                }
            }
        }
    }

    /// MOV to CR0.
    pub fn mov_cr0(&mut self, memory: &Memory, value: u64, seed: u64) -> Result<(), ControlFault> {
        let old = *self.registers();
        let mut new = Registers { cr0: value, ..old };
        new.check(&self.features)?;
        let turned_on = old.cr0 & CR0_PG == 0 && value & CR0_PG != 0;
        let turned_off = old.cr0 & CR0_PG != 0 && value & CR0_PG == 0;
        if turned_on {
            self.load_pdptes(memory, &mut new, seed)?;
        }
        self.install(new);
        if turned_off || turned_on && self.features.vendor == Vendor::Amd {
            self.flush_space();
        }
        Ok(())
    }

    /// MOV to CR4.
    pub fn mov_cr4(&mut self, memory: &Memory, value: u64, seed: u64) -> Result<(), ControlFault> {
        let old = *self.registers();
        let mut new = Registers { cr4: value, ..old };
        new.check(&self.features)?;
        let changed = old.cr4 ^ value;
        let set = |bit| changed & value & bit != 0;
        let cleared = |bit| changed & old.cr4 & bit != 0;
        if set(CR4_PCIDE) && old.cr3 & 0xfff != 0 {
            return Err(ControlFault::PcidInCr3(old.cr3));
        }
        // SDM 4.4.1: a MOV to CR4 that changes PAE, PGE, PSE or SMEP loads the PDPTEs too.
        if changed & (CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP) != 0 {
            self.load_pdptes(memory, &mut new, seed)?;
        }
        let (everything, this_pcid) = match self.features.vendor {
            Vendor::Amd => (changed & (CR4_PAE | CR4_PGE | CR4_PSE) != 0, false),
            Vendor::Intel => (changed & CR4_PGE != 0, changed & CR4_PAE != 0 || set(CR4_SMEP)),
        };
        let pcid = old.pcid();
        self.install(new);
        if everything || cleared(CR4_PCIDE) {
            self.flush_space();
        } else if this_pcid {
            self.flush_pcid(pcid);
        }
        Ok(())
    }

    /// WRMSR to EFER. Flushes nothing: who changes NXE flushes by other means.
    pub fn write_efer(&mut self, value: u64) -> Result<(), ControlFault> {
        let new = Registers { efer: value, ..*self.registers() };
        new.check(&self.features)?;
        self.install(new);
        Ok(())
    }

    /// WRPKRU. Flushes nothing: keys are in the TLB, their rights are not (SDM 4.6.2).
    pub fn write_pkru(&mut self, value: u32) {
        self.install(Registers { pkru: value, ..*self.registers() });
    }
}
