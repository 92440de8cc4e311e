//! Who may still use a translation, a table page or a frame: readers, generations, Shared and Exclusive,
//! shootdowns, tags, reclaim. PROTOCOLS 1 to 4 and 6 in code.
//!
//! | room | holds |
//! |---|---|
//! | `generation` | the clock of announcements and removals |
//! | `reader` | the line in which each vCPU and thread announces what it may be using; sections as guards |
//! | `lock` | Shared and Exclusive over those lines |
//! | `shootdown` | the flush debt, the wait for guests and for sections |
//! | `tag` | ASIDs per physical processor, with notes of what was flushed under them |
//! | `reclaim` | table pages that wait for their grace |
//!
//! It may touch `sync`, `host` and `addr`, nothing above. Invariants: every announcement is a store, one full
//! fence, then the first load; every wait looks at lines only after a fence that follows an advance of the
//! generation; no word is written by every fault.

pub(crate) mod generation;
pub(crate) mod lock;
pub(crate) mod reader;
pub(crate) mod reclaim;
pub(crate) mod shootdown;
pub(crate) mod tag;

use crate::host::Host;
use crate::mutants::Mutant::NoSlotReaderWait;
use crate::mutants::mutant;
use generation::Generation;
use lock::MmuLock;
use reader::Readers;

/// All of a VM's state about who reads what.
#[derive(Debug)]
pub(crate) struct Tlb {
    pub(crate) generation: Generation,
    pub(crate) slot_epoch: Generation,
    pub(crate) readers: Readers,
    pub(crate) lock: MmuLock,
}

impl Tlb {
    pub(crate) fn new() -> Self {
        Self {
            generation: Generation::new(),
            slot_epoch: Generation::new(),
            readers: Readers::new(),
            lock: MmuLock::new(),
        }
    }

    /// Waits until every slot section that was announced before this call has ended (PROTOCOLS 5). The
    /// caller holds the slots mutex alone.
    pub(crate) fn wait_for_slot_readers<H: Host>(&self, host: &H) {
        let epoch = self.slot_epoch.advance();
        for line in self.readers.iter() {
            while line.slot_section_older_than(epoch) && !mutant(NoSlotReaderWait) {
                crate::coverage::hit(crate::coverage::Point::SlotReadersAwaited);
                host.relax();
            }
        }
    }
}
