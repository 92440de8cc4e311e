//! Frames of guests: chosen, marked, given, and taken back.
//!
//! A frame that somebody has begins with words that name its backing and page, or are tables; one that nobody has holds
//! poison, or zeroes where nobody ever had it. Of a frame of 1 GiB only a few pages are marked. Invariant: a frame that
//! is given out was not written to since it was taken back.

use crate::fetch;
use crate::history::Stage;
use crate::host::POISON;
use crate::oracle;
use crate::places::is_wide;
use crate::random::Random;
use crate::story::Violation;
use crate::world::Page;
use std::ops::Range;
use vmmu::{PageSize, Pfn, ResolveError};

/// Pages of a frame of 1 GiB that are marked.
const MARKED: [Range<u64>; 3] = [0..8, 512..520, 1024..1032];

/// The largest pages in which backings that are read-only at first give what is written to.
const LAZILY: [PageSize; 4] = [PageSize::Size4K, PageSize::Size4K, PageSize::Size2M, PageSize::Size1G];

/// The words that a page of a backing is filled with; their upper half is never 0.
fn mark(backing: u64, page: u64) -> u64 {
    (backing + 1) << 32 | page
}

/// The pages of a frame of `size` that are marked.
fn marked(size: PageSize) -> impl Iterator<Item = u64> {
    let giant = size == PageSize::Size1G;
    let all = if giant { MARKED } else { [0..size.pages(), 0..0, 0..0] };
    all.into_iter().flatten()
}

/// Fresh pages for a 2 MiB block of a slot, for the part of it that the slot has, or for a slot of 1 GiB.
pub(crate) fn fresh(stage: &Stage, random: &mut Random, id: u64, gfn: u64, pages: Range<u64>) -> Vec<Page> {
    let count = pages.end - pages.start;
    let whole = (gfn + pages.start).is_multiple_of(512) && count == 512;
    let size = match () {
        () if count == PageSize::Size1G.pages() => PageSize::Size1G,
        () if whole && random.one_in(stage.rates.large) => PageSize::Size2M,
        () => PageSize::Size4K,
    };
    let writable = !random.one_in(stage.rates.read_only);
    let slow = random.one_in(stage.rates.slow);
    let sizes = if is_wide(stage) { &LAZILY[..] } else { &LAZILY[..1] };
    let lazily = random.one_in(stage.rates.lazy).then(|| random.pick(sizes));
    let refused = random.one_in(stage.rates.refused);
    let refuses = refused.then(|| random.pick(&[ResolveError::Unbacked, ResolveError::Poisoned]));
    let first = (size > PageSize::Size4K).then(|| stage.world.borrow_mut().frames(size.pages()));
    let pages = if size == PageSize::Size1G { pages.start..pages.start + 1 } else { pages };
    let start = pages.start;
    pages
        .map(|page| {
            let frame = first.map(|first| first + page - start);
            let frame = frame.unwrap_or_else(|| stage.world.borrow_mut().frames(1));
            let filled = if size == PageSize::Size1G { size } else { PageSize::Size4K };
            for offset in marked(filled) {
                let pfn = Pfn::new(frame + offset);
                if !stage.host.is_untouched(pfn) {
                    stage.violate(Violation::new(format!("frame {pfn} was written to when nobody had it")));
                }
                let words = fetch::table(gfn, page + offset);
                stage.host.fill(pfn, words.unwrap_or_else(|| mark(id, page + offset)));
            }
            Page { pfn: Pfn::new(frame), size, writable, slow, absent: false, lazily, refuses }
        })
        .collect()
}

/// Copies what pages hold.
pub(crate) fn copy(stage: &Stage, old: &[Page], new: &[Page]) {
    for (old, new) in old.iter().zip(new) {
        let giant = old.size == PageSize::Size1G && new.size == PageSize::Size1G;
        for offset in marked(if giant { PageSize::Size1G } else { PageSize::Size4K }) {
            stage.host.copy(old.pfn.offset(offset), new.pfn.offset(offset));
        }
    }
}

/// Takes the frames of a block back: nobody may reach them any more; poison first.
pub(crate) fn take_back(stage: &Stage, old: &[Page]) {
    let Some(first) = old.first() else { return };
    let large = first.size > PageSize::Size4K;
    for page in if large { &old[..1] } else { old } {
        if let Err(violation) = oracle::gone(stage, page.size, page.pfn) {
            return stage.violate(violation);
        }
        for offset in marked(page.size) {
            stage.host.fill(page.pfn.offset(offset), POISON);
        }
        stage.world.borrow_mut().give_back(page.pfn.raw(), page.size.pages());
    }
}
