//! What lies where in an address space of physical memory, as firmware reports it (the e820 map).
//!
//! Invariant of a [`MemoryMap`]: its entries are sorted, not empty, and do not overlap; neighbours of one
//! kind are one entry. Where a report contradicts itself, the kind that promises less wins: RAM loses to
//! everything.

use alloc::vec::Vec;
use core::ops::Range;

/// Bytes by their physical addresses: where tables of the loader and the firmware are read from.
pub trait Physical {
    /// The `len` bytes at `at`, or `None` where they cannot be reached.
    fn bytes(&self, at: u64, len: u64) -> Option<&[u8]>;
}

/// What a range of physical memory is for. The numbers are those of the e820 interface (ACPI specification,
/// section 15.1); in a report that overlaps itself the later variant wins.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// Memory for the operating system (1).
    Ram,
    /// Tables that may become memory once they were read (3).
    AcpiTables,
    /// Memory that firmware keeps across sleep (4).
    AcpiStorage,
    /// Not to be used (2, and every number not named here).
    Reserved,
    /// Memory with errors (5).
    Unusable,
}

impl Kind {
    /// The kind with the e820 number `number`.
    pub const fn from_number(number: u32) -> Self {
        match number {
            1 => Self::Ram,
            3 => Self::AcpiTables,
            4 => Self::AcpiStorage,
            5 => Self::Unusable,
            _ => Self::Reserved,
        }
    }

    /// The e820 number.
    pub const fn number(self) -> u32 {
        match self {
            Self::Ram => 1,
            Self::Reserved => 2,
            Self::AcpiTables => 3,
            Self::AcpiStorage => 4,
            Self::Unusable => 5,
        }
    }
}

/// A range of physical memory of one kind.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The addresses, in bytes.
    pub range: Range<u64>,
    /// What they are for.
    pub kind: Kind,
}

/// A whole report, in order.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MemoryMap {
    entries: Vec<Entry>,
}

impl MemoryMap {
    /// The map of a report in any order, overlaps included. Empty entries are dropped.
    pub fn new(report: impl IntoIterator<Item = Entry>) -> Self {
        let report: Vec<Entry> = report.into_iter().filter(|entry| !entry.range.is_empty()).collect();
        let mut edges: Vec<u64> =
            report.iter().flat_map(|entry| [entry.range.start, entry.range.end]).collect();
        edges.sort_unstable();
        edges.dedup();
        let mut entries: Vec<Entry> = Vec::new();
        for pair in edges.windows(2) {
            let (start, end) = (pair[0], pair[1]);
            let covering = report.iter().filter(|entry| entry.range.start <= start && end <= entry.range.end);
            let Some(kind) = covering.map(|entry| entry.kind).max() else { continue };
            match entries.last_mut() {
                Some(last) if last.range.end == start && last.kind == kind => last.range.end = end,
                _ => entries.push(Entry { range: start..end, kind }),
            }
        }
        Self { entries }
    }

    /// The entries in ascending order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The ranges of RAM in ascending order.
    pub fn ram(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.entries.iter().filter(|entry| entry.kind == Kind::Ram).map(|entry| entry.range.clone())
    }

    /// Whether any byte of `range` is RAM.
    pub fn touches_ram(&self, range: &Range<u64>) -> bool {
        self.ram().any(|ram| ram.start < range.end && range.start < ram.end)
    }

    /// The address after the last byte of RAM; 0 without any.
    pub fn ram_end(&self) -> u64 {
        self.ram().last().map_or(0, |range| range.end)
    }
}

/// The parts of `from` that lie outside all of `holes`, in ascending order.
pub fn subtract(from: Range<u64>, holes: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut parts = alloc::vec![from];
    for hole in holes.iter().filter(|hole| !hole.is_empty()) {
        parts = parts
            .into_iter()
            .flat_map(|part| {
                let before = part.start..part.end.min(hole.start);
                let after = part.start.max(hole.end)..part.end;
                [before, after]
            })
            .filter(|part| !part.is_empty())
            .collect();
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn entry(start: u64, end: u64, kind: Kind) -> Entry {
        Entry { range: start..end, kind }
    }

    #[test]
    fn numbers_are_those_of_e820() {
        for number in 1..=5 {
            assert_eq!(Kind::from_number(number).number(), number);
        }
        assert_eq!(Kind::from_number(12), Kind::Reserved);
    }

    #[test]
    fn a_report_is_sorted_joined_and_the_lesser_promise_wins() {
        let map = MemoryMap::new([
            entry(0x5000, 0x9000, Kind::Ram),
            entry(0x0000, 0x5000, Kind::Ram),
            entry(0x3000, 0x4000, Kind::Reserved),
            entry(0x3800, 0x4800, Kind::AcpiTables),
            entry(0x7000, 0x7000, Kind::Unusable),
        ]);
        assert_eq!(
            map.entries(),
            [
                entry(0, 0x3000, Kind::Ram),
                entry(0x3000, 0x4000, Kind::Reserved),
                entry(0x4000, 0x4800, Kind::AcpiTables),
                entry(0x4800, 0x9000, Kind::Ram),
            ]
        );
        assert!(map.touches_ram(&(0x3FFF..0x4801)));
        assert!(!map.touches_ram(&(0x3000..0x4800)));
        assert_eq!(map.ram_end(), 0x9000);
    }

    #[test]
    #[allow(clippy::single_range_in_vec_init)] // it is one range
    fn holes_are_cut_out_wherever_they_lie() {
        assert_eq!(subtract(10..20, &[]), vec![10..20]);
        assert_eq!(subtract(10..20, &[0..5, 25..30]), vec![10..20]);
        assert_eq!(subtract(10..20, &[0..12, 18..30]), vec![12..18]);
        assert_eq!(subtract(10..20, &[14..15, 12..13]), vec![10..12, 13..14, 15..20]);
        assert_eq!(subtract(10..20, &[5..25]), vec![]);
    }
}
