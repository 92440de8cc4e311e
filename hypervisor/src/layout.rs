//! Which frames stand behind the guest's RAM.
//!
//! Scattered, the default, is what a long-lived host looks like: half of the guest's 2 MiB blocks are whole
//! blocks of the machine at random places, the rest single frames in random order, and no page lies where its
//! guest address says. Contiguous is one run for each range, aligned so that large pages can map it. Either
//! way the same seed and memory give the same layout.

use crate::frame_map::FrameMap;
use crate::options::LayoutKind;
use crate::random::Random;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

const PAGE: u64 = 4096;
/// 4 KiB pages in 2 MiB.
const BLOCK: u64 = 512;
/// The same, as a step between frames.
const STEP: usize = 512;
/// log2 of [`BLOCK`].
const BLOCK_ORDER: u8 = 9;
/// 4 KiB pages in 1 GiB.
const GIGABYTE: u64 = 512 * BLOCK;

/// Frames behind one 2 MiB block of the guest, or behind part of one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Block {
    /// A whole naturally aligned block of the machine; the value is its first frame.
    Whole(u64),
    /// A frame for each page.
    Pages(Vec<u64>),
}

/// Frames behind one range of the guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Frames {
    /// Consecutive frames; the value is the first.
    Run(u64),
    /// Block by block from the first page up; every block but the last is 512 pages.
    Blocks(Vec<Block>),
}

/// A range of guest RAM with the frames behind it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Placed {
    /// Guest frame numbers.
    pub gfns: Range<u64>,
    /// What stands behind them.
    pub frames: Frames,
}

/// The machine has too few free frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutOfFrames {
    /// Frames that are wanted, in one run if the layout is contiguous.
    pub wanted: u64,
    /// Frames that are free.
    pub free: u64,
}

impl fmt::Display for OutOfFrames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "out of memory: the guest wants {} KiB, the machine has {} KiB free",
            self.wanted * 4,
            self.free * 4
        )
    }
}

impl core::error::Error for OutOfFrames {}

/// Finds frames for `ram` (guest-physical, whole pages) and takes them from `free`. Ranges are cut so that
/// each begins on a 2 MiB boundary or ends at the first one after its start. On failure `free` may have lost
/// frames.
pub fn place(
    kind: LayoutKind,
    seed: u64,
    ram: &[Range<u64>],
    free: &mut FrameMap,
) -> Result<Vec<Placed>, OutOfFrames> {
    let ranges = cut(ram);
    let wanted = ranges.iter().map(|range| range.end - range.start).sum();
    let out_of_frames = OutOfFrames { wanted, free: free.free_frames() };
    if wanted > free.free_frames() {
        return Err(out_of_frames);
    }
    match kind {
        LayoutKind::Contiguous => contiguous(&ranges, free),
        LayoutKind::Scattered => scattered(&ranges, seed, free),
    }
    .ok_or(out_of_frames)
}

/// Finds whole 2 MiB blocks of the machine for the guest frames `gfns` (whole 2 MiB blocks too) and takes
/// them from `free`: the first frame of each. Contiguous or scattered as for [`place`].
pub fn place_whole(
    kind: LayoutKind,
    seed: u64,
    gfns: &Range<u64>,
    free: &mut FrameMap,
) -> Result<Vec<u64>, OutOfFrames> {
    let wanted = gfns.end - gfns.start;
    let out_of_frames = OutOfFrames { wanted, free: free.free_frames() };
    let starts: Vec<u64> = gfns.clone().step_by(STEP).collect();
    if kind == LayoutKind::Contiguous {
        let first = free.take_run(wanted, BLOCK, 0).ok_or(out_of_frames)?;
        return Ok((first..first + wanted).step_by(STEP).collect());
    }
    let mut blocks: Vec<u64> = free.free_blocks(BLOCK_ORDER).collect();
    if blocks.len() < starts.len() {
        return Err(out_of_frames);
    }
    Random::new(seed).shuffle(&mut blocks);
    blocks.truncate(starts.len());
    displace(&mut blocks, &starts);
    for &first in &blocks {
        free.remove(first * PAGE..(first + BLOCK) * PAGE);
    }
    Ok(blocks)
}

/// The ranges of `ram` as guest frame numbers, each cut at the first 2 MiB boundary inside.
fn cut(ram: &[Range<u64>]) -> Vec<Range<u64>> {
    ram.iter()
        .flat_map(|range| {
            let (start, end) = (range.start / PAGE, range.end / PAGE);
            let edge = start.next_multiple_of(BLOCK).min(end);
            [start..edge, edge..end]
        })
        .filter(|range| !range.is_empty())
        .collect()
}

fn contiguous(ranges: &[Range<u64>], free: &mut FrameMap) -> Option<Vec<Placed>> {
    // The largest first, while there is most room to choose from.
    let mut order: Vec<&Range<u64>> = ranges.iter().collect();
    order.sort_by_key(|range| core::cmp::Reverse(range.end - range.start));
    let mut placed = Vec::new();
    for range in order {
        let pages = range.end - range.start;
        let first = [GIGABYTE, BLOCK, 1]
            .into_iter()
            .find_map(|align| free.take_run(pages, align, range.start % align))?;
        placed.push(Placed { gfns: range.clone(), frames: Frames::Run(first) });
    }
    placed.sort_by_key(|placed| placed.gfns.start);
    Some(placed)
}

fn scattered(ranges: &[Range<u64>], seed: u64, free: &mut FrameMap) -> Option<Vec<Placed>> {
    let mut random = Random::new(seed);
    let full: Vec<u64> = ranges
        .iter()
        .filter(|range| range.start % BLOCK == 0)
        .flat_map(|range| (range.start..range.end - (range.end - range.start) % BLOCK).step_by(STEP))
        .collect();
    let mut chosen = full.clone();
    random.shuffle(&mut chosen);
    let mut blocks: Vec<u64> = free.free_blocks(BLOCK_ORDER).collect();
    random.shuffle(&mut blocks);
    chosen.truncate((full.len() / 2).min(blocks.len()));
    chosen.sort_unstable();

    let mut whole = blocks.split_off(blocks.len() - chosen.len());
    displace(&mut whole, &chosen);
    for &first in &whole {
        free.remove(first * PAGE..(first + BLOCK) * PAGE);
    }

    // Single frames come from whole blocks too, broken up, as long as there are any: what is left over then
    // stays in large pieces for tables.
    let pages = ranges.iter().map(|range| range.end - range.start).sum::<u64>();
    let singles = usize::try_from(pages - chosen.len() as u64 * BLOCK).ok()?;
    let mut frames: Vec<u64> = blocks.iter().flat_map(|&first| first..first + BLOCK).take(singles).collect();
    for &frame in &frames {
        free.remove(frame * PAGE..(frame + 1) * PAGE);
    }
    let missing = singles - frames.len();
    let loose: Vec<u64> = free.free_singles().take(missing).collect();
    for &frame in &loose {
        free.remove(frame * PAGE..(frame + 1) * PAGE);
    }
    frames.extend(loose);
    if frames.len() != singles {
        return None;
    }
    random.shuffle(&mut frames);
    let gfns: Vec<u64> = ranges
        .iter()
        .flat_map(Clone::clone)
        .filter(|gfn| chosen.binary_search(&(gfn - gfn % BLOCK)).is_err())
        .collect();
    displace(&mut frames, &gfns);

    let (mut whole, mut frames) = (whole.into_iter(), frames.into_iter());
    let mut placed = Vec::new();
    for range in ranges {
        let mut list = Vec::new();
        let mut gfn = range.start;
        while gfn < range.end {
            let pages = BLOCK.min(range.end - gfn);
            list.push(if chosen.binary_search(&gfn).is_ok() {
                Block::Whole(whole.next()?)
            } else {
                Block::Pages(frames.by_ref().take(usize::try_from(pages).ok()?).collect())
            });
            gfn += pages;
        }
        placed.push(Placed { gfns: range.clone(), frames: Frames::Blocks(list) });
    }
    Some(placed)
}

/// Moves every frame that equals its guest frame number to another place of the list, if there is one.
fn displace(frames: &mut [u64], gfns: &[u64]) {
    let len = frames.len();
    for index in 0..len {
        if frames[index] != gfns[index] {
            continue;
        }
        let other = (1..len)
            .map(|step| (index + step) % len)
            .find(|&other| frames[other] != gfns[index] && frames[index] != gfns[other]);
        if let Some(other) = other {
            frames.swap(index, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GUEST: [Range<u64>; 2] = [0..0x9_F000, MIB..63 * MIB];

    fn machine() -> FrameMap {
        let mut map = FrameMap::new(128 * MIB);
        map.add(MIB..128 * MIB);
        map
    }

    /// Every page of the guest with its frame.
    fn pairs(placed: &[Placed]) -> Vec<(u64, u64)> {
        let mut pairs = Vec::new();
        for part in placed {
            let frames: Vec<u64> = match &part.frames {
                Frames::Run(first) => (*first..first + (part.gfns.end - part.gfns.start)).collect(),
                Frames::Blocks(blocks) => blocks
                    .iter()
                    .flat_map(|block| match block {
                        Block::Whole(first) => (*first..first + BLOCK).collect::<Vec<u64>>(),
                        Block::Pages(frames) => frames.clone(),
                    })
                    .collect(),
            };
            assert_eq!(frames.len() as u64, part.gfns.end - part.gfns.start);
            pairs.extend(part.gfns.clone().zip(frames));
        }
        pairs
    }

    #[test]
    fn every_page_has_a_frame_of_its_own_that_was_free() {
        for kind in [LayoutKind::Contiguous, LayoutKind::Scattered] {
            for seed in 0..50 {
                let (before, mut free) = (machine(), machine());
                let placed = place(kind, seed, &GUEST, &mut free).unwrap();
                let pairs = pairs(&placed);
                assert_eq!(pairs.len() as u64, 0x9F + 62 * 256);
                assert_eq!(free.free_frames(), before.free_frames() - pairs.len() as u64);
                let mut frames: Vec<u64> = pairs.iter().map(|pair| pair.1).collect();
                frames.sort_unstable();
                frames.dedup();
                assert_eq!(frames.len(), pairs.len());
                assert!(frames.iter().all(|&frame| frame >= 256));
                if kind == LayoutKind::Scattered {
                    assert!(pairs.iter().all(|(gfn, pfn)| gfn != pfn), "seed {seed}");
                }
            }
        }
    }

    #[test]
    fn half_of_the_blocks_are_whole_and_aligned() {
        let placed = place(LayoutKind::Scattered, 3, &GUEST, &mut machine()).unwrap();
        assert_eq!(
            placed.iter().map(|p| p.gfns.clone()).collect::<Vec<_>>(),
            [0..0x9F, 256..512, 512..63 * 256]
        );
        let Frames::Blocks(blocks) = &placed[2].frames else { panic!("scattered memory has blocks") };
        let whole: Vec<u64> = blocks
            .iter()
            .filter_map(|block| if let Block::Whole(first) = block { Some(*first) } else { None })
            .collect();
        assert_eq!(whole.len(), 15);
        assert!(whole.iter().all(|first| first % BLOCK == 0));
    }

    #[test]
    fn a_seed_is_a_layout() {
        let with = |seed| place(LayoutKind::Scattered, seed, &GUEST, &mut machine()).unwrap();
        assert_eq!(with(5), with(5));
        assert_ne!(with(5), with(6));
    }

    #[test]
    fn the_contiguous_run_can_be_mapped_by_large_pages() {
        let placed = place(LayoutKind::Contiguous, 1, &GUEST, &mut machine()).unwrap();
        let Frames::Run(first) = placed[2].frames else { panic!("contiguous memory is a run") };
        assert_eq!(first % BLOCK, placed[2].gfns.start % BLOCK);
    }

    #[test]
    fn whole_blocks_are_whole_and_elsewhere() {
        for kind in [LayoutKind::Contiguous, LayoutKind::Scattered] {
            let mut free = machine();
            let before = free.free_frames();
            let blocks = place_whole(kind, 2, &(512..512 * 60), &mut free).unwrap();
            assert_eq!(blocks.len(), 59);
            assert_eq!(free.free_frames(), before - 59 * BLOCK);
            assert!(blocks.iter().all(|first| first % BLOCK == 0 && *first >= 256));
            if kind == LayoutKind::Scattered {
                assert!((1..60).zip(&blocks).all(|(block, first)| block * BLOCK != *first));
            }
            assert!(place_whole(kind, 2, &(0..512 * 5), &mut free).is_err());
        }
    }

    #[test]
    fn fragments_serve_when_blocks_run_out() {
        let mut free = FrameMap::new(128 * MIB);
        for frame in (0..32_768).filter(|frame| frame % 3 != 0) {
            free.add(frame * PAGE..(frame + 1) * PAGE);
        }
        let placed = place(LayoutKind::Scattered, 1, &GUEST, &mut free).unwrap();
        assert!(pairs(&placed).iter().all(|(gfn, pfn)| gfn != pfn && pfn % 3 != 0));
        assert!(place(LayoutKind::Contiguous, 1, &GUEST, &mut free).is_err());
    }

    #[test]
    fn too_few_frames_are_named() {
        let mut free = FrameMap::new(128 * MIB);
        free.add(0..MIB);
        let error = place(LayoutKind::Scattered, 1, &GUEST, &mut free).unwrap_err();
        assert_eq!(error, OutOfFrames { wanted: 0x9F + 62 * 256, free: 256 });
    }
}
