//! Walks compared with the manuals' procedure, written out once more: any registers, any tables, any access.

use super::fake::FakeMemory;
use super::{TableMemory, WalkError, walk};
use crate::addr::{Gpa, Gva};
use crate::arch::paging::{Access, AccessKind, PagingMode, PagingState};
use core::cell::RefCell;
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use std::collections::BTreeMap;
use std::format;
use std::string::String;
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

/// The manuals' procedure for translating an address, written out once more and without regard to speed: the
/// guest-physical address and the size of the page, or the error code.
fn oracle(memory: &FakeMemory, state: &PagingState, gva: u64, kind: AccessKind) -> Result<(u64, u64), u32> {
    let (write, fetch) = (kind == AccessKind::Write, kind == AccessKind::Fetch);
    let mode = state.role().mode;
    let (top, index_bits) = match mode {
        PagingMode::Off => return Ok((gva, 4096)),
        PagingMode::Bits32 => (2, 10),
        PagingMode::Pae => (3, 9),
        PagingMode::Levels4 => (4, 9),
        PagingMode::Levels5 => (5, 9),
    };
    let nx = state.efer & NX != 0;
    let (smep, smap) = (state.cr4 & SMEP != 0, state.cr4 & SMAP != 0);
    let user = state.cpl == 3;
    let wide = mode != PagingMode::Bits32;
    let base = u32::from(write) << 1 | u32::from(user) << 2 | u32::from(fetch && ((nx && wide) || smep)) << 4;

    let mut table = match mode {
        PagingMode::Bits32 => state.cr3 & 0xFFFF_F000,
        PagingMode::Pae => state.cr3 & 0xFFFF_FFE0,
        _ => state.cr3 & 0x000F_FFFF_FFFF_F000,
    };
    let (mut writable, mut user_page, mut executable) = (true, true, true);
    for level in (1..=top).rev() {
        let shift = 12 + index_bits * (level - 1);
        let pointer = mode == PagingMode::Pae && level == 3;
        let index = gva >> shift & if pointer { 3 } else { (1 << index_bits) - 1 };
        let entry = if pointer && !state.pdptrs_in_memory {
            Some(state.pdptrs[usize::try_from(index).expect("below 4")])
        } else if wide {
            memory.read_u64(Gpa::new(table + index * 8)).ok()
        } else {
            memory.read_u32(Gpa::new(table + index * 4)).map(u64::from).ok()
        };
        let Some(entry) = entry.filter(|entry| entry & 1 != 0) else { return Err(base) };
        let large_bit = entry >> 7 & 1 == 1;
        let leaf = level == 1
            || match (mode, level) {
                (PagingMode::Bits32, 2) => large_bit && state.cr4 & PSE != 0,
                (_, 2 | 3) => large_bit && !pointer,
                _ => false,
            };
        for bit in 0..64 {
            let beyond = (u32::from(state.max_phys_bits)..52).contains(&bit);
            let reserved = match mode {
                PagingMode::Bits32 => level == 2 && leaf && (17..22).contains(&bit),
                _ if pointer => {
                    beyond || (52..=63).contains(&bit) || (5..9).contains(&bit) || bit == 1 || bit == 2
                }
                _ => {
                    beyond
                        || (bit == 63 && !nx)
                        || (mode == PagingMode::Pae && (52..63).contains(&bit))
                        || (leaf && level > 1 && (13..shift).contains(&bit))
                        || (bit == 7 && (level > 3 || (level == 3 && !state.has_1g_pages)))
                        || (bit == 8 && level > 3 && state.amd_compatible)
                }
            };
            if reserved && entry >> bit & 1 == 1 {
                return Err(base | 0b1001);
            }
        }
        if !pointer {
            writable &= entry & 2 != 0;
            user_page &= entry & 4 != 0;
            executable &= !wide || entry >> 63 == 0;
        }
        if !leaf {
            table = entry & 0x000F_FFFF_FFFF_F000;
            continue;
        }
        let rights = if user { user_page } else { true }
            && (!write || writable || (!user && state.cr0 & WP == 0))
            && (!fetch || executable || !nx)
            && !(fetch && smep && !user && user_page)
            && !(!fetch && smap && !user && user_page && state.rflags >> 18 & 1 == 0);
        let key = state.pkru >> (2 * (entry >> 59 & 15)) & 3;
        let key_applies = state.cr4 & PKE != 0 && mode != PagingMode::Pae && wide && user_page && !fetch;
        let by_key =
            key_applies && (key & 1 == 1 || (key & 2 == 2 && write && (user || state.cr0 & WP != 0)));
        if by_key {
            return Err(base | 0b10_0001);
        }
        if !rights {
            return Err(base | 1);
        }
        let bytes = 1 << shift;
        let mut address = entry & 0x000F_FFFF_FFFF_F000 & !(bytes - 1);
        if !wide && level == 2 {
            address |= (entry >> 13 & 15) << 32;
        }
        return Ok((address | gva & (bytes - 1), bytes));
    }
    unreachable!("level 1 is a leaf")
}

/// Entries that are mostly right: a table in low memory, rights mostly given, one stray bit now and then.
fn entry() -> impl Strategy<Value = u64> {
    let bit = prop_oneof![0_u32..64, 13_u32..22];
    let stray = prop_oneof![3 => Just(0_u64), 1 => bit.prop_map(|bit| 1 << bit)];
    let rights = prop_oneof![
        4 => Just(P | W | U),
        1 => 0_u64..8,
        1 => (0_u64..4).prop_map(|bits| bits << 1 | P),
    ];
    (0_u64..8, rights, prop::bool::weighted(0.2), prop::bool::weighted(0.1), 0_u64..16, stray).prop_map(
        |(frame, rights, large, xd, key, stray)| {
            let address = if large { frame << 30 } else { frame << 12 };
            (address | rights | (u64::from(large) << 7) | (u64::from(xd) << 63) | (key << 59)) ^ stray
        },
    )
}

/// Eight pages of tables whose entries lead into each other; few distinct entries, at all places.
fn tables(entries: &[u64], narrow: bool) -> FakeMemory {
    let mut memory = FakeMemory::default();
    let mut pick = entries.iter().cycle();
    for page in 1..8 {
        for place in 0..512 {
            let at = page * 0x1000 + place * 8;
            let mut next = || *pick.next().expect("endless");
            if narrow {
                memory.write(at, &next().to_le_bytes()[..4]);
                memory.write(at + 4, &next().to_le_bytes()[..4]);
            } else {
                memory.write_u64(at, next());
            }
        }
    }
    memory
}

/// One question.
#[derive(Clone, Debug)]
struct Case {
    entries: Vec<u64>,
    state: PagingState,
    gva: Gva,
    access: Access,
}

fn case() -> impl Strategy<Value = Case> {
    let pointer = prop_oneof![3 => (1_u64..8).prop_map(|frame| (frame << 12) | P), 1 => entry()];
    (
        prop::collection::vec(entry(), 1..24),
        prop_oneof![1 => Just(0_usize), 9 => 1_usize..5],
        any::<u32>(),
        prop::array::uniform4(pointer),
        1_u64..8,
        any::<u64>(),
        any::<u32>(),
        32_u8..=52,
    )
        .prop_map(|(mut entries, mode, bits, pdptrs, root, gva, pkru, max_phys_bits)| {
            let bit = |n: u32| bits >> n & 1 == 1;
            let flag = |n: u32, value: u64| if bit(n) { value } else { 0 };
            let (pg, mode_cr4, lma) =
                [(0, 0, 0), (PG, 0, 0), (PG, PAE, 0), (PG, PAE, LMA), (PG, PAE | LA57, LMA)][mode];
            let cr4 = mode_cr4 | flag(0, PSE) | flag(1, SMEP) | flag(2, SMAP) | flag(3, PKE);
            let cr0 = pg | flag(4, WP);
            let mut state = PagingState::new(cr0, root << 12, cr4, lma | flag(5, NX), max_phys_bits);
            state.pdptrs = pdptrs;
            state.pdptrs_in_memory = bit(6);
            state.cpl = if bit(7) { 3 } else { 0 };
            state.rflags = flag(8, 1 << 18);
            state.pkru = pkru;
            state.has_1g_pages = bit(9);
            state.amd_compatible = bit(10);
            let access = match bits >> 11 & 3 {
                0 => Access::FETCH,
                1 => Access::WRITE,
                _ => Access::READ,
            };
            let gva = match mode {
                0..3 => gva & 0xFFFF_FFFF,
                3 => ((gva << 16).cast_signed() >> 16).cast_unsigned(),
                _ => ((gva << 7).cast_signed() >> 7).cast_unsigned(),
            };
            if mode == 2 {
                // Keys are reserved bits under PAE: one entry with a key is enough.
                entries.iter_mut().skip(1).for_each(|entry| *entry &= !(15 << 59));
            }
            Case { entries, state, gva: Gva::new(gva), access }
        })
}

/// The kind of an answer, for the count of what was seen.
fn class(answer: Result<(u64, u64), u32>) -> String {
    match answer {
        Ok((_, bytes)) => format!("page of {} KiB", bytes >> 10),
        Err(code) if code & 1 == 0 => "not present".into(),
        Err(code) if code & 8 != 0 => "reserved".into(),
        Err(code) if code & 32 != 0 => "key".into(),
        Err(_) => "rights".into(),
    }
}

#[test]
fn walks_equal_the_oracle() {
    let seen = RefCell::new(BTreeMap::<(String, String), u32>::new());
    let config = ProptestConfig { cases: 16384, failure_persistence: None, ..<_>::default() };
    // Always the same cases, so that what was seen can be counted on.
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    runner
        .run(&case(), |case| {
            let narrow = case.state.role().mode == PagingMode::Bits32;
            let memory = tables(&case.entries, narrow);
            let expected = oracle(&memory, &case.state, case.gva.raw(), case.access.kind());
            let found = match walk(&case.state, &memory, case.gva, case.access) {
                Ok(found) => Ok((found.gpa.raw(), found.page_bytes)),
                Err(WalkError::Guest(fault)) => Err(fault.error_code.bits()),
                Err(other) => return Err(TestCaseError::fail(format!("{other}"))),
            };
            let mode = format!("{:?}", case.state.role().mode);
            *seen.borrow_mut().entry((mode, class(expected))).or_default() += 1;
            prop_assert_eq!(found, expected);
            Ok(())
        })
        .unwrap();

    let seen = seen.into_inner();
    let common = ["not present", "reserved", "rights", "page of 4 KiB"];
    let expected = [
        ("Bits32", &["page of 4096 KiB"][..]),
        ("Pae", &["page of 2048 KiB"]),
        ("Levels4", &["page of 2048 KiB", "page of 1048576 KiB", "key"]),
        ("Levels5", &["page of 2048 KiB", "page of 1048576 KiB", "key"]),
    ];
    for (mode, more) in expected {
        for class in common.iter().chain(more) {
            let count = seen.get(&(mode.into(), (*class).into())).copied().unwrap_or(0);
            assert!(count >= 20, "{mode}, {class}: only {count} of {seen:#?}");
        }
    }
}
