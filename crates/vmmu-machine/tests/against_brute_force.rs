//! The crate's walks and permissions against the second implementation, over random tables, registers and
//! accesses.

mod brute;

use brute::nested::{End2, Second, walk2};
use brute::{End, Mode, Setup, What, Who};
use proptest::prelude::*;
use vmmu_machine::registers::{
    CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_PKE, CR4_PSE, CR4_SMAP, CR4_SMEP, EFER_LMA, EFER_LME, EFER_NXE,
};
use vmmu_machine::{
    Access, AccessKind, EptContext, Features, Gva, Hpa, Memory, NestedTables, NotChosen, NptContext, Outcome,
    Privilege, Processor, Quirks, Registers, TlbControl, Vendor,
};

/// Tables live in these few frames, so that random entries find each other.
const FRAMES: u64 = 8;

fn entry() -> impl Strategy<Value = u64> {
    // Mostly sensible, with a bit or two anywhere.
    let odd = prop_oneof![
        24 => Just(0u64),
        3 => (0u32..64).prop_map(|n| 1 << n),
        1 => (0u32..64, 0u32..64).prop_map(|(a, b)| 1 << a | 1 << b),
    ];
    let present = prop_oneof![24 => Just(1u64), 1 => Just(0)];
    let mostly = prop_oneof![3 => Just(6u64), 1 => Just(0)];
    let large = prop_oneof![6 => Just(false), 1 => Just(true)];
    let key = prop_oneof![2 => Just(0u64), 1 => (0u64..16).prop_map(|key| key << 59)];
    (0..FRAMES, any::<u16>(), present, mostly, large, key, odd).prop_map(
        |(frame, flags, present, mostly, large, key, odd)| {
            let flags = u64::from(flags) & 0x67e | present | mostly;
            let (frame, ps) = if large { (frame << 30, 1 << 7) } else { (frame << 12, 0) };
            (frame | flags | ps | key) ^ odd
        },
    )
}

fn setup() -> impl Strategy<Value = Setup> {
    let mode = prop_oneof![
        (any::<bool>(), any::<bool>()).prop_map(|(pse, pse36)| Mode::Bits32 { pse, pse36 }),
        Just(Mode::Pae),
        Just(Mode::Long { levels: 4 }),
        Just(Mode::Long { levels: 5 }),
    ];
    (mode, any::<[bool; 7]>(), 36u32..=52, any::<u32>(), 0..FRAMES, [entry(), entry(), entry(), entry()])
        .prop_map(|(mode, [amd, gigabyte, nxe, wp, smep, smap, pke], maxphyaddr, pkru, root, pdptes)| Setup {
            mode,
            amd,
            maxphyaddr,
            gigabyte,
            nxe,
            wp,
            smep,
            smap,
            pke,
            pkru,
            cr3: root << 12,
            pdptes: pdptes.map(|p| if root % 2 == 0 { p & 0x000f_ffff_ffff_f001 } else { p }),
        })
}

fn machine_state(setup: &Setup) -> (Features, Registers) {
    let phys = setup.maxphyaddr as u8;
    let mut features = if setup.amd { Features::amd(phys) } else { Features::intel(phys) };
    features.pages_1g = setup.gigabyte;
    let mut registers = Registers { cr0: CR0_PG, cr3: setup.cr3, pkru: setup.pkru, ..Registers::OFF };
    let mut set = |on: bool, bit: u64| {
        if on {
            registers.cr4 |= bit;
        }
    };
    set(setup.smep, CR4_SMEP);
    set(setup.smap, CR4_SMAP);
    set(setup.pke, CR4_PKE);
    match setup.mode {
        Mode::Bits32 { pse, pse36 } => {
            set(pse, CR4_PSE);
            features.pse36 = pse36;
        }
        Mode::Pae => set(true, CR4_PAE),
        Mode::Long { levels } => {
            set(true, CR4_PAE);
            set(levels == 5, CR4_LA57);
            registers.efer |= EFER_LMA | EFER_LME;
        }
    }
    if setup.wp {
        registers.cr0 |= CR0_WP;
    }
    if setup.nxe {
        registers.efer |= EFER_NXE;
    }
    registers.pdptes = setup.pdptes;
    (features, registers)
}

fn processor(setup: &Setup) -> Processor {
    let (features, registers) = machine_state(setup);
    let mut processor = Processor::new(features, Quirks::NONE);
    processor.load_host(registers).expect("these registers run");
    assert_eq!(processor.features().vendor == Vendor::Amd, setup.amd);
    processor
}

fn memory(entries: &[u64]) -> Memory {
    let memory = Memory::new();
    for frame in 0..FRAMES {
        for (word, &entry) in entries.iter().enumerate() {
            // The same few entries all over, at a different start in each frame.
            let step = entries.len() as u64;
            let mut index = (word as u64 + 3 * frame) % step;
            while index < 512 {
                memory.write64(Hpa::new(frame << 12 | index * 8), entry);
                index += step;
            }
        }
    }
    memory
}

/// Where the second stage's table of a level is: where the few odd bits of random entries do not lead, so that no
/// walk of the guest sets flags in it.
const fn second_table(level: u64) -> u64 {
    0xc_2a80_0000 | level << 12
}

/// Four tables of a second stage, each full of the given entries, which lead from table to table and from
/// the last to the guest's frames.
fn add_second_stage(memory: &Memory, kind: Second, entries: &[u64]) {
    for level in 1..=4 {
        for index in 0..512 {
            let raw = entries[(index as usize + 3 * level as usize) % entries.len()];
            let (frame, flags) = (raw & 0x000f_ffff_ffff_f000, raw & !0x000f_ffff_ffff_f000);
            // An ordinary entry: mostly writable and user, so that some walks succeed. Extended: memory
            // type WB at the last level.
            let mostly = |odds: u64, bits: u64| if index % odds == 1 { 0 } else { bits };
            let flags = match kind {
                Second::Npt { .. } => flags | mostly(7, 6),
                Second::Ept { .. } if level == 1 && index % 8 == 5 => flags & !7,
                Second::Ept { .. } if level == 1 => flags & !0x38 | mostly(7, 3) | mostly(11, 0x30),
                Second::Ept { .. } => flags & !mostly(7, 0x78) | mostly(5, 7),
            };
            let large = raw & 1 << 7 != 0 && level < 4;
            let next = if level == 1 || large {
                frame
            } else {
                second_table(level - 1) | frame & 0x000f_fff0_0000_0000
            };
            memory.write64(Hpa::new(second_table(level) + index * 8), next | flags);
        }
    }
}

fn guest(setup: &Setup, kind: Second) -> Processor {
    let (features, registers) = machine_state(setup);
    let features = match kind {
        Second::Npt { .. } => features,
        Second::Ept { execute_only } => {
            let mut features = Features::intel(features.max_phys_bits);
            features.ept_execute_only = execute_only;
            features.pages_1g = setup.gigabyte;
            features
        }
    };
    let root = second_table(4);
    let mut processor = Processor::new(features, Quirks::NONE);
    match kind {
        Second::Npt { nxe } => {
            let nested = NestedTables { root: Hpa::new(root), five_levels: false, nx: nxe };
            let tlb_control = TlbControl::Nothing;
            processor.enter(NptContext { registers, asid: 1, tlb_control, nested: Some(nested) })
        }
        Second::Ept { .. } => {
            processor.enter(EptContext { registers, vpid: Some(1), eptp: Some(root | 0x5e) })
        }
    }
    .expect("a valid guest");
    processor
}

fn end2(outcome: Outcome) -> End2 {
    match outcome {
        Outcome::Translated(translation) => End2::Reached(translation.hpa.raw()),
        Outcome::PageFault(fault) => End2::PageFault(fault.code),
        Outcome::NestedPageFault(fault) => End2::Npf(fault.info1, fault.gpa.raw()),
        Outcome::EptViolation(exit) => End2::Violation(exit.qualification, exit.gpa.raw()),
        Outcome::EptMisconfiguration(gpa) => End2::Misconfigured(gpa.raw()),
        other => panic!("{other}"),
    }
}

fn access(what: What, who: Who) -> Access {
    Access {
        kind: match what {
            What::Read => AccessKind::Read,
            What::Write => AccessKind::Write,
            What::Fetch => AccessKind::Fetch,
        },
        privilege: match who {
            Who::User => Privilege::User,
            Who::Supervisor => Privilege::Supervisor { ac: false },
            Who::SupervisorWithAc => Privilege::Supervisor { ac: true },
            Who::Implicit => Privilege::Implicit,
        },
    }
}

fn end(outcome: Outcome) -> End {
    match outcome {
        Outcome::Translated(translation) => End::Reached(translation.hpa.raw()),
        Outcome::PageFault(fault) => End::Fault(fault.code),
        other => panic!("{other} without a second stage"),
    }
}

fn canonical(setup: &Setup, gva: u64) -> u64 {
    let unused = match setup.mode {
        Mode::Long { levels: 5 } => 7,
        Mode::Long { .. } => 16,
        _ => return gva,
    };
    ((gva << unused).cast_signed() >> unused).cast_unsigned()
}

const WHATS: [What; 3] = [What::Read, What::Write, What::Fetch];
const WHOS: [Who; 4] = [Who::User, Who::Supervisor, Who::SupervisorWithAc, Who::Implicit];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Without caches there is one outcome, and both implementations have it.
    #[test]
    fn fresh_walks_agree(
        setup in setup(),
        entries in prop::collection::vec(entry(), 13),
        addresses in prop::collection::vec(any::<u64>(), 8),
    ) {
        let memory = memory(&entries);
        let processor = processor(&setup);
        for gva in addresses {
            let gva = canonical(&setup, gva);
            for what in WHATS {
                for who in WHOS {
                    let expected = brute::walk(&memory, &setup, gva, what, who);
                    let outcomes = processor.access(&memory, Gva::new(gva), access(what, who));
                    let got: Vec<End> = outcomes.iter().map(|&outcome| end(outcome)).collect();
                    prop_assert_eq!(got, [expected], "{:?} {:?} at {:#x}", what, who, gva);
                }
            }
        }
    }

    /// Likewise with two stages.
    #[test]
    fn fresh_walks_of_two_stages_agree(
        setup in setup(),
        ept in any::<bool>(),
        flag in any::<bool>(),
        guest_entries in prop::collection::vec(entry(), 13),
        second_entries in prop::collection::vec(entry(), 29),
        addresses in prop::collection::vec(any::<u64>(), 8),
    ) {
        let setup = Setup { mode: Mode::Long { levels: 4 }, amd: !ept, ..setup };
        let kind = if ept { Second::Ept { execute_only: flag } } else { Second::Npt { nxe: flag } };
        let memory = memory(&guest_entries);
        add_second_stage(&memory, kind, &second_entries);
        let processor = guest(&setup, kind);
        for gva in addresses {
            let gva = canonical(&setup, gva);
            for what in WHATS {
                for who in WHOS {
                    let expected = walk2(&memory, &setup, (kind, second_table(4)), gva, what, who);
                    let outcomes = processor.access(&memory, Gva::new(gva), access(what, who));
                    let got: Vec<End2> = outcomes.iter().map(|&outcome| end2(outcome)).collect();
                    prop_assert_eq!(got, [expected], "{:?} {:?} at {:#x}", what, who, gva);
                }
            }
        }
    }

    /// While tables only have flags set, whatever is held says what the tables say: after any history of
    /// accesses and speculation, the set of outcomes is still the one outcome of a fresh walk.
    #[test]
    fn unchanged_tables_have_one_outcome(
        setup in setup(),
        entries in prop::collection::vec(entry(), 13),
        history in prop::collection::vec((any::<u64>(), 0usize..16, any::<u64>()), 40),
    ) {
        let memory = memory(&entries);
        let mut processor = processor(&setup);
        for (gva, how, seed) in history {
            // Few addresses, so that they meet what is held.
            let gva = canonical(&setup, gva & 0x0103_0180_c060_3007);
            if how >= 12 {
                processor.speculate(&memory, Gva::new(gva), seed).expect("nobody else writes");
                continue;
            }
            let (what, who) = (WHATS[how % 3], WHOS[how / 3]);
            // Tables may contain themselves, and flags that are set may then change an address or a right of
            // an entry that is data to another walk: such histories prove nothing.
            let before = brute::walk(&memory, &setup, gva, what, who);
            let outcomes = processor.access(&memory, Gva::new(gva), access(what, who));
            // A large page may be held in pieces: the same byte, by a smaller translation.
            let mut got: Vec<End> = outcomes.iter().map(|&outcome| end(outcome)).collect();
            got.dedup();
            prop_assert_eq!(&got, &[before], "{:?} {:?} at {:#x}", what, who, gva);
            outcomes.choose(&mut processor, &memory, seed).expect("nobody else writes");
        }
    }

    /// Two stages: whatever is held says what the tables say while they only have flags set; and when their
    /// entries do change, the outcome of a fresh walk stays among those allowed, and alone after a flush of all.
    #[test]
    fn histories_of_two_stages(
        setup in setup(),
        ept in any::<bool>(),
        flag in any::<bool>(),
        writes in any::<bool>(),
        guest_entries in prop::collection::vec(entry(), 13),
        second_entries in prop::collection::vec(entry(), 29),
        history in prop::collection::vec((any::<u64>(), 0usize..16, any::<u64>(), entry()), 40),
    ) {
        let setup = Setup { mode: Mode::Long { levels: 4 }, amd: !ept, ..setup };
        let kind = if ept { Second::Ept { execute_only: flag } } else { Second::Npt { nxe: flag } };
        let second = (kind, second_table(4));
        let memory = memory(&guest_entries);
        add_second_stage(&memory, kind, &second_entries);
        let mut processor = guest(&setup, kind);
        for (gva, how, seed, value) in history {
            let gva = canonical(&setup, gva & 0x0103_0180_c060_3007);
            if how == 15 && writes {
                let of_guest = seed & 1 == 0;
                let number = seed >> 1;
                let table = if of_guest { number % FRAMES << 12 } else { second_table(1 + number % 4) };
                let place = Hpa::new(table | (seed >> 16 & 0xff8));
                // Second-stage entries keep pointing to second-stage tables, as a hypervisor's do.
                let old = memory.read64(place);
                let keep = if of_guest { 0 } else { 0x000f_ffff_ffff_f000 };
                memory.write64(place, old & keep | value & !keep);
                continue;
            }
            if how >= 12 {
                processor.speculate(&memory, Gva::new(gva), seed).expect("nobody else writes");
                continue;
            }
            let (what, who) = (WHATS[how % 3], WHOS[how / 3]);
            let fresh = walk2(&memory, &setup, second, gva, what, who);
            let outcomes = processor.access(&memory, Gva::new(gva), access(what, who));
            let got: Vec<End2> = outcomes.iter().map(|&outcome| end2(outcome)).collect();
            if writes {
                prop_assert!(got.contains(&fresh), "{:?} lacks {:?}", got, fresh);
            } else {
                prop_assert!(got.iter().all(|end| *end == fresh), "{:?} is more than {:?}", got, fresh);
            }
            if !ept {
                // AMD confirms faults: one that is reported is the fresh walk's.
                prop_assert!(got.iter().all(|end| *end == fresh || matches!(end, End2::Reached(_))));
            }
            match outcomes.choose(&mut processor, &memory, seed) {
                // A page of the guest's tables may hold what another walk of the same access sets flags in.
                Ok(_) | Err(NotChosen::MemoryChanged(_)) => {}
                Err(error) => prop_assert!(false, "{}", error),
            }
        }
        processor.forget_everything();
        let fresh = walk2(&memory, &setup, second, 0x1000, What::Read, Who::Supervisor);
        let outcomes = processor.access(&memory, Gva::new(0x1000), access(What::Read, Who::Supervisor));
        prop_assert_eq!(outcomes.only().map(end2), Some(fresh));
    }

    /// Whatever is done to memory, the outcome of a fresh walk stays among those allowed, and after a flush
    /// it is the only one.
    #[test]
    fn the_fresh_outcome_is_always_allowed(
        setup in setup(),
        entries in prop::collection::vec(entry(), 13),
        history in prop::collection::vec((any::<u64>(), 0usize..16, any::<u64>(), entry()), 40),
    ) {
        let memory = memory(&entries);
        let mut processor = processor(&setup);
        for (gva, how, seed, value) in history {
            let gva = canonical(&setup, gva & 0x0103_0180_c060_3007);
            if how >= 14 {
                memory.write64(Hpa::new(seed % (FRAMES << 12) & !7), value);
                continue;
            }
            if how >= 12 {
                processor.speculate(&memory, Gva::new(gva), seed).expect("nobody else writes");
                continue;
            }
            let (what, who) = (WHATS[how % 3], WHOS[how / 3]);
            let fresh = brute::walk(&memory, &setup, gva, what, who);
            let outcomes = processor.access(&memory, Gva::new(gva), access(what, who));
            let got: Vec<End> = outcomes.iter().map(|&outcome| end(outcome)).collect();
            prop_assert!(got.contains(&fresh), "{:?} lacks {:?}", got, fresh);
            if setup.amd {
                let faults = got.iter().filter(|end| matches!(end, End::Fault(_))).count();
                prop_assert!(faults == 0 || matches!(fresh, End::Fault(_)), "AMD confirms faults");
            }
            outcomes.choose(&mut processor, &memory, seed).expect("nobody else writes");
        }
        processor.forget_everything();
        let gva = canonical(&setup, 0x1000);
        let fresh = brute::walk(&memory, &setup, gva, What::Read, Who::Supervisor);
        let outcomes = processor.access(&memory, Gva::new(gva), access(What::Read, Who::Supervisor));
        prop_assert_eq!(outcomes.only().map(end), Some(fresh));
    }
}

/// The random tables reach what they are meant to reach: every kind of end, in numbers.
#[test]
fn the_generators_cover_every_kind_of_end() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    use std::collections::BTreeMap;
    let mut runner = TestRunner::deterministic();
    let strategy =
        (setup(), prop::collection::vec(entry(), 13), prop::collection::vec(entry(), 29), any::<[u64; 8]>());
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    for round in 0..4000 {
        let (setup, guest_entries, second_entries, addresses) =
            strategy.new_tree(&mut runner).expect("a value").current();
        let long = Setup { mode: Mode::Long { levels: 4 }, ..setup };
        let kind =
            if round % 2 == 0 { Second::Ept { execute_only: true } } else { Second::Npt { nxe: true } };
        let memory = memory(&guest_entries);
        add_second_stage(&memory, kind, &second_entries);
        for (gva, n) in addresses.into_iter().zip(0..) {
            let (what, who) = (WHATS[n % 3], WHOS[n % 4]);
            let one = match brute::walk(&memory, &setup, canonical(&setup, gva), what, who) {
                End::Reached(_) => "reached".to_string(),
                End::Fault(code) => format!("fault {:#x}", code & 0x29),
            };
            *counts.entry(one).or_default() += 1;
            let amd = Setup { amd: round % 2 == 1, ..long };
            let two = match walk2(&memory, &amd, (kind, second_table(4)), canonical(&long, gva), what, who) {
                End2::Reached(_) => format!("{kind:?} reached"),
                End2::PageFault(code) => format!("{kind:?} fault {:#x}", code & 0x29),
                End2::Npf(info, _) => format!("npf {:#x}", info & !0x16),
                End2::Violation(qualification, _) => format!("violation {:#x}", qualification & 0x1b8),
                End2::Misconfigured(_) => "misconfigured".to_string(),
            };
            *counts.entry(two).or_default() += 1;
        }
    }
    let wanted = [
        "reached",
        "fault 0x0",
        "fault 0x1",
        "fault 0x9",
        "fault 0x21",
        "misconfigured",
        "Ept { execute_only: true } reached",
        "Npt { nxe: true } reached",
        "npf 0x100000000",
        "npf 0x100000001",
        "npf 0x100000009",
        "npf 0x200000000",
        "npf 0x200000001",
        "npf 0x200000009",
        "violation 0x180",
        "violation 0x198",
        "violation 0x80",
        "violation 0x88",
    ];
    for name in wanted {
        assert!(counts.get(name).is_some_and(|&n| n >= 10), "{name} is too rare in {counts:#?}");
    }
}
