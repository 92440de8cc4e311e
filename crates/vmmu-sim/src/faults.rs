//! Faults of guests: taken to the library, and its answers judged.
//!
//! Invariants: while nothing changes, an answer is the one that slots and backings give, and another try does not go on
//! for ever; nothing is said to have run out but what this history lets run out.

use crate::history::Stage;
use crate::host::{Failures, SimHost};
use crate::story::Violation;
use vmmu::{AddressSpace, Error, Fault, Outcome, ResolveError, Vcpu, instrument};

/// Faults at one place in a row that may be answered by another try while nothing that changes memory gets on: each try
/// gets the guest on, or another vCPU, and no more can be in the way.
const TRIES: u32 = 4;

/// Whether a call failed for want of tables, as it may in this history.
pub(crate) fn no_tables(stage: &Stage, error: Error) -> bool {
    match error {
        Error::OutOfMemory => stage.rates.failures != Failures::NONE,
        Error::MemoryLimit { .. } => stage.rates.limit != 0,
        _ => false,
    }
}

/// Whether a call failed because a backing gave no answer, as some do.
pub(crate) fn no_answer(stage: &Stage, error: Error) -> bool {
    use ResolveError::{Interrupted, OutOfMemory, WouldWait};
    let why = matches!(error, Error::Backing { why: OutOfMemory | Interrupted | WouldWait, .. });
    why && stage.rates.hesitates != 0
}

/// The faults at one place that were answered by another try, while nothing got on that changes memory.
#[derive(Default)]
pub(crate) struct Retries {
    place: Option<(Fault, u64)>,
    count: u32,
}

impl Retries {
    /// Judges that they come to an end. `quiet` is the moment if this fault was answered by another try, and began when
    /// nothing changed memory.
    pub(crate) fn judge(&mut self, stage: &Stage, who: &str, fault: Fault, quiet: Option<u64>) {
        // The end of an operation may not be visible yet.
        let still = stage.operations.quiet() == quiet && !instrument::holds_back_any();
        let place = quiet.filter(|_| still).map(|moment| (fault, moment));
        self.count = if place.is_some() && place == self.place { self.count + 1 } else { 0 };
        self.place = place;
        if self.count > TRIES {
            let what = format!("{who}: the same fault at {} again and again: {fault:?}", fault.gpa());
            stage.violate(Violation::new(what));
        }
    }
}

/// Takes a fault to the library, and judges the answer; none where something ran out.
pub(crate) fn handle(
    stage: &Stage,
    vcpu: &mut Vcpu<SimHost>,
    space: AddressSpace,
    who: &str,
    fault: Fault,
) -> Option<Outcome> {
    let gfn = fault.gpa().gfn().raw();
    let before = stage.world.borrow().moment();
    let outcome = match vcpu.handle_fault(fault) {
        Ok(outcome) => outcome,
        Err(error) if no_tables(stage, error) || no_answer(stage, error) => return None,
        Err(error) => {
            stage.violate(Violation::new(format!("{who}: fault at {gfn:#x}: {error}")));
            return None;
        }
    };
    let mut counted = stage.accesses.get();
    match outcome {
        Outcome::Resume => counted.resumed += 1,
        Outcome::Mmio(_) => counted.devices += 1,
        Outcome::ReadOnlyWrite(_) => counted.read_only += 1,
        Outcome::MemoryFault(_) => counted.refused += 1,
        _ => {}
    }
    stage.accesses.set(counted);
    let world = stage.world.borrow();
    let unchanged = world.changes == before.0;
    let wrong = match outcome {
        Outcome::MemoryFault(refused) => {
            refused.gpa.gfn().raw() != gfn
                || world.moment() == before && !world.may_refuse(space, gfn, refused.why)
        }
        Outcome::Resume => false,
        Outcome::Mmio(_) => unchanged && world.at(space, gfn).any(|slot| slot.settled),
        Outcome::ReadOnlyWrite(_) => {
            !fault.access().write || unchanged && world.at(space, gfn).all(|slot| slot.is_writable(gfn))
        }
        _ => true,
    };
    drop(world);
    if wrong {
        stage.violate(Violation::new(format!("{who}: a fault at {gfn:#x} came to {outcome:?}")));
    }
    Some(outcome)
}
