//! The walk: from the root that CR3 names down to a page, checks in the processor's order.
//!
//! One source for both entry formats, one instance compiled for each (S35). Invariants: each entry is read once;
//! present and reserved bits are judged level by level on the way down, rights once, at the leaf (S41).

use super::{ReadError, TableMemory};
use crate::addr::{Gpa, Gva, Level, PAGE_BYTES};
use crate::arch::legacy::{GuestEntry, GuestFormat, Legacy32, Legacy64, pdpte};
use crate::arch::paging::{
    Access, CpuRole, GuestFault, PageFaultCode, PagingMode, PagingState, Request, Rights,
};
use crate::error::Error;
use arrayvec::ArrayVec;
use core::fmt;

/// Why a guest-virtual address has no translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum WalkError {
    /// The guest's tables do not allow the access: it is owed a page fault.
    Guest(GuestFault),
    /// The address is not canonical or, outside long mode, not below 4 GiB: an instruction that uses it is owed
    /// #GP, or #SS for the stack segment, and no walk is made.
    NonCanonical(Gva),
    /// The host could not supply the table at this address: nothing that the guest is owed a fault for. Try again,
    /// or end the guest.
    Host {
        /// Where the entry lies.
        at: Gpa,
        /// Why it could not be read.
        why: Error,
    },
}

impl fmt::Display for WalkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Guest(fault) => fault.fmt(f),
            Self::NonCanonical(gva) => write!(f, "linear address {gva} is not canonical"),
            Self::Host { at, why } => write!(f, "the table entry at {at} cannot be read: {why}"),
        }
    }
}

impl core::error::Error for WalkError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Guest(fault) => Some(fault),
            Self::NonCanonical(_) => None,
            Self::Host { why, .. } => Some(why),
        }
    }
}

/// An entry that a walk read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// Where it lies.
    pub at: Gpa,
    /// Its level.
    pub level: Level,
    /// What was read; 4-byte entries are zero-extended.
    pub entry: u64,
    /// What all levels above grant together.
    pub rights_above: Rights,
}

/// The entries that a walk read, the topmost first. Empty with paging off. The page-directory-pointer entry of
/// PAE paging is no step: it has neither rights nor an accessed bit (S42).
pub type Path = ArrayVec<Step, 5>;

/// Where a guest-virtual address leads.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Translation {
    /// The guest-physical address, offset included.
    pub gpa: Gpa,
    /// Bytes in the guest's page: 4 KiB, 2 MiB, 4 MiB or 1 GiB; 4 KiB with paging off.
    pub page_bytes: u64,
    /// What the guest's tables grant for the page: the intersection of all levels.
    pub rights: Rights,
    /// How it was found.
    pub path: Path,
}

/// Translates `gva` for `access` under `state`, reading the guest's tables from `memory`.
///
/// # Errors
/// [`WalkError::Guest`] with the exact error code where a processor would raise a page fault, and
/// [`WalkError::NonCanonical`] where the address itself is impossible.
pub fn walk<M: TableMemory>(
    state: &PagingState,
    memory: &M,
    gva: Gva,
    access: Access,
) -> Result<Translation, WalkError> {
    let role = state.role();
    if !role.mode.is_canonical(gva) {
        return Err(WalkError::NonCanonical(gva));
    }
    let walker = Walker { state, role, request: state.request(access), memory, gva };
    match role.mode {
        PagingMode::Off => Ok(Translation {
            gpa: Gpa::new(gva.raw()),
            page_bytes: PAGE_BYTES,
            rights: Rights::all(),
            path: Path::new(),
        }),
        PagingMode::Bits32 => walker.descend(&Legacy32::new(&role), Legacy32::root(state.cr3), Level::L2),
        PagingMode::Pae => {
            let directory = walker.directory()?;
            walker.descend(&Legacy64::new(&role, state), directory, Level::L2)
        }
        PagingMode::Levels4 => {
            walker.descend(&Legacy64::new(&role, state), Legacy64::root(state.cr3), Level::L4)
        }
        PagingMode::Levels5 => {
            walker.descend(&Legacy64::new(&role, state), Legacy64::root(state.cr3), Level::L5)
        }
    }
}

struct Walker<'a, M> {
    state: &'a PagingState,
    role: CpuRole,
    request: Request,
    memory: &'a M,
    gva: Gva,
}

impl<M: TableMemory> Walker<'_, M> {
    /// The page directory that the page-directory-pointer entry names (S37).
    fn directory(&self) -> Result<Gpa, WalkError> {
        let index = pdpte::index(self.gva.raw());
        let entry = if self.state.pdptrs_in_memory {
            let at = Gpa::new(pdpte::root(self.state.cr3).raw() + 8 * index as u64);
            self.memory.read_u64(at).map_err(|error| self.unreadable(at, error))?
        } else {
            self.state.pdptrs[index]
        };
        match pdpte::decode(entry, self.state.max_phys_bits) {
            GuestEntry::NotPresent => Err(self.not_present()),
            GuestEntry::Table { at, .. } => Ok(at),
            GuestEntry::Reserved | GuestEntry::Page { .. } => Err(self.reserved()),
        }
    }

    /// Walks from the table at `table`, whose entries are at level `top` (S38–S40).
    #[inline]
    fn descend<F: GuestFormat>(&self, format: &F, table: Gpa, top: Level) -> Result<Translation, WalkError> {
        let (mut table, mut level) = (table, top);
        let mut rights = Rights::all();
        let mut path = Path::new();
        loop {
            let at = F::entry_address(table, self.gva.raw(), level);
            let entry = self.read::<F>(at).map_err(|error| self.unreadable(at, error))?;
            path.push(Step { at, level, entry, rights_above: rights });
            match (format.decode(entry, level), level.below()) {
                (GuestEntry::NotPresent, _) => return Err(self.not_present()),
                (GuestEntry::Table { at, rights: granted }, Some(below)) => {
                    rights &= granted;
                    (table, level) = (at, below);
                }
                (GuestEntry::Page { at, rights: granted, key }, _) => {
                    rights &= granted;
                    self.role
                        .check(self.request, rights, key, self.state.pkru)
                        .map_err(|code| self.fault(code))?;
                    let page_bytes = 1 << F::span_shift(level);
                    let gpa = Gpa::new(at.raw() | self.gva.raw() & (page_bytes - 1));
                    return Ok(Translation { gpa, page_bytes, rights, path });
                }
                // No format has a table below level 1.
                (GuestEntry::Reserved | GuestEntry::Table { .. }, _) => return Err(self.reserved()),
            }
        }
    }

    #[inline]
    fn read<F: GuestFormat>(&self, at: Gpa) -> Result<u64, ReadError> {
        if F::ENTRY_SHIFT == 2 { self.memory.read_u32(at).map(u64::from) } else { self.memory.read_u64(at) }
    }

    /// What an entry that could not be read means: not present where there is no memory (S38), the host's failure
    /// elsewhere.
    #[cold]
    fn unreadable(&self, at: Gpa, error: ReadError) -> WalkError {
        match error {
            ReadError::Absent => self.not_present(),
            ReadError::Host(why) => WalkError::Host { at, why },
        }
    }

    #[cold]
    fn not_present(&self) -> WalkError {
        self.fault(self.role.fault_code(self.request))
    }

    #[cold]
    fn reserved(&self) -> WalkError {
        let why = PageFaultCode::PRESENT.union(PageFaultCode::RESERVED);
        self.fault(self.role.fault_code(self.request).union(why))
    }

    fn fault(&self, error_code: PageFaultCode) -> WalkError {
        WalkError::Guest(GuestFault { error_code, gva: self.gva })
    }
}
