//! Guest memory for hypervisors: what stands behind a guest's physical addresses, and how its processors see
//! it.
//!
//! The hypervisor owns the world switch and the devices. This crate owns the second stage of translation: the
//! tables that the processor walks, the faults that they cause, the tag and the flush of each entry, and the
//! proof that nobody uses a page any more when the host wants it back. It works for AMD's nested page tables of
//! 4 and 5 levels, for any number of vCPUs on any number of processors, in the kernel of a bare-metal
//! hypervisor or in a process.
//!
//! # The life of a VM
//!
//! ```
//! # use std::{alloc::{Layout, alloc_zeroed, dealloc}, ptr::NonNull};
//! # use vmmu::{Host, Pfn, VcpuId};
//! # struct Process;
//! # fn layout(order: u8) -> Layout {
//! #     Layout::from_size_align(4096 << order, 4096 << order).expect("a small power of two")
//! # }
//! # // SAFETY: blocks are allocations of the stated size and alignment, mapped where they are.
//! # unsafe impl Host for Process {
//! #     fn alloc_tables(&self, order: u8, _: bool) -> Option<Hpa> {
//! #         NonNull::new(unsafe { alloc_zeroed(layout(order)) }).map(|at| Hpa::new(at.as_ptr() as u64))
//! #     }
//! #     fn free_tables(&self, block: Hpa, order: u8) {
//! #         unsafe { dealloc(block.raw() as *mut u8, layout(order)) }
//! #     }
//! #     fn table_ptr(&self, at: Hpa) -> NonNull<u8> {
//! #         NonNull::new(at.raw() as *mut u8).expect("no table lies at 0")
//! #     }
//! #     fn frame_ptr(&self, pfn: Pfn) -> Option<NonNull<u8>> {
//! #         NonNull::new(pfn.hpa().raw() as *mut u8)
//! #     }
//! #     fn kick(&self, _: VcpuId) {}
//! # }
//! use std::sync::Arc;
//! use vmmu::{
//!     Config, Contiguous, Fault, Gfn, Gpa, Hpa, Outcome, PhysCpu, Region, SlotId, TableFormat, TagSet, Vm,
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let memory = Hpa::new(unsafe { alloc_zeroed(layout(10)) } as u64);
//! # let host = Process;
//! let vm = Vm::new(host, Config::new(TableFormat::Npt4, 48))?; // 48 physical address bits, by CPUID
//! // SAFETY: these 4 MiB of the host's memory are the guest's until the VM ends.
//! let backing = Arc::new(unsafe { Contiguous::new(memory.pfn(), 1024) });
//! vm.set_region(SlotId::new(0), Region::new(Gfn::new(0), 1024, backing))?; // at guest-physical 0
//! let mut vcpu = vm.vcpu()?;
//! let mut cpu = PhysCpu::new(TagSet::asids(16, true)); // one for each logical processor, shared by all VMs
//!
//! vcpu.prepare()?; // may lock, allocate and wait; again whenever `enter` says so
//! let entry = vcpu.enter(&mut cpu)?; // interrupts off from here until the guest runs
//! println!("nested CR3 {}, ASID {}, TLB_CONTROL for {:?}", entry.root(), entry.tag(), entry.flush());
//! entry.ran(); // first thing after the exit; dropped instead, the entry did not run
//! let exit = Fault::npf(Gpa::new(0x1000), 0x1_0000_0006); // EXITINFO2 and EXITINFO1 of exit 0x400
//! assert_eq!(vcpu.handle_fault(exit)?, Outcome::Resume); // the page is mapped: enter again
//!
//! let range = vmmu::GfnRange::with_len(Gfn::new(0), 512).expect("no wrap");
//! let invalidation = vm.invalidate(range)?; // nobody uses these frames from here on
//! drop(invalidation); // what stands behind them was changed: faults map them anew
//! # drop((vcpu, vm));
//! # unsafe { dealloc(memory.raw() as *mut u8, layout(10)) };
//! # Ok(())
//! # }
//! ```
//!
//! `examples/embed.rs` is the same as a program, with the [`Host`] that is hidden here.
//!
//! # What the hypervisor supplies
//!
//! - A [`Host`]: memory for tables, a mapping of frames for software, and [`Host::kick`], which forces a vCPU
//!   out of the guest.
//! - A [`Backing`] for each slot: which host frame stands behind a page. [`Contiguous`] and [`Scattered`] are
//!   there; swapping, sharing or allocating on touch is a backing of your own and [`Vm::invalidate`].
//! - The loop: [`Vcpu::prepare`] before the first entry and after each [`Again`]; [`Vcpu::enter`]; the world
//!   switch with what the [`Entry`] says; [`Entry::ran`]; and [`Vcpu::handle_fault`] for faults of the second
//!   stage, whose [`Outcome`] says whether the page is there or a device is meant.
//!
//! # Contracts
//!
//! Whoever implements [`Host`] and [`Backing`] promises what their `# Safety` sections ask: the processor walks
//! the memory that they name, and guests get it. The functions below are safe to call, but the isolation of the
//! guest, and so the soundness of your own world switch, rests on how they are used:
//!
//! - The guest runs with exactly the root, the tag and the flush of its [`Entry`], on the processor of its
//!   [`PhysCpu`]. [`Entry::ran`] comes first after the exit, before any lock, interrupt or schedule.
//! - A [`PhysCpu`] belongs to one logical processor for good, and every VM that runs there is given the same.
//! - A kicked vCPU reports its exit. Until then shootdowns wait for it; [`Stats::entry_age`] grows meanwhile.
//! - Between [`Vcpu::enter`] and [`Entry::ran`] (or the drop) the thread calls nothing of that [`Vm`]: a
//!   shootdown would wait for the thread's own vCPU.
//! - A thread that holds an [`Invalidation`] changes no slots, asks for no audit, and reads, writes or
//!   translates nothing in its range: it would wait for itself.
//!
//! Guests are hostile: nothing that a guest does with its memory, its tables or its faults may break the
//! library. Where an invariant of the library is broken all the same, it is a [`Bug`], reported to
//! [`Host::bug`].
//!
//! # `no_std`, features, memory
//!
//! The crate is `no_std` and needs `alloc` and a 64-bit host. One feature, `std`, on by default: loops that
//! wait yield to the operating system, and debug builds check the order of locks. Build with
//! `default-features = false` on bare metal.
//!
//! Table memory comes from [`Host::alloc_tables`], within [`Config::memory_limit`]; having none is a typed
//! error, on the fault path too. Slot sets and readers' lines come from the global allocator.
//!
//! # Map
//!
//! | module or type | what |
//! |---|---|
//! | [`Vm`], [`Config`], [`Optimizations`] | the machine's memory as a whole |
//! | [`Region`], [`SlotId`], [`RegionFlags`], [`AddressSpace`] | slots: which guest frames are memory |
//! | [`Invalidation`], [`GfnRange`] | the host takes memory away |
//! | [`Vcpu`], [`Entry`], [`PhysCpu`], [`TagSet`], [`EntryFlush`] | entering the guest |
//! | [`Fault`], [`Outcome`], [`MmioAccess`], [`MemoryFault`] | what came out of it |
//! | [`PagingState`], [`Access`], [`Translation`], [`InstructionBytes`] | the guest's own translations |
//! | [`Reader`] | guest memory for threads that are no vCPU |
//! | [`Stats`], [`AuditReport`], [`AuditError`], [`Mapping`] | looking at it |
//! | [`addr`] | addresses, frame numbers, levels, ranges: types that do not mix |
//! | [`arch`] | what the hardware defines: entry formats, paging modes, fault codes; pure |
//! | [`guest`] | the walk of a guest's tables, over any memory |
//! | [`host`] | what the hypervisor supplies |
//! | [`error`] | everything that can go wrong, typed |
//! | [`trace`] | what happened, by value |
//!
//! Comments cite rules by number: T of `docs/spec/tdp-mmu.md`, M of `docs/spec/memory-services.md`, S of
//! `docs/spec/shadow-mmu.md`, PROTOCOLS of `docs/protocols.md`, all in the repository. There is also
//! `docs/architecture.md`, which says what is designed and not built yet: EPT, dirty logging, shadow paging.
#![no_std]
#![doc(html_no_source)]

extern crate alloc;
#[cfg(any(feature = "std", test, loom))]
extern crate std;

// Frame numbers index tables in memory.
const _: () = assert!(usize::BITS == 64, "x86-64 hosts only");

pub mod addr;
pub mod arch;
mod audit;
#[cfg(feature = "instrument")]
pub mod coverage;
#[cfg(not(feature = "instrument"))]
#[allow(dead_code, unreachable_pub)] // the list of points, of which nothing is left but the names
mod coverage;
pub mod error;
pub mod guest;
pub mod host;
#[cfg(feature = "instrument")]
pub mod instrument;
mod memory;
#[cfg(all(test, loom))]
mod models;
#[cfg(feature = "mutants")]
pub mod mutants;
#[cfg(not(feature = "mutants"))]
#[allow(dead_code, unreachable_pub)] // the list of faults, of which nothing is left but the names
mod mutants;
mod names;
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
pub use error::{Bug, ConfigError, Error, ResolveError, SlotError};
pub use guest::{FetchError, Translation, WalkError};
pub use host::{Backing, Contiguous, Host, ResolveRequest, Resolved, Scattered};
pub use memory::{Region, RegionFlags};
pub use names::{AddressSpace, SlotId, VcpuId};
pub use stats::Stats;
pub use tlb::tag::{EntryFlush, PhysCpu, TagSet};
pub use vcpu::{Again, Entry, InstructionBytes, MemoryFault, MmioAccess, Outcome, Reader, Vcpu};
pub use vm::config::{Config, Optimizations, TableFormat};
pub use vm::invalidate::Invalidation;
pub use vm::{Mapping, Vm};

/// The README's example.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
