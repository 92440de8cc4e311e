//! The few words of ACPI that a hypervisor must know: where its guest would put the machine to sleep or reset
//! it, how many processors there are, and where a timer is.
//!
//! The tables stay the guest's; this only reads them (ACPI specification, sections 5.2.5 to
//! 5.2.12). A table with a
//! wrong checksum is passed over.

use crate::bytes::{u8_at, u16_at, u32_at, u64_at};
use crate::memory_map::Physical;
use core::ops::Range;

/// Where firmware puts the root pointer on a PC.
const SEARCHED: Range<u64> = 0xE_0000..0x10_0000;
/// Bytes of the event timer's registers, and how they are aligned.
const HPET_REGISTERS: u64 = 1024;
/// Tables longer than this are not read.
const LONGEST: u32 = 1 << 20;

/// What was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Acpi {
    /// Where the root pointer lies, host-physical.
    pub rsdp: Option<u64>,
    /// The ports of the first and the second PM1 control registers.
    pub pm1_control: [Option<u16>; 2],
    /// The reset port and the value that resets.
    pub reset: Option<(u16, u8)>,
    /// Processors that are there and enabled; 0 where the tables do not say.
    pub processors: u32,
    /// The registers of the high precision event timer (HPET), host-physical.
    pub hpet: Option<u64>,
}

/// The `len` bytes at `at` if they add up to zero.
fn sound(memory: &impl Physical, at: u64, len: u64) -> Option<&[u8]> {
    let bytes = memory.bytes(at, len)?;
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    (sum == 0).then_some(bytes)
}

/// The description table at `at`, whole.
fn table(memory: &impl Physical, at: u64) -> Option<&[u8]> {
    let len = u32_at(memory.bytes(at, 36)?, 4)?;
    if !(36..=LONGEST).contains(&len) {
        return None;
    }
    sound(memory, at, u64::from(len))
}

impl Acpi {
    /// Looks for the root pointer and, behind it, the tables that say the rest.
    pub fn find(memory: &impl Physical) -> Self {
        let Some(rsdp) = SEARCHED.step_by(16).find(|&at| {
            memory.bytes(at, 8).is_some_and(|bytes| bytes == b"RSD PTR ") && sound(memory, at, 20).is_some()
        }) else {
            return Self::default();
        };
        let mut found = Self { rsdp: Some(rsdp), ..Self::default() };
        if let Some(fixed) = Self::table_named(memory, rsdp, *b"FACP") {
            found.read_fixed(fixed);
        }
        if let Some(interrupts) = Self::table_named(memory, rsdp, *b"APIC") {
            found.processors = count_processors(interrupts);
        }
        if let Some(timer) = Self::table_named(memory, rsdp, *b"HPET") {
            // A generic address, of which 0 says that it is memory's (HPET specification 1.0a, section 3.2.4).
            let address = (u8_at(timer, 40) == Some(0)).then(|| u64_at(timer, 44)).flatten();
            found.hpet = address.filter(|&at| at != 0 && at.is_multiple_of(HPET_REGISTERS));
        }
        found
    }

    /// The first sound table with this signature behind the root pointer at `rsdp`.
    fn table_named(memory: &impl Physical, rsdp: u64, name: [u8; 4]) -> Option<&[u8]> {
        let pointer = memory.bytes(rsdp, 36)?;
        let (root, width) = match (u8_at(pointer, 15)?, u64_at(pointer, 24)?) {
            (2.., root) if root != 0 => (root, 8),
            _ => (u64::from(u32_at(pointer, 16)?), 4),
        };
        let entries = table(memory, root)?.get(36..)?;
        entries.chunks_exact(width).find_map(|entry| {
            let at = if width == 8 { u64_at(entry, 0)? } else { u64::from(u32_at(entry, 0)?) };
            table(memory, at).filter(|table| table.starts_with(&name))
        })
    }

    /// Reads the fixed description table.
    fn read_fixed(&mut self, fixed: &[u8]) {
        // The extended field, if it is there and names a port; else the older one.
        let port = |extended: usize, old: usize| {
            let generic = (u8_at(fixed, extended) == Some(1)).then(|| u64_at(fixed, extended + 4)).flatten();
            let value = generic.filter(|&port| port != 0).or(u32_at(fixed, old).map(u64::from))?;
            u16::try_from(value).ok().filter(|&port| port != 0)
        };
        self.pm1_control = [port(172, 64), port(184, 68)];
        let resets =
            u32_at(fixed, 112).is_some_and(|flags| flags >> 10 & 1 != 0) && u8_at(fixed, 116) == Some(1);
        if resets {
            self.reset = u16_at(fixed, 120).zip(u8_at(fixed, 128)).filter(|reset| reset.0 != 0);
        }
    }
}

/// Processors that the interrupt controllers' table (MADT) calls enabled.
fn count_processors(table: &[u8]) -> u32 {
    let mut left = table.get(44..).unwrap_or_default();
    let mut count = 0;
    while let Some(length) = u8_at(left, 1).map(usize::from).filter(|&length| length >= 2) {
        let flags = match u8_at(left, 0) {
            Some(0) => u32_at(left, 4), // local APIC
            Some(9) => u32_at(left, 8), // local x2APIC
            _ => None,
        };
        count += flags.unwrap_or(0) & 1;
        left = left.get(length..).unwrap_or_default();
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::put;
    use alloc::vec;
    use alloc::vec::Vec;

    struct Firmware(Vec<u8>);
    impl Physical for Firmware {
        fn bytes(&self, at: u64, len: u64) -> Option<&[u8]> {
            let start = usize::try_from(at.checked_sub(0xE_0000)?).ok()?;
            self.0.get(start..start + usize::try_from(len).ok()?)
        }
    }

    fn seal(bytes: &mut [u8], checksum: usize) {
        bytes[checksum] = 0;
        let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        bytes[checksum] = 0u8.wrapping_sub(sum);
    }

    fn firmware(revision: u8) -> Firmware {
        let mut bytes = vec![0; 0x2_0000];
        put(&mut bytes, 0x1_0040, b"RSD PTR ");
        bytes[0x1_004F] = revision;
        put(&mut bytes, 0x1_0050, &0xE_1000u32.to_le_bytes());
        put(&mut bytes, 0x1_0058, &0xE_3000u64.to_le_bytes());
        seal(&mut bytes[0x1_0040..0x1_0054], 8);
        let mut root = |at: usize, name: &[u8], width: usize| {
            put(&mut bytes, at, name);
            put(&mut bytes, at + 4, &u32::try_from(36 + 3 * width).unwrap().to_le_bytes());
            put(&mut bytes, at + 36, &0xE_2800u32.to_le_bytes());
            put(&mut bytes, at + 36 + width, &0xE_2000u32.to_le_bytes());
            put(&mut bytes, at + 36 + 2 * width, &0xE_2C00u32.to_le_bytes());
            seal(&mut bytes[at..at + 36 + 3 * width], 9);
        };
        root(0x1000, b"RSDT", 4);
        root(0x3000, b"XSDT", 8);
        for (at, name) in [(0x2800, b"APIC"), (0x2000, b"FACP")] {
            put(&mut bytes, at, name);
            put(&mut bytes, at + 4, &244u32.to_le_bytes());
            put(&mut bytes, at + 64, &0x604u32.to_le_bytes());
            put(&mut bytes, at + 112, &(1u32 << 10).to_le_bytes());
            put(&mut bytes, at + 116, &[1, 8, 0, 1]);
            put(&mut bytes, at + 120, &0xCF9u64.to_le_bytes());
            bytes[at + 128] = 0x0F;
            if name == b"APIC" {
                // Two enabled processors, one that is not, an I/O controller, and nothing more.
                put(&mut bytes, at + 44, &[0, 8, 0, 0, 1, 0, 0, 0, 0, 8, 1, 1, 0, 0, 0, 0, 1, 12]);
                put(&mut bytes, at + 72, &[9, 16, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0]);
            }
            seal(&mut bytes[at..at + 244], 9);
        }
        put(&mut bytes, 0x2C00, b"HPET");
        put(&mut bytes, 0x2C04, &56u32.to_le_bytes());
        put(&mut bytes, 0x2C2C, &0xFED0_0000u64.to_le_bytes());
        seal(&mut bytes[0x2C00..0x2C38], 9);
        Firmware(bytes)
    }

    const WHOLE: Acpi = Acpi {
        rsdp: Some(0xF_0040),
        pm1_control: [Some(0x604), None],
        reset: Some((0xCF9, 0x0F)),
        processors: 2,
        hpet: Some(0xFED0_0000),
    };

    #[test]
    fn both_root_tables_lead_to_the_ports() {
        assert_eq!(Acpi::find(&firmware(0)), WHOLE);
        assert_eq!(Acpi::find(&firmware(2)), WHOLE);
    }

    #[test]
    fn the_extended_field_wins() {
        let mut firmware = firmware(2);
        put(&mut firmware.0, 0x2000 + 172, &[1, 16, 0, 2]);
        put(&mut firmware.0, 0x2000 + 176, &0xB004u64.to_le_bytes());
        seal(&mut firmware.0[0x2000..0x2000 + 244], 9);
        assert_eq!(Acpi::find(&firmware).pm1_control, [Some(0xB004), None]);
    }

    #[test]
    fn a_timer_that_is_not_memory_is_none() {
        let mut firmware = firmware(2);
        put(&mut firmware.0, 0x2C28, &[1]);
        seal(&mut firmware.0[0x2C00..0x2C38], 9);
        assert_eq!(Acpi::find(&firmware), Acpi { hpet: None, ..WHOLE });
    }

    #[test]
    fn unsound_tables_are_passed_over() {
        let mut damaged = firmware(0);
        damaged.0[0x2064] ^= 1;
        let rest = Acpi { pm1_control: [None; 2], reset: None, ..WHOLE };
        assert_eq!(Acpi::find(&damaged), rest);
        let mut damaged = firmware(0);
        damaged.0[0x1_0049] ^= 1;
        assert_eq!(Acpi::find(&damaged), Acpi::default());
        assert_eq!(Acpi::find(&Firmware(vec![0; 0x2_0000])), Acpi::default());
    }
}
