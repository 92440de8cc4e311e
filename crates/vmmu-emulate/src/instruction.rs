//! What decoding yields: the [`Instruction`], its [`Op`], and the address of its memory operand.
//!
//! Plain values; nothing here reads instruction bytes. Invariant: an instruction whose operation needs memory
//! ([`Op::Load`], [`Op::Store`], [`Op::Invlpg`] and so on) has a memory operand.

use crate::register::{Gpr, Register, Registers, Segment, Width};

/// How instructions are read: what the code segment's descriptor says.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum CpuMode {
    /// Operands and addresses of 16 bits by default: real mode, virtual-8086 mode, 16-bit code segments.
    Bits16,
    /// Operands and addresses of 32 bits by default: 32-bit code segments, compatibility mode included.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

impl CpuMode {
    /// The mode that `EFER.LMA` and the code segment's L and D bits select. In real mode D is clear.
    #[inline]
    pub const fn new(efer_lma: bool, cs_l: bool, cs_d: bool) -> Self {
        match (efer_lma && cs_l, cs_d) {
            (true, _) => Self::Bits64,
            (false, true) => Self::Bits32,
            (false, false) => Self::Bits16,
        }
    }
}

/// One decoded instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Instruction {
    pub(crate) len: u8,
    pub(crate) mode: CpuMode,
    pub(crate) repeat: Repeat,
    pub(crate) lock: bool,
    pub(crate) segment: Option<Segment>,
    pub(crate) operand_width: Width,
    pub(crate) address_width: Width,
    pub(crate) memory: Option<MemoryOperand>,
    pub(crate) op: Op,
}

impl Instruction {
    /// Bytes, 1 to 15, prefixes included.
    #[inline]
    #[allow(clippy::len_without_is_empty)] // an instruction is never empty
    pub const fn len(&self) -> u8 {
        self.len
    }

    /// What it does.
    #[inline]
    pub const fn op(&self) -> Op {
        self.op
    }

    /// The mode for which it was decoded.
    #[inline]
    pub const fn mode(&self) -> CpuMode {
        self.mode
    }

    /// The effective operand size: 16, 32 or 64 bits, by mode, 66 prefix and REX.W. Instructions on bytes and
    /// those of fixed size state their own in [`Op`].
    #[inline]
    pub const fn operand_width(&self) -> Width {
        self.operand_width
    }

    /// The effective address size: 16, 32 or 64 bits, by mode and 67 prefix.
    #[inline]
    pub const fn address_width(&self) -> Width {
        self.address_width
    }

    /// The segment override that applies; in 64-bit mode only FS and GS do.
    #[inline]
    pub const fn segment_override(&self) -> Option<Segment> {
        self.segment
    }

    /// The repeat prefix. Whether it means repetition depends on the instruction.
    #[inline]
    pub const fn repeat(&self) -> Repeat {
        self.repeat
    }

    /// Whether there is a LOCK prefix.
    #[inline]
    pub const fn is_locked(&self) -> bool {
        self.lock
    }

    /// The memory operand that `ModRM` or a direct offset names. `None` for string instructions (see
    /// [`Instruction::string_source`]) and for those in VEX, EVEX or XOP encoding, whose displacements may be
    /// scaled.
    #[inline]
    pub const fn memory(&self) -> Option<&MemoryOperand> {
        self.memory.as_ref()
    }

    /// The linear address of [`Instruction::memory`]; `None` where there is none.
    ///
    /// Segment limits and canonical form are not checked: the processor did before it exited.
    #[inline]
    pub fn effective_address(&self, registers: &impl Registers) -> Option<u64> {
        let memory = self.memory.as_ref()?;
        let base = match memory.base {
            Base::None => 0,
            Base::Gpr(gpr) => registers.gpr(gpr),
            Base::NextInstruction => registers.rip().wrapping_add(self.len.into()),
        };
        let index = memory.index.map_or(0, |index| registers.gpr(index) << memory.scale_shift);
        let offset = base.wrapping_add(index).wrapping_add(memory.displacement.cast_unsigned());
        Some(self.linear(memory.segment, offset, registers))
    }

    /// The linear address that a string instruction reads from next: `DS:rSI`, or with the override's segment.
    #[inline]
    pub fn string_source(&self, registers: &impl Registers) -> u64 {
        self.linear(self.segment.unwrap_or(Segment::Ds), registers.gpr(Gpr::Rsi), registers)
    }

    /// The linear address that a string instruction writes to, or compares with, next: `ES:rDI`.
    #[inline]
    pub fn string_destination(&self, registers: &impl Registers) -> u64 {
        self.linear(Segment::Es, registers.gpr(Gpr::Rdi), registers)
    }

    /// The instruction pointer after this instruction, which starts at `rip`.
    #[inline]
    pub const fn next_rip(&self, rip: u64) -> u64 {
        let next = rip.wrapping_add(self.len as u64);
        match self.mode {
            CpuMode::Bits64 => next,
            CpuMode::Bits32 | CpuMode::Bits16 => Width::Dword.truncate(next),
        }
    }

    fn linear(&self, segment: Segment, offset: u64, registers: &impl Registers) -> u64 {
        let offset = self.address_width.truncate(offset);
        match (self.mode, segment) {
            (CpuMode::Bits64, Segment::Fs | Segment::Gs) => {
                registers.segment_base(segment).wrapping_add(offset)
            }
            (CpuMode::Bits64, _) => offset,
            _ => Width::Dword.truncate(registers.segment_base(segment).wrapping_add(offset)),
        }
    }
}

/// The F2 and F3 prefixes; where both stand, the last counts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Repeat {
    /// Neither.
    #[default]
    None,
    /// F3: REP, REPE.
    Rep,
    /// F2: REPNE.
    Repne,
}

/// A memory operand: `segment:[base + index * scale + displacement]`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct MemoryOperand {
    pub(crate) segment: Segment,
    pub(crate) base: Base,
    pub(crate) index: Option<Gpr>,
    pub(crate) scale_shift: u8,
    pub(crate) displacement: i64,
}

impl MemoryOperand {
    /// The segment: the override, or the default of the base register.
    pub const fn segment(&self) -> Segment {
        self.segment
    }
    /// What the address starts from.
    pub const fn base(&self) -> Base {
        self.base
    }
    /// The index register.
    pub const fn index(&self) -> Option<Gpr> {
        self.index
    }
    /// By how much the index is multiplied: 1, 2, 4 or 8.
    pub const fn scale(&self) -> u8 {
        1 << self.scale_shift
    }
    /// The displacement, sign-extended; a direct offset (MOV A0 to A3) is not extended.
    pub const fn displacement(&self) -> i64 {
        self.displacement
    }
}

/// What an address starts from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Base {
    /// Nothing: the displacement alone.
    None,
    /// A register.
    Gpr(Gpr),
    /// The next instruction (RIP-relative addresses).
    NextInstruction,
}

/// A register, or the instruction's memory operand.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Operand {
    /// A register.
    Register(Register),
    /// [`Instruction::memory`].
    Memory,
}

/// A value that the instruction brings along.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Source {
    /// A register's.
    Register(Register),
    /// A constant, sign-extended to 64 bits.
    Immediate(u64),
}

impl Source {
    /// The value; of an immediate all 64 bits of its sign-extension.
    #[inline]
    pub fn read(self, registers: &impl Registers) -> u64 {
        match self {
            Self::Register(register) => register.read(registers),
            Self::Immediate(value) => value,
        }
    }
}

/// Where the port's number is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Port {
    /// In the instruction.
    Immediate(u8),
    /// In DX.
    Dx,
}

/// How a narrow value fills a wide register.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Extend {
    /// With zeros: MOVZX, and MOV where widths are equal.
    Zero,
    /// With copies of the top bit: MOVSX, MOVSXD.
    Sign,
}

/// Arithmetic on two operands.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[allow(missing_docs)] // the names are the architecture's
pub enum BinaryOp {
    Add,
    Or,
    Adc,
    Sbb,
    And,
    Sub,
    Xor,
    /// SUB without the result.
    Cmp,
    /// AND without the result.
    Test,
}

/// Arithmetic on one operand.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[allow(missing_docs)] // the names are the architecture's
pub enum UnaryOp {
    Not,
    Neg,
    Inc,
    Dec,
}

/// What an instruction does, as far as exits need to know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Op {
    /// Any instruction not named below; its length is known, and its memory operand where `ModRM` names one.
    Other,

    /// MOV register ← memory (8A, 8B, A0, A1), MOVZX, MOVSX, MOVSXD from memory.
    Load {
        /// The destination.
        to: Register,
        /// What is read; at most the destination's width.
        width: Width,
        /// How the rest of the destination is filled.
        extend: Extend,
    },
    /// MOV memory ← register or immediate (88, 89, A2, A3, C6, C7), MOVNTI.
    Store {
        /// The value; its low `width` is written.
        from: Source,
        /// What is written.
        width: Width,
    },
    /// XCHG memory, register: locked with or without a prefix.
    Exchange {
        /// The register.
        with: Register,
    },
    /// Memory ← memory `op` source. [`BinaryOp::Cmp`] and [`BinaryOp::Test`] only read.
    BinaryMemory {
        /// The operation.
        op: BinaryOp,
        /// The second operand.
        with: Source,
        /// The width of both.
        width: Width,
    },
    /// Register ← register `op` memory. [`BinaryOp::Cmp`] only reads.
    BinaryRegister {
        /// The operation.
        op: BinaryOp,
        /// First operand and destination.
        to: Register,
    },
    /// Memory ← `op` memory.
    Unary {
        /// The operation.
        op: UnaryOp,
        /// The operand's width.
        width: Width,
    },

    /// MOVS: `ES:rDI` ← `DS:rSI`.
    Movs(Width),
    /// STOS: `ES:rDI` ← accumulator.
    Stos(Width),
    /// LODS: accumulator ← `DS:rSI`.
    Lods(Width),
    /// CMPS: `DS:rSI` compared with `ES:rDI`.
    Cmps(Width),
    /// SCAS: accumulator compared with `ES:rDI`.
    Scas(Width),

    /// IN: accumulator ← port.
    In {
        /// The port.
        port: Port,
        /// 1, 2 or 4 bytes.
        width: Width,
    },
    /// OUT: port ← accumulator.
    Out {
        /// The port.
        port: Port,
        /// 1, 2 or 4 bytes.
        width: Width,
    },
    /// INS: `ES:rDI` ← port DX; 1, 2 or 4 bytes.
    Ins(Width),
    /// OUTS: port DX ← `DS:rSI`; 1, 2 or 4 bytes.
    Outs(Width),

    /// MOV general register ← control register.
    MovFromCr {
        /// 0, 2, 3, 4 or 8.
        cr: u8,
        /// The destination: all 64 bits in 64-bit mode, else 32.
        gpr: Gpr,
    },
    /// MOV control register ← general register.
    MovToCr {
        /// 0, 2, 3, 4 or 8.
        cr: u8,
        /// The source: all 64 bits in 64-bit mode, else 32.
        gpr: Gpr,
    },
    /// MOV general register ← debug register.
    MovFromDr {
        /// 0 to 7. 4 and 5 mean 6 and 7, or raise #UD where CR4.DE is set.
        dr: u8,
        /// The destination: all 64 bits in 64-bit mode, else 32.
        gpr: Gpr,
    },
    /// MOV debug register ← general register.
    MovToDr {
        /// 0 to 7. 4 and 5 mean 6 and 7, or raise #UD where CR4.DE is set.
        dr: u8,
        /// The source: all 64 bits in 64-bit mode, else 32.
        gpr: Gpr,
    },
    /// CLTS.
    Clts,
    /// LMSW: CR0 bits 3:0 ← the low four bits of a word; PE cannot be cleared.
    Lmsw {
        /// The word.
        from: Operand,
    },
    /// SMSW: a word of memory, or a register of the operand size, ← CR0.
    Smsw {
        /// The destination.
        to: Operand,
    },
    /// XSETBV: the extended control register ECX ← EDX:EAX.
    Xsetbv,

    /// INVLPG of [`Instruction::effective_address`].
    Invlpg,
    /// INVPCID; the descriptor is at [`Instruction::effective_address`].
    Invpcid {
        /// Holds the type of invalidation.
        kind: Gpr,
    },
    /// INVD.
    Invd,
    /// WBINVD.
    Wbinvd,
    /// WBNOINVD; WBINVD on processors without it.
    Wbnoinvd,

    /// CPUID.
    Cpuid,
    /// HLT.
    Hlt,
    /// PAUSE.
    Pause,
    /// MONITOR.
    Monitor,
    /// MWAIT.
    Mwait,
    /// RDMSR.
    Rdmsr,
    /// WRMSR.
    Wrmsr,
    /// RDTSC.
    Rdtsc,
    /// RDTSCP.
    Rdtscp,
    /// RDPMC.
    Rdpmc,
    /// VMCALL (Intel).
    Vmcall,
    /// VMMCALL (AMD).
    Vmmcall,

    /// INT n (CD).
    Int {
        /// n.
        vector: u8,
    },
    /// INT3 (CC).
    Int3,
    /// INTO (CE).
    Into,
    /// INT1 (F1), also called ICEBP.
    Int1,
    /// IRET, IRETD, IRETQ.
    Iret {
        /// The size of each item popped.
        width: Width,
    },
}
