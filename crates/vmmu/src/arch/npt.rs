//! AMD's nested page tables: the entry format of 4- and 5-level host paging, with the library's software bits.
//!
//! Pure encode and decode, no memory. The layout (AMD64 manual volume 2, sections 5.3 and 15.25; T21–T25,
//! T34–T41, T45, T46):
//!
//! | bits | links and leaves | MMIO entries |
//! |---|---|---|
//! | 0 | present | present |
//! | 1, 2 | writable, user | access: write; always set |
//! | 5, 6, 7 | accessed, dirty, page size (leaves at levels 2 and 3) | generation, low 8 bits, at 3–10 |
//! | 9, 10 | host-writable, MMU-writable (leaves) | |
//! | 11 | MMU-present | clear |
//! | 12–51 | address | guest frame; bit 51 set: reserved, so that the access faults |
//! | 52–62 | clear (52 and 53: A/D mode, always "enabled" under NPT) | generation, high 11 bits |
//! | 63 | no-execute | clear |
//!
//! A non-present entry is bit 63 alone, never zero (T40); a frozen one adds a pattern without bits 2:0, 10 and
//! 11. Links carry full permissions but for W, which lazy write protection may take away.

use super::entry::{Entry, Format, Leaf, MMIO_GENERATION_MASK, Mmio, Raw, Writable};
use crate::addr::{Gfn, Hpa, INDEX_BITS, Level, PAGE_SHIFT, Pfn};
use crate::error::ConfigError;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const PAGE_SIZE: u64 = 1 << 7;
const HOST_WRITABLE: u64 = 1 << 9;
const MMU_WRITABLE: u64 = 1 << 10;
const MMU_PRESENT: u64 = 1 << 11;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = ((1 << 52) - 1) & !0xFFF;

const EMPTY: u64 = NO_EXECUTE;
const FROZEN: u64 = NO_EXECUTE | 0x1A0;
const MMIO_MARK: u64 = 1 << 51;
const MMIO_RECOGNISE: u64 = PRESENT | MMIO_MARK | MMU_PRESENT;
const MMIO_GFN: u64 = MMIO_MARK - (1 << PAGE_SHIFT);
const MMIO_LOW: u64 = 0xFF;
const MMIO_LOW_SHIFT: u32 = 3;
const MMIO_HIGH_SHIFT: u32 = 52;

// No field of an MMIO entry overlaps another, bit 11 or the mark (T46); the frozen pattern is none of them.
const _: () = {
    let low = MMIO_LOW << MMIO_LOW_SHIFT;
    let high = (MMIO_GENERATION_MASK >> 8) << MMIO_HIGH_SHIFT;
    let fixed = PRESENT | USER | WRITABLE;
    assert!(low & (fixed | MMIO_GFN | MMIO_MARK | MMU_PRESENT) == 0);
    assert!(high & (fixed | MMIO_GFN | MMIO_MARK | NO_EXECUTE) == 0);
    assert!(MMIO_GFN & (fixed | MMIO_MARK | MMU_PRESENT) == 0);
    assert!(FROZEN & (PRESENT | WRITABLE | USER | MMU_WRITABLE | MMU_PRESENT | ADDRESS) == 0);
    assert!(FROZEN != EMPTY);
};

/// The nested page tables of one machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Npt {
    root: Level,
    phys_bits: u8,
    max_gfn: Gfn,
}

impl Npt {
    /// Tables of 4 levels, or 5 where the host itself runs with 5 (T7), on a processor with `phys_bits`
    /// physical address bits (CPUID leaf `0x8000_0008`, EAX 7:0).
    pub fn new(five_levels: bool, phys_bits: u8) -> Result<Self, ConfigError> {
        if !(32..=52).contains(&phys_bits) {
            return Err(ConfigError::PhysBits(phys_bits));
        }
        // A 4-level table reaches 48 bits, whatever the processor's addresses have.
        let reach = (PAGE_SHIFT + 4 * INDEX_BITS) as u8;
        let (root, bits) =
            if five_levels { (Level::L5, phys_bits) } else { (Level::L4, phys_bits.min(reach)) };
        let max_gfn = Gfn::new((1u64 << (u32::from(bits) - PAGE_SHIFT)) - 1);
        Ok(Self { root, phys_bits, max_gfn })
    }

    /// Address bits that this machine does not have.
    fn beyond(&self) -> u64 {
        ADDRESS & !((1u64 << self.phys_bits) - 1)
    }
}

impl Format for Npt {
    #[inline(always)]
    fn decode(&self, raw: Raw, level: Level) -> Entry {
        let raw = raw.0;
        if raw & MMU_PRESENT != 0 {
            if level > Level::L1 && raw & PAGE_SIZE == 0 {
                return Entry::Link(Hpa::new(raw & ADDRESS));
            }
            let writable = if raw & WRITABLE != 0 {
                Writable::Yes
            } else if raw & MMU_WRITABLE != 0 {
                Writable::Logged
            } else if raw & HOST_WRITABLE != 0 {
                Writable::Tracked
            } else {
                Writable::No
            };
            return Entry::Leaf(Leaf {
                pfn: Pfn::new((raw & ADDRESS) >> PAGE_SHIFT),
                writable,
                executable: raw & NO_EXECUTE == 0,
                accessed: raw & ACCESSED != 0,
                dirty: raw & DIRTY != 0,
            });
        }
        if raw == EMPTY {
            Entry::Empty
        } else if raw & MMIO_RECOGNISE == PRESENT | MMIO_MARK {
            let generation =
                ((raw >> MMIO_LOW_SHIFT & MMIO_LOW) | (raw >> MMIO_HIGH_SHIFT & 0x7FF) << 8) as u32;
            Entry::Mmio(Mmio {
                gfn: Gfn::new((raw & MMIO_GFN) >> PAGE_SHIFT),
                write: raw & WRITABLE != 0,
                generation,
            })
        } else {
            // Anything else that is not live belongs to somebody: lock-free readers retry, the audit reports it.
            Entry::Frozen
        }
    }

    #[inline(always)]
    fn link(&self, raw: Raw, level: Level) -> Option<Hpa> {
        debug_assert!(level > Level::L1);
        if raw.0 & (MMU_PRESENT | PAGE_SIZE) == MMU_PRESENT { Some(Hpa::new(raw.0 & ADDRESS)) } else { None }
    }

    #[inline(always)]
    fn encode(&self, entry: Entry, level: Level) -> Raw {
        Raw(match entry {
            Entry::Empty => EMPTY,
            Entry::Frozen => FROZEN,
            Entry::Link(table) => table.raw() | PRESENT | WRITABLE | USER | ACCESSED | MMU_PRESENT,
            Entry::Leaf(leaf) => {
                let write = match leaf.writable {
                    Writable::No => 0,
                    Writable::Tracked => HOST_WRITABLE,
                    Writable::Logged => HOST_WRITABLE | MMU_WRITABLE,
                    Writable::Yes => HOST_WRITABLE | MMU_WRITABLE | WRITABLE,
                };
                leaf.pfn.hpa().raw()
                    | PRESENT
                    | USER
                    | MMU_PRESENT
                    | write
                    | if leaf.executable { 0 } else { NO_EXECUTE }
                    | if leaf.accessed { ACCESSED } else { 0 }
                    | if leaf.dirty { DIRTY } else { 0 }
                    | if level > Level::L1 { PAGE_SIZE } else { 0 }
            }
            Entry::Mmio(mmio) => {
                debug_assert!(self.caches_mmio());
                let generation = u64::from(mmio.generation) & MMIO_GENERATION_MASK;
                PRESENT
                    | USER
                    | MMIO_MARK
                    | mmio.gfn.gpa().raw() & MMIO_GFN
                    | if mmio.write { WRITABLE } else { 0 }
                    | (generation & MMIO_LOW) << MMIO_LOW_SHIFT
                    | (generation >> 8) << MMIO_HIGH_SHIFT
            }
        })
    }

    #[inline(always)]
    fn root_level(&self) -> Level {
        self.root
    }

    #[inline(always)]
    fn max_leaf_level(&self) -> Level {
        Level::L3
    }

    #[inline(always)]
    fn max_gfn(&self) -> Gfn {
        self.max_gfn
    }

    #[inline(always)]
    fn caches_mmio(&self) -> bool {
        self.phys_bits < 52
    }

    fn reserved_bits(&self, raw: Raw, level: Level) -> u64 {
        let raw = raw.0;
        if raw & PRESENT == 0 {
            return 0;
        }
        let by_level = if level >= Level::L4 {
            // Level 4 and 5 entries have neither a page size nor a global bit.
            PAGE_SIZE | 1 << 8
        } else if level > Level::L1 && raw & PAGE_SIZE != 0 {
            // Below the address of a large page lies only the PAT bit, 12, which stays clear here as well.
            (level.pages() - 1) << PAGE_SHIFT
        } else {
            0
        };
        raw & (self.beyond() | by_level)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn machine() -> impl Strategy<Value = Npt> {
        (any::<bool>(), 40u8..=51).prop_map(|(five, bits)| Npt::new(five, bits).expect("a legal width"))
    }
    fn writable() -> impl Strategy<Value = Writable> {
        prop_oneof![Just(Writable::No), Just(Writable::Tracked), Just(Writable::Logged), Just(Writable::Yes)]
    }
    fn entry(level: Level) -> BoxedStrategy<Entry> {
        let leaf = (0u64..1 << 28, writable(), any::<[bool; 3]>()).prop_map(move |(n, writable, bits)| {
            Entry::Leaf(Leaf {
                pfn: Pfn::new(n).align_down(level),
                writable,
                executable: bits[0],
                accessed: bits[1],
                dirty: bits[2],
            })
        });
        let mmio = (0u64..1 << 28, any::<bool>(), 0u32..1 << 19)
            .prop_map(|(n, write, generation)| Entry::Mmio(Mmio { gfn: Gfn::new(n), write, generation }));
        let link = (1u64..1 << 28).prop_map(|n| Entry::Link(Pfn::new(n).hpa()));
        let plain = prop_oneof![Just(Entry::Empty), Just(Entry::Frozen)];
        match level.number() {
            1 => prop_oneof![plain, leaf, mmio].boxed(),
            2 | 3 => prop_oneof![plain, leaf, mmio, link].boxed(),
            _ => prop_oneof![plain, mmio, link].boxed(),
        }
    }
    fn entry_at_any_level() -> impl Strategy<Value = (Level, Entry)> {
        (1u8..=5).prop_flat_map(|n| {
            let level = Level::new(n).expect("1 to 5");
            entry(level).prop_map(move |e| (level, e))
        })
    }

    proptest! {
        /// T21, T34–T41, T46: what is written is what is read, level by level.
        #[test]
        fn round_trip(npt in machine(), (level, entry) in entry_at_any_level()) {
            let raw = npt.encode(entry, level);
            prop_assert_eq!(npt.decode(raw, level), entry);
        }

        /// T16: nothing that is encoded as present has a reserved bit; an MMIO entry always has one.
        #[test]
        fn reserved_bits_only_in_mmio_entries(npt in machine(), (level, entry) in entry_at_any_level()) {
            let reserved = npt.reserved_bits(npt.encode(entry, level), level);
            prop_assert_eq!(reserved != 0, matches!(entry, Entry::Mmio(_)));
        }

        /// T34: MMU-present is bit 11 and agrees with the hardware's own present bit but for MMIO entries.
        #[test]
        fn mmu_present_is_bit_11(npt in machine(), (level, entry) in entry_at_any_level()) {
            let raw = npt.encode(entry, level).0;
            prop_assert_eq!(raw >> 11 & 1 == 1, entry.is_present());
            prop_assert_eq!(raw & 1 == 1, entry.is_present() || matches!(entry, Entry::Mmio(_)));
        }

        /// The walk's short cut agrees with the decoder for any value.
        #[test]
        fn links_are_links(npt in machine(), raw in any::<u64>(), n in 2u8..=5) {
            let level = Level::new(n).expect("1 to 5");
            let decoded = match npt.decode(Raw(raw), level) {
                Entry::Link(table) => Some(table),
                _ => None,
            };
            prop_assert_eq!(npt.link(Raw(raw), level), decoded);
        }

        /// T40, T41: whatever is not live is either the one empty value or taken for frozen, never for memory.
        #[test]
        fn stray_values_are_never_live(npt in machine(), raw in any::<u64>()) {
            let raw = raw & !MMU_PRESENT;
            let decoded = npt.decode(Raw(raw), Level::L1);
            prop_assert!(!decoded.is_present());
            prop_assert_eq!(decoded == Entry::Empty, raw == EMPTY);
        }
    }

    #[test]
    fn widths_outside_the_architecture_are_refused() {
        assert_eq!(Npt::new(false, 31), Err(ConfigError::PhysBits(31)));
        assert_eq!(Npt::new(true, 53), Err(ConfigError::PhysBits(53)));
    }

    /// T45: with 52 physical address bits no address bit is left to mark MMIO entries with.
    #[test]
    fn mmio_caching_needs_a_reserved_bit() {
        assert!(!Npt::new(false, 52).expect("legal").caches_mmio());
        assert!(Npt::new(false, 51).expect("legal").caches_mmio());
    }

    /// T5 and T7: 4 levels reach 48 bits, 5 as far as the processor's addresses.
    #[test]
    fn greatest_frame() {
        assert_eq!(Npt::new(false, 40).expect("legal").max_gfn(), Gfn::new((1 << 28) - 1));
        assert_eq!(Npt::new(false, 52).expect("legal").max_gfn(), Gfn::new((1 << 36) - 1));
        assert_eq!(Npt::new(true, 52).expect("legal").max_gfn(), Gfn::new((1 << 40) - 1));
    }
}
