//! Instructions by the guest's own tables: every slot low enough holds tables of 32-bit paging in its first two pages,
//! by which every address leads to one of the two pages after them.
//!
//! Movers copy what pages hold, so tables stay tables. Invariant: whatever else a fetch comes to while memory goes and
//! comes, it never reads a frame that was given back.

use crate::history::{Accesses, Stage};
use crate::host::{POISON, SimHost, WORDS};
use crate::random::Random;
use crate::story::Violation;
use vmmu::{Gpa, Gva, PagingState, Vcpu};

/// CR0 with paging and protection.
const CR0: u64 = 0x8000_0011;
/// Present, writable, for users.
const ENTRY: u64 = 7;
/// Guest frames that entries of 32-bit paging can name.
const REACH: u64 = 1 << 20;

/// The two entries that fill page `page` of a slot at `gfn`, if it is a table.
pub(crate) fn table(gfn: u64, page: u64) -> Option<u64> {
    let entry = |page: u64| (gfn + page) << 12 | ENTRY;
    match page {
        _ if gfn + 4 > REACH => None,
        0 => Some(entry(1) | entry(1) << 32),
        1 => Some(entry(2) | entry(3) << 32),
        _ => None,
    }
}

/// Fetches an instruction, mostly where one was fetched before.
pub(crate) fn fetch(stage: &Stage, vcpu: &mut Vcpu<SimHost>, who: &str, random: &mut Random) {
    if vcpu.paging_mut().cr0 == 0 || random.one_in(16) {
        let world = stage.world.borrow();
        if world.slots.is_empty() {
            return;
        }
        let slot = &world.slots[random.below(world.slots.len() as u64) as usize];
        if slot.gfn + 4 > REACH {
            return;
        }
        vcpu.set_paging(PagingState::new(CR0, slot.gfn << 12, 0, 0, 46));
    }
    if random.one_in(stage.rates.edits) {
        // The guest's system changes a bit of the second table that no walk looks at.
        let table = vcpu.paging_mut().cr3 >> 12;
        if let Some(words) = self::table(table, 1) {
            let bit = if random.one_in(2) { 1 << 9 | 1 << 41 } else { 0 };
            stage.tell(who, || format!("changes its table at {:#x}", table + 1));
            let _ = vcpu.write(Gpa::new((table + 1) << 12), &(words | bit).to_le_bytes());
        }
    }
    let gva = Gva::new(random.below(4) << 12 | random.below(WORDS as u64 - 1) << 3);
    stage.tell(who, || format!("fetches at {gva}"));
    // Slots come and go: a table or a page may not be there.
    let Ok(bytes) = vcpu.fetch_instruction(gva) else { return };
    let counted = stage.accesses.get();
    stage.accesses.set(Accesses { fetched: counted.fetched + 1, ..counted });
    if bytes.chunks_exact(8).any(|word| word == POISON.to_le_bytes()) {
        let what = format!("{who}: a fetch at {gva} read a frame that nobody has");
        stage.violate(Violation::new(what));
    }
}
