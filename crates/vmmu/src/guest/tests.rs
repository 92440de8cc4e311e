//! Walks of every mode on a small memory, case by case: paths, the order of checks, error codes.

use super::fake::FakeMemory;
use super::*;
use crate::addr::{Gva, Level};
use crate::arch::paging::{Access, GuestFault, PageFaultCode, PagingState, Rights};
use std::vec::Vec;

const PG: u64 = 1 << 31;
const WP: u64 = 1 << 16;
const PSE: u64 = 1 << 4;
const PAE: u64 = 1 << 5;
const LA57: u64 = 1 << 12;
const SMEP: u64 = 1 << 20;
const SMAP: u64 = 1 << 21;
const PKE: u64 = 1 << 22;
const LMA: u64 = 1 << 10;
const NX: u64 = 1 << 11;

const P: u64 = 1;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const PS: u64 = 1 << 7;
const XD: u64 = 1 << 63;

/// Where the tables of the hand-made walks are: level n at n × 0x1000, the page at 0x9000.
const ROOT5: u64 = 0x5000;
const ROOT4: u64 = 0x4000;
const PAGE: u64 = 0x9000;
/// An address whose indices differ at each level.
const GVA: u64 = 0x0000_7123_4567_8ABC;

fn long(cr4: u64, efer: u64) -> PagingState {
    let root = if cr4 & LA57 == 0 { ROOT4 } else { ROOT5 };
    PagingState::new(PG | WP, root, PAE | cr4, LMA | efer, 40)
}

fn index(level: u64) -> u64 {
    GVA >> (12 + 9 * (level - 1)) & 511
}

fn table(level: u64) -> u64 {
    level * 0x1000
}

fn entry_at(level: u64) -> u64 {
    table(level) + index(level) * 8
}

/// Tables of five levels that map [`GVA`] to [`PAGE`] with all rights; a walk of four levels starts lower.
fn mapped() -> FakeMemory {
    let mut memory = FakeMemory::default();
    for level in 2..=5 {
        memory.write_u64(entry_at(level), table(level - 1) | P | W | U);
    }
    memory.write_u64(entry_at(1), PAGE | P | W | U);
    memory
}

/// The error code of the page fault at [`GVA`], if the walk ends in one.
fn try_walk(memory: &FakeMemory, state: &PagingState, access: Access) -> Option<u32> {
    match walk(state, memory, Gva::new(GVA), access) {
        Ok(_) => None,
        Err(WalkError::Guest(GuestFault { error_code, gva, .. })) => {
            assert_eq!(gva, Gva::new(GVA));
            Some(error_code.bits())
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn four_and_five_levels() {
    for (cr4, top) in [(0, 4), (LA57, 5)] {
        let memory = mapped();
        let found = walk(&long(cr4, NX), &memory, Gva::new(GVA), Access::WRITE).unwrap();
        assert_eq!(found.gpa, Gpa::new(PAGE | GVA & 0xFFF));
        assert_eq!((found.page_bytes, found.rights), (0x1000, Rights::all()));
        let levels: Vec<u64> = (1..=top).rev().collect();
        let expected: Vec<(u64, u8)> = levels.iter().map(|level| (entry_at(*level), 8)).collect();
        assert_eq!(*memory.log.borrow(), expected, "each entry once, from the top");
        for (step, level) in found.path.iter().zip(levels) {
            assert_eq!(u64::from(step.level.number()), level);
            assert_eq!(step.at, Gpa::new(entry_at(level)));
            let below = if level == 1 { PAGE } else { table(level - 1) };
            assert_eq!((step.entry, step.rights_above), (below | P | W | U, Rights::all()));
        }
    }
}

#[test]
fn large_pages() {
    let mut memory = mapped();
    memory.write_u64(entry_at(2), 0x4060_0000 | 1 << 12 | P | W | U | PS);
    let found = walk(&long(0, 0), &memory, Gva::new(GVA), Access::READ).unwrap();
    assert_eq!(found.gpa, Gpa::new(0x4060_0000 | GVA & 0x1F_FFFF), "bit 12 is the PAT bit");
    assert_eq!((found.page_bytes, found.path.len()), (2 << 20, 3));

    memory.write_u64(entry_at(3), 0xC000_0000 | P | W | U | PS);
    let mut state = long(0, 0);
    let found = walk(&state, &memory, Gva::new(GVA), Access::READ).unwrap();
    assert_eq!(found.gpa, Gpa::new(0xC000_0000 | GVA & 0x3FFF_FFFF));
    assert_eq!((found.page_bytes, found.path.len()), (1 << 30, 2));
    state.has_1g_pages = false;
    assert_eq!(try_walk(&memory, &state, Access::READ), Some(0b1001));
}

/// Rights are those that all levels grant; the path says what was left above each entry (S36, S38).
#[test]
fn rights_are_the_intersection() {
    let mut memory = mapped();
    memory.write_u64(entry_at(4), 0x3000 | P | W);
    memory.write_u64(entry_at(3), 0x2000 | P | U | W);
    memory.write_u64(entry_at(2), 0x1000 | P | U);
    memory.write_u64(entry_at(1), PAGE | P | U | W | XD);
    let found = walk(&long(0, NX), &memory, Gva::new(GVA), Access::READ).unwrap();
    assert_eq!(found.rights, Rights::empty());
    let above: Vec<u8> = found.path.iter().map(|step| step.rights_above.bits()).collect();
    assert_eq!(above, [7, 3, 3, 1]);
}

/// S41: not present outranks reserved at the same level.
#[test]
fn not_present_outranks_reserved_at_its_level() {
    for level in 1..=4 {
        let mut memory = mapped();
        memory.write_u64(entry_at(level), !P);
        assert_eq!(try_walk(&memory, &long(0, 0), Access::READ), Some(0));
    }
}

/// S41: reserved at an upper level outranks not present below it, and any violation of rights.
#[test]
fn reserved_outranks_what_is_below_and_rights() {
    for level in 2..=4 {
        let mut memory = mapped();
        memory.write_u64(entry_at(level), table(level - 1) | P | 1 << 51);
        memory.write_u64(entry_at(level - 1), 0);
        let mut state = long(0, 0);
        state.cpl = 3;
        assert_eq!(try_walk(&memory, &state, Access::WRITE), Some(0b1111), "no user, not writable, reserved");
    }
    let mut memory = mapped();
    memory.write_u64(entry_at(1), PAGE | P | 1 << 51);
    assert_eq!(try_walk(&memory, &long(0, 0), Access::WRITE), Some(0b1011));
}

/// S41: a violation of rights above does not hide what is not present, or reserved, below.
#[test]
fn rights_are_judged_last() {
    let mut memory = mapped();
    memory.write_u64(entry_at(4), 0x3000 | P);
    memory.write_u64(entry_at(1), 0);
    let mut state = long(0, 0);
    state.cpl = 3;
    assert_eq!(try_walk(&memory, &state, Access::WRITE), Some(0b0110));
    memory.write_u64(entry_at(1), PAGE | P | 1 << 51);
    assert_eq!(try_walk(&memory, &state, Access::WRITE), Some(0b1111));
    memory.write_u64(entry_at(1), PAGE | P | U | W);
    assert_eq!(try_walk(&memory, &state, Access::WRITE), Some(0b0111));
}

/// S41: with EFER.NX clear bit 63 is reserved, not ignored, and fetches are not denied.
#[test]
fn no_execute_is_reserved_without_nx() {
    for level in 1..=4 {
        let mut memory = mapped();
        let below = if level == 1 { PAGE } else { table(level - 1) };
        memory.write_u64(entry_at(level), below | P | W | U | XD);
        assert_eq!(try_walk(&memory, &long(0, 0), Access::READ), Some(0b1001));
        assert_eq!(try_walk(&memory, &long(0, NX), Access::READ), None);
        assert_eq!(try_walk(&memory, &long(0, NX), Access::FETCH), Some(0b1_0001));
    }
}

/// S47: the error codes that guests read.
#[test]
fn error_codes() {
    let user = |cr4| {
        let mut state = long(cr4, NX);
        state.cpl = 3;
        state
    };
    let mut supervisor_page = mapped();
    supervisor_page.write_u64(entry_at(1), PAGE | P);
    let user_page = mapped();
    let mut absent = mapped();
    absent.write_u64(entry_at(2), 0);

    assert_eq!(try_walk(&absent, &user(0), Access::READ), Some(0b0_0100));
    assert_eq!(try_walk(&absent, &user(0), Access::WRITE), Some(0b0_0110));
    assert_eq!(try_walk(&absent, &user(0), Access::FETCH), Some(0b1_0100));
    assert_eq!(try_walk(&absent, &long(0, 0), Access::FETCH), Some(0), "neither NX nor SMEP");
    assert_eq!(try_walk(&absent, &long(SMEP, 0), Access::FETCH), Some(0b1_0000));
    assert_eq!(try_walk(&absent, &user(0), Access::WRITE.implicit()), Some(0b0_0010));
    assert_eq!(try_walk(&supervisor_page, &user(0), Access::READ), Some(0b0_0101));
    assert_eq!(try_walk(&supervisor_page, &user(0), Access::READ.implicit()), None);
    assert_eq!(try_walk(&supervisor_page, &long(0, 0), Access::WRITE), Some(0b0_0011));
    assert_eq!(try_walk(&user_page, &long(SMEP, 0), Access::FETCH), Some(0b1_0001));
    assert_eq!(try_walk(&user_page, &long(SMAP, 0), Access::READ), Some(0b0_0001));
    let mut alignment_check = long(SMAP, 0);
    alignment_check.rflags = 1 << 18;
    assert_eq!(try_walk(&user_page, &alignment_check, Access::READ), None);
    assert_eq!(try_walk(&user_page, &alignment_check, Access::READ.implicit()), Some(0b0_0001));
}

/// S28: keys of user pages, together with other causes.
#[test]
fn protection_keys() {
    let mut memory = mapped();
    memory.write_u64(entry_at(1), PAGE | P | U | 9 << 59);
    let mut state = long(PKE, 0);
    state.cpl = 3;
    state.pkru = 0b01 << 18;
    assert_eq!(try_walk(&memory, &state, Access::READ), Some(0b10_0101));
    assert_eq!(try_walk(&memory, &state, Access::WRITE), Some(0b10_0111), "also read-only");
    assert_eq!(try_walk(&memory, &state, Access::FETCH), None);
    state.pkru = 0b10 << 18;
    assert_eq!(try_walk(&memory, &state, Access::READ), None);
    state.cr4 &= !PKE;
    state.pkru = !0;
    assert_eq!(try_walk(&memory, &state, Access::READ), None);
}

/// S38, S47: a table that cannot be read is a table of entries that are not present.
#[test]
fn unreadable_tables_are_not_present() {
    let mut memory = mapped();
    memory.write_u64(entry_at(3), 0x70_0000 | P | W | U);
    assert_eq!(try_walk(&memory, &long(0, NX), Access::WRITE), Some(0b0010));
    let mut state = long(0, NX);
    state.cr3 = 0x70_0000;
    assert_eq!(try_walk(&memory, &state, Access::FETCH), Some(0b1_0000));
}

#[test]
fn impossible_addresses_are_not_walked() {
    let memory = mapped();
    for (state, gva) in [
        (long(0, 0), 0x0000_8000_0000_0000),
        (long(LA57, 0), 0x0100_0000_0000_0000),
        (PagingState::default(), 0x1_0000_0000),
        (PagingState::new(PG, 0, 0, 0, 40), 0x1_0000_0000),
    ] {
        let gva = Gva::new(gva);
        assert_eq!(walk(&state, &memory, gva, Access::READ), Err(WalkError::NonCanonical(gva)));
    }
    assert!(memory.log.borrow().is_empty());
}

/// S20, S53.
#[test]
fn paging_off_is_identity() {
    let memory = FakeMemory::default();
    let mut state = PagingState::new(WP, 0x4000, SMEP | SMAP | PAE, NX, 40);
    state.cpl = 3;
    for access in [Access::READ, Access::WRITE, Access::FETCH] {
        let found = walk(&state, &memory, Gva::new(0xFEE0_0030), access).unwrap();
        assert_eq!(found.gpa, Gpa::new(0xFEE0_0030));
        assert_eq!((found.rights, found.path.len()), (Rights::all(), 0));
    }
}

/// S21: 32-bit paging with and without PSE.
#[test]
fn two_levels() {
    let mut memory = FakeMemory::default();
    let gva = Gva::new(0xC0DE_F123);
    memory.write_u32(0x8000 + (0xC0DE_F123 >> 22) * 4, 0x2000 | 0b111);
    memory.write_u32(0x2000 + (0xDE_F123 >> 12 & 1023) * 4, 0xABCD_E000 | 0b101);
    let state = PagingState::new(PG | WP, 0x8FFF, 0, NX, 40);
    let found = walk(&state, &memory, gva, Access::READ).unwrap();
    assert_eq!(found.gpa, Gpa::new(0xABCD_E123));
    assert_eq!(found.rights, Rights::USER | Rights::EXECUTE);
    assert_eq!(found.path.iter().map(|step| step.level).collect::<Vec<_>>(), [Level::L2, Level::L1]);
    let sizes: Vec<u8> = memory.log.borrow().iter().map(|(_, bytes)| *bytes).collect();
    assert_eq!(sizes, [4, 4]);

    // Bit 7 of the directory entry: ignored without PSE, a page of 4 MiB at 0xE_0040_0000 with it.
    memory.write_u32(0x8000 + (0xC0DE_F123 >> 22) * 4, 0x0041_C000 | 0b1000_0111);
    memory.write_u32(0x0041_C000 + (0xDE_F123 >> 12 & 1023) * 4, 0x5000 | 0b1);
    let found = walk(&state, &memory, gva, Access::READ).unwrap();
    assert_eq!((found.gpa, found.page_bytes), (Gpa::new(0x5123), 4096));
    let state = PagingState { cr4: PSE, ..state };
    let found = walk(&state, &memory, gva, Access::READ).unwrap();
    assert_eq!((found.gpa, found.page_bytes), (Gpa::new(0xE_0040_0000 | 0xC0DE_F123 & 0x3F_FFFF), 4 << 20));
    memory.write_u32(0x8000 + (0xC0DE_F123 >> 22) * 4, 0x0042_0000 | 0b1000_0111);
    let reserved = WalkError::Guest(GuestFault {
        error_code: PageFaultCode::PRESENT | PageFaultCode::RESERVED | PageFaultCode::WRITE,
        gva,
    });
    assert_eq!(walk(&state, &memory, gva, Access::WRITE), Err(reserved));
}

fn pae() -> (FakeMemory, PagingState, Gva) {
    let gva = Gva::new(0x8060_1234);
    let mut memory = FakeMemory::default();
    memory.write_u64(0x3020 + 2 * 8, 0x2000 | P);
    memory.write_u64(0x2000 + 3 * 8, 0x1000 | P | W);
    memory.write_u64(0x1000 + 8, 0xF_0000_0000 | P | W | U);
    (memory, PagingState::new(PG | WP, 0x3020, PAE, NX, 36), gva)
}

/// S22, S37: the walk uses the entries that were loaded, whatever memory holds now; they have no rights.
#[test]
fn pae_walks_from_the_cached_entries() {
    let (mut memory, mut state, gva) = pae();
    let absent = WalkError::Guest(GuestFault { error_code: PageFaultCode::empty(), gva });
    assert_eq!(walk(&state, &memory, gva, Access::READ), Err(absent), "nothing was loaded");
    state.pdptrs = load_pdptes(&state, &memory).unwrap();
    assert_eq!(state.pdptrs, [0, 0, 0x2001, 0]);
    memory.write_u64(0x3020 + 2 * 8, 0);
    let found = walk(&state, &memory, gva, Access::WRITE).unwrap();
    assert_eq!(found.gpa, Gpa::new(0xF_0000_0234));
    assert_eq!(found.rights, Rights::WRITE | Rights::EXECUTE);
    assert_eq!(found.path.len(), 2);

    // AMD under nested paging: memory counts.
    state.pdptrs_in_memory = true;
    assert_eq!(walk(&state, &memory, gva, Access::READ), Err(absent));
    memory.write_u64(0x3020 + 2 * 8, 0x2000 | P | W);
    let reserved = PageFaultCode::PRESENT | PageFaultCode::RESERVED;
    let reserved = WalkError::Guest(GuestFault { error_code: reserved, gva });
    assert_eq!(walk(&state, &memory, gva, Access::READ), Err(reserved));
}

/// S22, S56: what a load refuses.
#[test]
fn loading_pdptes_checks_present_entries() {
    let (mut memory, state, _) = pae();
    memory.write_u64(0x3020 + 8, XD | 0x1FE);
    assert!(load_pdptes(&state, &memory).is_ok(), "not present: nothing is reserved");
    for bit in [1, 2, 5, 8, 36, 51, 52, 62, 63] {
        let entry = P | 1 << bit;
        memory.write_u64(0x3020 + 3 * 8, entry);
        assert_eq!(load_pdptes(&state, &memory), Err(PdpteError::Reserved { index: 3, entry }));
    }
    let state = PagingState { cr3: 0x5_0000, ..state };
    let missing = PdpteError::Unreadable { gpa: Gpa::new(0x5_0000) };
    assert_eq!(load_pdptes(&state, &memory), Err(missing));
}

/// S54: page by page; the later pages' faults are not the first's.
#[test]
fn fetch_crosses_pages() {
    let mut memory = mapped();
    let start = Gva::new(GVA & !0xFFF | 0xFFA);
    memory.write(PAGE | 0xFFA, &[1, 2, 3, 4, 5, 6]);
    let mut bytes = [0; 15];
    let state = long(0, NX);
    assert_eq!(fetch(&state, &memory, start, &mut bytes), Ok(6), "the second page is not mapped");
    assert_eq!(bytes[..6], [1, 2, 3, 4, 5, 6]);

    let second = entry_at(1) + 8;
    memory.write_u64(second, 0x3_0000 | P | U);
    assert_eq!(fetch(&state, &memory, start, &mut bytes), Ok(6), "mapped, but no memory");
    memory.write(0x3_0000, &[7, 8, 9, 10, 11, 12, 13, 14, 15]);
    assert_eq!(fetch(&state, &memory, start, &mut bytes), Ok(15));
    assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
    memory.write_u64(second, 0x3_0000 | P | U | XD);
    assert_eq!(fetch(&state, &memory, start, &mut bytes), Ok(6), "not to be executed");
    assert_eq!(fetch(&state, &memory, start, &mut bytes[..6]), Ok(6));
    assert_eq!(fetch(&state, &memory, start, &mut []), Ok(0));

    memory.write_u64(entry_at(1), 0x7_0000 | P | U);
    let missing = FetchError::Unreadable(Gpa::new(0x7_0FFA));
    assert_eq!(fetch(&state, &memory, start, &mut bytes), Err(missing));
    memory.write_u64(entry_at(1), 0);
    let fault = GuestFault { error_code: PageFaultCode::FETCH, gva: start };
    let fault = FetchError::Walk(WalkError::Guest(fault));
    assert_eq!(fetch(&state, &memory, start, &mut bytes), Err(fault));
}

/// Outside long mode the byte after the last of 4 GiB is the first.
#[test]
fn fetch_wraps_by_mode() {
    let mut memory = FakeMemory::default();
    memory.write(0xFFFF_FFFE, &[1, 2]);
    memory.write(0, &[3, 4]);
    let mut bytes = [0; 4];
    let state = PagingState::default();
    assert_eq!(fetch(&state, &memory, Gva::new(0xFFFF_FFFE), &mut bytes), Ok(4));
    assert_eq!(bytes, [1, 2, 3, 4]);

    // In long mode the byte after the lower half is not canonical.
    let mut memory = FakeMemory::default();
    for level in 2..=4 {
        let index = if level == 4 { 255 } else { 511 };
        memory.write_u64(table(level) + index * 8, table(level - 1) | P);
    }
    memory.write_u64(0x1000 + 511 * 8, PAGE | P);
    memory.write(PAGE | 0xFFE, &[5, 6]);
    assert_eq!(fetch(&long(0, 0), &memory, Gva::new(0x7FFF_FFFF_FFFE), &mut bytes), Ok(2));
    assert_eq!(bytes[..2], [5, 6]);
}
