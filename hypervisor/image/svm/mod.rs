//! AMD's virtualisation (AMD64 manual, volume 2, chapter 15): control blocks, world switch, exits.
//!
//! What the processor offers beyond nested paging is asked, never assumed; the user's options can only take
//! away from it. Invariant: from [`enable`] on the host runs with GIF clear.

pub(crate) mod exits;
pub(crate) mod permissions;
pub(crate) mod processor;
pub(crate) mod run;
pub(crate) mod switch;
pub(crate) mod ticks;
pub(crate) mod vmcb;

use crate::machine::cpu;
use alloc::boxed::Box;
use core::fmt;
use hypervisor::options::Options;
use hypervisor::registers::efer;

/// Where the processor saves the host's state at VMRUN.
const MSR_HOST_SAVE: u32 = 0xC001_0117;
/// Whether firmware has switched SVM off (bit 4).
const MSR_VM_CR: u32 = 0xC001_0114;

/// What the processor offers and the user has not taken away.
#[derive(Clone, Copy)]
#[allow(clippy::struct_excessive_bools)] // each is a bit of CPUID
pub(crate) struct Capabilities {
    /// Address space identifiers, 0 included.
    pub(crate) asids: u32,
    /// #VMEXIT stores where the next instruction starts.
    pub(crate) next_rip: bool,
    /// #VMEXIT stores operands of moves and the instruction's bytes.
    pub(crate) decode_assists: bool,
    /// VMRUN can flush one identifier alone.
    pub(crate) flush_by_asid: bool,
    /// The processor has pages of 1 GiB.
    pub(crate) gigabyte_pages: bool,
    /// Bits of a physical address.
    pub(crate) physical_bits: u8,
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ASIDs", self.asids)?;
        for (used, name) in [
            (self.next_rip, "next RIP"),
            (self.decode_assists, "decode assists"),
            (self.flush_by_asid, "flush by ASID"),
        ] {
            write!(f, ", {}{name}", if used { "" } else { "no " })?;
        }
        Ok(())
    }
}

/// Why SVM cannot be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Unavailable {
    /// The processor does not have SVM.
    NoSvm,
    /// The processor's SVM has no nested paging.
    NoNestedPaging,
    /// Firmware has switched SVM off.
    SwitchedOff,
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoSvm => "the processor has no SVM",
            Self::NoNestedPaging => "the processor's SVM has no nested paging",
            Self::SwitchedOff => "firmware has switched SVM off",
        })
    }
}

impl core::error::Error for Unavailable {}

/// A page that only the processor looks into.
#[repr(C, align(4096))]
struct HostSave([u8; 4096]);

/// The address of the page in which the processor keeps the host's state while a guest runs. SVM is on.
pub(crate) fn host_save() -> u64 {
    // SAFETY: a processor on which SVM is on has the register.
    unsafe { cpu::read_msr(MSR_HOST_SAVE) }
}

/// Switches SVM on and interrupts of every kind off, and says what there is to use.
pub(crate) fn enable(options: &Options) -> Result<Capabilities, Unavailable> {
    if cpu::cpuid(0x8000_0000, 0).eax < 0x8000_000A || cpu::cpuid(0x8000_0001, 0).ecx >> 2 & 1 == 0 {
        return Err(Unavailable::NoSvm);
    }
    let svm = cpu::cpuid(0x8000_000A, 0);
    let has = |bit: u32| svm.edx >> bit & 1 != 0;
    if !has(0) {
        return Err(Unavailable::NoNestedPaging);
    }
    // SAFETY: a processor with SVM has these registers. The page for the host's state is given away for good.
    unsafe {
        if cpu::read_msr(MSR_VM_CR) >> 4 & 1 != 0 {
            return Err(Unavailable::SwitchedOff);
        }
        cpu::write_msr(cpu::MSR_EFER, cpu::read_msr(cpu::MSR_EFER) | efer::SVME);
        let page = Box::leak(Box::new(HostSave([0; 4096])));
        cpu::write_msr(MSR_HOST_SAVE, core::ptr::from_mut(page) as u64);
        switch::close();
    }
    Ok(Capabilities {
        asids: svm.ebx,
        next_rip: has(3) && options.next_rip,
        decode_assists: has(7) && options.decode_assists,
        flush_by_asid: has(6) && options.flush_by_asid,
        gigabyte_pages: cpu::cpuid(0x8000_0001, 0).edx >> 26 & 1 != 0,
        #[allow(clippy::cast_possible_truncation)] // masked
        physical_bits: (cpu::cpuid(0x8000_0008, 0).eax & 0xFF) as u8,
    })
}
