//! The guest's own tables, read by software: from a guest-virtual address to a guest-physical one, with the
//! faults that the guest is entitled to (S35–S41, S47, S53, S54).
//!
//! | room | holds |
//! |---|---|
//! | `walk` | the walk of every paging mode, and the path it took |
//! | `fetch` | bytes at a guest-virtual address, across pages |
//! | `pdpte` | loading the page-directory-pointer entries of PAE paging |
//!
//! Functions of register values and memory: nothing here holds state, locks, or knows of slots. Memory is
//! reached through [`TableMemory`] and [`ByteMemory`] only. Walks read; they set no accessed or dirty bits. The
//! path that a walk returns has what setting them needs: the address and the value of each entry.

mod fetch;
mod pdpte;
mod walk;

pub use fetch::{FetchError, fetch};
pub use pdpte::{PdpteError, load_pdptes};
pub use walk::{Path, Step, Translation, WalkError, walk};

use crate::addr::Gpa;

/// Guest memory that holds tables.
pub trait TableMemory {
    /// The 4-byte entry at `gpa`, a multiple of 4, by one atomic load. `None` where there is no memory to read:
    /// the walk takes the entry as not present (S38, S47).
    fn read_u32(&self, gpa: Gpa) -> Option<u32>;

    /// The 8-byte entry at `gpa`, a multiple of 8, by one atomic load; likewise.
    fn read_u64(&self, gpa: Gpa) -> Option<u64>;
}

/// Guest memory that holds anything.
pub trait ByteMemory: TableMemory {
    /// Fills `into` from `gpa` on, all within one 4 KiB page. `None` where there is no memory to read.
    fn read_bytes(&self, gpa: Gpa, into: &mut [u8]) -> Option<()>;
}

#[cfg(test)]
mod fake;
#[cfg(test)]
mod oracle;
#[cfg(test)]
mod tests;
