//! What follows each opcode: the encoding tables of the one-byte and the 0F map, and which instructions a LOCK
//! prefix may precede.
//!
//! Constants and pure functions. Sources: Intel SDM volume 2, appendix A; AMD APM volume 3, appendix A.

/// What follows an opcode: a set of the constants below.
pub(crate) type Encoding = u8;

/// A `ModRM` byte, with SIB and displacement as it says.
pub(crate) const M: Encoding = 1 << 0;
/// An immediate of one byte.
pub(crate) const B: Encoding = 1 << 1;
/// An immediate of two bytes.
pub(crate) const W: Encoding = 1 << 2;
/// An immediate of the operand size, at most four bytes.
pub(crate) const Z: Encoding = 1 << 3;
/// Undefined.
pub(crate) const U: Encoding = 1 << 4;
/// Undefined in 64-bit mode.
pub(crate) const L: Encoding = 1 << 5;
/// More than the other bits say; the decoder knows the opcode.
pub(crate) const S: Encoding = 1 << 6;

const MB: Encoding = M | B;
const MZ: Encoding = M | Z;
const MS: Encoding = M | S;
const LB: Encoding = L | B;
const LM: Encoding = L | M;
const WB: Encoding = W | B;
const LMB: Encoding = L | M | B;
/// A far pointer.
const LS: Encoding = L | S;

/// The one-byte map. Prefixes, escapes and, in 64-bit mode, REX never look here.
#[rustfmt::skip]
pub(crate) const ONE_BYTE: [Encoding; 256] = [
//  0  1  2  3  4  5  6  7  8  9  a  b  c  d  e  f
    M, M, M, M, B, Z, L, L, M, M, M, M, B, Z, L, U, // 0_
    M, M, M, M, B, Z, L, L, M, M, M, M, B, Z, L, L, // 1_
    M, M, M, M, B, Z, U, L, M, M, M, M, B, Z, U, L, // 2_
    M, M, M, M, B, Z, U, L, M, M, M, M, B, Z, U, L, // 3_
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // 4_
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // 5_
    L, L, LM,M, U, U, U, U, Z, MZ,B, MB,0, 0, 0, 0, // 6_
    B, B, B, B, B, B, B, B, B, B, B, B, B, B, B, B, // 7_
    MB,MZ,LMB,MB,M,M, M, M, M, M, M, M, MS,MS,MS,MS,// 8_
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, LS,0, 0, 0, 0, 0, // 9_
    S, S, S, S, 0, 0, 0, 0, B, Z, 0, 0, 0, 0, 0, 0, // a_
    B, B, B, B, B, B, B, B, S, S, S, S, S, S, S, S, // b_
    MB,MB,W, 0, LM,LM,MS,MS,WB,0, W, 0, 0, B, L, 0, // c_
    M, M, M, M, LB,LB,L, 0, M, M, M, M, M, M, M, M, // d_
    B, B, B, B, B, B, B, B, Z, Z, LS,B, 0, 0, 0, 0, // e_
    U, 0, U, U, 0, 0, MS,MS,0, 0, 0, 0, 0, 0, MS,MS,// f_
];

/// The 0F map. The escapes 0F 38 and 0F 3A never look here.
#[rustfmt::skip]
pub(crate) const TWO_BYTE: [Encoding; 256] = [
//  0  1  2  3  4  5  6  7  8  9  a  b  c  d  e  f
    MS,MS,M, M, U, 0, 0, 0, 0, 0, U, 0, U, M, 0, MB,// 0_
    M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, // 1_
    MS,MS,MS,MS,U, U, U, U, M, M, M, M, M, M, M, M, // 2_
    0, 0, 0, 0, 0, 0, U, 0, U, U, U, U, U, U, U, U, // 3_
    M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, // 4_
    M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, // 5_
    M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, // 6_
    MB,MB,MB,MB,M, M, M, 0, MS,M, U, U, M, M, M, M, // 7_
    Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, Z, // 8_
    M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, // 9_
    0, 0, 0, M, MB,M, M, M, 0, 0, 0, M, MB,M, M, M, // a_
    M, M, M, M, M, M, M, M, MS,M, MS,M, M, M, M, M, // b_
    M, M, MB,M, MB,MB,MB,M, 0, 0, 0, 0, 0, 0, 0, 0, // c_
    M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, // d_
    M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, // e_
    M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, M, // f_
];

/// What follows an opcode of the VEX, EVEX or XOP `map`, besides the prefix itself; undefined for maps that
/// hold no instructions. An immediate of four bytes is [`Z`], since no operand-size prefix may stand there.
pub(crate) const fn extended(space: Space, map: u8, opcode: u8) -> Encoding {
    match (space, map) {
        (Space::Vex, 1) if opcode == 0x77 => 0, // VZEROUPPER, VZEROALL
        (Space::Vex | Space::Evex, 1) => match opcode {
            0x70..=0x73 | 0xc2 | 0xc4..=0xc6 => MB,
            _ => M,
        },
        (Space::Vex | Space::Evex, 2) | (Space::Evex, 5 | 6) | (Space::Xop, 9) => M,
        (Space::Vex | Space::Evex, 3) | (Space::Xop, 8) => MB,
        (Space::Vex, 7) | (Space::Xop, 10) => MZ,
        _ => U,
    }
}

/// The kinds of prefix that name an opcode map in a field.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    /// C4 and C5.
    Vex,
    /// 62.
    Evex,
    /// 8F.
    Xop,
}

/// Whether a LOCK prefix may precede the instruction in the one-byte map, given that `ModRM` names memory.
pub(crate) const fn lockable_one_byte(opcode: u8, reg: u8) -> bool {
    match opcode {
        0x00..=0x37 => opcode & 6 == 0, // arithmetic but CMP, memory destination
        0x80..=0x83 => reg != 7,
        0x86 | 0x87 => true,
        0xf6 | 0xf7 => matches!(reg, 2 | 3),
        0xfe | 0xff => matches!(reg, 0 | 1),
        _ => false,
    }
}

/// The same in the 0F map.
pub(crate) const fn lockable_two_byte(opcode: u8, reg: u8) -> bool {
    match opcode {
        0xab | 0xb0 | 0xb1 | 0xb3 | 0xbb | 0xc0 | 0xc1 => true,
        0xba => matches!(reg, 5..=7),
        0xc7 => reg == 1,
        _ => false,
    }
}
