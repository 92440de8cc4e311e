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
use std::sync::Arc;
use vmmu::{Gfn, GfnRange, Level, PageSize};

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
            continue;
        }
        let idle = random.one_in(stage.rates.idle);
        // Half of the time where guests are most of the time.
        let page = if random.one_in(2) { random.below(slot.pages.min(6)) } else { random.below(slot.pages) };
        let block = GfnRange::block(Gfn::new(slot.gfn + page), Level::L2)
            .intersect(GfnRange::with_len(Gfn::new(slot.gfn), slot.pages).unwrap_or(GfnRange::EMPTY));
        let inside = block.start().raw() - slot.gfn..block.end().raw() - slot.gfn;
        // A large page goes whole, wherever a move of the slot has put it, or one page of it, and the others become
        // small where they are; of small ones sometimes one alone.
        let Some(found) = slot.backing.page(page) else { continue };
        let large = found.size > PageSize::Size4K;
        let first = page - page.min(found.pfn.raw() % found.size.pages());
        let split = found.size == PageSize::Size2M && !idle && random.one_in(stage.rates.splits);
        let pages = match (large, split) {
            (true, false) if !idle => first..first + found.size.pages(),
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
            if let Some(old) = replace(stage, &mut random, &slot, pages.clone(), whole, found.size) {
                frames::take_back(stage, &old);
                stage.touch(range.start().raw(), range.pages());
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

/// Takes memory away for a while and changes nothing: a part of a slot, which may be less than a page, or everything.
fn glance(stage: &Stage, random: &mut Random, slot: &Slot) {
    let first = random.below(slot.pages.min(1536));
    let pages = 1 + random.below((slot.pages - first).min(200));
    let part = GfnRange::with_len(Gfn::new(slot.gfn + first), pages).unwrap_or(GfnRange::ALL);
    let range = if random.one_in(6) { GfnRange::ALL } else { part };
    stage.tell("mover", || format!("invalidates {range:?} and changes nothing"));
    let guard = match stage.vm.invalidate(range) {
        Ok(guard) => guard,
        Err(error) => return stage.violate(Violation::new(format!("invalidate: {error}"))),
    };
    stage.world.borrow_mut().opened(range);
    for _ in 0..random.below(100) {
        stage.baton.pause();
    }
    stage.world.borrow_mut().closes(range);
    drop(guard);
}

/// Takes what is behind `pages` of a slot out of reach, or puts it back.
fn absent(stage: &Stage, slot: &Slot, pages: Range<u64>, absent: bool) {
    let mut held = slot.backing.pages.lock().expect("one thread");
    for page in span(&mut held, pages).unwrap_or(&mut []) {
        page.absent = absent;
    }
    stage.world.borrow_mut().openings += 1;
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
    let stays = {
        let world = stage.world.borrow();
        let mut places = world.slots.iter().filter(|s| Arc::ptr_eq(&s.backing, &slot.backing)).peekable();
        places.peek().is_some() && places.all(|s| s.gfn == slot.gfn)
    };
    if !as_was || !stays {
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
