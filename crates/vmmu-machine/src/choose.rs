//! From the set of what may happen to one thing that does: the choice, and its effects on memory and caches.
//!
//! A chosen way sets the accessed flags of the entries that it read, and the dirty flag where a write
//! succeeds; it fills the caches with everything that it learned, since nothing here is ever evicted; a
//! chosen fault removes what the manuals say that it removes. Invariant: an effect is applied only if the
//! entries are still what the search read; else [`MemoryChanged`], and the access is made again.

use crate::access::Rights;
use crate::addr::{Gpa, Gva, Hpa, PageSize};
use crate::cache::{Caches, Held, Mapping, Page, Table, Tag};
use crate::format::{Format, Leaf};
use crate::hash::Choice;
use crate::memory::Memory;
use crate::outcome::{Outcome, Translation};
use crate::provenance::{EntryRead, Event, Provenance, Stage};
use crate::regime::{Regime, Second};
use crate::search::{Depth, End, FirstTable, Graph, NodeId, Place, SecondPage, Source};
use std::fmt;
use std::sync::Arc;

/// An entry was changed between the search and the choice. Nothing but accessed flags was touched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryChanged {
    /// The entry.
    pub at: Hpa,
}

impl fmt::Display for MemoryChanged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the entry at {} was changed between the search and the choice", self.at)
    }
}

impl std::error::Error for MemoryChanged {}

/// Flags that a walk sets in one entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mark {
    /// The entry, as the walk read it.
    pub entry: EntryRead,
    /// The accessed flag, the dirty flag, or both: of those bits at least one is still clear.
    pub flags: u64,
}

/// Flags to set in one entry.
struct Update {
    read: EntryRead,
    bytes: u8,
    flags: u64,
    /// Bits that other walks may have set meanwhile.
    ignore: u64,
}

/// What one chosen way does.
pub(crate) struct Effects {
    updates: Vec<Update>,
    fills: Vec<Held>,
}

/// Follows one way back to its roots, choosing among the ways of each node.
pub(crate) struct Follow<'a> {
    pub(crate) graph: &'a Graph,
    pub(crate) caches: &'a Caches,
    pub(crate) regime: &'a Regime,
    pub(crate) step: u64,
    pub(crate) speculative: bool,
    /// The linear address of the access, if it has one.
    pub(crate) gva: Option<Gva>,
    pub(crate) choice: Choice,
    effects: Effects,
}

impl<'a> Follow<'a> {
    pub(crate) const fn new(
        graph: &'a Graph,
        caches: &'a Caches,
        regime: &'a Regime,
        step: u64,
        speculative: bool,
        gva: Option<Gva>,
        choice: Choice,
    ) -> Self {
        let effects = Effects { updates: Vec::new(), fills: Vec::new() };
        Self { graph, caches, regime, step, speculative, gva, choice, effects }
    }

    fn record(
        &self,
        event: Event,
        from: Option<Arc<Provenance>>,
        located_by: Option<Arc<Provenance>>,
    ) -> Arc<Provenance> {
        Arc::new(Provenance { step: self.step, speculative: self.speculative, event, from, located_by })
    }

    /// Comes to `node` by one of its ways. `write`: the access at its end sets dirty flags.
    fn come(&mut self, node: NodeId, write: bool) -> Arc<Provenance> {
        let count = self.graph.ways(node).count();
        let pick = self.choice.below(count);
        let way = *self.graph.ways(node).nth(pick).expect("every node has a way");
        let place = *self.graph.place(node);
        let stage = match place {
            Place::SecondTable { .. } | Place::SecondPage { .. } => Stage::Second,
            Place::FirstTable(_) | Place::FirstPage { .. } => Stage::First,
        };
        let read = match way.source {
            Source::Item(id) => return Arc::clone(&self.caches.held(id).provenance),
            Source::Root => {
                let by = way.via.map(|via| self.come(via, false));
                return self.record(Event::Root(stage), None, by);
            }
            Source::Entry(read) => read,
        };
        let from = way.from.map(|from| self.come(from, false));
        self.update(&place, read, write);
        let by = way.via.map(|via| self.come(via, false));
        let provenance = self.record(Event::Entry(read), from, by);
        if let Some((tag, mapping)) = self.learned(&place) {
            self.effects.fills.push(Held { tag, mapping, provenance: Arc::clone(&provenance) });
        }
        provenance
    }

    fn format(&self, stage: Stage) -> Option<&'a Format> {
        match stage {
            Stage::First => self.regime.first.as_ref(),
            Stage::Second => self.regime.second.as_ref().map(|second| &second.format),
        }
    }

    /// The flags that reading `read` on the way to `place` sets.
    fn update(&mut self, place: &Place, read: EntryRead, write: bool) {
        let Some(format) = self.format(read.stage) else { return };
        let dirty = match place {
            Place::SecondPage { sets_dirty: true, .. } => format.dirty(),
            Place::FirstPage { .. } if write => format.dirty(),
            _ => 0,
        };
        self.mark(read, dirty);
    }

    /// Sets the accessed flag of an entry, and `dirty`.
    fn mark(&mut self, read: EntryRead, dirty: u64) {
        let Some(format) = self.format(read.stage) else { return };
        let accessed = format.accessed(read.level);
        if read.value & (accessed | dirty) != accessed | dirty {
            self.effects.updates.push(Update {
                read,
                bytes: format.entry_bytes(),
                flags: accessed | dirty,
                ignore: accessed | format.dirty(),
            });
        }
    }

    /// What coming to `place` lets a processor keep.
    fn learned(&self, place: &Place) -> Option<(Tag, Mapping)> {
        match *place {
            Place::SecondTable { level, table, rights, gpa } => {
                let second = self.regime.second.as_ref()?;
                let shift = second.format.table_shift(level);
                let at = gpa >> shift << shift;
                let kept = Table { at, shift, level, table, gpa: None, rights, nested: rights };
                Some((Tag::Physical(second.tag), Mapping::Table(kept)))
            }
            Place::SecondPage { page, gpa, sets_dirty } => {
                let second = self.regime.second.as_ref()?;
                Some((Tag::Physical(second.tag), Mapping::Page(physical_page(&page, gpa, sets_dirty))))
            }
            Place::FirstTable(FirstTable { level, table, gpa, rights, nested, .. }) => {
                let shift = self.regime.first.as_ref()?.table_shift(level);
                let at = self.gva?.raw() >> shift << shift;
                let kept = Table { at, shift, level, table, gpa, rights, nested };
                Some((self.regime.linear_tag(), Mapping::Table(kept)))
            }
            // Only the whole translation is kept, when its second stage is known too.
            Place::FirstPage { .. } => None,
        }
    }

    /// The whole of a successful way.
    fn arrive(&mut self, end: &End, translation: &Translation, write: bool) {
        let first = end.first.node.map(|node| self.come(node, write));
        let second = end.second.node.map(|node| self.come(node, false));
        let (Some(from), Some(Place::FirstPage { leaf, .. }), Some(gva)) =
            (first, end.first.node.map(|node| *self.graph.place(node)), self.gva)
        else {
            // Paging is off: only guest-physical mappings are kept, so that turning paging on needs no flush
            // (SDM 4.10.4.1 asks for none).
            return;
        };
        let nested = end.second.node.map(|node| *self.graph.place(node));
        let page = self.whole_page(gva, &leaf, nested, translation, write);
        let provenance = match second {
            Some(by) => self.record(Event::Combined, Some(from), Some(by)),
            None => from,
        };
        let global = leaf.global && self.regime.paging.global;
        let tag = if global { self.regime.global_tag() } else { self.regime.linear_tag() };
        self.effects.fills.push(Held { tag, mapping: Mapping::Page(page), provenance });
    }

    fn whole_page(
        &mut self,
        gva: Gva,
        leaf: &Leaf,
        nested: Option<Place>,
        translation: &Translation,
        write: bool,
    ) -> Page {
        // A large page may be held in pieces (SDM 4.10.2.3).
        let splinter = translation.size > PageSize::Size4K && self.choice.below(4) == 0;
        let size = if splinter { PageSize::Size4K } else { translation.size };
        let nested_dirty = match nested {
            Some(Place::SecondPage { page, sets_dirty, .. }) => page.dirty || sets_dirty,
            _ => true,
        };
        let nested_caching = translation.nested_caching;
        Page {
            at: gva.page(size).raw(),
            size,
            origin: leaf.size,
            frame: translation.hpa.page(size),
            gpa: translation.gpa.map(|gpa| gpa.page(size)),
            rights: translation.rights,
            nested: translation.nested,
            key: leaf.key,
            caching: leaf.caching,
            nested_caching,
            dirty: leaf.dirty || write,
            nested_dirty,
        }
    }

    /// Follows `end` as far as its outcome goes.
    pub(crate) fn end(mut self, end: &End, write: bool) -> Effects {
        // Whether a write's dirty flag is set before the second stage has granted the write, the manuals leave
        // open (APM 15.25.5). A page fault of the first stage sets none.
        let write = write && !matches!(end.outcome, Outcome::PageFault(_));
        if end.item.is_some() {
            return self.effects;
        }
        if let Outcome::Translated(translation) = &end.outcome {
            self.arrive(end, translation, write);
            return self.effects;
        }
        // A walk that ends in a fault has set accessed flags down to wherever the processor got before it
        // gave up.
        for Depth { node, last } in [end.first, end.second] {
            let stopped = node.and_then(|node| self.give_up_before(node));
            if let Some(stopped) = stopped {
                let dirty = write && self.choice.below(2) == 0;
                self.part(stopped, dirty);
            }
            if let Some(last) = last
                && stopped == node
                && self.choice.below(3) != 0
            {
                self.mark(last, 0);
            }
        }
        self.effects
    }

    /// The flags of the whole way to `end`, in the order of the walk.
    pub(crate) fn marks(mut self, end: &End, write: bool) -> Vec<Mark> {
        let write = write && !matches!(end.outcome, Outcome::PageFault(_));
        if end.item.is_none() {
            if let Outcome::Translated(translation) = &end.outcome {
                self.arrive(end, translation, write);
            } else {
                for Depth { node, last } in [end.first, end.second] {
                    if let Some(node) = node {
                        self.part(node, write);
                    }
                    if let Some(last) = last {
                        self.mark(last, 0);
                    }
                }
            }
        }
        self.effects.updates.iter().map(|update| Mark { entry: update.read, flags: update.flags }).collect()
    }

    /// Follows the way to one node that a speculative walk stopped at.
    pub(crate) fn node(mut self, node: NodeId) -> Effects {
        self.part(node, false);
        self.effects
    }

    /// `node`, or one on the way to it, or none.
    fn give_up_before(&mut self, mut node: NodeId) -> Option<NodeId> {
        while self.choice.below(3) == 0 {
            let above = self.graph.ways(node).next().and_then(|way| way.from);
            node = above?;
        }
        Some(node)
    }

    /// Sets flags down to `node`. `write`: of a leaf of the first stage also the dirty flag, if what failed is the
    /// second stage's walk for the final address.
    fn part(&mut self, node: NodeId, write: bool) {
        let (blocked, writable) = match self.graph.place(node) {
            Place::FirstTable(table) | Place::FirstPage { table, .. } => {
                (table.blocked, table.nested.has(Rights::WRITE))
            }
            Place::SecondTable { .. } | Place::SecondPage { .. } => (false, false),
        };
        if !blocked {
            self.come(node, write && writable);
        }
    }

    /// The record of an end, without effects.
    pub(crate) fn explain(mut self, end: &End) -> Arc<Provenance> {
        if let Some(id) = end.item {
            return Arc::clone(&self.caches.held(id).provenance);
        }
        let first = end.first.node.map(|node| self.come(node, false));
        let second = end.second.node.map(|node| self.come(node, false));
        match (first, second) {
            (Some(first), None) => first,
            (None, Some(second)) => second,
            (None, None) => self.record(Event::Identity, None, None),
            (first, second) => self.record(Event::Combined, first, second),
        }
    }
}

fn physical_page(page: &SecondPage, gpa: u64, sets_dirty: bool) -> Page {
    let at = gpa & !(page.size.bytes() - 1);
    Page {
        at,
        size: page.size,
        origin: page.size,
        frame: page.frame,
        gpa: Some(Gpa::new(at)),
        rights: Rights::ALL,
        nested: page.rights,
        key: 0,
        caching: 0,
        nested_caching: page.caching,
        dirty: true,
        nested_dirty: page.dirty || sets_dirty,
    }
}

impl Effects {
    /// Sets the flags, in the order of the walk, then fills the caches.
    pub(crate) fn apply(self, memory: &Memory, caches: &mut Caches) -> Result<(), MemoryChanged> {
        for Update { read, bytes, flags, ignore } in self.updates {
            if !memory.set_in_entry(read.at, bytes, read.value, ignore, flags) {
                return Err(MemoryChanged { at: read.at });
            }
        }
        for Held { tag, mapping, provenance } in &self.fills {
            caches.insert(*tag, *mapping, provenance);
        }
        Ok(())
    }
}

/// What a fault removes from the caches by itself.
///
/// - #PF (SDM 4.10.4.1, APM 5.5.3): the translations of the faulting address and the paging-structure
///   entries that would be used for it, of the current PCID. Global translations too: otherwise the fault
///   could recur although memory does not cause it, which the section excludes.
/// - EPT violation (SDM "Operations that Invalidate Cached Mappings"): the guest-physical mappings for the
///   address, and the combined mappings for the linear address of the current PCID, VPID and EPT root. A
///   misconfiguration removes nothing.
/// - Nested page fault (APM 5.5.3 speaks of any page fault): likewise.
pub(crate) fn fault_removes(caches: &mut Caches, regime: &Regime, gva: Option<Gva>, outcome: &Outcome) {
    let (linear, global) = (regime.linear_tag(), regime.global_tag());
    let forget_linear = |caches: &mut Caches, gva: Gva| {
        caches.clear_page(gva.raw(), |tag| tag == linear || tag == global);
        caches.clear_path(gva.raw(), |tag| tag == linear);
    };
    let physical = regime.second.as_ref().map(|Second { tag, .. }| *tag);
    let forget_physical = |caches: &mut Caches, gpa: Gpa| {
        if let Some(tag) = physical {
            caches.clear_physical(gpa.raw(), tag);
        }
    };
    match outcome {
        Outcome::PageFault(fault) => {
            forget_linear(caches, fault.address);
        }
        Outcome::EptViolation(exit) => {
            forget_physical(caches, exit.gpa);
            if let Some(gva) = exit.gva {
                forget_linear(caches, gva);
            }
        }
        Outcome::NestedPageFault(fault) => {
            forget_physical(caches, fault.gpa);
            if let Some(gva) = gva {
                forget_linear(caches, gva);
            }
        }
        Outcome::Translated(_) | Outcome::EptMisconfiguration(_) | Outcome::NotCanonical(_) => {}
    }
}
