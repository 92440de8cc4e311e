//! The reader's line as a lock: Shared beside Exclusive (PROTOCOLS 1 and 2).
//!
//! One thread takes Shared twice, the second time from walking, and walks between; the other takes Exclusive. What
//! they guard is used in Shared and changed in Exclusive, so each must be ordered before or after the other. Shipped
//! code: `MmuLock` and the sections of `Line`. No bound on preemptions.

use super::machine::Machine;
use super::{Model, RACE, checks};
use crate::tlb::Tlb;
use loom::cell::UnsafeCell;
use loom::thread;
use std::sync::Arc;

/// What the lock guards.
#[derive(Default)]
struct Guarded(UnsafeCell<()>);

// SAFETY: nothing is in the cell; loom watches who comes to it.
unsafe impl Send for Guarded {}
// SAFETY: as above.
unsafe impl Sync for Guarded {}

impl Guarded {
    fn read(&self) {
        self.0.with(|_| ());
    }
    fn write(&self) {
        self.0.with_mut(|_| ());
    }
}

const MODEL: Model = Model {
    preemptions: None,
    run: || {
        let (tlb, guarded) = (Arc::new(Tlb::new()), Arc::new(Guarded::default()));
        let line = tlb.readers.take(None);
        let (its_tlb, its_guarded) = (tlb.clone(), guarded.clone());
        let reader = thread::spawn(move || {
            let (tlb, host) = (&*its_tlb, Machine::new());
            let line = tlb.readers.take(None);
            let shared = tlb.lock.shared(tlb, line, &host);
            its_guarded.read();
            drop(shared);
            let walking = line.walk(tlb);
            let shared = tlb.lock.shared(tlb, line, &host);
            its_guarded.read();
            drop((shared, walking));
        });
        let exclusive = tlb.lock.exclusive(&tlb, line, &Machine::new());
        guarded.write();
        drop(exclusive);
        reader.join().expect("no panic");
    },
};

checks! { MODEL: holds }
checks! {
    MODEL catches
    relaxed_announcement: RelaxedAnnouncement => RACE,
    relaxed_end: RelaxedEnd => RACE,
    no_fence_shared: NoFenceShared => RACE,
    no_flag_recheck: NoFlagRecheck => RACE,
    no_fence_flag: NoFenceFlag => RACE,
    exclusive_no_wait: ExclusiveNoWait => RACE,
}
