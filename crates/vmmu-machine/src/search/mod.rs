//! The search for every way in which an access may end, given memory now and all that the caches hold.
//!
//! A processor may take a translation from its TLB, or walk; a walk may start at the root or at any cached
//! table on the way; and with two stages each address that the first stage's walk meets has the same
//! choices again. The search follows all of them at once, level by level. Two ways that arrive at the same
//! table with the same rights are one *node* with two [`Way`]s, so the work is that of a walk or two, not
//! of their product.
//!
//! | room | holds |
//! |---|---|
//! | here | the graph of nodes and ways |
//! | `second` | the walk of guest-physical addresses |
//! | `first` | the walk of linear addresses |
//!
//! Pure: it reads memory and caches and changes neither. Taking one of the ways, with its effects, is
//! [`crate::choose`]'s. Invariant: a node is *fresh* if some way to it uses no cached mapping; the outcome
//! of the walk without any caches is always among the results.

mod first;
mod second;

use crate::access::Rights;
use crate::addr::{Gpa, Hpa, PageSize};
use crate::cache::{Caches, ItemId};
use crate::features::Vendor;
use crate::format::Leaf;
use crate::memory::Memory;
use crate::outcome::Outcome;
use crate::provenance::EntryRead;
use crate::regime::Regime;

/// A node's place in the graph.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct NodeId(u32);

/// Where a walk can be.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Place {
    /// About to read an entry of a second-stage table.
    SecondTable { level: u8, table: Hpa, rights: Rights, gpa: u64 },
    /// At a page of the second stage, by an access that it grants. `sets_dirty`: the access is a write.
    SecondPage { page: SecondPage, gpa: u64, sets_dirty: bool },
    /// About to read an entry of a first-stage table.
    FirstTable(FirstTable),
    /// At a leaf of the first stage.
    FirstPage { leaf: Leaf, rights: Rights, table: FirstTable },
}

/// A page of the second stage.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct SecondPage {
    /// The first byte of the page.
    pub(crate) frame: Hpa,
    pub(crate) size: PageSize,
    pub(crate) rights: Rights,
    pub(crate) caching: u8,
    /// The dirty flag was seen set.
    pub(crate) dirty: bool,
}

/// A table of the first stage, found in host memory.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct FirstTable {
    pub(crate) level: u8,
    pub(crate) table: Hpa,
    /// Its guest-physical address, with a second stage.
    pub(crate) gpa: Option<Gpa>,
    /// What the entries above grant.
    pub(crate) rights: Rights,
    /// What the second stage grants for the table's page.
    pub(crate) nested: Rights,
    /// The accessed flag of an entry above is clear and cannot be set: no translation lies this way.
    pub(crate) blocked: bool,
}

/// How a node was reached.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source {
    /// From a root register.
    Root,
    /// By an entry of the table at `from`.
    Entry(EntryRead),
    /// By a cached mapping.
    Item(ItemId),
}

/// One way to a node.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way {
    pub(crate) source: Source,
    /// The node whose table had the entry.
    pub(crate) from: Option<NodeId>,
    /// The second-stage page that located a first-stage table.
    pub(crate) via: Option<NodeId>,
    next: Option<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Node {
    place: Place,
    fresh: bool,
    first_way: u32,
}

/// How far one stage got.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Depth {
    pub(crate) node: Option<NodeId>,
    /// The entry that was read there, if it was used but led no further: it names a table or a page that the
    /// second stage does not give, or a page that the access may not use.
    pub(crate) last: Option<EntryRead>,
}

impl From<Option<NodeId>> for Depth {
    fn from(node: Option<NodeId>) -> Self {
        Self { node, last: None }
    }
}

/// One end of the search: an outcome, and what leads to it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    pub(crate) outcome: Outcome,
    pub(crate) first: Depth,
    pub(crate) second: Depth,
    /// The TLB entry that was used; then there was no walk.
    pub(crate) item: Option<ItemId>,
}

/// What a search found.
#[derive(Clone, Debug, Default)]
pub(crate) struct Graph {
    nodes: Vec<Node>,
    ways: Vec<Way>,
    pub(crate) ends: Vec<End>,
}

impl Graph {
    pub(crate) fn place(&self, id: NodeId) -> &Place {
        &self.nodes[id.0 as usize].place
    }

    pub(crate) fn ways(&self, id: NodeId) -> impl Iterator<Item = &Way> {
        let mut next = Some(self.nodes[id.0 as usize].first_way);
        std::iter::from_fn(move || {
            let way = &self.ways[next? as usize];
            next = way.next;
            Some(way)
        })
    }

    pub(crate) fn node_ids(&self) -> impl Iterator<Item = NodeId> {
        (0..self.nodes.len() as u32).map(NodeId)
    }

    fn fresh(&self, id: NodeId) -> bool {
        self.nodes[id.0 as usize].fresh
    }

    /// The node at `place` among those from `since` on, made if need be, with one more way to it.
    fn reach(&mut self, since: usize, place: Place, fresh: bool, way: Way) -> NodeId {
        let way_id = self.ways.len() as u32;
        if let Some(at) = self.nodes[since..].iter().position(|node| node.place == place) {
            let node = &mut self.nodes[since + at];
            node.fresh |= fresh;
            self.ways.push(Way { next: Some(node.first_way), ..way });
            node.first_way = way_id;
            return NodeId((since + at) as u32);
        }
        self.ways.push(way);
        self.nodes.push(Node { place, fresh, first_way: way_id });
        NodeId(self.nodes.len() as u32 - 1)
    }
}

impl Way {
    const fn root(via: Option<NodeId>) -> Self {
        Self { source: Source::Root, from: None, via, next: None }
    }
    const fn entry(read: EntryRead, from: NodeId, via: Option<NodeId>) -> Self {
        Self { source: Source::Entry(read), from: Some(from), via, next: None }
    }
    const fn item(id: ItemId) -> Self {
        Self { source: Source::Item(id), from: None, via: None, next: None }
    }
}

/// A search in progress.
pub(crate) struct Search<'a> {
    memory: &'a Memory,
    caches: &'a Caches,
    regime: &'a Regime,
    pub(crate) graph: Graph,
    troubles: Vec<second::Trouble>,
}

impl<'a> Search<'a> {
    pub(crate) fn new(memory: &'a Memory, caches: &'a Caches, regime: &'a Regime) -> Self {
        let graph = Graph {
            nodes: Vec::with_capacity(32),
            ways: Vec::with_capacity(48),
            ends: Vec::with_capacity(4),
        };
        Self { memory, caches, regime, graph, troubles: Vec::new() }
    }

    /// Whether a fault that was met this way is reported. AMD's processors confirm a fault by a walk
    /// without cached entries and take that walk's result (APM 5.5.3 "Use of Cached Entries When Reporting
    /// a Page Fault Exception"); Intel's may report what they hold (SDM 4.10.4.3 on optional invalidation).
    fn faults(&self, fresh: bool) -> bool {
        fresh || self.regime.vendor == Vendor::Intel
    }
}
