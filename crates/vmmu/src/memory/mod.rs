//! The guest's memory as data: slots with generations, the invalidation sequence, atomic access to frames.
//!
//! Data, not operations: what a change means for translations is decided above. It may touch `tlb`, `host`
//! and `addr`. Invariants: a published slot set never changes but for its generation; readers hold a slot
//! section; writers hold the slots mutex.

pub(crate) mod access;
pub(crate) mod invalidation;
pub(crate) mod slot;
pub(crate) mod slots;

pub use slot::{Region, RegionFlags};
