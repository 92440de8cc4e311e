//! Registers as instructions name them: general ones by number and part, segments, and the trait through which
//! this crate reaches a guest's.
//!
//! Invariants: a [`Register`] names a part that exists (a high byte only of the first four); writing one
//! follows the architecture's rule for the bits outside the part.

use core::fmt;

/// The width of an operand or an address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Width {
    /// 1 byte.
    Byte,
    /// 2 bytes.
    Word,
    /// 4 bytes.
    Dword,
    /// 8 bytes.
    Qword,
}

impl Width {
    /// 1, 2, 4 or 8.
    #[inline]
    pub const fn bytes(self) -> u8 {
        1 << self as u8
    }

    /// 8, 16, 32 or 64.
    #[inline]
    pub const fn bits(self) -> u32 {
        8 << self as u32
    }

    /// The value with all bits outside the width cleared.
    #[inline]
    pub const fn truncate(self, value: u64) -> u64 {
        value & (u64::MAX >> (64 - self.bits()))
    }

    /// The value with the width's top bit copied to all bits above.
    #[inline]
    pub const fn sign_extend(self, value: u64) -> u64 {
        let unused = 64 - self.bits();
        ((value << unused).cast_signed() >> unused).cast_unsigned()
    }
}

/// A general-purpose register, in the order of its encoding.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
#[allow(missing_docs)] // the names are the architecture's
pub enum Gpr {
    Rax,
    Rcx,
    Rdx,
    Rbx,
    Rsp,
    Rbp,
    Rsi,
    Rdi,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
}

impl Gpr {
    /// All sixteen, in the order of their numbers.
    pub const ALL: [Self; 16] = [
        Self::Rax,
        Self::Rcx,
        Self::Rdx,
        Self::Rbx,
        Self::Rsp,
        Self::Rbp,
        Self::Rsi,
        Self::Rdi,
        Self::R8,
        Self::R9,
        Self::R10,
        Self::R11,
        Self::R12,
        Self::R13,
        Self::R14,
        Self::R15,
    ];

    /// The register whose number is the low four bits of `number`.
    #[inline]
    pub const fn from_low_bits(number: u8) -> Self {
        // A match, and not an index into `ALL`: it compiles to nothing.
        match number & 15 {
            0 => Self::Rax,
            1 => Self::Rcx,
            2 => Self::Rdx,
            3 => Self::Rbx,
            4 => Self::Rsp,
            5 => Self::Rbp,
            6 => Self::Rsi,
            7 => Self::Rdi,
            8 => Self::R8,
            9 => Self::R9,
            10 => Self::R10,
            11 => Self::R11,
            12 => Self::R12,
            13 => Self::R13,
            14 => Self::R14,
            _ => Self::R15,
        }
    }

    /// The number that instructions encode, 0 to 15: RAX is 0, RCX 1, RDX 2, RBX 3, RSP 4.
    #[inline]
    pub const fn number(self) -> u8 {
        self as u8
    }
}

/// A general-purpose register or a part of one, as an instruction names it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Register {
    gpr: Gpr,
    width: Width,
    high_byte: bool,
}

impl Register {
    /// The low `width` of `gpr`.
    #[inline]
    pub const fn low(gpr: Gpr, width: Width) -> Self {
        Self { gpr, width, high_byte: false }
    }

    /// AH, CH, DH or BH: bits 15:8 of RAX, RCX, RDX or RBX. `None` for other registers, which have no such part.
    #[inline]
    pub const fn high(gpr: Gpr) -> Option<Self> {
        match gpr {
            Gpr::Rax | Gpr::Rcx | Gpr::Rdx | Gpr::Rbx => {
                Some(Self { gpr, width: Width::Byte, high_byte: true })
            }
            _ => None,
        }
    }

    /// The register that `number` (0 to 15) encodes at `width`: without a REX prefix the byte registers 4 to
    /// 7 are AH, CH, DH and BH.
    #[inline]
    pub(crate) const fn encoded(number: u8, width: Width, rex: bool) -> Self {
        if matches!(width, Width::Byte) && !rex && number & 0xc == 4 {
            Self { gpr: Gpr::from_low_bits(number & 3), width, high_byte: true }
        } else {
            Self::low(Gpr::from_low_bits(number), width)
        }
    }

    /// The whole register of which this is a part.
    #[inline]
    pub const fn gpr(self) -> Gpr {
        self.gpr
    }

    /// The part's width.
    #[inline]
    pub const fn width(self) -> Width {
        self.width
    }

    /// Whether this is AH, CH, DH or BH: bits 15:8.
    #[inline]
    pub const fn is_high_byte(self) -> bool {
        self.high_byte
    }

    /// The part's value, zero-extended.
    #[inline]
    pub fn read(self, registers: &impl Registers) -> u64 {
        let whole = registers.gpr(self.gpr);
        self.width.truncate(if self.high_byte { whole >> 8 } else { whole })
    }

    /// Writes the low bits of `value` to the part. A 32-bit write clears the upper half; 8- and 16-bit writes
    /// leave the other bits alone (Intel SDM volume 1, 3.4.1.1; AMD APM volume 1, 3.1.2).
    #[inline]
    pub fn write(self, registers: &mut impl Registers, value: u64) {
        let whole = match self.width {
            Width::Qword | Width::Dword => self.width.truncate(value),
            Width::Word | Width::Byte => {
                let shift = if self.high_byte { 8 } else { 0 };
                let mask = self.width.truncate(u64::MAX) << shift;
                (registers.gpr(self.gpr) & !mask) | ((value << shift) & mask)
            }
        };
        registers.set_gpr(self.gpr, whole);
    }
}

impl fmt::Debug for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = if self.high_byte { "15:8" } else { "low" };
        write!(f, "{:?}[{part} {}]", self.gpr, self.width.bits())
    }
}

/// A segment register, in the order of its encoding.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
#[allow(missing_docs)] // the names are the architecture's
pub enum Segment {
    Es,
    Cs,
    Ss,
    Ds,
    Fs,
    Gs,
}

/// The registers of the guest whose instruction is decoded or carried out.
pub trait Registers {
    /// All 64 bits of a general-purpose register.
    fn gpr(&self, gpr: Gpr) -> u64;
    /// Replaces all 64 bits of a general-purpose register.
    fn set_gpr(&mut self, gpr: Gpr, value: u64);
    /// Where the instruction itself starts: the offset in the code segment, not that of the next instruction.
    fn rip(&self) -> u64;
    /// RFLAGS.
    fn rflags(&self) -> u64;
    /// Replaces RFLAGS. Only the six arithmetic flags ever change.
    fn set_rflags(&mut self, value: u64);
    /// The base address of a segment. In 64-bit mode only FS and GS are asked for.
    fn segment_base(&self, segment: Segment) -> u64;
}
