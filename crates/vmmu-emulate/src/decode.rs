//! From bytes to an [`Instruction`]: prefixes, opcode maps, `ModRM`, SIB, displacements, immediates.
//!
//! Reads only the bytes it is given, each once, front to back. Invariants: never more than 15 bytes are read;
//! a success consumed exactly the instruction's length; what the bytes after it hold does not matter.

use crate::classify;
use crate::instruction::{Base, CpuMode, Instruction, MemoryOperand, Repeat};
use crate::opcode::{self, B, Encoding, L, M, S, Space, U, W, Z};
use crate::register::{Gpr, Segment, Width};
use core::fmt;

/// The most bytes an instruction can have; a longer one raises #GP (Intel SDM volume 2, 2.3.11; AMD APM
/// volume 3, 1.1).
pub const MAX_LENGTH: usize = 15;

/// Why bytes were not decoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum DecodeError {
    /// The bytes end inside the instruction.
    TooShort {
        /// The fewest bytes with which decoding gets further, 1 to 15; more may be needed then.
        at_least: u8,
    },
    /// The instruction would have more than 15 bytes: the processor raises #GP.
    TooLong,
    /// Undefined: the processor raises #UD. Not every undefined encoding is recognised; but what decodes to a
    /// named operation of [`crate::Op`] is defined.
    Invalid,
    /// The bytes are an instruction, but not the one that the exit named
    /// ([`length_of_known`](crate::length_of_known)): the guest replaced its code between executing it and the
    /// fetch. Entering it again is right.
    Unexpected,
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooShort { at_least } => write!(f, "instruction cut off: at least {at_least} bytes needed"),
            Self::TooLong => f.write_str("instruction longer than 15 bytes"),
            Self::Invalid => f.write_str("undefined instruction"),
            Self::Unexpected => f.write_str("another instruction than the exit named"),
        }
    }
}

impl core::error::Error for DecodeError {}

/// Decodes the instruction at the start of `bytes`, which may hold more than the instruction, or less than 15
/// bytes where that suffices.
///
/// ```
/// use vmmu_emulate::{CpuMode, DecodeError, Gpr, Op, decode};
///
/// let instruction = decode(&[0x0f, 0x22, 0xd8, 0x90], CpuMode::Bits64).unwrap(); // mov cr3, rax
/// assert_eq!(instruction.len(), 3);
/// assert_eq!(instruction.op(), Op::MovToCr { cr: 3, gpr: Gpr::Rax });
/// assert_eq!(decode(&[0x0f, 0x22], CpuMode::Bits64), Err(DecodeError::TooShort { at_least: 3 }));
/// ```
pub fn decode(bytes: &[u8], mode: CpuMode) -> Result<Instruction, DecodeError> {
    if let [0x0f, opcode @ 0x20..=0x23, modrm, ..] = *bytes {
        return decode_system_move(mode, opcode, modrm);
    }
    let mut cursor = Cursor { bytes, at: 0 };
    let mut prefixes = Prefixes::default();
    let first = prefixes.read(&mut cursor, mode)?;
    let (map, opcode, encoding) = read_opcode(&mut cursor, mode, prefixes, first)?;
    if encoding & U != 0 || (encoding & L != 0 && mode == CpuMode::Bits64) {
        return Err(DecodeError::Invalid);
    }

    let mut parts = Parts {
        mode,
        map,
        opcode,
        operand_width: prefixes.operand_width(mode),
        address_width: prefixes.address_width(mode),
        prefixes,
        modrm: ModRm::default(),
        memory: None,
        immediate: 0,
    };
    if encoding & M != 0 {
        parts.read_modrm(&mut cursor)?;
    }
    parts.read_immediates(&mut cursor, encoding)?;

    let op = match map {
        Map::Extended => {
            parts.memory = None;
            crate::Op::Other
        }
        _ => classify::classify(&parts)?,
    };
    let len = cursor.at as u8;
    Ok(Instruction {
        len,
        mode,
        repeat: parts.prefixes.repeat,
        lock: parts.prefixes.lock,
        segment: parts.prefixes.segment,
        operand_width: parts.operand_width,
        address_width: parts.address_width,
        memory: parts.memory,
        op,
    })
}

/// MOV with a control or debug register and no prefix: exits for these are frequent, and all there is to know
/// is in one byte.
#[inline]
fn decode_system_move(mode: CpuMode, opcode: u8, modrm: u8) -> Result<Instruction, DecodeError> {
    let modrm = ModRm { byte: modrm };
    let gpr = Gpr::from_low_bits(modrm.rm());
    let op = classify::system_register(opcode, modrm.reg(), gpr)?;
    let prefixes = Prefixes::default();
    Ok(Instruction {
        len: 3,
        mode,
        repeat: prefixes.repeat,
        lock: prefixes.lock,
        segment: prefixes.segment,
        operand_width: prefixes.operand_width(mode),
        address_width: prefixes.address_width(mode),
        memory: None,
        op,
    })
}

/// The bytes, and how many have been read.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    #[inline]
    fn take<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let end = self.at + N;
        if end > MAX_LENGTH {
            return Err(DecodeError::TooLong);
        }
        match self.bytes.get(self.at..end) {
            Some(taken) => {
                self.at = end;
                let mut array = [0; N];
                array.copy_from_slice(taken);
                Ok(array)
            }
            None => Err(DecodeError::TooShort { at_least: end as u8 }),
        }
    }

    #[inline]
    fn u8(&mut self) -> Result<u8, DecodeError> {
        self.take::<1>().map(|[byte]| byte)
    }
    fn i8(&mut self) -> Result<i64, DecodeError> {
        self.take().map(|bytes| i8::from_le_bytes(bytes).into())
    }
    fn i16(&mut self) -> Result<i64, DecodeError> {
        self.take().map(|bytes| i16::from_le_bytes(bytes).into())
    }
    fn i32(&mut self) -> Result<i64, DecodeError> {
        self.take().map(|bytes| i32::from_le_bytes(bytes).into())
    }
    fn i64(&mut self) -> Result<i64, DecodeError> {
        self.take().map(i64::from_le_bytes)
    }
}

/// The legacy prefixes and REX.
#[derive(Clone, Copy, Default)]
pub(crate) struct Prefixes {
    pub(crate) repeat: Repeat,
    pub(crate) segment: Option<Segment>,
    pub(crate) lock: bool,
    /// 66.
    pub(crate) operand_size: bool,
    /// 67.
    pub(crate) address_size: bool,
    /// The REX byte, 0 where there is none.
    pub(crate) rex: u8,
}

impl Prefixes {
    /// Reads all prefixes and the byte after them. A REX that is not the last of them is void.
    #[inline]
    fn read(&mut self, cursor: &mut Cursor<'_>, mode: CpuMode) -> Result<u8, DecodeError> {
        let long = mode == CpuMode::Bits64;
        loop {
            let byte = cursor.u8()?;
            match byte {
                0x40..=0x4f if long => {
                    self.rex = byte;
                    continue;
                }
                // In 64-bit mode these four are ignored, also after FS or GS.
                0x26 | 0x2e | 0x36 | 0x3e if long => {}
                0x26 => self.segment = Some(Segment::Es),
                0x2e => self.segment = Some(Segment::Cs),
                0x36 => self.segment = Some(Segment::Ss),
                0x3e => self.segment = Some(Segment::Ds),
                0x64 => self.segment = Some(Segment::Fs),
                0x65 => self.segment = Some(Segment::Gs),
                0x66 => self.operand_size = true,
                0x67 => self.address_size = true,
                0xf0 => self.lock = true,
                0xf2 => self.repeat = Repeat::Repne,
                0xf3 => self.repeat = Repeat::Rep,
                _ => return Ok(byte),
            }
            self.rex = 0;
        }
    }

    pub(crate) const fn rex_w(self) -> bool {
        self.rex & 8 != 0
    }
    /// Bit 3 of the `ModRM` reg field.
    pub(crate) const fn rex_r(self) -> u8 {
        (self.rex & 4) << 1
    }
    /// Bit 3 of the SIB index field.
    const fn rex_x(self) -> u8 {
        (self.rex & 2) << 2
    }
    /// Bit 3 of the `ModRM` rm field, the SIB base field, or the register in an opcode.
    pub(crate) const fn rex_b(self) -> u8 {
        (self.rex & 1) << 3
    }

    const fn operand_width(self, mode: CpuMode) -> Width {
        match (mode, self.operand_size) {
            (CpuMode::Bits64, _) if self.rex_w() => Width::Qword,
            (CpuMode::Bits16, false) | (CpuMode::Bits32 | CpuMode::Bits64, true) => Width::Word,
            _ => Width::Dword,
        }
    }

    const fn address_width(self, mode: CpuMode) -> Width {
        match (mode, self.address_size) {
            (CpuMode::Bits64, false) => Width::Qword,
            (CpuMode::Bits16, false) | (CpuMode::Bits32, true) => Width::Word,
            _ => Width::Dword,
        }
    }
}

/// The opcode map.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Map {
    OneByte,
    /// 0F.
    TwoByte,
    /// 0F 38.
    ThreeByte38,
    /// 0F 3A.
    ThreeByte3a,
    /// VEX, EVEX, XOP.
    Extended,
}

/// Reads the rest of the opcode whose first byte is `first`.
#[inline]
fn read_opcode(
    cursor: &mut Cursor<'_>,
    mode: CpuMode,
    prefixes: Prefixes,
    first: u8,
) -> Result<(Map, u8, Encoding), DecodeError> {
    match first {
        0x0f => match cursor.u8()? {
            0x38 => Ok((Map::ThreeByte38, cursor.u8()?, M)),
            0x3a => Ok((Map::ThreeByte3a, cursor.u8()?, M | B)),
            opcode => Ok((Map::TwoByte, opcode, opcode::TWO_BYTE[opcode as usize])),
        },
        0x62 | 0xc4 | 0xc5 | 0x8f => read_extended_opcode(cursor, mode, prefixes, first),
        _ => Ok((Map::OneByte, first, opcode::ONE_BYTE[first as usize])),
    }
}

/// The same for a first byte that starts a VEX, EVEX or XOP prefix, unless what follows makes it BOUND, LES,
/// LDS or POP.
#[cold]
fn read_extended_opcode(
    cursor: &mut Cursor<'_>,
    mode: CpuMode,
    prefixes: Prefixes,
    first: u8,
) -> Result<(Map, u8, Encoding), DecodeError> {
    let start = cursor.at;
    let payload = cursor.u8()?;
    let (space, map) = match first {
        // POP has a reg field of 0, hence a map below 8.
        0x8f if payload & 0x1f >= 8 => (Space::Xop, payload & 0x1f),
        // BOUND, LES and LDS take memory only.
        0x62 | 0xc4 | 0xc5 if mode == CpuMode::Bits64 || payload >> 6 == 3 => match first {
            0x62 => (Space::Evex, payload & 0x0f),
            0xc4 => (Space::Vex, payload & 0x1f),
            _ => (Space::Vex, 1),
        },
        _ => {
            cursor.at = start;
            return Ok((Map::OneByte, first, opcode::ONE_BYTE[first as usize]));
        }
    };
    if prefixes.lock || prefixes.operand_size || prefixes.rex != 0 || prefixes.repeat != Repeat::None {
        return Err(DecodeError::Invalid);
    }
    match first {
        0x62 => {
            let [second, _third] = cursor.take()?;
            if second & 4 == 0 {
                return Err(DecodeError::Invalid);
            }
        }
        0xc4 | 0x8f => {
            cursor.u8()?;
        }
        _ => {}
    }
    let opcode = cursor.u8()?;
    Ok((Map::Extended, opcode, opcode::extended(space, map, opcode)))
}

/// The `ModRM` byte. Its fields `reg` and `rm` lack the bits of REX.
#[derive(Clone, Copy, Default)]
pub(crate) struct ModRm {
    pub(crate) byte: u8,
}

impl ModRm {
    pub(crate) const fn mode(self) -> u8 {
        self.byte >> 6
    }
    pub(crate) const fn reg(self) -> u8 {
        (self.byte >> 3) & 7
    }
    pub(crate) const fn rm(self) -> u8 {
        self.byte & 7
    }
    pub(crate) const fn is_memory(self) -> bool {
        self.mode() != 3
    }
}

/// What was read, before it is known what it means.
pub(crate) struct Parts {
    pub(crate) mode: CpuMode,
    pub(crate) map: Map,
    pub(crate) opcode: u8,
    pub(crate) prefixes: Prefixes,
    pub(crate) operand_width: Width,
    pub(crate) address_width: Width,
    pub(crate) modrm: ModRm,
    pub(crate) memory: Option<MemoryOperand>,
    /// The last immediate, sign-extended.
    pub(crate) immediate: i64,
}

impl Parts {
    fn read_modrm(&mut self, cursor: &mut Cursor<'_>) -> Result<(), DecodeError> {
        self.modrm = ModRm { byte: cursor.u8()? };
        // MOV to and from control and debug registers ignores the mod field.
        let always_register = self.map == Map::TwoByte && matches!(self.opcode, 0x20..=0x23);
        if self.modrm.is_memory() && !always_register {
            let mut memory = match self.address_width {
                Width::Word => self.memory_16(cursor)?,
                _ => self.memory_32(cursor)?,
            };
            if let Some(segment) = self.prefixes.segment {
                memory.segment = segment;
            }
            self.memory = Some(memory);
        }
        Ok(())
    }

    /// The memory operand of 16-bit addresses (Intel SDM volume 2, table 2-1).
    fn memory_16(&self, cursor: &mut Cursor<'_>) -> Result<MemoryOperand, DecodeError> {
        let (base, index) = match self.modrm.rm() {
            0 => (Base::Gpr(Gpr::Rbx), Some(Gpr::Rsi)),
            1 => (Base::Gpr(Gpr::Rbx), Some(Gpr::Rdi)),
            2 => (Base::Gpr(Gpr::Rbp), Some(Gpr::Rsi)),
            3 => (Base::Gpr(Gpr::Rbp), Some(Gpr::Rdi)),
            4 => (Base::Gpr(Gpr::Rsi), None),
            5 => (Base::Gpr(Gpr::Rdi), None),
            6 if self.modrm.mode() == 0 => (Base::None, None),
            6 => (Base::Gpr(Gpr::Rbp), None),
            _ => (Base::Gpr(Gpr::Rbx), None),
        };
        let displacement = match (self.modrm.mode(), base) {
            (0, Base::None) | (2, _) => cursor.i16()?,
            (1, _) => cursor.i8()?,
            _ => 0,
        };
        let segment = if base == Base::Gpr(Gpr::Rbp) { Segment::Ss } else { Segment::Ds };
        Ok(MemoryOperand { segment, base, index, scale_shift: 0, displacement })
    }

    /// The memory operand of 32- and 64-bit addresses (Intel SDM volume 2, tables 2-2, 2-3 and 2-7).
    fn memory_32(&self, cursor: &mut Cursor<'_>) -> Result<MemoryOperand, DecodeError> {
        let mut index = None;
        let mut scale_shift = 0;
        let mut low_base = self.modrm.rm();
        let sib = low_base == 4;
        if sib {
            let byte = cursor.u8()?;
            let index_number = (byte >> 3 & 7) | self.prefixes.rex_x();
            if index_number != 4 {
                index = Some(Gpr::from_low_bits(index_number));
                scale_shift = byte >> 6;
            }
            low_base = byte & 7;
        }
        let base = match (self.modrm.mode(), low_base) {
            (0, 5) if !sib && self.mode == CpuMode::Bits64 => Base::NextInstruction,
            (0, 5) => Base::None,
            _ => Base::Gpr(Gpr::from_low_bits(low_base | self.prefixes.rex_b())),
        };
        let displacement = match (self.modrm.mode(), base) {
            (0, Base::Gpr(_)) => 0,
            (1, _) => cursor.i8()?,
            _ => cursor.i32()?,
        };
        let segment = match base {
            Base::Gpr(Gpr::Rsp | Gpr::Rbp) => Segment::Ss,
            _ => Segment::Ds,
        };
        Ok(MemoryOperand { segment, base, index, scale_shift, displacement })
    }

    fn read_immediates(&mut self, cursor: &mut Cursor<'_>, encoding: Encoding) -> Result<(), DecodeError> {
        if encoding & W != 0 {
            self.immediate = cursor.i16()?;
        }
        if encoding & B != 0 {
            self.immediate = cursor.i8()?;
        }
        if encoding & Z != 0 {
            self.read_immediate_z(cursor)?;
        }
        if encoding & S != 0 {
            self.read_special(cursor)?;
        }
        Ok(())
    }

    /// An immediate or near displacement of the operand size, at most four bytes. Near branches of 64-bit mode
    /// always have four (Intel's rule, see the README).
    fn read_immediate_z(&mut self, cursor: &mut Cursor<'_>) -> Result<(), DecodeError> {
        let near_branch = match self.map {
            Map::OneByte => matches!(self.opcode, 0xe8 | 0xe9),
            Map::TwoByte => true,
            _ => false,
        };
        let short = self.operand_width == Width::Word
            && self.map != Map::Extended
            && !(near_branch && self.mode == CpuMode::Bits64);
        self.immediate = if short { cursor.i16()? } else { cursor.i32()? };
        Ok(())
    }

    /// What the tables leave open: immediates that depend on more than the opcode, and groups of which some
    /// members are undefined.
    fn read_special(&mut self, cursor: &mut Cursor<'_>) -> Result<(), DecodeError> {
        let (reg, memory) = (self.modrm.reg(), self.modrm.is_memory());
        match (self.map, self.opcode) {
            // MOV between the accumulator and a direct offset of the address size.
            (Map::OneByte, 0xa0..=0xa3) => {
                let displacement = match self.address_width {
                    Width::Word => cursor.i16()? & 0xffff,
                    Width::Qword => cursor.i64()?,
                    _ => cursor.i32()? & 0xffff_ffff,
                };
                self.memory = Some(MemoryOperand {
                    segment: self.prefixes.segment.unwrap_or(Segment::Ds),
                    base: Base::None,
                    index: None,
                    scale_shift: 0,
                    displacement,
                });
            }
            // MOV register ← immediate: the only one of eight bytes.
            (Map::OneByte, 0xb8..=0xbf) => match self.operand_width {
                Width::Qword => self.immediate = cursor.i64()?,
                _ => self.read_immediate_z(cursor)?,
            },
            // Far CALL and JMP.
            (Map::OneByte, 0x9a | 0xea) => {
                self.read_immediate_z(cursor)?;
                cursor.i16()?;
            }
            // TEST has an immediate, the rest of its group has none.
            (Map::OneByte, 0xf6) if reg < 2 => self.immediate = cursor.i8()?,
            (Map::OneByte, 0xf7) if reg < 2 => self.read_immediate_z(cursor)?,
            // MOV, and with a ModRM of F8 XABORT and XBEGIN.
            (Map::OneByte, 0xc6) if reg == 0 || self.modrm.byte == 0xf8 => self.immediate = cursor.i8()?,
            (Map::OneByte, 0xc7) if reg == 0 || self.modrm.byte == 0xf8 => self.read_immediate_z(cursor)?,
            (Map::OneByte, 0xc6 | 0xc7) => return Err(DecodeError::Invalid),
            // LEA; POP; MOV with segment registers; INC and DEC; CALL, JMP, PUSH.
            (Map::OneByte, 0x8d) if !memory => return Err(DecodeError::Invalid),
            (Map::OneByte, 0x8f) if reg != 0 => return Err(DecodeError::Invalid),
            (Map::OneByte, 0x8c) if reg > 5 => return Err(DecodeError::Invalid),
            (Map::OneByte, 0x8e) if reg > 5 || reg == 1 => return Err(DecodeError::Invalid),
            (Map::OneByte, 0xfe) if reg > 1 => return Err(DecodeError::Invalid),
            (Map::OneByte, 0xff) if reg == 7 || (matches!(reg, 3 | 5) && !memory) => {
                return Err(DecodeError::Invalid);
            }
            // EXTRQ and INSERTQ have two immediates, VMREAD none.
            (Map::TwoByte, 0x78) => match (self.prefixes.repeat, self.prefixes.operand_size) {
                (Repeat::Repne, _) | (Repeat::None, true) => self.immediate = cursor.i16()?,
                (Repeat::None, false) => {}
                (Repeat::Rep, _) => return Err(DecodeError::Invalid),
            },
            // POPCNT needs F3.
            (Map::TwoByte, 0xb8) if self.prefixes.repeat != Repeat::Rep => return Err(DecodeError::Invalid),
            // BT and its kin.
            (Map::TwoByte, 0xba) if reg < 4 => return Err(DecodeError::Invalid),
            (Map::TwoByte, 0xba) => self.immediate = cursor.i8()?,
            _ => {}
        }
        Ok(())
    }
}
