//! Who moves memory: takes it away under an invalidation, and gives other frames.
//!
//! Each mover is one task. Invariant: between the invalidation and its end, and only then, a backing changes; the old
//! frames are taken back, and may be anybody's, before the end.

use crate::frames;
use crate::history::Stage;
use crate::random::Random;
use crate::story::Violation;
use crate::world::{Page, Slot};
use std::ops::Range;
use vmmu::{Gfn, GfnRange, Level, PageSize};

/// Pages at the start of a slot where guests are most of the time, and so half of the moves.
const OFTEN: u64 = 6;
/// Turns, at most, for which memory stays away where nothing comes of it, and where other frames come.
const IDLE: u64 = 40;
const MOVING: u64 = 6;
/// A glance: the part of a slot in which it begins, the most pages that it takes away, and the most turns.
const SEEN: u64 = 1536;
const GLANCE: u64 = 200;
const LOOKS: u64 = 100;

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
        if random.one_in(stage.rates.glances) {
            glance(stage, &mut random, &slot);
        } else {
            moves(stage, &mut random, &slot);
        }
    }
}

/// Takes `range` away, does `body`, and gives it back.
fn invalidated(stage: &Stage, range: GfnRange, body: impl FnOnce()) {
    let _operation = stage.operations.begin();
    let began = stage.steps.get();
    let guard = match stage.vm.invalidate(range) {
        Ok(guard) => guard,
        Err(error) => return stage.violate(Violation::new(format!("invalidate: {error}"))),
    };
    stage.returned("invalidate", began);
    stage.world.borrow_mut().opened(range);
    body();
    stage.world.borrow_mut().closes(range);
    stage.baton.pause();
    drop(guard);
}

/// Moves what is behind some pages of a slot, or takes it away for a while.
fn moves(stage: &Stage, random: &mut Random, slot: &Slot) {
    let idle = random.one_in(stage.rates.idle);
    let page = if random.one_in(2) { random.below(slot.pages.min(OFTEN)) } else { random.below(slot.pages) };
    let block = GfnRange::block(Gfn::new(slot.gfn + page), Level::L2)
        .intersect(GfnRange::with_len(Gfn::new(slot.gfn), slot.pages).unwrap_or(GfnRange::EMPTY));
    let inside = block.start().raw() - slot.gfn..block.end().raw() - slot.gfn;
    // A large page goes whole, wherever a move of the slot has put it, or one page of it, and the others become
    // small where they are; of small ones sometimes one alone.
    let Some(found) = slot.backing.page(page) else { return };
    let large = found.size > PageSize::Size4K;
    let first = page - page.min(found.pfn.raw() % found.size.pages());
    let split = found.size == PageSize::Size2M && !idle && random.one_in(stage.rates.splits);
    let pages = match (large, split) {
        (true, false) if !idle => first..first + found.size.pages(),
        (false, _) if random.one_in(3) => inside,
        _ => page..page + 1,
    };
    let Some(range) = GfnRange::new(Gfn::new(slot.gfn + pages.start), Gfn::new(slot.gfn + pages.end)) else {
        return;
    };
    stage.tell("mover", || format!("invalidates {range:?}"));
    invalidated(stage, range, || {
        if idle {
            return pause(stage, random, IDLE);
        }
        let gone = random.one_in(2) && absent(stage, slot, pages.clone(), true);
        pause(stage, random, MOVING);
        let whole = split.then_some(first..first + 512);
        if let Some(old) = replace(stage, random, slot, pages.clone(), whole, found.size) {
            frames::take_back(stage, &old);
            stage.touch(range.start().raw(), range.pages());
            stage.tell("mover", || format!("moved {range:?}"));
        } else if gone {
            absent(stage, slot, pages, false);
        }
    });
}

/// Takes memory away for a while and changes nothing: a part of a slot, which may be less than a page, or everything.
fn glance(stage: &Stage, random: &mut Random, slot: &Slot) {
    let first = random.below(slot.pages.min(SEEN));
    let pages = 1 + random.below((slot.pages - first).min(GLANCE));
    let part = GfnRange::with_len(Gfn::new(slot.gfn + first), pages).unwrap_or(GfnRange::ALL);
    let range = if random.one_in(6) { GfnRange::ALL } else { part };
    stage.tell("mover", || format!("invalidates {range:?} and changes nothing"));
    invalidated(stage, range, || pause(stage, random, LOOKS));
}

/// Lets others go on for less than `most` turns.
fn pause(stage: &Stage, random: &mut Random, most: u64) {
    (0..random.below(most)).for_each(|_| stage.baton.pause());
}

/// Takes what is behind `pages` of a slot, which are invalidated, out of reach, or puts it back; says whether it did.
/// Where the slot was moved meanwhile they are not at the place that was invalidated: nothing may be taken there.
fn absent(stage: &Stage, slot: &Slot, pages: Range<u64>, absent: bool) -> bool {
    if absent && !stage.world.borrow().stays(slot) {
        return false;
    }
    let mut held = slot.backing.pages.lock().expect("one thread");
    for page in span(&mut held, pages).unwrap_or(&mut []) {
        page.absent = absent;
    }
    stage.world.borrow_mut().openings += 1;
    true
}

/// What a backing holds for `pages`: of 1 GiB the first page alone.
fn span(held: &mut [Page], pages: Range<u64>) -> Option<&mut [Page]> {
    let giant = held.first().is_some_and(|page| page.size == PageSize::Size1G);
    held.get_mut(pages.start as usize..if giant { pages.start + 1 } else { pages.end } as usize)
}

/// Puts other frames behind `pages` of a slot, which are invalidated, and returns the old ones; `None` where another
/// mover was there first, or the slot is gone. Where one page is split off a large one, `whole` is the large one.
fn replace(
    stage: &Stage,
    random: &mut Random,
    slot: &Slot,
    pages: Range<u64>,
    whole: Option<Range<u64>>,
    size: PageSize,
) -> Option<Vec<Page>> {
    let mut held = slot.backing.pages.lock().expect("one thread");
    if let Some(whole) = whole {
        let block = held.get_mut(whole.start as usize..whole.end as usize)?;
        if block.iter().any(|p| p.size != PageSize::Size2M) || block[0].pfn.raw() % 512 != 0 {
            return None;
        }
    }
    let alone = pages.end - pages.start == 1;
    let span = span(&mut held, pages.clone())?;
    let first = *span.first()?;
    let as_was = span.iter().all(|p| p.size == size) && (alone || first.pfn.raw() % size.pages() == 0);
    // The range was that of the slot's place then; it must be its only place now.
    if !as_was || !stage.world.borrow().stays(slot) {
        return None;
    }
    let mut old = span.to_vec();
    let new = frames::fresh(stage, random, slot.backing.id, slot.gfn, pages.clone());
    frames::copy(stage, &old, &new);
    span.copy_from_slice(&new);
    if size == PageSize::Size2M && alone {
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
