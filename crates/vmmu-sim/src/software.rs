//! Reads and writes by software.
//!
//! Invariant: whatever is read comes from a frame that the VM has: nothing else holds poison.

use crate::actors::{no_answer, no_tables, some_gfn};
use crate::history::{Accesses, Stage};
use crate::host::{POISON, SimHost, WORDS};
use crate::random::Random;
use crate::story::Violation;
use vmmu::{Error, Gpa, PageSize, Vcpu};

/// The word of a page from which on software writes: those before it may be guests' tables.
const WRITTEN: u64 = WORDS as u64 / 2;

/// Reads or writes a word: never of a frame that was given back.
pub(crate) fn accesses(stage: &Stage, vcpu: &mut Vcpu<SimHost>, who: &str, random: &mut Random) {
    let gfn = some_gfn(stage, random);
    let before = stage.world.borrow().moment();
    let result = if random.one_in(stage.rates.writes) {
        let at = WRITTEN + random.below(WORDS as u64 - WRITTEN);
        stage.tell(who, || format!("writes {gfn:#x} by software"));
        vcpu.write(Gpa::new((gfn << 12) + 8 * at), &(random.bits() | 1 << 32).to_le_bytes())
    } else {
        let at = random.below(WORDS as u64);
        stage.tell(who, || format!("reads {gfn:#x} by software"));
        let mut word = [0; 8];
        vcpu.read(Gpa::new((gfn << 12) + 8 * at), &mut word).inspect(|()| {
            let value = u64::from_le_bytes(word);
            let world = stage.world.borrow();
            // Not all of a page of 1 GiB is marked.
            let giant = world.at(gfn).any(|slot| slot.pages == PageSize::Size1G.pages());
            if value == POISON || (value >> 32 == 0 && !giant) {
                let what = format!("{who}: software read {value:#x} at {gfn:#x}, a frame that nobody has");
                stage.violate(Violation::new(what));
            }
        })
    };
    match result {
        Ok(()) => {
            let counted = stage.accesses.get();
            stage.accesses.set(Accesses { software: counted.software + 1, ..counted });
        }
        Err(Error::NoSlot { .. } | Error::ReadOnly { .. }) => {}
        Err(error) if no_tables(error) || no_answer(stage, error) => {}
        Err(Error::Backing { why, .. })
            if before != stage.world.borrow().moment() || stage.world.borrow().may_refuse(gfn, why) => {}
        Err(error) => stage.violate(Violation::new(format!("{who}: accessing {gfn:#x}: {error}"))),
    }
}
