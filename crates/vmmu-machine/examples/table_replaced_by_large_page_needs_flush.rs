//! Does replacing a table by a large page need a flush? Yes, even where the large page maps the very same
//! frames: the table is still read, by whoever holds the way to it.
//!
//! SDM 4.10.3, "Paging-Structure Caches"; APM 5.5.3, "Caching of Upper Level Translation Table Entries".

mod common;

use common::{FOREIGN, FRAME, Grant, Stage, TABLES, VENDORS};
use vmmu_machine::{AccessKind, Hpa};

fn main() {
    for vendor in VENDORS {
        let mut stage = Stage::new(vendor);
        for page in 0..512 {
            let leaf = stage.leaf(FRAME + (page << 12), Grant::All, false);
            stage.set(Hpa::new(TABLES[3] + page * 8), leaf);
        }
        stage.touch(0, AccessKind::Read, 1);
        // The same 512 frames by one entry of 2 MiB; the table is given back and becomes somebody else's.
        stage.set(Stage::entry(2), stage.leaf(FRAME, Grant::All, true));
        stage.exit_and_enter();
        for page in 0..512 {
            stage.set(Hpa::new(TABLES[3] + page * 8), stage.leaf(FOREIGN, Grant::All, false));
        }
        // A neighbour that was never touched: no translation of it is held, but the way to the table is.
        let (pages, _) = stage.may(0x5000, AccessKind::Write);
        assert_eq!(pages, [FRAME + 0x5000, FOREIGN], "the right frame, or a stranger's");
        println!("{vendor:?}: the table is gone from the tree, and is walked all the same:");
        print!("{}", stage.story(0x5000, AccessKind::Write, FOREIGN));
        stage.flush();
        assert_eq!(stage.may(0x5000, AccessKind::Write), (vec![FRAME + 0x5000], false));
        println!("After the flush only the large page is used.\n");
    }
}
