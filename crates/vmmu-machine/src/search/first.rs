//! The walk of a linear address through CR3's tables, from every start; each address that it meets goes
//! through the second stage, if there is one.
//!
//! Order of checks: entries from the top down, each for presence and then for reserved bits; permissions
//! once the leaf is reached (SDM 4.6, 4.7; APM 5.6, 8.4.2); then the second stage of the final address (APM
//! 15.25.5).

use super::second::Ask;
use super::{Depth, FirstTable, NodeId, Place, Search, SecondPage, Source, Way};
use crate::access::{Access, AccessKind, Rights};
use crate::addr::{Gpa, Gva, Hpa};
use crate::cache::Tag;
use crate::fault::{EptRequest, EptViolation, NestedAccess, PageFault, code};
use crate::format::{Entry, Format, Leaf};
use crate::outcome::{Outcome, Translation};
use crate::provenance::{EntryRead, Stage};
use crate::registers::Mode;

/// The access of one search: `None` is a speculative walk, which checks no permission.
type Wanted = Option<Access>;

impl Search<'_> {
    /// Every way in which an access to `gva` may end; `gva` is what
    /// [`crate::regime::Regime::linear_address`] gives.
    pub(crate) fn linear(&mut self, gva: Gva, wanted: Wanted) {
        if !self.regime.canonical(gva.raw()) {
            self.end(Outcome::NotCanonical(gva), None, None);
            return;
        }
        let Some(format) = self.regime.first else {
            self.unpaged(gva, wanted.map(|access| access.kind));
            return;
        };
        if let Some(access) = wanted {
            self.hits(self.regime.linear_tag(), gva, access);
            self.hits(self.regime.global_tag(), gva, access);
        }
        let walk = Walk { format, gva, wanted };
        self.start(&walk);
        let top = format.levels();
        for level in (1..=top).rev() {
            if level < top {
                self.cached_tables(&walk, level);
            }
            for at in 0..self.graph.nodes.len() {
                if let Place::FirstTable(table) = self.graph.nodes[at].place
                    && table.level == level
                {
                    self.read_first(&walk, NodeId(at as u32), &table);
                }
            }
        }
        for at in 0..self.graph.nodes.len() {
            if let Place::FirstPage { leaf, rights, table } = self.graph.nodes[at].place {
                self.arrive(&walk, NodeId(at as u32), &leaf, rights, &table);
            }
        }
    }

    /// What the TLB offers.
    fn hits(&mut self, tag: Tag, gva: Gva, access: Access) {
        let caches = self.caches;
        for (id, page) in caches.pages(caches.store(tag), gva.raw()) {
            let gpa = page.gpa.map(|gpa| gpa.plus(gva.raw() - page.at));
            let outcome = if let Err(code) = self.regime.check(page.rights, page.key, access) {
                // Held rights that do not suffice: AMD walks again to confirm.
                if !self.faults(false) {
                    continue;
                }
                Outcome::PageFault(PageFault { address: gva, code })
            } else if !page.nested.has(Ask::of(Some(access.kind)).needs) {
                match self.hit_without_rights(gpa, gva, access.kind, page.nested) {
                    Some(outcome) => outcome,
                    None => continue,
                }
            } else if access.kind == AccessKind::Write && !(page.dirty && page.nested_dirty) {
                // The dirty flag has to be set, and that is a walk (SDM 4.8; APM 5.5.3 "Handling of D-Bit
                // Updates").
                continue;
            } else {
                Outcome::Translated(Translation {
                    hpa: page.frame.plus(gva.raw() - page.at),
                    gpa,
                    size: page.size,
                    rights: page.rights,
                    nested: page.nested,
                    key: page.key,
                    caching: page.caching,
                    nested_caching: page.nested_caching,
                })
            };
            let depth = Depth::default();
            self.graph.ends.push(super::End { outcome, first: depth, second: depth, item: Some(id) });
        }
    }

    /// The walk's start at CR3, or at PAE's page-directory-pointer registers.
    fn start(&mut self, walk: &Walk) {
        let regime = self.regime;
        if regime.paging.mode == Mode::Pae && !regime.pdptes_in_memory() {
            let pdpte = regime.registers.pdptes[(walk.gva.raw() >> 30) as usize & 3];
            match walk.format.decode(3, pdpte) {
                Entry::Table { at, rights } => {
                    self.enter_table(walk, 2, at, rights, Way::root(None), false, true);
                }
                // MOV to CR3 let no reserved bit in; registers that a test filled in badly fault like
                // entries.
                Entry::Reserved => self.page_fault(walk, code::PRESENT | code::RESERVED, Depth::default()),
                Entry::NotPresent | Entry::Page(_) => self.page_fault(walk, 0, Depth::default()),
            }
            return;
        }
        let root = walk.format.root(regime.registers.cr3);
        self.enter_table(walk, walk.format.levels(), root, Rights::ALL, Way::root(None), false, true);
    }

    fn cached_tables(&mut self, walk: &Walk, level: u8) {
        let caches = self.caches;
        let store = caches.store(self.regime.linear_tag());
        for (id, table) in caches.tables(store, walk.format.table_shift(level), walk.gva.raw()) {
            let place = Place::FirstTable(FirstTable {
                level,
                table: table.table,
                gpa: table.gpa,
                rights: table.rights,
                nested: table.nested,
                blocked: false,
            });
            self.graph.reach(0, place, false, Way::item(id));
        }
    }

    /// From the address of a table, as an entry names it, to where it is in host memory: in every way that
    /// the second stage offers.
    fn enter_table(
        &mut self,
        walk: &Walk,
        level: u8,
        at: u64,
        rights: Rights,
        way: Way,
        blocked: bool,
        fresh: bool,
    ) {
        let Some(second) = self.regime.second else {
            let table = Hpa::new(at);
            let nested = Rights::ALL;
            let place = Place::FirstTable(FirstTable { level, table, gpa: None, rights, nested, blocked });
            self.graph.reach(0, place, fresh, way);
            return;
        };
        let offset = walk.format.entry_offset(level, walk.gva.raw());
        let entry = at + offset;
        let found = self.second(&second, entry, Ask::of_table(&second));
        for (node, page) in self.pages_of(&found) {
            let here = page.frame.plus(entry & (page.size.bytes() - 1));
            let place = Place::FirstTable(FirstTable {
                level,
                table: Hpa::new(here.raw() - offset),
                gpa: Some(Gpa::new(at)),
                rights,
                nested: page.rights,
                blocked,
            });
            let fresh = fresh && self.graph.fresh(node);
            self.graph.reach(0, place, fresh, Way { via: Some(node), ..way });
        }
        let whose = NestedAccess::Table(walk.gva);
        let last = match way.source {
            Source::Entry(read) if !blocked => Some(read),
            _ => None,
        };
        self.report(&second, &found, entry, whose, None, (Depth { node: way.from, last }, fresh));
    }

    /// The single step: one entry of one table.
    fn read_first(&mut self, walk: &Walk, from: NodeId, table: &FirstTable) {
        let format = &walk.format;
        let level = table.level;
        let fresh = self.graph.fresh(from);
        let offset = format.entry_offset(level, walk.gva.raw());
        let at = table.table.plus(offset);
        let value = match format.entry_bytes() {
            4 => self.memory.read32(at).into(),
            _ => self.memory.read64(at),
        };
        let decoded = format.decode(level, value);
        let fault = match decoded {
            Entry::NotPresent => Some(0),
            Entry::Reserved if self.regime.quirks.reserved_fault_without_present => Some(code::RESERVED),
            Entry::Reserved => Some(code::PRESENT | code::RESERVED),
            Entry::Table { .. } | Entry::Page(_) => None,
        };
        if let Some(code) = fault {
            if self.faults(fresh) {
                let used = self.regime.marks_reserved(format, level, value) && !table.blocked;
                let last = used.then_some(EntryRead { stage: Stage::First, level, at, value });
                self.page_fault(walk, code, Depth { node: Some(from), last });
            }
            return;
        }
        // The accessed flag is set before the entry is used, by a write that the second stage must grant. A
        // processor may put that off until the walk has come to its end: so the search goes on, but to
        // faults only.
        let accessed_missing = value & format.accessed(level) != format.accessed(level);
        let cannot_set = accessed_missing && !table.nested.has(Rights::WRITE);
        if cannot_set {
            self.flag_violation(walk, from, table, offset);
        }
        let blocked = table.blocked || cannot_set;
        let read = EntryRead { stage: Stage::First, level, at, value };
        let way = Way::entry(read, from, None);
        match decoded {
            Entry::Table { at, rights } => {
                self.enter_table(walk, level - 1, at, table.rights.and(rights), way, blocked, fresh);
            }
            Entry::Page(leaf) => {
                let rights = table.rights.and(leaf.rights);
                let place = Place::FirstPage { leaf, rights, table: FirstTable { blocked, ..*table } };
                self.graph.reach(0, place, fresh, way);
            }
            Entry::NotPresent | Entry::Reserved => {}
        }
    }

    /// EPT without accessed and dirty flags, and a guest entry whose own flag is to be set lies in a page
    /// that is not writable. For a read-modify-write bit 1 is set, and bit 0 may be (SDM, notes to the
    /// table of the exit qualification for EPT violations).
    fn flag_violation(&mut self, walk: &Walk, node: NodeId, table: &FirstTable, offset: u64) {
        // A cached table without its address: a processor finds the address by walking anew.
        let Some(gpa) = table.gpa else { return };
        for request in [EptRequest::WRITE, EptRequest::READ_WRITE] {
            let whose = NestedAccess::Table(walk.gva);
            let exit = EptViolation::new(gpa.plus(offset), whose, request, table.nested);
            self.end(Outcome::EptViolation(exit), Some(node), None);
        }
    }

    /// The leaf is reached: permissions, flags, and the final address.
    fn arrive(&mut self, walk: &Walk, node: NodeId, leaf: &Leaf, rights: Rights, table: &FirstTable) {
        let fresh = self.graph.fresh(node);
        if let Some(access) = walk.wanted
            && let Err(code) = self.regime.check(rights, leaf.key, access)
        {
            if self.faults(fresh) {
                let fault = PageFault { address: walk.gva, code };
                self.end(Outcome::PageFault(fault), Some(node), None);
            }
            return;
        }
        if table.blocked {
            return;
        }
        let kind = walk.wanted.map(|access| access.kind);
        if kind == Some(AccessKind::Write) && !leaf.dirty && !table.nested.has(Rights::WRITE) {
            let offset = walk.format.entry_offset(table.level, walk.gva.raw());
            self.flag_violation(walk, node, table, offset);
            return;
        }
        let within = walk.gva.raw() & (leaf.size.bytes() - 1);
        let gpa = leaf.at + within;
        let Some(second) = self.regime.second else {
            let translation = translation(leaf, rights, None, Hpa::new(gpa));
            self.end(Outcome::Translated(translation), Some(node), None);
            return;
        };
        let found = self.second(&second, gpa, Ask::of(kind));
        for (page_node, page) in self.pages_of(&found) {
            let hpa = page.frame.plus(gpa & (page.size.bytes() - 1));
            let translation = translation(leaf, rights, Some((Gpa::new(gpa), page)), hpa);
            self.end(Outcome::Translated(translation), Some(node), Some(page_node));
        }
        self.report(&second, &found, gpa, NestedAccess::Final(walk.gva), kind, (Some(node).into(), fresh));
    }

    fn page_fault(&mut self, walk: &Walk, cause: u32, depth: Depth) {
        let bits = walk.wanted.map_or(0, |access| access.code(&self.regime.paging));
        self.end(Outcome::PageFault(PageFault { address: walk.gva, code: cause | bits }), depth, None);
    }
}

/// What stays the same during one search.
struct Walk {
    format: Format,
    gva: Gva,
    wanted: Wanted,
}

fn translation(leaf: &Leaf, rights: Rights, second: Option<(Gpa, SecondPage)>, hpa: Hpa) -> Translation {
    let nested = second.map(|(_, page)| page);
    Translation {
        hpa,
        gpa: second.map(|(gpa, _)| gpa),
        size: nested.map_or(leaf.size, |page| page.size.min(leaf.size)),
        rights,
        nested: nested.map_or(Rights::ALL, |page| page.rights),
        key: leaf.key,
        caching: leaf.caching,
        nested_caching: nested.map_or(0, |page| page.caching),
    }
}
