//! The maps that say which ports and which model-specific registers exit (AMD64 manual, volume 2, sections
//! 15.10 and 15.11).
//!
//! Invariant: what is not set here is the guest's own, straight to the machine.

use alloc::boxed::Box;
use core::ops::RangeInclusive;

/// A bit for each port, and a page more for accesses that run beyond the last.
#[repr(C, align(4096))]
pub(crate) struct PortMap([u8; 3 * 4096]);

impl PortMap {
    /// A map in which no port exits.
    pub(crate) fn open() -> Box<Self> {
        // SAFETY: bytes of zero are a value.
        unsafe { Box::new_zeroed().assume_init() }
    }

    /// Makes every access exit that touches one of `ports`.
    pub(crate) fn intercept(&mut self, ports: RangeInclusive<u16>) {
        for port in ports.map(usize::from) {
            self.0[port / 8] |= 1 << (port % 8);
        }
    }
}

/// Two bits, read and write, for each register of three ranges; the others exit always.
#[repr(C, align(4096))]
pub(crate) struct MsrMap([u8; 2 * 4096]);

impl MsrMap {
    /// A map in which no register of the three ranges exits.
    pub(crate) fn open() -> Box<Self> {
        // SAFETY: bytes of zero are a value.
        unsafe { Box::new_zeroed().assume_init() }
    }

    /// Makes reads and writes of `msrs` exit. Registers outside the three ranges exit anyway.
    pub(crate) fn intercept(&mut self, msrs: RangeInclusive<u32>) {
        for msr in msrs {
            let place = match msr {
                0..=0x1FFF => msr,
                0xC000_0000..=0xC000_1FFF => 0x2000 + (msr & 0x1FFF),
                0xC001_0000..=0xC001_1FFF => 0x4000 + (msr & 0x1FFF),
                _ => continue,
            } as usize;
            self.0[place / 4] |= 0b11 << (place % 4 * 2);
        }
    }
}
