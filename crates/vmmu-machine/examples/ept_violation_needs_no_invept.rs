//! Does mapping a page after a violation need INVEPT? No: nothing that is not present is ever cached.
//!
//! SDM, "Caching Translation Information": no mappings are created with information derived from entries
//! that are not present or misconfigured. APM 5.5.3: "These entries are never cached if their P bits are
//! 0".

mod common;

use common::{FRAME, Grant, Stage, VENDORS};
use vmmu_machine::AccessKind;

fn main() {
    for vendor in VENDORS {
        for seed in 0..100 {
            let mut stage = Stage::new(vendor);
            // The guest touches the page, and its processor speculates around it as it likes.
            stage.speculate(0, seed);
            assert!(stage.touch(0, AccessKind::Write, seed).translation().is_none(), "nothing is mapped");
            stage.speculate(0, !seed);
            // The hypervisor maps it and goes back, without any flush.
            stage.set(Stage::entry(1), stage.leaf(FRAME, Grant::All, false));
            stage.exit_and_enter();
            assert_eq!(stage.may(0, AccessKind::Write), (vec![FRAME], false));
        }
    }
    println!("A page that was not present is mapped, and no INVEPT follows.");
    println!("Every access that the model allows reaches the page; not one faults again, on Intel or AMD:");
    println!("an absent entry is never cached, neither as a translation nor on the way to one.");
}
