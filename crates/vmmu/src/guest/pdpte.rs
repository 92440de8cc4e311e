//! Loading the page-directory-pointer entries, as MOV to CR3 and the switch to PAE paging do (S22).
//!
//! Invariant: what is returned has no reserved bit in a present entry, so it may become the cached registers.

use super::{ReadError, TableMemory};
use crate::addr::Gpa;
use crate::arch::legacy::{GuestEntry, pdpte};
use crate::arch::paging::PagingState;
use crate::error::Error;
use core::fmt;

/// Why the load fails: the instruction is owed #GP(0), and CR3 keeps its value (S22, S56).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum PdpteError {
    /// A present entry has a reserved bit set.
    Reserved {
        /// Which entry, 0 to 3.
        index: usize,
        /// Its value.
        entry: u64,
    },
    /// The host could not supply the entry: nothing that the guest is owed a fault for.
    Host {
        /// Where.
        gpa: Gpa,
        /// Why.
        why: Error,
    },
    /// There is no memory where the entry should be.
    Unreadable {
        /// Where.
        gpa: Gpa,
    },
}

impl fmt::Display for PdpteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reserved { index, entry } => {
                write!(f, "page-directory-pointer entry {index} has reserved bits set: {entry:#x}")
            }
            Self::Host { gpa, why } => {
                write!(f, "the page-directory-pointer entry at {gpa} cannot be read: {why}")
            }
            Self::Unreadable { gpa } => write!(f, "no memory for a page-directory-pointer entry at {gpa}"),
        }
    }
}

impl core::error::Error for PdpteError {}

/// Reads and checks the four entries that `state.cr3` points to, whatever paging mode `state` is in: the load
/// comes before the mode.
///
/// # Errors
/// The first entry that cannot be loaded.
pub fn load_pdptes<M: TableMemory>(
    state: &PagingState,
    memory: &M,
) -> Result<[u64; pdpte::COUNT], PdpteError> {
    let table = pdpte::root(state.cr3);
    let mut entries = [0; pdpte::COUNT];
    for (index, slot) in entries.iter_mut().enumerate() {
        let gpa = Gpa::new(table.raw() + 8 * index as u64);
        let entry = memory.read_u64(gpa).map_err(|error| match error {
            ReadError::Absent => PdpteError::Unreadable { gpa },
            ReadError::Host(why) => PdpteError::Host { gpa, why },
        })?;
        if pdpte::decode(entry, state.max_phys_bits) == GuestEntry::Reserved {
            return Err(PdpteError::Reserved { index, entry });
        }
        *slot = entry;
    }
    Ok(entries)
}
