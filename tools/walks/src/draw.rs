//! Draws walks: registers, an access, and the tables on its way, by the rules of `guests/walks/README.md`.
//!
//! Pure. The payload draws the same in C (`guests/walks/draw.c`), line by line: each record has a checksum of
//! what it drew, so that a difference here is never taken for one between processors. The order of the
//! draws is part of the rules.

use crate::random::Random;
use crate::run::{Has, Run};

/// Present, writable, user, accessed; and the page-size and no-execute bits.
const P: u64 = 1 << 0;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const PS: u64 = 1 << 7;
const NX: u64 = 1 << 63;

/// What an access does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Read,
    Write,
    Fetch,
    /// The processor's own read, of a descriptor.
    Implicit,
}

/// One entry that a walk is to meet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Laid {
    /// Of which level.
    pub(crate) level: u8,
    /// Where in host memory.
    pub(crate) at: u64,
    pub(crate) value: u64,
}

/// One walk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Walk {
    pub(crate) index: u64,
    pub(crate) wp: bool,
    pub(crate) smep: bool,
    pub(crate) smap: bool,
    pub(crate) nxe: bool,
    pub(crate) pke: bool,
    pub(crate) pse: bool,
    pub(crate) host_nxe: bool,
    pub(crate) pkru: u32,
    pub(crate) kind: Kind,
    pub(crate) user: bool,
    pub(crate) ac: bool,
    pub(crate) gva: u64,
    /// For CR3.
    pub(crate) root: u64,
    /// Where the topmost table lies in host memory.
    pub(crate) root_at: u64,
    /// Where a walk without obstacle ends, in host memory.
    pub(crate) target: u64,
    /// The entries of the linear address's tables, from the top down.
    pub(crate) first: Vec<Laid>,
    /// Those of the nested tables: the upper levels from the top down, then the leaf, or one for each page of
    /// the guest that the walk needs: its tables from the top down, then the page.
    pub(crate) second: Vec<Laid>,
    pub(crate) nested_root: u64,
}

/// The regions' gigabytes, and the 2 MiB pages that they are in each.
const GIGABYTES: [u64; 5] = [0, 1, 2, 4, 5];
const IN_GIGABYTE: [u64; 4] = [16, 17, 300, 301];
/// Regions below 4 GiB.
const LOW: u32 = 12;

/// The first byte of a region, 2 MiB.
fn region_base(region: u32) -> u64 {
    GIGABYTES[region as usize >> 2] << 30 | IN_GIGABYTE[region as usize & 3] << 21
}

/// The number, within its region, of data page `k` of eight.
const fn data_page(k: u32) -> u64 {
    256 + 31 * k as u64
}

/// The number of a page for a table of kind `slot`, which no other kind has.
const fn table_page(random: &mut Random, slot: u8) -> u64 {
    2 + 20 * slot as u64 + random.below(20) as u64
}

fn table_in(random: &mut Random, regions: u32, slot: u8) -> u64 {
    let base = region_base(random.below(regions));
    base + (table_page(random, slot) << 12)
}

/// What the word of a data page at this host address says of itself; `None` elsewhere.
pub(crate) fn data_word(run: &Run, at: u64) -> Option<u32> {
    let of = |region: u32, k: u32| region_base(region) + (data_page(k) << 12) == at & !0xfff;
    let found = (0..run.regions).flat_map(|region| (0..8).map(move |k| (region, k)));
    let (region, k) = found.into_iter().find(|&(region, k)| of(region, k))?;
    Some(((at & 0xff8) as u32) << 8 | region << 3 | k)
}

/// How entries are drawn.
struct Format<'a> {
    run: &'a Run,
    /// 2: 32-bit; 3: PAE; 4: long.
    kind: u8,
    pse: bool,
    nxe: bool,
    /// Makes what is unusual rarer.
    calm: u32,
}

impl Format<'_> {
    /// An entry with a bit set, or in bit 63 changed, that a processor may take amiss.
    fn wild(&self, random: &mut Random, level: u8, leaf: bool, value: u64) -> u64 {
        const PDPTE_RESERVED: [u8; 6] = [1, 2, 5, 6, 7, 8];
        let phys = self.run.phys_bits;
        match random.below(4) {
            0 if self.kind >= 3 && phys < 52 => value ^ 1 << (phys + random.below(52 - phys)),
            1 if self.kind >= 3 => value ^ NX,
            0 | 1 => value,
            2 if self.kind == 3 && level == 3 => value | 1 << PDPTE_RESERVED[random.below(6) as usize],
            2 if leaf && level > 1 && self.kind > 2 => {
                value | 1 << (13 + random.below(if level == 2 { 8 } else { 17 }))
            }
            2 if leaf && level > 1 => {
                // Not into the address of a 4 MiB page.
                let bit = random.below(9);
                let wide = if self.run.has.any(Has::PSE36) { phys.min(40) - 32 } else { 0 };
                if bit >= wide { value | 1 << (13 + bit) } else { value }
            }
            2 if !leaf && self.kind >= 3 => value | PS,
            2 => value,
            _ if self.kind == 3 => value | 1 << (52 + random.below(11)),
            _ if self.kind == 4 => value | 1 << 8,
            _ => value,
        }
    }

    fn entry(&self, random: &mut Random, level: u8, leaf: bool, address: u64) -> u64 {
        let mut value = address;
        if leaf && level == 2 && self.kind == 2 {
            value = address & 0xffc0_0000 | address >> 32 << 13;
        }
        let unless_one_in = |random: &mut Random, n, bit| if random.one_in(n * self.calm) { 0 } else { bit };
        value |= unless_one_in(random, 16, P);
        if self.kind == 3 && level == 3 {
            value |= u64::from(random.below(4)) << 3;
            value |= u64::from(random.below(8)) << 9;
        } else {
            value |= unless_one_in(random, 8, W);
            value |= unless_one_in(random, 8, U);
            // PWT, PCD, A, D; then the bits for software.
            value |= u64::from(random.below(16)) << 3;
            value |= u64::from(random.below(8)) << 9;
            if self.kind >= 3 && self.nxe && random.one_in(8 * self.calm) {
                value |= NX;
            }
            if self.kind == 4 {
                value |= u64::from(random.below(1 << 11)) << 52;
            }
            if leaf {
                value |= u64::from(random.below(2)) << 8;
                let pat = u64::from(random.below(2));
                value |= if level == 1 { pat << 7 } else { PS | pat << 12 };
            } else if self.kind == 2 && !self.pse {
                value |= u64::from(random.below(2)) << 7;
            }
        }
        if random.one_in(16 * self.calm) { self.wild(random, level, leaf, value) } else { value }
    }
}

/// Which page of a region, and which region, holds the table of a level.
#[derive(Clone, Copy, Default)]
struct Place {
    region: u32,
    page: u64,
}

/// Walk `index` of a run.
pub(crate) fn draw(run: &Run, index: u64) -> Walk {
    let mut random = Random::of_walk(run.seed, run.mode.0, index);
    let random = &mut random;
    let (levels, host, has) = (run.mode.levels(), run.mode.nested_levels(), run.has);
    let nested = host != 0;

    // Registers.
    let wp = random.below(2) != 0;
    let smep = random.below(2) != 0 && has.any(Has::SMEP);
    let smap = random.below(2) != 0 && has.any(Has::SMAP);
    let nxe = !random.one_in(4) && has.any(Has::NX);
    let host_nxe = !random.one_in(4) && has.any(Has::NX);
    let pke = random.below(2) != 0 && has.any(Has::PKU) && levels >= 4;
    // Key 0 is the payload's own.
    let pkru = random.bits() & random.bits() & !3;
    let pse = !random.one_in(4) && has.any(Has::PSE);

    // The access.
    let kind = match random.below(8) {
        0..=2 => Kind::Read,
        3..=5 => Kind::Write,
        _ => Kind::Fetch,
    };
    let kind = if random.one_in(8) { Kind::Implicit } else { kind };
    let user = random.below(2) != 0;
    let ac = random.below(2) != 0;

    // The size of the page, and where all of it lies.
    let mut leaf = match random.below(6) {
        0..=2 => 1,
        5 if levels >= 4 => 3,
        _ => 2,
    };
    if levels == 2 && !pse {
        leaf = 1;
    }
    let (mut nested_leaf, mut window) = (1, 0);
    if nested {
        nested_leaf = match random.below(6) {
            0..=2 => 1,
            3 | 4 => 2,
            _ => 3,
        };
        if levels < 4 {
            window = u64::from(1 + random.below(3)) << 30;
        } else {
            window = u64::from(1 + random.below((1 << (run.phys_bits.min(48) - 39)) - 1)) << 39;
            window |= u64::from(random.below(512)) << 30;
        }
        let low = if nested_leaf == 3 {
            IN_GIGABYTE[random.below(4) as usize]
        } else {
            u64::from(random.below(512))
        };
        window |= low << 21;
    }
    let two_level_space = levels == 2 && (leaf == 1 || !has.any(Has::PSE36));
    let region = random.below(if two_level_space { LOW } else { run.regions });
    let k = random.below(8);

    let first_page = |region: u32| if nested { window } else { region_base(region) };

    // The linear address.
    let index_bits = if levels == 2 { 10 } else { 9 };
    let top_bits = if levels == 3 { 2 } else { index_bits };
    let mut gva = u64::from(random.below(512)) << 3;
    let mut indices = [0u64; 6];
    for level in (1..=levels).rev() {
        let drawn = if level == levels {
            1 + random.below((1 << top_bits) - 1)
        } else {
            random.below(1 << index_bits)
        };
        indices[level as usize] = match level {
            1 if leaf > 1 && levels == 2 => data_page(k) | (first_page(region) >> 21 & 1) << 9,
            1 if leaf > 1 => data_page(k),
            2 if leaf > 2 => first_page(region) >> 21 & 511,
            _ => drawn.into(),
        };
        gva |= indices[level as usize] << (12 + index_bits * u32::from(level - 1));
    }
    if levels >= 4 {
        let unused = if levels == 4 { 16 } else { 7 };
        gva = ((gva << unused).cast_signed() >> unused).cast_unsigned();
    }

    // Where each table of the first stage lies: the lower ones first, as entries name them; the root last.
    let mut places = [Place::default(); 6];
    for level in (leaf..levels).rev() {
        let region = random.below(if levels == 2 { LOW } else { run.regions });
        places[level as usize] = Place { region, page: table_page(random, level) };
    }
    let root_region = random.below(if levels <= 3 { LOW } else { run.regions });
    places[levels as usize] = Place { region: root_region, page: table_page(random, levels) };
    let place = |region: u32, page: u64| first_page(region) + (page << 12);
    let place_of = |level: u8| place(places[level as usize].region, places[level as usize].page);
    let mut root = place_of(levels);
    if levels == 3 {
        root |= u64::from(random.below(128)) << 5;
    } else if levels >= 4 {
        root |= u64::from(random.below(4)) << 3;
    }

    // The second stage: which host page is behind each page of the window.
    let mut host_at = [0u64; 6];
    for level in leaf..=levels {
        host_at[level as usize] = place_of(level);
    }
    let mut target = place(region, data_page(k)) | gva & 0xfff;
    let (mut second, mut nested_root) = (Vec::new(), 0);
    if nested {
        let format = Format { run, kind: 4, pse: false, nxe: host_nxe, calm: 4 };
        let mut address = region_base(random.below(run.regions));
        if nested_leaf == 3 {
            address &= !0x3fff_ffff;
        }
        let mut table = table_in(random, run.regions, 5 + host);
        nested_root = table;
        for level in (nested_leaf + 1..=host).rev() {
            let at = table + 8 * (window >> (12 + 9 * (level - 1)) & 511);
            table = table_in(random, run.regions, 5 + level - 1);
            second.push(Laid { level, at, value: format.entry(random, level, false, table) });
        }
        if nested_leaf > 1 {
            let at = table + 8 * (window >> (12 + 9 * (nested_leaf - 1)) & 511);
            let value = format.entry(random, nested_leaf, true, address);
            second.push(Laid { level: nested_leaf, at, value });
            if nested_leaf == 3 {
                address |= window & 0x3fe0_0000;
            }
            for level in leaf..=levels {
                host_at[level as usize] = address + (places[level as usize].page << 12);
            }
            target = address + (data_page(k) << 12) + (gva & 0xfff);
        } else {
            for level in (leaf..=levels).rev() {
                let page = places[level as usize].page;
                let frame = region_base(random.below(run.regions)) + (page << 12);
                host_at[level as usize] = frame;
                second.push(Laid {
                    level: 1,
                    at: table + 8 * page,
                    value: format.entry(random, 1, true, frame),
                });
            }
            let base = region_base(random.below(run.regions));
            let frame = base + (data_page(random.below(8)) << 12);
            second.push(Laid {
                level: 1,
                at: table + 8 * data_page(k),
                value: format.entry(random, 1, true, frame),
            });
            target = frame + (gva & 0xfff);
        }
    }

    // The first stage, from the top down.
    let format = Format { run, kind: levels.min(4), pse, nxe, calm: 1 };
    let root_at = host_at[levels as usize] | if levels == 3 { root & 0xfff } else { 0 };
    let mut first = Vec::with_capacity(5);
    for level in (leaf..=levels).rev() {
        let address = if level > leaf {
            place_of(level - 1)
        } else {
            let page = place(region, if leaf == 1 { data_page(k) } else { 0 });
            match (leaf, levels) {
                (2, 2) => page & !0x3f_ffff,
                (3, _) => page & !0x3fff_ffff,
                _ => page,
            }
        };
        let table = if level == levels { root_at } else { host_at[level as usize] };
        let at = table + if levels == 2 { 4 } else { 8 } * indices[level as usize];
        first.push(Laid { level, at, value: format.entry(random, level, level == leaf, address) });
    }
    if levels >= 4 && matches!(kind, Kind::Read | Kind::Write) && random.one_in(64) {
        gva ^= 1 << 63;
    }
    Walk {
        index,
        wp,
        smep,
        smap,
        nxe,
        pke,
        pse,
        host_nxe,
        pkru,
        kind,
        user,
        ac,
        gva,
        root,
        root_at,
        target,
        first,
        second,
        nested_root,
    }
}

impl Walk {
    /// A checksum of everything that was drawn.
    pub(crate) fn checksum(&self) -> u16 {
        let flags = [self.wp, self.smep, self.smap, self.nxe, self.pke, self.pse, self.host_nxe];
        let registers = flags.iter().rev().fold(0, |bits, &flag| bits << 1 | u64::from(flag));
        let access = (self.kind as u64) << 8 | u64::from(self.user) << 10 | u64::from(self.ac) << 11;
        let head = [registers | access, self.pkru.into(), self.gva, self.root, self.root_at, self.target];
        let entries = self.first.iter().chain(&self.second).flat_map(|laid| [laid.at, laid.value]);
        let sum = head.into_iter().chain(entries).fold(0u64, |sum, word| {
            let sum = (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            sum ^ sum >> 29
        });
        (sum >> 48) as u16
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::Mode;
    use vmmu_machine::Vendor;

    /// What QEMU's `max` offers.
    fn run(mode: u32, seed: u64) -> Run {
        Run {
            mode: Mode(mode),
            has: Has(if mode < 4 { 0xcf } else { 0x3ff }),
            phys_bits: 40,
            regions: 20,
            seed,
            first: 0,
            count: 1,
            vendor: Vendor::Amd,
            stubs: [0; 2],
            stub_offsets: [0; 4],
        }
    }

    #[test]
    fn the_payload_draws_the_same() {
        // As the payload reported them, on QEMU's `max`, for walks 100 and 101 of seed 7.
        for (mode, sums) in
            [(2, [0x28cf, 0xea86]), (3, [0xde21, 0x4f2d]), (4, [0xcd24, 0xa64b]), (0x54, [0xee7f, 0x957b])]
        {
            assert_eq!([100, 101].map(|index| draw(&run(mode, 7), index).checksum()), sums, "mode {mode:#x}");
        }
    }

    #[test]
    fn tables_and_pages_have_places_of_their_own() {
        for mode in [2, 3, 4, 5, 0x42, 0x43, 0x44, 0x54, 0x55] {
            let run = run(mode, 3);
            for index in 0..2000 {
                let walk = draw(&run, index);
                assert!(data_word(&run, walk.target).is_some(), "{walk:?}");
                let mut pages: Vec<u64> =
                    walk.first.iter().chain(&walk.second).map(|laid| laid.at & !0xfff).collect();
                // The leaves for one guest's pages lie in one table.
                pages.dedup();
                let count = pages.len();
                pages.sort_unstable();
                pages.dedup();
                assert_eq!(pages.len(), count, "{walk:?}");
                assert!(pages.iter().all(|&page| data_word(&run, page).is_none()), "{walk:?}");
            }
        }
    }
}
