//! Two stages: nested paging and extended page tables, with the codes that their faults report.

mod common;
use common::*;
use vmmu_machine::registers::CR4_PAE;
use vmmu_machine::{
    Access, AccessKind, EptContext, EptViolation, Features, Gpa, Hpa, Memory, NestedPageFault, NestedTables,
    NptContext, Outcome, PageSize, Processor, Quirks, Registers, TlbControl,
};

/// Guest-physical memory starts here in host memory, so that the two never agree.
const BASE: u64 = 0x1_0000_0000;
/// Where the guest's own tables begin, guest-physical.
const GUEST_TABLES: u64 = 0x20_0000;
const GVA: u64 = 0x7000_0000;
const GPA: u64 = 0x5000;

/// A guest with one page mapped at [`GVA`], and the second stage for its tables and that page.
struct World {
    memory: Memory,
    processor: Processor,
    /// The guest's entries for [`GVA`], in host memory.
    guest: Vec<Hpa>,
    /// The second stage's entries for [`GPA`].
    second: Vec<Hpa>,
    second_root: u64,
    builder: Builder,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Npt,
    Ept { accessed_dirty: bool },
}

impl World {
    fn new(kind: Kind) -> Self {
        let memory = Memory::new();
        let mut builder = Builder::new(0x10_0000);
        let second_root = builder.page();
        let mut guest_tables = Builder::new(GUEST_TABLES);
        let root = guest_tables.page();
        let guest = guest_tables.map(&memory, (root, 4, BASE), GVA, 1, (P | W | U, GPA | P | W | U));
        let (upper, leaf) = match kind {
            Kind::Npt => (P | W | U, P | W | U),
            Kind::Ept { .. } => (RWX, RWX | WB),
        };
        let place = (second_root, 4, 0);
        for page in 0..8 {
            let gpa = GUEST_TABLES + page * 0x1000;
            builder.map(&memory, place, gpa, 1, (upper, (BASE + gpa) | leaf));
        }
        let second = builder.map(&memory, place, GPA, 1, (upper, (BASE + GPA) | leaf));
        let registers = Registers::long_mode(root);
        let features = match kind {
            Kind::Npt => Features::amd(46),
            Kind::Ept { .. } => Features::intel(46),
        };
        let mut processor = Processor::new(features, Quirks::NONE);
        match kind {
            Kind::Npt => processor.enter(npt(registers, second_root)),
            Kind::Ept { accessed_dirty } => processor.enter(EptContext {
                registers,
                vpid: Some(1),
                eptp: Some(second_root | 0x1e | u64::from(accessed_dirty) << 6),
            }),
        }
        .expect("a valid guest");
        Self { memory, processor, guest, second, second_root, builder }
    }

    fn leaf(&self) -> Hpa {
        self.second[3]
    }

    fn edit(&self, at: Hpa, clear: u64, set: u64) {
        self.memory.write64(at, self.memory.read64(at) & !clear | set);
    }

    fn touch(&mut self, access: Access) -> Outcome {
        self.processor.touch(&self.memory, gva(GVA | 0x123), access, 7)
    }

    fn npf(&self, access: Access) -> (u64, u64) {
        match only(&self.processor, &self.memory, GVA | 0x123, access) {
            Outcome::NestedPageFault(fault) => (fault.info1, fault.gpa.raw()),
            other => panic!("{other}"),
        }
    }

    fn violation(&self, access: Access) -> (u64, u64) {
        match only(&self.processor, &self.memory, GVA | 0x123, access) {
            Outcome::EptViolation(EptViolation { qualification, gpa, gva: linear }) => {
                assert_eq!(linear, Some(gva(GVA | 0x123)));
                (qualification, gpa.raw())
            }
            other => panic!("{other}"),
        }
    }

    /// The second stage's leaf for one of the guest's table pages.
    fn leaf_of_table(&mut self, gpa: u64) -> Hpa {
        let mut table = self.second_root;
        for level in [4, 3, 2] {
            table = self.memory.read64(Hpa::new(table + (gpa >> (12 + 9 * (level - 1)) & 511) * 8)) & !0xfff;
        }
        Hpa::new(table + (gpa >> 12 & 511) * 8)
    }
}

fn npt(registers: Registers, root: u64) -> NptContext {
    let nested = NestedTables { root: Hpa::new(root), five_levels: false, nx: true };
    NptContext { registers, asid: 1, tlb_control: TlbControl::Nothing, nested: Some(nested) }
}

#[test]
fn both_stages_translate() {
    for kind in [Kind::Npt, Kind::Ept { accessed_dirty: false }, Kind::Ept { accessed_dirty: true }] {
        let world = World::new(kind);
        let t = translated(&world.processor, &world.memory, GVA | 0x123, USER_WRITE);
        assert_eq!(
            (t.hpa.raw(), t.gpa, t.size),
            (BASE + GPA + 0x123, Some(gpa(GPA + 0x123)), PageSize::Size4K)
        );
    }
}

#[test]
fn npt_sets_its_flags_and_dirty_for_the_guests_tables() {
    let mut world = World::new(Kind::Npt);
    world.touch(READ);
    assert_eq!(world.memory.read64(world.leaf()) & (A | D), A);
    for table in 0..4 {
        let leaf = world.leaf_of_table(GUEST_TABLES + table * 0x1000);
        assert_eq!(world.memory.read64(leaf) & (A | D), A | D, "table walks are writes (APM 15.25.5)");
    }
    world.touch(WRITE);
    assert_eq!(world.memory.read64(world.leaf()) & (A | D), A | D);
    assert_eq!(world.memory.read64(world.guest[3]) & (A | D), A | D);
    assert_eq!(world.memory.read64(world.second[0]) & A, A);
}

#[test]
fn ept_sets_flags_only_where_they_are_on() {
    let (accessed, dirty) = (1 << 8, 1 << 9);
    let mut off = World::new(Kind::Ept { accessed_dirty: false });
    off.touch(WRITE);
    assert_eq!(off.memory.read64(off.leaf()) & (accessed | dirty), 0);
    let mut on = World::new(Kind::Ept { accessed_dirty: true });
    on.touch(READ);
    assert_eq!(on.memory.read64(on.leaf()) & (accessed | dirty), accessed);
    let table = on.leaf_of_table(GUEST_TABLES);
    assert_eq!(on.memory.read64(table) & (accessed | dirty), accessed | dirty);
    on.touch(WRITE);
    assert_eq!(on.memory.read64(on.leaf()) & (accessed | dirty), accessed | dirty);
    assert_eq!(on.memory.read64(on.second[0]) & accessed, accessed);
}

#[test]
fn nested_page_faults_report_exitinfo() {
    let final_bit = NestedPageFault::FINAL;
    let table_bit = NestedPageFault::TABLE;
    let world = World::new(Kind::Npt);
    world.edit(world.leaf(), P, 0);
    assert_eq!(world.npf(READ), (final_bit | 4, GPA + 0x123));
    assert_eq!(world.npf(WRITE), (final_bit | 6, GPA + 0x123));
    assert_eq!(world.npf(FETCH), (final_bit | 0x14, GPA + 0x123));
    world.edit(world.leaf(), W, P | NX);
    assert_eq!(world.npf(WRITE), (final_bit | 7, GPA + 0x123));
    assert_eq!(world.npf(FETCH), (final_bit | 0x15, GPA + 0x123));
    // Guest accesses are user accesses at the nested level, whatever the guest's own privilege.
    world.edit(world.leaf(), U, 0);
    assert_eq!(world.npf(READ), (final_bit | 5, GPA + 0x123));
    world.edit(world.leaf(), 0, 1 << 51);
    assert_eq!(world.npf(READ), (final_bit | 0xd, GPA + 0x123));

    // A guest table in a read-only nested page: the walk itself is a write.
    let mut world = World::new(Kind::Npt);
    let leaf = world.leaf_of_table(GUEST_TABLES + 0x2000);
    world.edit(leaf, W, 0);
    let entry = GUEST_TABLES + 0x2000 + (GVA >> 21 & 511) * 8;
    assert_eq!(world.npf(READ), (table_bit | 7, entry));
    world.edit(leaf, P, 0);
    assert_eq!(world.npf(FETCH), (table_bit | 6, entry));
}

#[test]
fn the_guests_own_fault_comes_before_the_nested_one() {
    let world = World::new(Kind::Npt);
    world.edit(world.leaf(), P, 0);
    world.edit(world.guest[3], W, 0);
    assert_eq!(fault_codes(&world.processor, &world.memory, GVA, WRITE), [3]);
    let world = World::new(Kind::Ept { accessed_dirty: true });
    world.edit(world.leaf(), RWX, 0);
    world.edit(world.guest[2], P, 0);
    assert_eq!(fault_codes(&world.processor, &world.memory, GVA, READ), [0]);
}

#[test]
fn ept_violations_report_their_qualification() {
    let world = World::new(Kind::Ept { accessed_dirty: false });
    let page = GPA + 0x123;
    world.edit(world.leaf(), RWX, 0);
    assert_eq!(world.violation(READ), (0x181, page));
    assert_eq!(world.violation(WRITE), (0x182, page));
    assert_eq!(world.violation(FETCH), (0x184, page));
    world.edit(world.leaf(), 0, R);
    assert_eq!(world.violation(WRITE), (0x18a, page));
    assert_eq!(world.violation(FETCH), (0x18c, page));
    // Execute-only.
    world.edit(world.leaf(), R, X);
    assert_eq!(world.violation(READ), (0x1a1, page));
    assert_eq!(world.violation(WRITE), (0x1a2, page));
    assert!(only(&world.processor, &world.memory, GVA, FETCH).translation().is_some());
    // Rights are ANDed over the levels.
    world.edit(world.leaf(), 0, RWX);
    world.edit(world.second[2], W, 0);
    assert_eq!(world.violation(WRITE), (0x1aa, page));
}

#[test]
fn ept_violations_on_guest_tables() {
    let entry = GUEST_TABLES + 0x3000 + (GVA >> 12 & 511) * 8;
    let mut off = World::new(Kind::Ept { accessed_dirty: false });
    let leaf = off.leaf_of_table(GUEST_TABLES + 0x3000);
    off.edit(leaf, RWX, 0);
    assert_eq!(off.violation(WRITE), (0x81, entry));
    let mut on = World::new(Kind::Ept { accessed_dirty: true });
    let leaf = on.leaf_of_table(GUEST_TABLES + 0x3000);
    on.edit(leaf, RWX, 0);
    assert_eq!(on.violation(READ), (0x83, entry));
    on.edit(leaf, 0, R | X);
    assert_eq!(on.violation(READ), (0xab, entry));
    // Without EPT flags a read-only table is walked, but its own flags cannot be set: bit 1, and bit 0 may
    // be.
    let leaf = off.leaf_of_table(GUEST_TABLES + 0x3000);
    off.edit(leaf, 0, R | X);
    let outcomes = off.processor.access(&off.memory, gva(GVA), READ);
    let mut seen: Vec<u64> = outcomes
        .iter()
        .map(|outcome| match outcome {
            Outcome::EptViolation(exit) => exit.qualification,
            other => panic!("{other}"),
        })
        .collect();
    seen.sort_unstable();
    assert_eq!(seen, [0xaa, 0xab]);
    // Flags that are set already need no write; a write that must set dirty does.
    off.edit(off.guest[3], 0, A);
    assert!(only(&off.processor, &off.memory, GVA, READ).translation().is_some());
    assert_eq!(off.processor.access(&off.memory, gva(GVA), WRITE).iter().count(), 2);
    off.edit(off.guest[3], 0, D);
    assert!(only(&off.processor, &off.memory, GVA, WRITE).translation().is_some());
}

#[test]
fn ept_misconfigurations_have_precedence_over_rights_but_not_over_absence() {
    let world = World::new(Kind::Ept { accessed_dirty: false });
    world.edit(world.second[2], W, 0);
    world.edit(world.leaf(), 0x38, 2 << 3);
    let outcome = only(&world.processor, &world.memory, GVA | 0x123, WRITE);
    assert_eq!(outcome, Outcome::EptMisconfiguration(Gpa::new(GPA + 0x123)));
    world.edit(world.second[2], RWX, 0);
    assert_eq!(world.violation(WRITE).0, 0x182);
    world.edit(world.second[2], 0, W);
    assert!(matches!(only(&world.processor, &world.memory, GVA, READ), Outcome::EptMisconfiguration(_)));
}

#[test]
fn the_size_of_a_combined_translation_is_the_smaller() {
    let mut world = World::new(Kind::Npt);
    let place = (world.second_root, 4, 0);
    // The guest maps 2 MiB at 0x4000_0000 to 2 MiB of guest-physical memory; NPT has 4 KiB pages there.
    let guest_root = GUEST_TABLES;
    let mut tables = Builder::new(GUEST_TABLES + 0x4000);
    tables.map(&world.memory, (guest_root, 4, BASE), 0x4000_0000, 2, (P | W | U, 0x40_0000 | P | W | U | PS));
    world.builder.map(&world.memory, place, 0x40_3000, 1, (P | W | U, 0xdead_0000 | P | W | U));
    let t = translated(&world.processor, &world.memory, 0x4000_3010, READ);
    assert_eq!((t.hpa.raw(), t.size), (0xdead_0010, PageSize::Size4K));
    assert!(matches!(
        only(&world.processor, &world.memory, 0x4000_4000, READ),
        Outcome::NestedPageFault(fault) if fault.gpa == gpa(0x40_4000)
    ));
}

#[test]
fn addresses_past_the_tables_are_not_present() {
    let world = World::new(Kind::Ept { accessed_dirty: false });
    let mut features = Features::intel(52);
    features.la57 = false;
    let mut processor = Processor::new(features, Quirks::NONE);
    let registers = Registers { cr3: GUEST_TABLES, ..Registers::long_mode(GUEST_TABLES) };
    processor
        .enter(EptContext { registers, vpid: Some(1), eptp: Some(world.second_root | 0x1e) })
        .expect("a valid guest");
    world.edit(world.guest[3], 0x000f_ffff_ffff_f000, 1 << 48);
    match only(&processor, &world.memory, GVA, READ) {
        Outcome::EptViolation(exit) => assert_eq!((exit.qualification, exit.gpa), (0x181, gpa(1 << 48))),
        other => panic!("{other}"),
    }
}

#[test]
fn pae_guests_keep_their_pdptes_in_memory_under_npt_and_in_registers_under_ept() {
    for kind in [Kind::Npt, Kind::Ept { accessed_dirty: false }] {
        let mut world = World::new(kind);
        let registers = Registers::pae(0);
        assert_ne!(registers.cr4 & CR4_PAE, 0);
        world.processor.exit();
        let pdpt = GUEST_TABLES + 0x4000;
        let at = |address: u64| Hpa::new(BASE + address);
        world.memory.write64(at(pdpt + 8), (GUEST_TABLES + 0x5000) | P);
        // 0x4000_0000 is in the second gigabyte.
        world.memory.write64(at(GUEST_TABLES + 0x5000), (GUEST_TABLES + 0x6000) | P | W | U);
        world.memory.write64(at(GUEST_TABLES + 0x6000), GPA | P | W | U);
        match kind {
            Kind::Npt => world.processor.enter(npt(registers, world.second_root)),
            Kind::Ept { .. } => world.processor.enter(EptContext {
                registers,
                vpid: Some(1),
                eptp: Some(world.second_root | 0x1e),
            }),
        }
        .expect("a valid guest");
        world.processor.mov_cr3(&world.memory, pdpt, 0).expect("PDPTEs are good");
        assert_eq!(reaches(&world.processor, &world.memory, 0x4000_0010, READ), [BASE + GPA + 0x10]);
        // A reserved bit set behind the processor's back.
        world.edit(at(pdpt + 8), 0, 1 << 6);
        let codes = fault_codes(&world.processor, &world.memory, 0x4000_0010, READ);
        match kind {
            Kind::Npt => assert_eq!(codes, [9]),
            Kind::Ept { .. } => assert_eq!(codes, []),
        }
    }
}

#[test]
fn physical_accesses_have_no_linear_address() {
    let world = World::new(Kind::Ept { accessed_dirty: false });
    world.edit(world.leaf(), RWX, 0);
    let outcomes = world.processor.access_physical(&world.memory, gpa(GPA), AccessKind::Read);
    match outcomes.only() {
        Some(Outcome::EptViolation(exit)) => assert_eq!((exit.qualification, exit.gva), (1, None)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_32_bit_guest_has_entries_of_four_bytes_in_guest_physical_memory() {
    let mut world = World::new(Kind::Ept { accessed_dirty: true });
    world.processor.exit();
    let directory = GUEST_TABLES + 0x4000;
    let table = GUEST_TABLES + 0x5000;
    let at = |address: u64| Hpa::new(BASE + address);
    world.memory.write32(at(directory + 5 * 4), (table | P | W | U) as u32);
    world.memory.write32(at(table + 7 * 4), (GPA | P | W | U) as u32);
    world.memory.write32(at(table + 6 * 4), 0xdead_beee);
    let registers = Registers::legacy(directory);
    world
        .processor
        .enter(EptContext { registers, vpid: Some(1), eptp: Some(world.second_root | 0x5e) })
        .expect("a valid guest");
    let va = 5 << 22 | 7 << 12 | 0x44;
    let outcome = world.processor.touch(&world.memory, gva(va), USER_WRITE, 1);
    assert_eq!(outcome.translation().map(|t| t.hpa.raw()), Some(BASE + GPA + 0x44));
    assert_eq!(world.memory.read32(at(table + 7 * 4)), (GPA | P | W | U | A | D) as u32);
    assert_eq!(
        world.memory.read32(at(table + 6 * 4)),
        0xdead_beee,
        "the other half of the word is untouched"
    );
    // Addresses outside 64-bit mode have 32 bits.
    assert_eq!(reaches(&world.processor, &world.memory, va | 1 << 40, READ), [BASE + GPA + 0x44]);
}

#[test]
fn second_stages_of_five_levels() {
    for amd in [true, false] {
        let memory = Memory::new();
        let mut builder = Builder::new(0x10_0000);
        let root = builder.page();
        let high = 1 << 49;
        let (upper, leaf) = if amd { (P | W | U, P | W | U) } else { (RWX, RWX | WB) };
        builder.map(&memory, (root, 5, 0), high, 1, (upper, 0x9000 | leaf));
        let features = if amd { Features::amd(52) } else { Features::intel(52) };
        let mut processor = Processor::new(features, Quirks::NONE);
        let registers = Registers::OFF;
        if amd {
            let nested = NestedTables { root: Hpa::new(root), five_levels: true, nx: true };
            let tlb_control = TlbControl::Nothing;
            processor.enter(NptContext { registers, asid: 1, tlb_control, nested: Some(nested) })
        } else {
            processor.enter(EptContext { registers, vpid: None, eptp: Some(root | 0x26) })
        }
        .expect("a valid guest");
        let outcomes = processor.access_physical(&memory, gpa(high | 8), AccessKind::Write);
        assert_eq!(outcomes.only().and_then(|o| o.translation().map(|t| t.hpa.raw())), Some(0x9008));
    }
}

/// What a fault may leave behind, over many seeds: the flags that some seed sets.
fn flags_of_faults(change: impl Fn(&World), at: impl Fn(&World) -> Hpa, access: Access) -> (u64, u64) {
    let (mut all, mut any) = (u64::MAX, 0);
    for seed in 0..64 {
        let mut world = World::new(Kind::Npt);
        change(&world);
        let outcome = world.processor.touch(&world.memory, gva(GVA), access, seed);
        assert!(matches!(outcome, Outcome::NestedPageFault(_)), "{outcome}");
        let flags = world.memory.read64(at(&world)) & (A | D);
        (all, any) = (all & flags, any | flags);
    }
    (all, any)
}

#[test]
fn a_nested_fault_leaves_open_what_the_guest_s_entries_have_become() {
    // The page is missing: the guest's leaf may have been marked, for a write dirty too; or not.
    let unmap = |world: &World| world.edit(world.leaf(), P, 0);
    assert_eq!(flags_of_faults(unmap, |world| world.guest[3], READ), (0, A));
    assert_eq!(flags_of_faults(unmap, |world| world.guest[3], WRITE), (0, A | D));
    assert_eq!(flags_of_faults(unmap, |world| world.guest[2], WRITE), (0, A));
    // The guest's table of level 3 is behind nothing: the entry that names it may be marked.
    let hide = |world: &World| world.memory.write64(world.guest[0], 0x7000 | P | W | U);
    assert_eq!(flags_of_faults(hide, |world| world.guest[0], READ), (0, A));
    // A page without the right to write: its own entry may be marked accessed, and is not dirty.
    let protect = |world: &World| world.edit(world.leaf(), W, 0);
    assert_eq!(flags_of_faults(protect, World::leaf, WRITE), (0, A));
}

#[test]
fn marks_are_those_that_a_translation_sets() {
    let world = World::new(Kind::Npt);
    let set = world.processor.access(&world.memory, gva(GVA), WRITE);
    let outcome = set.only().expect("nothing is cached");
    let marks = set.marks(&world.processor, &outcome);
    for mark in &marks {
        assert_eq!(world.memory.read64(mark.entry.at), mark.entry.value);
    }
    let mut world = world;
    world.touch(WRITE);
    for mark in &marks {
        assert_eq!(world.memory.read64(mark.entry.at) & (A | D), mark.flags, "{mark:?}");
    }
    // The set is of a moment that has passed.
    assert!(set.marks(&world.processor, &outcome).is_empty());
}
