//! Arithmetic on memory compared with the processor that runs the test: results and flags.
#![cfg(target_arch = "x86_64")]

mod common;

use common::{Cpu, Memory, run};
use core::arch::asm;
use vmmu_emulate::{Completion, CpuMode, Gpr, Registers, Width};

/// CF, PF, AF, ZF, SF and OF.
const ARITHMETIC: u64 = 0x8d5;
const AF: u64 = 1 << 4;
/// The bit that is always set, and interrupts.
const OTHERS: u64 = 0x202;

/// An instruction on `rax` and `rcx`, or the parts of them named; takes and gives RFLAGS.
type Native = fn(rax: &mut u64, rcx: u64, rflags: &mut u64);

macro_rules! native {
    ($code:expr) => {
        |rax, rcx, rflags| {
            // SAFETY: the stack is balanced, RAX is the only register written, and RFLAGS gets no bits but the
            // arithmetic flags and those that user code cannot change.
            unsafe {
                asm!(
                    "push {flags}",
                    "popfq",
                    $code,
                    "pushfq",
                    "pop {flags}",
                    flags = inout(reg) *rflags,
                    inout("rax") *rax,
                    in("rcx") rcx,
                );
            }
        }
    };
}

/// An operation on two operands: its name, the opcodes on bytes of `memory, register` and `register, memory`
/// (where there is one), and the processor's own by width.
type Binary = (&'static str, u8, Option<u8>, [Native; 4]);

macro_rules! binary {
    ($name:literal, $to_memory:literal, $to_register:expr) => {
        (
            $name,
            $to_memory,
            $to_register,
            [
                native!(concat!($name, " al, cl")),
                native!(concat!($name, " ax, cx")),
                native!(concat!($name, " eax, ecx")),
                native!(concat!($name, " rax, rcx")),
            ],
        )
    };
}

const BINARY: [Binary; 9] = [
    binary!("add", 0x00, Some(0x02)),
    binary!("or", 0x08, Some(0x0a)),
    binary!("adc", 0x10, Some(0x12)),
    binary!("sbb", 0x18, Some(0x1a)),
    binary!("and", 0x20, Some(0x22)),
    binary!("sub", 0x28, Some(0x2a)),
    binary!("xor", 0x30, Some(0x32)),
    binary!("cmp", 0x38, Some(0x3a)),
    binary!("test", 0x84, None),
];

/// An operation on one operand: its name, its opcode on bytes, its number in the opcode's group.
type Unary = (&'static str, u8, u8, [Native; 4]);

macro_rules! unary {
    ($name:literal, $opcode:literal, $reg:literal) => {
        (
            $name,
            $opcode,
            $reg,
            [
                native!(concat!($name, " al")),
                native!(concat!($name, " ax")),
                native!(concat!($name, " eax")),
                native!(concat!($name, " rax")),
            ],
        )
    };
}

const UNARY: [Unary; 4] =
    [unary!("not", 0xf6, 2), unary!("neg", 0xf6, 3), unary!("inc", 0xfe, 0), unary!("dec", 0xfe, 1)];

const WIDTHS: [Width; 4] = [Width::Byte, Width::Word, Width::Dword, Width::Qword];

/// The instruction with `opcode` on bytes, at `width`, with memory at RBX and `reg` in `ModRM`.
fn code(opcode: u8, width: Width, reg: u8) -> Vec<u8> {
    let modrm = reg << 3 | 3;
    match width {
        Width::Byte => vec![opcode, modrm],
        Width::Word => vec![0x66, opcode | 1, modrm],
        Width::Dword => vec![opcode | 1, modrm],
        Width::Qword => vec![0x48, opcode | 1, modrm],
    }
}

/// Values at which carries, signs and zeros turn over, at every width.
fn values() -> Vec<u64> {
    let mut values = vec![0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210, 0x0f, 0x10, 0x8f8f_8f8f_8f8f_8f8f];
    for bits in [8, 16, 32, 64] {
        let (all, sign) = (u64::MAX >> (64 - bits), 1 << (bits - 1));
        values.extend([0, 1, 2, all, all - 1, sign, sign - 1, sign + 1]);
    }
    values.sort_unstable();
    values.dedup();
    values
}

/// RFLAGS with every combination of carry and the others, which must not matter.
const FLAGS: [u64; 4] = [OTHERS, OTHERS | 1, OTHERS | ARITHMETIC, OTHERS | ARITHMETIC & !1];

/// Carries out `code` on `memory`, with RAX and RCX as given.
fn emulate(code: &[u8], memory: u64, rax: u64, rcx: u64, rflags: u64) -> (u64, Cpu) {
    let mut cpu = Cpu { rflags, ..Cpu::default() };
    cpu.set_gpr(Gpr::Rax, rax);
    cpu.set_gpr(Gpr::Rcx, rcx);
    cpu.set_gpr(Gpr::Rbx, Memory::BASE);
    let mut ram = Memory::new();
    ram.bytes[..8].copy_from_slice(&memory.to_le_bytes());
    assert_eq!(run(code, CpuMode::Bits64, &mut cpu, &mut ram), Ok(Completion::Done), "{code:02x?}");
    (ram.value(0, Width::Qword), cpu)
}

/// `part` in place of the low `width` of `whole`, as memory keeps the bytes beyond an operand.
fn insert(whole: u64, part: u64, width: Width) -> u64 {
    let mask = width.truncate(u64::MAX);
    (whole & !mask) | (part & mask)
}

#[test]
fn two_operands() {
    for (name, to_memory, to_register, native) in BINARY {
        // AF is undefined after logical operations.
        let logical = matches!(name, "or" | "and" | "xor" | "test");
        let defined = if logical { !AF } else { !0 };
        for (width, native) in WIDTHS.into_iter().zip(native) {
            for (a, b) in values().into_iter().flat_map(|a| values().into_iter().map(move |b| (a, b))) {
                for rflags in FLAGS {
                    let (mut rax, mut native_flags) = (a, rflags);
                    native(&mut rax, b, &mut native_flags);
                    let context = format!("{name} {width:?} {a:#x}, {b:#x}, flags {rflags:#x}");

                    let (memory, cpu) = emulate(&code(to_memory, width, 1), a, 0, b, rflags);
                    assert_eq!(memory, insert(a, rax, width), "{context}");
                    assert_eq!(cpu.rflags & defined, native_flags & defined, "{context}");
                    assert_eq!(cpu.gpr(Gpr::Rcx), b, "{context}");

                    if let Some(opcode) = to_register {
                        let (memory, cpu) = emulate(&code(opcode, width, 0), b, a, 0, rflags);
                        // A comparison does not write, so it does not clear the upper half either.
                        assert_eq!(cpu.gpr(Gpr::Rax), rax, "{context}");
                        assert_eq!(cpu.rflags & defined, native_flags & defined, "{context}");
                        assert_eq!(memory, b, "{context}");
                    }
                }
            }
        }
    }
}

#[test]
fn one_operand() {
    for (name, opcode, reg, native) in UNARY {
        for (width, native) in WIDTHS.into_iter().zip(native) {
            for (a, rflags) in values().into_iter().flat_map(|a| FLAGS.map(|flags| (a, flags))) {
                let (mut rax, mut native_flags) = (a, rflags);
                native(&mut rax, 0, &mut native_flags);
                let (memory, cpu) = emulate(&code(opcode, width, reg), a, 0, 0, rflags);
                let context = format!("{name} {width:?} {a:#x}, flags {rflags:#x}");
                assert_eq!(memory, insert(a, rax, width), "{context}");
                assert_eq!(cpu.rflags, native_flags, "{context}");
            }
        }
    }
}

#[test]
fn immediates_are_sign_extended() {
    // The group's opcode 83: an immediate of one byte for operands of any width; 80 for bytes.
    for (number, (name, .., native)) in (0_u8..).zip(BINARY).take(8) {
        for (width, native) in WIDTHS.into_iter().zip(native) {
            for (a, immediate) in
                values().into_iter().flat_map(|a| [0_i8, 1, -1, 0x7f, -0x80].map(|i| (a, i)))
            {
                let mut code = code(0x82, width, number);
                if width == Width::Byte {
                    code[0] = 0x80;
                }
                code.push(immediate.cast_unsigned());
                let b = i64::from(immediate).cast_unsigned();
                let (mut rax, mut native_flags) = (a, OTHERS | 1);
                native(&mut rax, b, &mut native_flags);
                let (memory, cpu) = emulate(&code, a, 0, 0, OTHERS | 1);
                assert_eq!(memory, insert(a, rax, width), "{name} {width:?} {a:#x}, {immediate}");
                assert_eq!(cpu.rflags & !AF, native_flags & !AF, "{name} {width:?} {a:#x}, {immediate}");
            }
        }
    }
}
