//! The walk of a guest-physical address through nested or extended tables, from every start.
//!
//! Invariant: permissions are looked at when the leaf is reached, and not before: a missing or reserved entry
//! further down has precedence (SDM "EPT-Induced VM Exits": prioritization; APM 15.25.5).

use super::{Depth, NodeId, Place, Search, SecondPage, Way};
use crate::access::{AccessKind, Rights};
use crate::addr::{Gpa, Gva, Hpa, PageSize};
use crate::cache::Tag;
use crate::fault::{EptRequest, EptViolation, NestedAccess, NestedCause, NestedPageFault};
use crate::features::Vendor;
use crate::format::Entry;
use crate::outcome::{Outcome, Translation};
use crate::provenance::{EntryRead, Stage};
use crate::regime::{Second, SecondKind};
use std::ops::Range;

/// What an access asks of the second stage.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask {
    /// The rights that it needs.
    pub(super) needs: Rights,
    /// It is a write: the leaf's dirty flag must be set.
    pub(super) write: bool,
}

impl Ask {
    /// The final access of an instruction; `None` is a speculative walk, which needs nothing.
    pub(super) const fn of(kind: Option<AccessKind>) -> Self {
        let needs = match kind {
            None => return Self { needs: Rights::NONE, write: false },
            Some(AccessKind::Read) => Rights::READ,
            Some(AccessKind::Write) => Rights::WRITE,
            Some(AccessKind::Fetch) => Rights::EXECUTE,
        };
        // Every access is a user access at the nested level (APM 15.25.5); EPT entries count as user.
        Self { needs: needs.or(Rights::USER), write: matches!(kind, Some(AccessKind::Write)) }
    }

    pub(super) const fn of_table(second: &Second) -> Self {
        let (needs, write) = second.table_needs();
        Self { needs, write }
    }
}

/// A second-stage walk that failed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trouble {
    pub(super) cause: NestedCause,
    /// The AND of the entries' rights, for the exit qualification.
    pub(super) granted: Rights,
    pub(super) depth: Depth,
    pub(super) fresh: bool,
}

/// The pages (as a range of nodes to pick [`Place::SecondPage`] from) and the failures of one search.
pub(super) struct Found {
    nodes: Range<usize>,
    troubles: Range<usize>,
}

impl Search<'_> {
    /// Every way to translate `gpa`.
    pub(super) fn second(&mut self, second: &Second, gpa: u64, ask: Ask) -> Found {
        let since = self.graph.nodes.len();
        let first_trouble = self.troubles.len();
        if second.format.covers(gpa) {
            self.walk(second, gpa, ask, since);
        } else {
            self.troubles.push(Trouble {
                cause: NestedCause::NotPresent,
                granted: Rights::NONE,
                depth: Depth::default(),
                fresh: true,
            });
        }
        Found { nodes: since..self.graph.nodes.len(), troubles: first_trouble..self.troubles.len() }
    }

    fn walk(&mut self, second: &Second, gpa: u64, ask: Ask, since: usize) {
        let format = &second.format;
        let caches = self.caches;
        let store = caches.store(Tag::Physical(second.tag));
        for (id, page) in caches.pages(store, gpa) {
            if !page.nested.has(ask.needs) {
                self.trouble(NestedCause::Rights, page.nested, Depth::default(), false);
            } else if !ask.write || page.nested_dirty {
                let page = SecondPage {
                    frame: page.frame,
                    size: page.size,
                    rights: page.nested,
                    caching: page.nested_caching,
                    dirty: page.nested_dirty,
                };
                let place = Place::SecondPage { page, gpa, sets_dirty: ask.write };
                self.graph.reach(since, place, false, Way::item(id));
            }
        }
        let top = format.levels();
        let root = Place::SecondTable { level: top, table: second.root, rights: Rights::ALL, gpa };
        self.graph.reach(since, root, true, Way::root(None));
        for level in (1..=top).rev() {
            if level < top {
                for (id, table) in caches.tables(store, format.table_shift(level), gpa) {
                    let place = Place::SecondTable { level, table: table.table, rights: table.rights, gpa };
                    self.graph.reach(since, place, false, Way::item(id));
                }
            }
            for at in since..self.graph.nodes.len() {
                let node = self.graph.nodes[at];
                if let Place::SecondTable { level: l, table, rights, .. } = node.place
                    && l == level
                {
                    self.read_second(second, gpa, ask, since, NodeId(at as u32), (level, table, rights));
                }
            }
        }
    }

    /// The single step: one entry of one table.
    fn read_second(
        &mut self,
        second: &Second,
        gpa: u64,
        ask: Ask,
        since: usize,
        from: NodeId,
        (level, table, above): (u8, Hpa, Rights),
    ) {
        let format = &second.format;
        let fresh = self.graph.fresh(from);
        let at = table.plus(format.entry_offset(level, gpa));
        let value = self.memory.read64(at);
        let read = EntryRead { stage: Stage::Second, level, at, value };
        let way = Way::entry(read, from, None);
        let depth = |used: bool| Depth { node: Some(from), last: used.then_some(read) };
        match format.decode(level, value) {
            Entry::NotPresent => self.trouble(NestedCause::NotPresent, Rights::NONE, depth(false), fresh),
            Entry::Reserved => {
                let used = self.regime.marks_reserved(format, level, value);
                self.trouble(NestedCause::Reserved, Rights::NONE, depth(used), fresh);
            }
            Entry::Table { at, rights } => {
                let rights = above.and(rights);
                let place = Place::SecondTable { level: level - 1, table: Hpa::new(at), rights, gpa };
                self.graph.reach(since, place, fresh, way);
            }
            Entry::Page(leaf) => {
                let rights = above.and(leaf.rights);
                if !rights.has(ask.needs) {
                    self.trouble(NestedCause::Rights, rights, depth(true), fresh);
                    return;
                }
                let page = SecondPage {
                    frame: Hpa::new(leaf.at),
                    size: leaf.size,
                    rights,
                    caching: leaf.caching,
                    dirty: leaf.dirty,
                };
                let place = Place::SecondPage { page, gpa, sets_dirty: ask.write };
                self.graph.reach(since, place, fresh, way);
            }
        }
    }

    fn trouble(&mut self, cause: NestedCause, granted: Rights, depth: Depth, fresh: bool) {
        self.troubles.push(Trouble { cause, granted, depth, fresh });
    }

    /// The pages that a search found.
    pub(super) fn pages_of(&self, found: &Found) -> Vec<(NodeId, SecondPage)> {
        let nodes = self.graph.nodes[found.nodes.clone()].iter();
        (found.nodes.start as u32..)
            .zip(nodes)
            .filter_map(|(id, node)| match node.place {
                Place::SecondPage { page, .. } => Some((NodeId(id), page)),
                _ => None,
            })
            .collect()
    }

    /// Ends for the failures that a search met and that are reported.
    pub(super) fn report(
        &mut self,
        second: &Second,
        found: &Found,
        gpa: u64,
        whose: NestedAccess,
        kind: Option<AccessKind>,
        first: (Depth, bool),
    ) {
        for at in found.troubles.clone() {
            let trouble = self.troubles[at];
            if self.faults(trouble.fresh && first.1) {
                let outcome = self.nested_outcome(second, Gpa::new(gpa), whose, kind, &trouble);
                self.end(outcome, first.0, trouble.depth);
            }
        }
    }

    fn nested_outcome(
        &self,
        second: &Second,
        gpa: Gpa,
        whose: NestedAccess,
        kind: Option<AccessKind>,
        trouble: &Trouble,
    ) -> Outcome {
        // A speculative walk reports nothing; that it stops here is all that counts.
        let kind = kind.unwrap_or(AccessKind::Read);
        match (second.kind, trouble.cause) {
            (SecondKind::Npt, cause) => {
                let quirks = &self.regime.quirks;
                let fetch_told = second.format.has_nx() || !quirks.nested_fetch_told_by_nx;
                let kind = if kind == AccessKind::Fetch && !fetch_told { AccessKind::Read } else { kind };
                let p_is_clear = quirks.reserved_fault_without_present;
                Outcome::NestedPageFault(NestedPageFault::new(gpa, whose, kind, cause, p_is_clear))
            }
            (SecondKind::Ept { .. }, NestedCause::Reserved) => Outcome::EptMisconfiguration(gpa),
            (SecondKind::Ept { accessed_dirty }, _) => {
                let request = match whose {
                    NestedAccess::Table(_) if accessed_dirty => EptRequest::READ_WRITE,
                    NestedAccess::Table(_) => EptRequest::READ,
                    NestedAccess::Final(_) | NestedAccess::Physical => EptRequest::of(kind),
                };
                Outcome::EptViolation(EptViolation::new(gpa, whose, request, trouble.granted))
            }
        }
    }

    /// The search for an access by guest-physical address: no linear address, no first stage.
    pub(crate) fn physical(&mut self, gpa: Gpa, kind: Option<AccessKind>) {
        self.last(gpa.raw(), None, NestedAccess::Physical, kind);
    }

    /// An access while paging is off.
    pub(super) fn unpaged(&mut self, gva: Gva, kind: Option<AccessKind>) {
        self.last(gva.raw(), None, NestedAccess::Final(gva), kind);
    }

    fn last(&mut self, gpa: u64, first: Option<NodeId>, whose: NestedAccess, kind: Option<AccessKind>) {
        let Some(second) = self.regime.second else {
            let translation = Translation {
                hpa: Hpa::new(gpa),
                gpa: None,
                size: PageSize::Size4K,
                rights: Rights::ALL,
                nested: Rights::ALL,
                key: 0,
                caching: 0,
                nested_caching: 0,
            };
            self.end(Outcome::Translated(translation), first, None);
            return;
        };
        let found = self.second(&second, gpa, Ask::of(kind));
        for (node, page) in self.pages_of(&found) {
            let translation = Translation {
                hpa: page.frame.plus(gpa & (page.size.bytes() - 1)),
                gpa: Some(Gpa::new(gpa)),
                size: page.size,
                rights: Rights::ALL,
                nested: page.rights,
                key: 0,
                caching: 0,
                nested_caching: page.caching,
            };
            self.end(Outcome::Translated(translation), first, Some(node));
        }
        self.report(&second, &found, gpa, whose, kind, (first.into(), true));
    }

    /// Adds an end.
    pub(super) fn end(&mut self, outcome: Outcome, first: impl Into<Depth>, second: impl Into<Depth>) {
        let (first, second) = (first.into(), second.into());
        self.graph.ends.push(super::End { outcome, first, second, item: None });
    }

    /// A TLB hit of the final access whose second-stage rights do not suffice.
    pub(super) fn hit_without_rights(
        &self,
        gpa: Option<Gpa>,
        gva: Gva,
        kind: AccessKind,
        granted: Rights,
    ) -> Option<Outcome> {
        // AMD walks again. Intel may exit by what it holds.
        if self.regime.vendor == Vendor::Amd {
            return None;
        }
        let whose = NestedAccess::Final(gva);
        Some(Outcome::EptViolation(EptViolation::new(gpa?, whose, EptRequest::of(kind), granted)))
    }
}
