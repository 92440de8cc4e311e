//! Addresses are types: guest-virtual, guest-physical, host-physical, and the frame numbers of the latter two.
//!
//! Nothing here knows of tables or slots. Invariants: the kinds never mix implicitly (every conversion is a
//! named function); a [`GfnRange`] is never inverted; a [`Level`] is always 1 to 5.

use core::fmt;

/// Bytes in the smallest page.
pub const PAGE_BYTES: u64 = 4096;
/// log2 of [`PAGE_BYTES`].
pub const PAGE_SHIFT: u32 = 12;
/// log2 of [`ENTRIES`].
pub(crate) const INDEX_BITS: u32 = crate::sync::places(9, 2) as u32;
/// Entries in a table page of every format with 64-bit entries: 512.
pub const ENTRIES: usize = 1 << INDEX_BITS;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// Wraps a raw value.
            #[inline(always)]
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }
            /// The raw value.
            #[inline(always)]
            pub const fn raw(self) -> u64 {
                self.0
            }
            /// The value plus `n`, or `None` where that wraps around 64 bits.
            #[inline]
            pub const fn checked_add(self, n: u64) -> Option<Self> {
                match self.0.checked_add(n) {
                    Some(v) => Some(Self(v)),
                    None => None,
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

address! {
    /// A guest-virtual (linear) address, in bytes.
    Gva
}
address! {
    /// A guest-physical address, in bytes.
    Gpa
}
address! {
    /// A host-physical address, in bytes.
    Hpa
}
address! {
    /// A guest frame number: a guest-physical address divided by 4096.
    Gfn
}
address! {
    /// A host frame number: a host-physical address divided by 4096.
    Pfn
}

macro_rules! frames {
    ($addr:ident, $frame:ident, $to_frame:ident, $to_addr:ident) => {
        impl $addr {
            /// The frame that holds this address.
            #[inline(always)]
            pub const fn $to_frame(self) -> $frame {
                $frame(self.0 >> PAGE_SHIFT)
            }
            /// The offset within the 4 KiB page.
            #[inline(always)]
            pub const fn page_offset(self) -> u64 {
                self.0 & (PAGE_BYTES - 1)
            }
            /// Whether the address is a multiple of 4 KiB.
            #[inline(always)]
            pub const fn is_page_aligned(self) -> bool {
                self.page_offset() == 0
            }
        }
        impl $frame {
            /// The first byte of the frame.
            #[inline(always)]
            pub const fn $to_addr(self) -> $addr {
                $addr(self.0 << PAGE_SHIFT)
            }
            /// The frame `n` after this one; wraps silently past 2^64 frames, which no address reaches.
            #[inline(always)]
            #[must_use]
            pub const fn offset(self, n: u64) -> Self {
                Self(self.0.wrapping_add(n))
            }
            /// The first frame of the naturally aligned block of `level` that holds this frame.
            #[inline(always)]
            #[must_use]
            pub const fn align_down(self, level: Level) -> Self {
                Self(self.0 & !(level.pages() - 1))
            }
            /// Whether this is the first frame of a naturally aligned block of `level`.
            #[inline(always)]
            pub const fn is_aligned(self, level: Level) -> bool {
                self.0 & (level.pages() - 1) == 0
            }
        }
    };
}
frames!(Gpa, Gfn, gfn, gpa);
frames!(Hpa, Pfn, pfn, hpa);

/// The height of a table above the pages: an entry at level 1 maps 4 KiB, at 2 maps 2 MiB, at 3 maps 1 GiB,
/// at 4 covers 512 GiB, at 5 covers 256 TiB.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Level(u8);

impl Level {
    /// Entries that map 4 KiB.
    pub const L1: Self = Self(1);
    /// Entries that cover 2 MiB.
    pub const L2: Self = Self(2);
    /// Entries that cover 1 GiB.
    pub const L3: Self = Self(3);
    /// Entries that cover 512 GiB.
    pub const L4: Self = Self(4);
    /// Entries that cover 256 TiB.
    pub const L5: Self = Self(5);

    /// The level numbered `n`, if it is one of 1 to 5.
    pub const fn new(n: u8) -> Option<Self> {
        match n {
            1..=5 => Some(Self(n)),
            _ => None,
        }
    }
    /// The number, 1 to 5.
    #[inline(always)]
    pub const fn number(self) -> u8 {
        self.0
    }
    /// 4 KiB pages that one entry of this level covers: 512^(level − 1).
    #[inline(always)]
    pub const fn pages(self) -> u64 {
        1 << self.shift()
    }
    /// The level of the tables that links of this level point to; `None` below level 1.
    #[inline(always)]
    pub const fn below(self) -> Option<Self> {
        match self.0 {
            1 => None,
            n => Some(Self(n - 1)),
        }
    }
    /// The level above; `None` above level 5.
    #[inline(always)]
    pub const fn above(self) -> Option<Self> {
        match self.0 {
            5 => None,
            n => Some(Self(n + 1)),
        }
    }
    /// The index in a table of this level of the entry that covers `gfn`.
    #[inline(always)]
    pub const fn index(self, gfn: Gfn) -> usize {
        ((gfn.0 >> self.shift()) & (ENTRIES as u64 - 1)) as usize
    }
    /// log2 of [`Level::pages`].
    #[inline(always)]
    pub const fn shift(self) -> u32 {
        INDEX_BITS * (self.0 as u32 - 1)
    }
}

impl fmt::Debug for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "L{}", self.0)
    }
}

/// The size of a leaf: what one entry at level 1, 2 or 3 maps.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum PageSize {
    /// 4 KiB, level 1.
    Size4K,
    /// 2 MiB, level 2.
    Size2M,
    /// 1 GiB, level 3.
    Size1G,
}

impl PageSize {
    /// Every size, smallest first.
    pub const ALL: [Self; 3] = [Self::Size4K, Self::Size2M, Self::Size1G];

    /// The level at which a leaf of this size lies.
    #[inline(always)]
    pub const fn level(self) -> Level {
        match self {
            Self::Size4K => Level::L1,
            Self::Size2M => Level::L2,
            Self::Size1G => Level::L3,
        }
    }
    /// The size of a leaf at `level`; `None` at levels 4 and 5, which hold no leaves.
    #[inline(always)]
    pub const fn at(level: Level) -> Option<Self> {
        match level.0 {
            1 => Some(Self::Size4K),
            2 => Some(Self::Size2M),
            3 => Some(Self::Size1G),
            _ => None,
        }
    }
    /// 4 KiB pages in a page of this size.
    #[inline(always)]
    pub const fn pages(self) -> u64 {
        self.level().pages()
    }
    /// Bytes in a page of this size.
    #[inline(always)]
    pub const fn bytes(self) -> u64 {
        self.pages() * PAGE_BYTES
    }
}

/// A range of guest frames, `start` included, `end` not; never inverted.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct GfnRange {
    start: Gfn,
    end: Gfn,
}

impl GfnRange {
    /// No frames.
    pub const EMPTY: Self = Self { start: Gfn(0), end: Gfn(0) };
    /// Every frame that a 64-bit guest-physical address can name.
    pub const ALL: Self = Self { start: Gfn(0), end: Gfn((u64::MAX >> PAGE_SHIFT) + 1) };

    /// The frames from `start` up to but not including `end`; `None` where that is inverted.
    pub const fn new(start: Gfn, end: Gfn) -> Option<Self> {
        if start.0 <= end.0 { Some(Self { start, end }) } else { None }
    }
    /// `pages` frames from `start`; `None` where the end wraps around.
    pub const fn with_len(start: Gfn, pages: u64) -> Option<Self> {
        match start.0.checked_add(pages) {
            Some(end) => Some(Self { start, end: Gfn(end) }),
            None => None,
        }
    }
    /// The naturally aligned block of `level` that holds `gfn`; one that reaches past the end of 64 bits ends
    /// there.
    #[inline]
    pub const fn block(gfn: Gfn, level: Level) -> Self {
        let start = gfn.align_down(level);
        Self { start, end: Gfn(start.0.saturating_add(level.pages())) }
    }
    /// The first frame.
    #[inline(always)]
    pub const fn start(self) -> Gfn {
        self.start
    }
    /// The frame after the last.
    #[inline(always)]
    pub const fn end(self) -> Gfn {
        self.end
    }
    /// Frames in the range.
    #[inline(always)]
    pub const fn pages(self) -> u64 {
        self.end.0 - self.start.0
    }
    /// Whether the range holds no frame.
    #[inline(always)]
    pub const fn is_empty(self) -> bool {
        self.start.0 == self.end.0
    }
    /// Whether `gfn` lies inside.
    #[inline(always)]
    pub const fn contains(self, gfn: Gfn) -> bool {
        self.start.0 <= gfn.0 && gfn.0 < self.end.0
    }
    /// Whether all of `other` lies inside.
    #[inline]
    pub const fn covers(self, other: Self) -> bool {
        self.start.0 <= other.start.0 && other.end.0 <= self.end.0
    }
    /// Whether any frame lies in both.
    #[inline]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start.0 < other.end.0 && other.start.0 < self.end.0
    }
    /// The frames that lie in both.
    #[inline]
    #[must_use]
    pub const fn intersect(self, other: Self) -> Self {
        let start = if self.start.0 > other.start.0 { self.start } else { other.start };
        let end = if self.end.0 < other.end.0 { self.end } else { other.end };
        if start.0 < end.0 { Self { start, end } } else { Self::EMPTY }
    }
    /// The smallest range that holds both; an empty one adds nothing.
    #[inline]
    #[must_use]
    pub const fn hull(self, other: Self) -> Self {
        if self.is_empty() {
            return other;
        }
        if other.is_empty() {
            return self;
        }
        let start = if self.start.0 < other.start.0 { self.start } else { other.start };
        let end = if self.end.0 > other.end.0 { self.end } else { other.end };
        Self { start, end }
    }
    /// Every frame of the range, in order.
    pub fn iter(self) -> impl Iterator<Item = Gfn> {
        (self.start.0..self.end.0).map(Gfn)
    }
}

impl fmt::Debug for GfnRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x})", self.start.0, self.end.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No block is inverted, wherever it lies, and the whole holds the last frame.
    #[test]
    fn ranges_at_the_end() {
        for n in 1..=5 {
            let level = Level::new(n).expect("1 to 5");
            let block = GfnRange::block(Gfn::new(u64::MAX), level);
            assert!(block.start() <= block.end(), "{block:?}");
        }
        assert!(GfnRange::ALL.contains(Gpa::new(u64::MAX).gfn()));
        assert_eq!(GfnRange::with_len(Gfn::new(u64::MAX), 2), None);
    }
}
