//! Does granting more rights need a flush? No: at worst a processor faults once more by what it holds, and
//! that fault removes it.
//!
//! SDM, "Operations that Invalidate Cached Mappings": an EPT violation invalidates the mappings that it used.
//! APM 5.5.3, "Invalidation of Table Entry Upgrades": not required; AMD confirms a fault by a fresh walk.

mod common;

use common::{FRAME, Grant, Stage, VENDORS};
use vmmu_machine::{AccessKind, Vendor};

fn main() {
    for vendor in VENDORS {
        let mut spurious = 0;
        for seed in 0..100 {
            let mut stage = Stage::new(vendor);
            stage.set(Stage::entry(1), stage.leaf(FRAME, Grant::Read, false));
            stage.touch(0, AccessKind::Read, seed);
            assert!(stage.touch(0, AccessKind::Write, seed).translation().is_none(), "read-only");
            stage.touch(0, AccessKind::Read, seed);
            // The upgrade, without any flush.
            stage.set(Stage::entry(1), stage.leaf(FRAME, Grant::All, false));
            stage.exit_and_enter();
            let (pages, may_fault) = stage.may(0, AccessKind::Write);
            assert_eq!(pages, [FRAME], "never anywhere else");
            assert_eq!(may_fault, vendor == Vendor::Intel, "only Intel faults by what it holds");
            // However the processor chooses: at most one more fault, then it is over.
            if stage.touch(0, AccessKind::Write, seed).translation().is_none() {
                spurious += 1;
                assert_eq!(stage.may(0, AccessKind::Write), (vec![FRAME], false));
            }
        }
        assert_eq!(spurious > 0, vendor == Vendor::Intel);
        println!(
            "{vendor:?}: of 100 upgrades without a flush, {spurious} saw one more fault, none a second."
        );
    }
    println!("A stale lack of rights only faults again, and the fault itself removes it.");
}
