//! The two-dimensional engine: guest-physical frames to host frames in one table a root, shared by all vCPUs of
//! an address space.
//!
//! | room | holds |
//! |---|---|
//! | `root` | the list of roots; fast invalidation of all |
//! | `map` | the fault's side: walk, link, install, split, all by compare-exchange under Shared |
//! | `visit` | every entry of every root in order, for audits and for show |
//! | `zap` | removal: ranges under Exclusive, invalid roots under Shared |
//!
//! It may touch `table`, `tlb`, `memory` and `arch`. Invariants: a leaf never changes its frame without
//! passing through empty (T86); a table is unlinked before its entries are taken, and all of them are frozen
//! before it is retired, so whoever still walks it finds nothing to install into (T95).

pub(crate) mod map;
pub(crate) mod root;
pub(crate) mod visit;
pub(crate) mod zap;

use crate::arch::entry::Format;
use crate::host::Host;
use crate::table::arena::{Arena, Tables};
use crate::tlb::Tlb;
use root::Roots;

/// The engine of one VM.
#[derive(Debug)]
pub(crate) struct Tdp<F> {
    pub(crate) format: F,
    pub(crate) roots: Roots,
}

/// What the engine works with.
pub(crate) struct Env<'a, H> {
    pub(crate) host: &'a H,
    pub(crate) tlb: &'a Tlb,
    pub(crate) arena: &'a Arena<H>,
}

impl<H> Clone for Env<'_, H> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<H> Copy for Env<'_, H> {}

impl<'a, H: Host> Env<'a, H> {
    #[inline(always)]
    pub(crate) fn tables(&self) -> Tables<'a, H> {
        Tables { arena: self.arena, host: self.host }
    }
}

impl<F: Format> Tdp<F> {
    pub(crate) fn new(format: F) -> Self {
        Self { format, roots: Roots::new() }
    }
}
