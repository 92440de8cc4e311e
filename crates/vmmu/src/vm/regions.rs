//! Slots as operations: what a request does to the slot set, and then to the translations (M6, M21–M25).
//!
//! Invariants: a change is published and its readers awaited, under the slots mutex alone, before it acts on
//! entries (PROTOCOLS 5); a backing is let go only after the shootdown and after every section announced
//! before it (PROTOCOLS 4).

use super::{Inner, OwnLine, Vm};
use crate::error::Error;
use crate::host::Host;
use crate::memory::Region;
use crate::memory::slot::Slot;
use crate::memory::slots::{Change, OldSet, SlotsWriter};
use crate::mutants::Mutant::ZapBeforeWithdraw;
use crate::mutants::mutant;
use crate::names::SlotId;
use crate::tlb::reader::Request;
use crate::trace::Event;
use alloc::sync::Arc;
use arrayvec::ArrayVec;

/// The slot sets that one request replaced.
type OldSets = ArrayVec<OldSet, 2>;

impl<H: Host> Vm<H> {
    /// Adds slot `id`, or moves it, or changes its flags; the same again changes nothing (M6).
    ///
    /// A move drops every translation of the old place before anything appears in the new one. The length,
    /// the backing and whether the slot is read-only cannot change: delete it first.
    ///
    /// # Errors
    /// [`Error::Slot`] with what is invalid; the VM is then as it was.
    pub fn set_region(&self, id: SlotId, region: Region) -> Result<(), Error> {
        let inner = &*self.inner;
        inner.alive()?;
        let own = self.own_line();
        // Dropped after the slots mutex is released.
        let mut old = OldSets::new();
        let mut writer = inner.slots.write();
        match writer.plan(id, region)? {
            Change::Nothing => return Ok(()),
            Change::Create(slot) | Change::Flags(slot) => {
                old.push(inner.publish(&own, &mut writer, id, Some(slot)));
            }
            Change::Move { from, to } => {
                old.push(inner.withdraw(&own, &mut writer, &from));
                old.push(inner.publish(&own, &mut writer, id, Some(to)));
            }
        }
        inner.changed(id);
        Ok(())
    }

    /// Deletes slot `id`. When this returns, no translation leads to its memory, no processor can use one, and
    /// none is made: the frames are the host's. The backing itself is let go of when the last fault that was
    /// asking it has its answer, and drops it.
    ///
    /// # Errors
    /// [`Error::Slot`] where there is no such slot.
    pub fn delete_region(&self, id: SlotId) -> Result<(), Error> {
        let inner = &*self.inner;
        inner.alive()?;
        let own = self.own_line();
        // Dropped after the slots mutex is released.
        let mut old = OldSets::new();
        let mut writer = inner.slots.write();
        let slot = writer.existing(id)?;
        old.push(inner.withdraw(&own, &mut writer, &slot));
        old.push(inner.publish(&own, &mut writer, id, None));
        inner.changed(id);
        Ok(())
    }
}

impl<H: Host> Inner<H> {
    /// A change of slots is complete: vCPUs come out and look at what they derived from slots (M24).
    fn changed(&self, id: SlotId) {
        self.post(Request::Exit, |_| true);
        self.host.trace(Event::SlotChanged { id });
    }

    /// Publishes `slot` as `id`, or nothing, and waits for the readers of what was there. Where the bits kept
    /// by MMIO entries start over, every root is zapped before the mark is cleared (T51).
    fn publish(
        &self,
        own: &OwnLine<H>,
        writer: &mut SlotsWriter<'_>,
        id: SlotId,
        slot: Option<Arc<Slot>>,
    ) -> OldSet {
        writer.publish(&self.tlb, &self.host, id, slot, || self.zap_all_roots(own))
    }

    /// The first two phases of a delete or a move (M21): faults in the slot retry from now on, and its
    /// translations are gone (T105: by replacing all roots, whose cost does not grow with the slot).
    fn withdraw(&self, own: &OwnLine<H>, writer: &mut SlotsWriter<'_>, slot: &Slot) -> OldSet {
        let changing = Slot { changing: true, ..slot.clone() };
        if mutant(ZapBeforeWithdraw) {
            self.zap_all_roots(own);
        }
        let old = self.publish(own, writer, slot.id, Some(Arc::new(changing)));
        if !mutant(ZapBeforeWithdraw) {
            self.zap_all_roots(own);
        }
        old
    }
}

#[cfg(test)]
mod tests {
    use crate::addr::{Gfn, Gpa, Pfn};
    use crate::arch::entry::MMIO_GENERATION_MASK;
    use crate::arch::fault::Fault;
    use crate::host::Contiguous;
    use crate::memory::Region;
    use crate::names::{AddressSpace, SlotId};
    use crate::testing::QuietHost;
    use crate::vcpu::Outcome;
    use crate::vm::Vm;
    use crate::vm::config::{Config, TableFormat};
    use std::sync::Arc;

    /// T51, PROTOCOLS 5: an MMIO entry keeps 19 bits of its generation. When they start over, an entry of long ago
    /// would be taken for a new one, and a device be found where there is memory by now.
    #[test]
    fn a_wrap_forgets_every_mmio_entry() {
        for spaces in [1, 2] {
            let config = Config::new(TableFormat::Npt4, 51).address_spaces(spaces);
            let vm = Vm::new(QuietHost::new(), config).expect("legal");
            let mut vcpu = vm.vcpu().expect("alive");
            let mut fault = || {
                vcpu.prepare().expect("memory");
                vcpu.handle_fault(Fault::npf(Gpa::new(0x3000), 0x1_0000_0006)).expect("no error")
            };
            assert!(matches!(fault(), Outcome::Mmio(_)));
            assert!(matches!(fault(), Outcome::Mmio(_)));
            assert_eq!(vm.stats().pf_mmio_hit, 1);
            // As many changes later as the bits can tell apart, less one.
            let last = MMIO_GENERATION_MASK + 1 - u64::from(spaces);
            vm.inner.slots.write().set_generation(AddressSpace::NORMAL, last);
            // SAFETY: nobody reads or writes through these frames.
            let backing = Arc::new(unsafe { Contiguous::new(Pfn::new(1 << 20), 16) });
            vm.set_region(SlotId::new(0), Region::new(Gfn::new(0), 16, backing)).expect("valid");
            assert_eq!(fault(), Outcome::Resume, "of {spaces} address spaces");
            vm.audit().unwrap_or_else(|broken| panic!("{broken}"));
        }
    }
}
