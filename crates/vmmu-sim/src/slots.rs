//! Who changes slots, and who drops everything.
//!
//! Each is one task: a loop of operations with a boundary between them. Invariant: the model is told of a change
//! exactly when the library's contract lets it count (see [`crate::world`]).

use crate::frames;
use crate::history::Stage;
use crate::oracle;
use crate::places::{ASKEW, GIANT, GIANTS, is_wide, places};
use crate::random::Random;
use crate::story::Violation;
use crate::world::{SimBacking, Slot};
use std::sync::Arc;
use vmmu::{Error, Gfn, PageSize, Region, RegionFlags, SlotError, SlotId};

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
