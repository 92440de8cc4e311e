//! Guest-physical addresses without a slot: the machine's devices, reached one access at a time.
//!
//! Invariant: what the machine's map calls RAM is never touched here, so neither the hypervisor's own memory
//! nor a stranger's can be reached; reads of it, and of addresses where nothing can be, give all ones.

use crate::machine::device;
use crate::memory::MachineHost;
use hypervisor::memory_map::MemoryMap;
use vmmu::addr::PAGE_BYTES;
use vmmu::{Access, Error, Gpa, Gva, Vcpu, WalkError};
use vmmu_emulate::{Bus, Width};

/// The devices of the machine.
pub(crate) struct Devices {
    machine: MemoryMap,
    /// Where the host's own mapping of physical memory ends.
    end: u64,
}

impl Devices {
    /// Devices of a machine with this memory map, of which everything below `end` is mapped for the host.
    pub(crate) fn new(machine: MemoryMap, end: u64) -> Self {
        Self { machine, end }
    }

    /// Whether the `bytes` at `at` may be a device's.
    fn is_device(&self, at: Gpa, bytes: u8) -> bool {
        let range = at.raw()..at.raw().saturating_add(bytes.into());
        range.start >= PAGE_BYTES && range.end <= self.end && !self.machine.touches_ram(&range)
    }

    fn load(&self, at: Gpa, bytes: u8) -> u64 {
        if self.is_device(at, bytes) {
            // SAFETY: mapped, and no RAM of the machine. The guest owns the devices.
            unsafe { device::load(at.raw(), bytes) }
        } else {
            u64::MAX
        }
    }

    fn store(&self, at: Gpa, bytes: u8, value: u64) {
        if self.is_device(at, bytes) {
            // SAFETY: mapped, and no RAM of the machine. The guest owns the devices; their DMA is theirs and
            // its.
            unsafe { device::store(at.raw(), bytes, value) }
        }
    }
}

/// What an emulated instruction finds behind linear addresses: guest memory where there is some, devices
/// elsewhere.
pub(crate) struct DeviceBus<'a> {
    /// Whose translations count.
    pub(crate) vcpu: &'a mut Vcpu<MachineHost>,
    /// The devices.
    pub(crate) devices: &'a Devices,
}

/// Why an emulated access was not made.
pub(crate) enum BusError {
    /// The guest's own tables refuse it, or do not lead anywhere.
    Walk(WalkError),
    /// The library could not reach the guest's memory.
    Memory(Error),
}

impl From<WalkError> for BusError {
    fn from(error: WalkError) -> Self {
        Self::Walk(error)
    }
}

impl DeviceBus<'_> {
    /// The pieces of an access of `width` at `linear`, each within a page: where it begins, its first byte in
    /// the value and its length.
    fn pieces(&mut self, linear: u64, width: Width, access: Access) -> Result<[(Gpa, u8, u8); 2], BusError> {
        let bytes = width.bytes();
        let first = self.vcpu.translate(Gva::new(linear), access)?.gpa;
        let room = PAGE_BYTES - first.page_offset();
        if u64::from(bytes) <= room {
            return Ok([(first, 0, bytes), (first, bytes, 0)]);
        }
        #[allow(clippy::cast_possible_truncation)] // less than `bytes`
        let room = room as u8;
        let second = self.vcpu.translate(Gva::new(linear.wrapping_add(room.into())), access)?.gpa;
        Ok([(first, 0, room), (second, room, bytes - room)])
    }
}

impl DeviceBus<'_> {
    /// Whether a write of `width` at `linear` would be let through, without making it.
    pub(crate) fn probe_write(&mut self, linear: u64, width: Width) -> Result<(), BusError> {
        self.pieces(linear, width, Access::WRITE).map(|_| ())
    }
}

impl Bus for DeviceBus<'_> {
    type Error = BusError;

    fn read(&mut self, linear: u64, width: Width) -> Result<u64, BusError> {
        let mut value = [0; 8];
        for (at, start, len) in self.pieces(linear, width, Access::READ)? {
            let place = &mut value[usize::from(start)..usize::from(start + len)];
            match self.vcpu.read(at, place) {
                Ok(()) => {}
                Err(Error::NoSlot { .. } | Error::Unreachable { .. }) if len.is_power_of_two() => {
                    place.copy_from_slice(&self.devices.load(at, len).to_le_bytes()[..usize::from(len)]);
                }
                Err(Error::NoSlot { .. } | Error::Unreachable { .. }) => {
                    for (offset, byte) in (0..).zip(place) {
                        *byte = self.devices.load(Gpa::new(at.raw() + offset), 1).to_le_bytes()[0];
                    }
                }
                Err(error) => return Err(BusError::Memory(error)),
            }
        }
        Ok(u64::from_le_bytes(value))
    }

    fn write(&mut self, linear: u64, width: Width, value: u64) -> Result<(), BusError> {
        let value = value.to_le_bytes();
        for (at, start, len) in self.pieces(linear, width, Access::WRITE)? {
            let bytes = &value[usize::from(start)..usize::from(start + len)];
            match self.vcpu.write(at, bytes) {
                // Memory that the guest may only read keeps its content, as a ROM does.
                Ok(()) | Err(Error::ReadOnly { .. }) => {}
                Err(Error::NoSlot { .. } | Error::Unreachable { .. }) if len.is_power_of_two() => {
                    let mut word = [0; 8];
                    word[..bytes.len()].copy_from_slice(bytes);
                    self.devices.store(at, len, u64::from_le_bytes(word));
                }
                Err(Error::NoSlot { .. } | Error::Unreachable { .. }) => {
                    for (offset, byte) in (0..).zip(bytes) {
                        self.devices.store(Gpa::new(at.raw() + offset), 1, (*byte).into());
                    }
                }
                Err(error) => return Err(BusError::Memory(error)),
            }
        }
        Ok(())
    }
}
