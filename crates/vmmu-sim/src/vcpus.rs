//! Virtual processors: each enters, accesses memory on the model of a processor, takes its faults, and reads and writes
//! by software.
//!
//! Invariants: every translation that a processor could use for an access is judged before it; a vCPU is on one
//! processor at a time, and leaves the guest once it is kicked.

use crate::faults::{Retries, handle, no_tables};
use crate::fetch;
use crate::history::Stage;
use crate::host::SimHost;
use crate::kicks;
use crate::oracle;
use crate::places::some_gfn;
use crate::random::Random;
use crate::software::{self, Software};
use crate::story::Violation;
use vmmu::{AddressSpace, Entry, EntryFlush, Fault, Gpa, Outcome, Vcpu, VcpuId, instrument};
use vmmu_machine::{AccessKind, NestedTables, NptContext, PhysicalTag, Registers, TlbControl};

/// Turns, at most: between a preparation and its entry; between the entry and the guest's first instruction; of a halt;
/// until a forgotten entry is closed.
const UNTIL_ENTRY: u64 = 4;
const UNTIL_GUEST: u64 = 3;
const HALT: u64 = 100;
const FORGOTTEN: u64 = 20;

/// A virtual processor.
pub(crate) fn vcpu(stage: &Stage, random: Random) {
    let Ok(vcpu) = stage.vm.vcpu() else { return };
    let id = vcpu.id();
    let who = format!("vcpu {}", id.number());
    Guest { stage, id, who, random, space: AddressSpace::NORMAL, last: None }.lives(vcpu);
}

/// The guest on one vCPU.
struct Guest<'a> {
    stage: &'a Stage,
    id: VcpuId,
    who: String,
    random: Random,
    space: AddressSpace,
    /// Where it was last.
    last: Option<u64>,
}

impl Guest<'_> {
    fn lives(&mut self, mut vcpu: Vcpu<SimHost>) {
        let stage = self.stage;
        let (mut late, mut tries, mut retries) = (None, 0, Retries::default());
        if self.random.one_in(stage.rates.unprepared) {
            self.enters(&mut vcpu);
        }
        while stage.step() {
            stage.boundary();
            if stage.rates.spaces > 1 && self.random.one_in(stage.rates.space_changes) {
                self.changes_space(&mut vcpu);
            }
            match vcpu.prepare() {
                Ok(()) => stage.kicks.prepared(self.id),
                Err(error) if no_tables(stage, error) => continue,
                Err(error) => return self.violates(&format!("prepare: {error}")),
            }
            let (space, who) = (self.space, &self.who);
            if self.random.one_in(stage.rates.fetches) {
                fetch::fetch(stage, &mut vcpu, space, who, &mut self.random);
            } else if self.random.one_in(stage.rates.software) {
                software::accesses(stage, &mut Software::Vcpu(&mut vcpu), space, who, &mut self.random);
            } else if let Some(fault) = self.enters(&mut vcpu) {
                let quiet = stage.operations.quiet();
                let outcome = handle(stage, &mut vcpu, self.space, &self.who, fault);
                let again = outcome == Some(Outcome::Resume);
                retries.judge(stage, &self.who, fault, if again { quiet } else { None });
                if outcome.is_some() && !again {
                    // Guests do not stay where no memory is.
                    self.last = None;
                }
                // Whoever faults again and again leaves time to those that it waits for.
                let again = stage.rates.leaves_time && self.last == Some(fault.gpa().gfn().raw());
                tries = if again { tries + 1 } else { 0 };
                for _ in 0..self.random.below(1 << u64::min(tries, 3)) {
                    stage.idly(|| stage.baton.wait());
                }
                if late.is_none() && (fault.is_reserved() || self.random.one_in(8)) {
                    late = Some(fault);
                }
            }
            // The same again, long after: whoever handles a fault may be stopped in between.
            if self.random.one_in(stage.rates.late)
                && let Some(fault) = late.take()
            {
                handle(stage, &mut vcpu, self.space, &self.who, fault);
            }
        }
    }

    fn changes_space(&mut self, vcpu: &mut Vcpu<SimHost>) {
        self.space = self.stage.some_space(&mut self.random);
        self.tells(|| format!("changes to address space {}", self.space.number()));
        if let Err(error) = vcpu.set_address_space(self.space) {
            self.violates(&format!("set_address_space: {error}"));
        }
    }

    /// Runs the guest on some processor until an exit; returns the fault that ended it, if one did.
    fn enters(&mut self, vcpu: &mut Vcpu<SimHost>) -> Option<Fault> {
        let stage = self.stage;
        // Between the preparation and the entry there is time.
        self.idles(UNTIL_ENTRY);
        let number = self.random.below(stage.processors.len() as u64) as usize;
        // Somebody else is there.
        let mut tags = stage.processors[number].tags.try_borrow_mut().ok()?;
        // A kick from here on ends the run, however early it comes.
        stage.host.forget_kick(self.id);
        let entry = vcpu.enter(&mut tags).ok()?;
        if self.random.one_in(stage.rates.dropped) {
            self.tells(|| "its entry is dropped".to_owned());
            return None;
        }
        if self.random.one_in(stage.rates.forgotten) {
            self.tells(|| format!("its entry on processor {number} is forgotten"));
            // It may have run all the same.
            self.runs(number, &entry, 1);
            std::mem::forget(entry);
            drop(tags);
            self.idles(FORGOTTEN);
            // The next call closes it; nobody who waits for it gets on before.
            let _ = vcpu.prepare();
            return None;
        }
        let accesses =
            if stage.rates.patient { u64::MAX } else { 1 + self.random.below(stage.rates.accesses) };
        let fault = self.runs(number, &entry, accesses);
        entry.ran();
        fault
    }

    /// The guest itself: at most `accesses` on the model of processor `number`, each judged.
    fn runs(&mut self, number: usize, entry: &Entry<'_, SimHost>, accesses: u64) -> Option<Fault> {
        let stage = self.stage;
        let model = &stage.processors[number].model;
        self.tells(|| format!("enters on processor {number}: tag {}, {:?}", entry.tag(), entry.flush()));
        // Between the entry and the guest's first instruction, too.
        self.idles(UNTIL_GUEST);
        // Entering a guest serialises: whatever the task stored is visible.
        instrument::drain(instrument::Scheduler::task(&*stage.baton));
        if let Err(refused) = model.borrow_mut().enter(context(stage, entry)) {
            self.violates(&format!("is not let in: {refused}"));
            return None;
        }
        let tag = PhysicalTag::Asid(entry.tag() as u16);
        stage.processors[number].guest.set(Some(tag));
        if let Err(mut violation) = oracle::entered(stage, &model.borrow(), tag, self.space) {
            violation.what = format!("{} enters processor {number}: {}", self.who, violation.what);
            stage.violate(violation);
        }
        if self.random.one_in(stage.rates.halts) {
            for _ in 0..self.random.below(HALT) {
                if stage.host.is_kicked(self.id) || stage.rest.get() {
                    break;
                }
                stage.idly(|| stage.baton.pause());
            }
        }
        let mut fault = None;
        for _ in 0..accesses {
            if stage.host.take_kick(self.id) || stage.rest.get() || !stage.step() {
                break;
            }
            if let Err(violation) = kicks::judge(stage, self.id) {
                stage.violate(violation);
                break;
            }
            fault = self.accesses(number);
            if fault.is_some() || stage.over() {
                break;
            }
            stage.idly(|| stage.baton.pause());
        }
        model.borrow_mut().exit();
        stage.processors[number].guest.set(None);
        fault
    }

    /// Makes one access; returns the fault that it comes to, if it does.
    fn accesses(&mut self, number: usize) -> Option<Fault> {
        let stage = self.stage;
        let (gfn, kind) = self.goes();
        let gpa = vmmu_machine::Gpa::new(gfn << 12);
        let seed = self.random.bits();
        let mut processor = stage.processors[number].model.borrow_mut();
        processor.set_step(stage.steps.get());
        if self.random.one_in(stage.rates.speculation) {
            let _ = processor.speculate_physical(&stage.memory, gpa, seed);
        }
        if let Err(mut violation) = oracle::one(stage, &processor, self.space, gfn) {
            violation.what = format!("{} on processor {number}: {}", self.who, violation.what);
            stage.violate(violation);
            return None;
        }
        let outcomes = processor.access_physical(&stage.memory, gpa, kind);
        // A patient guest uses what its processor remembers as long as it can.
        let translated =
            |outcome: &&vmmu_machine::Outcome| matches!(outcome, vmmu_machine::Outcome::Translated(_));
        let kept = outcomes.iter().find(translated).filter(|_| stage.rates.patient).copied();
        let came_to = match kept {
            Some(outcome) => outcomes.choose_this(&mut processor, &stage.memory, &outcome, seed),
            None => outcomes.choose(&mut processor, &stage.memory, seed),
        };
        let mut counted = stage.accesses.get();
        let mut fault = None;
        match came_to {
            Ok(vmmu_machine::Outcome::Translated(_)) => counted.translated += 1,
            Ok(vmmu_machine::Outcome::NestedPageFault(npf)) => {
                counted.faulted += 1;
                if !stage.baton.has_dozer() {
                    stage.hot.set((gfn, kind));
                }
                self.tells(|| format!("{kind:?} of {gfn:#x} faults: {:#x}", npf.info1));
                fault = Some(Fault::npf(Gpa::new(npf.gpa.raw()), npf.info1));
            }
            Ok(other) => self.violates(&format!("an access came to {other:?}")),
            // An entry changed under the walk: the access is made again.
            Err(_) => {}
        }
        stage.accesses.set(counted);
        fault
    }

    /// Where the next access goes, and of which kind it is.
    fn goes(&mut self) -> (u64, AccessKind) {
        let stage = self.stage;
        let kind = self.random.pick(&[AccessKind::Read, AccessKind::Write, AccessKind::Fetch]);
        // Where another vCPU was just now, or still is.
        let often = if stage.baton.has_dozer() { 2 } else { 8 };
        let (gfn, kind) = if stage.rates.follows && self.random.one_in(often) {
            stage.hot.get()
        } else {
            // Places are visited again soon, so that what is cached is used.
            let stays = self.last.filter(|_| !self.random.one_in(stage.rates.away));
            (stays.unwrap_or_else(|| some_gfn(stage, self.space, &mut self.random)), kind)
        };
        self.last = Some(gfn);
        (gfn, kind)
    }

    /// Lets others go on for less than `most` turns, in no operation of the library.
    fn idles(&mut self, most: u64) {
        for _ in 0..self.random.below(most) {
            self.stage.idly(|| self.stage.baton.pause());
        }
    }

    fn tells(&self, what: impl FnOnce() -> String) {
        self.stage.tell(&self.who, what);
    }

    fn violates(&self, what: &str) {
        self.stage.violate(Violation::new(format!("{}: {what}", self.who)));
    }
}

/// What a processor is told with an entry.
fn context(stage: &Stage, entry: &Entry<'_, SimHost>) -> NptContext {
    NptContext {
        registers: Registers::OFF,
        asid: entry.tag() as u16,
        tlb_control: match entry.flush() {
            EntryFlush::None => TlbControl::Nothing,
            EntryFlush::Tag => TlbControl::Guest,
            EntryFlush::All => TlbControl::Everything,
        },
        nested: Some(NestedTables {
            root: vmmu_machine::Hpa::new(entry.root().raw()),
            five_levels: stage.rates.five_levels,
            nx: true,
        }),
    }
}
