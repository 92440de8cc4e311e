//! Guest memory that moves: which frame stands behind each page now, which frames wait for their turn, and what
//! moves next.
//!
//! A *unit* is what moves at once: a whole 2 MiB block, or a page of a block that is not whole. Each unit is drawn
//! as often as another, so each page is drawn at the same rate, whichever unit it is part of; of a whole block that is
//! drawn the mover may move one page alone, and the block is whole no more. Invariants: a frame
//! stands behind one page, or waits in the [`Reserve`], or is with whoever moves it; a whole block is naturally
//! aligned on both sides. Nothing here copies, or knows who uses what: the order in which a frame may change is
//! the mover's to keep.

use crate::frame_map::FrameMap;
use crate::layout::{Block, Frames, Placed};
use crate::random::Random;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// 4 KiB pages in 2 MiB.
pub const BLOCK: u64 = 512;
/// log2 of [`BLOCK`].
const BLOCK_ORDER: u8 = 9;

/// What moves at once: pages of one range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unit {
    /// The first page, counted from the start of its range.
    pub page: u64,
    /// How many there are: 1, or [`BLOCK`].
    pub pages: u64,
}

impl Unit {
    /// Whether both are in one 2 MiB block.
    pub const fn shares_a_block(self, other: Self) -> bool {
        self.page / BLOCK == other.page / BLOCK
    }
}

/// The frames behind one range of guest memory. Read by whoever resolves a page, changed by one mover.
#[derive(Debug)]
pub struct MovingFrames {
    gfns: Range<u64>,
    /// The frame of each page.
    frames: Vec<AtomicU64>,
    /// For each 512 pages from the first, whether they are a whole block.
    whole: Vec<AtomicBool>,
}

impl MovingFrames {
    /// The frames of `placed`, where they are now.
    pub fn new(placed: &Placed) -> Self {
        let gfns = placed.gfns.clone();
        let pages = gfns.end - gfns.start;
        let frames: Vec<u64> = match &placed.frames {
            Frames::Run(first) => (*first..first + pages).collect(),
            Frames::Blocks(blocks) => {
                let mut frames = Vec::with_capacity(usize::try_from(pages).unwrap_or(0));
                for block in blocks {
                    match block {
                        Block::Whole(first) => frames.extend(*first..first + BLOCK),
                        Block::Pages(list) => frames.extend_from_slice(list),
                    }
                }
                frames
            }
        };
        let whole = frames.chunks(usize::try_from(BLOCK).unwrap_or(usize::MAX)).map(|block| {
            let aligned = gfns.start.is_multiple_of(BLOCK) && block[0].is_multiple_of(BLOCK);
            let consecutive = (block[0]..).zip(block).all(|(wanted, &frame)| wanted == frame);
            AtomicBool::new(aligned && consecutive && block.len() as u64 == BLOCK)
        });
        let whole = whole.collect();
        Self { gfns, frames: frames.into_iter().map(AtomicU64::new).collect(), whole }
    }

    /// The guest frame numbers.
    pub fn gfns(&self) -> Range<u64> {
        self.gfns.clone()
    }

    /// The frame of `page`, counted from the start of the range, and whether its block is whole; `None` beyond
    /// the end.
    #[inline]
    pub fn frame(&self, page: u64) -> Option<(u64, bool)> {
        let index = usize::try_from(page).ok()?;
        let frame = self.frames.get(index)?.load(Ordering::Acquire);
        Some((frame, self.whole[index / 512].load(Ordering::Acquire)))
    }

    /// Puts the frames from `first` behind the pages of `unit`. A page that leaves a whole block breaks it up.
    ///
    /// # Panics
    /// When the unit is not of this range.
    pub fn replace(&self, unit: Unit, first: u64) {
        let start = usize::try_from(unit.page).unwrap_or(usize::MAX);
        if unit.pages != BLOCK {
            self.whole[start / 512].store(false, Ordering::Release);
        }
        for (offset, page) in (0..unit.pages).zip(&self.frames[start..]) {
            page.store(first + offset, Ordering::Release);
        }
    }
}

/// Draws the unit that moves next, and which of `ranges` it is in; `None` where there is no page at all. A block
/// that is whole is drawn as one unit, by its first page.
pub fn draw(ranges: &[impl AsRef<MovingFrames>], random: &mut Random) -> Option<(usize, Unit)> {
    let total: usize = ranges.iter().map(|range| range.as_ref().frames.len()).sum();
    if total == 0 {
        return None;
    }
    loop {
        let mut page = random.below(0..total);
        let mut found = None;
        for (index, range) in ranges.iter().enumerate() {
            let range = range.as_ref();
            if let Some(block) = range.whole.get(page / 512).filter(|_| page < range.frames.len()) {
                found = Some((index, block.load(Ordering::Relaxed)));
                break;
            }
            page -= range.frames.len();
        }
        let (index, whole) = found?;
        let page = page as u64;
        if !whole {
            return Some((index, Unit { page, pages: 1 }));
        }
        if page.is_multiple_of(BLOCK) {
            return Some((index, Unit { page, pages: BLOCK }));
        }
    }
}

/// Frames that wait for their turn. The one that was vacated last is used last: what is written over a vacated
/// frame stays there for as long as it can.
#[derive(Debug)]
pub struct Reserve {
    pages: VecDeque<u64>,
    blocks: VecDeque<u64>,
}

impl Reserve {
    /// Takes up to `pages` single frames and `blocks` whole blocks from `free`, and puts them into an order that
    /// is drawn from `random`.
    pub fn take(free: &mut FrameMap, pages: usize, blocks: usize, random: &mut Random) -> Self {
        let mut list = |count: usize, order: u8| {
            let mut list: Vec<u64> = (0..count).map_while(|_| free.take_block(order, None)).collect();
            random.shuffle(&mut list);
            VecDeque::from(list)
        };
        // Blocks first, while there are any.
        let blocks = list(blocks, BLOCK_ORDER);
        Self { pages: list(pages, 0), blocks }
    }

    fn list(&mut self, pages: u64) -> &mut VecDeque<u64> {
        if pages == BLOCK { &mut self.blocks } else { &mut self.pages }
    }

    /// The first of `pages` frames (1, or [`BLOCK`]) for the guest frame `gfn` and those after it; never the one
    /// with that very number. `None` where nothing waits.
    pub fn next(&mut self, pages: u64, gfn: u64) -> Option<u64> {
        let list = self.list(pages);
        let place = list.iter().position(|&frame| frame != gfn)?;
        list.remove(place)
    }

    /// Has the `pages` frames from `first` wait, behind all others.
    pub fn give(&mut self, first: u64, pages: u64) {
        self.list(pages).push_back(first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::place;
    use crate::options::LayoutKind;
    use alloc::sync::Arc;
    use alloc::vec;
    use std::collections::BTreeSet;

    const MIB: u64 = 1 << 20;

    fn machine() -> FrameMap {
        let mut map = FrameMap::new(128 * MIB);
        map.add(MIB..128 * MIB);
        map
    }

    fn ranges(kind: LayoutKind, free: &mut FrameMap) -> Vec<Arc<MovingFrames>> {
        let placed = place(kind, 1, &[0..0x9_F000, MIB..32 * MIB], free).unwrap();
        placed.iter().map(|placed| Arc::new(MovingFrames::new(placed))).collect()
    }

    fn pages(ranges: &[Arc<MovingFrames>]) -> Vec<(u64, u64, bool)> {
        let all = ranges.iter().flat_map(|range| {
            range.gfns().zip(0..).map(|(gfn, page)| {
                let (frame, whole) = range.frame(page).unwrap();
                (gfn, frame, whole)
            })
        });
        all.collect()
    }

    #[test]
    fn what_was_placed_is_what_stands_there() {
        for kind in [LayoutKind::Scattered, LayoutKind::Contiguous] {
            let mut free = machine();
            let ranges = ranges(kind, &mut free);
            for (range, pages) in ranges.iter().zip([0x9F, 256, 31 * 256 - 256]) {
                assert_eq!(range.gfns().end - range.gfns().start, pages);
                assert!(range.frame(pages).is_none() && range.frame(u64::MAX).is_none());
            }
            let whole = pages(&ranges).iter().filter(|page| page.2).count() as u64;
            // Fifteen blocks: all of them, or half.
            assert_eq!(whole, if kind == LayoutKind::Contiguous { 15 * BLOCK } else { 7 * BLOCK });
        }
    }

    /// Moves over moves: no frame is behind two pages, none is lost, none lies where its number says, and a whole
    /// block stays one until a page leaves it.
    #[test]
    fn frames_are_kept_and_blocks_stay_whole_until_they_are_broken_up() {
        let mut free = machine();
        let ranges = ranges(LayoutKind::Scattered, &mut free);
        let mut random = Random::new(5);
        let mut reserve = Reserve::take(&mut free, 64, 2, &mut random);
        let before: BTreeSet<u64> = pages(&ranges).iter().map(|page| page.1).collect();
        let waiting = |reserve: &Reserve| {
            let blocks = reserve.blocks.iter().flat_map(|&first| first..first + BLOCK);
            reserve.pages.iter().copied().chain(blocks).collect::<BTreeSet<u64>>()
        };
        let all: BTreeSet<u64> = before.union(&waiting(&reserve)).copied().collect();
        assert_eq!(all.len(), before.len() + 64 + 2 * 512);
        let (mut blocks, mut broken) = (0, 0);
        for _ in 0..80_000 {
            let (index, mut unit) = draw(&ranges, &mut random).unwrap();
            let range = &ranges[index];
            assert_eq!(range.frame(unit.page).unwrap().1, unit.pages == BLOCK);
            if unit.pages == BLOCK && random.below(0..2) == 0 {
                unit = Unit { page: unit.page + random.below(0..512) as u64, pages: 1 };
                broken += 1;
            }
            blocks += u64::from(unit.pages == BLOCK);
            let new = reserve.next(unit.pages, range.gfns().start + unit.page).unwrap();
            let (old, _) = range.frame(unit.page).unwrap();
            range.replace(unit, new);
            reserve.give(old, unit.pages);
        }
        assert_eq!(broken, 7, "every block is broken up in the end");
        assert!(blocks > 0);
        let pages = pages(&ranges);
        assert!(pages.iter().all(|&(gfn, frame, whole)| gfn != frame && !whole));
        let after: BTreeSet<u64> = pages.iter().map(|page| page.1).collect();
        assert_eq!(after.len(), before.len());
        assert_eq!(after.union(&waiting(&reserve)).copied().collect::<BTreeSet<u64>>(), all);
    }

    #[test]
    fn each_unit_is_as_likely_as_another() {
        let ranges = ranges(LayoutKind::Scattered, &mut machine());
        let units = pages(&ranges).iter().filter(|page| !page.2).count() + 7;
        let (mut random, mut blocks, mut seen) = (Random::new(2), 0u32, BTreeSet::new());
        let draws = 200 * u32::try_from(units).unwrap();
        for _ in 0..draws {
            let (index, unit) = draw(&ranges, &mut random).unwrap();
            blocks += u32::from(unit.pages == BLOCK);
            seen.insert((index, unit.page));
        }
        assert_eq!(seen.len(), units);
        // 1400 are expected: 7 of all units. Five standard deviations are 187.
        assert!(blocks.abs_diff(1400) < 187, "{blocks}");
        assert_eq!(draw(&[] as &[Arc<MovingFrames>], &mut random), None);
    }

    #[test]
    fn the_reserve_is_a_queue_that_avoids_the_guest_s_own_number() {
        let mut reserve = Reserve { pages: VecDeque::from(vec![7, 8, 9]), blocks: VecDeque::new() };
        assert_eq!(reserve.next(1, 7), Some(8));
        reserve.give(20, 1);
        assert_eq!([reserve.next(1, 0), reserve.next(1, 0), reserve.next(1, 20)], [Some(7), Some(9), None]);
        assert_eq!(reserve.next(BLOCK, 0), None);
    }
}
