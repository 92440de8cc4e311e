//! Time of the hypervisor's own under SVM: an NMI ends the guest's run again and again, whatever the guest does,
//! and the guest does not notice.
//!
//! A tick is an exit (the NMI is intercepted), after which the NMI still waits: it is taken with GIF set for one
//! instruction. The guest's HLT needs care, because an exit from it leaves the guest behind the instruction and so
//! would wake it. HLT is intercepted; then it is let through, and interrupts are intercepted in its place: a tick
//! puts the guest back to its HLT, and an interrupt that it would take completes the HLT, after which the guest
//! takes the interrupt itself. Invariant: interrupts are intercepted only while the guest halts, so none of them
//! waits longer than an exit.
//!
//! Every NMI is taken for a tick. One that a device of the guest's sends is lost to the guest, so one that halts with
//! interrupts off will never wake: that ends the run.

use super::exits::{Handled, next_instruction};
use super::run::Machine;
use super::switch;
use crate::churn::Churn;
use crate::guest::End;
use crate::machine::serial;
use vmmu_emulate::Known;

/// RFLAGS: interrupts are taken.
const RFLAGS_IF: u64 = 1 << 9;

/// What is done at ticks, and where the guest halts.
pub(crate) struct Ticks {
    /// What the ticks are for.
    pub(crate) churn: Churn,
    /// Ticks so far.
    pub(crate) count: u64,
    halt: Option<Halt>,
}

/// A HLT that was let through.
#[derive(Clone, Copy)]
struct Halt {
    /// Where it is.
    at: u64,
    /// Where the next instruction is.
    next: u64,
}

impl Ticks {
    /// Ticks for `churn`, whose timer runs.
    pub(crate) fn new(churn: Churn) -> Self {
        Self { churn, count: 0, halt: None }
    }
}

/// An exit has happened, whichever it is. Asked only in images that make [mistakes](crate::churn::MISTAKES).
pub(super) fn note(machine: &mut Machine) -> Result<(), End> {
    machine.ticks.as_mut().map_or(Ok(()), |ticks| ticks.churn.finish_early())
}

/// An NMI: a tick, where there are any; else someone outside wants the record.
pub(super) fn nmi(machine: &mut Machine) -> Handled {
    let Some(ticks) = &mut machine.ticks else {
        // It stays pending while GIF is clear, and nothing sets it again.
        return Err(End::Asked.into());
    };
    // SAFETY: SVM is on since `svm::enable`, interrupts are off since the start, and `descriptors::load` has run.
    unsafe { switch::take_nmi() };
    if serial::record_is_wanted() {
        return Err(End::Asked.into());
    }
    ticks.count += 1;
    if let Some(halt) = ticks.halt {
        let save = &mut machine.processor.vmcb.save;
        if save.rip == halt.next {
            if save.rflags & RFLAGS_IF == 0 {
                // Only an NMI of its own could wake it, and it gets none.
                let text = format_args!("the guest has halted with interrupts off, at rip {:#x}", halt.at);
                return Err(End::error(text).into());
            }
            save.rip = halt.at;
        } else if save.rip != halt.at {
            // An exception led away from the HLT.
            ticks.halt = None;
            machine.processor.watch_halts(true);
        }
    }
    Ok(ticks.churn.tick()?)
}

/// HLT: the guest executes it, and the interrupt that ends it exits.
pub(super) fn halt(machine: &mut Machine) -> Handled {
    let next = next_instruction(machine, Known::Hlt)?;
    let at = machine.processor.vmcb.save.rip;
    if let Some(ticks) = &mut machine.ticks {
        ticks.halt = Some(Halt { at, next });
    }
    machine.processor.watch_halts(false);
    Ok(())
}

/// An interrupt that the guest would take while it halts, or at the HLT before it runs.
pub(super) fn interrupt(machine: &mut Machine) {
    machine.processor.watch_halts(true);
    if let Some(halt) = machine.ticks.as_mut().and_then(|ticks| ticks.halt.take()) {
        let rip = machine.processor.vmcb.save.rip;
        if rip == halt.at || rip == halt.next {
            machine.processor.complete(halt.next);
        }
    }
}
