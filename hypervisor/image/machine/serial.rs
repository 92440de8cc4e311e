//! The second serial port (COM2): the hypervisor's own channel. Polled, transmit only, never waits for ever. The
//! one thing that comes in is a byte in the port's scratch register.

use super::port::{in8, out8};
use core::fmt;

/// The first of the eight ports of COM2.
pub(crate) const BASE: u16 = 0x2F8;
/// Polls of the line status before a byte is given up: a port that is not there reads all ones or zeros.
const PATIENCE: u32 = 1_000_000;

/// 115200 baud, 8 data bits, no parity, one stop bit, FIFOs on, no interrupts.
pub(crate) fn initialise() {
    // 16550 registers: interrupt enable; line control with and without the divisor latch; FIFO; modem
    // control.
    for (register, value) in [(1, 0x00), (3, 0x80), (0, 0x01), (1, 0x00), (3, 0x03), (2, 0x07), (4, 0x03)] {
        // SAFETY: the UART does no DMA.
        unsafe { out8(BASE + register, value) };
    }
}

/// The register of the port that remembers a byte and does nothing with it.
const SCRATCH: u16 = BASE + 7;
/// What someone outside writes there to ask for the record of the run.
const WANTED: u8 = b'?';

/// Forgets what the scratch register held before, so that [`record_is_wanted`] tells of what comes from now on.
/// Returns the register's port.
pub(crate) fn listen() -> u16 {
    // SAFETY: the register does nothing.
    unsafe { out8(SCRATCH, 0) };
    SCRATCH
}

/// Whether someone outside has asked for the record, by a question mark in the port's scratch register. The guest
/// cannot: the port is not there for it.
pub(crate) fn record_is_wanted() -> bool {
    // SAFETY: reading the register has no effect.
    unsafe { in8(SCRATCH) == WANTED }
}

/// Sends one byte as it is, once the transmitter has room.
fn send(byte: u8) {
    for _ in 0..PATIENCE {
        // SAFETY: reading the line status clears error bits that nobody else looks at.
        if unsafe { in8(BASE + 5) } & 0x20 != 0 {
            break;
        }
    }
    // SAFETY: the UART does no DMA.
    unsafe { out8(BASE, byte) };
}

/// The channel as a formatter's target. A line feed is sent as it is: the other end is a program.
pub(crate) struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(send);
        Ok(())
    }
}
