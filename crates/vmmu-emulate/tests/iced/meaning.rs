//! What an instruction of iced-x86 means in this crate's words: its operation, its addresses.
//!
//! Written from iced's mnemonics and operands alone; of ours only the width of an immediate is looked at.

use iced_x86::{EncodingKind, MemorySize, Mnemonic, OpKind, Register as Theirs};
use vmmu_emulate::{
    Base, BinaryOp, CpuMode, Extend, Gpr, Instruction, Op, Operand, Port, Register, Registers, Segment,
    Source, UnaryOp, Width,
};

/// Where every compared instruction starts.
pub(crate) const RIP: u64 = 0x10_0000;

/// The operation; `None` for what this crate does not name.
pub(crate) fn expected_op(ours: &Instruction, theirs: &iced_x86::Instruction) -> Option<Op> {
    if theirs.encoding() != EncodingKind::Legacy {
        return None;
    }
    if theirs.is_string_instruction() {
        return string(theirs);
    }
    let uses_memory = (0..theirs.op_count().min(2)).any(|operand| theirs.op_kind(operand) == OpKind::Memory);
    match theirs.mnemonic() {
        Mnemonic::In => Some(Op::In { port: port(theirs, 1), width: register(theirs, 0)?.width() }),
        Mnemonic::Out => Some(Op::Out { port: port(theirs, 0), width: register(theirs, 1)?.width() }),
        Mnemonic::Smsw => Some(Op::Smsw { to: operand(theirs)? }),
        // iced names the register by the operand size; the instruction reads 16 bits of it.
        Mnemonic::Lmsw => Some(Op::Lmsw {
            from: match operand(theirs)? {
                Operand::Register(register) => Operand::Register(Register::low(register.gpr(), Width::Word)),
                Operand::Memory => Operand::Memory,
            },
        }),
        Mnemonic::Invpcid => Some(Op::Invpcid { kind: register(theirs, 0)?.gpr() }),
        Mnemonic::Int => Some(Op::Int { vector: theirs.immediate8() }),
        Mnemonic::Mov if !uses_memory => system_register(theirs),
        _ if uses_memory => memory(ours, theirs),
        _ => without_operands(theirs),
    }
}

fn without_operands(theirs: &iced_x86::Instruction) -> Option<Op> {
    Some(match theirs.mnemonic() {
        Mnemonic::Clts => Op::Clts,
        Mnemonic::Xsetbv => Op::Xsetbv,
        Mnemonic::Invd => Op::Invd,
        Mnemonic::Wbinvd => Op::Wbinvd,
        Mnemonic::Wbnoinvd => Op::Wbnoinvd,
        Mnemonic::Cpuid => Op::Cpuid,
        Mnemonic::Hlt => Op::Hlt,
        Mnemonic::Pause => Op::Pause,
        Mnemonic::Monitor => Op::Monitor,
        Mnemonic::Mwait => Op::Mwait,
        Mnemonic::Rdmsr => Op::Rdmsr,
        Mnemonic::Wrmsr => Op::Wrmsr,
        Mnemonic::Rdtsc => Op::Rdtsc,
        Mnemonic::Rdtscp => Op::Rdtscp,
        Mnemonic::Rdpmc => Op::Rdpmc,
        Mnemonic::Vmcall => Op::Vmcall,
        Mnemonic::Vmmcall => Op::Vmmcall,
        Mnemonic::Int3 => Op::Int3,
        Mnemonic::Into => Op::Into,
        Mnemonic::Int1 => Op::Int1,
        Mnemonic::Iret => Op::Iret { width: Width::Word },
        Mnemonic::Iretd => Op::Iret { width: Width::Dword },
        Mnemonic::Iretq => Op::Iret { width: Width::Qword },
        _ => return None,
    })
}

fn string(theirs: &iced_x86::Instruction) -> Option<Op> {
    let width = width_of(theirs.memory_size())?;
    Some(match theirs.mnemonic() {
        Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => Op::Movs(width),
        Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq => Op::Cmps(width),
        Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => Op::Stos(width),
        Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => Op::Lods(width),
        Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd | Mnemonic::Scasq => Op::Scas(width),
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => Op::Ins(width),
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => Op::Outs(width),
        _ => return None,
    })
}

fn system_register(theirs: &iced_x86::Instruction) -> Option<Op> {
    let (to, from) = (theirs.op0_register(), theirs.op1_register());
    let number = |register: Theirs| register.number() as u8;
    if to.is_cr() {
        Some(Op::MovToCr { cr: number(to), gpr: register(theirs, 1)?.gpr() })
    } else if from.is_cr() {
        Some(Op::MovFromCr { cr: number(from), gpr: register(theirs, 0)?.gpr() })
    } else if to.is_dr() {
        Some(Op::MovToDr { dr: number(to), gpr: register(theirs, 1)?.gpr() })
    } else if from.is_dr() {
        Some(Op::MovFromDr { dr: number(from), gpr: register(theirs, 0)?.gpr() })
    } else {
        None
    }
}

/// Operations with a memory operand, first or second.
fn memory(ours: &Instruction, theirs: &iced_x86::Instruction) -> Option<Op> {
    let width = width_of(theirs.memory_size());
    let first = theirs.op0_kind() == OpKind::Memory;
    let binary = |op| {
        Some(if first {
            Op::BinaryMemory { op, with: source(ours, theirs)?, width: width? }
        } else {
            Op::BinaryRegister { op, to: register(theirs, 0)? }
        })
    };
    let unary = |op| Some(Op::Unary { op, width: width? });
    let load = |extend| Some(Op::Load { to: register(theirs, 0)?, width: width?, extend });
    match theirs.mnemonic() {
        Mnemonic::Mov | Mnemonic::Movnti if first => {
            Some(Op::Store { from: source(ours, theirs)?, width: width? })
        }
        Mnemonic::Mov | Mnemonic::Movzx => load(Extend::Zero),
        Mnemonic::Movsx | Mnemonic::Movsxd => load(Extend::Sign),
        Mnemonic::Xchg => Some(Op::Exchange { with: register(theirs, 1)? }),
        Mnemonic::Add => binary(BinaryOp::Add),
        Mnemonic::Or => binary(BinaryOp::Or),
        Mnemonic::Adc => binary(BinaryOp::Adc),
        Mnemonic::Sbb => binary(BinaryOp::Sbb),
        Mnemonic::And => binary(BinaryOp::And),
        Mnemonic::Sub => binary(BinaryOp::Sub),
        Mnemonic::Xor => binary(BinaryOp::Xor),
        Mnemonic::Cmp => binary(BinaryOp::Cmp),
        Mnemonic::Test => binary(BinaryOp::Test),
        Mnemonic::Not => unary(UnaryOp::Not),
        Mnemonic::Neg => unary(UnaryOp::Neg),
        Mnemonic::Inc => unary(UnaryOp::Inc),
        Mnemonic::Dec => unary(UnaryOp::Dec),
        Mnemonic::Invlpg => Some(Op::Invlpg),
        _ => None,
    }
}

fn register(theirs: &iced_x86::Instruction, operand: u32) -> Option<Register> {
    let theirs = theirs.op_register(operand);
    if !theirs.is_gpr() {
        return None;
    }
    let gpr = Gpr::ALL[theirs.full_register().number()];
    if matches!(theirs, Theirs::AH | Theirs::CH | Theirs::DH | Theirs::BH) {
        return Register::high(gpr);
    }
    Some(Register::low(gpr, width_of_bytes(theirs.size())?))
}

/// The first operand.
fn operand(theirs: &iced_x86::Instruction) -> Option<Operand> {
    match theirs.op0_kind() {
        OpKind::Memory => Some(Operand::Memory),
        _ => register(theirs, 0).map(Operand::Register),
    }
}

/// The second operand. iced's immediates are as wide as the encoding says, ours sign-extended to 64 bits.
fn source(ours: &Instruction, theirs: &iced_x86::Instruction) -> Option<Source> {
    if theirs.op1_kind() == OpKind::Register {
        return register(theirs, 1).map(Source::Register);
    }
    let (Op::Store { from: Source::Immediate(value), width }
    | Op::BinaryMemory { with: Source::Immediate(value), width, .. }) = ours.op()
    else {
        return None;
    };
    let immediate = theirs.try_immediate(1).ok()?;
    let same = width.truncate(value) == width.truncate(immediate) && value == width.sign_extend(value);
    same.then_some(Source::Immediate(value))
}

fn port(theirs: &iced_x86::Instruction, operand: u32) -> Port {
    match theirs.op_kind(operand) {
        OpKind::Register => Port::Dx,
        _ => Port::Immediate(theirs.immediate8()),
    }
}

fn width_of(size: MemorySize) -> Option<Width> {
    width_of_bytes(size.size())
}

fn width_of_bytes(bytes: usize) -> Option<Width> {
    [Width::Byte, Width::Word, Width::Dword, Width::Qword]
        .into_iter()
        .find(|width| usize::from(width.bytes()) == bytes)
}

/// Registers with distinct values, so that a wrong one is seen in the address.
struct Distinct;

impl Registers for Distinct {
    fn gpr(&self, gpr: Gpr) -> u64 {
        let number = u32::from(gpr.number());
        0x0123_4567_89ab_cdef_u64.rotate_left(number * 7) ^ (u64::from(number) << 20)
    }
    fn set_gpr(&mut self, _: Gpr, _: u64) {}
    fn rip(&self) -> u64 {
        RIP
    }
    fn rflags(&self) -> u64 {
        2
    }
    fn set_rflags(&mut self, _: u64) {}
    fn segment_base(&self, segment: Segment) -> u64 {
        0x10_0000 * (segment as u64 + 1) + 0x7000_0000
    }
}

/// Compares the linear address of each memory operand.
pub(crate) fn check_addresses(
    ours: &Instruction,
    theirs: &iced_x86::Instruction,
    context: &dyn Fn() -> String,
) {
    for operand in 0..theirs.op_count() {
        match theirs.op_kind(operand) {
            OpKind::Memory => check_memory(ours, theirs, operand, context),
            OpKind::MemorySegSI | OpKind::MemorySegESI | OpKind::MemorySegRSI => {
                assert_eq!(ours.string_source(&Distinct), linear(ours, theirs, operand), "{}", context());
            }
            OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI => {
                assert_eq!(
                    ours.string_destination(&Distinct),
                    linear(ours, theirs, operand),
                    "{}",
                    context()
                );
            }
            _ => {}
        }
    }
}

fn check_memory(
    ours: &Instruction,
    theirs: &iced_x86::Instruction,
    operand: u32,
    context: &dyn Fn() -> String,
) {
    // XLAT has no ModRM byte; LEA computes an offset and no address.
    if matches!(theirs.mnemonic(), Mnemonic::Xlatb | Mnemonic::Lea) {
        return;
    }
    if !matches!(theirs.encoding(), EncodingKind::Legacy | EncodingKind::D3NOW) {
        assert_eq!(ours.memory(), None, "{}", context());
        return;
    }
    let memory = ours.memory().unwrap_or_else(|| panic!("{}", context()));
    assert_eq!(ours.effective_address(&Distinct), Some(linear(ours, theirs, operand)), "{}", context());
    assert_eq!(memory.index().is_some(), theirs.memory_index() != Theirs::None, "{}", context());
    if memory.index().is_some() {
        assert_eq!(u32::from(memory.scale()), theirs.memory_index_scale(), "{}", context());
    }
    let relative = memory.base() == Base::NextInstruction;
    assert_eq!(relative, theirs.is_ip_rel_memory_operand(), "{}", context());
}

fn linear(ours: &Instruction, theirs: &iced_x86::Instruction, operand: u32) -> u64 {
    let long = ours.mode() == CpuMode::Bits64;
    let value = |register: Theirs| {
        let segment = match register {
            Theirs::ES => Segment::Es,
            Theirs::CS => Segment::Cs,
            Theirs::SS => Segment::Ss,
            Theirs::DS => Segment::Ds,
            Theirs::FS => Segment::Fs,
            Theirs::GS => Segment::Gs,
            _ => {
                let whole = Distinct.gpr(Gpr::ALL[register.full_register().number()]);
                return Some(width_of_bytes(register.size())?.truncate(whole));
            }
        };
        let flat = long && !matches!(segment, Segment::Fs | Segment::Gs);
        Some(if flat { 0 } else { Distinct.segment_base(segment) })
    };
    let linear = theirs.virtual_address(operand, 0, |register, _, _| value(register));
    let linear = linear.expect("every register has a value");
    if long { linear } else { linear & 0xffff_ffff }
}
