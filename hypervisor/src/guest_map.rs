//! From the machine's memory map to the guest's.
//!
//! The guest has RAM only at addresses where the machine has RAM, so no device of the machine is ever hidden
//! by it. Firmware's ranges are the machine's, shown as they are: the guest finds the same tables at the same
//! addresses. A device that the hypervisor keeps for itself is not there: its page reads as zeros. Which frames stand
//! behind the guest's RAM is decided elsewhere ([`crate::layout`]).

use crate::memory_map::{Entry, Kind, MemoryMap, subtract};
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const FOUR_GIB: u64 = 1 << 32;
/// Video memory begins here on every PC, whatever the map says.
const LEGACY_HOLE: u64 = 0xA_0000;
/// From here to 1 MiB lie the images of option ROMs and firmware.
const FIRMWARE: u64 = 0xC_0000;
/// The page of the I/O interrupt controller, and that of each processor's own.
const INTERRUPT_PAGES: [u64; 2] = [0xFEC0_0000, 0xFEE0_0000];
/// Less than this runs nothing: no place for a loader's tables and a kernel above 1 MiB.
const SMALLEST: u64 = 2 * MIB;

/// A range of the machine that the guest sees where it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Identity {
    /// Guest-physical and host-physical alike, whole pages.
    pub range: Range<u64>,
    /// Whether the guest may write to it.
    pub writable: bool,
}

/// The guest's physical address space.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GuestMap {
    /// RAM in ascending order, whole pages, guest-physical.
    pub ram: Vec<Range<u64>>,
    /// Firmware and interrupt controllers in ascending order, disjoint from each other and from RAM.
    pub identity: Vec<Identity>,
    /// The page of a device that the guest does not have, although its tables may name it.
    pub absent: Option<Range<u64>>,
    /// What the guest is told (its e820 map).
    pub map: MemoryMap,
}

/// Why there is no map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum GuestMapError {
    /// The guest would have too little memory to run anything; the value is what was asked for, in bytes.
    TooSmall(u64),
    /// The machine has too little memory where the guest would have it.
    Machine {
        /// What was asked for, in bytes.
        wanted: u64,
        /// The most that can be asked for, in bytes.
        most: u64,
    },
}

impl fmt::Display for GuestMapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::TooSmall(bytes) => write!(f, "{bytes} bytes of memory are too few for any guest"),
            Self::Machine { wanted, most } => {
                write!(f, "the guest wants {wanted} bytes of memory, the machine's map has room for {most}")
            }
        }
    }
}

impl core::error::Error for GuestMapError {}

fn page_down(at: u64) -> u64 {
    at & !(PAGE - 1)
}

fn page_up(at: u64) -> u64 {
    page_down(at.saturating_add(PAGE - 1))
}

/// Where the machine's RAM that holds the address `at` ends, whole pages; `at` itself where that is no RAM.
fn ram_end_from(machine: &MemoryMap, at: u64) -> u64 {
    machine.ram().find(|range| range.contains(&at)).map_or(at, |range| page_down(range.end).max(at))
}

impl GuestMap {
    /// A guest with RAM from 0 to `memory` (bytes, rounded down to pages), less the hole below 1 MiB. What
    /// would lie at or above the machine's first hole below 4 GiB continues at 4 GiB. `kept` is the address of
    /// a device that the hypervisor keeps: the guest does not get its page, if it is none of its RAM.
    pub fn plan(machine: &MemoryMap, memory: u64, kept: Option<u64>) -> Result<Self, GuestMapError> {
        let memory = page_down(memory);
        if memory < SMALLEST {
            return Err(GuestMapError::TooSmall(memory));
        }
        let low_end = ram_end_from(machine, 0).min(LEGACY_HOLE);
        let hole = ram_end_from(machine, MIB).min(FOUR_GIB);
        let high = ram_end_from(machine, FOUR_GIB) - FOUR_GIB;
        let beyond = memory.saturating_sub(hole);
        if hole == MIB || beyond > high {
            let most = if hole == MIB { 0 } else { hole.saturating_add(high) };
            return Err(GuestMapError::Machine { wanted: memory, most });
        }
        let ram: Vec<Range<u64>> = [0..low_end, MIB..memory.min(hole), FOUR_GIB..FOUR_GIB + beyond]
            .into_iter()
            .filter(|range| !range.is_empty())
            .collect();

        let firmware = machine.entries().iter().filter(|entry| entry.kind != Kind::Ram);
        let told = ram
            .iter()
            .map(|range| Entry { range: range.clone(), kind: Kind::Ram })
            .chain(firmware.clone().cloned())
            .chain([Entry { range: low_end..LEGACY_HOLE, kind: Kind::Reserved }]);
        let map = MemoryMap::new(told);

        // Below 1 MiB the layout is every PC's; above, firmware's ranges are rounded outwards to pages.
        let mut pages: Vec<Range<u64>> = firmware
            .filter(|entry| entry.range.start >= MIB && entry.range.end <= FOUR_GIB)
            .map(|entry| page_down(entry.range.start)..page_up(entry.range.end))
            .chain(INTERRUPT_PAGES.map(|page| page..page + PAGE))
            .collect();
        pages.sort_unstable_by_key(|range| range.start);
        let mut identity = Vec::new();
        if low_end < LEGACY_HOLE {
            identity.push(Identity { range: low_end..LEGACY_HOLE, writable: true });
        }
        identity.push(Identity { range: FIRMWARE..MIB, writable: false });
        for range in pages {
            match identity.last_mut() {
                Some(last) if last.writable && range.start <= last.range.end => {
                    last.range.end = last.range.end.max(range.end);
                }
                _ => identity.push(Identity { range, writable: true }),
            }
        }
        let absent = kept
            .map(|at| page_down(at)..page_down(at).saturating_add(PAGE))
            .filter(|page| !ram.iter().any(|ram| ram.start < page.end && page.start < ram.end));
        let identity = identity
            .into_iter()
            .flat_map(|Identity { range, writable }| {
                subtract(range, absent.as_slice()).into_iter().map(move |range| Identity { range, writable })
            })
            .collect();
        Ok(Self { ram, identity, absent, map })
    }

    /// The end of the RAM that holds `at` (guest-physical); `None` where that is no RAM.
    pub fn ram_end(&self, at: u64) -> Option<u64> {
        self.ram.iter().find(|range| range.contains(&at)).map(|range| range.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(ram: &[Range<u64>], reserved: &[Range<u64>]) -> MemoryMap {
        MemoryMap::new(
            ram.iter()
                .map(|range| Entry { range: range.clone(), kind: Kind::Ram })
                .chain(reserved.iter().map(|range| Entry { range: range.clone(), kind: Kind::Reserved })),
        )
    }

    /// What an emulated PC with 4 GiB reports, in small variations.
    fn pc() -> MemoryMap {
        machine(
            &[0..0x9_FC00, MIB..0xBFFE_0000, FOUR_GIB..0x1_4000_0000],
            &[0x9_FC00..0xA_0000, 0xF_0000..MIB, 0xBFFE_0800..0xC000_0000, 0xFFFC_0000..FOUR_GIB],
        )
    }

    #[test]
    fn a_small_guest_ends_where_it_was_asked_to() {
        let guest = GuestMap::plan(&pc(), 1 << 30, None).unwrap();
        assert_eq!(guest.ram, [0..0x9_F000, MIB..1 << 30]);
        let identity: Vec<_> = guest.identity.iter().map(|i| (i.range.clone(), i.writable)).collect();
        assert_eq!(
            identity,
            [
                (0x9_F000..0xA_0000, true),
                (FIRMWARE..MIB, false),
                (0xBFFE_0000..0xC000_0000, true),
                (0xFEC0_0000..0xFEC0_1000, true),
                (0xFEE0_0000..0xFEE0_1000, true),
                (0xFFFC_0000..FOUR_GIB, true),
            ]
        );
        assert_eq!(guest.map.ram().collect::<Vec<_>>(), guest.ram);
        assert_eq!(guest.ram_end(0x20_0000), Some(1 << 30));
        assert_eq!(guest.ram_end(0xB_0000), None);
    }

    /// Firmware may call the registers reserved, on a page of their own or in the middle of a range.
    #[test]
    fn a_device_that_is_kept_is_cut_out() {
        let machine =
            machine(&[0..0x9_FC00, MIB..1 << 30], &[0xFED0_0000..0xFED0_0400, 0xFEFF_C000..FOUR_GIB]);
        let cut = |kept| {
            let guest = GuestMap::plan(&machine, 1 << 29, kept).unwrap();
            let ranges: Vec<_> = guest.identity.into_iter().map(|identity| identity.range).collect();
            (guest.absent, ranges)
        };
        let (absent, ranges) = cut(Some(0xFED0_0000));
        assert_eq!(absent, Some(0xFED0_0000..0xFED0_1000));
        assert!(!ranges.contains(&(0xFED0_0000..0xFED0_1000)));
        let (absent, ranges) = cut(Some(0xFEFF_E010));
        assert_eq!(absent, Some(0xFEFF_E000..0xFEFF_F000));
        assert!(ranges.ends_with(&[0xFEFF_C000..0xFEFF_E000, 0xFEFF_F000..FOUR_GIB]));
        assert_eq!(cut(Some(0x20_0000)).0, None, "RAM stays RAM");
        assert!(cut(None).1.contains(&(0xFED0_0000..0xFED0_1000)));
    }

    #[test]
    fn the_rest_continues_above_4_gib() {
        let guest = GuestMap::plan(&pc(), 0xC000_0000, None).unwrap();
        assert_eq!(guest.ram, [0..0x9_F000, MIB..0xBFFE_0000, FOUR_GIB..FOUR_GIB + 0x2_0000]);
        let most = 0xBFFE_0000 + 0x4000_0000;
        assert!(GuestMap::plan(&pc(), most, None).is_ok());
        assert_eq!(
            GuestMap::plan(&pc(), most + PAGE, None),
            Err(GuestMapError::Machine { wanted: most + PAGE, most })
        );
    }

    #[test]
    fn ram_and_identity_never_meet() {
        for memory in [SMALLEST, 16 * MIB, 0xBFFD_F000, 0xBFFE_1000, 0xC000_0000] {
            let guest = GuestMap::plan(&pc(), memory, None).unwrap();
            let mut all: Vec<_> =
                guest.identity.iter().map(|i| i.range.clone()).chain(guest.ram.clone()).collect();
            all.sort_unstable_by_key(|range| range.start);
            assert!(all.windows(2).all(|pair| pair[0].end <= pair[1].start), "{memory:#x}: {all:x?}");
            assert!(all.iter().all(|range| range.start % PAGE == 0 && range.end % PAGE == 0));
        }
    }

    #[test]
    #[allow(clippy::single_range_in_vec_init)] // it is one range
    fn too_little_is_named() {
        assert_eq!(GuestMap::plan(&pc(), MIB, None), Err(GuestMapError::TooSmall(MIB)));
        let none = machine(&[0..0x9_FC00], &[]);
        assert_eq!(
            GuestMap::plan(&none, 1 << 30, None),
            Err(GuestMapError::Machine { wanted: 1 << 30, most: 0 })
        );
    }
}
