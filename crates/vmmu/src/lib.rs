//! Guest memory for hypervisors: what stands behind a guest's physical addresses, and how its processors see
//! it.
#![no_std]
#![doc(html_no_source)]

extern crate alloc;
#[cfg(any(feature = "std", test))]
extern crate std;

// Frame numbers index tables in memory.
const _: () = assert!(usize::BITS == 64, "x86-64 hosts only");

pub mod addr;
pub mod arch;
mod audit;
pub mod error;
pub mod guest;
pub mod host;
mod memory;
mod stats;
mod sync;
mod table;
mod tdp;
#[cfg(test)]
mod testing;
mod tlb;
pub mod trace;
mod vcpu;
mod vm;

pub use addr::{Gfn, GfnRange, Gpa, Gva, Hpa, Level, PageSize, Pfn};
pub use arch::fault::Fault;
pub use arch::paging::{Access, GuestFault, PagingState};
pub use audit::{AuditError, AuditReport};
pub use error::{Bug, ConfigError, Error, SlotError};
pub use guest::{FetchError, Translation, WalkError};
pub use host::{Backing, Contiguous, Host, ResolveError, ResolveRequest, Resolved, Scattered, VcpuId};
pub use memory::{AddressSpace, Region, RegionFlags, SlotId};
pub use stats::Stats;
pub use tlb::tag::{EntryFlush, PhysCpu, TagSet};
pub use vcpu::{Again, Entry, InstructionBytes, MemoryFault, MmioAccess, Outcome, Reader, Vcpu};
pub use vm::config::{Config, Optimizations, TableFormat};
pub use vm::invalidate::Invalidation;
pub use vm::{Mapping, Vm};
