//! Guest memory by guest-physical address: reads and writes by software, for vCPUs and for other threads
//! (M118, PROTOCOLS 4).
//!
//! Each page is used in a section of its own: announce, snapshot the sequence, find the slot, resolve, recheck,
//! access. Invariants: at most one page a section; nothing is held while a backing waits.

use super::Vcpu;
use crate::addr::{GfnRange, Gpa, Level, PAGE_BYTES};
use crate::arch::entry::Format;
use crate::coverage::{Point, hit};
use crate::error::{Error, ResolveError};
use crate::host::{Host, ResolveRequest, Resolved};
use crate::memory::access::GuestPage;
use crate::memory::invalidation::Snapshot;
use crate::memory::slots::{Hint, SlotGeneration};
use crate::mutants::Mutant::AccessNoRecheck;
use crate::mutants::mutant;
use crate::names::AddressSpace;
use crate::sync::order;
use crate::vm::OwnLine;
use core::fmt;

/// Guest memory for a thread that is no vCPU.
pub struct Reader<H: Host> {
    own: OwnLine<H>,
    space: AddressSpace,
    hint: Hint,
}

impl<H: Host> Reader<H> {
    pub(crate) fn new(own: OwnLine<H>, space: AddressSpace) -> Self {
        Self { own, space, hint: Hint::default() }
    }

    /// Reads; see [`Vcpu::read`].
    pub fn read(&mut self, gpa: Gpa, into: &mut [u8]) -> Result<(), Error> {
        read(&self.own, &mut self.hint, self.space, gpa, into)
    }

    /// Writes; see [`Vcpu::write`].
    pub fn write(&mut self, gpa: Gpa, from: &[u8]) -> Result<(), Error> {
        write(&self.own, &mut self.hint, self.space, gpa, from)
    }
}

impl<H: Host> fmt::Debug for Reader<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("line", &self.own).finish_non_exhaustive()
    }
}

impl<H: Host> Vcpu<H> {
    /// Reads guest memory. Naturally aligned values of 2, 4 and 8 bytes are read at once.
    ///
    /// # Errors
    /// [`Error::NoSlot`] and the backing's errors; the pages before the one that failed were read.
    pub fn read(&mut self, gpa: Gpa, into: &mut [u8]) -> Result<(), Error> {
        self.close_forgotten();
        read(&self.own, &mut self.hint, self.space, gpa, into)
    }

    /// Writes guest memory. Naturally aligned values of 2, 4 and 8 bytes are written at once.
    ///
    /// # Errors
    /// [`Error::NoSlot`], [`Error::ReadOnly`] and the backing's errors; the pages before the one that failed
    /// were written.
    pub fn write(&mut self, gpa: Gpa, from: &[u8]) -> Result<(), Error> {
        self.close_forgotten();
        write(&self.own, &mut self.hint, self.space, gpa, from)
    }
}

/// The part of an access that lies in one page: its address, its offset in the page, and its bytes.
fn pages(gpa: Gpa, bytes: usize) -> Result<impl Iterator<Item = (Gpa, core::ops::Range<usize>)>, Error> {
    if gpa.checked_add((bytes as u64).saturating_sub(1)).is_none() {
        return Err(Error::Wrap { gpa, bytes: bytes as u64 });
    }
    let mut done = 0;
    Ok(core::iter::from_fn(move || {
        if done == bytes {
            return None;
        }
        let at = Gpa::new(gpa.raw() + done as u64);
        let room = (PAGE_BYTES - at.page_offset()) as usize;
        let range = done..bytes.min(done + room);
        done = range.end;
        Some((at, range))
    }))
}

fn read<H: Host>(
    own: &OwnLine<H>,
    hint: &mut Hint,
    space: AddressSpace,
    gpa: Gpa,
    into: &mut [u8],
) -> Result<(), Error> {
    for (at, range) in pages(gpa, into.len())? {
        with_page(own, hint, space, at, false, |page, offset| page.read(offset, &mut into[range.clone()]))?;
    }
    Ok(())
}

fn write<H: Host>(
    own: &OwnLine<H>,
    hint: &mut Hint,
    space: AddressSpace,
    gpa: Gpa,
    from: &[u8],
) -> Result<(), Error> {
    for (at, range) in pages(gpa, from.len())? {
        with_page(own, hint, space, at, true, |page, offset| page.write(offset, &from[range.clone()]))?;
    }
    Ok(())
}

/// Calls `access` with the page that holds `gpa` and the offset in it.
pub(super) fn with_page<H: Host, R>(
    own: &OwnLine<H>,
    hint: &mut Hint,
    space: AddressSpace,
    gpa: Gpa,
    write: bool,
    mut access: impl FnMut(GuestPage<'_>, usize) -> R,
) -> Result<R, Error> {
    let (inner, line) = (own.inner(), own.line());
    inner.alive()?;
    let gfn = gpa.gfn();
    if gfn > inner.tdp.format.max_gfn() {
        return Err(Error::NoSlot { gpa });
    }
    let mut answer: Option<(Result<Resolved, ResolveError>, Snapshot, SlotGeneration)> = None;
    loop {
        let (walking, section) = line.walk_with_slots(&inner.tlb);
        let set = inner.slots.read(space, &section);
        let generation = set.generation();
        let snapshot = inner.sequence.snapshot();
        let Some(slot) = set.find(gfn, hint) else {
            hit(Point::SoftwareNoSlot);
            return Err(Error::NoSlot { gpa });
        };
        if slot.changing {
            hit(Point::SoftwareChanging);
            drop((section, walking));
            inner.host.relax();
            continue;
        }
        if write && slot.is_read_only() {
            hit(Point::SoftwareReadOnly);
            return Err(Error::ReadOnly { gpa });
        }
        let (resolved, snapshot, generation) = match answer.take() {
            Some(answer) => answer,
            None => match slot.backing.resolve(slot.page(gfn), ResolveRequest::new(write, false)) {
                Err(ResolveError::WouldWait) => {
                    hit(Point::SoftwareAskedToWait);
                    let slot = slot.clone();
                    drop((section, walking));
                    let resolved = slot.backing.resolve(slot.page(gfn), ResolveRequest::new(write, true));
                    answer = Some((resolved, snapshot, generation));
                    continue;
                }
                resolved => (resolved, snapshot, generation),
            },
        };
        let resolved = match resolved {
            // These say nothing about the page: no recheck makes them better.
            Err(why @ (ResolveError::OutOfMemory | ResolveError::Interrupted | ResolveError::WouldWait)) => {
                hit(Point::SoftwareRefused);
                return Err(Error::Backing { gfn, why });
            }
            resolved => resolved,
        };
        let current = inner.sequence.is_current(GfnRange::block(gfn, Level::L1), snapshot)
            && inner.slots.read(space, &section).generation() == generation;
        if !current && !mutant(AccessNoRecheck) {
            hit(Point::SoftwareOutdated);
            drop((section, walking));
            order::waits_for_invalidations();
            inner.host.relax();
            continue;
        }
        // Only now: that there is no page, or none to write to, is an answer that may be out of date (M71).
        let resolved = resolved.map_err(|why| {
            hit(Point::SoftwareRefused);
            Error::Backing { gfn, why }
        })?;
        if write && !resolved.writable {
            hit(Point::SoftwareReadOnly);
            return Err(Error::ReadOnly { gpa });
        }
        let Some(at) = inner.host.frame_ptr(resolved.pfn) else {
            hit(Point::SoftwareUnreachable);
            return Err(Error::Unreachable { gfn, pfn: resolved.pfn });
        };
        hit(Point::SoftwareDone);
        // SAFETY: the frame was resolved for a slot that is published now, and neither an open invalidation nor one
        // that ended since the snapshot covers it: rechecked just above, in the announced section.
        let page = unsafe { GuestPage::new(at, &walking) };
        return Ok(access(page, gpa.page_offset() as usize));
    }
}
