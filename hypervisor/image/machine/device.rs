//! Loads and stores that devices see: exactly one access of exactly the width asked for, aligned or not.

use core::arch::asm;

/// Reads `bytes` (1, 2, 4 or 8) at the host-physical address `at`.
///
/// # Safety
/// `at` must be mapped and be a device's, or nothing at all; reading must have no effect that breaks memory
/// safety.
pub(crate) unsafe fn load(at: u64, bytes: u8) -> u64 {
    let value: u64;
    // SAFETY: the caller answers for the address. Narrow loads clear the rest of the register.
    unsafe {
        match bytes {
            1 => {
                asm!("movzx {0:e}, byte ptr [{1}]", out(reg) value, in(reg) at, options(nostack, preserves_flags));
            }
            2 => {
                asm!("movzx {0:e}, word ptr [{1}]", out(reg) value, in(reg) at, options(nostack, preserves_flags));
            }
            4 => asm!("mov {0:e}, [{1}]", out(reg) value, in(reg) at, options(nostack, preserves_flags)),
            _ => asm!("mov {0}, [{1}]", out(reg) value, in(reg) at, options(nostack, preserves_flags)),
        }
    }
    value
}

/// Writes the low `bytes` (1, 2, 4 or 8) of `value` at the host-physical address `at`.
///
/// # Safety
/// As for [`load`]; what the device does with the value is the caller's to answer for.
pub(crate) unsafe fn store(at: u64, bytes: u8, value: u64) {
    // SAFETY: the caller answers for the address and the value.
    unsafe {
        match bytes {
            1 => {
                asm!("mov [{0}], {1:l}", in(reg) at, in(reg_abcd) value, options(nostack, preserves_flags));
            }
            2 => {
                asm!("mov [{0}], {1:x}", in(reg) at, in(reg) value, options(nostack, preserves_flags));
            }
            4 => {
                asm!("mov [{0}], {1:e}", in(reg) at, in(reg) value, options(nostack, preserves_flags));
            }
            _ => {
                asm!("mov [{0}], {1}", in(reg) at, in(reg) value, options(nostack, preserves_flags));
            }
        }
    }
}
