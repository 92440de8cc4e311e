//! Which frames of the machine are free: a bit for each 4 KiB frame.
//!
//! Invariant: a set bit is a frame that nobody uses; every frame that is handed out was free, is free no
//! more, and lies wholly in RAM. Searches go on where the last one ended, so that a steady stream of small
//! blocks costs a few words each.

use alloc::vec::Vec;
use core::ops::Range;

const PAGE: u64 = 4096;
const WORD: usize = 64;

/// Free frames by number (a host-physical address divided by 4096).
#[derive(Clone, Debug)]
pub struct FrameMap {
    words: Vec<u64>,
    free: u64,
    next: usize,
}

impl FrameMap {
    /// A map for the memory below `end` (host-physical, bytes) in which nothing is free yet.
    #[allow(clippy::cast_possible_truncation)] // a machine's frames fit in its own address space
    pub fn new(end: u64) -> Self {
        let frames = (end / PAGE) as usize;
        Self { words: alloc::vec![0; frames.div_ceil(WORD)], free: 0, next: 0 }
    }

    /// Frames that are free.
    pub const fn free_frames(&self) -> u64 {
        self.free
    }

    /// Frames that the map can hold.
    fn frames(&self) -> usize {
        self.words.len() * WORD
    }

    fn is_free(&self, frame: usize) -> bool {
        self.words[frame / WORD] >> (frame % WORD) & 1 != 0
    }

    /// Sets or clears the bits of `range`, and keeps the count.
    fn set(&mut self, range: Range<usize>, free: bool) {
        let mut frame = range.start;
        while frame < range.end {
            let (word, bit) = (frame / WORD, frame % WORD);
            let count = (WORD - bit).min(range.end - frame);
            let mask = (u64::MAX >> (WORD - count)) << bit;
            let old = self.words[word];
            self.words[word] = if free { old | mask } else { old & !mask };
            self.free += u64::from(self.words[word].count_ones());
            self.free -= u64::from(old.count_ones());
            frame += count;
        }
    }

    /// Makes the whole pages inside `range` (host-physical, bytes) free; what lies beyond the map is ignored.
    #[allow(clippy::cast_possible_truncation)] // bounded by the map's own size
    pub fn add(&mut self, range: Range<u64>) {
        let limit = self.frames() as u64;
        let (start, end) = (range.start.div_ceil(PAGE).min(limit), (range.end / PAGE).min(limit));
        if start < end {
            self.set(start as usize..end as usize, true);
        }
    }

    /// Makes every page that `range` (host-physical, bytes) touches not free.
    #[allow(clippy::cast_possible_truncation)] // bounded by the map's own size
    pub fn remove(&mut self, range: Range<u64>) {
        let limit = self.frames() as u64;
        let (start, end) = ((range.start / PAGE).min(limit), range.end.div_ceil(PAGE).min(limit));
        if start < end {
            self.set(start as usize..end as usize, false);
        }
    }

    /// The first frame of `range` that is not free.
    fn first_taken(&self, range: Range<usize>) -> Option<usize> {
        let mut frame = range.start;
        while frame < range.end {
            let taken = !self.words[frame / WORD] >> (frame % WORD);
            if taken != 0 {
                let at = frame + taken.trailing_zeros() as usize;
                return (at < range.end).then_some(at);
            }
            frame = (frame / WORD + 1) * WORD;
        }
        None
    }

    /// The first free frame of `range`.
    fn first_free(&self, range: Range<usize>) -> Option<usize> {
        let mut frame = range.start;
        while frame < range.end {
            let free = self.words[frame / WORD] >> (frame % WORD);
            if free != 0 {
                let at = frame + free.trailing_zeros() as usize;
                return (at < range.end).then_some(at);
            }
            frame = (frame / WORD + 1) * WORD;
        }
        None
    }

    /// The first run of `count` free frames within `range` whose first frame is `phase` modulo `align`.
    fn find(&self, range: Range<usize>, count: usize, align: usize, phase: usize) -> Option<usize> {
        let mut at = range.start;
        loop {
            let free = self.first_free(at..range.end)?;
            let start = free + (phase + align - free % align) % align;
            if start.checked_add(count)? > range.end {
                return None;
            }
            match self.first_taken(start..start + count) {
                None => return Some(start),
                Some(taken) => at = taken + 1,
            }
        }
    }

    /// Takes the lowest run of `count` frames whose first frame is `phase` modulo `align`; `align` is not 0.
    pub fn take_run(&mut self, count: u64, align: u64, phase: u64) -> Option<u64> {
        let [count, align, phase] = [count, align, phase].map(usize::try_from);
        let count = count.ok()?;
        let first = self.find(0..self.frames(), count, align.ok()?, phase.ok()?)?;
        self.set(first..first + count, false);
        Some(first as u64)
    }

    /// Takes a naturally aligned block of 2^`order` frames, below frame `limit` where one is given.
    pub fn take_block(&mut self, order: u8, limit: Option<u64>) -> Option<u64> {
        let count = 1usize.checked_shl(u32::from(order))?;
        let end = limit
            .and_then(|limit| usize::try_from(limit).ok())
            .map_or(self.frames(), |l| l.min(self.frames()));
        let next = self.next.min(end);
        let first = self.find(next..end, count, count, 0).or_else(|| self.find(0..end, count, count, 0))?;
        self.set(first..first + count, false);
        self.next = first + count;
        Some(first as u64)
    }

    /// Gives a block of 2^`order` frames back.
    ///
    /// # Panics
    /// When part of it is free already: then two owners believed that it was theirs.
    pub fn give_block(&mut self, first: u64, order: u8) {
        let start = usize::try_from(first).unwrap_or(usize::MAX);
        let range = start..start.saturating_add(1 << order);
        assert!(
            range.end <= self.frames() && self.first_free(range.clone()).is_none(),
            "frame {first:#x} is free"
        );
        self.set(range, true);
    }

    /// The first frame of every naturally aligned block of 2^`order` frames that is wholly free, ascending.
    pub fn free_blocks(&self, order: u8) -> impl Iterator<Item = u64> + '_ {
        let count = 1usize << order;
        (0..self.frames() / count)
            .map(move |block| block * count)
            .filter(move |&first| self.first_taken(first..first + count).is_none())
            .map(|first| first as u64)
    }

    /// Every free frame, ascending.
    pub fn free_singles(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.frames()).filter(|&frame| self.is_free(frame)).map(|frame| frame as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn free(frames: Range<u64>) -> FrameMap {
        let mut map = FrameMap::new(4096 * PAGE);
        map.add(frames.start * PAGE..frames.end * PAGE);
        map
    }

    #[test]
    fn only_whole_pages_are_free() {
        let mut map = FrameMap::new(100 * PAGE);
        map.add(1..3 * PAGE + 1);
        assert_eq!(map.free_singles().collect::<Vec<_>>(), [1, 2]);
        map.remove(2 * PAGE + 5..2 * PAGE + 6);
        assert_eq!(map.free_singles().collect::<Vec<_>>(), [1]);
        map.add(90 * PAGE..u64::MAX);
        assert_eq!(map.free_frames(), 1 + 128 - 90);
    }

    #[test]
    fn runs_keep_their_phase() {
        let mut map = free(3..2000);
        assert_eq!(map.take_run(1000, 512, 0x100), Some(0x100));
        assert_eq!(map.take_run(700, 512, 0), None);
        assert_eq!(map.take_run(700, 1, 0), Some(0x100 + 1000));
        assert_eq!(map.take_run(253, 1, 0), Some(3));
        assert_eq!(map.free_frames(), 1997 - 1000 - 700 - 253);
    }

    #[test]
    fn blocks_are_aligned_and_below_the_limit() {
        let mut map = free(5..600);
        assert_eq!(map.take_block(5, None), Some(32));
        assert_eq!(map.take_block(5, Some(96)), Some(64));
        assert_eq!(map.take_block(5, Some(96)), None);
        assert_eq!(map.take_block(0, Some(96)), Some(5));
        assert_eq!(map.free_blocks(7).collect::<Vec<_>>(), [128, 256, 384]);
    }

    #[test]
    fn no_frame_has_two_owners() {
        let mut map = free(0..4096);
        let mut random = Random::new(11);
        let mut owned: Vec<(u64, u8)> = Vec::new();
        let mut taken = [false; 4096];
        for _ in 0..20_000 {
            if random.below(0..3) != 0 {
                let order = u8::try_from(random.below(0..6)).unwrap();
                let Some(first) = map.take_block(order, None) else { continue };
                assert_eq!(first % (1 << order), 0);
                for frame in first..first + (1 << order) {
                    assert!(!core::mem::replace(&mut taken[usize::try_from(frame).unwrap()], true));
                }
                owned.push((first, order));
            } else if !owned.is_empty() {
                let (first, order) = owned.swap_remove(random.below(0..owned.len()));
                map.give_block(first, order);
                for frame in first..first + (1 << order) {
                    taken[usize::try_from(frame).unwrap()] = false;
                }
            }
            assert_eq!(map.free_frames(), taken.iter().filter(|taken| !**taken).count() as u64);
        }
    }

    #[test]
    #[should_panic(expected = "frame 0x20 is free")]
    fn a_block_is_given_back_once() {
        let mut map = free(0..4096);
        map.give_block(0x20, 5);
    }
}
