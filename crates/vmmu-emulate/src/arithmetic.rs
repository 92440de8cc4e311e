//! Results and flags of the integer operations that may have a memory operand.
//!
//! Pure functions. Invariant: only the six arithmetic flags change, and those that the architecture leaves
//! undefined (AF after a logical operation) are cleared.

use crate::instruction::{BinaryOp, UnaryOp};
use crate::register::Width;

/// Carry.
pub(crate) const CF: u64 = 1 << 0;
/// Even number of ones in the low byte.
pub(crate) const PF: u64 = 1 << 2;
/// Carry out of bit 3.
pub(crate) const AF: u64 = 1 << 4;
/// Zero.
pub(crate) const ZF: u64 = 1 << 6;
/// The result's top bit.
pub(crate) const SF: u64 = 1 << 7;
/// Overflow of the signed result.
pub(crate) const OF: u64 = 1 << 11;

const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;

/// `a op b`, and RFLAGS after it. Only the low `width` of the operands counts.
pub(crate) fn binary(op: BinaryOp, width: Width, a: u64, b: u64, rflags: u64) -> (u64, u64) {
    let (a, b) = (width.truncate(a), width.truncate(b));
    let carry = rflags & CF;
    let (result, flags) = match op {
        BinaryOp::Add => add(width, a, b, 0),
        BinaryOp::Adc => add(width, a, b, carry),
        BinaryOp::Sub | BinaryOp::Cmp => subtract(width, a, b, 0),
        BinaryOp::Sbb => subtract(width, a, b, carry),
        BinaryOp::And | BinaryOp::Test => (a & b, 0),
        BinaryOp::Or => (a | b, 0),
        BinaryOp::Xor => (a ^ b, 0),
    };
    (result, (rflags & !ARITHMETIC) | flags | of_result(width, result))
}

/// `op a`, and RFLAGS after it. NOT changes no flag; INC and DEC leave the carry.
pub(crate) fn unary(op: UnaryOp, width: Width, a: u64, rflags: u64) -> (u64, u64) {
    let keep_carry = |(result, flags): (u64, u64)| (result, (flags & !CF) | (rflags & CF));
    match op {
        UnaryOp::Not => (width.truncate(!a), rflags),
        UnaryOp::Neg => binary(BinaryOp::Sub, width, 0, a, rflags),
        UnaryOp::Inc => keep_carry(binary(BinaryOp::Add, width, a, 1, rflags)),
        UnaryOp::Dec => keep_carry(binary(BinaryOp::Sub, width, a, 1, rflags)),
    }
}

/// The sum, with CF, AF and OF.
fn add(width: Width, a: u64, b: u64, carry: u64) -> (u64, u64) {
    let result = width.truncate(a.wrapping_add(b).wrapping_add(carry));
    let carries = (a & b) | ((a | b) & !result);
    let overflow = (a ^ result) & (b ^ result);
    (result, carry_flags(width, carries, overflow))
}

/// The difference, with CF, AF and OF.
fn subtract(width: Width, a: u64, b: u64, borrow: u64) -> (u64, u64) {
    let result = width.truncate(a.wrapping_sub(b).wrapping_sub(borrow));
    let borrows = (!a & b) | ((!a | b) & result);
    let overflow = (a ^ b) & (a ^ result);
    (result, carry_flags(width, borrows, overflow))
}

/// CF, AF and OF from the carry out of each bit and the overflow of each bit.
fn carry_flags(width: Width, carries: u64, overflow: u64) -> u64 {
    let top = width.bits() - 1;
    let mut flags = 0;
    if carries >> top & 1 != 0 {
        flags |= CF;
    }
    if carries >> 3 & 1 != 0 {
        flags |= AF;
    }
    if overflow >> top & 1 != 0 {
        flags |= OF;
    }
    flags
}

/// PF, ZF and SF.
fn of_result(width: Width, result: u64) -> u64 {
    let mut flags = 0;
    if (result & 0xff).count_ones().is_multiple_of(2) {
        flags |= PF;
    }
    if result == 0 {
        flags |= ZF;
    }
    if result >> (width.bits() - 1) & 1 != 0 {
        flags |= SF;
    }
    flags
}
