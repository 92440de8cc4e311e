//! Tags: the ASIDs or VPIDs of one physical processor, and what is known to be flushed under them
//! (PROTOCOLS 3).
//!
//! A [`PhysCpu`] is private to its processor and shared by all VMs that run there. A tag is given to one vCPU
//! in one root and to nobody else before a wrap, which begins a new *era*; so a vCPU's note of its last run (era,
//! root, tag, generation) holds exactly while era and root are the same, and needs no table here. Invariants: a
//! note is written only by an entry that ran, and holds the generation published at that entry; the flush of
//! everything that a wrap owes stays owed until an entry that carried it ran.

use crate::coverage::{Point, hit};
use crate::mutants::Mutant::{DropPaysWrap, OldNoteNoFlush, RootKeepsTag, TrustAcrossEras};
use crate::mutants::mutant;
use crate::sync::{Ordering, Tally};
use alloc::boxed::Box;
use alloc::vec;
use core::marker::PhantomData;

/// Guest-physical notes kept for one processor.
const ROOT_NOTES: usize = 64;

/// A number that nothing else in this program has: names roots, and eras of processors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Identity(u64);

impl Identity {
    pub(crate) fn new() -> Self {
        static NEXT: Tally = Tally::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
    pub(crate) fn number(self) -> u64 {
        self.0
    }
}

/// What the tags of a processor are, and which flushes it offers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct TagSet {
    /// The lowest tag that guests may have; 0 is the host's own.
    pub(crate) first: u32,
    /// How many there are from `first` on; at least 1.
    pub(crate) count: u32,
    /// Whether one tag can be flushed alone (SVM: `FlushByASID`; VMX: single-context INVVPID). Where not, a
    /// fresh tag serves instead.
    pub(crate) flush_by_tag: bool,
    /// Whether guest-physical mappings are cached apart from tags, as under EPT: then a fresh tag drops none
    /// of them, and entries say when INVEPT is due.
    pub(crate) tagged_by_root: bool,
}

impl TagSet {
    /// The address space identifiers of SVM (AMD64 manual volume 2, section 15.16): 1 to `limit` − 1, where
    /// `limit` is CPUID `0x8000_000A` EBX. A limit below 2 is taken for 2.
    pub const fn asids(limit: u32, flush_by_asid: bool) -> Self {
        let count = if limit < 2 { 1 } else { limit - 1 };
        Self { first: 1, count, flush_by_tag: flush_by_asid, tagged_by_root: false }
    }
    /// The virtual processor identifiers of VMX: 1 to 65535.
    pub const fn vpids(single_context: bool) -> Self {
        Self { first: 1, count: 0xFFFF, flush_by_tag: single_context, tagged_by_root: true }
    }
    /// The same with only `count` tags: so that wraps are common in tests.
    #[must_use]
    pub const fn limited_to(mut self, count: u32) -> Self {
        self.count = if count == 0 {
            1
        } else if count < self.count {
            count
        } else {
            self.count
        };
        self
    }
}

/// What an entry must flush by tag.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum EntryFlush {
    /// Nothing (SVM: `TLB_CONTROL` 0).
    None,
    /// The translations of the entry's own tag (SVM: `TLB_CONTROL` 3).
    Tag,
    /// Everything under every tag (SVM: `TLB_CONTROL` 1).
    All,
}

/// A vCPU's note of its last run: under which tag, and up to which generation that tag was flushed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Note {
    era: Identity,
    root: Identity,
    generation: u64,
    tag: u32,
}

/// What an entry loads and flushes, chosen by [`PhysCpu::choose`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Choice {
    pub(crate) tag: u32,
    pub(crate) flush: EntryFlush,
    pub(crate) guest_physical: bool,
    /// Whether the tag was never used since the last flush of everything.
    pub(crate) fresh: bool,
}

/// The tags of one logical processor: make one for each, and pass it to every entry there. It is bound to its
/// processor, so it cannot be sent to another thread.
#[derive(Debug)]
pub struct PhysCpu {
    /// The processor since its last wrap.
    era: Identity,
    tags: TagSet,
    next: u32,
    flush_all_owed: bool,
    /// Up to which generation a root's guest-physical mappings were flushed here.
    root_notes: Box<[(u64, u64)]>,
    _not_send: PhantomData<*const ()>,
}

impl PhysCpu {
    /// A processor on which anything may be cached: the first entry flushes everything.
    pub fn new(tags: TagSet) -> Self {
        Self {
            era: Identity::new(),
            tags,
            next: tags.first,
            flush_all_owed: true,
            root_notes: vec![(0, 0); if tags.tagged_by_root { ROOT_NOTES } else { 0 }].into_boxed_slice(),
            _not_send: PhantomData,
        }
    }

    #[inline(always)]
    fn root_place(root: Identity) -> usize {
        root.number() as usize & (ROOT_NOTES - 1)
    }

    /// Chooses the tag and the flush for the entry into `root` of the vCPU with `note`, which published
    /// `generation`. Moves the tag counter, writes no note.
    #[inline(always)]
    pub(crate) fn choose(&mut self, root: Identity, note: Option<Note>, generation: u64) -> Choice {
        let guest_physical = self.tags.tagged_by_root && {
            let (noted, flushed) = self.root_notes[Self::root_place(root)];
            noted != root.number() || flushed < generation
        };
        if let Some(note) = note
            && (note.era == self.era || mutant(TrustAcrossEras))
            && (note.root == root || mutant(RootKeepsTag))
        {
            let old = note.generation < generation && !mutant(OldNoteNoFlush);
            if !old || self.tags.flush_by_tag {
                let flush = match (self.flush_all_owed, old) {
                    (true, _) => EntryFlush::All,
                    (false, true) => EntryFlush::Tag,
                    (false, false) => EntryFlush::None,
                };
                return Choice { tag: note.tag, flush, guest_physical, fresh: false };
            }
        }
        let tag = self.fresh();
        let flush = if self.flush_all_owed { EntryFlush::All } else { EntryFlush::None };
        self.flush_all_owed &= !mutant(DropPaysWrap);
        Choice { tag, flush, guest_physical, fresh: true }
    }

    #[cold]
    fn fresh(&mut self) -> u32 {
        if self.next - self.tags.first == self.tags.count {
            self.next = self.tags.first;
            self.era = Identity::new();
            self.flush_all_owed = true;
            hit(Point::TagsWrapped);
        }
        let tag = self.next;
        self.next += 1;
        tag
    }

    /// Notes that an entry with `choice` ran.
    #[inline(always)]
    pub(crate) fn ran(&mut self, root: Identity, choice: Choice, generation: u64) -> Note {
        if choice.flush == EntryFlush::All {
            self.flush_all_owed = false;
        }
        if choice.guest_physical {
            self.root_notes[Self::root_place(root)] = (root.number(), generation);
        }
        self.note(root, choice, generation)
    }

    /// What the vCPU of that entry may note once it has run.
    #[inline(always)]
    pub(crate) fn note(&self, root: Identity, choice: Choice, generation: u64) -> Note {
        Note { era: self.era, root, generation, tag: choice.tag }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// PROTOCOLS 3: the first entry anywhere flushes everything; then the note decides.
    #[test]
    fn the_note_decides() {
        let mut cpu = PhysCpu::new(TagSet::asids(16, true));
        let root = Identity::new();
        let first = cpu.choose(root, None, 1);
        assert_eq!(first.flush, EntryFlush::All);
        let note = Some(cpu.ran(root, first, 1));
        let again = Choice { flush: EntryFlush::None, fresh: false, ..first };
        assert_eq!(cpu.choose(root, note, 1), again);
        let flushed = cpu.choose(root, note, 2);
        assert_eq!(flushed, Choice { flush: EntryFlush::Tag, fresh: false, ..first });
        // It did not run: the flush is still due.
        assert_eq!(cpu.choose(root, note, 2), flushed);
        let note = Some(cpu.ran(root, flushed, 2));
        assert_eq!(cpu.choose(root, note, 2), again);
    }

    /// Without a flush by tag, a fresh tag is the flush.
    #[test]
    fn a_fresh_tag_replaces_the_flush_by_tag() {
        let mut cpu = PhysCpu::new(TagSet::asids(16, false));
        let root = Identity::new();
        let first = cpu.choose(root, None, 1);
        let note = Some(cpu.ran(root, first, 1));
        let second = cpu.choose(root, note, 2);
        assert_ne!(second.tag, first.tag);
        assert_eq!((second.flush, second.fresh), (EntryFlush::None, true));
    }

    /// Another processor, another root and no note all mean a fresh tag.
    #[test]
    fn trust_ends_with_processor_and_root() {
        let (mut here, mut there) =
            (PhysCpu::new(TagSet::asids(16, true)), PhysCpu::new(TagSet::asids(16, true)));
        let root = Identity::new();
        let first = here.choose(root, None, 1);
        let note = Some(here.ran(root, first, 1));
        let moved = there.choose(root, note, 1);
        assert_eq!((moved.flush, moved.fresh), (EntryFlush::All, true));
        assert_ne!(here.choose(Identity::new(), note, 1).tag, first.tag);
        assert_ne!(here.choose(root, None, 1).tag, first.tag);
        // Back after a run elsewhere: the note names the other processor.
        let note = Some(there.ran(root, moved, 1));
        assert_ne!(here.choose(root, note, 1).tag, first.tag);
    }

    /// A wrap ends every note, and its flush stays owed until an entry that carried it ran.
    #[test]
    fn a_wrap_owes_a_flush_of_all_until_an_entry_ran() {
        let mut cpu = PhysCpu::new(TagSet::asids(3, true));
        let (a, b, c) = (Identity::new(), Identity::new(), Identity::new());
        let choice = cpu.choose(a, None, 1);
        let note_a = Some(cpu.ran(a, choice, 1));
        let choice = cpu.choose(b, None, 1);
        cpu.ran(b, choice, 1);
        let wrapped = cpu.choose(c, None, 1);
        assert_eq!((wrapped.tag, wrapped.flush), (1, EntryFlush::All));
        // That entry was dropped. The next one still carries the flush, and nobody trusts an old note.
        let again = cpu.choose(a, note_a, 1);
        assert_eq!((again.tag, again.flush), (2, EntryFlush::All));
        cpu.ran(a, again, 1);
        assert_eq!(cpu.choose(c, None, 1).flush, EntryFlush::All, "this one wraps again");
    }

    /// PROTOCOLS 3: under EPT a fresh VPID drops no guest-physical mapping; only the root's own note does.
    #[test]
    fn guest_physical_mappings_have_notes_of_their_own() {
        let mut cpu = PhysCpu::new(TagSet::vpids(true));
        let root = Identity::new();
        let first = cpu.choose(root, None, 5);
        assert!(first.guest_physical);
        cpu.ran(root, first, 5);
        // Whoever ran: another vCPU of the same root finds it flushed, by tag it is new.
        let second = cpu.choose(root, None, 5);
        assert!(second.fresh && !second.guest_physical);
        assert!(cpu.choose(root, None, 6).guest_physical);
        // By identity: another root, even in the same page, has no note.
        assert!(cpu.choose(Identity::new(), None, 5).guest_physical);
    }
}
