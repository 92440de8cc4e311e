//! The ports that exit, and what becomes of their accesses.
//!
//! The guest owns the machine's ports but for these: the hypervisor's serial line, which is not there for it;
//! the payload's ports 0xE9 (text), 0xF4 (end) and 0xF5 (services); and those by which it would reset the
//! machine or switch it off, which end the run. Everything else that exits with them goes on to the machine.

use super::End;
use crate::machine::{port, serial};
use crate::report;
use alloc::vec::Vec;
use core::ops::RangeInclusive;
use hypervisor::acpi::Acpi;

const TEXT: u16 = 0xE9;
const END: u16 = 0xF4;
const SERVICE: u16 = 0xF5;
/// The keyboard controller's command port; 0xFE pulls the processor's reset line.
const KEYBOARD: u16 = 0x64;
/// System control port A; bit 0 resets.
const SYSTEM_CONTROL: u16 = 0x92;
/// The chipset's reset control; bit 2 resets. Only as a byte: wider accesses at 0xCF8 are PCI's.
const RESET_CONTROL: u16 = 0xCF9;
/// Longest line of the guest's text that is kept together.
const LINE: usize = 512;

/// What is left for the caller to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Output {
    /// Nothing.
    Done,
    /// The payload asks for this service.
    Service(u32),
}

/// The state behind the ports.
pub(crate) struct Ports {
    acpi: Acpi,
    line: Vec<u8>,
    /// What reading the service port gives: 0 where the last request was served.
    pub(crate) status: u32,
}

impl Ports {
    /// Ports of a machine whose ACPI tables say this.
    pub(crate) fn new(acpi: Acpi) -> Self {
        Self { acpi, line: Vec::new(), status: 1 }
    }

    /// Every port that must exit.
    pub(crate) fn intercepted(&self) -> impl Iterator<Item = RangeInclusive<u16>> {
        let fixed = [
            TEXT..=TEXT,
            END..=SERVICE,
            KEYBOARD..=KEYBOARD,
            SYSTEM_CONTROL..=SYSTEM_CONTROL,
            RESET_CONTROL..=RESET_CONTROL,
            serial::BASE..=serial::BASE + 7,
        ];
        let sleep = self.acpi.pm1_control.into_iter().flatten().map(|port| port..=port.saturating_add(1));
        let reset = self.acpi.reset.into_iter().map(|(port, _)| port..=port);
        fixed.into_iter().chain(sleep).chain(reset)
    }

    /// The guest writes the low `width` bytes (1, 2 or 4) of `value` to `first` and the ports after it.
    pub(crate) fn output(&mut self, first: u16, width: u8, value: u32) -> Result<Output, End> {
        match first {
            SERVICE => return Ok(Output::Service(value)),
            END => return Err(End::Value(value)),
            TEXT => {
                self.text(value.to_le_bytes()[0]);
                return Ok(Output::Done);
            }
            _ => {}
        }
        let lanes = lanes(first, width, value);
        for (port, byte) in lanes.clone() {
            self.check(port, byte, width)?;
        }
        if lanes.clone().any(|(port, _)| is_hidden(port)) {
            lanes.filter(|(port, _)| !is_hidden(*port)).for_each(|(port, byte)| write(port, 1, byte.into()));
        } else {
            write(first, width, value);
        }
        Ok(Output::Done)
    }

    /// The guest reads `width` bytes (1, 2 or 4) from `first` and the ports after it.
    pub(crate) fn input(&self, first: u16, width: u8) -> u32 {
        if first == SERVICE {
            return self.status;
        }
        let lanes = lanes(first, width, 0);
        if lanes.clone().any(|(port, _)| is_hidden(port)) {
            let byte = |port| if is_hidden(port) { 0xFF } else { read(port, 1) };
            lanes.enumerate().fold(0, |value, (lane, (port, _))| value | byte(port) << (8 * lane))
        } else {
            read(first, width)
        }
    }

    /// Whether a byte for `port`, part of a write of `width` bytes, ends the run.
    fn check(&self, port: u16, byte: u8, width: u8) -> Result<(), End> {
        match port {
            KEYBOARD if byte == 0xFE => return Err(End::Reset("keyboard controller, port 0x64")),
            SYSTEM_CONTROL if byte & 1 != 0 => return Err(End::Reset("system control, port 0x92")),
            RESET_CONTROL if width == 1 && byte & 4 != 0 => {
                return Err(End::Reset("reset control, port 0xCF9"));
            }
            _ => {}
        }
        if width == 1 && self.acpi.reset == Some((port, byte)) {
            return Err(End::Reset("ACPI reset register"));
        }
        // SLP_EN is bit 13 of a control register, SLP_TYP bits 12:10.
        let control =
            self.acpi.pm1_control.into_iter().flatten().any(|control| port == control.wrapping_add(1));
        if control && byte & 0x20 != 0 {
            return Err(End::Shutdown(byte >> 2 & 7));
        }
        Ok(())
    }

    /// Collects the payload's text and passes it on line by line.
    fn text(&mut self, byte: u8) {
        if byte != b'\n' {
            self.line.push(byte);
        }
        if byte == b'\n' || self.line.len() == LINE {
            self.flush();
        }
    }

    /// Passes on what is left of the payload's text.
    pub(crate) fn flush(&mut self) {
        if !self.line.is_empty() {
            report::guest_text(&self.line);
            self.line.clear();
        }
    }
}

/// Whether nothing is there for the guest unless it names the port itself.
fn is_hidden(port: u16) -> bool {
    matches!(port, TEXT | END | SERVICE) || (serial::BASE..serial::BASE + 8).contains(&port)
}

/// Each port of an access with its byte of `value`. Ports beyond the last wrap around, as on the bus.
fn lanes(first: u16, width: u8, value: u32) -> impl Iterator<Item = (u16, u8)> + Clone {
    (0..u16::from(width)).zip(value.to_le_bytes()).map(move |(lane, byte)| (first.wrapping_add(lane), byte))
}

#[allow(clippy::cast_possible_truncation)] // the low bytes are what is written
fn write(first: u16, width: u8, value: u32) {
    // SAFETY: the guest owns the machine's devices. A device's DMA goes where the guest's driver says; a
    // guest that is not trusted needs an IOMMU or a wall of ports, which is not this function's to build.
    unsafe {
        match width {
            1 => port::out8(first, value as u8),
            2 => port::out16(first, value as u16),
            _ => port::out32(first, value),
        }
    }
}

fn read(first: u16, width: u8) -> u32 {
    // SAFETY: as for `write`.
    unsafe {
        match width {
            1 => port::in8(first).into(),
            2 => port::in16(first).into(),
            _ => port::in32(first),
        }
    }
}
