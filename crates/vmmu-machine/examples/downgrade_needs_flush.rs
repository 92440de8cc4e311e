//! Does taking rights away need a flush? Yes: until then the old rights are used, with no look at the tables.
//!
//! SDM, "Guidelines for Use of the INVEPT Instruction": software should INVEPT after a change that removes a
//! permission. APM 5.5.3: otherwise "it is unpredictable whether the old or updated entry will be used".

mod common;

use common::{FRAME, Grant, Stage, VENDORS};
use vmmu_machine::AccessKind;

fn main() {
    for vendor in VENDORS {
        let mut stage = Stage::new(vendor);
        stage.set(Stage::entry(1), stage.leaf(FRAME, Grant::All, false));
        stage.touch(0, AccessKind::Write, 1);
        // Write protection, as for a log of dirty pages; and only an exit and an entry, which flush nothing.
        stage.set(Stage::entry(1), stage.leaf(FRAME, Grant::Read, false));
        stage.exit_and_enter();
        let (pages, _) = stage.may(0, AccessKind::Write);
        assert_eq!(pages, [FRAME], "the write that the log will never hear of");
        println!("{vendor:?}: W is clear in the entry, and a write may still go through. By what was held:");
        print!("{}", stage.story(0, AccessKind::Write, FRAME));
        stage.flush();
        assert_eq!(stage.may(0, AccessKind::Write), (vec![], true));
        assert_eq!(stage.may(0, AccessKind::Read), (vec![FRAME], false));
        println!("After the flush every write faults.\n");
    }
}
