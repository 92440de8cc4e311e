//! Walks of one stage, mode by mode: where they lead, what they set, how they fail.

mod common;
use common::*;
use vmmu_machine::registers::{CR4_LA57, CR4_PKS, CR4_PSE, EFER_NXE};
use vmmu_machine::{
    ControlFault, EntryRefused, Features, Hpa, Memory, Outcome, PageSize, Processor, Quirks, Registers,
    UnsupportedRegisters,
};

fn host(features: Features, registers: Registers) -> Processor {
    let mut processor = Processor::new(features, Quirks::NONE);
    processor.load_host(registers).expect("these registers run");
    processor
}

#[test]
fn without_paging_an_address_is_itself() {
    let processor = host(Features::amd(48), Registers::OFF);
    let memory = Memory::new();
    assert_eq!(translated(&processor, &memory, 0x1234_5678, WRITE).hpa.raw(), 0x1234_5678);
}

#[test]
fn thirty_two_bit_paging() {
    let memory = Memory::new();
    // 0x00c0_1234: directory entry 3, table entry 1.
    memory.write32(Hpa::new(0x1000 + 3 * 4), 0x2000 | (P | W | U) as u32);
    memory.write32(Hpa::new(0x2000 + 4), 0x9000 | (P | W | U) as u32);
    // 4 MiB at 0x0100_0000, frame 0x3_0040_0000.
    memory.write32(Hpa::new(0x1000 + 4 * 4), 0x0040_0000 | 3 << 13 | (P | PS | U) as u32);
    let mut processor = host(Features::intel(36), Registers::legacy(0x1000));
    let small = processor.touch(&memory, gva(0x00c0_1234), USER_WRITE, 1);
    assert_eq!(small.translation().expect("mapped").hpa.raw(), 0x9234);
    assert_eq!(memory.read32(Hpa::new(0x1000 + 12)), 0x2000 | (P | W | U | A) as u32);
    assert_eq!(memory.read32(Hpa::new(0x2000 + 4)), 0x9000 | (P | W | U | A | D) as u32);
    let large = translated(&processor, &memory, 0x0112_3456, USER_READ);
    assert_eq!((large.hpa.raw(), large.size), (0x3_0052_3456, PageSize::Size4M));
    assert_eq!(fault_codes(&processor, &memory, 0x0112_3456, USER_WRITE), [7]);
    assert_eq!(fault_codes(&processor, &memory, 0x0200_0000, USER_READ), [4]);
    memory.write32(Hpa::new(0x1000 + 8 * 4), 1 << 21 | (P | PS) as u32);
    assert_eq!(fault_codes(&processor, &memory, 0x0200_0000, READ), [9]);
    // Without CR4.PSE that entry names a table, here one that maps nothing.
    let mut registers = Registers::legacy(0x1000);
    registers.cr4 &= !CR4_PSE;
    let plain = host(Features::intel(36), registers);
    assert_eq!(fault_codes(&plain, &memory, 0x0200_0000, READ), [0]);
}

#[test]
fn pae_paging_walks_from_its_registers() {
    let memory = Memory::new();
    let table = 0x1_0000_0000u64;
    memory.write64(Hpa::new(0x1020), 0);
    memory.write64(Hpa::new(0x1020 + 24), table | P);
    // 0xc020_3abc: PDPTE 3, PDE 1, PTE 3.
    memory.write64(Hpa::new(table + 8), (table + 0x1000) | P | W | U);
    memory.write64(Hpa::new(table + 0x1000 + 24), 0x7_0000_0000 | P | W | NX);
    memory.write64(Hpa::new(table + 16), 0x8_0020_0000 | P | PS);
    let mut processor = host(Features::intel(40), Registers::pae(0));
    processor.mov_cr3(&memory, 0x1020, 0).expect("no reserved bits");
    assert_eq!(translated(&processor, &memory, 0xc020_3abc, WRITE).hpa.raw(), 0x7_0000_0abc);
    assert_eq!(fault_codes(&processor, &memory, 0xc020_3abc, FETCH), [0x11]);
    assert_eq!(fault_codes(&processor, &memory, 0xc020_3abc, USER_READ), [5]);
    assert_eq!(translated(&processor, &memory, 0xc041_2345, FETCH).hpa.raw(), 0x8_0021_2345);
    assert_eq!(fault_codes(&processor, &memory, 0x1000, READ), [0]);
    // The registers are what counts, not memory, until the next MOV to CR3; which refuses reserved bits.
    memory.write64(Hpa::new(0x1020 + 24), table | P | W);
    assert_eq!(reaches(&processor, &memory, 0xc020_3abc, READ), [0x7_0000_0abc]);
    let refused = processor.mov_cr3(&memory, 0x1020, 0);
    assert!(matches!(refused, Err(ControlFault::Pdptes(error)) if error.index == 3), "{refused:?}");
    assert_eq!(reaches(&processor, &memory, 0xc020_3abc, READ), [0x7_0000_0abc]);
}

#[test]
fn four_and_five_levels() {
    for levels in [4, 5] {
        let memory = Memory::new();
        let mut builder = Builder::new(0x10_0000);
        let root = builder.page();
        let place = (root, levels, 0);
        let va = 0xffff_8000_1234_5000u64;
        let chain = builder.map(&memory, place, va, 1, (P | W | U, 0xab_c000 | P | W));
        builder.map(&memory, place, 0x40_0000_0000, 3, (P | W | U, 0x80_c000_0000 | P | PS | U));
        builder.map(&memory, place, 0x20_0000, 2, (P | W | U, 0x60_0000 | P | PS | W | NX | U));
        let mut registers = Registers::long_mode(root);
        if levels == 5 {
            registers.cr4 |= CR4_LA57;
        }
        let mut processor = host(Features::amd(48), registers);
        assert_eq!(translated(&processor, &memory, va | 0x123, WRITE).hpa.raw(), 0xab_c123);
        assert_eq!(fault_codes(&processor, &memory, va, USER_READ), [5]);
        let huge = translated(&processor, &memory, 0x40_1234_5678, USER_READ);
        assert_eq!((huge.hpa.raw(), huge.size), (0x80_d234_5678, PageSize::Size1G));
        let large = translated(&processor, &memory, 0x3f_ffff, USER_WRITE);
        assert_eq!((large.hpa.raw(), large.size), (0x7f_ffff, PageSize::Size2M));
        assert_eq!(fault_codes(&processor, &memory, 0x20_0000, FETCH), [0x11]);
        // A read sets accessed flags all the way and no dirty flag; a write sets that in the leaf.
        let leaf = *chain.last().expect("a chain");
        processor.touch(&memory, gva(va), READ, 3);
        for &entry in &chain {
            assert_eq!(memory.read64(entry) & (A | D), A);
        }
        processor.touch(&memory, gva(va), WRITE, 4);
        assert_eq!(memory.read64(leaf) & (A | D), A | D);
        assert_eq!(memory.read64(chain[0]) & D, 0);
    }
}

#[test]
fn addresses_must_be_canonical() {
    let memory = Memory::new();
    let four = host(Features::intel(46), Registers::long_mode(0x1000));
    let bad = 0x0000_8000_0000_0000;
    assert_eq!(only(&four, &memory, bad, READ), Outcome::NotCanonical(gva(bad)));
    let mut registers = Registers::long_mode(0x1000);
    registers.cr4 |= CR4_LA57;
    let five = host(Features::intel(46), registers);
    assert_eq!(fault_codes(&five, &memory, bad, READ), [0]);
    let worse = 0x0100_0000_0000_0000;
    assert_eq!(only(&five, &memory, worse, READ), Outcome::NotCanonical(gva(worse)));
}

#[test]
fn an_absent_entry_comes_before_a_reserved_one_below_and_rights_come_last() {
    let memory = Memory::new();
    let mut builder = Builder::new(0x10_0000);
    let root = builder.page();
    let chain = builder.map(&memory, (root, 4, 0), 0x5000, 1, (P, 0x9000 | P | 1 << 51));
    let processor = host(Features::intel(46), Registers::long_mode(root));
    // The upper entries forbid the user, the leaf is reserved: reserved wins.
    assert_eq!(fault_codes(&processor, &memory, 0x5000, USER_WRITE), [0xf]);
    // Level 3 absent: whatever lies below does not count.
    memory.write64(chain[1], memory.read64(chain[1]) & !P);
    assert_eq!(fault_codes(&processor, &memory, 0x5000, USER_WRITE), [6]);
    memory.write64(chain[1], memory.read64(chain[1]) | P);
    memory.write64(chain[3], 0x9000 | P | W | U);
    assert_eq!(fault_codes(&processor, &memory, 0x5000, USER_WRITE), [7]);
}

#[test]
fn the_fetch_bit_is_reported_only_where_something_can_forbid_a_fetch() {
    let memory = Memory::new();
    let mut registers = Registers::long_mode(0x1000);
    let with = host(Features::intel(46), registers);
    assert_eq!(fault_codes(&with, &memory, 0x5000, FETCH), [0x10]);
    registers.efer &= !EFER_NXE;
    let without = host(Features::intel(46), registers);
    assert_eq!(fault_codes(&without, &memory, 0x5000, FETCH), [0]);
}

#[test]
fn a_faulting_walk_sets_flags_above_the_fault_at_most() {
    let mut depths = Vec::new();
    for seed in 0..200 {
        let memory = Memory::new();
        let mut builder = Builder::new(0x10_0000);
        let root = builder.page();
        let chain = builder.map(&memory, (root, 4, 0), 0x5000, 1, (P | W, 0x9000));
        let mut processor = host(Features::amd(48), Registers::long_mode(root));
        let outcome = processor.touch(&memory, gva(0x5000), WRITE, seed);
        assert!(matches!(outcome, Outcome::PageFault(fault) if fault.code == 2));
        assert_eq!(memory.read64(chain[3]), 0x9000);
        for pair in chain[..3].windows(2) {
            let [above, below] = [memory.read64(pair[0]) & A, memory.read64(pair[1]) & A];
            assert!(above >= below, "an entry is used after those above it");
        }
        depths.push(chain.iter().filter(|&&entry| memory.read64(entry) & A != 0).count());
    }
    depths.sort_unstable();
    depths.dedup();
    assert_eq!(depths, [0, 1, 2, 3], "as far as the processor got before it gave up");
}

#[test]
fn reserved_faults_report_what_the_quirk_says() {
    let memory = Memory::new();
    let mut builder = Builder::new(0x10_0000);
    let root = builder.page();
    builder.map(&memory, (root, 4, 0), 0x5000, 1, (P | W | U, 0x9000 | P | 1 << 51));
    let mut processor = Processor::new(Features::amd(48), Quirks::QEMU_7_2);
    processor.load_host(Registers::long_mode(root)).expect("these registers run");
    assert_eq!(fault_codes(&processor, &memory, 0x5000, READ), [8]);
}

#[test]
fn what_is_not_modelled_is_refused() {
    let mut registers = Registers::long_mode(0x1000);
    registers.cr4 |= CR4_PKS;
    let mut processor = Processor::new(Features::intel(46), Quirks::NONE);
    let refused = EntryRefused::Registers(UnsupportedRegisters::SupervisorKeys);
    assert_eq!(processor.load_host(registers), Err(refused));
    assert_eq!(*processor.registers(), Registers::OFF);
}
