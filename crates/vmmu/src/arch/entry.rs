//! The decoded entry of a second-stage table, and the trait that every hardware format implements.
//!
//! Three views of one entry: the raw word that memory holds ([`Raw`]), the decoded value ([`Entry`]), and the
//! permission question ([`NestedAccess`]). Invariants: decoding and encoding are total and inverse to each other for
//! every value that the library writes; a leaf has one of the four legal combinations of its three write bits
//! (T35).

use crate::addr::{Gfn, Hpa, Level, Pfn};
use core::fmt;

/// The word that an entry is in memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Raw(pub u64);

impl fmt::Debug for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Raw({:#x})", self.0)
    }
}

/// What an access wants beyond reading.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct NestedAccess {
    /// It writes.
    pub write: bool,
    /// It fetches an instruction.
    pub fetch: bool,
}

impl NestedAccess {
    /// A load.
    pub const READ: Self = Self { write: false, fetch: false };
    /// A store.
    pub const WRITE: Self = Self { write: true, fetch: false };
    /// An instruction fetch.
    pub const FETCH: Self = Self { write: false, fetch: true };
}

/// How writable a leaf is, and why not (T35, T36): the four legal combinations of host-writable, MMU-writable
/// and W.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Writable {
    /// (0,0,0): the backing or the slot is read-only.
    No,
    /// (1,0,0): protected for shadow tables or write tracking; only the lock can lift it.
    Tracked,
    /// (1,1,0): protected for dirty logging; a fault may lift it without the lock.
    Logged,
    /// (1,1,1).
    Yes,
}

/// A present entry that maps memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Leaf {
    /// The first frame that it maps.
    pub pfn: Pfn,
    /// Whether the guest may write through it.
    pub writable: Writable,
    /// Whether the guest may execute from it.
    pub executable: bool,
    /// The accessed bit.
    pub accessed: bool,
    /// The dirty bit.
    pub dirty: bool,
}

impl Leaf {
    /// Whether hardware lets `access` through.
    #[inline(always)]
    pub fn allows(&self, access: NestedAccess) -> bool {
        (!access.write || self.writable == Writable::Yes) && (!access.fetch || self.executable)
    }
}

/// An entry that caches "no slot here" (T45–T48).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Mmio {
    /// The guest frame.
    pub gfn: Gfn,
    /// Whether the access that made it was a write.
    pub write: bool,
    /// The low 19 bits of the slot generation that it was made under.
    pub generation: u32,
}

/// Bits of the slot generation that an MMIO entry keeps (T46).
pub const MMIO_GENERATION_BITS: u32 = 19;
/// Mask of those bits.
pub const MMIO_GENERATION_MASK: u64 = (1 << MMIO_GENERATION_BITS) - 1;

/// A decoded entry.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Entry {
    /// Nothing is mapped.
    Empty,
    /// Its subtree is going away, or one is being put in place: nobody but the owner may write it (T41, T98).
    Frozen,
    /// No slot: an access is a device's.
    Mmio(Mmio),
    /// The address of the next lower table.
    Link(Hpa),
    /// Memory.
    Leaf(Leaf),
}

impl Entry {
    /// The leaf, if it is one.
    #[inline(always)]
    pub fn leaf(self) -> Option<Leaf> {
        match self {
            Self::Leaf(leaf) => Some(leaf),
            _ => None,
        }
    }
    /// Whether hardware may use it for a translation.
    #[inline(always)]
    pub fn is_present(self) -> bool {
        matches!(self, Self::Link(_) | Self::Leaf(_))
    }
}

/// A hardware format of second-stage tables. One value describes one machine (physical address width, leaf
/// sizes); the hot paths are compiled once for each implementor.
pub trait Format: Copy + Send + Sync + fmt::Debug + 'static {
    /// Decodes what an entry of `level` holds.
    fn decode(&self, raw: Raw, level: Level) -> Entry;
    /// The table that an entry of `level`, 2 or higher, links to: what [`Format::decode`] says, and nothing else
    /// of it, for the walk.
    #[inline(always)]
    fn link(&self, raw: Raw, level: Level) -> Option<Hpa> {
        match self.decode(raw, level) {
            Entry::Link(table) => Some(table),
            _ => None,
        }
    }
    /// Encodes an entry of `level`. An [`Entry::Mmio`] must be one for which [`Format::caches_mmio`] holds.
    fn encode(&self, entry: Entry, level: Level) -> Raw;
    /// The level of the root.
    fn root_level(&self) -> Level;
    /// The highest level at which leaves are possible (T6).
    fn max_leaf_level(&self) -> Level;
    /// The greatest frame number of guest and host (T5).
    fn max_gfn(&self) -> Gfn;
    /// Whether the format can hold MMIO entries on this machine (T45).
    fn caches_mmio(&self) -> bool;
    /// Bits of `raw` that the hardware would call reserved, none of which an entry that the library calls
    /// present may have (T16).
    fn reserved_bits(&self, raw: Raw, level: Level) -> u64;
    /// What a new table is filled with (T40).
    fn empty(&self) -> Raw {
        self.encode(Entry::Empty, Level::L1)
    }
}
