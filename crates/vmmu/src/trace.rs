//! Trace points: what happened, by value, handed to [`crate::Host::trace`] (T158).
//!
//! Pure data. A host that does not implement the method pays nothing: the calls compile away.

use crate::addr::{Gfn, GfnRange, Gpa, PageSize, Pfn};
use crate::arch::entry::NestedAccess;
use crate::names::{AddressSpace, SlotId};

/// One thing that happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Event {
    /// A fault is being handled.
    Fault {
        /// Where.
        gpa: Gpa,
        /// What it wanted.
        access: NestedAccess,
    },
    /// A leaf was installed or upgraded.
    LeafSet {
        /// The first guest frame.
        gfn: Gfn,
        /// The first host frame.
        pfn: Pfn,
        /// Its size.
        size: PageSize,
    },
    /// An MMIO entry was installed.
    MmioMark {
        /// The guest frame.
        gfn: Gfn,
    },
    /// An MMIO entry answered a fault.
    MmioHit {
        /// The guest frame.
        gfn: Gfn,
    },
    /// A fault lost a race and is to be tried again.
    Retry {
        /// The guest frame.
        gfn: Gfn,
    },
    /// A root was made.
    RootMade {
        /// Whose.
        space: AddressSpace,
    },
    /// Every root was invalidated.
    RootsInvalidated,
    /// An invalid root's entries are gone.
    RootZapped {
        /// Whose.
        space: AddressSpace,
    },
    /// The host took these frames away.
    Invalidated {
        /// The frames.
        range: GfnRange,
    },
    /// A slot was made, moved, changed or deleted.
    SlotChanged {
        /// Which.
        id: SlotId,
    },
}
