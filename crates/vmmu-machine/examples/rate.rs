//! How many accesses a second the model judges: two stages, many guests, flushes and speculation mixed in.
//!
//! `cargo run --release --example rate [accesses]`

use std::time::Instant;
use vmmu_machine::{
    Access, AccessKind, EptContext, Features, Gpa, Gva, Hpa, Invept, Machine, NestedTables, NptContext,
    Quirks, Registers, TlbControl, Vendor,
};

/// Pages of a guest: linear and guest-physical alike.
const PAGES: u64 = 512;
const GUESTS: u64 = 8;

/// Four levels of tables that map `PAGES` pages from 0 to `target`; the tables follow `at`, in memory
/// shifted by `base`.
fn map(machine: &Machine, at: u64, base: u64, target: u64, (upper, leaf): (u64, u64)) {
    let tables = [at, at + 0x1000, at + 0x2000, at + 0x3000];
    for pair in tables.windows(2) {
        machine.memory.write64(Hpa::new(base + pair[0]), pair[1] | upper);
    }
    for page in 0..PAGES {
        machine.memory.write64(Hpa::new(base + tables[3] + page * 8), (target + (page << 12)) | leaf);
    }
}

fn run(features: Features, accesses: u64) {
    let mut machine = Machine::new(2, features, Quirks::NONE);
    let amd = features.vendor == Vendor::Amd;
    let (upper, leaf) = if amd { (7, 7) } else { (7, 7 | 6 << 3) };
    let host = |guest: u64| 0x1_0000_0000 + (guest << 21);
    for guest in 0..GUESTS {
        // The second stage first, then the guest's own tables in its last pages.
        map(&machine, 0x10_0000 + guest * 0x4000, 0, host(guest), (upper, leaf));
        map(&machine, (PAGES - 4) << 12, host(guest), 0, (7, 7));
    }
    let context = |guest: u64| {
        let root = 0x10_0000 + guest * 0x4000;
        let registers = Registers::long_mode((PAGES - 4) << 12);
        if amd {
            let nested = NestedTables { root: Hpa::new(root), five_levels: false, nx: true };
            let tlb_control = TlbControl::Nothing;
            NptContext { registers, asid: 1 + guest as u16, tlb_control, nested: Some(nested) }.into()
        } else {
            let vpid = Some(1 + guest as u16);
            vmmu_machine::Guest::Vmx(EptContext { registers, vpid, eptp: Some(root | 0x5e) })
        }
    };
    let mut seed = 1u64;
    let mut next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        seed >> 33
    };
    let start = Instant::now();
    let mut outcomes = 0u64;
    for step in 0..accesses {
        let which = next() as usize % machine.processors.len();
        let processor = &mut machine.processors[which];
        processor.set_step(step);
        if processor.guest().is_none() || next() % 16 == 0 {
            processor.exit();
            let guest = next() % GUESTS;
            processor.enter(context(guest)).expect("valid");
        }
        let gva = Gva::new((next() % PAGES) << 12);
        match next() % 64 {
            0 => processor.speculate(&machine.memory, gva, next()).expect("nobody else writes"),
            1 => processor.invlpg(gva),
            2 => {
                let guest = processor.exit().expect("in a guest");
                if amd {
                    if let vmmu_machine::Guest::Svm(mut context) = guest {
                        context.tlb_control = TlbControl::Guest;
                        processor.enter(context).expect("valid");
                    }
                } else if let vmmu_machine::Guest::Vmx(context) = guest {
                    let eptp = context.eptp.expect("EPT is on");
                    processor.invept(Invept::Context { eptp }).expect("valid");
                    processor.enter(context).expect("valid");
                }
            }
            _ => {}
        }
        let kind = if next() % 3 == 0 { AccessKind::Write } else { AccessKind::Read };
        let set = processor.access(&machine.memory, gva, Access::user(kind));
        outcomes += set.iter().count() as u64;
        set.choose(processor, &machine.memory, next()).expect("nobody else writes");
        // What an oracle asks at each step.
        outcomes +=
            processor.queries(&machine.memory).physical_translations(Gpa::new(gva.raw())).len() as u64;
    }
    let micros = start.elapsed().as_micros().max(1);
    let held: usize = machine.processors.iter().map(vmmu_machine::Processor::held_count).sum();
    println!(
        "{:?}: {} accesses a second, {outcomes} outcomes judged, {held} mappings held at the end",
        features.vendor,
        u128::from(accesses) * 1_000_000 / micros,
    );
}

fn main() {
    let accesses = std::env::args().nth(1).and_then(|arg| arg.parse().ok()).unwrap_or(300_000);
    run(Features::amd(46), accesses);
    run(Features::intel(46), accesses);
}
