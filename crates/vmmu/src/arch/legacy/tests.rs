//! Every format, level by level: what is encoded is decoded, every reserved bit is seen, no other is.

use super::*;
use proptest::prelude::*;
use std::format;

const LEVELS: [Level; 5] = [Level::L1, Level::L2, Level::L3, Level::L4, Level::L5];

fn role(mode: PagingMode, pse: bool, nx: bool) -> CpuRole {
    let (cr4, efer) = match mode {
        PagingMode::Off | PagingMode::Bits32 => (0, 0),
        PagingMode::Pae => (1 << 5, 0),
        PagingMode::Levels4 => (1 << 5, 1 << 10),
        PagingMode::Levels5 => (1 << 5 | 1 << 12, 1 << 10),
    };
    let (cr4, efer) = (cr4 | u64::from(pse) << 4, efer | u64::from(nx) << 11);
    PagingState::new(1 << 31, 0, cr4, efer, 52).role()
}

/// One bit at a time, over a present entry: which of them make it [`GuestEntry::Reserved`].
fn reserved_bits(format: &impl GuestFormat, base: u64, level: Level, width: u32) -> u64 {
    assert_ne!(format.decode(base, level), GuestEntry::Reserved);
    (0..width)
        .map(|bit| 1 << bit)
        .filter(|bit| format.decode(base | bit, level) == GuestEntry::Reserved)
        .sum()
}

/// S30 and S31, written out as the manuals' tables have them.
fn expected_reserved(mode: PagingMode, level: Level, large: bool, nx: bool, state: &PagingState) -> u64 {
    let mut reserved = 0;
    for bit in 0..64_u32 {
        let beyond_address = (u32::from(state.max_phys_bits)..52).contains(&bit);
        let ignored_in_long_mode = (52..63).contains(&bit);
        let no_execute = bit == 63;
        let page_offset = match (large, level.number()) {
            (true, 2) => (13..21).contains(&bit),
            (true, 3) => (13..30).contains(&bit),
            _ => false,
        };
        let upper = level >= Level::L4 && (bit == 7 || (bit == 8 && state.amd_compatible));
        let unavailable_1g = level == Level::L3 && bit == 7 && !state.has_1g_pages;
        if beyond_address
            || (ignored_in_long_mode && mode == PagingMode::Pae)
            || (no_execute && !nx)
            || page_offset
            || upper
            || unavailable_1g
        {
            reserved |= 1 << bit;
        }
    }
    reserved
}

#[test]
fn reserved_bits_of_8_byte_entries() {
    for mode in [PagingMode::Pae, PagingMode::Levels4, PagingMode::Levels5] {
        let levels = match mode {
            PagingMode::Pae => &LEVELS[..2],
            PagingMode::Levels4 => &LEVELS[..4],
            _ => &LEVELS[..],
        };
        for options in 0..8_u8 {
            let nx = options & 1 != 0;
            for max_phys_bits in [32, 36, 40, 46, 51, 52, 60] {
                let mut state = PagingState::new(0, 0, 0, 0, max_phys_bits);
                state.has_1g_pages = options & 2 != 0;
                state.amd_compatible = options & 4 != 0;
                let format = Legacy64::new(&role(mode, false, nx), &state);
                for &level in levels {
                    let expected = expected_reserved(mode, level, false, nx, &state);
                    let context = format!("{mode:?} {level:?} {max_phys_bits} {options}");
                    // Bit 7 set alone selects the other row: looked at below.
                    let found = reserved_bits(&format, PRESENT, level, 64);
                    assert_eq!(found & !PAGE_SIZE, expected & !PAGE_SIZE, "{context}");
                    if expected & PAGE_SIZE != 0 {
                        assert_eq!(found & PAGE_SIZE, PAGE_SIZE, "{context}");
                        continue;
                    }
                    let expected = expected_reserved(mode, level, true, nx, &state);
                    let found = reserved_bits(&format, PRESENT | PAGE_SIZE, level, 64);
                    assert_eq!(found, expected, "{context}, bit 7 set");
                }
            }
        }
    }
}

/// S21, S31: only a 4 MiB page has reserved bits, and only with PSE.
#[test]
fn reserved_bits_of_4_byte_entries() {
    let with = Legacy32::new(&role(PagingMode::Bits32, true, true));
    let without = Legacy32::new(&role(PagingMode::Bits32, false, true));
    for base in [PRESENT, PRESENT | PAGE_SIZE] {
        assert_eq!(reserved_bits(&with, base, Level::L1, 32), 0);
        assert_eq!(reserved_bits(&without, base, Level::L1, 32), 0);
        assert_eq!(reserved_bits(&without, base, Level::L2, 32), 0);
    }
    assert_eq!(reserved_bits(&with, PRESENT, Level::L2, 32), 0);
    assert_eq!(reserved_bits(&with, PRESENT | PAGE_SIZE, Level::L2, 32), 0x003E_0000);
}

/// S22.
#[test]
fn reserved_bits_of_pdptes() {
    for max_phys_bits in [32_u8, 36, 40, 52] {
        let expected: u64 = (0..64)
            .filter(|bit| matches!(bit, 1 | 2 | 5..=8) || *bit >= u32::from(max_phys_bits))
            .map(|bit| 1_u64 << bit)
            .sum();
        for bit in 0..64 {
            let decoded = pdpte::decode(PRESENT | 1 << bit, max_phys_bits);
            assert_eq!(decoded == GuestEntry::Reserved, expected >> bit & 1 == 1, "bit {bit}");
            let absent = pdpte::decode((1 << bit) & !PRESENT, max_phys_bits);
            assert_eq!(absent, GuestEntry::NotPresent);
        }
    }
    let at = GuestEntry::Table { at: Gpa::new(0x1_2345_6000), rights: Rights::all() };
    assert_eq!(pdpte::decode(0x1_2345_6E19, 36), at, "PWT, PCD and the ignored bits");
    assert_eq!(pdpte::root(0x1234_5678_9ABC_DEF3), Gpa::new(0x9ABC_DEE0));
}

/// S32's rule for all formats: an entry that is not present is never reserved.
#[test]
fn not_present_outranks_reserved() {
    let state = PagingState::new(0, 0, 0, 0, 32);
    for level in LEVELS {
        for mode in [PagingMode::Pae, PagingMode::Levels4, PagingMode::Levels5] {
            let format = Legacy64::new(&role(mode, false, false), &state);
            assert_eq!(format.decode(!PRESENT, level), GuestEntry::NotPresent);
        }
    }
    let format = Legacy32::new(&role(PagingMode::Bits32, true, false));
    assert_eq!(format.decode(0xFFFF_FFFE, Level::L2), GuestEntry::NotPresent);
}

/// Bits that software may set as it likes in a present entry of every format.
const IGNORED: u64 = 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | bits(9, 11);

proptest! {
    /// What is encoded is decoded, at every level and size of 8-byte entries.
    #[test]
    fn eight_byte_entries_round_trip(
        frame in 0_u64..1 << 40,
        level in 0_usize..5,
        large in any::<bool>(),
        rights in 0_u8..8,
        key in 0_u8..16,
        noise in any::<u64>(),
        five in any::<bool>(),
        pae in any::<bool>(),
        nx in any::<bool>(),
    ) {
        let mode = if pae { PagingMode::Pae } else if five { PagingMode::Levels5 } else { PagingMode::Levels4 };
        let level = LEVELS[if pae { level % 2 } else { level }];
        let large = large && matches!(level.number(), 2 | 3);
        let rights = Rights::from_bits_truncate(rights) | if nx { Rights::empty() } else { Rights::EXECUTE };
        let format = Legacy64::new(&role(mode, false, nx), &PagingState::new(0, 0, 0, 0, 52));

        let span = if large || level == Level::L1 { 12 + 9 * (u32::from(level.number()) - 1) } else { 12 };
        let address = frame << 12 & (u64::MAX << span) & bits(12, 51);
        let mut raw = address | PRESENT | noise & IGNORED;
        raw |= u64::from(rights.contains(Rights::WRITE)) << 1;
        raw |= u64::from(rights.contains(Rights::USER)) << 2;
        raw |= u64::from(!rights.contains(Rights::EXECUTE)) << 63;
        raw |= u64::from(large) << 7;
        if level == Level::L1 {
            raw |= noise & (1 << 7 | 1 << 8); // PAT, global
        } else if large {
            raw |= noise & (1 << 8 | 1 << 12); // global, PAT
        }
        let key = if pae { 0 } else { key };
        if !pae {
            raw |= noise & bits(52, 58) | u64::from(key) << 59;
        }

        let at = Gpa::new(address);
        let expected = if large || level == Level::L1 {
            GuestEntry::Page { at, rights, key }
        } else {
            GuestEntry::Table { at, rights }
        };
        prop_assert_eq!(format.decode(raw, level), expected);
    }

    /// The same for 4-byte entries, where every right includes execution.
    #[test]
    fn four_byte_entries_round_trip(
        frame in 0_u64..1 << 24,
        directory in any::<bool>(),
        page_size in any::<bool>(),
        rights in 0_u8..8,
        noise in any::<u64>(),
        pse in any::<bool>(),
    ) {
        let level = if directory { Level::L2 } else { Level::L1 };
        let large = directory && page_size && pse;
        let rights = Rights::from_bits_truncate(rights) | Rights::EXECUTE;
        let format = Legacy32::new(&role(PagingMode::Bits32, pse, true));

        let address = if large { frame << 12 & bits(22, 35) } else { frame << 12 & bits(12, 31) };
        let mut raw = if large { address & bits(22, 31) | address >> 32 << 13 } else { address };
        raw |= PRESENT | noise & (IGNORED | BIT_8) | u64::from(page_size) << 7;
        raw |= u64::from(rights.contains(Rights::WRITE)) << 1;
        raw |= u64::from(rights.contains(Rights::USER)) << 2;
        if large {
            raw |= noise & 1 << 12; // PAT
        }
        let at = Gpa::new(address);
        let expected = if large || !directory {
            GuestEntry::Page { at, rights, key: 0 }
        } else {
            GuestEntry::Table { at, rights }
        };
        prop_assert_eq!(format.decode(raw, level), expected);
    }

    /// The entry that covers an address is at the place that the address's own bits name.
    #[test]
    fn entries_are_found_by_index(linear in any::<u64>(), table in 0_u64..1 << 40) {
        let table = Gpa::new(table << 12);
        for level in LEVELS {
            let shift = 12 + 9 * (u32::from(level.number()) - 1);
            let expected = table.raw() + (linear >> shift) % 512 * 8;
            prop_assert_eq!(Legacy64::entry_address(table, linear, level).raw(), expected);
        }
        for (level, shift) in [(Level::L1, 12), (Level::L2, 22)] {
            let expected = table.raw() + (linear >> shift) % 1024 * 4;
            prop_assert_eq!(Legacy32::entry_address(table, linear, level).raw(), expected);
        }
    }
}
