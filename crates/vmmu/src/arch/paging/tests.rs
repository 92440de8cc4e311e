//! Paging modes and permissions compared with oracles written from the manuals' sentences.

use super::*;
use std::vec::Vec;

/// Every subset of `bits`, united.
fn subsets(bits: &[u64]) -> Vec<u64> {
    (0..1_u32 << bits.len())
        .map(|chosen| (0..bits.len()).filter(|bit| chosen >> bit & 1 != 0).map(|bit| bits[bit]).sum())
        .collect()
}

/// S2, S3, S4: every combination of the ten bits, and the bits that must not matter.
#[test]
fn the_role_is_the_truth_table() {
    let other_cr0 = !(CR0_PG | CR0_WP);
    let other_cr4 = !(CR4_PSE | CR4_PAE | CR4_LA57 | CR4_SMEP | CR4_SMAP | CR4_PKE);
    let other_efer = !(EFER_NX | EFER_LMA);
    for cr0 in subsets(&[CR0_PG, CR0_WP]) {
        for cr4 in subsets(&[CR4_PSE, CR4_PAE, CR4_LA57, CR4_SMEP, CR4_SMAP, CR4_PKE]) {
            for efer in subsets(&[EFER_NX, EFER_LMA]) {
                let state = PagingState::new(cr0, 0, cr4, efer, 40);
                let role = state.role();
                let noisy = PagingState::new(cr0 | other_cr0, !0, cr4 | other_cr4, efer | other_efer, 52);
                assert_eq!(noisy.role(), role, "cr0 {cr0:#x} cr4 {cr4:#x} efer {efer:#x}");

                let on = cr0 >> 31 & 1 == 1;
                let pae = cr4 >> 5 & 1 == 1;
                let long = efer >> 10 & 1 == 1 && pae;
                let levels = match (on, long, pae) {
                    (false, ..) => PagingMode::Off,
                    (true, true, _) if cr4 >> 12 & 1 == 1 => PagingMode::Levels5,
                    (true, true, _) => PagingMode::Levels4,
                    (true, false, true) => PagingMode::Pae,
                    (true, false, false) => PagingMode::Bits32,
                };
                assert_eq!(role.mode, levels);
                assert_eq!(role.wp, on && cr0 >> 16 & 1 == 1);
                assert_eq!(role.nx, on && efer >> 11 & 1 == 1);
                assert_eq!(role.pse, on && cr4 >> 4 & 1 == 1);
                assert_eq!(role.smep, on && cr4 >> 20 & 1 == 1);
                assert_eq!(role.smap, on && cr4 >> 21 & 1 == 1);
                assert_eq!(role.pke, on && long && cr4 >> 22 & 1 == 1);
                assert_eq!(state.is_impossible(), on && !pae && efer >> 10 & 1 == 1);
            }
        }
    }
}

/// What the processor is asked in one case of the permission table.
#[derive(Clone, Copy, Debug)]
struct Case {
    wp: bool,
    smep: bool,
    smap: bool,
    nx: bool,
    pke: bool,
    kind: AccessKind,
    cpl: u8,
    implicit: bool,
    ac: bool,
    rights: Rights,
    access_disabled: bool,
    write_disabled: bool,
}

/// Intel SDM volume 3, 4.6.1 and 4.6.2, sentence by sentence: why the access is not allowed, by rights, by key.
fn oracle(case: Case) -> (bool, bool) {
    let user_page = case.rights.contains(Rights::USER);
    let writable = case.rights.contains(Rights::WRITE);
    let executable = case.rights.contains(Rights::EXECUTE);
    let user_access = case.cpl == 3 && !case.implicit;
    let data_denied_by_key = user_page
        && case.pke
        && match case.kind {
            AccessKind::Fetch => false,
            AccessKind::Read => case.access_disabled,
            AccessKind::Write => case.access_disabled || (case.write_disabled && (user_access || case.wp)),
        };
    let allowed = match (user_access, case.kind) {
        // "Data reads from user-mode addresses": supervisor-mode accesses depend on CR4.SMAP; if it is 1, on
        // EFLAGS.AC for explicit ones, and implicit ones are not allowed.
        (false, AccessKind::Read) => !user_page || !case.smap || (case.ac && !case.implicit),
        // Writes likewise, and with CR0.WP = 1 only to pages that every entry makes writable.
        (false, AccessKind::Write) => {
            (!user_page || !case.smap || (case.ac && !case.implicit)) && (!case.wp || writable)
        }
        // Fetches from user-mode addresses depend on CR4.SMEP; all depend on XD where NXE is 1.
        (false, AccessKind::Fetch) => (!user_page || !case.smep) && (!case.nx || executable),
        (true, AccessKind::Read) => user_page,
        (true, AccessKind::Write) => user_page && writable,
        (true, AccessKind::Fetch) => user_page && (!case.nx || executable),
    };
    (!allowed, data_denied_by_key)
}

/// S25–S29, S47: every combination.
#[test]
fn permissions_equal_the_oracle() {
    let mut denied = 0;
    for bits in 0..1_u32 << 14 {
        let bit = |n: u32| bits >> n & 1 == 1;
        for kind in [AccessKind::Read, AccessKind::Write, AccessKind::Fetch] {
            let case = Case {
                wp: bit(0),
                smep: bit(1),
                smap: bit(2),
                nx: bit(3),
                pke: bit(4),
                kind,
                cpl: [0, 3, 1, 2][(bits >> 5 & 3) as usize],
                implicit: bit(7),
                ac: bit(8),
                rights: Rights::from_bits_truncate((bits >> 9 & 7) as u8),
                access_disabled: bit(12),
                write_disabled: bit(13),
            };
            denied += u32::from(check_case(case));
        }
    }
    assert!(denied > 10_000, "{denied}");
}

fn check_case(case: Case) -> bool {
    let flag = |on: bool, bit: u64| if on { bit } else { 0 };
    let cr0 = CR0_PG | flag(case.wp, CR0_WP);
    let cr4 = CR4_PAE | flag(case.smep, CR4_SMEP) | flag(case.smap, CR4_SMAP) | flag(case.pke, CR4_PKE);
    let mut state = PagingState::new(cr0, 0, cr4, EFER_LMA | flag(case.nx, EFER_NX), 40);
    state.cpl = case.cpl;
    state.rflags = flag(case.ac, RFLAGS_AC);
    // The key under test is 5; all others forbid everything.
    state.pkru = !(3 << 10) | u32::from(case.access_disabled) << 10 | u32::from(case.write_disabled) << 11;
    let plain = match case.kind {
        AccessKind::Read => Access::READ,
        AccessKind::Write => Access::WRITE,
        AccessKind::Fetch => Access::FETCH,
    };
    let access = if case.implicit { plain.implicit() } else { plain };
    let request = state.request(access);
    let result = state.role().check(request, case.rights, 5, state.pkru);

    let (by_rights, by_key) = oracle(case);
    let expected = (by_rights || by_key).then(|| {
        let user = case.cpl == 3 && !case.implicit;
        let fetch = case.kind == AccessKind::Fetch && (case.nx || case.smep);
        let write = case.kind == AccessKind::Write;
        1 | u32::from(write) << 1 | u32::from(user) << 2 | u32::from(fetch) << 4 | u32::from(by_key) << 5
    });
    assert_eq!(result.err().map(|code| code.bits()), expected, "{case:?}");
    expected.is_some()
}

/// Intel SDM volume 3, 4.7: without PAE there is no NX, so a fetch is named only under SMEP.
#[test]
fn fetches_are_named_where_they_can_be_forbidden() {
    let named = |cr4: u64, efer: u64| {
        let state = PagingState::new(CR0_PG, 0, cr4, efer, 40);
        state.role().fault_code(state.request(Access::FETCH)) == PageFaultCode::FETCH
    };
    assert!(!named(0, 0));
    assert!(!named(0, EFER_NX));
    assert!(named(CR4_SMEP, 0));
    assert!(!named(CR4_PAE, 0));
    assert!(named(CR4_PAE, EFER_NX));
    assert!(named(CR4_PAE | CR4_SMEP, 0));
    assert!(named(CR4_PAE, EFER_NX | EFER_LMA));
}

#[test]
fn canonical_addresses() {
    let cases = [
        (PagingMode::Off, 0xFFFF_FFFF, true),
        (PagingMode::Off, 0x1_0000_0000, false),
        (PagingMode::Bits32, 0xFFFF_FFFF, true),
        (PagingMode::Pae, 0xFFFF_FFFF_FFFF_FFFF, false),
        (PagingMode::Levels4, 0x0000_7FFF_FFFF_FFFF, true),
        (PagingMode::Levels4, 0x0000_8000_0000_0000, false),
        (PagingMode::Levels4, 0xFFFF_7FFF_FFFF_FFFF, false),
        (PagingMode::Levels4, 0xFFFF_8000_0000_0000, true),
        (PagingMode::Levels5, 0x0000_8000_0000_0000, true),
        (PagingMode::Levels5, 0x00FF_FFFF_FFFF_FFFF, true),
        (PagingMode::Levels5, 0x0100_0000_0000_0000, false),
        (PagingMode::Levels5, 0xFEFF_FFFF_FFFF_FFFF, false),
        (PagingMode::Levels5, 0xFF00_0000_0000_0000, true),
    ];
    for (mode, gva, canonical) in cases {
        assert_eq!(mode.is_canonical(Gva::new(gva)), canonical, "{mode:?} {gva:#x}");
    }
    assert_eq!(PagingMode::Pae.advance(Gva::new(0xFFFF_F000), 0x1000), Gva::new(0));
    assert_eq!(PagingMode::Levels4.advance(Gva::new(0xFFFF_F000), 0x1000), Gva::new(0x1_0000_0000));
}
