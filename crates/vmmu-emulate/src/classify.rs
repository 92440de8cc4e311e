//! From the parts of an instruction to its operation.
//!
//! Pure. Invariant: an encoding that is named here is defined; whatever is undefined about a named operation
//! (a prefix it forbids, a register that does not exist) is an error and not another operation.

use crate::decode::{DecodeError, Map, Parts};
use crate::instruction::{BinaryOp, CpuMode, Extend, Op, Operand, Port, Repeat, Source, UnaryOp};
use crate::opcode;
use crate::register::{Gpr, Register, Width};

/// The operation of `parts`, which are not in VEX, EVEX or XOP encoding.
#[inline]
pub(crate) fn classify(parts: &Parts) -> Result<Op, DecodeError> {
    if parts.prefixes.lock && !may_lock(parts) {
        return Err(DecodeError::Invalid);
    }
    match parts.map {
        Map::OneByte => Ok(one_byte(parts)),
        Map::TwoByte => two_byte(parts),
        Map::ThreeByte38 => Ok(three_byte_38(parts)),
        Map::ThreeByte3a | Map::Extended => Ok(Op::Other),
    }
}

/// Whether the LOCK prefix is legal. On MOV to and from CR0 it is AMD's way to name CR8 outside 64-bit mode.
fn may_lock(parts: &Parts) -> bool {
    let (opcode, reg) = (parts.opcode, parts.modrm.reg());
    match parts.map {
        Map::OneByte => parts.modrm.is_memory() && opcode::lockable_one_byte(opcode, reg),
        Map::TwoByte if matches!(opcode, 0x20 | 0x22) => reg == 0,
        Map::TwoByte => parts.modrm.is_memory() && opcode::lockable_two_byte(opcode, reg),
        _ => false,
    }
}

impl Parts {
    /// The width of an operand whose opcode's lowest bit tells bytes (0) from the operand size (1).
    fn width_by_opcode(&self) -> Width {
        if self.opcode & 1 == 0 { Width::Byte } else { self.operand_width }
    }

    /// The same for port I/O, which has no 64-bit form.
    fn port_width(&self) -> Width {
        self.width_by_opcode().min(Width::Dword)
    }

    /// The register in the `ModRM` reg field.
    fn reg(&self, width: Width) -> Register {
        let number = self.modrm.reg() | self.prefixes.rex_r();
        Register::encoded(number, width, self.prefixes.rex != 0)
    }

    /// The register in the `ModRM` rm field.
    fn rm(&self, width: Width) -> Register {
        let number = self.modrm.rm() | self.prefixes.rex_b();
        Register::encoded(number, width, self.prefixes.rex != 0)
    }

    /// The memory operand, or the register in the rm field.
    fn rm_operand(&self, width: Width) -> Operand {
        if self.modrm.is_memory() { Operand::Memory } else { Operand::Register(self.rm(width)) }
    }

    fn immediate(&self) -> Source {
        Source::Immediate(self.immediate.cast_unsigned())
    }

    fn immediate_byte(&self) -> u8 {
        self.immediate.cast_unsigned() as u8
    }

    /// Whether none of the prefixes stands there that choose between instructions of one opcode.
    fn no_mandatory_prefix(&self) -> bool {
        self.prefixes.repeat == Repeat::None && !self.prefixes.operand_size
    }
}

fn one_byte(parts: &Parts) -> Op {
    let memory = parts.modrm.is_memory();
    let width = parts.width_by_opcode();
    let accumulator = Register::low(Gpr::Rax, width);
    match parts.opcode {
        0x88 | 0x89 if memory => Op::Store { from: Source::Register(parts.reg(width)), width },
        0x8a | 0x8b if memory => Op::Load { to: parts.reg(width), width, extend: Extend::Zero },
        0xa0 | 0xa1 => Op::Load { to: accumulator, width, extend: Extend::Zero },
        0xa2 | 0xa3 => Op::Store { from: Source::Register(accumulator), width },
        0xc6 | 0xc7 if memory => Op::Store { from: parts.immediate(), width },
        // MOVSXD in 64-bit mode; else ARPL.
        0x63 if memory && parts.mode == CpuMode::Bits64 => Op::Load {
            to: parts.reg(parts.operand_width),
            width: parts.operand_width.min(Width::Dword),
            extend: Extend::Sign,
        },
        0x86 | 0x87 if memory => Op::Exchange { with: parts.reg(width) },

        0x00..=0x3f if parts.opcode & 4 == 0 && memory => {
            let op = BINARY[usize::from(parts.opcode >> 3)];
            if parts.opcode & 2 == 0 {
                Op::BinaryMemory { op, with: Source::Register(parts.reg(width)), width }
            } else {
                Op::BinaryRegister { op, to: parts.reg(width) }
            }
        }
        0x80..=0x83 if memory => {
            let op = BINARY[usize::from(parts.modrm.reg())];
            Op::BinaryMemory { op, with: parts.immediate(), width }
        }
        0x84 | 0x85 if memory => {
            Op::BinaryMemory { op: BinaryOp::Test, with: Source::Register(parts.reg(width)), width }
        }
        0xf6 | 0xf7 if memory => match parts.modrm.reg() {
            0 | 1 => Op::BinaryMemory { op: BinaryOp::Test, with: parts.immediate(), width },
            2 => Op::Unary { op: UnaryOp::Not, width },
            3 => Op::Unary { op: UnaryOp::Neg, width },
            _ => Op::Other,
        },
        0xfe | 0xff if memory => match parts.modrm.reg() {
            0 => Op::Unary { op: UnaryOp::Inc, width },
            1 => Op::Unary { op: UnaryOp::Dec, width },
            _ => Op::Other,
        },

        0xa4 | 0xa5 => Op::Movs(width),
        0xa6 | 0xa7 => Op::Cmps(width),
        0xaa | 0xab => Op::Stos(width),
        0xac | 0xad => Op::Lods(width),
        0xae | 0xaf => Op::Scas(width),

        0x6c | 0x6d => Op::Ins(parts.port_width()),
        0x6e | 0x6f => Op::Outs(parts.port_width()),
        0xe4 | 0xe5 => Op::In { port: Port::Immediate(parts.immediate_byte()), width: parts.port_width() },
        0xe6 | 0xe7 => Op::Out { port: Port::Immediate(parts.immediate_byte()), width: parts.port_width() },
        0xec | 0xed => Op::In { port: Port::Dx, width: parts.port_width() },
        0xee | 0xef => Op::Out { port: Port::Dx, width: parts.port_width() },

        0x90 if parts.prefixes.repeat == Repeat::Rep => Op::Pause,
        0xcc => Op::Int3,
        0xcd => Op::Int { vector: parts.immediate_byte() },
        0xce => Op::Into,
        0xcf => Op::Iret { width: parts.operand_width },
        0xf1 => Op::Int1,
        0xf4 => Op::Hlt,
        _ => Op::Other,
    }
}

/// The arithmetic operations in the order of their encoding.
const BINARY: [BinaryOp; 8] = [
    BinaryOp::Add,
    BinaryOp::Or,
    BinaryOp::Adc,
    BinaryOp::Sbb,
    BinaryOp::And,
    BinaryOp::Sub,
    BinaryOp::Xor,
    BinaryOp::Cmp,
];

fn two_byte(parts: &Parts) -> Result<Op, DecodeError> {
    let memory = parts.modrm.is_memory();
    Ok(match parts.opcode {
        0x01 => group_7(parts),
        0x06 => Op::Clts,
        0x08 => Op::Invd,
        0x09 if parts.prefixes.repeat == Repeat::Rep => Op::Wbnoinvd,
        0x09 => Op::Wbinvd,
        0x20..=0x23 => {
            // LOCK stands before CR0 only, and makes it CR8.
            let lock = if parts.prefixes.lock { 8 } else { 0 };
            let number = parts.modrm.reg() | parts.prefixes.rex_r() | lock;
            return system_register(parts.opcode, number, parts.rm(Width::Qword).gpr());
        }
        0x30 => Op::Wrmsr,
        0x31 => Op::Rdtsc,
        0x32 => Op::Rdmsr,
        0x33 => Op::Rdpmc,
        0xa2 => Op::Cpuid,
        0xb6 | 0xb7 | 0xbe | 0xbf if memory => Op::Load {
            to: parts.reg(parts.operand_width),
            width: if parts.opcode & 1 == 0 { Width::Byte } else { Width::Word },
            extend: if parts.opcode & 8 == 0 { Extend::Zero } else { Extend::Sign },
        },
        0xc3 if memory && parts.no_mandatory_prefix() => {
            let width = if parts.prefixes.rex_w() { Width::Qword } else { Width::Dword };
            Op::Store { from: Source::Register(parts.reg(width)), width }
        }
        _ => Op::Other,
    })
}

/// MOV between `gpr` and the control register (20, 22) or debug register (21, 23) numbered `number`.
#[inline]
pub(crate) fn system_register(opcode: u8, number: u8, gpr: Gpr) -> Result<Op, DecodeError> {
    match (opcode, number) {
        (0x20, 0 | 2 | 3 | 4 | 8) => Ok(Op::MovFromCr { cr: number, gpr }),
        (0x22, 0 | 2 | 3 | 4 | 8) => Ok(Op::MovToCr { cr: number, gpr }),
        (0x21, 0..=7) => Ok(Op::MovFromDr { dr: number, gpr }),
        (0x23, 0..=7) => Ok(Op::MovToDr { dr: number, gpr }),
        _ => Err(DecodeError::Invalid),
    }
}

/// 0F 01.
fn group_7(parts: &Parts) -> Op {
    match (parts.modrm.reg(), parts.modrm.is_memory()) {
        (4, _) => Op::Smsw { to: parts.rm_operand(parts.operand_width) },
        (6, _) => Op::Lmsw { from: parts.rm_operand(Width::Word) },
        (7, true) => Op::Invlpg,
        (_, false) => match parts.modrm.byte {
            0xc1 if parts.no_mandatory_prefix() => Op::Vmcall,
            0xc8 if parts.no_mandatory_prefix() => Op::Monitor,
            0xc9 if parts.no_mandatory_prefix() => Op::Mwait,
            0xd1 if parts.no_mandatory_prefix() => Op::Xsetbv,
            // With F2 or F3 it is VMGEXIT.
            0xd9 if parts.prefixes.repeat == Repeat::None => Op::Vmmcall,
            0xf9 => Op::Rdtscp,
            _ => Op::Other,
        },
        _ => Op::Other,
    }
}

fn three_byte_38(parts: &Parts) -> Op {
    let prefix_66 = parts.prefixes.operand_size && parts.prefixes.repeat == Repeat::None;
    match parts.opcode {
        0x82 if prefix_66 && parts.modrm.is_memory() => Op::Invpcid { kind: parts.reg(Width::Qword).gpr() },
        _ => Op::Other,
    }
}
