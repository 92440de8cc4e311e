//! Churn: random pages of the guest move to other frames while it runs, as a host does that balances, compacts or
//! shares memory, only more often.
//!
//! Each move follows the contract of [`vmmu::Vm::invalidate`]: invalidate, copy, change the backing's answer, ruin
//! the old frame, let go. What comes in between is nobody's, and the vacated frame holds poison from that moment
//! on, so a translation of it that somebody still used would not go unnoticed for long. A block of 2 MiB moves
//! whole, or is broken up: one of its pages moves, and the others stay as single pages. Invariant: the frames that
//! are copied and ruined belong to the guest or to the reserve, so not even a move with a mistake in it reaches
//! anything else's memory.

use crate::guest::End;
use crate::machine::hpet::Hpet;
use crate::memory::MachineHost;
use crate::report::say;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::num::NonZeroU32;
use hypervisor::frame_map::FrameMap;
use hypervisor::moving::{BLOCK, MovingFrames, Reserve, Unit, draw};
use hypervisor::options::ChurnFault;
use hypervisor::pace::Pace;
use hypervisor::random::Random;
use vmmu::addr::PAGE_BYTES;
use vmmu::{Gfn, GfnRange, Vm};

/// Microseconds from one tick to the next.
pub(crate) const TICK: u32 = 1000;
/// Single frames that wait for their turn: 16 MiB.
const SPARE_PAGES: usize = 4096;
/// Whole blocks that wait: 8 MiB.
const SPARE_BLOCKS: usize = 4;
/// Draws that are made for one move.
const DRAWS: u32 = 1000;
/// Whether this image makes mistakes where they are wanted. Others have no code for them, and none in the way of an
/// exit.
pub(crate) const MISTAKES: bool = cfg!(feature = "churn-faults");
/// Of so many moves one is made without an invalidation, with [`ChurnFault::Skip`].
const SKIPPED: usize = 100;
/// Seconds from one line about the progress to the next.
const PROGRESS: u64 = 5;
/// What is written over a vacated frame. No instruction begins with any of its bytes in 64-bit mode, no address is
/// canonical that looks like it, and as an entry of a page table it is not present.
const POISON: u64 = 0x9A82_613F_372F_271E;

/// What was done.
#[derive(Clone, Copy, Default)]
pub(crate) struct Counts {
    /// Pages that moved, those of whole blocks among them.
    pub(crate) pages: u64,
    /// Blocks that moved whole.
    pub(crate) blocks: u64,
    /// Blocks that were broken up.
    pub(crate) broken_up: u64,
    /// Moves that were made wrongly, as it was asked for.
    pub(crate) mistakes: u64,
}

/// A move that was chosen: pages of a range, the first of the frames that they leave, and of those they go to.
struct Move {
    range: usize,
    unit: Unit,
    from: u64,
    to: u64,
    /// Whether a page leaves a whole block.
    breaks_up: bool,
}

impl Move {
    /// 8-byte words that move.
    #[allow(clippy::cast_possible_truncation)] // at most 2 MiB
    fn words(&self) -> usize {
        (self.unit.pages * PAGE_BYTES / 8) as usize
    }

    /// The first words of the old frames and of the new ones. The host maps memory at its physical address.
    fn places(&self) -> (*mut u64, *mut u64) {
        ((self.from * PAGE_BYTES) as *mut u64, (self.to * PAGE_BYTES) as *mut u64)
    }

    /// Copies the old frames to the new ones.
    fn copy(&self) {
        let (from, to) = self.places();
        // SAFETY: frames of the guest and of the reserve, mapped, and distinct, since a frame has one owner. The only
        // processor is here: no guest runs, and no access of the library's is under way.
        unsafe { core::ptr::copy_nonoverlapping(from, to, self.words()) };
    }

    /// Ruins the old frames.
    fn poison(&self) {
        let (from, _) = self.places();
        for word in 0..self.words() {
            // SAFETY: as for `copy`; the frames are on their way to the reserve.
            unsafe { from.add(word).write(POISON) };
        }
    }
}

/// What moves, and from where new frames come.
pub(crate) struct Motion {
    ranges: Vec<Arc<MovingFrames>>,
    reserve: Reserve,
    random: Random,
    counts: Counts,
}

impl Motion {
    /// The frames of `ranges` shall move, in an order that `seed` decides; the first new ones are taken from
    /// `free`.
    pub(crate) fn new(ranges: Vec<Arc<MovingFrames>>, seed: u64, free: &mut FrameMap) -> Self {
        // Another sequence than the layout's, which comes from the same seed.
        let mut random = Random::new(seed ^ POISON);
        let reserve = Reserve::take(free, SPARE_PAGES, SPARE_BLOCKS, &mut random);
        Self { ranges, reserve, random, counts: Counts::default() }
    }

    /// What moves next, and where to; nothing of a block from which a page is about to move (`waiting`). `None`
    /// where nothing was drawn for which a frame waits.
    fn choose(&mut self, waiting: &[Move]) -> Option<Move> {
        for _ in 0..DRAWS {
            let (range, mut unit) = draw(&self.ranges, &mut self.random)?;
            // Half of the blocks that are drawn are broken up.
            let breaks_up = unit.pages == BLOCK && self.random.below(0..2) == 0;
            if breaks_up {
                #[allow(clippy::cast_possible_truncation)] // 512
                let page = self.random.below(0..BLOCK as usize) as u64;
                unit = Unit { page: unit.page + page, pages: 1 };
            }
            if !waiting.iter().any(|other| other.range == range && other.unit.shares_a_block(unit)) {
                let (from, _) = self.ranges[range].frame(unit.page)?;
                let gfn = self.ranges[range].gfns().start + unit.page;
                let Some(to) = self.reserve.next(unit.pages, gfn) else { continue };
                return Some(Move { range, unit, from, to, breaks_up });
            }
        }
        None
    }

    /// The guest frames that move.
    fn gfns(&self, chosen: &Move) -> GfnRange {
        let first = Gfn::new(self.ranges[chosen.range].gfns().start + chosen.unit.page);
        // They lie within a slot, which ends below the last frame number there is.
        GfnRange::with_len(first, chosen.unit.pages).unwrap_or(GfnRange::ALL)
    }

    /// Has the new frames stand behind the pages, ruins the old ones and lets them wait for their turn.
    fn replace(&mut self, chosen: &Move) {
        self.ranges[chosen.range].replace(chosen.unit, chosen.to);
        chosen.poison();
        self.reserve.give(chosen.from, chosen.unit.pages);
        self.counts.pages += chosen.unit.pages;
        self.counts.blocks += u64::from(chosen.unit.pages == BLOCK);
        self.counts.broken_up += u64::from(chosen.breaks_up);
    }
}

/// Guest memory in motion, by the clock.
pub(crate) struct Churn {
    vm: Vm<MachineHost>,
    motion: Motion,
    clock: Hpet,
    pace: Pace,
    /// The clock when the last tick had been dealt with.
    left: u64,
    /// Seconds of the run when its progress was last told.
    told: u64,
    /// The clock when the run ended.
    ended: Option<u64>,
    /// The mistake that is wanted; looked at only where [`MISTAKES`] are made.
    fault: Option<ChurnFault>,
    /// Moves that were copied too early, at the last exit, and wait for the next.
    early: Vec<Move>,
}

impl Churn {
    /// Begins now: `rate` moves a second by `clock`, which ticks every [`TICK`]; with a mistake, where one is
    /// wanted.
    pub(crate) fn new(
        vm: Vm<MachineHost>,
        motion: Motion,
        rate: NonZeroU32,
        fault: Option<ChurnFault>,
        clock: Hpet,
    ) -> Self {
        let now = clock.now();
        let pace = Pace::new(rate, clock.hertz(), now);
        Self { vm, motion, clock, pace, left: now, told: 0, ended: None, fault, early: Vec::new() }
    }

    /// Makes the moves that are due, for no longer than the guest has run since the last tick, so that it gets
    /// half of the time even where the rate is beyond what the machine can do. None at all where the guest has
    /// hardly run: the next tick came while the last was dealt with.
    pub(crate) fn tick(&mut self) -> Result<(), End> {
        let began = self.clock.now();
        let patience = began.saturating_sub(self.left);
        let mut now = began;
        if patience >= self.clock.hertz() * u64::from(TICK) / 4_000_000 {
            while self.pace.owed(now) > 0 && now - began <= patience {
                let Some(chosen) = self.motion.choose(&self.early) else { break };
                self.carry_out(chosen)?;
                self.pace.did_one();
                now = self.clock.now();
            }
        }
        let seconds = self.pace.micros(now) / 1_000_000;
        if seconds >= self.told + PROGRESS {
            self.told = seconds;
            say!("churn: {} moves, {} a second", self.pace.done(), self.pace.reached(now));
        }
        self.left = self.clock.now();
        Ok(())
    }

    /// Moves what was chosen, rightly unless a mistake is wanted.
    fn carry_out(&mut self, chosen: Move) -> Result<(), End> {
        if MISTAKES && let Some(fault) = self.fault {
            match fault {
                ChurnFault::Skip if self.motion.random.below(0..SKIPPED) == 0 => {
                    self.motion.counts.mistakes += 1;
                    chosen.copy();
                    self.motion.replace(&chosen);
                    return Ok(());
                }
                ChurnFault::Skip => {}
                ChurnFault::EarlyCopy => {
                    self.motion.counts.mistakes += 1;
                    chosen.copy();
                    self.early.push(chosen);
                    return Ok(());
                }
            }
        }
        let guard = self.vm.invalidate(self.motion.gfns(&chosen)).map_err(End::error)?;
        chosen.copy();
        self.motion.replace(&chosen);
        drop(guard);
        Ok(())
    }

    /// An exit has happened. What was copied at the exit before it moves now, as it was then: a mistake.
    pub(crate) fn finish_early(&mut self) -> Result<(), End> {
        for chosen in self.early.drain(..) {
            let guard = self.vm.invalidate(self.motion.gfns(&chosen)).map_err(End::error)?;
            self.motion.replace(&chosen);
            drop(guard);
        }
        Ok(())
    }

    /// The run is over: the clock stops.
    pub(crate) fn end(&mut self) {
        self.ended = Some(self.clock.now());
    }

    /// What was done.
    pub(crate) fn counts(&self) -> Counts {
        self.motion.counts
    }

    /// The pace, and the reading of the clock for which to ask it: when the run ended, or now.
    pub(crate) fn pace(&self) -> (&Pace, u64) {
        (&self.pace, self.ended.unwrap_or_else(|| self.clock.now()))
    }
}
