//! What was run: a mode, a seed, and what the processor offers.
//!
//! Pure values, as the report's head has them.

use vmmu_machine::{Features, Vendor};

/// Which tables are walked: the levels of the walker's own in bits 3:0, those of nested tables in bits 7:4.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Mode(pub(crate) u32);

impl Mode {
    /// The levels of the linear address's tables: 2 to 5.
    pub(crate) const fn levels(self) -> u8 {
        self.0 as u8 & 15
    }

    /// The levels of the nested tables: 4, 5, or 0 where there are none.
    pub(crate) const fn nested_levels(self) -> u8 {
        self.0 as u8 >> 4
    }

    /// Whether this is a mode that walks are drawn for.
    pub(crate) const fn is_known(self) -> bool {
        matches!(self.0, 2..=5 | 0x42..=0x44 | 0x54 | 0x55)
    }
}

/// What the processor offers, one bit each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Has(pub(crate) u32);

impl Has {
    pub(crate) const PSE: u32 = 1;
    pub(crate) const PSE36: u32 = 2;
    pub(crate) const NX: u32 = 8;
    pub(crate) const PAGES_1G: u32 = 16;
    pub(crate) const LA57: u32 = 32;
    pub(crate) const SMEP: u32 = 64;
    pub(crate) const SMAP: u32 = 128;
    pub(crate) const PKU: u32 = 256;

    pub(crate) const fn any(self, bits: u32) -> bool {
        self.0 & bits != 0
    }
}

/// One run of the payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Run {
    pub(crate) mode: Mode,
    pub(crate) has: Has,
    /// MAXPHYADDR.
    pub(crate) phys_bits: u32,
    /// How many of the regions lie in memory that is there: 12, or 20 with those above 4 GiB.
    pub(crate) regions: u32,
    pub(crate) seed: u64,
    /// The first walk, and how many.
    pub(crate) first: u64,
    pub(crate) count: u64,
    pub(crate) vendor: Vendor,
    /// Where the instructions lie that make accesses: the supervisor's and the user's.
    pub(crate) stubs: [u32; 2],
    /// The distance of each kind's from there.
    pub(crate) stub_offsets: [u16; 4],
}

impl Run {
    /// The processor, as the model knows it.
    pub(crate) const fn features(&self) -> Features {
        let bits = self.phys_bits as u8;
        let mut features = match self.vendor {
            Vendor::Amd => Features::amd(bits),
            Vendor::Intel => Features::intel(bits),
        };
        features.pages_1g = self.has.any(Has::PAGES_1G);
        features.pse36 = self.has.any(Has::PSE36);
        features.la57 = self.has.any(Has::LA57);
        features.pku = self.has.any(Has::PKU);
        features
    }
}
