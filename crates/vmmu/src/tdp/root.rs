//! Roots: one valid root for each address space in use, and those that were invalidated and wait to be zapped
//! (T63–T69, T102–T104).
//!
//! Invariants: valid roots have distinct roles; an invalid root stays on the list until all its entries are
//! gone, so invalidations still find them (T103); whoever uses a root's page looks at its validity after
//! announcing a section.

use crate::addr::Hpa;
use crate::names::AddressSpace;
use crate::sync::{AtomicBool, Mutex, MutexGuard, Ordering, Rank};
use crate::table::cache::PreparedPage;
use crate::tlb::lock::Exclusive;
use crate::tlb::tag::Identity;
use Ordering::{Acquire, Relaxed, Release};
use alloc::sync::Arc;
use alloc::vec::Vec;

/// A root table.
#[derive(Debug)]
pub(crate) struct Root {
    /// What tags and notes know it by; a later root in the same page has another one.
    pub(crate) identity: Identity,
    pub(crate) space: AddressSpace,
    pub(crate) page: Hpa,
    valid: AtomicBool,
    /// Somebody is zapping it.
    claimed: AtomicBool,
}

impl Root {
    /// Whether it may be used. Ask after the announcement.
    #[inline(always)]
    pub(crate) fn is_valid(&self) -> bool {
        self.valid.load(Acquire)
    }
}

/// The list of roots.
#[derive(Debug)]
pub(crate) struct Roots {
    list: Mutex<Vec<Arc<Root>>>,
}

impl Roots {
    pub(crate) fn new() -> Self {
        Self { list: Mutex::new(Rank::Leaf, Vec::new()) }
    }

    /// The valid root of `space`.
    pub(crate) fn find(&self, space: AddressSpace) -> Option<Arc<Root>> {
        self.list.lock().iter().find(|root| root.space == space && root.is_valid()).cloned()
    }

    /// Makes `page` the root of `space`, or, where another thread was first, returns that one and the page.
    pub(crate) fn insert(
        &self,
        space: AddressSpace,
        page: PreparedPage,
    ) -> (Arc<Root>, Option<PreparedPage>) {
        let new = Arc::new(Root {
            identity: Identity::new(),
            space,
            page: page.page().at(),
            valid: AtomicBool::new(true),
            claimed: AtomicBool::new(false),
        });
        let mut list = self.list.lock();
        if let Some(root) = list.iter().find(|root| root.space == space && root.is_valid()) {
            return (root.clone(), Some(page));
        }
        list.push(new.clone());
        drop(list);
        // Whoever removes the root from the list gets the page back.
        page.into_inner().hand_over();
        (new, None)
    }

    /// All roots, valid or not, held in place.
    pub(crate) fn all(&self) -> MutexGuard<'_, Vec<Arc<Root>>> {
        self.list.lock()
    }

    /// Marks every root invalid (T102). Faults that hold Shared are excluded; vCPUs in the guest are for the
    /// shootdown that must follow.
    pub(crate) fn invalidate_all(&self, _exclusive: &Exclusive<'_>) {
        for root in self.list.lock().iter() {
            root.valid.store(false, Release);
        }
    }

    /// An invalid root that nobody zaps yet.
    pub(crate) fn claim(&self) -> Option<Arc<Root>> {
        self.list.lock().iter().find(|root| !root.is_valid() && !root.claimed.swap(true, Relaxed)).cloned()
    }

    /// Whether an invalid root is left.
    pub(crate) fn any_invalid(&self) -> bool {
        self.list.lock().iter().any(|root| !root.is_valid())
    }

    /// Takes a claimed root off the list, now that all its entries are gone. Its page is the caller's.
    pub(crate) fn remove(&self, root: &Arc<Root>) {
        self.list.lock().retain(|other| !Arc::ptr_eq(other, root));
    }

    /// The list itself, at the end of the VM.
    pub(crate) fn drain(&mut self) -> Vec<Arc<Root>> {
        core::mem::take(self.list.get_mut())
    }
}
