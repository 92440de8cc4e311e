//! Everything that can go wrong, typed: what was wrong, with which value.
//!
//! Two kinds live here: [`Error`], the answer to a call (bad input, memory that has run out, a dead VM), which
//! leaves the VM as it was (M157, M158); and [`Bug`], a broken invariant of the library itself, reported through
//! [`crate::Host::bug`]. Invariant: every [`Error`] has exactly one error number (section 20 of the memory
//! services' specification).

use crate::addr::{Gfn, Gpa, Level, Pfn};
use crate::names::SlotId;
use core::fmt;

/// Why a call failed. The VM is as it was before the call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Error {
    /// The configuration asks for something impossible.
    Config(ConfigError),
    /// A slot request is invalid.
    Slot(SlotError),
    /// The memory limit of the VM is reached: the limit and what the VM has, in bytes.
    MemoryLimit {
        /// The limit of the configuration.
        limit: u64,
        /// What the VM had when it asked for more.
        used: u64,
    },
    /// The host has no memory for tables.
    OutOfMemory,
    /// The backing could not supply a page.
    Backing {
        /// The guest frame.
        gfn: Gfn,
        /// What the backing said.
        why: ResolveError,
    },
    /// No slot holds this guest-physical address.
    NoSlot {
        /// The address.
        gpa: Gpa,
    },
    /// A write to memory that the guest may not write to.
    ReadOnly {
        /// The address.
        gpa: Gpa,
    },
    /// The host cannot reach this frame (see [`crate::Host::frame_ptr`]).
    Unreachable {
        /// The guest frame.
        gfn: Gfn,
        /// The host frame behind it.
        pfn: Pfn,
    },
    /// An access that wraps around the end of the address space.
    Wrap {
        /// Its start.
        gpa: Gpa,
        /// Its length in bytes.
        bytes: u64,
    },
    /// A fault that reports a reserved bit in an entry that the library considers live (T49).
    ReservedBits {
        /// The faulting address.
        gpa: Gpa,
        /// The entry.
        entry: u64,
        /// Its level.
        level: Level,
    },
    /// An invariant was broken earlier; the VM refuses everything (M136).
    Dead,
}

/// Why a backing has no frame for a page (M79).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ResolveError {
    /// The page can be had only by waiting, and the request did not allow that.
    WouldWait,
    /// The host has run out of memory.
    OutOfMemory,
    /// Nothing stands behind this page.
    Unbacked,
    /// The page's memory has failed.
    Poisoned,
    /// The wait was interrupted; ask again later.
    Interrupted,
}

impl fmt::Display for ResolveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::WouldWait => "the page can only be had by waiting",
            Self::OutOfMemory => "the host has run out of memory",
            Self::Unbacked => "nothing stands behind the page",
            Self::Poisoned => "the page's memory has failed",
            Self::Interrupted => "the wait for the page was interrupted",
        })
    }
}

impl core::error::Error for ResolveError {}

/// What is impossible about a configuration.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ConfigError {
    /// Physical addresses have 32 to 52 bits.
    PhysBits(u8),
    /// There are 1 or 2 address spaces (M4).
    AddressSpaces(u8),
    /// The memory limit leaves no room for one block of tables: the limit, and the least.
    MemoryLimit {
        /// The limit asked for, in bytes.
        limit: u64,
        /// The least that works, in bytes.
        least: u64,
    },
}

/// What is invalid about a slot request (M1–M8).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum SlotError {
    /// A slot of no pages.
    Empty,
    /// More pages than a slot can have (M3: 2^31 − 1).
    TooManyPages(u64),
    /// All slots together would have more pages than can be counted.
    TotalPages(u64),
    /// The range wraps around the end of the frame numbers.
    Wraps {
        /// Its first frame.
        gfn: Gfn,
        /// Its length.
        pages: u64,
    },
    /// The range reaches beyond what the host's physical addresses can name (T5): its last frame, the limit.
    BeyondLimit {
        /// The last frame of the range.
        last: Gfn,
        /// The greatest frame that is allowed.
        limit: Gfn,
    },
    /// No such address space.
    AddressSpace(u8),
    /// The number is one that users cannot have (M3).
    Id(u16),
    /// Flags that are not known, or not to users (M2).
    Flags(u32),
    /// Another slot lies in the range (M7).
    Overlaps(SlotId),
    /// There is no such slot.
    Missing(SlotId),
    /// A slot's length cannot change (M6).
    Resized {
        /// What it is.
        from: u64,
        /// What was asked for.
        to: u64,
    },
    /// A slot's backing cannot change; delete it first (M6).
    BackingChanged(SlotId),
    /// Whether a slot is read-only cannot change (M6).
    ReadOnlyChanged(SlotId),
}

/// The error numbers that a user of the kernel's interface would see, by their Linux values.
mod errno {
    pub(super) const EIO: i32 = 5;
    pub(super) const EAGAIN: i32 = 11;
    pub(super) const EINTR: i32 = 4;
    pub(super) const ENOMEM: i32 = 12;
    pub(super) const EFAULT: i32 = 14;
    pub(super) const EEXIST: i32 = 17;
    pub(super) const EINVAL: i32 = 22;
    pub(super) const EHWPOISON: i32 = 133;
}

impl Error {
    /// The error number of section 20 of the memory services' specification (M157).
    pub const fn errno(&self) -> i32 {
        match self {
            Self::Config(_) | Self::Wrap { .. } => errno::EINVAL,
            Self::Slot(SlotError::Overlaps(_)) => errno::EEXIST,
            Self::Slot(_) => errno::EINVAL,
            Self::MemoryLimit { .. } | Self::OutOfMemory => errno::ENOMEM,
            Self::Backing { why, .. } => match why {
                ResolveError::OutOfMemory => errno::ENOMEM,
                ResolveError::Interrupted => errno::EINTR,
                ResolveError::WouldWait => errno::EAGAIN,
                ResolveError::Poisoned => errno::EHWPOISON,
                ResolveError::Unbacked => errno::EFAULT,
            },
            Self::NoSlot { .. } | Self::ReadOnly { .. } | Self::Unreachable { .. } => errno::EFAULT,
            Self::ReservedBits { .. } => errno::EINVAL,
            Self::Dead => errno::EIO,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config(e) => write!(f, "configuration: {e}"),
            Self::Slot(e) => write!(f, "slot: {e}"),
            Self::MemoryLimit { limit, used } => {
                write!(f, "the VM's memory limit of {limit} bytes is reached ({used} in use)")
            }
            Self::OutOfMemory => f.write_str("the host has no memory for tables"),
            Self::Backing { gfn, why } => write!(f, "guest frame {gfn}: {why}"),
            Self::NoSlot { gpa } => write!(f, "no slot holds guest-physical address {gpa}"),
            Self::ReadOnly { gpa } => write!(f, "guest-physical address {gpa} is read-only"),
            Self::Unreachable { gfn, pfn } => {
                write!(f, "the host cannot reach frame {pfn} behind guest frame {gfn}")
            }
            Self::Wrap { gpa, bytes } => write!(f, "{bytes} bytes from {gpa} wrap around the address space"),
            Self::ReservedBits { gpa, entry, level } => {
                write!(f, "reserved bits in the live entry {entry:#x} ({level:?}) for {gpa}")
            }
            Self::Dead => f.write_str("the VM is dead: an invariant was broken earlier"),
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PhysBits(n) => write!(f, "{n} physical address bits; 32 to 52 are possible"),
            Self::AddressSpaces(n) => write!(f, "{n} address spaces; 1 or 2 are possible"),
            Self::MemoryLimit { limit, least } => {
                write!(f, "a memory limit of {limit} bytes; {least} is the least")
            }
        }
    }
}

impl fmt::Display for SlotError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("no pages"),
            Self::TooManyPages(n) => write!(f, "{n} pages; 2^31 - 1 is the most"),
            Self::TotalPages(n) => write!(f, "all slots together would have {n} pages or more"),
            Self::Wraps { gfn, pages } => write!(f, "{pages} pages from frame {gfn} wrap around"),
            Self::BeyondLimit { last, limit } => write!(f, "last frame {last}; {limit} is the greatest"),
            Self::AddressSpace(n) => write!(f, "no address space {n}"),
            Self::Id(n) => write!(f, "number {n} is not for users"),
            Self::Flags(bits) => write!(f, "flags {bits:#x} are not known"),
            Self::Overlaps(id) => write!(f, "{id} lies in the range"),
            Self::Missing(id) => write!(f, "there is no {id}"),
            Self::Resized { from, to } => write!(f, "it has {from} pages and cannot get {to}"),
            Self::BackingChanged(id) => write!(f, "the backing of {id} cannot change"),
            Self::ReadOnlyChanged(id) => write!(f, "{id} cannot change between read-only and writable"),
        }
    }
}

impl core::error::Error for Error {}
impl core::error::Error for ConfigError {}
impl core::error::Error for SlotError {}

impl From<SlotError> for Error {
    fn from(e: SlotError) -> Self {
        Self::Slot(e)
    }
}
impl From<ConfigError> for Error {
    fn from(e: ConfigError) -> Self {
        Self::Config(e)
    }
}

/// A broken invariant of the library, or a rule of its interface broken by the host where nothing else could
/// catch it. The VM stops answering.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Bug {
    /// A present leaf would have got another frame: an invalidation was missed (T86).
    LeafRetargeted {
        /// The guest frame.
        gfn: Gfn,
        /// Its level.
        level: Level,
        /// The frame that is mapped.
        mapped: Pfn,
        /// The frame that the backing now names.
        wanted: Pfn,
    },
    /// A backing's block is not aligned as its size demands (T77).
    Misaligned {
        /// The guest frame.
        gfn: Gfn,
        /// The host frame.
        pfn: Pfn,
        /// The level of the leaf.
        level: Level,
    },
    /// An entry changed in a way that no operation may.
    IllegalTransition {
        /// The guest frame.
        gfn: Gfn,
        /// The level.
        level: Level,
        /// The entry's raw value before.
        old: u64,
        /// And after.
        new: u64,
    },
}

impl fmt::Display for Bug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LeafRetargeted { gfn, level, mapped, wanted } => write!(
                f,
                "guest frame {gfn} ({level:?}) maps {mapped}, its backing now says {wanted}: no invalidation came"
            ),
            Self::Misaligned { gfn, pfn, level } => {
                write!(f, "guest frame {gfn} and host frame {pfn} disagree modulo a {level:?} page")
            }
            Self::IllegalTransition { gfn, level, old, new } => {
                write!(f, "guest frame {gfn} ({level:?}): entry {old:#x} became {new:#x}")
            }
        }
    }
}
