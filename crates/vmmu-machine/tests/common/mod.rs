//! Tables built by hand, for all tests of the crate.
//!
//! Knows raw bits only, none of the crate's decoding: what a test writes is what its manual's figure says.

#![allow(dead_code, reason = "each test file uses its part")]

use vmmu_machine::{Access, AccessKind, Gpa, Gva, Hpa, Memory, Outcome, Processor, Translation};

/// Present, writable, user.
pub(crate) const P: u64 = 1;
pub(crate) const W: u64 = 2;
pub(crate) const U: u64 = 4;
pub(crate) const A: u64 = 1 << 5;
pub(crate) const D: u64 = 1 << 6;
pub(crate) const PS: u64 = 1 << 7;
pub(crate) const G: u64 = 1 << 8;
pub(crate) const NX: u64 = 1 << 63;
/// EPT: read, write, execute; write-back.
pub(crate) const R: u64 = 1;
pub(crate) const X: u64 = 4;
pub(crate) const RWX: u64 = 7;
pub(crate) const WB: u64 = 6 << 3;

pub(crate) const READ: Access = Access::supervisor(AccessKind::Read);
pub(crate) const WRITE: Access = Access::supervisor(AccessKind::Write);
pub(crate) const FETCH: Access = Access::supervisor(AccessKind::Fetch);
pub(crate) const USER_READ: Access = Access::user(AccessKind::Read);
pub(crate) const USER_WRITE: Access = Access::user(AccessKind::Write);

/// Hands out table pages and writes entries of 8 bytes, 9 bits a level.
pub(crate) struct Builder {
    next: u64,
}

impl Builder {
    /// Tables from this host address on.
    pub(crate) const fn new(from: u64) -> Self {
        Self { next: from }
    }

    /// A page for a table.
    pub(crate) const fn page(&mut self) -> u64 {
        let page = self.next;
        self.next += 0x1000;
        page
    }

    /// Writes the entry `leaf` at `level` for `va`, and tables down to it with `upper` in their entries
    /// where there are none. `base` is added to a table's address to get its place in memory: 0 but for
    /// guest tables. Returns the places of the entries, the topmost first.
    pub(crate) fn map(
        &mut self,
        memory: &Memory,
        (root, levels, base): (u64, u32, u64),
        va: u64,
        level: u32,
        (upper, leaf): (u64, u64),
    ) -> Vec<Hpa> {
        let mut places = Vec::new();
        let mut table = root;
        for at_level in (level..=levels).rev() {
            let index = va >> (12 + 9 * (at_level - 1)) & 0x1ff;
            let place = Hpa::new(base + table + index * 8);
            places.push(place);
            if at_level == level {
                memory.write64(place, leaf);
            } else {
                if memory.read64(place) == 0 {
                    let page = self.page();
                    memory.write64(place, page | upper);
                }
                table = memory.read64(place) & 0x000f_ffff_ffff_f000;
            }
        }
        places
    }
}

/// The only outcome of an access.
pub(crate) fn only(processor: &Processor, memory: &Memory, gva: u64, access: Access) -> Outcome {
    let outcomes = processor.access(memory, Gva::new(gva), access);
    outcomes.only().unwrap_or_else(|| panic!("several: {:?}", outcomes.iter().collect::<Vec<_>>()))
}

/// The only outcome, a translation.
pub(crate) fn translated(processor: &Processor, memory: &Memory, gva: u64, access: Access) -> Translation {
    let outcome = only(processor, memory, gva, access);
    *outcome.translation().unwrap_or_else(|| panic!("{outcome}"))
}

/// The host addresses that an access may reach, sorted.
pub(crate) fn reaches(processor: &Processor, memory: &Memory, gva: u64, access: Access) -> Vec<u64> {
    let outcomes = processor.access(memory, Gva::new(gva), access);
    let mut all: Vec<u64> = outcomes.iter().filter_map(Outcome::translation).map(|t| t.hpa.raw()).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// The page-fault codes that an access may end with, sorted.
pub(crate) fn fault_codes(processor: &Processor, memory: &Memory, gva: u64, access: Access) -> Vec<u32> {
    let outcomes = processor.access(memory, Gva::new(gva), access);
    let mut all: Vec<u32> = outcomes
        .iter()
        .filter_map(|outcome| match outcome {
            Outcome::PageFault(fault) => Some(fault.code),
            _ => None,
        })
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

pub(crate) const fn gva(raw: u64) -> Gva {
    Gva::new(raw)
}

pub(crate) const fn gpa(raw: u64) -> Gpa {
    Gpa::new(raw)
}
