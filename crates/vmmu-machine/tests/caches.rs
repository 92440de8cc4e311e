//! What caches may hold and offer: stale translations and tables, by demand and by speculation, and how the
//! vendors differ.

mod common;
use common::*;
use vmmu_machine::registers::{CR0_PG, CR4_PCIDE, EFER_LMA};
use vmmu_machine::{
    Access, AccessKind, EptContext, Features, Hpa, Invept, Invvpid, Machine, Mapping, Memory, NestedTables,
    NotChosen, NptContext, Outcome, PageSize, Pfn, PhysicalTag, Processor, Quirks, Registers, Stage, Tag,
    TlbControl,
};

const VA: u64 = 0x40_0000;

struct Host {
    memory: Memory,
    processor: Processor,
    chain: Vec<Hpa>,
    builder: Builder,
    root: u64,
}

fn host(features: Features, leaf: u64) -> Host {
    let memory = Memory::new();
    let mut builder = Builder::new(0x10_0000);
    let root = builder.page();
    let chain = builder.map(&memory, (root, 4, 0), VA, 1, (P | W | U, leaf));
    let mut processor = Processor::new(features, Quirks::NONE);
    processor.load_host(Registers::long_mode(root)).expect("runs");
    Host { memory, processor, chain, builder, root }
}

const VENDORS: [Features; 2] = [Features::intel(46), Features::amd(46)];

#[test]
fn a_removed_page_stays_usable_until_it_is_flushed() {
    for features in VENDORS {
        let mut h = host(features, 0x5000 | P | W | U);
        h.processor.touch(&h.memory, gva(VA), READ, 1);
        h.memory.write64(h.chain[3], 0);
        assert_eq!(reaches(&h.processor, &h.memory, VA, READ), [0x5000]);
        assert_eq!(fault_codes(&h.processor, &h.memory, VA, READ), [0]);
        h.processor.invlpg(gva(VA));
        assert_eq!(reaches(&h.processor, &h.memory, VA, READ), []);
    }
}

#[test]
fn two_translations_of_one_page_may_be_held_at_once() {
    let mut h = host(Features::intel(46), 0x5000 | P | W | U);
    h.processor.touch(&h.memory, gva(VA), READ, 1);
    h.memory.write64(h.chain[3], 0x6000 | P | W | U);
    assert_eq!(reaches(&h.processor, &h.memory, VA, READ), [0x5000, 0x6000]);
    let new = h
        .processor
        .access(&h.memory, gva(VA), READ)
        .iter()
        .find(|outcome| outcome.translation().is_some_and(|t| t.hpa.raw() == 0x6000))
        .copied()
        .expect("a fresh walk");
    let outcomes = h.processor.access(&h.memory, gva(VA), READ);
    outcomes.choose_this(&mut h.processor, &h.memory, &new, 0).expect("nothing changed");
    h.memory.write64(h.chain[3], 0);
    assert_eq!(reaches(&h.processor, &h.memory, VA, READ), [0x5000, 0x6000]);
}

#[test]
fn nothing_that_is_absent_is_ever_held() {
    let mut h = host(Features::intel(46), 0);
    for seed in 0..50 {
        h.processor.touch(&h.memory, gva(VA), READ, seed);
        h.processor.speculate(&h.memory, gva(VA), seed).expect("nothing changed");
    }
    h.memory.write64(h.chain[3], 0x5000 | P);
    assert_eq!(reaches(&h.processor, &h.memory, VA, READ), [0x5000]);
    assert_eq!(fault_codes(&h.processor, &h.memory, VA, READ), []);
}

#[test]
fn a_held_lack_of_rights_faults_on_intel_and_is_confirmed_on_amd() {
    for features in VENDORS {
        let mut h = host(features, 0x5000 | P | U);
        h.processor.touch(&h.memory, gva(VA), USER_READ, 1);
        h.memory.write64(h.chain[3], 0x5000 | P | W | U);
        let spurious = fault_codes(&h.processor, &h.memory, VA, USER_WRITE);
        assert_eq!(reaches(&h.processor, &h.memory, VA, USER_WRITE), [0x5000]);
        if features == Features::amd(46) {
            assert_eq!(spurious, []);
            continue;
        }
        assert_eq!(spurious, [7]);
        // The fault removes what caused it: it comes but once (SDM 4.10.4.1).
        loop {
            let outcome = h.processor.touch(&h.memory, gva(VA), USER_WRITE, 3);
            if matches!(outcome, Outcome::PageFault(_)) {
                break;
            }
            h.processor.invlpg(gva(VA));
            h.memory.write64(h.chain[3], 0x5000 | P | U);
            h.processor.touch(&h.memory, gva(VA), USER_READ, 1);
            h.memory.write64(h.chain[3], 0x5000 | P | W | U);
        }
        assert_eq!(fault_codes(&h.processor, &h.memory, VA, USER_WRITE), []);
    }
}

#[test]
fn a_write_through_a_clean_entry_walks_again_and_through_a_dirty_one_need_not() {
    let mut h = host(Features::intel(46), 0x5000 | P | W | U);
    h.processor.touch(&h.memory, gva(VA), READ, 1);
    h.memory.write64(h.chain[3], 0x6000 | P | W | U);
    assert_eq!(reaches(&h.processor, &h.memory, VA, WRITE), [0x6000]);
    // Held as dirty: where software clears the flag without a flush, a later write may or may not set it.
    let mut flags = [false, false];
    for seed in 0..64 {
        let mut h = host(Features::intel(46), 0x6000 | P | W | U);
        h.processor.touch(&h.memory, gva(VA), WRITE, 1);
        h.memory.write64(h.chain[3], 0x6000 | P | W | U | A);
        h.processor.touch(&h.memory, gva(VA), WRITE, seed);
        flags[usize::from(h.memory.read64(h.chain[3]) & D != 0)] = true;
    }
    assert_eq!(flags, [true, true]);
}

#[test]
fn a_cached_table_is_read_after_its_link_is_gone() {
    for features in VENDORS {
        let mut h = host(features, 0x5000 | P | W | U);
        let neighbour = VA + 0x1000;
        h.processor.touch(&h.memory, gva(VA), READ, 1);
        h.memory.write64(h.chain[2], 0);
        // The table, freed and full of something else by now, still answers for its neighbour.
        h.memory.write64(h.chain[3].plus(8), 0xbad_0000 | P | W | U);
        assert_eq!(reaches(&h.processor, &h.memory, neighbour, READ), [0xbad_0000]);
        h.processor.invlpg(gva(0));
        assert_eq!(reaches(&h.processor, &h.memory, neighbour, READ), []);
    }
}

#[test]
fn speculation_holds_tables_that_lead_nowhere_and_sets_no_dirty_flag() {
    let mut h = host(Features::amd(46), 0);
    for seed in 0..64 {
        h.processor.speculate(&h.memory, gva(VA), seed).expect("nothing changed");
    }
    let levels: Vec<u8> = h
        .processor
        .held()
        .filter_map(|held| match held.mapping {
            Mapping::Table(table) => Some(table.level),
            Mapping::Page(_) => None,
        })
        .collect();
    assert_eq!(levels.len(), 3, "{levels:?}");
    h.memory.write64(h.chain[3], 0x5000 | P | W | U);
    for seed in 0..64 {
        h.processor.speculate(&h.memory, gva(VA), seed).expect("nothing changed");
    }
    assert_eq!(h.memory.read64(h.chain[3]), 0x5000 | P | W | U | A);
}

#[test]
fn speculation_heeds_no_permission_but_its_result_does() {
    let mut h = host(Features::intel(46), 0x5000 | P | NX);
    for seed in 0..64 {
        h.processor.speculate(&h.memory, gva(VA), seed).expect("nothing changed");
    }
    h.memory.write64(h.chain[3], 0);
    assert_eq!(reaches(&h.processor, &h.memory, VA, READ), [0x5000]);
    assert_eq!(reaches(&h.processor, &h.memory, VA, FETCH), []);
    assert_eq!(fault_codes(&h.processor, &h.memory, VA, USER_READ), [4, 5]);
}

#[test]
fn a_large_page_may_be_held_in_pieces_and_one_invlpg_takes_them_all() {
    let memory = Memory::new();
    let mut builder = Builder::new(0x10_0000);
    let root = builder.page();
    let chain = builder.map(&memory, (root, 4, 0), VA, 2, (P | W | U, 0x80_0000 | P | W | U | PS));
    let mut processor = Processor::new(Features::intel(46), Quirks::NONE);
    processor.load_host(Registers::long_mode(root)).expect("runs");
    let is_page = |held: &&vmmu_machine::Held| matches!(held.mapping, Mapping::Page(_));
    for page in 0..64 {
        processor.speculate(&memory, gva(VA + page * 0x1000), page).expect("nothing changed");
    }
    let pieces = processor
        .held()
        .filter(|held| matches!(held.mapping, Mapping::Page(page) if page.size == PageSize::Size4K))
        .count();
    assert!(pieces > 1, "{pieces}");
    memory.write64(chain[2], 0);
    processor.invlpg(gva(VA + 0x1f_f000));
    assert_eq!(processor.held().filter(is_page).count(), 0);
}

#[test]
fn globals_serve_every_pcid_and_only_where_they_are_on() {
    let mut h = host(Features::intel(46), 0x5000 | P | W | U | G);
    let with = |pcid: u64| {
        let mut registers = Registers::long_mode(h.root | pcid);
        registers.cr4 |= CR4_PCIDE;
        registers
    };
    h.processor.load_host(with(1)).expect("runs");
    h.processor.touch(&h.memory, gva(VA), READ, 1);
    h.memory.write64(h.chain[3], 0);
    h.processor.load_host(with(2)).expect("runs");
    assert_eq!(reaches(&h.processor, &h.memory, VA, READ), [0x5000]);
    let mut other = host(Features::intel(46), 0x5000 | P | W | U | G);
    let mut registers = Registers::long_mode(other.root);
    registers.cr4 &= !vmmu_machine::registers::CR4_PGE;
    other.processor.load_host(registers).expect("runs");
    other.processor.touch(&other.memory, gva(VA), READ, 1);
    assert!(other.processor.held().all(|held| !matches!(held.tag, Tag::Global { .. })));
}

#[test]
fn what_is_held_tells_its_story() {
    let mut h = host(Features::amd(46), 0x5000 | P | W | U);
    h.processor.set_step(41);
    h.processor.touch(&h.memory, gva(VA), READ, 1);
    let to_page: Vec<_> = h.processor.held_to(Pfn::new(5)).collect();
    let [page] = to_page[..] else { panic!("{to_page:?}") };
    let entries = page.provenance.entries();
    assert_eq!(entries.iter().map(|e| e.level).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert!(entries.iter().all(|e| e.stage == Stage::First));
    assert_eq!(entries[0].value, 0x5000 | P | W | U);
    assert_eq!(page.provenance.step, 41);
    let story = page.provenance.to_string();
    assert!(story.contains("step 41: first stage, level 1: the entry at"), "{story}");
    // The index by frame also knows tables.
    let table = Hpa::new(h.chain[3].raw());
    assert_eq!(h.processor.held_to(table.pfn()).count(), 1);
    let outcomes = h.processor.access(&h.memory, gva(VA), READ);
    let outcome = outcomes.only().expect("the same by hit and by walk");
    assert!(outcomes.explain(&h.processor, &outcome).len() >= 2);
}

#[test]
fn a_set_of_outcomes_is_for_its_moment() {
    let mut h = host(Features::amd(46), 0x5000 | P | W | U);
    let outcomes = h.processor.access(&h.memory, gva(VA), READ);
    h.memory.write64(h.chain[2], h.memory.read64(h.chain[2]) & !W);
    let refused = outcomes.clone().choose(&mut h.processor, &h.memory, 1);
    assert!(matches!(refused, Err(NotChosen::MemoryChanged(changed)) if changed.at == h.chain[2]));
    assert_eq!(h.processor.held_count(), 0);
    assert_eq!(outcomes.choose(&mut h.processor, &h.memory, 1), Err(NotChosen::ProcessorChanged));
}

/// An SVM guest without paging, and its nested tables of one page.
fn flat_guest(features: Features, gpa: u64, leaf: u64) -> (Machine, Vec<Hpa>) {
    let mut machine = Machine::new(1, features, Quirks::NONE);
    let mut builder = Builder::new(0x10_0000);
    let root = builder.page();
    let amd = features == Features::amd(46);
    let upper = if amd { P | W | U } else { RWX };
    let chain = builder.map(&machine.memory, (root, 4, 0), gpa, 1, (upper, leaf));
    let registers = Registers::OFF;
    let entered = if amd {
        let nested = NestedTables { root: Hpa::new(root), five_levels: false, nx: true };
        let tlb_control = TlbControl::Nothing;
        machine.processors[0].enter(NptContext { registers, asid: 1, tlb_control, nested: Some(nested) })
    } else {
        machine.processors[0].enter(EptContext { registers, vpid: Some(1), eptp: Some(root | 0x1e) })
    };
    entered.expect("valid");
    (machine, chain)
}

#[test]
fn guest_physical_mappings_are_held_apart_and_survive_the_guests_own_flushes() {
    let (mut machine, chain) = flat_guest(Features::amd(46), 0x5000, 0x9000 | P | W | U);
    let [processor] = &mut machine.processors[..] else { panic!() };
    processor.touch(&machine.memory, gva(0x5000), READ, 1);
    machine.memory.write64(chain[3], 0);
    processor.invlpg(gva(0x5000));
    processor.mov_cr3(&machine.memory, 0, 0).expect("good");
    assert_eq!(reaches(processor, &machine.memory, 0x5000, READ), [0x9000]);
    let held = processor.held_of_physical(PhysicalTag::Asid(1), gpa(0x5000)).count();
    assert_eq!(held, 1);
    assert!(processor.held().all(|held| matches!(held.tag, Tag::Physical(_))), "paging is off");
}

#[test]
fn stale_nested_rights_exit_on_intel_only() {
    let (mut machine, chain) = flat_guest(Features::intel(46), 0x5000, 0x9000 | R | WB);
    let [processor] = &mut machine.processors[..] else { panic!() };
    processor.touch(&machine.memory, gva(0x5000), READ, 1);
    machine.memory.write64(chain[3], 0x9000 | RWX | WB);
    let write = Access::supervisor(AccessKind::Write);
    let outcomes = processor.access(&machine.memory, gva(0x5000), write);
    assert!(outcomes.iter().any(|o| matches!(o, Outcome::EptViolation(e) if e.qualification == 0x18a)));
    assert_eq!(reaches(processor, &machine.memory, 0x5000, write), [0x9000]);

    let (mut machine, chain) = flat_guest(Features::amd(46), 0x5000, 0x9000 | P | U);
    let [processor] = &mut machine.processors[..] else { panic!() };
    processor.touch(&machine.memory, gva(0x5000), READ, 1);
    machine.memory.write64(chain[3], 0x9000 | P | W | U);
    let only_one = processor.access(&machine.memory, gva(0x5000), write).only();
    assert!(only_one.is_some_and(|o| o.translation().is_some()), "{only_one:?}");
}

#[test]
fn eptps_that_differ_in_flags_share_their_mappings() {
    let (mut machine, chain) = flat_guest(Features::intel(46), 0x5000, 0x9000 | RWX | WB);
    let root = chain[0].raw() & !0xfff;
    let [processor] = &mut machine.processors[..] else { panic!() };
    processor.touch(&machine.memory, gva(0x5000), WRITE, 1);
    processor.exit();
    let context = EptContext { registers: Registers::OFF, vpid: Some(2), eptp: Some(root | 0x5e) };
    processor.enter(context).expect("valid");
    machine.memory.write64(chain[3], 0);
    assert_eq!(reaches(processor, &machine.memory, 0x5000, WRITE), [0x9000]);
}

#[test]
fn questions_about_a_guest_that_is_not_entered() {
    let (mut machine, chain) = flat_guest(Features::amd(46), 0x5000, 0x9000 | P | W | U);
    let memory = &machine.memory;
    let [processor] = &mut machine.processors[..] else { panic!() };
    processor.touch(memory, gva(0x5000), READ, 1);
    let guest = processor.exit().expect("a guest");
    memory.write64(chain[3], 0xa000 | P | W | U);
    let queries = processor.queries_in(memory, guest).expect("valid");
    let mut frames: Vec<u64> =
        queries.physical_translations(gpa(0x5000)).iter().map(|t| t.hpa.raw()).collect();
    frames.sort_unstable();
    assert_eq!(frames, [0x9000, 0xa000]);
    let mut reached = Vec::new();
    queries.reach_physical(|r| reached.push((r.at, r.frame.raw())));
    reached.sort_unstable();
    reached.dedup();
    assert_eq!(reached, [(0x5000, 0x9000), (0x5000, 0xa000)]);
    assert!(queries.access(gva(0x5000), READ).iter().count() >= 2);
}

#[test]
fn reach_linear_finds_every_page_of_every_mode() {
    let mut h = host(Features::intel(46), 0x5000 | P | W | U);
    let high = 0xffff_8000_0020_0000;
    h.builder.map(&h.memory, (h.root, 4, 0), high, 2, (P | W, 0x60_0000 | P | PS));
    let mut reached = Vec::new();
    h.processor.queries(&h.memory).reach_linear(|r| reached.push((r.at, r.size, r.frame.raw())));
    assert_eq!(reached, [(VA, PageSize::Size4K, 0x5000), (high, PageSize::Size2M, 0x60_0000)]);
    // 32-bit paging: 1024 entries of 4 bytes.
    let memory = Memory::new();
    memory.write32(Hpa::new(0x1000 + 1023 * 4), (0x0040_0000 | P | PS) as u32);
    let mut processor = Processor::new(Features::intel(46), Quirks::NONE);
    processor.load_host(Registers::legacy(0x1000)).expect("runs");
    let mut reached = Vec::new();
    processor.queries(&memory).reach_linear(|r| reached.push((r.at, r.size, r.frame.raw())));
    assert_eq!(reached, [(0xffc0_0000, PageSize::Size4M, 0x0040_0000)]);
    assert_eq!(processor.registers().efer & EFER_LMA, 0);
    assert_ne!(processor.registers().cr0 & CR0_PG, 0);
}

#[test]
fn a_shadow_paged_guest_has_linear_mappings_of_its_own_tag() {
    // AMD: by ASID.
    let mut h = host(Features::amd(46), 0x5000 | P | W | U);
    let context = |asid| NptContext {
        registers: Registers::long_mode(h.root),
        asid,
        tlb_control: TlbControl::Nothing,
        nested: None,
    };
    let (first, second) = (context(1), context(2));
    h.processor.enter(first).expect("valid");
    h.processor.touch(&h.memory, gva(VA), READ, 1);
    h.memory.write64(h.chain[3], 0);
    h.processor.exit();
    assert_eq!(reaches(&h.processor, &h.memory, VA, READ), [], "not the host's");
    h.processor.enter(second).expect("valid");
    assert_eq!(reaches(&h.processor, &h.memory, VA, READ), [], "not another guest's");
    h.processor.exit();
    h.processor.enter(first).expect("valid");
    assert_eq!(reaches(&h.processor, &h.memory, VA, READ), [0x5000]);
    // Intel: by VPID, and INVEPT does not touch them.
    let mut h = host(Features::intel(46), 0x5000 | P | W | U);
    let guest = EptContext { registers: Registers::long_mode(h.root), vpid: Some(3), eptp: None };
    h.processor.enter(guest).expect("valid");
    h.processor.touch(&h.memory, gva(VA), READ, 1);
    h.memory.write64(h.chain[3], 0);
    h.processor.exit();
    h.processor.invept(Invept::All).expect("good");
    h.processor.enter(guest).expect("valid");
    assert_eq!(reaches(&h.processor, &h.memory, VA, READ), [0x5000]);
    h.processor.exit();
    h.processor.invvpid(Invvpid::Context { vpid: 3 }).expect("good");
    h.processor.enter(guest).expect("valid");
    assert_eq!(reaches(&h.processor, &h.memory, VA, READ), []);
}
