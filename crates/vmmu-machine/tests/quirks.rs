//! Each quirk of walks by one walk that it changes: what the manuals say, and what the quirk makes of it.

mod common;
use common::*;
use vmmu_machine::registers::{CR0_PG, CR0_WP, CR4_PAE, CR4_PKE, CR4_SMAP, EFER_NXE};
use vmmu_machine::{
    Access, AccessKind, EptContext, Features, Gva, Hpa, Memory, NestedTables, NptContext, Outcome, Processor,
    Quirks, Registers, TlbControl,
};

/// A page and its way down from 0x1000, four levels, for linear address 0.
const CHAIN: [u64; 4] = [0x1000, 0x2000, 0x3000, 0x4000];

fn chain(bits: u64, leaf: u64) -> Memory {
    let memory = Memory::new();
    for (at, next) in CHAIN.into_iter().zip([0x2000, 0x3000, 0x4000]) {
        memory.write64(Hpa::new(at), next | bits);
    }
    memory.write64(Hpa::new(CHAIN[3]), leaf);
    memory
}

fn host(quirks: Quirks, registers: Registers) -> Processor {
    let mut processor = Processor::new(Features::amd(40), quirks);
    processor.load_host(registers).expect("these registers run");
    processor
}

/// [`Quirks::NONE`] but for one.
fn with(change: impl FnOnce(&mut Quirks)) -> Quirks {
    let mut quirks = Quirks::NONE;
    change(&mut quirks);
    quirks
}

/// The code of the fault that an access ends in, or `None` if it succeeds.
fn code(processor: &Processor, memory: &Memory, access: Access) -> Option<u32> {
    match only(processor, memory, 0, access) {
        Outcome::PageFault(fault) => Some(fault.code),
        Outcome::Translated(_) => None,
        other => panic!("{other}"),
    }
}

#[test]
fn alignment_check_helps_no_implicit_access_but_by_a_quirk() {
    let memory = chain(P | W | U, 0x9000 | P | W | U);
    let mut registers = Registers::long_mode(0x1000);
    registers.cr4 |= CR4_SMAP;
    let supervisors = with(|quirks| quirks.ac_helps_implicit = true);
    let users = with(|quirks| quirks.ac_helps_implicit_of_user = true);
    for (quirks, user, ac, fault) in [
        (Quirks::NONE, false, true, Some(1)),
        (Quirks::NONE, true, true, Some(1)),
        (supervisors, false, true, None),
        (supervisors, false, false, Some(1)),
        (supervisors, true, true, Some(1)),
        (users, true, true, None),
        (users, false, true, Some(1)),
    ] {
        let access = Access::implicit(AccessKind::Read, user, ac, &quirks);
        assert_eq!(code(&host(quirks, registers), &memory, access), fault, "{quirks:?} {user} {ac}");
    }
}

#[test]
fn a_key_is_for_user_pages_and_binds_the_supervisor() {
    let mut registers = Registers::long_mode(0x1000);
    registers.cr4 |= CR4_PKE;
    // Key 3 forbids everything.
    registers.pkru = 1 << 6;
    let user_page = chain(P | W | U, 0x9000 | P | W | U | 3 << 59);
    let supervisor_page = chain(P | W, 0x9000 | P | W | 3 << 59);
    let plain = host(Quirks::NONE, registers);
    assert_eq!(code(&plain, &user_page, READ), Some(0x21));
    assert_eq!(code(&plain, &supervisor_page, READ), None);
    assert_eq!(code(&plain, &supervisor_page, USER_READ), Some(5));
    let spares = host(with(|quirks| quirks.access_disable_spares_supervisor = true), registers);
    assert_eq!(code(&spares, &user_page, READ), None);
    assert_eq!(code(&spares, &user_page, USER_READ), Some(0x25));
    let wide = host(with(|quirks| quirks.keys_of_supervisor_pages = true), registers);
    assert_eq!(code(&wide, &supervisor_page, READ), Some(0x21));
    assert_eq!(code(&wide, &supervisor_page, USER_READ), Some(0x25));
}

#[test]
fn a_reserved_bit_is_that_of_a_present_entry_but_by_a_quirk() {
    // Bit 45 is no address bit of a processor with 40.
    let memory = chain(P | W | U, 0x9000 | P | W | U | 1 << 45);
    let registers = Registers::long_mode(0x1000);
    assert_eq!(code(&host(Quirks::NONE, registers), &memory, READ), Some(9));
    let quirks = with(|quirks| quirks.reserved_fault_without_present = true);
    assert_eq!(code(&host(quirks, registers), &memory, READ), Some(8));
}

#[test]
fn bit_8_of_the_fourth_level_is_reserved_but_by_a_quirk() {
    let memory = chain(P | W | U, 0x9000 | P | W | U);
    memory.write64(Hpa::new(CHAIN[0]), CHAIN[1] | P | W | U | 1 << 8);
    let registers = Registers::long_mode(0x1000);
    assert_eq!(code(&host(Quirks::NONE, registers), &memory, READ), Some(9));
    let quirks = with(|quirks| quirks.level4_bit8_ignored = true);
    assert_eq!(code(&host(quirks, registers), &memory, READ), None);
}

#[test]
fn a_misaligned_large_page_is_marked_by_a_quirk_alone() {
    let marks = |quirks| {
        let memory = chain(P | W | U, 0);
        memory.write64(Hpa::new(CHAIN[2]), 0x40_2000 | P | PS);
        let processor = host(quirks, Registers::long_mode(0x1000));
        let set = processor.access(&memory, Gva::new(0), READ);
        let outcome = set.only().expect("nothing is cached");
        assert!(matches!(outcome, Outcome::PageFault(fault) if fault.code == 9), "{outcome}");
        set.marks(&processor, &outcome).iter().map(|mark| mark.entry.level).collect::<Vec<_>>()
    };
    assert_eq!(marks(Quirks::NONE), [4, 3]);
    assert_eq!(marks(with(|quirks| quirks.misaligned_page_accessed = true)), [4, 3, 2]);
}

#[test]
fn page_directory_pointers_are_registers_but_by_a_quirk() {
    let memory = Memory::new();
    // Bit 5 is reserved there.
    memory.write64(Hpa::new(0x1000), 0x2000 | P | A);
    memory.write64(Hpa::new(0x2000), 0x60_0000 | P | W | U | PS);
    let registers =
        Registers { cr0: CR0_WP | 1, cr3: 0x1000, cr4: CR4_PAE, efer: EFER_NXE, ..Registers::OFF };
    let load = |quirks| {
        let mut processor = host(quirks, registers);
        processor.mov_cr0(&memory, CR0_PG | CR0_WP | 1, 0).map(|()| processor)
    };
    assert!(load(Quirks::NONE).is_err());
    let walked = load(with(|quirks| quirks.pdptes_walked = true)).expect("nothing is loaded");
    assert_eq!(code(&walked, &memory, READ), Some(9));
    let both = load(with(|quirks| {
        quirks.pdptes_walked = true;
        quirks.pdpte_low_bits_ignored = true;
    }));
    assert_eq!(code(&both.expect("nothing is loaded"), &memory, READ), None);
}

#[test]
fn large_pages_of_two_level_tables_have_as_many_bits_as_the_processor() {
    let memory = Memory::new();
    // Address bit 37.
    memory.write32(Hpa::new(0x1000), (P | W | U | PS) as u32 | 1 << 18);
    for (features, quirk, fault) in [
        (Features::intel(40), false, None),
        (Features::intel(36), false, Some(9)),
        (Features::intel(36), true, None),
    ] {
        let quirks = with(|quirks| quirks.large_pages_of_40_bits = quirk);
        let mut processor = Processor::new(features, quirks);
        processor.load_host(Registers::legacy(0x1000)).expect("these registers run");
        assert_eq!(code(&processor, &memory, READ), fault, "{features:?} {quirk}");
    }
}

#[test]
fn a_nested_fetch_is_told_whatever_the_host_has_enabled() {
    let memory = Memory::new();
    let info = |quirks, nx| {
        let registers = Registers::OFF;
        let nested = Some(NestedTables { root: Hpa::new(0x1000), five_levels: false, nx });
        let mut processor = Processor::new(Features::amd(40), quirks);
        let guest = NptContext { registers, asid: 1, tlb_control: TlbControl::Nothing, nested };
        processor.enter(guest).expect("a valid guest");
        match only(&processor, &memory, 0x5000, FETCH) {
            Outcome::NestedPageFault(fault) => fault.info1,
            other => panic!("{other}"),
        }
    };
    let quirks = with(|quirks| quirks.nested_fetch_told_by_nx = true);
    assert_eq!(info(Quirks::NONE, false), 0x1_0000_0014);
    assert_eq!(info(quirks, true), 0x1_0000_0014);
    assert_eq!(info(quirks, false), 0x1_0000_0004);
}

#[test]
fn bit_12_of_a_large_ept_leaf_is_reserved_but_by_a_quirk() {
    // Readable, writable, executable; a page is of write-back memory.
    const RWX: u64 = 7;
    const WRITE_BACK: u64 = 6 << 3;
    let memory = Memory::new();
    for (at, next) in CHAIN.into_iter().take(2).zip([0x2000, 0x3000]) {
        memory.write64(Hpa::new(at), next | RWX);
    }
    memory.write64(Hpa::new(CHAIN[2]), 0x40_1000 | RWX | WRITE_BACK | PS);
    let outcome = |quirks| {
        let mut processor = Processor::new(Features::intel(40), quirks);
        let eptp = Some(CHAIN[0] | 0x1e);
        processor
            .enter(EptContext { registers: Registers::OFF, vpid: Some(1), eptp })
            .expect("a valid guest");
        only(&processor, &memory, 0x1008, READ)
    };
    assert!(matches!(outcome(Quirks::NONE), Outcome::EptMisconfiguration(_)), "{}", outcome(Quirks::NONE));
    let quirks = with(|quirks| quirks.ept_2m_bit12_ignored = true);
    assert!(matches!(outcome(quirks), Outcome::Translated(_)), "{}", outcome(quirks));
}
