//! The vCPU: the object whose owner enters the guest, hands in its faults, and reads the guest's memory.
//!
//! | room | holds |
//! |---|---|
//! | `enter` | preparation, entry, exit: roots, tags, the line *in guest* |
//! | `fault` | the way of a fault, from the exit to the outcome |
//! | `access` | guest memory by guest-physical address, for vCPUs and other threads |
//! | `remembered` | walks of instruction fetches, used again while they hold |
//! | `translate` | guest-virtual addresses by the guest's own tables |
//!
//! A vCPU is moved between threads freely and used by one at a time. Invariant: outside a call, its line is
//! *out* or *in guest*.

pub(crate) mod access;
pub(crate) mod enter;
pub(crate) mod fault;
pub(crate) mod remembered;
#[cfg(test)]
mod tests;
pub(crate) mod translate;

pub use access::Reader;
pub use enter::{Again, Entry};
pub use fault::{MemoryFault, MmioAccess, Outcome};
pub use translate::InstructionBytes;

use crate::arch::entry::Format;
use crate::arch::paging::PagingState;
use crate::coverage::{Point, hit, hits};
use crate::error::{Bug, Error};
use crate::host::Host;
use crate::memory::slots::Hint;
use crate::names::AddressSpace;
use crate::names::VcpuId;
use crate::sync::order::GuestMark;
use crate::table::cache::Cache;
use crate::tdp::root::Root;
use crate::tlb::tag::Note;
use crate::vm::OwnLine;
use alloc::sync::Arc;
use core::fmt;
use remembered::Remembered;

/// A virtual processor.
pub struct Vcpu<H: Host> {
    own: OwnLine<H>,
    id: VcpuId,
    space: AddressSpace,
    root: Option<Arc<Root>>,
    /// What it may trust of its last run.
    note: Option<Note>,
    /// An entry was made and neither ran nor was dropped.
    entered: bool,
    mark: GuestMark,
    cache: Cache,
    hint: Hint,
    paging: PagingState,
    remembered: Remembered,
    /// A bug that a pass met, until it is reported with nothing announced.
    bug: Option<Bug>,
}

impl<H: Host> Vcpu<H> {
    pub(crate) fn new(own: OwnLine<H>, id: VcpuId) -> Self {
        Self {
            own,
            id,
            space: AddressSpace::NORMAL,
            root: None,
            note: None,
            entered: false,
            mark: GuestMark::default(),
            cache: Cache::default(),
            hint: Hint::default(),
            paging: PagingState::default(),
            remembered: Remembered::default(),
            bug: None,
        }
    }

    /// The vCPU's number.
    pub fn id(&self) -> VcpuId {
        self.id
    }

    /// Chooses the address space that the guest sees from now on: system management mode's, or the ordinary
    /// one (T69).
    ///
    /// # Errors
    /// [`crate::SlotError::AddressSpace`] where the VM has none such.
    pub fn set_address_space(&mut self, space: AddressSpace) -> Result<(), Error> {
        self.close_forgotten();
        if space.number() >= self.own.inner().slots.spaces() {
            return Err(crate::error::SlotError::AddressSpace(space.number()).into());
        }
        if self.space != space {
            self.space = space;
            self.root = None;
        }
        Ok(())
    }

    /// Tells the guest's paging state: control registers, privilege, flags. Under two-dimensional paging only
    /// translations by software use it, so it may be set just before one.
    #[inline]
    pub fn set_paging(&mut self, state: PagingState) {
        self.paging = state;
    }

    /// The guest's paging state, to be brought up to date field by field.
    #[inline]
    pub fn paging_mut(&mut self) -> &mut PagingState {
        &mut self.paging
    }

    /// Fills the cache of prepared tables; where the VM's limit is met, waits for retired ones first
    /// (PROTOCOLS 4). Called with nothing held.
    #[cold]
    fn top_up(&mut self) -> Result<(), Error> {
        let inner = self.own.inner();
        inner.collect();
        let before = self.cache.len();
        let result = loop {
            match self.cache.top_up(&inner.tables(), &inner.tdp.format) {
                Ok(()) => break Ok(()),
                Err(_) if inner.reclaim.waiting() != 0 => inner.wait_for_grace(self.own.line()),
                Err(error) => {
                    hit(match error {
                        Error::MemoryLimit { .. } => Point::TopUpLimit,
                        _ => Point::TopUpOutOfMemory,
                    });
                    break Err(error);
                }
            }
        };
        let prepared = (self.cache.len() - before) as u64;
        hits(Point::TablePrepared, prepared);
        self.own.line().counters.table_pages_cached.add(prepared);
        result
    }

    /// Makes sure that the vCPU has a valid root (T64, T68).
    fn ensure_root(&mut self) -> Result<(), Error> {
        if self.root.as_ref().is_some_and(|root| root.is_valid()) {
            return Ok(());
        }
        self.root = None;
        if !self.cache.suffices() {
            self.top_up()?;
        }
        let inner = self.own.inner();
        if let Some(root) = inner.tdp.roots.find(self.space) {
            hit(Point::RootFound);
            self.root = Some(root);
            return Ok(());
        }
        // The cache suffices, so there is a page.
        let Some(page) = self.cache.take() else { return Err(Error::OutOfMemory) };
        inner.tables().describe(page.page().at(), crate::addr::Gfn::new(0), inner.tdp.format.root_level());
        let (root, unused) = inner.tdp.roots.insert(self.space, page);
        if let Some(page) = unused {
            hit(Point::RootRaced);
            self.cache.put_back(page);
        } else {
            hit(Point::RootMade);
            self.own.line().counters.table_pages_cached.sub(1);
            inner.host.trace(crate::trace::Event::RootMade { space: self.space });
        }
        self.root = Some(root);
        Ok(())
    }
}

impl<H: Host> Drop for Vcpu<H> {
    fn drop(&mut self) {
        self.close_forgotten();
        self.own.line().counters.table_pages_cached.sub(self.cache.len() as u64);
        self.cache.release(&self.own.inner().tables());
    }
}

impl<H: Host> fmt::Debug for Vcpu<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpu")
            .field("id", &self.id)
            .field("line", &self.own)
            .field("root", &self.root)
            .finish_non_exhaustive()
    }
}
