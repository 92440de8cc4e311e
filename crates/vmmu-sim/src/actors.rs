//! Who acts: vCPUs, movers of pages, whoever changes slots, whoever zaps.
//!
//! Each actor is one task: a loop of operations with a boundary between them. Invariant: the model is told of a
//! change exactly when the library's contract lets it count (see [`crate::world`]).

use crate::fetch;
use crate::history::{Accesses, Stage};
use crate::host::POISON;
use crate::oracle;
use crate::random::Random;
use crate::story::Violation;
use crate::world::{Page, SimBacking, Slot};
use std::sync::{Arc, Mutex};
use vmmu::{
    EntryFlush, Error, Fault, Gfn, GfnRange, Gpa, Level, Outcome, PageSize, Pfn, Region, RegionFlags,
    ResolveError, SlotError, SlotId, Vcpu,
};
use vmmu_machine::{AccessKind, NestedTables, NptContext, PhysicalTag, Registers, TlbControl};

/// Guest frames that histories use, in 2 MiB blocks far apart, so that tables come and go.
const PLACES: [u64; 6] = [0, 512, 1024, 1 << 18, (1 << 18) + 512, 1 << 27];

/// A guest frame: mostly one of few in a slot, as guests know their memory; now and then any.
fn some_gfn(stage: &Stage, random: &mut Random) -> u64 {
    let within = if random.one_in(12) { random.below(520) } else { random.below(6) };
    let world = stage.world.borrow();
    if world.slots.is_empty() || random.one_in(stage.rates.devices) {
        return random.pick(&PLACES[..stage.rates.places]) + within;
    }
    let slot = &world.slots[random.below(world.slots.len() as u64) as usize];
    slot.gfn + within.min(slot.pages - 1)
}

/// A virtual processor: enters, accesses memory, takes its faults, reads and writes by software.
pub(crate) fn vcpu(stage: &Stage, mut random: Random) {
    let Ok(mut vcpu) = stage.vm.vcpu() else { return };
    let who = format!("vcpu {}", vcpu.id().number());
    let mut last = None;
    while stage.step() {
        stage.boundary();
        match vcpu.prepare() {
            Ok(()) => {}
            Err(Error::OutOfMemory) => continue,
            Err(error) => return stage.violate(Violation::new(format!("{who}: prepare: {error}"))),
        }
        if random.one_in(stage.rates.fetches) {
            fetch::fetch(stage, &mut vcpu, &who, &mut random);
        } else if random.one_in(stage.rates.software) {
            software(stage, &mut vcpu, &who, &mut random);
        } else if let Some(fault) = guest(stage, &mut vcpu, &who, &mut random, &mut last)
            && !handle(stage, &mut vcpu, &who, fault)
        {
            last = None;
        }
    }
}

/// Runs the guest on some processor until an exit; returns the fault that ended it, if one did.
fn guest(
    stage: &Stage,
    vcpu: &mut Vcpu<crate::host::SimHost>,
    who: &str,
    random: &mut Random,
    last: &mut Option<u64>,
) -> Option<Fault> {
    let id = vcpu.id();
    // Between the preparation and the entry there is time.
    for _ in 0..random.below(4) {
        stage.baton.pause();
    }
    let number = random.below(stage.processors.len() as u64) as usize;
    let physical = &stage.processors[number];
    // Somebody else is there.
    let mut tags = physical.tags.try_borrow_mut().ok()?;
    // A kick from here on ends the run, however early it comes.
    stage.host.take_kick(id);
    let entry = vcpu.enter(&mut tags).ok()?;
    if random.one_in(stage.rates.dropped) {
        stage.tell(who, || "its entry is dropped".to_owned());
        return None;
    }
    if random.one_in(stage.rates.forgotten) {
        stage.tell(who, || format!("its entry on processor {number} is forgotten"));
        // It may have run all the same.
        run(stage, number, &entry, who, id, random, last, 1);
        std::mem::forget(entry);
        drop(tags);
        for _ in 0..random.below(20) {
            stage.baton.pause();
        }
        // The next call closes it; nobody who waits for it gets on before.
        let _ = vcpu.prepare();
        return None;
    }
    let accesses = if stage.rates.patient { u64::MAX } else { 1 + random.below(stage.rates.accesses) };
    let fault = run(stage, number, &entry, who, id, random, last, accesses);
    entry.ran();
    fault
}

/// The guest itself: accesses on the model of the processor, each judged.
#[allow(clippy::too_many_arguments)] // a guest's run is made of these
fn run(
    stage: &Stage,
    number: usize,
    entry: &vmmu::Entry<'_, crate::host::SimHost>,
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
    for _ in 0..random.below(3) {
        stage.baton.pause();
    }
    // Entering a guest serialises: whatever the task stored is visible.
    vmmu::instrument::drain(vmmu::instrument::Scheduler::task(&*stage.baton));
    if let Err(refused) = model.borrow_mut().enter(context) {
        stage.violate(Violation::new(format!("{who} is not let in: {refused}")));
        return None;
    }
    let tag = PhysicalTag::Asid(entry.tag() as u16);
    stage.processors[number].guest.set(Some(tag));
    if let Err(mut violation) = oracle::entered(stage, &model.borrow(), tag) {
        violation.what = format!("{who} enters processor {number}: {}", violation.what);
        stage.violate(violation);
    }
    let mut fault = None;
    for _ in 0..accesses {
        if stage.host.take_kick(id) || stage.rest.get() || !stage.step() {
            break;
        }
        // Places are visited again soon, so that what is cached is used.
        let gfn =
            last.filter(|_| !random.one_in(stage.rates.away)).unwrap_or_else(|| some_gfn(stage, random));
        *last = Some(gfn);
        let kind = random.pick(&[AccessKind::Read, AccessKind::Write, AccessKind::Fetch]);
        let gpa = vmmu_machine::Gpa::new(gfn << 12);
        let seed = random.bits();
        let mut processor = model.borrow_mut();
        processor.set_step(stage.steps.get());
        if random.one_in(stage.rates.speculation) {
            let _ = processor.speculate_physical(&stage.memory, gpa, seed);
        }
        if let Err(mut violation) = oracle::one(stage, &processor, gfn) {
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
        stage.baton.pause();
    }
    model.borrow_mut().exit();
    stage.processors[number].guest.set(None);
    fault
}

/// Takes a fault to the library, and judges the answer; says whether there is memory.
fn handle(stage: &Stage, vcpu: &mut Vcpu<crate::host::SimHost>, who: &str, fault: Fault) -> bool {
    let gfn = fault.gpa().gfn().raw();
    let settled = |present: bool| {
        let world = stage.world.borrow();
        let all = world.at(gfn).all(|slot| slot.settled);
        (all && world.at(gfn).any(|_| true) == present, (world.changes, world.openings))
    };
    let (there, _) = settled(true);
    let (gone, (before, openings)) = settled(false);
    let outcome = match vcpu.handle_fault(fault) {
        Ok(outcome) => outcome,
        Err(Error::OutOfMemory) => return true,
        Err(error) => {
            stage.violate(Violation::new(format!("{who}: fault at {gfn:#x}: {error}")));
            return false;
        }
    };
    let mut counted = stage.accesses.get();
    match outcome {
        Outcome::Resume => counted.resumed += 1,
        Outcome::Mmio(_) => counted.devices += 1,
        Outcome::ReadOnlyWrite(_) => counted.read_only += 1,
        _ => {}
    }
    stage.accesses.set(counted);
    let unchanged = stage.world.borrow().changes == before;
    let wrong = match outcome {
        Outcome::MemoryFault(_) => {
            let world = stage.world.borrow();
            unchanged && world.openings == openings && !world.may_be_absent(gfn)
        }
        Outcome::Resume => false,
        Outcome::Mmio(_) => there && unchanged,
        Outcome::ReadOnlyWrite(_) => {
            let world = stage.world.borrow();
            !fault.access().write
                || (unchanged && !gone && world.allowed(gfn).all(|(_, writable)| writable) && there)
        }
        _ => true,
    };
    if wrong {
        stage.violate(Violation::new(format!("{who}: a fault at {gfn:#x} came to {outcome:?}")));
    }
    outcome == Outcome::Resume
}

/// Reads and writes by software: never a frame that was given back.
fn software(stage: &Stage, vcpu: &mut Vcpu<crate::host::SimHost>, who: &str, random: &mut Random) {
    let gfn = some_gfn(stage, random);
    let mut word = [0; 8];
    let moment = |stage: &Stage| (stage.world.borrow().changes, stage.world.borrow().openings);
    let before = moment(stage);
    stage.tell(who, || format!("reads {gfn:#x} by software"));
    match vcpu.read(Gpa::new(gfn << 12), &mut word) {
        Ok(()) => {
            let value = u64::from_le_bytes(word);
            let counted = stage.accesses.get();
            stage.accesses.set(Accesses { software: counted.software + 1, ..counted });
            if value == POISON || value >> 32 == 0 {
                let what = format!("{who}: software read {value:#x} at {gfn:#x}, a frame that nobody has");
                stage.violate(Violation::new(what));
            }
        }
        Err(Error::NoSlot { .. } | Error::OutOfMemory) => {}
        Err(Error::Backing { why: ResolveError::Unbacked, .. })
            if before != moment(stage) || stage.world.borrow().may_be_absent(gfn) => {}
        Err(error) => stage.violate(Violation::new(format!("{who}: reading {gfn:#x}: {error}"))),
    }
}

/// The word that every page of a backing begins with.
fn mark(backing: u64, page: u64) -> u64 {
    (backing + 1) << 32 | page
}

/// Fresh pages for a 2 MiB block of a slot, or for the part of it that the slot has.
fn fresh(stage: &Stage, random: &mut Random, id: u64, gfn: u64, pages: std::ops::Range<u64>) -> Vec<Page> {
    let whole = (gfn + pages.start).is_multiple_of(512) && pages.end - pages.start == 512;
    let large = whole && random.one_in(stage.rates.large);
    let writable = !random.one_in(stage.rates.read_only);
    let slow = random.one_in(stage.rates.slow);
    let mut world = stage.world.borrow_mut();
    let run = if large { world.frames(512) } else { 0 };
    pages
        .clone()
        .map(|page| {
            let frame = if large { run + page - pages.start } else { world.frames(1) };
            let pfn = Pfn::new(frame);
            stage.host.fill(pfn, fetch::table(gfn, page).unwrap_or_else(|| mark(id, page)));
            let size = if large { PageSize::Size2M } else { PageSize::Size4K };
            Page { pfn, size, writable, slow, absent: false }
        })
        .collect()
}

/// Takes a block's frames back: nobody may reach them any more; poison first.
fn take_back(stage: &Stage, old: &[Page]) {
    let large = old.first().is_some_and(|page| page.size == PageSize::Size2M);
    for page in if large { &old[..1] } else { old } {
        if let Err(violation) = oracle::gone(stage, page.size, page.pfn) {
            return stage.violate(violation);
        }
    }
    let mut world = stage.world.borrow_mut();
    for page in old {
        stage.host.fill(page.pfn, POISON);
    }
    match old.first() {
        Some(first) if first.size == PageSize::Size2M => world.give_back(first.pfn.raw(), 512),
        _ => old.iter().for_each(|page| world.give_back(page.pfn.raw(), 1)),
    }
}

/// Moves memory: takes a block away, gives it other frames, and reuses the old ones at once.
pub(crate) fn mover(stage: &Stage, mut random: Random) {
    while !stage.over() {
        stage.boundary();
        if !random.one_in(stage.rates.moves) || !stage.begin(&mut random) {
            continue;
        }
        let slot = {
            let world = stage.world.borrow();
            match world.slots.len() {
                0 => continue,
                n => world.slots[random.below(n as u64) as usize].clone(),
            }
        };
        let idle = random.one_in(stage.rates.idle);
        // Half of the time where guests are most of the time.
        let page = if random.one_in(2) { random.below(slot.pages.min(6)) } else { random.below(slot.pages) };
        let block = GfnRange::block(Gfn::new(slot.gfn + page), Level::L2)
            .intersect(GfnRange::with_len(Gfn::new(slot.gfn), slot.pages).unwrap_or(GfnRange::EMPTY));
        let inside = block.start().raw() - slot.gfn..block.end().raw() - slot.gfn;
        // A large page goes whole, wherever a move of the slot has put it, or one page of it, and the others become
        // small where they are; of small ones sometimes one alone.
        let Some(found) = slot.backing.pages.lock().expect("one thread").get(page as usize).copied() else {
            continue;
        };
        let large = found.size == PageSize::Size2M;
        let first = page - page.min(found.pfn.raw() % 512);
        let split = large && !idle && random.one_in(stage.rates.splits);
        let pages = match (large, split) {
            (true, false) if !idle => first..first + 512,
            (false, _) if random.one_in(3) => inside,
            _ => page..page + 1,
        };
        let Some(range) = GfnRange::new(Gfn::new(slot.gfn + pages.start), Gfn::new(slot.gfn + pages.end))
        else {
            continue;
        };
        stage.tell("mover", || format!("invalidates {range:?}"));
        let began = stage.steps.get();
        let guard = match stage.vm.invalidate(range) {
            Ok(guard) => guard,
            Err(error) => return stage.violate(Violation::new(format!("invalidate: {error}"))),
        };
        stage.returned("invalidate", began);
        stage.world.borrow_mut().opened(range);
        let pause = |random: &mut Random, most| (0..random.below(most)).for_each(|_| stage.baton.pause());
        if idle {
            pause(&mut random, 40);
        } else {
            let gone = random.one_in(2);
            if gone {
                absent(stage, &slot, pages.clone(), true);
            }
            pause(&mut random, 6);
            let whole = split.then_some(first..first + 512);
            if let Some(old) = replace(stage, &mut random, &slot, pages.clone(), whole, large) {
                take_back(stage, &old);
                stage.tell("mover", || format!("moved {range:?}"));
            } else if gone {
                absent(stage, &slot, pages, false);
            }
        }
        stage.world.borrow_mut().closes(range);
        stage.baton.pause();
        drop(guard);
    }
}

/// Takes what is behind `pages` of a slot out of reach, or puts it back.
fn absent(stage: &Stage, slot: &Slot, pages: std::ops::Range<u64>, absent: bool) {
    let mut held = slot.backing.pages.lock().expect("one thread");
    let span = held.get_mut(pages.start as usize..pages.end as usize).unwrap_or(&mut []);
    for page in span {
        page.absent = absent;
    }
    stage.world.borrow_mut().openings += 1;
}

/// Puts other frames behind `pages` of a slot, which are invalidated, and returns the old ones; `None` where another
/// mover was there first, or the slot is gone. Where one page is split off a large one, `whole` is the large one.
fn replace(
    stage: &Stage,
    random: &mut Random,
    slot: &Slot,
    pages: std::ops::Range<u64>,
    whole: Option<std::ops::Range<u64>>,
    large: bool,
) -> Option<Vec<Page>> {
    let mut held = slot.backing.pages.lock().expect("one thread");
    if let Some(whole) = whole {
        let block = held.get_mut(whole.start as usize..whole.end as usize)?;
        if block.iter().any(|p| p.size != PageSize::Size2M) || block[0].pfn.raw() % 512 != 0 {
            return None;
        }
    }
    let span = held.get_mut(pages.start as usize..pages.end as usize)?;
    let first = *span.first()?;
    let as_was = span.iter().all(|p| (p.size == PageSize::Size2M) == large)
        && (!large || span.len() == 1 || first.pfn.raw() % 512 == 0);
    // The range was that of the slot's place then; it must be its only place now.
    let stays = {
        let world = stage.world.borrow();
        let mut places = world.slots.iter().filter(|s| Arc::ptr_eq(&s.backing, &slot.backing)).peekable();
        places.peek().is_some() && places.all(|s| s.gfn == slot.gfn)
    };
    if !as_was || !stays {
        return None;
    }
    let mut old = span.to_vec();
    let new = fresh(stage, random, slot.backing.id, slot.gfn, pages.clone());
    for (old, new) in old.iter().zip(&new) {
        stage.host.copy(old.pfn, new.pfn);
    }
    span.copy_from_slice(&new);
    if large && pages.end - pages.start == 1 {
        // Its neighbours stay where they are, each for itself; so is the frame that goes.
        let start = (pages.start - first.pfn.raw() % 512) as usize;
        held[start..start + 512].iter_mut().for_each(|page| page.size = PageSize::Size4K);
        old[0].size = PageSize::Size4K;
    }
    drop(held);
    // The right to write may be another.
    stage.world.borrow_mut().changes += 1;
    Some(old)
}

/// Makes, moves and deletes slots.
pub(crate) fn slots(stage: &Stage, mut random: Random) {
    let mut backings = 0;
    while !stage.over() {
        stage.boundary();
        let id = random.below(u64::from(stage.rates.slots)) as u16;
        let existing = stage.world.borrow().slots.iter().position(|s| s.id == id);
        if existing.is_some() && !random.one_in(stage.rates.slot_changes) || !stage.begin(&mut random) {
            continue;
        }
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

fn create(stage: &Stage, random: &mut Random, id: u16, backing_id: u64) {
    let gfn = random.pick(&PLACES[..stage.rates.places]) + if random.one_in(4) { 3 } else { 0 };
    let pages = random.pick(stage.rates.lengths);
    let read_only = random.one_in(stage.rates.read_only);
    let backing = Arc::new(SimBacking { id: backing_id, pages: Mutex::default(), delay: stage.rates.delay });
    let mut at = 0;
    while at < pages {
        let next = ((gfn + at) / 512 + 1) * 512 - gfn;
        let part = fresh(stage, random, backing_id, gfn, at..next.min(pages));
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
    stage.tell("slots", || format!("makes slot {id} at {gfn:#x}, {pages} pages"));
    let result = stage.vm.set_region(SlotId::new(id), region);
    let mut world = stage.world.borrow_mut();
    world.changes += 1;
    let at = world.slots.iter().position(|s| s.id == id).unwrap_or(0);
    match result {
        Ok(()) => world.slots[at].settled = true,
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
        take_back(stage, &pages[at..at + count]);
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
    stage.tell("slots", || format!("deletes slot {} at {:#x}", slot.id, slot.gfn));
    if let Err(error) = stage.vm.delete_region(SlotId::new(slot.id)) {
        return stage.violate(Violation::new(format!("delete_region: {error}")));
    }
    {
        let mut world = stage.world.borrow_mut();
        world.changes += 1;
        world.slots.retain(|s| s.id != slot.id);
    }
    forget(stage, &slot);
}

fn relocate(stage: &Stage, random: &mut Random, at: usize) {
    let gfn = random.pick(&PLACES[..stage.rates.places]);
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
    stage.tell("slots", || format!("moves slot {} from {:#x} to {gfn:#x}", slot.id, slot.gfn));
    let result = stage.vm.set_region(SlotId::new(slot.id), region);
    let mut world = stage.world.borrow_mut();
    world.changes += 1;
    match result {
        Ok(()) | Err(Error::Slot(SlotError::Overlaps(_))) => {
            let stays = if result.is_ok() { gfn } else { slot.gfn };
            world.slots.retain(|s| s.id != slot.id);
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
