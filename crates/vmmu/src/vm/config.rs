//! What a VM is made with.
//!
//! Plain values with builder methods; checked by [`crate::Vm::new`].

use bitflags::bitflags;

/// The hardware format of the second stage.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum TableFormat {
    /// AMD nested page tables of 4 levels.
    Npt4,
    /// AMD nested page tables of 5 levels: for a host that itself runs with 5 (T7).
    Npt5,
}

bitflags! {
    /// Optimisations, each of which can be off: the plain path without any is right by itself.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
    pub struct Optimizations: u32 {
        /// Leaves of 2 MiB and 1 GiB.
        const LARGE_PAGES = 1 << 0;
        /// Entries that remember that no slot is there (T45).
        const MMIO_ENTRIES = 1 << 1;
        /// Faults ask the backing for what it has at once, inside their section, before they ask it to wait.
        const RESOLVE_AT_ONCE = 1 << 2;
        /// Instruction fetches remember the walks of the guest's tables that they made.
        const REMEMBERED_WALKS = 1 << 3;
    }
}

/// What a VM is made with. Start from [`Config::new`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Config {
    /// The format of the second stage.
    pub format: TableFormat,
    /// The processor's physical address bits, 32 to 52, never reduced for memory encryption (T4).
    pub phys_bits: u8,
    /// The most table memory that the VM may have, in bytes; at least one block of 256 KiB.
    pub memory_limit: u64,
    /// Address spaces: 1, or 2 with one for system management mode (M4).
    pub address_spaces: u8,
    /// Whether table memory must lie below 4 GiB.
    pub tables_below_4g: bool,
    /// Which optimisations are on; all, unless told otherwise.
    pub optimizations: Optimizations,
}

impl Config {
    /// A VM in `format` on a processor with `phys_bits` physical address bits (CPUID leaf `0x8000_0008`,
    /// EAX 7:0), without a memory limit.
    pub const fn new(format: TableFormat, phys_bits: u8) -> Self {
        Self {
            format,
            phys_bits,
            memory_limit: u64::MAX,
            address_spaces: 1,
            tables_below_4g: false,
            optimizations: Optimizations::all(),
        }
    }
    /// The same with a limit on table memory, in bytes.
    #[must_use]
    pub const fn memory_limit(mut self, bytes: u64) -> Self {
        self.memory_limit = bytes;
        self
    }
    /// The same with `n` address spaces.
    #[must_use]
    pub const fn address_spaces(mut self, n: u8) -> Self {
        self.address_spaces = n;
        self
    }
    /// The same with only these optimisations.
    #[must_use]
    pub const fn optimizations(mut self, optimizations: Optimizations) -> Self {
        self.optimizations = optimizations;
        self
    }

    pub(crate) const fn five_levels(&self) -> bool {
        matches!(self.format, TableFormat::Npt5)
    }
}
