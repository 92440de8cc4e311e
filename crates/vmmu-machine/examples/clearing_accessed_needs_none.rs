//! Does clearing the accessed flag need a flush? No: translations stay right; a page that is used through
//! what is held merely looks idle until it is walked for again.
//!
//! SDM 4.8, "Accessed and Dirty Flags": a flag that software clears might not be set again by an access
//! that uses a cached translation. What that costs is a wrong guess in aging, never a wrong access.

mod common;

use common::{FRAME, Grant, Stage, VENDORS};
use vmmu_machine::AccessKind;

fn main() {
    for vendor in VENDORS {
        let mut looked_idle = 0;
        for seed in 0..100 {
            let mut stage = Stage::new(vendor);
            stage.set(Stage::entry(1), stage.leaf(FRAME, Grant::All, false));
            stage.touch(0, AccessKind::Write, seed);
            let accessed = stage.accessed();
            let leaf = stage.get(Stage::entry(1));
            assert_eq!(leaf & accessed, accessed);
            stage.set(Stage::entry(1), leaf & !accessed);
            stage.exit_and_enter();
            for kind in [AccessKind::Read, AccessKind::Write] {
                assert_eq!(stage.may(0, kind), (vec![FRAME], false), "right with or without a walk");
            }
            stage.touch(0, AccessKind::Read, seed);
            if stage.get(Stage::entry(1)) & accessed == 0 {
                looked_idle += 1;
            }
            // The dirty flag is another matter, and was left alone.
            stage.flush();
            stage.touch(0, AccessKind::Read, seed);
            assert_eq!(stage.get(Stage::entry(1)) & accessed, accessed, "a fresh walk sets it");
        }
        assert!((1..100).contains(&looked_idle));
        println!("{vendor:?}: after clearing the flag without a flush, 100 of 100 accesses were right;");
        println!("{looked_idle} of them did not set the flag again: those pages look idle for a while.");
    }
}
