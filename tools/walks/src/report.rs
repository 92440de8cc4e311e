//! The payload's report: a head, a record for each walk, a tail.
//!
//! Reads untrusted bytes: emulators write lines of their own before and after. Invariant: what is handed out was
//! there in full.

use crate::run::{Has, Mode, Run};
use std::fmt;
use vmmu_machine::Vendor;

const HEAD: &[u8; 16] = b"vmmu walks begin";
const TAIL: &[u8; 16] = b"vmmu walks ended";

/// The vector that stands for an access that succeeded.
pub(crate) const DONE: u8 = 0x40;
/// The number that stands for a nested page fault.
pub(crate) const NESTED: u8 = 0x80;

/// What is wrong with a report.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Broken {
    /// It never begins.
    NoHead,
    /// A mode that nobody draws walks for.
    UnknownMode(u32),
    /// A processor of neither vendor.
    UnknownVendor([u8; 12]),
    /// It ends within or after this walk, without its tail.
    Ends(u64),
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoHead => f.write_str("the payload never reported"),
            Self::UnknownMode(mode) => write!(f, "the report is of a mode {mode:#x}"),
            Self::UnknownVendor(name) => {
                write!(f, "the processor is by `{}`", String::from_utf8_lossy(name))
            }
            Self::Ends(walk) => write!(f, "the report breaks off at walk {walk}"),
        }
    }
}

impl std::error::Error for Broken {}

/// What the processor did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Record {
    /// [`crate::draw::Walk::checksum`] of what was walked.
    pub(crate) checksum: u16,
    /// [`DONE`], [`NESTED`], or an exception.
    pub(crate) vector: u8,
    /// Loading the registers faulted, not the access.
    pub(crate) at_load: bool,
    /// The error code; of a nested page fault EXITINFO1, with bits 33:32 as 15:14.
    pub(crate) code: u16,
    /// What the word that was reached says of itself.
    pub(crate) reached: u32,
    /// Accessed and dirty of each entry afterwards: two bits each, the first stage's from bit 0, the second's
    /// from bit 10.
    pub(crate) marks: u32,
    /// CR2 where it was not the access's address; of a nested page fault, EXITINFO2.
    pub(crate) address: Option<u64>,
    /// The entries afterwards, where more than accessed and dirty had changed.
    pub(crate) changed: Option<Vec<u64>>,
}

/// A report, read one record after another.
#[derive(Debug)]
pub(crate) struct Report<'a> {
    rest: &'a [u8],
    pub(crate) run: Run,
}

/// Takes numbers, least byte first, off the front.
struct Taker<'a, 'b>(&'b mut &'a [u8]);

impl Taker<'_, '_> {
    fn number(&mut self, bytes: usize) -> Option<u64> {
        let (taken, rest) = self.0.split_at_checked(bytes)?;
        *self.0 = rest;
        Some(taken.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }
    fn small(&mut self, bytes: usize) -> Option<u32> {
        self.number(bytes).map(|number| number as u32)
    }
}

impl<'a> Report<'a> {
    /// Finds the report in what the emulator wrote.
    pub(crate) fn find(bytes: &'a [u8]) -> Result<Self, Broken> {
        let start = bytes.windows(HEAD.len()).position(|window| window == HEAD).ok_or(Broken::NoHead)?;
        let mut rest = &bytes[start + HEAD.len()..];
        let run = Self::head(&mut Taker(&mut rest)).ok_or(Broken::NoHead)??;
        Ok(Self { rest, run })
    }

    fn head(take: &mut Taker<'_, '_>) -> Option<Result<Run, Broken>> {
        let (mode, has, phys_bits, regions) =
            (Mode(take.small(4)?), Has(take.small(4)?), take.small(4)?, take.small(4)?);
        let (seed, first, count) = (take.number(8)?, take.number(8)?, take.number(8)?);
        let mut name = [0; 12];
        for byte in &mut name {
            *byte = take.small(1)? as u8;
        }
        take.number(4)?;
        let stubs = [take.small(4)?, take.small(4)?];
        let mut stub_offsets = [0; 4];
        for offset in &mut stub_offsets {
            *offset = take.small(2)? as u16;
        }
        let vendor = match &name {
            b"AuthenticAMD" => Vendor::Amd,
            b"GenuineIntel" => Vendor::Intel,
            _ => return Some(Err(Broken::UnknownVendor(name))),
        };
        let plausible = matches!(regions, 12 | 20) && (32..=52).contains(&phys_bits);
        if !mode.is_known() || !plausible || mode.nested_levels() != 0 && phys_bits < 40 && count != 0 {
            return Some(Err(Broken::UnknownMode(mode.0)));
        }
        Some(Ok(Run { mode, has, phys_bits, regions, seed, first, count, vendor, stubs, stub_offsets }))
    }

    /// The next record, of a walk with this many entries.
    pub(crate) fn record(&mut self, walk: u64, entries: usize) -> Result<Record, Broken> {
        self.try_record(entries).ok_or(Broken::Ends(walk))
    }

    fn try_record(&mut self, entries: usize) -> Option<Record> {
        let mut take = Taker(&mut self.rest);
        let checksum = take.small(2)? as u16;
        let vector = take.small(1)? as u8;
        let flags = take.small(1)?;
        let code = take.small(2)? as u16;
        take.small(2)?;
        let (reached, marks) = (take.small(4)?, take.small(4)?);
        let address = if flags & 1 != 0 { Some(take.number(8)?) } else { None };
        let changed = if flags & 2 != 0 {
            Some((0..entries).map(|_| take.number(8)).collect::<Option<Vec<u64>>>()?)
        } else {
            None
        };
        let at_load = flags & 4 != 0;
        Some(Record { checksum, vector, at_load, code, reached, marks, address, changed })
    }

    /// Demands the tail.
    pub(crate) fn end(&self) -> Result<(), Broken> {
        if self.rest.starts_with(TAIL) { Ok(()) } else { Err(Broken::Ends(self.run.first + self.run.count)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A report of one walk: a nested page fault, as bytes.
    fn bytes() -> Vec<u8> {
        let mut bytes = b"an emulator's banner\n".to_vec();
        bytes.extend(HEAD);
        for word in [0x44u32, 0x3ff, 40, 20] {
            bytes.extend(word.to_le_bytes());
        }
        for word in [1u64, 7, 1] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(b"AuthenticAMD\0\0\0\0");
        for word in [0x10_1000u32, 0x10_2000] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend([0; 8]);
        bytes.extend([0x34, 0x12, NESTED, 1, 4, 0x40, 0, 0]);
        bytes.extend(5u32.to_le_bytes());
        bytes.extend(6u32.to_le_bytes());
        bytes.extend(0x80_0000_1000u64.to_le_bytes());
        bytes.extend(TAIL);
        bytes
    }

    #[test]
    fn a_report_is_found_and_read() {
        let mut bytes = bytes();
        bytes.extend(b"a last line\n");
        let mut report = Report::find(&bytes).expect("a report");
        assert_eq!((report.run.mode, report.run.first, report.run.count), (Mode(0x44), 7, 1));
        assert_eq!(report.run.stubs, [0x10_1000, 0x10_2000]);
        let record = report.record(7, 9).expect("a record");
        let wanted = Record {
            checksum: 0x1234,
            vector: NESTED,
            at_load: false,
            code: 0x4004,
            reached: 5,
            marks: 6,
            address: Some(0x80_0000_1000),
            changed: None,
        };
        assert_eq!(record, wanted);
        assert_eq!(report.end(), Ok(()));
    }

    #[test]
    fn whatever_breaks_off_is_broken() {
        let whole = bytes();
        for length in 0..whole.len() {
            let complete = Report::find(&whole[..length]).and_then(|mut report| {
                report.record(7, 9)?;
                report.end()
            });
            assert!(complete.is_err(), "{length} of {} bytes", whole.len());
        }
        let mut other = whole;
        let mode = other.windows(16).position(|window| window == HEAD).expect("a head") + 16;
        other[mode] = 0x66;
        assert_eq!(Report::find(&other).map(|report| report.run).unwrap_err(), Broken::UnknownMode(0x66));
    }
}
