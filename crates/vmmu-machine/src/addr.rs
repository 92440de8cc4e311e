//! Addresses, one type for each address space, and the sizes of pages.
//!
//! Pure values. Invariant: nothing converts from one space to another but a walk of tables.

use std::fmt;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(u64);

        impl $name {
            /// Wraps a raw value.
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }
            /// The raw value.
            pub const fn raw(self) -> u64 {
                self.0
            }
            /// The value plus `bytes`, wrapping at 64 bits.
            #[must_use]
            pub const fn plus(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }
            /// The first byte of the page of `size` that holds this address.
            #[must_use]
            pub const fn page(self, size: PageSize) -> Self {
                Self(self.0 & !(size.bytes() - 1))
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
    };
}

address! {
    /// A linear address: what instructions use, the guest's where there is a guest.
    Gva
}
address! {
    /// A guest-physical address: what the guest's tables name.
    Gpa
}
address! {
    /// A host-physical address: what selects a word of [`crate::Memory`].
    Hpa
}
address! {
    /// A frame of host memory: an [`Hpa`] divided by 4096.
    Pfn
}

impl Hpa {
    /// The frame that holds this address.
    pub const fn pfn(self) -> Pfn {
        Pfn(self.0 >> 12)
    }
}

impl Pfn {
    /// The first byte of the frame.
    pub const fn hpa(self) -> Hpa {
        Hpa(self.0 << 12)
    }
}

/// How much one translation covers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum PageSize {
    /// 4 KiB.
    Size4K,
    /// 2 MiB: PAE, 4- and 5-level paging, EPT.
    Size2M,
    /// 4 MiB: 32-bit paging only.
    Size4M,
    /// 1 GiB: 4- and 5-level paging, EPT.
    Size1G,
}

impl PageSize {
    /// All, the smallest first.
    pub const ALL: [Self; 4] = [Self::Size4K, Self::Size2M, Self::Size4M, Self::Size1G];

    /// log2 of the bytes.
    pub const fn shift(self) -> u32 {
        match self {
            Self::Size4K => 12,
            Self::Size2M => 21,
            Self::Size4M => 22,
            Self::Size1G => 30,
        }
    }

    /// The bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }

    /// The size whose page is `1 << shift` bytes, if there is one.
    pub const fn from_shift(shift: u32) -> Option<Self> {
        match shift {
            12 => Some(Self::Size4K),
            21 => Some(Self::Size2M),
            22 => Some(Self::Size4M),
            30 => Some(Self::Size1G),
            _ => None,
        }
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Size4K => "4 KiB",
            Self::Size2M => "2 MiB",
            Self::Size4M => "4 MiB",
            Self::Size1G => "1 GiB",
        })
    }
}
