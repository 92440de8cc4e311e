//! Names of things that are not addresses: vCPUs, address spaces, slots.
//!
//! Plain values, known to every room. Invariant: a name says nothing of whether the thing exists.

use core::fmt;

/// A virtual processor, numbered from 0 in the order in which a VM made them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VcpuId(u32);

impl VcpuId {
    /// The vCPU numbered `n`.
    pub const fn new(n: u32) -> Self {
        Self(n)
    }
    /// The number.
    pub const fn number(self) -> u32 {
        self.0
    }
}

/// An address space of a VM: 0 is the ordinary one, 1 that of system management mode (M4).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct AddressSpace(pub(crate) u8);

impl AddressSpace {
    /// Ordinary memory.
    pub const NORMAL: Self = Self(0);
    /// What system management mode sees.
    pub const SMM: Self = Self(1);
    /// The number.
    pub const fn number(self) -> u8 {
        self.0
    }
}

/// The name of a slot: an address space and a number in it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId {
    pub(crate) space: AddressSpace,
    pub(crate) id: u16,
}

impl SlotId {
    /// Slot `id` of the ordinary address space. 0 to 32,763 are for users.
    pub const fn new(id: u16) -> Self {
        Self { space: AddressSpace::NORMAL, id }
    }
    /// Slot `id` of `space`.
    pub const fn in_space(space: AddressSpace, id: u16) -> Self {
        Self { space, id }
    }
    /// The address space.
    pub const fn space(self) -> AddressSpace {
        self.space
    }
    /// The number.
    pub const fn id(self) -> u16 {
        self.id
    }
}

impl fmt::Debug for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {}:{}", self.space.0, self.id)
    }
}
impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
