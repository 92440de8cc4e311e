//! Does freeing a table need a flush if no entry in it was ever present? Yes: a speculative walk may have
//! cached the way to it, and walks on from there whatever it holds by then.
//!
//! APM 5.5.3: "the fact that a page table has no valid entries does not guarantee that upper level table
//! entries won't be accessed and cached". SDM 4.10.3.2 allows the same.

mod common;

use common::{FOREIGN, Grant, Stage, TABLES, VENDORS};
use vmmu_machine::{AccessKind, Hpa, Mapping};

fn main() {
    for vendor in VENDORS {
        // Some seed stops a walk right at the empty table.
        let seed = (0..1000).find(|&seed| {
            let mut stage = Stage::new(vendor);
            stage.speculate(0, seed);
            holds_last_table(&stage)
        });
        let seed = seed.expect("a walk stops anywhere");
        let mut stage = Stage::new(vendor);
        stage.speculate(0, seed);
        // No access was ever made and nothing was ever mapped. The table is unlinked, given back, and
        // reused as a table of another guest.
        stage.set(Stage::entry(2), 0);
        stage.exit_and_enter();
        for page in 0..512 {
            stage.set(Hpa::new(TABLES[3] + page * 8), stage.leaf(FOREIGN, Grant::All, false));
        }
        let (pages, _) = stage.may(0, AccessKind::Write);
        assert_eq!(pages, [FOREIGN], "another guest's memory");
        println!("{vendor:?}: nothing was ever mapped here, and the guest may reach a stranger's frame:");
        print!("{}", stage.story(0, AccessKind::Write, FOREIGN));
        stage.flush();
        assert_eq!(stage.may(0, AccessKind::Write), (vec![], true));
        println!("After the flush it cannot.\n");
    }
}

fn holds_last_table(stage: &Stage) -> bool {
    let table = Hpa::new(TABLES[3]);
    stage.machine.processors[0]
        .held_to(table.pfn())
        .any(|held| matches!(held.mapping, Mapping::Table(kept) if kept.level == 1))
}
