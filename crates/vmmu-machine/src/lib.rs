//! A software model of x86 paging hardware: every walker, and translation caches that forget nothing by
//! themselves.
//!
//! Real processors, and emulators even more, forgive missing flushes: an entry was evicted in time, a world
//! switch flushed more than it had to. This model forgives nothing. Its TLB and its paging-structure caches
//! hold everything that the manuals let a processor hold, and every flush instruction removes just what its
//! manual promises. An access has not one outcome but a *set*: what a fresh walk gives, and what anything
//! still held gives. An oracle looks at the set; a simulation lets a seed choose from it, and the choice
//! has its effects (accessed and dirty flags, fills, the invalidations of a fault).
//!
//! It knows nothing of any hypervisor, and it is written from the public manuals alone: the *AMD64
//! Architecture Programmer's Manual*, volume 2 (APM), and the *Intel 64 and IA-32 Architectures Software
//! Developer's Manual*, volume 3 (SDM). Sections are cited by number where numbers are stable, and by title
//! where editions differ (the chapter "VMX Support for Address Translation" has been 28 and 29; "Paging" 4
//! and 5).
//!
//! # A stale translation
//! ```
//! use vmmu_machine::{Access, AccessKind, Features, Gva, Hpa, Machine, Quirks, Registers};
//!
//! let mut machine = Machine::new(1, Features::amd(48), Quirks::NONE);
//! // Four levels of tables that map linear page 0 to frame 0x9000: present, writable.
//! for (table, entry) in [(0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x4003), (0x4000, 0x9003)] {
//!     machine.memory.write64(Hpa::new(table), entry);
//! }
//! machine.processors[0].load_host(Registers::long_mode(0x1000))?;
//! let read = Access::supervisor(AccessKind::Read);
//! machine.touch(0, Gva::new(0x123), read, 1);
//!
//! // The page is unmapped, without INVLPG: a read may fault, or reach the frame all the same.
//! machine.memory.write64(Hpa::new(0x4000), 0);
//! let set = machine.processors[0].access(&machine.memory, Gva::new(0x123), read);
//! assert_eq!(set.iter().count(), 2);
//!
//! // And this is why: the entries that were read, with the values that they had.
//! let reached = set.iter().find(|outcome| outcome.translation().is_some()).copied().unwrap();
//! assert_eq!(reached.translation().unwrap().hpa, Hpa::new(0x9123));
//! let story = set.explain(&machine.processors[0], &reached);
//! assert_eq!(story[0].entries()[0].value, 0x9003);
//!
//! // INVLPG: now it can only fault.
//! machine.processors[0].invlpg(Gva::new(0));
//! let set = machine.processors[0].access(&machine.memory, Gva::new(0x123), read);
//! assert!(set.only().is_some_and(|outcome| outcome.translation().is_none()));
//! # Ok::<(), vmmu_machine::EntryRefused>(())
//! ```
//!
//! # How to read it
//! Whoever wants to learn paging reads upwards:
//!
//! | room | teaches |
//! |---|---|
//! | [`memory`](Memory), [`addr`] | words and address spaces |
//! | [`mod@format`] | what one entry means, format by format: the single step of every walk |
//! | [`registers`], [`features`] | which mode is on, and what the processor can do |
//! | [`access`] | who may do what: U/S, R/W, NX, WP, SMEP, SMAP, protection keys |
//! | `search` | the walks, in one stage and in two, from every start that a cache offers |
//! | [`fault`] | error codes, EXITINFO, exit qualifications |
//! | `choose` | what an access leaves behind: accessed and dirty flags, what is cached, what a fault removes |
//! | [`cache`] | the kinds of cached mappings and whose they are |
//! | `processor` | worlds, control registers, and the least that each flush removes |
//!
//! # How to embed it
//! [`Machine`] is memory and processors. [`Processor::load_host`] and [`Processor::enter`] (an
//! [`NptContext`] or an [`EptContext`]) set the scene; [`Processor::access`] gives [`Outcomes`], and
//! [`Outcomes::choose`] makes one come true; [`Processor::speculate`] walks ahead of any access;
//! [`Processor::queries`] and [`Processor::held`] answer oracles. Code under test writes tables through
//! [`Memory::page`], which hands out stable references to atomic words.
//!
//! # Choices where the manuals leave room
//! - **Faults by what is held.** Intel's processors may fault by a held lack of rights; AMD's confirm every
//!   fault by a walk without cached entries (APM 5.5.3), so a fault is in the set there only if memory says
//!   so now.
//! - **Speculation** happens when the embedder calls it, at any address and to any depth; nothing is filled
//!   behind its back, and nothing is filled that was not valid at that moment.
//! - **Pieces of a large page** go with any INVLPG inside the page that they were made from (SDM 4.10.4.1).
//! - **Accessed flags on the way to a fault** are set down to wherever a seed says; of a write whose page the
//!   second stage refuses, the first stage's leaf may be dirty by then.
//! - **Two-stage walks on AMD** cache guest-physical mappings by ASID; a guest's own flushes do not touch
//!   them (INVLPGB has an option of its own for them, APM volume 3).
//!
//! # Not modelled
//! Supervisor protection keys and shadow stacks (refused), mode-based execute control, page-modification
//! logging, #VE, sub-page permissions, HLAT, LAM, SME and SEV, SMM, MTRRs and the effective memory type
//! (PAT index and EPT type are reported), nested tables in the formats of 32-bit hosts.

#![forbid(unsafe_code)]

pub mod access;
pub mod addr;
pub mod cache;
mod choose;
pub mod fault;
pub mod features;
pub mod format;
mod hash;
mod machine;
mod memory;
mod outcome;
mod outcomes;
mod processor;
mod provenance;
mod queries;
mod regime;
pub mod registers;
mod search;

pub use access::{Access, AccessKind, Privilege, Rights};
pub use addr::{Gpa, Gva, Hpa, PageSize, Pfn};
pub use cache::{Held, Mapping, Page, PhysicalTag, Table, Tag};
pub use choose::{Mark, MemoryChanged};
pub use fault::{EptViolation, NestedPageFault, PageFault};
pub use features::{Features, Quirk, Quirks, Vendor};
pub use format::{Entry, Format, Leaf, PdpteError};
pub use machine::Machine;
pub use memory::Memory;
pub use outcome::{Outcome, Translation};
pub use outcomes::{NotChosen, Outcomes};
pub use processor::{
    ControlFault, EntryRefused, EptContext, Guest, InvalidationRefused, Invept, Invpcid, Invvpid,
    NestedTables, NptContext, Processor, TlbControl,
};
pub use provenance::{EntryRead, Event, Provenance, Stage};
pub use queries::{Queries, Reached};
pub use registers::{Mode, Paging, Registers, UnsupportedRegisters};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
