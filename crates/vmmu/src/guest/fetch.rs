//! Bytes at a guest-virtual address, as the processor fetches instructions: page by page, each translated.
//!
//! Invariant: no byte is read from a page that the guest may not execute.

use super::walk::{WalkError, walk};
use super::{ByteMemory, ReadError};
use crate::addr::{Gpa, Gva, PAGE_BYTES};
use crate::arch::paging::{Access, PagingState};
use core::fmt;

/// Why not one byte was fetched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum FetchError {
    /// The address has no translation for fetches.
    Walk(WalkError),
    /// It has one, but there is no memory: the guest executes a device, or the host cannot reach the frame.
    Unreadable(Gpa),
}

impl FetchError {
    /// What a failed read of the bytes at `gpa` means.
    pub(crate) fn at(gpa: Gpa, error: ReadError) -> Self {
        match error {
            ReadError::Absent => Self::Unreadable(gpa),
            ReadError::Host(why) => Self::Walk(WalkError::Host { at: gpa, why }),
        }
    }
}

impl From<WalkError> for FetchError {
    fn from(error: WalkError) -> Self {
        Self::Walk(error)
    }
}

impl fmt::Display for FetchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Walk(error) => error.fmt(f),
            Self::Unreadable(gpa) => write!(f, "no memory to fetch from at guest-physical address {gpa}"),
        }
    }
}

impl core::error::Error for FetchError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Walk(error) => Some(error),
            Self::Unreadable(_) => None,
        }
    }
}

/// Fetches instruction bytes from `gva` on and returns how many. Fewer than asked for come where a later page
/// cannot be fetched from: that is no error until an instruction needs its bytes.
///
/// # Errors
/// The first page's.
pub fn fetch<M: ByteMemory>(
    state: &PagingState,
    memory: &M,
    gva: Gva,
    into: &mut [u8],
) -> Result<usize, FetchError> {
    let mode = state.role().mode;
    let mut done = 0;
    while done < into.len() {
        let at = mode.advance(gva, done as u64);
        let room = (PAGE_BYTES - at.raw() % PAGE_BYTES) as usize;
        let end = into.len().min(done + room);
        match fetch_in_page(state, memory, at, &mut into[done..end]) {
            Ok(()) => done = end,
            // That the host could not supply a page is no reason to hand out a part.
            Err(error) if done == 0 || matches!(error, FetchError::Walk(WalkError::Host { .. })) => {
                return Err(error);
            }
            Err(_) => break,
        }
    }
    Ok(done)
}

fn fetch_in_page<M: ByteMemory>(
    state: &PagingState,
    memory: &M,
    gva: Gva,
    into: &mut [u8],
) -> Result<(), FetchError> {
    let gpa = walk(state, memory, gva, Access::FETCH)?.gpa;
    memory.read_bytes(gpa, into).map_err(|error| FetchError::at(gpa, error))
}
