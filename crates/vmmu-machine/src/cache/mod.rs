//! What a processor remembers of translations: its TLB and its paging-structure caches. Nothing leaves but
//! by an operation that the manuals say removes it.
//!
//! | room | holds |
//! |---|---|
//! | here | what is held ([`Page`], [`Table`]) and whose ([`Tag`]) |
//! | `store` | where it is held: by tag, size and number, with an index by frame |
//! | `flush` | removal, by tag and by address |
//!
//! The kinds of mappings are those of SDM "Caching Translation Information" (in "VMX Support for Address
//! Translation"):
//!
//! | kind | from → to | tagged by | here |
//! |---|---|---|---|
//! | linear | linear → physical, no second stage | VPID or ASID, PCID | [`Tag::Linear`] without a root |
//! | guest-physical | guest-physical → host-physical | EPT root; ASID | [`Tag::Physical`] |
//! | combined | linear → host-physical | VPID, PCID, EPT root; ASID, PCID | [`Tag::Linear`] |
//!
//! AMD tags by ASID alone: a nested root that changes under one ASID leaves what was held (APM 15.16), so
//! there a combined mapping has no root in its tag either. Each kind has *translations* (to pages) and
//! *paging-structure entries* (to tables, for the upper part of the address).

mod flush;
mod store;

pub(crate) use store::{Caches, ItemId};

use crate::access::Rights;
use crate::addr::{Gpa, Hpa, PageSize};
use crate::provenance::Provenance;
use std::sync::Arc;

/// Whose guest-physical mappings.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PhysicalTag {
    /// AMD: those of an ASID.
    Asid(u16),
    /// Intel: those of an EPT root, bits 51:12 of the EPT pointer (the SDM's EP4TA). Pointers that differ in
    /// their other bits share it.
    EptRoot(Hpa),
}

/// Whose a cached mapping is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Tag {
    /// Linear and combined mappings of one process context.
    Linear {
        /// ASID or VPID; 0 is the host, and Intel guests without VPID.
        space: u16,
        /// The EPT root, for combined mappings on Intel.
        root: Option<Hpa>,
        /// The process-context identifier.
        pcid: u16,
    },
    /// Global translations: usable under every PCID of the space (SDM 4.10.2.4).
    Global {
        /// ASID or VPID.
        space: u16,
        /// The EPT root, for combined mappings on Intel.
        root: Option<Hpa>,
    },
    /// Guest-physical mappings.
    Physical(PhysicalTag),
}

impl Tag {
    /// ASID or VPID, of linear and combined mappings.
    pub const fn space(self) -> Option<u16> {
        match self {
            Self::Linear { space, .. } | Self::Global { space, .. } => Some(space),
            Self::Physical(_) => None,
        }
    }

    /// Whether it is that of one process's linear and combined mappings, under whatever EPT root.
    pub fn is_of(self, wanted_space: u16, wanted_pcid: u16) -> bool {
        matches!(self, Self::Linear { space, pcid, .. } if (space, pcid) == (wanted_space, wanted_pcid))
    }

    /// The EPT root that the mapping depends on.
    pub const fn ept_root(self) -> Option<Hpa> {
        match self {
            Self::Linear { root, .. } | Self::Global { root, .. } => root,
            Self::Physical(PhysicalTag::EptRoot(root)) => Some(root),
            Self::Physical(PhysicalTag::Asid(_)) => None,
        }
    }
}

/// A cached translation: an entry of the TLB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Page {
    /// The first address that it translates: linear, or guest-physical in a guest-physical mapping.
    pub at: u64,
    /// How much it translates. Less than `origin` where a large page is held in pieces, or where the other
    /// stage has smaller pages.
    pub size: PageSize,
    /// The size of the page in the tables of `at`. INVLPG removes all pieces of it (SDM 4.10.2.3, 4.10.4.1).
    pub origin: PageSize,
    /// Where the first byte is in host memory.
    pub frame: Hpa,
    /// The guest-physical address of the first byte. Hardware does not keep it; it is here for stories and
    /// for oracles.
    pub gpa: Option<Gpa>,
    /// What the first stage grants; everything in a guest-physical mapping.
    pub rights: Rights,
    /// What the second stage grants; everything in a linear mapping.
    pub nested: Rights,
    /// The protection key.
    pub key: u8,
    /// [`crate::format::Leaf::caching`] of the first stage.
    pub caching: u8,
    /// Likewise, of the second stage.
    pub nested_caching: u8,
    /// The dirty flag was set in the first stage's leaf. If not, a write walks again.
    pub dirty: bool,
    /// Likewise, of the second stage.
    pub nested_dirty: bool,
}

/// A cached paging-structure entry: it leads straight to the table for the upper part of an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Table {
    /// The first address that it covers.
    pub at: u64,
    /// log2 of the bytes that it covers.
    pub shift: u32,
    /// The level of the table that it leads to.
    pub level: u8,
    /// That table in host memory.
    pub table: Hpa,
    /// Its guest-physical address, in a combined mapping.
    pub gpa: Option<Gpa>,
    /// What the entries above grant.
    pub rights: Rights,
    /// What the second stage grants for the page of the table: whether its accessed flags can be set.
    pub nested: Rights,
}

/// What is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mapping {
    /// A translation.
    Page(Page),
    /// A paging-structure entry.
    Table(Table),
}

impl Mapping {
    /// The first address and log2 of the bytes covered.
    pub const fn covers(&self) -> (u64, u32) {
        match self {
            Self::Page(page) => (page.at, page.size.shift()),
            Self::Table(table) => (table.at, table.shift),
        }
    }
}

/// A held mapping: what, whose, and since when and why.
#[derive(Clone, Debug)]
pub struct Held {
    /// Whose.
    pub tag: Tag,
    /// What.
    pub mapping: Mapping,
    /// Where it comes from.
    pub provenance: Arc<Provenance>,
}
