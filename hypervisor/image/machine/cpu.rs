//! Registers and instructions of the processor itself, each behind the smallest function that is honest about
//! it.

use core::arch::asm;
use core::arch::x86_64::{__cpuid_count, CpuidResult};

/// Extended features: long mode, no-execute, SVM.
pub(crate) const MSR_EFER: u32 = 0xC000_0080;

/// Reads a model-specific register.
///
/// # Safety
/// The processor must have `msr`, and reading it must have no effect.
pub(crate) unsafe fn read_msr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller answers for the register.
    unsafe {
        asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register.
///
/// # Safety
/// The processor must have `msr` and take `value`, and the host must go on to work with it.
#[allow(clippy::cast_possible_truncation)] // the two halves
pub(crate) unsafe fn write_msr(msr: u32, value: u64) {
    // SAFETY: the caller answers for register and value.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32,
             options(nostack, preserves_flags));
    }
}

/// CPUID with a leaf and a subleaf.
pub(crate) fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    __cpuid_count(leaf, subleaf)
}

/// The time-stamp counter.
#[inline(always)]
pub(crate) fn tsc() -> u64 {
    // SAFETY: RDTSC exists on every processor with long mode, and CR4.TSD binds only user mode.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// CR2: the address of the last page fault.
pub(crate) fn cr2() -> u64 {
    let value;
    // SAFETY: reading CR2 has no effect.
    unsafe { asm!("mov {}, cr2", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Loads CR3, which flushes the host's translations.
///
/// # Safety
/// The tables at `root` must map everything the host uses as it is mapped now.
pub(crate) unsafe fn set_cr3(root: u64) {
    // SAFETY: the caller answers for the tables.
    unsafe { asm!("mov cr3, {}", in(reg) root, options(nostack, preserves_flags)) };
}

/// CR4.
pub(crate) fn cr4() -> u64 {
    let value;
    // SAFETY: reading CR4 has no effect.
    unsafe { asm!("mov {}, cr4", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Loads CR4.
///
/// # Safety
/// The processor must have every bit that is set, and the paging bits must not change.
pub(crate) unsafe fn set_cr4(value: u64) {
    // SAFETY: the caller answers for the bits.
    unsafe { asm!("mov cr4, {}", in(reg) value, options(nostack, preserves_flags)) };
}

/// PKRU: the rights of user pages by protection key. The guest's own, since the host has no user pages.
///
/// # Safety
/// CR4.PKE must be set.
pub(crate) unsafe fn protection_keys() -> u32 {
    let value;
    // SAFETY: the caller answers for CR4.PKE.
    unsafe {
        asm!("rdpkru", in("ecx") 0, out("eax") value, out("edx") _, options(nomem, nostack, preserves_flags));
    };
    value
}

/// Writes XCR0.
///
/// # Safety
/// CR4.OSXSAVE must be set and the processor must take `value`. The host uses x87 and SSE state only, which
/// every legal value enables or leaves usable.
#[allow(clippy::cast_possible_truncation)] // the two halves
pub(crate) unsafe fn set_xcr0(value: u64) {
    // SAFETY: the caller answers for the value.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32,
             options(nostack, preserves_flags));
    }
}

/// Writes back and invalidates all caches.
pub(crate) fn write_back_caches() {
    // SAFETY: WBINVD loses nothing.
    unsafe { asm!("wbinvd", options(nostack, preserves_flags)) };
}

/// Stops this processor.
pub(crate) fn halt() -> ! {
    loop {
        // SAFETY: with interrupts off nothing follows.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}
