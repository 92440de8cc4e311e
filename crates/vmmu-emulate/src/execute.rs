//! Carrying out loads, stores, exchanges, arithmetic on memory and string moves against a [`Bus`].
//!
//! Touches registers only through [`Registers`] and memory only through [`Bus`]. Invariant: registers and flags
//! change after the last bus access, so that an error of the bus leaves the processor as it was.

use crate::arithmetic;
use crate::instruction::{BinaryOp, Extend, Instruction, Op, Repeat};
use crate::register::{Gpr, Register, Registers, Width};
use core::fmt;

/// What stands behind linear addresses: devices, and for string moves also memory.
///
/// The implementation translates the address, checks access, and splits what crosses a page.
pub trait Bus {
    /// Why an access cannot be made: a fault for the guest, or a failure of the hypervisor.
    type Error;

    /// Reads `width` at the linear address; the bits of the result above it are ignored.
    fn read(&mut self, linear: u64, width: Width) -> Result<u64, Self::Error>;

    /// Writes the low `width` of `value` at the linear address; the bits above are zero.
    fn write(&mut self, linear: u64, width: Width, value: u64) -> Result<(), Self::Error>;
}

/// How far an instruction got.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[must_use]
pub enum Completion {
    /// It is complete: RIP is to become [`Instruction::next_rip`].
    Done,
    /// One repetition of a string instruction is complete and more are to come: RIP stays, so that
    /// interrupts can be taken in between; execute again or enter the guest.
    Repeat,
}

/// Why an instruction was not carried out; registers and flags are unchanged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ExecuteError<E> {
    /// The bus refused. Of two accesses the first may have been made.
    Bus(E),
    /// The operation is none of those that [`execute`] knows.
    Unsupported(Op),
}

impl<E> From<E> for ExecuteError<E> {
    fn from(error: E) -> Self {
        Self::Bus(error)
    }
}

impl<E: fmt::Display> fmt::Display for ExecuteError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bus(error) => write!(f, "bus access failed: {error}"),
            Self::Unsupported(op) => write!(f, "no emulation of {op:?}"),
        }
    }
}

impl<E: core::error::Error + 'static> core::error::Error for ExecuteError<E> {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Bus(error) => Some(error),
            Self::Unsupported(_) => None,
        }
    }
}

/// Carries out [`Op::Load`], [`Op::Store`], [`Op::Exchange`], [`Op::BinaryMemory`], [`Op::BinaryRegister`],
/// [`Op::Unary`], and one repetition of [`Op::Movs`], [`Op::Stos`] and [`Op::Lods`]. RIP is the caller's to
/// move.
///
/// A read and a write of one instruction are two accesses of the bus, with or without a LOCK prefix: right for
/// devices, not for memory that another processor writes.
pub fn execute<R: Registers, B: Bus>(
    instruction: &Instruction,
    registers: &mut R,
    bus: &mut B,
) -> Result<Completion, ExecuteError<B::Error>> {
    match instruction.op {
        Op::Movs(width) | Op::Stos(width) | Op::Lods(width) => string(instruction, width, registers, bus),
        op => match instruction.effective_address(registers) {
            Some(linear) => single(op, linear, registers, bus),
            None => Err(ExecuteError::Unsupported(op)),
        },
    }
}

fn single<R: Registers, B: Bus>(
    op: Op,
    linear: u64,
    registers: &mut R,
    bus: &mut B,
) -> Result<Completion, ExecuteError<B::Error>> {
    match op {
        Op::Load { to, width, extend } => {
            let value = bus.read(linear, width)?;
            let value = match extend {
                Extend::Zero => width.truncate(value),
                Extend::Sign => width.sign_extend(value),
            };
            to.write(registers, value);
        }
        Op::Store { from, width } => bus.write(linear, width, width.truncate(from.read(registers)))?,
        Op::Exchange { with } => {
            let value = bus.read(linear, with.width())?;
            bus.write(linear, with.width(), with.read(registers))?;
            with.write(registers, value);
        }
        Op::BinaryMemory { op, with, width } => {
            let old = bus.read(linear, width)?;
            let (new, rflags) = arithmetic::binary(op, width, old, with.read(registers), registers.rflags());
            if !matches!(op, BinaryOp::Cmp | BinaryOp::Test) {
                bus.write(linear, width, new)?;
            }
            registers.set_rflags(rflags);
        }
        Op::BinaryRegister { op, to } => {
            let operand = bus.read(linear, to.width())?;
            let old = to.read(registers);
            let (new, rflags) = arithmetic::binary(op, to.width(), old, operand, registers.rflags());
            if !matches!(op, BinaryOp::Cmp | BinaryOp::Test) {
                to.write(registers, new);
            }
            registers.set_rflags(rflags);
        }
        Op::Unary { op, width } => {
            let old = bus.read(linear, width)?;
            let (new, rflags) = arithmetic::unary(op, width, old, registers.rflags());
            bus.write(linear, width, new)?;
            registers.set_rflags(rflags);
        }
        _ => return Err(ExecuteError::Unsupported(op)),
    }
    Ok(Completion::Done)
}

/// RFLAGS.DF: string instructions go downwards.
const DF: u64 = 1 << 10;

/// One repetition of MOVS, STOS or LODS. Both repeat prefixes repeat.
fn string<R: Registers, B: Bus>(
    instruction: &Instruction,
    width: Width,
    registers: &mut R,
    bus: &mut B,
) -> Result<Completion, ExecuteError<B::Error>> {
    let count = Register::low(Gpr::Rcx, instruction.address_width);
    let repeats = instruction.repeat != Repeat::None;
    if repeats && count.read(registers) == 0 {
        return Ok(Completion::Done);
    }
    let accumulator = Register::low(Gpr::Rax, width);
    let (reads, writes) = match instruction.op {
        Op::Movs(_) => (true, true),
        Op::Lods(_) => (true, false),
        _ => (false, true),
    };
    let value = if reads {
        width.truncate(bus.read(instruction.string_source(registers), width)?)
    } else {
        accumulator.read(registers)
    };
    if writes {
        bus.write(instruction.string_destination(registers), width, value)?;
    } else {
        accumulator.write(registers, value);
    }

    let step = u64::from(width.bytes());
    let step = if registers.rflags() & DF == 0 { step } else { step.wrapping_neg() };
    if reads {
        advance(Gpr::Rsi, step, instruction, registers);
    }
    if writes {
        advance(Gpr::Rdi, step, instruction, registers);
    }
    if !repeats {
        return Ok(Completion::Done);
    }
    let left = count.read(registers).wrapping_sub(1);
    count.write(registers, left);
    Ok(if left == 0 { Completion::Done } else { Completion::Repeat })
}

/// Adds to the part of an index register that the address size uses.
fn advance<R: Registers>(gpr: Gpr, step: u64, instruction: &Instruction, registers: &mut R) {
    let index = Register::low(gpr, instruction.address_width);
    let value = index.read(registers).wrapping_add(step);
    index.write(registers, value);
}
