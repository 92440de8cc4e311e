//! What should be: slots, what stands behind their pages, and so which frames a guest may reach at each moment.
//!
//! The model is told of each change at the moments that the library's contracts name: a new slot counts from
//! before it is asked for, an old one until its deletion has returned, a page's old frame until its invalidation
//! has returned. Invariant: whatever the library maps between two changes is in [`World::allowed`].

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use vmmu::{Backing, PageSize, Pfn, ResolveError, ResolveRequest, Resolved};

/// One page of a backing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Page {
    pub(crate) pfn: Pfn,
    pub(crate) size: PageSize,
    pub(crate) writable: bool,
    /// Answers only who may wait.
    pub(crate) slow: bool,
}

/// A backing whose pages tasks change under invalidations.
#[derive(Debug)]
pub(crate) struct SimBacking {
    pub(crate) id: u64,
    pub(crate) pages: Mutex<Vec<Page>>,
}

// SAFETY: tasks change a page only while an invalidation of it is held, and call blocks large only whole.
unsafe impl Backing for SimBacking {
    fn resolve(&self, page: u64, request: ResolveRequest) -> Result<Resolved, ResolveError> {
        let found = {
            let pages = self.pages.lock().expect("one thread");
            *pages.get(page as usize).ok_or(ResolveError::Unbacked)?
        };
        if found.slow && !request.may_wait {
            return Err(ResolveError::WouldWait);
        }
        Ok(Resolved::new(found.pfn, found.size, found.writable))
    }
}

/// A slot as the model has it.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(crate) id: u16,
    pub(crate) gfn: u64,
    pub(crate) pages: u64,
    pub(crate) read_only: bool,
    pub(crate) backing: Arc<SimBacking>,
    /// Neither being made nor being deleted.
    pub(crate) settled: bool,
}

/// The model of one VM.
#[derive(Debug, Default)]
pub(crate) struct World {
    /// Slots; a place that a move leaves stands here twice for a while.
    pub(crate) slots: Vec<Slot>,
    /// Changes of slots so far: for whoever wants to know that nothing changed meanwhile.
    pub(crate) changes: u64,
    next_frame: u64,
    free: Vec<(u64, u64)>,
}

/// The model, shared by tasks.
pub(crate) type SharedWorld = Rc<RefCell<World>>;

impl World {
    pub(crate) fn new(first_frame: u64) -> Self {
        Self { next_frame: first_frame, ..Self::default() }
    }

    /// The frames that the guest may reach for `gfn` now, and whether it may write to them.
    pub(crate) fn allowed(&self, gfn: u64) -> impl Iterator<Item = (Pfn, bool)> {
        self.slots.iter().filter(move |s| s.gfn <= gfn && gfn < s.gfn + s.pages).map(move |s| {
            let page = s.backing.pages.lock().expect("one thread")[(gfn - s.gfn) as usize];
            (page.pfn, page.writable && !s.read_only)
        })
    }

    /// The slots that hold `gfn`, settled or not.
    pub(crate) fn at(&self, gfn: u64) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter(move |s| s.gfn <= gfn && gfn < s.gfn + s.pages)
    }

    /// `count` consecutive frames, aligned to `count`: given back ones first, so that frames are reused soon.
    pub(crate) fn frames(&mut self, count: u64) -> u64 {
        if let Some(at) = self.free.iter().position(|(_, n)| *n == count) {
            return self.free.remove(at).0;
        }
        let first = self.next_frame.next_multiple_of(count);
        self.next_frame = first + count;
        first
    }

    /// Takes frames back; they must be out of everybody's reach.
    pub(crate) fn give_back(&mut self, first: u64, count: u64) {
        self.free.push((first, count));
    }
}
