//! The x86 instructions that a trapping hypervisor must decode and carry out.
//!
//! An exit often tells what happened but not where the next instruction starts, and a nested page fault on a
//! device tells an address but not what was to be moved. This crate answers from the instruction's bytes:
//!
//! - [`decode()`] gives the [`Instruction`]: its length in any mode, and, for what exits need, the operation
//!   ([`Op`]) with its operands;
//! - [`length_of_known`] gives only the length of an instruction that the exit already named, in a few
//!   instructions for the usual encodings;
//! - [`Instruction::effective_address`] computes the linear address of the memory operand;
//! - [`execute()`] carries out loads, stores and arithmetic on memory against a [`Bus`], with the register rules
//!   of the architecture.
//!
//! It is `no_std`, allocates nothing, has no dependency and holds no `unsafe`.
//!
//! # A device access
//! ```
//! use vmmu_emulate::{Bus, Completion, CpuMode, Gpr, Registers, Segment, Width, decode, execute};
//!
//! #[derive(Default)]
//! struct Cpu { gprs: [u64; 16], rip: u64, rflags: u64 }
//! impl Registers for Cpu {
//!     fn gpr(&self, gpr: Gpr) -> u64 { self.gprs[gpr.number() as usize] }
//!     fn set_gpr(&mut self, gpr: Gpr, value: u64) { self.gprs[gpr.number() as usize] = value }
//!     fn rip(&self) -> u64 { self.rip }
//!     fn rflags(&self) -> u64 { self.rflags }
//!     fn set_rflags(&mut self, value: u64) { self.rflags = value }
//!     fn segment_base(&self, _: Segment) -> u64 { 0 }
//! }
//!
//! /// A device of one register, at 0xfee0_0020.
//! struct Id(u32);
//! impl Bus for Id {
//!     type Error = ();
//!     fn read(&mut self, linear: u64, width: Width) -> Result<u64, ()> {
//!         if linear == 0xfee0_0020 && width == Width::Dword { Ok(self.0.into()) } else { Err(()) }
//!     }
//!     fn write(&mut self, _: u64, _: Width, _: u64) -> Result<(), ()> { Err(()) }
//! }
//!
//! let mut cpu = Cpu { rip: 0x1000, ..Cpu::default() };
//! cpu.set_gpr(Gpr::Rbx, 0xfee0_0000);
//! cpu.set_gpr(Gpr::Rax, u64::MAX);
//! let instruction = decode(&[0x8b, 0x43, 0x20], CpuMode::Bits64).unwrap(); // mov eax, [rbx+0x20]
//! assert_eq!(execute(&instruction, &mut cpu, &mut Id(0x0300_0000)), Ok(Completion::Done));
//! assert_eq!(cpu.gpr(Gpr::Rax), 0x0300_0000); // the upper half is cleared
//! cpu.rip = instruction.next_rip(cpu.rip);
//! assert_eq!(cpu.rip, 0x1003);
//! ```
#![no_std]
#![forbid(unsafe_code)]

mod arithmetic;
mod classify;
mod decode;
mod execute;
mod instruction;
mod known;
mod opcode;
mod register;

pub use decode::{DecodeError, MAX_LENGTH, decode};
pub use execute::{Bus, Completion, ExecuteError, execute};
pub use instruction::{
    Base, BinaryOp, CpuMode, Extend, Instruction, MemoryOperand, Op, Operand, Port, Repeat, Source, UnaryOp,
};
pub use known::{Known, length_of_known};
pub use register::{Gpr, Register, Registers, Segment, Width};

/// The README's examples.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
