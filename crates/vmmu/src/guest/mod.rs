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
use crate::error::Error;

/// Why guest memory could not be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ReadError {
    /// There is no memory: for a walk, the entry is not present (S38, S47).
    Absent,
    /// There is, but the host could not supply it; nothing that the guest did.
    Host(Error),
}

/// Guest memory that holds tables.
pub trait TableMemory {
    /// The 4-byte entry at `gpa`, a multiple of 4, by one atomic load.
    fn read_u32(&self, gpa: Gpa) -> Result<u32, ReadError>;

    /// The 8-byte entry at `gpa`, a multiple of 8, by one atomic load.
    fn read_u64(&self, gpa: Gpa) -> Result<u64, ReadError>;
}

/// Guest memory that holds anything.
pub trait ByteMemory: TableMemory {
    /// Fills `into` from `gpa` on, all within one 4 KiB page.
    fn read_bytes(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), ReadError>;
}

#[cfg(test)]
mod fake;
#[cfg(test)]
mod oracle;
#[cfg(test)]
mod tests;
