//! What a guest may write to the registers whose writes are intercepted: CR4, EFER, XCR0.
//!
//! The processor checks nothing of what a hypervisor puts into a guest's saved state, and an emulator may
//! check less than a processor: so every rule of the manual stands here (AMD64 manual, volume 2, sections
//! 3.1.3, 3.1.7 and 11.5.2). `Err` is always #GP(0).

/// Bits of CR0.
pub mod cr0 {
    /// Protection.
    pub const PE: u64 = 1;
    /// Paging.
    pub const PG: u64 = 1 << 31;
}

/// Bits of CR4.
pub mod cr4 {
    /// Time-stamp counter for the kernel only.
    pub const TSD: u64 = 1 << 2;
    /// Large pages in 32-bit tables.
    pub const PSE: u64 = 1 << 4;
    /// Physical-address extension.
    pub const PAE: u64 = 1 << 5;
    /// Global pages.
    pub const PGE: u64 = 1 << 7;
    /// Five levels.
    pub const LA57: u64 = 1 << 12;
    /// Process-context identifiers.
    pub const PCIDE: u64 = 1 << 17;
    /// XSAVE.
    pub const OSXSAVE: u64 = 1 << 18;
    /// Supervisor-mode execution prevention.
    pub const SMEP: u64 = 1 << 20;
    /// Supervisor-mode access prevention.
    pub const SMAP: u64 = 1 << 21;
    /// Protection keys.
    pub const PKE: u64 = 1 << 22;
    /// Every bit whose change changes what translations mean.
    pub const PAGING: u64 = PSE | PAE | PGE | LA57 | PCIDE | SMEP | SMAP | PKE;
}

/// Bits of EFER.
pub mod efer {
    /// SYSCALL.
    pub const SCE: u64 = 1;
    /// Long mode enabled.
    pub const LME: u64 = 1 << 8;
    /// Long mode active.
    pub const LMA: u64 = 1 << 10;
    /// No-execute.
    pub const NXE: u64 = 1 << 11;
    /// SVM: the hypervisor's, hidden from the guest.
    pub const SVME: u64 = 1 << 12;
    /// Fast FXSAVE.
    pub const FFXSR: u64 = 1 << 14;
    /// Translation cache extension.
    pub const TCE: u64 = 1 << 15;
    /// Automatic IBRS.
    pub const AUTOIBRS: u64 = 1 << 21;
}

/// The write raises #GP(0) and changes nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GeneralProtection;

/// What the processor's features let a guest set.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Allowed {
    /// Bits of CR4.
    pub cr4: u64,
    /// Bits of EFER, SVME not among them.
    pub efer: u64,
    /// Bits of XCR0.
    pub xcr0: u64,
}

/// The words of CPUID that decide.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Features {
    /// Leaf 1, ECX.
    pub leaf_1_ecx: u32,
    /// Leaf 1, EDX.
    pub leaf_1_edx: u32,
    /// Leaf 7 subleaf 0, EBX.
    pub leaf_7_ebx: u32,
    /// Leaf 7 subleaf 0, ECX.
    pub leaf_7_ecx: u32,
    /// Leaf 0xD subleaf 0, EAX and EDX.
    pub leaf_d: u64,
    /// Leaf 0x80000001, ECX.
    pub extended_1_ecx: u32,
    /// Leaf 0x80000001, EDX.
    pub extended_1_edx: u32,
    /// Leaf 0x80000021, EAX.
    pub extended_21_eax: u32,
}

impl Allowed {
    /// What a processor with these features lets a guest set. Control-flow enforcement is left out: its state
    /// is not switched.
    pub const fn new(features: &Features) -> Self {
        let Features { leaf_1_ecx: c1, leaf_1_edx: d1, leaf_7_ebx: b7, leaf_7_ecx: c7, .. } = *features;
        let (c8, d8) = (features.extended_1_ecx, features.extended_1_edx);
        // (word, its bit, the register's bits)
        let cr4_bits = [
            (d1, 1, 0b11), // VME: virtual interrupts, in both modes
            (d1, 4, cr4::TSD),
            (d1, 2, 1 << 3), // debugging extensions
            (d1, 3, cr4::PSE),
            (d1, 6, cr4::PAE),
            (d1, 7, 1 << 6), // machine check
            (d1, 13, cr4::PGE),
            (!0, 0, 1 << 8),   // performance counters for user mode
            (d1, 24, 1 << 9),  // FXSAVE
            (d1, 25, 1 << 10), // SSE exceptions
            (c7, 2, 1 << 11),  // user-mode instruction prevention
            (c7, 16, cr4::LA57),
            (b7, 0, 1 << 16), // FSGSBASE
            (c1, 17, cr4::PCIDE),
            (c1, 26, cr4::OSXSAVE),
            (b7, 7, cr4::SMEP),
            (b7, 20, cr4::SMAP),
            (c7, 3, cr4::PKE),
        ];
        let efer_bits = [
            (d8, 11, efer::SCE),
            (d8, 29, efer::LME | efer::LMA),
            (d8, 20, efer::NXE),
            (d8, 25, efer::FFXSR),
            (c8, 17, efer::TCE),
            (features.extended_21_eax, 8, efer::AUTOIBRS),
        ];
        let xcr0 = if c1 >> 26 & 1 == 0 { 0 } else { features.leaf_d };
        Self { cr4: collect(&cr4_bits), efer: collect(&efer_bits), xcr0 }
    }

    /// Whether a guest with this state may load `new` into CR4.
    #[inline]
    pub const fn check_cr4(&self, state: Paging, new: u64) -> Result<(), GeneralProtection> {
        let changed = state.cr4 ^ new;
        let long = state.efer & efer::LMA != 0;
        let refused = new & !self.cr4 != 0
            || long && (new & cr4::PAE == 0 || changed & cr4::LA57 != 0)
            || changed & new & cr4::PCIDE != 0 && (!long || state.cr3 & 0xFFF != 0);
        if refused { Err(GeneralProtection) } else { Ok(()) }
    }

    /// What EFER holds after a guest with this state writes `new`: LMA is the processor's own.
    #[inline]
    pub const fn check_efer(&self, state: Paging, new: u64) -> Result<u64, GeneralProtection> {
        let changed = state.efer ^ new;
        let refused = new & !self.efer != 0 || changed & efer::LME != 0 && state.cr0 & cr0::PG != 0;
        if refused { Err(GeneralProtection) } else { Ok(new & !efer::LMA | state.efer & efer::LMA) }
    }

    /// Whether `new` may be loaded into XCR0.
    #[inline]
    pub const fn check_xcr0(&self, new: u64) -> Result<(), GeneralProtection> {
        const AVX: u64 = 1 << 2;
        const SSE: u64 = 1 << 1;
        const BOUNDS: u64 = 0b11 << 3;
        const AVX_512: u64 = 0b111 << 5;
        const TILES: u64 = 0b11 << 17;
        let refused = new & !self.xcr0 != 0
            || new & 1 == 0
            || new & AVX != 0 && new & SSE == 0
            || is_part(new, BOUNDS)
            || is_part(new, AVX_512)
            || new & AVX_512 != 0 && new & AVX == 0
            || is_part(new, TILES);
        if refused { Err(GeneralProtection) } else { Ok(()) }
    }
}

/// Whether `value` holds some but not all of the bits of `mask`.
const fn is_part(value: u64, mask: u64) -> bool {
    value & mask != 0 && value & mask != mask
}

/// The register bits of every feature that is there.
const fn collect(bits: &[(u32, u32, u64)]) -> u64 {
    let mut all = 0;
    let mut index = 0;
    while index < bits.len() {
        let (word, bit, register) = bits[index];
        if word >> bit & 1 != 0 {
            all |= register;
        }
        index += 1;
    }
    all
}

/// The state that the rules depend on, as the guest sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Paging {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER; SVME does not matter.
    pub efer: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn everything() -> Allowed {
        Allowed::new(&Features {
            leaf_1_ecx: !0,
            leaf_1_edx: !0,
            leaf_7_ebx: !0,
            leaf_7_ecx: !0,
            leaf_d: 0x6_02FF,
            extended_1_ecx: !0,
            extended_1_edx: !0,
            extended_21_eax: !0,
        })
    }

    const LONG: Paging =
        Paging { cr0: cr0::PG | cr0::PE, cr3: 0x1000, cr4: cr4::PAE, efer: efer::LME | efer::LMA };
    const REAL: Paging = Paging { cr0: 0, cr3: 0, cr4: 0, efer: 0 };

    #[test]
    fn a_bit_follows_its_feature() {
        assert_eq!(Allowed::new(&Features::default()), Allowed { cr4: 1 << 8, efer: 0, xcr0: 0 });
        let smep = Allowed::new(&Features { leaf_7_ebx: 1 << 7, ..Features::default() });
        assert_eq!(smep.cr4, 1 << 8 | cr4::SMEP);
        assert_eq!(everything().cr4, 0x0077_1FFF);
        // VMXE, SMXE, control-flow enforcement and everything above are nobody's.
        for bit in [13, 14, 15, 19, 23, 24, 32, 63] {
            assert_eq!(everything().check_cr4(REAL, 1 << bit), Err(GeneralProtection), "bit {bit}");
        }
    }

    #[test]
    fn long_mode_keeps_its_tables() {
        let all = everything();
        assert_eq!(all.check_cr4(LONG, cr4::PAE | cr4::PGE), Ok(()));
        assert_eq!(all.check_cr4(LONG, cr4::PGE), Err(GeneralProtection));
        assert_eq!(all.check_cr4(LONG, cr4::PAE | cr4::LA57), Err(GeneralProtection));
        assert_eq!(all.check_cr4(REAL, cr4::LA57), Ok(()));
    }

    #[test]
    fn identifiers_begin_in_long_mode_with_none_in_use() {
        let all = everything();
        let new = cr4::PAE | cr4::PCIDE;
        assert_eq!(all.check_cr4(LONG, new), Ok(()));
        assert_eq!(all.check_cr4(Paging { cr3: 0x1005, ..LONG }, new), Err(GeneralProtection));
        assert_eq!(all.check_cr4(REAL, new), Err(GeneralProtection));
        let on = Paging { cr3: 0x1005, cr4: new, ..LONG };
        assert_eq!(all.check_cr4(on, new | cr4::PGE), Ok(()));
    }

    #[test]
    fn efer_hides_svm_and_keeps_lma() {
        let all = everything();
        assert_eq!(all.check_efer(REAL, efer::SVME), Err(GeneralProtection));
        assert_eq!(all.check_efer(REAL, 1 << 1), Err(GeneralProtection));
        assert_eq!(all.check_efer(REAL, efer::LME | efer::LMA), Ok(efer::LME));
        assert_eq!(all.check_efer(LONG, efer::LME | efer::NXE), Ok(efer::LME | efer::LMA | efer::NXE));
        assert_eq!(all.check_efer(LONG, 0), Err(GeneralProtection));
        let none = Allowed::new(&Features::default());
        assert_eq!(none.check_efer(REAL, efer::NXE), Err(GeneralProtection));
    }

    #[test]
    fn xcr0_needs_whole_families() {
        let all = everything();
        for good in [0x1, 0x3, 0x7, 0xE7, 0x1F, 0x6_0003] {
            assert_eq!(all.check_xcr0(good), Ok(()), "{good:#x}");
        }
        for bad in [0x0, 0x2, 0x5, 0xB, 0x27, 0xE3, 0x2_0003, 0x100 | 3, 1 << 63 | 3] {
            assert_eq!(all.check_xcr0(bad), Err(GeneralProtection), "{bad:#x}");
        }
        assert_eq!(Allowed::new(&Features::default()).check_xcr0(1), Err(GeneralProtection));
    }
}
