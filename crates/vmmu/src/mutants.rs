//! Deliberate faults, one for each rule that matters, so that a test can be seen to notice each rule broken.
//!
//! Only with the `mutants` feature, for the library's own proof; elsewhere [`mutant`] is `false` at compile time
//! and every trace of this is gone. Invariant: at most one fault is active at a time, chosen at run time.

macro_rules! mutants {
    ($($(#[doc = $doc:literal])* $name:ident,)*) => {
        /// A rule, and the way in which it is broken.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[allow(missing_docs)] // each variant is documented where it is listed
        pub enum Mutant {
            $($(#[doc = $doc])* $name,)*
        }

        impl Mutant {
            /// Every mutant, in the order of the rules.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Its name, as commands spell it.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name),)*
                }
            }

            /// The rule that it breaks, and how.
            pub const fn rule(self) -> &'static str {
                match self {
                    $(Self::$name => concat!($($doc,)*),)*
                }
            }
        }
    };
}

mutants! {
    /// PROTOCOLS 1: a walking section is announced without its fence.
    NoFenceWalk,
    /// PROTOCOLS 1: an announcement is a relaxed store.
    RelaxedAnnouncement,
    /// PROTOCOLS 1: the end of a section is a relaxed store.
    RelaxedEnd,
    /// PROTOCOLS 1: a scan is a relaxed load.
    RelaxedScan,
    /// PROTOCOLS 1: raising a section renews its generation.
    NestNewGeneration,
    /// PROTOCOLS 1: the end of a nested section takes the line out.
    NestEndOut,
    /// PROTOCOLS 1: newer is the value before the advance.
    NewerBefore,
    /// PROTOCOLS 2: Shared is announced without its fence.
    NoFenceShared,
    /// PROTOCOLS 2: the flag is not looked at after the announcement.
    NoFlagRecheck,
    /// PROTOCOLS 2: the flag is raised without its fence.
    NoFenceFlag,
    /// PROTOCOLS 2: Exclusive does not wait for Shared to end.
    ExclusiveNoWait,
    /// PROTOCOLS 3: the guest is announced without the fence.
    NoFenceGuest,
    /// PROTOCOLS 3: the generation is loaded before the guest is announced.
    GenerationBeforeAnnounce,
    /// PROTOCOLS 3: the root is not looked at after the guest is announced.
    NoRootLook,
    /// PROTOCOLS 3: requests are not looked at after the guest is announced.
    NoRequestLook,
    /// PROTOCOLS 3: the advance of the generation has no fence.
    NoFenceAdvance,
    /// PROTOCOLS 3: a shootdown does not wait.
    NoShootdownWait,
    /// PROTOCOLS 3: the note is written when the entry is made.
    NoteAtEnter,
    /// PROTOCOLS 3: an entry that was dropped writes its note.
    DropRecorded,
    /// PROTOCOLS 3: an entry that was dropped pays the flush that a wrap owes.
    DropPaysWrap,
    /// PROTOCOLS 3: a note is trusted on another processor, or after a wrap.
    TrustAcrossEras,
    /// PROTOCOLS 3: a note is trusted under another root.
    RootKeepsTag,
    /// PROTOCOLS 3: the note holds the generation at the exit.
    NoteIsNow,
    /// PROTOCOLS 3: a forgotten entry leaves its vCPU's note as it was.
    ForgottenClean,
    /// PROTOCOLS 3: an old note does not flush.
    OldNoteNoFlush,
    /// PROTOCOLS 4, T99c: pages are reused without grace.
    NoGrace,
    /// PROTOCOLS 4: pages of an invalid root are retired with the shootdown's generation.
    InvalidRootGeneration,
    /// PROTOCOLS 4: `invalidate` does not wait for sections.
    NoSettle,
    /// PROTOCOLS 4, T148g: `invalidate` has no shootdown.
    InvalidateNoShootdown,
    /// PROTOCOLS 4: `invalidate` waits only where it zapped something.
    SkipIfEmpty,
    /// PROTOCOLS 4: entries are zapped before the begin is published.
    ZapBeforeBegin,
    /// PROTOCOLS 4: the shootdown comes before the zap.
    ShootdownBeforeZap,
    /// PROTOCOLS 4: an end does not raise the sequence.
    NoSequenceBump,
    /// PROTOCOLS 4: an end lowers the count before it raises the sequence.
    CountBeforeSequence,
    /// PROTOCOLS 4: a recheck reads the sequence before the range.
    SequenceFirst,
    /// PROTOCOLS 4: an end empties the range while another is open.
    RangeShrinks,
    /// T71: the range of an open invalidation is not rechecked.
    NoRangeRecheck,
    /// T71: the sequence is not rechecked.
    NoSequenceRecheck,
    /// T71: only the page that faulted is rechecked, not the block that is mapped.
    PageOnlyRecheck,
    /// T71: the root is not rechecked.
    NoRootRecheck,
    /// T71, PROTOCOLS 5: the slot generation is not rechecked.
    NoSlotRecheck,
    /// T71, M71: an answer that maps nothing is not rechecked.
    RefusalNoRecheck,
    /// M72: the sequence is snapshot after the page was resolved.
    SnapshotAfterResolve,
    /// PROTOCOLS 4: software uses a frame without the recheck.
    AccessNoRecheck,
    /// PROTOCOLS 4: a remembered walk is used without the recheck.
    RecallNoRecheck,
    /// PROTOCOLS 5: a change of slots does not wait for readers.
    NoSlotReaderWait,
    /// PROTOCOLS 5: a slot that is deleted is zapped before its change is published.
    ZapBeforeWithdraw,
    /// T73: a fault does not see that its slot is being deleted.
    ChangingIgnored,
    /// T48: an MMIO entry is made while the generation is in progress.
    MmioStoredInProgress,
    /// T48: an MMIO entry answers while the generation is in progress.
    MmioHitInProgress,
    /// PROTOCOLS 5: a hit reads the entry before the generation.
    MmioEntryFirst,
    /// PROTOCOLS 5: an MMIO entry replaces a leaf.
    MmioOverLeaf,
    /// T51: a wrap of the generation zaps nothing.
    NoWrapZap,
    /// T154: an entry is read by a relaxed load.
    RelaxedEntry,
    /// T95: entries of a removed table are emptied, not frozen.
    EmptiedNotFrozen,
    /// T99b, T148h: a large leaf takes a table's place without a flush.
    CollapseNoFlush,
    /// T102, T104: all roots are invalidated without the shootdown.
    ZapAllNoShootdown,
}

#[cfg(feature = "mutants")]
mod active {
    use super::Mutant;
    use core::sync::atomic::{AtomicUsize, Ordering};

    static ACTIVE: AtomicUsize = AtomicUsize::new(usize::MAX);

    /// Makes `mutant` the fault of this process, or none.
    pub fn activate(mutant: Option<Mutant>) {
        ACTIVE.store(mutant.map_or(usize::MAX, |m| m as usize), Ordering::SeqCst);
    }

    pub(crate) fn mutant(mutant: Mutant) -> bool {
        ACTIVE.load(Ordering::Relaxed) == mutant as usize
    }
}

#[cfg(feature = "mutants")]
pub use active::activate;
#[cfg(feature = "mutants")]
pub(crate) use active::mutant;

/// Whether a deliberate fault is active: never.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub(crate) const fn mutant(_: Mutant) -> bool {
    false
}
