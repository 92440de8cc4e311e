//! What the benchmark payload may ask of its hypervisor (`guests/payload/guest.h`).
//!
//! Arguments and answers go through a mailbox in the guest's memory. The *test region* is a slot of its own,
//! and only that slot changes: deleting it takes every mapping away, and with it every table that only it
//! needed. Dirty logging and discarding are answered as not available.

use super::End;
use crate::machine::heap;
use crate::memory::{MachineHost, OnTouch, SmallPages, WholeBlocks};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ops::Range;
use vmmu::addr::PAGE_BYTES;
use vmmu::{Backing, Gfn, Gpa, Region, SlotId, Vcpu, Vm};

const MAILBOX: u64 = 0x8000;
/// Offsets of the answers and of the name in the mailbox.
const ANSWERS: u64 = 32;
const NAME: u64 = 96;
const VERSION: u64 = 1;
const FEATURE_BACKING: u64 = 1;
const FEATURE_STATS: u64 = 8;
/// Where the test region lies, guest-physical.
pub(crate) const REGION: Range<u64> = 0x0800_0000..0x4800_0000;

/// The service is not available, or its arguments make no sense: the payload goes on without.
struct Refused;

/// The state behind the services.
pub(crate) struct Services {
    vm: Vm<MachineHost>,
    /// Guest memory in bytes, from address 0.
    memory: u64,
    /// The slot of the test region and the whole blocks behind it, where the guest has all of it.
    region: Option<(SlotId, Vec<u64>)>,
    /// KiB that the VM took before it ran.
    set_up: u64,
}

impl Services {
    /// Services for a guest with `memory` bytes. `region` is the test region's slot and the first frames of
    /// the 2 MiB blocks behind it; `set_up` the bytes that the VM took before it ran.
    pub(crate) fn new(
        vm: Vm<MachineHost>,
        memory: u64,
        region: Option<(SlotId, Vec<u64>)>,
        set_up: u64,
    ) -> Self {
        Self { vm, memory, region, set_up: set_up / 1024 }
    }

    /// Serves request `number`; the answer is the status that the payload reads.
    pub(crate) fn serve(&mut self, number: u32, vcpu: &mut Vcpu<MachineHost>) -> Result<u32, End> {
        let result = match number {
            0 => Ok(()),
            1 => self.hello(vcpu)?,
            2 => self.back(vcpu)?,
            7 => self.statistics(vcpu)?,
            _ => Err(Refused),
        };
        Ok(u32::from(result.is_err()))
    }

    fn hello(&self, vcpu: &mut Vcpu<MachineHost>) -> Result<Result<(), Refused>, End> {
        let features = FEATURE_STATS | if self.region.is_some() { FEATURE_BACKING } else { 0 };
        answer(vcpu, &[VERSION, self.memory, features])?;
        vcpu.write(Gpa::new(MAILBOX + NAME), b"vmmu-npt\0\0\0\0\0\0\0\0").map_err(End::error)?;
        Ok(Ok(()))
    }

    /// Puts other memory behind the test region.
    fn back(&self, vcpu: &mut Vcpu<MachineHost>) -> Result<Result<(), Refused>, End> {
        let mut arguments = [0; 24];
        vcpu.read(Gpa::new(MAILBOX), &mut arguments).map_err(End::error)?;
        let argument = |n: usize| hypervisor::bytes::u64_at(&arguments, n * 8).unwrap_or(0);
        let (start, bytes, kind) = (argument(0), argument(1), argument(2));
        let Some((slot, blocks)) = &self.region else { return Ok(Err(Refused)) };
        if start != REGION.start || bytes > REGION.end - REGION.start {
            return Ok(Err(Refused));
        }
        let pages = (REGION.end - REGION.start) / PAGE_BYTES;
        let whole = WholeBlocks(blocks.clone());
        let backing: Arc<dyn Backing> = match kind {
            0 => Arc::new(OnTouch::new(
                pages,
                blocks.iter().rev().flat_map(|&first| (first..first + 512).rev()).collect(),
            )),
            1 => Arc::new(SmallPages(whole)),
            2 => Arc::new(whole),
            _ => return Ok(Err(Refused)),
        };
        self.vm.delete_region(*slot).map_err(End::error)?;
        let region = Region::new(Gfn::new(REGION.start / PAGE_BYTES), pages, backing);
        self.vm.set_region(*slot, region).map_err(End::error)?;
        Ok(Ok(()))
    }

    fn statistics(&self, vcpu: &mut Vcpu<MachineHost>) -> Result<Result<(), Refused>, End> {
        let tables = self.vm.stats().table_bytes / 1024;
        let free = self.vm.host().0.frames(|frames| frames.free_frames()) * (PAGE_BYTES / 1024)
            + heap::free() / 1024;
        answer(vcpu, &[tables, free, self.set_up])?;
        Ok(Ok(()))
    }
}

/// Writes answers to the mailbox.
fn answer(vcpu: &mut Vcpu<MachineHost>, answers: &[u64]) -> Result<(), End> {
    for (at, answer) in (MAILBOX + ANSWERS..).step_by(8).zip(answers) {
        vcpu.write(Gpa::new(at), &answer.to_le_bytes()).map_err(End::error)?;
    }
    Ok(())
}
