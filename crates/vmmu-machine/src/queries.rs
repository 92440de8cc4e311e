//! Questions for oracles: what a processor holds, and what it could come to hold or use.
//!
//! Reads only. [`Queries`] answers for one moment, and for the world that the processor is in or any that
//! it may enter without a flush.

use crate::access::{Access, AccessKind, Rights};
use crate::addr::{Gpa, Gva, Hpa, PageSize, Pfn};
use crate::cache::{Held, Mapping, PhysicalTag, Tag};
use crate::format::{Entry, Format};
use crate::memory::Memory;
use crate::outcome::Translation;
use crate::outcomes::Outcomes;
use crate::processor::{EntryRefused, Guest, Processor};
use crate::provenance::{EntryRead, Event, Provenance, Stage};
use crate::regime::Regime;
use crate::search::Search;
use std::sync::Arc;

impl Processor {
    /// Everything that it holds, of all tags, in a repeatable order. A full scan.
    pub fn held(&self) -> impl Iterator<Item = &Held> {
        self.caches().iter()
    }

    /// How much it holds: translations and paging-structure entries.
    pub fn held_count(&self) -> usize {
        self.caches().len()
    }

    /// Everything that it holds under `tag`.
    pub fn held_by(&self, tag: Tag) -> impl Iterator<Item = &Held> {
        self.caches().of_tag(tag)
    }

    /// Everything that leads to `pfn`: translations of a page that holds it, and paging-structure entries
    /// that lead to a table in it. By index: as cheap as its answer is short.
    pub fn held_to(&self, pfn: Pfn) -> impl Iterator<Item = &Held> {
        self.caches().of_frame(pfn)
    }

    /// The translations that it holds of a guest-physical address.
    pub fn held_of_physical(&self, tag: PhysicalTag, gpa: Gpa) -> impl Iterator<Item = &Held> {
        let store = self.caches().store(Tag::Physical(tag));
        self.caches().pages(store, gpa.raw()).map(|(id, _)| self.caches().held(id))
    }

    /// Questions about the world that it is in.
    pub fn queries<'a>(&'a self, memory: &'a Memory) -> Queries<'a> {
        Queries { processor: self, memory, regime: self.regime().clone() }
    }

    /// Questions about `guest`, as if it were entered now and nothing flushed.
    pub fn queries_in<'a>(
        &'a self,
        memory: &'a Memory,
        guest: impl Into<Guest>,
    ) -> Result<Queries<'a>, EntryRefused> {
        let regime = guest.into().regime(self.features(), *self.quirks())?;
        Ok(Queries { processor: self, memory, regime })
    }
}

/// A translation that the processor could use or make.
#[derive(Clone, Debug)]
pub struct Reached {
    /// The first address that it translates.
    pub at: u64,
    /// How much.
    pub size: PageSize,
    /// The first byte in host memory.
    pub frame: Hpa,
    /// What it grants.
    pub rights: Rights,
    /// The tables on the way; the leaf entry is the last.
    pub provenance: Arc<Provenance>,
}

/// See the module.
#[derive(Debug)]
pub struct Queries<'a> {
    processor: &'a Processor,
    memory: &'a Memory,
    regime: Regime,
}

impl Queries<'_> {
    /// The tag of guest-physical mappings, if there is a second stage.
    pub fn physical_tag(&self) -> Option<PhysicalTag> {
        self.regime.second.map(|second| second.tag)
    }

    /// The tag of the linear or combined mappings of the current process.
    pub fn linear_tag(&self) -> Tag {
        self.regime.linear_tag()
    }

    /// The tag of the global translations.
    pub fn global_tag(&self) -> Tag {
        self.regime.global_tag()
    }

    /// Everything that an access may come to. For oracles: it cannot be chosen from unless the world is the
    /// current one.
    pub fn access(&self, gva: Gva, access: Access) -> Outcomes {
        let gva = self.regime.linear_address(gva);
        let mut search = Search::new(self.memory, self.processor.caches(), &self.regime);
        search.linear(gva, Some(access));
        let changes = self.processor.changes();
        Outcomes { graph: search.graph, gva: Some(gva), kind: Some(access.kind), changes }
    }

    /// Every translation of a linear address that some access could use: held, or to be had by a walk from
    /// any start. Permissions of accesses play no part; the rights are in the answers.
    pub fn translations(&self, gva: Gva) -> Vec<Translation> {
        let gva = self.regime.linear_address(gva);
        let mut search = Search::new(self.memory, self.processor.caches(), &self.regime);
        search.linear(gva, None);
        let mut out: Vec<Translation> = Vec::new();
        let walked = search.graph.ends.iter().filter_map(|end| end.outcome.translation().copied());
        let caches = self.processor.caches();
        let held = [self.linear_tag(), self.global_tag()].into_iter().flat_map(|tag| {
            caches.pages(caches.store(tag), gva.raw()).map(|(_, page)| {
                let within = gva.raw() - page.at;
                Translation {
                    hpa: page.frame.plus(within),
                    gpa: page.gpa.map(|gpa| gpa.plus(within)),
                    size: page.size,
                    rights: page.rights,
                    nested: page.nested,
                    key: page.key,
                    caching: page.caching,
                    nested_caching: page.nested_caching,
                }
            })
        });
        for translation in walked.chain(held) {
            if !out.contains(&translation) {
                out.push(translation);
            }
        }
        out
    }

    /// Every translation of a guest-physical address that some access could use, held or to be had by a
    /// walk from any start. Without a second stage, the address itself.
    pub fn physical_translations(&self, gpa: Gpa) -> Vec<Translation> {
        let mut search = Search::new(self.memory, self.processor.caches(), &self.regime);
        search.physical(gpa, None);
        let mut out: Vec<Translation> = Vec::new();
        for translation in search.graph.ends.iter().filter_map(|end| end.outcome.translation()) {
            if !out.contains(translation) {
                out.push(*translation);
            }
        }
        out
    }

    /// Whether a guest-physical access of this kind could succeed by some way, and which frames it could
    /// reach.
    pub fn physical_access(&self, gpa: Gpa, kind: AccessKind) -> Outcomes {
        let mut search = Search::new(self.memory, self.processor.caches(), &self.regime);
        search.physical(gpa, Some(kind));
        let changes = self.processor.changes();
        Outcomes { graph: search.graph, gva: None, kind: Some(kind), changes }
    }

    /// Visits every guest-physical translation that this world could use: all that is held, and all leaves
    /// below the second stage's root and below every cached table. A full scan of the tables; leaves that
    /// are reached in two ways are visited twice.
    pub fn reach_physical(&self, mut visit: impl FnMut(&Reached)) {
        let Some(second) = self.regime.second else { return };
        let start = (Stage::Second, second.format, second.root);
        self.reach(start, Tag::Physical(second.tag), &mut visit);
    }

    /// Likewise for linear translations of the current process, in a world without a second stage: the
    /// host, or a guest under shadow paging. Global translations of other processes are included.
    pub fn reach_linear(&self, mut visit: impl FnMut(&Reached)) {
        let (Some(format), None) = (self.regime.first, self.regime.second) else { return };
        let root = Hpa::new(format.root(self.regime.registers.cr3));
        self.reach((Stage::First, format, root), self.linear_tag(), &mut visit);
        for held in self.processor.held_by(self.global_tag()) {
            visit_page(held, &mut visit);
        }
    }

    fn reach(&self, (stage, format, root): (Stage, Format, Hpa), tag: Tag, visit: &mut impl FnMut(&Reached)) {
        let subtree = Subtree { memory: self.memory, stage, format, step: self.processor.step() };
        let record = |event| {
            let step = self.processor.step();
            Arc::new(Provenance { step, speculative: true, event, from: None, located_by: None })
        };
        let levels = format.levels();
        if stage == Stage::First && matches!(levels, 3) && !self.regime.pdptes_in_memory() {
            for (index, &pdpte) in (0u64..).zip(&self.regime.registers.pdptes) {
                if let Entry::Table { at, rights } = format.decode(3, pdpte) {
                    let from = record(Event::Root(stage));
                    subtree.below(2, Hpa::new(at), rights, index << 30, &from, visit);
                }
            }
        } else {
            subtree.below(levels, root, Rights::ALL, 0, &record(Event::Root(stage)), visit);
        }
        for held in self.processor.held_by(tag) {
            match &held.mapping {
                Mapping::Page(_) => visit_page(held, visit),
                Mapping::Table(table) => {
                    subtree.below(table.level, table.table, table.rights, table.at, &held.provenance, visit);
                }
            }
        }
    }
}

fn visit_page(held: &Held, visit: &mut impl FnMut(&Reached)) {
    if let Mapping::Page(page) = &held.mapping {
        visit(&Reached {
            at: page.at,
            size: page.size,
            frame: page.frame,
            rights: page.rights.and(page.nested),
            provenance: Arc::clone(&held.provenance),
        });
    }
}

/// The tables of one stage, as memory has them now.
struct Subtree<'a> {
    memory: &'a Memory,
    stage: Stage,
    format: Format,
    step: u64,
}

impl Subtree<'_> {
    fn below(
        &self,
        level: u8,
        table: Hpa,
        above: Rights,
        start: u64,
        from: &Arc<Provenance>,
        visit: &mut impl FnMut(&Reached),
    ) {
        let span = 1 << self.format.entry_shift(level);
        let bytes = u64::from(self.format.entry_bytes());
        let entries = (1u64 << (self.format.table_shift(level) - self.format.entry_shift(level))).min(
            // PAE's topmost table has four entries.
            if self.format.levels() == 3 && level == 3 { 4 } else { u64::MAX },
        );
        for index in 0..entries {
            let at = table.plus(index * bytes);
            let value = if bytes == 4 { self.memory.read32(at).into() } else { self.memory.read64(at) };
            let record = || {
                let event = Event::Entry(EntryRead { stage: self.stage, level, at, value });
                let from = Some(Arc::clone(from));
                Arc::new(Provenance { step: self.step, speculative: true, event, from, located_by: None })
            };
            // Upper halves of 4- and 5-level tables are the negative addresses of a linear stage.
            let address = self.address(start + index * span);
            match self.format.decode(level, value) {
                Entry::NotPresent | Entry::Reserved => {}
                Entry::Table { at, rights } => {
                    self.below(level - 1, Hpa::new(at), above.and(rights), address, &record(), visit);
                }
                Entry::Page(leaf) => visit(&Reached {
                    at: address,
                    size: leaf.size,
                    frame: Hpa::new(leaf.at),
                    rights: above.and(leaf.rights),
                    provenance: record(),
                }),
            }
        }
    }

    /// The canonical form of a linear address; a guest-physical one as it is.
    fn address(&self, raw: u64) -> u64 {
        let unused = match (self.stage, self.format.levels()) {
            (Stage::First, 4) => 16,
            (Stage::First, 5) => 7,
            _ => return raw,
        };
        ((raw << unused).cast_signed() >> unused).cast_unsigned()
    }
}
