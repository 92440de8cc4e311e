//! The machine below everything: what is the same whatever virtualisation extension the processor has.
//!
//! Boot code, descriptors, host page tables, heap, serial line, timer, port and register access. Nothing here knows
//! of guests. Invariant: from [`descriptors::load`] on, every exception of the host ends the run with a named
//! error.

pub(crate) mod cpu;
pub(crate) mod descriptors;
pub(crate) mod device;
pub(crate) mod heap;
pub(crate) mod hpet;
pub(crate) mod paging;
pub(crate) mod physical;
pub(crate) mod port;
pub(crate) mod serial;
pub(crate) mod spin;

use core::arch::global_asm;

global_asm!(include_str!("boot.s"), options(att_syntax, raw));
global_asm!(include_str!("memory.s"), options(att_syntax, raw));

/// The personality routine that the precompiled `core` names in its unwind tables; with `panic=abort` nothing
/// ever calls it.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// Where a landing pad of the precompiled `core` would go on; with `panic=abort` nothing ever calls it.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    crate::report::fatal(format_args!("unwinding in an image that never unwinds"))
}

/// The bytes of the image in memory, from its first to the page after its last, host-physical.
pub(crate) fn image() -> core::ops::Range<u64> {
    section(&raw const image_start)..section(&raw const image_end)
}

unsafe extern "C" {
    static image_start: u8;
    static text_end: u8;
    static rodata_end: u8;
    static image_end: u8;
    static boot_stack_guard: u8;
}

/// The address of a symbol of the link script. The host maps memory at its physical address.
fn section(symbol: *const u8) -> u64 {
    symbol as u64
}
