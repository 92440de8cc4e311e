//! Who acts: vCPUs, whoever changes slots, whoever zaps.
//!
//! Each actor is one task: a loop of operations with a boundary between them. Invariant: the model is told of a
//! change exactly when the library's contract lets it count (see [`crate::world`]).

use crate::fetch;
use crate::frames;
use crate::history::Stage;
use crate::host::{Failures, SimHost};
use crate::kicks;
use crate::oracle;
use crate::random::Random;
use crate::rates::Spread;
use crate::software::{self, Software};
use crate::story::Violation;
use crate::world::{SimBacking, Slot};
use std::sync::Arc;
use vmmu::{
    AddressSpace, EntryFlush, Error, Fault, Gfn, Gpa, Outcome, PageSize, Region, RegionFlags, ResolveError,
    SlotError, SlotId, Vcpu, instrument,
};
use vmmu_machine::{AccessKind, NestedTables, NptContext, PhysicalTag, Registers, TlbControl};

/// Guest frames that histories use, in 2 MiB blocks far apart, so that tables come and go.
const PLACES: [u64; 6] = [0, 512, 1024, 1 << 18, (1 << 18) + 512, 1 << 27];
/// Two of them that share no table but the root.
const NARROW: [u64; 2] = [0, 1 << 18];
/// Where slots of 1 GiB are made, and their pages.
const GIANTS: [u64; 3] = [1 << 18, 1 << 27, (1 << 27) + (1 << 18)];
const GIANT: u64 = PageSize::Size1G.pages();
/// Places far from each other, 512 GiB apart, beyond all slots.
const FAR: u64 = 120;
/// A frame that no processor of the simulation can name.
const BEYOND: u64 = 1 << 34;
/// Pages from a place on that vCPUs use: now and then as many as these, which reach beyond any slot; mostly, where vCPUs
/// are spread, and where they meet.
const EVEN: u64 = 520;
const FEW: u64 = 6;
const MEETING: u64 = 2;
/// Where in its block a slot begins that does not begin with it.
const ASKEW: u64 = 3;
/// Turns, at most: between a preparation and its entry; between the entry and the guest's first instruction; of a halt;
/// until a forgotten entry is closed.
const UNTIL_ENTRY: u64 = 4;
const UNTIL_GUEST: u64 = 3;
const HALT: u64 = 100;
const FORGOTTEN: u64 = 20;
/// Faults at one place in a row that may be answered by another try while nothing that changes memory gets on: each try
/// gets the guest on, or another vCPU, and no more can be in the way.
const TRIES: u32 = 4;

/// Places that slots and accesses have in this history.
fn places(stage: &Stage) -> &'static [u64] {
    match stage.rates.spread {
        Spread::Narrow => &NARROW,
        Spread::Wide | Spread::Far | Spread::Spot => &PLACES[..stage.rates.places],
    }
}

/// Whether vCPUs are spread over many pages.
pub(crate) fn is_wide(stage: &Stage) -> bool {
    matches!(stage.rates.spread, Spread::Wide | Spread::Far)
}

/// A guest frame of `space`: mostly one of few in a slot, as guests know their memory; now and then any.
pub(crate) fn some_gfn(stage: &Stage, space: AddressSpace, random: &mut Random) -> u64 {
    let within = match stage.rates.spread {
        Spread::Wide | Spread::Far if random.one_in(12) => random.below(EVEN),
        Spread::Wide | Spread::Far => random.below(FEW),
        Spread::Narrow => random.below(MEETING),
        Spread::Spot => 0,
    };
    if random.one_in(stage.rates.far) {
        return (2 + random.below(FAR)) << 27;
    }
    let world = stage.world.borrow();
    let elsewhere = random.one_in(stage.rates.devices);
    let Some(slot) = world.some_slot(space, random).filter(|_| !elsewhere) else {
        return if random.one_in(stage.rates.beyond) { BEYOND } else { random.pick(places(stage)) } + within;
    };
    let block = if slot.pages == GIANT { 512 * random.below(3) } else { 0 };
    slot.gfn + (block + within).min(slot.pages - 1)
}

/// Whether a call failed for want of tables, as it may in this history.
fn no_tables(stage: &Stage, error: Error) -> bool {
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

/// A virtual processor: enters, accesses memory, takes its faults, reads and writes by software.
pub(crate) fn vcpu(stage: &Stage, mut random: Random) {
    let Ok(mut vcpu) = stage.vm.vcpu() else { return };
    let who = format!("vcpu {}", vcpu.id().number());
    let (mut last, mut late, mut tries) = (None, None, 0);
    let mut retries = Retries::default();
    let mut space = AddressSpace::NORMAL;
    if random.one_in(stage.rates.unprepared) {
        guest(stage, &mut vcpu, space, &who, &mut random, &mut last);
    }
    while stage.step() {
        stage.boundary();
        if stage.rates.spaces > 1 && random.one_in(stage.rates.space_changes) {
            space = stage.some_space(&mut random);
            stage.tell(&who, || format!("changes to address space {}", space.number()));
            if let Err(error) = vcpu.set_address_space(space) {
                return stage.violate(Violation::new(format!("{who}: set_address_space: {error}")));
            }
        }
        match vcpu.prepare() {
            Ok(()) => stage.kicks.prepared(vcpu.id()),
            Err(error) if no_tables(stage, error) => continue,
            Err(error) => return stage.violate(Violation::new(format!("{who}: prepare: {error}"))),
        }
        if random.one_in(stage.rates.fetches) {
            fetch::fetch(stage, &mut vcpu, space, &who, &mut random);
        } else if random.one_in(stage.rates.software) {
            software::accesses(stage, &mut Software::Vcpu(&mut vcpu), space, &who, &mut random);
        } else if let Some(fault) = guest(stage, &mut vcpu, space, &who, &mut random, &mut last) {
            let quiet = stage.operations.quiet();
            let outcome = handle(stage, &mut vcpu, space, &who, fault);
            let again = outcome == Some(Outcome::Resume);
            retries.judge(stage, &who, fault, if again { quiet } else { None });
            if outcome.is_some() && !again {
                // Guests do not stay where no memory is.
                last = None;
            }
            // Whoever faults again and again leaves time to those that it waits for.
            let again = stage.rates.leaves_time && last == Some(fault.gpa().gfn().raw());
            tries = if again { tries + 1 } else { 0 };
            for _ in 0..random.below(1 << u64::min(tries, 3)) {
                stage.idly(|| stage.baton.wait());
            }
            if late.is_none() && (fault.is_reserved() || random.one_in(8)) {
                late = Some(fault);
            }
        }
        // The same again, long after: whoever handles a fault may be stopped in between.
        if random.one_in(stage.rates.late)
            && let Some(fault) = late.take()
        {
            handle(stage, &mut vcpu, space, &who, fault);
        }
    }
}

/// Runs the guest on some processor until an exit; returns the fault that ended it, if one did.
fn guest(
    stage: &Stage,
    vcpu: &mut Vcpu<SimHost>,
    space: AddressSpace,
    who: &str,
    random: &mut Random,
    last: &mut Option<u64>,
) -> Option<Fault> {
    let id = vcpu.id();
    // Between the preparation and the entry there is time.
    for _ in 0..random.below(UNTIL_ENTRY) {
        stage.idly(|| stage.baton.pause());
    }
    let number = random.below(stage.processors.len() as u64) as usize;
    let physical = &stage.processors[number];
    // Somebody else is there.
    let mut tags = physical.tags.try_borrow_mut().ok()?;
    // A kick from here on ends the run, however early it comes.
    stage.host.forget_kick(id);
    let entry = vcpu.enter(&mut tags).ok()?;
    if random.one_in(stage.rates.dropped) {
        stage.tell(who, || "its entry is dropped".to_owned());
        return None;
    }
    if random.one_in(stage.rates.forgotten) {
        stage.tell(who, || format!("its entry on processor {number} is forgotten"));
        // It may have run all the same.
        run(stage, number, &entry, space, who, id, random, last, 1);
        std::mem::forget(entry);
        drop(tags);
        for _ in 0..random.below(FORGOTTEN) {
            stage.idly(|| stage.baton.pause());
        }
        // The next call closes it; nobody who waits for it gets on before.
        let _ = vcpu.prepare();
        return None;
    }
    let accesses = if stage.rates.patient { u64::MAX } else { 1 + random.below(stage.rates.accesses) };
    let fault = run(stage, number, &entry, space, who, id, random, last, accesses);
    entry.ran();
    fault
}

/// The guest itself: accesses on the model of the processor, each judged.
#[allow(clippy::too_many_arguments)] // a guest's run is made of these
fn run(
    stage: &Stage,
    number: usize,
    entry: &vmmu::Entry<'_, SimHost>,
    space: AddressSpace,
    who: &str,
    id: vmmu::VcpuId,
    random: &mut Random,
    last: &mut Option<u64>,
    accesses: u64,
) -> Option<Fault> {
    let model = &stage.processors[number].model;
    let context = NptContext {
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
    };
    stage.tell(who, || format!("enters on processor {number}: tag {}, {:?}", entry.tag(), entry.flush()));
    // Between the entry and the guest's first instruction, too.
    for _ in 0..random.below(UNTIL_GUEST) {
        stage.idly(|| stage.baton.pause());
    }
    // Entering a guest serialises: whatever the task stored is visible.
    instrument::drain(instrument::Scheduler::task(&*stage.baton));
    if let Err(refused) = model.borrow_mut().enter(context) {
        stage.violate(Violation::new(format!("{who} is not let in: {refused}")));
        return None;
    }
    let tag = PhysicalTag::Asid(entry.tag() as u16);
    stage.processors[number].guest.set(Some(tag));
    if let Err(mut violation) = oracle::entered(stage, &model.borrow(), tag, space) {
        violation.what = format!("{who} enters processor {number}: {}", violation.what);
        stage.violate(violation);
    }
    if random.one_in(stage.rates.halts) {
        for _ in 0..random.below(HALT) {
            if stage.host.is_kicked(id) || stage.rest.get() {
                break;
            }
            stage.idly(|| stage.baton.pause());
        }
    }
    let mut fault = None;
    for _ in 0..accesses {
        if stage.host.take_kick(id) || stage.rest.get() || !stage.step() {
            break;
        }
        if let Err(violation) = kicks::judge(stage, id) {
            stage.violate(violation);
            break;
        }
        // Places are visited again soon, so that what is cached is used.
        let kind = random.pick(&[AccessKind::Read, AccessKind::Write, AccessKind::Fetch]);
        // Or where another vCPU was just now, or still is.
        let often = if stage.baton.has_dozer() { 2 } else { 8 };
        let (gfn, kind) = if stage.rates.follows && random.one_in(often) {
            stage.hot.get()
        } else {
            let stays = last.filter(|_| !random.one_in(stage.rates.away));
            (stays.unwrap_or_else(|| some_gfn(stage, space, random)), kind)
        };
        *last = Some(gfn);
        let gpa = vmmu_machine::Gpa::new(gfn << 12);
        let seed = random.bits();
        let mut processor = model.borrow_mut();
        processor.set_step(stage.steps.get());
        if random.one_in(stage.rates.speculation) {
            let _ = processor.speculate_physical(&stage.memory, gpa, seed);
        }
        if let Err(mut violation) = oracle::one(stage, &processor, space, gfn) {
            violation.what = format!("{who} on processor {number}: {}", violation.what);
            stage.violate(violation);
            break;
        }
        let outcomes = processor.access_physical(&stage.memory, gpa, kind);
        let mut counted = stage.accesses.get();
        // A patient guest uses what its processor remembers as long as it can.
        let translated =
            |outcome: &&vmmu_machine::Outcome| matches!(outcome, vmmu_machine::Outcome::Translated(_));
        let kept = outcomes.iter().find(translated).filter(|_| stage.rates.patient).copied();
        let came_to = match kept {
            Some(outcome) => outcomes.choose_this(&mut processor, &stage.memory, &outcome, seed),
            None => outcomes.choose(&mut processor, &stage.memory, seed),
        };
        match came_to {
            Ok(vmmu_machine::Outcome::Translated(_)) => counted.translated += 1,
            Ok(vmmu_machine::Outcome::NestedPageFault(npf)) => {
                counted.faulted += 1;
                if !stage.baton.has_dozer() {
                    stage.hot.set((gfn, kind));
                }
                stage.tell(who, || format!("{kind:?} of {gfn:#x} faults: {:#x}", npf.info1));
                fault = Some(Fault::npf(Gpa::new(npf.gpa.raw()), npf.info1));
            }
            Ok(other) => stage.violate(Violation::new(format!("{who}: an access came to {other:?}"))),
            // An entry changed under the walk: the access is made again.
            Err(_) => {}
        }
        stage.accesses.set(counted);
        drop(processor);
        if fault.is_some() {
            break;
        }
        stage.idly(|| stage.baton.pause());
    }
    model.borrow_mut().exit();
    stage.processors[number].guest.set(None);
    fault
}

/// The faults at one place that were answered by another try, while nothing got on that changes memory.
#[derive(Default)]
struct Retries {
    place: Option<(Fault, u64)>,
    count: u32,
}

impl Retries {
    /// Judges that they come to an end. `quiet` is the moment if this fault was answered by another try, and began when
    /// nothing changed memory.
    fn judge(&mut self, stage: &Stage, who: &str, fault: Fault, quiet: Option<u64>) {
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
fn handle(
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

/// Makes, moves and deletes slots.
pub(crate) fn slots(stage: &Stage, mut random: Random) {
    let mut backings = 0;
    while !stage.over() {
        stage.boundary();
        let number = random.below(u64::from(stage.rates.slots)) as u16;
        let id = SlotId::in_space(stage.some_space(&mut random), number);
        let existing = stage.world.borrow().slots.iter().position(|s| s.id == id);
        let rate = if existing.is_some() { stage.rates.slot_changes } else { stage.rates.empty };
        if !random.one_in(rate) || !stage.begin(&mut random) {
            continue;
        }
        let _operation = stage.operations.begin();
        match existing {
            Some(at) if random.one_in(3) => relocate(stage, &mut random, at),
            Some(at) => delete(stage, at),
            None => {
                backings += 1;
                create(stage, &mut random, id, backings);
            }
        }
    }
}

fn create(stage: &Stage, random: &mut Random, id: SlotId, backing_id: u64) {
    let (gfn, pages) = if random.one_in(stage.rates.giants) {
        (random.pick(if is_wide(stage) { &GIANTS } else { &GIANTS[..1] }), GIANT)
    } else {
        let gfn = random.pick(places(stage)) + if random.one_in(4) { ASKEW } else { 0 };
        (gfn, random.pick(stage.rates.lengths))
    };
    let read_only = random.one_in(stage.rates.read_only);
    let backing = Arc::new(SimBacking::new(backing_id, stage.rates.delay, stage.rates.hesitates));
    let mut at = 0;
    while at < pages {
        let next = if pages == GIANT { pages } else { ((gfn + at) / 512 + 1) * 512 - gfn };
        let part = frames::fresh(stage, random, backing_id, gfn, at..next.min(pages));
        backing.pages.lock().expect("one thread").extend(part);
        at = next.min(pages);
    }
    let slot = Slot { id, gfn, pages, read_only, backing: Arc::clone(&backing), settled: false };
    {
        let mut world = stage.world.borrow_mut();
        world.changes += 1;
        world.slots.push(slot);
    }
    let flags = if read_only { RegionFlags::READ_ONLY } else { RegionFlags::empty() };
    let region = Region::new(Gfn::new(gfn), pages, backing).flags(flags);
    stage.tell("slots", || format!("makes {id} at {gfn:#x}, {pages} pages"));
    let result = stage.vm.set_region(id, region);
    let mut world = stage.world.borrow_mut();
    world.changes += 1;
    let at = world.slots.iter().position(|s| s.id == id).unwrap_or(0);
    match result {
        Ok(()) => {
            world.slots[at].settled = true;
            stage.touch(gfn, pages);
        }
        Err(Error::Slot(SlotError::Overlaps(_))) => {
            let slot = world.slots.remove(at);
            drop(world);
            forget(stage, &slot);
        }
        Err(error) => {
            drop(world);
            stage.violate(Violation::new(format!("set_region: {error}")));
        }
    }
}

/// Gives every frame of a slot back.
fn forget(stage: &Stage, slot: &Slot) {
    let pages = std::mem::take(&mut *slot.backing.pages.lock().expect("one thread"));
    let mut at = 0;
    while at < pages.len() {
        let count = if pages[at].size == PageSize::Size2M { 512 } else { 1 };
        frames::take_back(stage, &pages[at..at + count]);
        at += count;
    }
}

fn delete(stage: &Stage, at: usize) {
    let slot = {
        let mut world = stage.world.borrow_mut();
        world.changes += 1;
        world.slots[at].settled = false;
        world.slots[at].clone()
    };
    stage.tell("slots", || format!("deletes {} at {:#x}", slot.id, slot.gfn));
    if let Err(error) = stage.vm.delete_region(slot.id) {
        return stage.violate(Violation::new(format!("delete_region: {error}")));
    }
    {
        let mut world = stage.world.borrow_mut();
        world.changes += 1;
        world.slots.retain(|s| s.id != slot.id);
    }
    stage.touch(slot.gfn, slot.pages);
    forget(stage, &slot);
}

fn relocate(stage: &Stage, random: &mut Random, at: usize) {
    let gfn = random.pick(places(stage));
    let slot = {
        let mut world = stage.world.borrow_mut();
        world.changes += 1;
        world.slots[at].settled = false;
        let slot = world.slots[at].clone();
        // Until it is over, the pages may be at either place.
        world.slots.push(Slot { gfn, ..slot.clone() });
        slot
    };
    let flags = if slot.read_only { RegionFlags::READ_ONLY } else { RegionFlags::empty() };
    let region = Region::new(Gfn::new(gfn), slot.pages, slot.backing.clone()).flags(flags);
    stage.tell("slots", || format!("moves {} from {:#x} to {gfn:#x}", slot.id, slot.gfn));
    let result = stage.vm.set_region(slot.id, region);
    let mut world = stage.world.borrow_mut();
    world.changes += 1;
    match result {
        Ok(()) | Err(Error::Slot(SlotError::Overlaps(_))) => {
            let stays = if result.is_ok() { gfn } else { slot.gfn };
            world.slots.retain(|s| s.id != slot.id);
            stage.touch(slot.gfn, slot.pages);
            stage.touch(gfn, slot.pages);
            world.slots.push(Slot { gfn: stays, settled: true, ..slot });
        }
        Err(error) => {
            drop(world);
            stage.violate(Violation::new(format!("set_region: {error}")));
        }
    }
}

/// Drops everything now and then.
pub(crate) fn zapper(stage: &Stage, mut random: Random) {
    while !stage.over() {
        stage.boundary();
        if !random.one_in(stage.rates.zaps) || !stage.begin(&mut random) {
            continue;
        }
        stage.tell("zapper", || "zaps everything".to_owned());
        let _operation = stage.operations.begin();
        let before = stage.steps.get();
        if let Err(error) = stage.vm.zap_all() {
            return stage.violate(Violation::new(format!("zap_all: {error}")));
        }
        stage.returned("zap_all", before);
        stage.zapped.set(before);
        if let Err(violation) = oracle::zapped(stage) {
            return stage.violate(violation);
        }
        stage.tell("zapper", || "zapped everything".to_owned());
    }
}
