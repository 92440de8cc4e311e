//! Port input and output. What a port does is the caller's business.

use core::arch::asm;

/// Reads a byte from `port`.
///
/// # Safety
/// Reading must have no effect on the machine that breaks memory safety.
pub(crate) unsafe fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: the caller answers for the port.
    unsafe { asm!("in al, dx", out("al") value, in("dx") port, options(nomem, nostack, preserves_flags)) };
    value
}

/// Reads two bytes from `port`.
///
/// # Safety
/// As for [`in8`].
pub(crate) unsafe fn in16(port: u16) -> u16 {
    let value;
    // SAFETY: the caller answers for the port.
    unsafe { asm!("in ax, dx", out("ax") value, in("dx") port, options(nomem, nostack, preserves_flags)) };
    value
}

/// Reads four bytes from `port`.
///
/// # Safety
/// As for [`in8`].
pub(crate) unsafe fn in32(port: u16) -> u32 {
    let value;
    // SAFETY: the caller answers for the port.
    unsafe { asm!("in eax, dx", out("eax") value, in("dx") port, options(nomem, nostack, preserves_flags)) };
    value
}

/// Writes a byte to `port`.
///
/// # Safety
/// Writing must not make a device break memory safety: no DMA into memory that Rust uses.
pub(crate) unsafe fn out8(port: u16, value: u8) {
    // SAFETY: the caller answers for the port and the value.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) };
}

/// Writes two bytes to `port`.
///
/// # Safety
/// As for [`out8`].
pub(crate) unsafe fn out16(port: u16, value: u16) {
    // SAFETY: the caller answers for the port and the value.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack, preserves_flags)) };
}

/// Writes four bytes to `port`.
///
/// # Safety
/// As for [`out8`].
pub(crate) unsafe fn out32(port: u16, value: u32) {
    // SAFETY: the caller answers for the port and the value.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) };
}
