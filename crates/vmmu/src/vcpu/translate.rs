//! Guest-virtual addresses: translation and instruction fetch by the guest's own tables, through the slots.
//!
//! The walk itself is in `guest`; this room lends it the vCPU's memory. Invariant: each table entry and each
//! page of bytes is read in a section of its own, so a walk holds nothing while a backing waits; it sees the
//! guest's tables as a processor could have, not at one moment.

use super::Vcpu;
use super::access::with_page;
use crate::addr::{Gpa, Gva, PAGE_BYTES};
use crate::arch::paging::Access;
use crate::error::{Error, ResolveError};
use crate::guest::{ByteMemory, FetchError, ReadError, TableMemory, Translation, WalkError, fetch, walk};
use crate::host::Host;
use crate::memory::access::GuestPage;
use crate::memory::slots::Hint;
use crate::names::AddressSpace;
use crate::vm::OwnLine;
use crate::vm::config::Optimizations;
use core::cell::Cell;
use core::ops::Deref;

/// A vCPU's memory, as walks read it.
struct Memory<'a, H: Host> {
    own: &'a OwnLine<H>,
    space: AddressSpace,
    hint: Cell<Hint>,
}

impl<H: Host> Memory<'_, H> {
    fn with<R>(&self, gpa: Gpa, access: impl FnMut(GuestPage<'_>, usize) -> R) -> Result<R, ReadError> {
        let mut hint = self.hint.get();
        let result = with_page(self.own, &mut hint, self.space, gpa, false, access);
        self.hint.set(hint);
        result.map_err(|error| match error {
            Error::NoSlot { .. } | Error::Backing { why: ResolveError::Unbacked, .. } => ReadError::Absent,
            error => ReadError::Host(error),
        })
    }
}

#[allow(clippy::redundant_closure_for_method_calls)] // a method path is not general over the page's lifetime
impl<H: Host> TableMemory for Memory<'_, H> {
    fn read_u32(&self, gpa: Gpa) -> Result<u32, ReadError> {
        self.with(gpa, |page: GuestPage<'_>, offset| page.load_u32(offset))
    }
    fn read_u64(&self, gpa: Gpa) -> Result<u64, ReadError> {
        self.with(gpa, |page: GuestPage<'_>, offset| page.load_u64(offset))
    }
}

impl<H: Host> ByteMemory for Memory<'_, H> {
    fn read_bytes(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), ReadError> {
        self.with(gpa, |page, offset| page.read(offset, into))
    }
}

/// The bytes at an instruction's address: up to 16, as many as could be fetched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InstructionBytes {
    bytes: [u8; 16],
    len: u8,
}

impl Deref for InstructionBytes {
    type Target = [u8];
    #[inline(always)]
    fn deref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len).min(16)]
    }
}

impl<H: Host> Vcpu<H> {
    fn memory(&self) -> Memory<'_, H> {
        Memory { own: &self.own, space: self.space, hint: Cell::new(self.hint) }
    }

    /// Translates `gva` by the guest's tables under the state of [`Vcpu::set_paging`], with the checks and
    /// faults of a processor in its order. Sets no accessed or dirty bits.
    ///
    /// # Errors
    /// [`WalkError::Guest`] is the page fault that the guest is owed.
    pub fn translate(&mut self, gva: Gva, access: Access) -> Result<Translation, WalkError> {
        self.close_forgotten();
        walk(&self.paging, &self.memory(), gva, access)
    }

    /// Fetches instruction bytes at `gva` and returns how many; fewer than asked for where a later page cannot be
    /// fetched from.
    ///
    /// # Errors
    /// The first page's: [`FetchError::Walk`] or [`FetchError::Unreadable`].
    pub fn fetch(&mut self, gva: Gva, into: &mut [u8]) -> Result<usize, FetchError> {
        self.close_forgotten();
        fetch(&self.paging, &self.memory(), gva, into)
    }

    /// Fetches the bytes of the instruction at `gva`, at least as many as it can have where they can be fetched.
    /// Made for exits that need a length: the walk is remembered, and used again while it holds.
    ///
    /// # Errors
    /// As for [`Vcpu::fetch`].
    #[inline]
    pub fn fetch_instruction(&mut self, gva: Gva) -> Result<InstructionBytes, FetchError> {
        self.close_forgotten();
        match self.recall(gva) {
            Some(bytes) => Ok(InstructionBytes { bytes, len: 16 }),
            None => self.fetch_anew(gva),
        }
    }

    #[cold]
    fn fetch_anew(&mut self, gva: Gva) -> Result<InstructionBytes, FetchError> {
        let mut bytes = [0; 16];
        if gva.raw() % PAGE_BYTES + 16 > PAGE_BYTES {
            // Across pages: nothing is remembered.
            let len = fetch(&self.paging, &self.memory(), gva, &mut bytes)? as u8;
            return Ok(InstructionBytes { bytes, len });
        }
        let translation = walk(&self.paging, &self.memory(), gva, Access::FETCH)?;
        let gpa = translation.gpa;
        self.memory().read_bytes(gpa, &mut bytes).map_err(|error| FetchError::at(gpa, error))?;
        if self.own.inner().config.optimizations.contains(Optimizations::REMEMBERED_WALKS) {
            self.remember(gva, &translation);
        }
        Ok(InstructionBytes { bytes, len: 16 })
    }

    /// Reads and checks the page-directory-pointer entries at the state's CR3, as a load of CR3 in PAE mode does
    /// (S22), and makes them the state's own.
    ///
    /// # Errors
    /// The entry for which the load fails; the state is then as it was.
    pub fn load_pdptes(&mut self) -> Result<(), crate::guest::PdpteError> {
        self.close_forgotten();
        self.paging.pdptrs = crate::guest::load_pdptes(&self.paging, &self.memory())?;
        Ok(())
    }
}
