//! What the hardware defines, pure and without state: entry formats, guest paging modes, permissions, faults.
//!
//! Nothing here touches memory or knows of slots and tables as objects. Invariant: nothing outside this room
//! tests a bit of an entry or of a fault's error code.

pub mod entry;
pub mod fault;
pub mod legacy;
pub mod npt;
pub mod paging;

pub use entry::{Entry, Format, Leaf, Mmio};
pub use fault::Fault;
pub use npt::Npt;
