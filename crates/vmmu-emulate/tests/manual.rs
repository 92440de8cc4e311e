//! Encodings for which the manuals, and no oracle, say what is right; and the edges of length.

use vmmu_emulate::{CpuMode, DecodeError, Gpr, MAX_LENGTH, Op, Registers, Repeat, Segment, decode};

const MODES: [CpuMode; 3] = [CpuMode::Bits16, CpuMode::Bits32, CpuMode::Bits64];

/// AMD APM volume 3, `MOV CRn`: with LOCK, CR0 stands for CR8.
#[test]
fn lock_names_cr8() {
    for mode in MODES {
        let write = decode(&[0xf0, 0x0f, 0x22, 0xc1], mode).unwrap();
        assert_eq!(write.op(), Op::MovToCr { cr: 8, gpr: Gpr::Rcx });
        assert_eq!(write.len(), 4);
        let read = decode(&[0xf0, 0x0f, 0x20, 0xc1], mode).unwrap();
        assert_eq!(read.op(), Op::MovFromCr { cr: 8, gpr: Gpr::Rcx });
        assert_eq!(decode(&[0xf0, 0x0f, 0x22, 0xd9], mode), Err(DecodeError::Invalid), "LOCK MOV CR3");
        assert_eq!(decode(&[0xf0, 0x0f, 0x23, 0xc1], mode), Err(DecodeError::Invalid), "LOCK MOV DR0");
    }
}

/// Intel SDM volume 2, MOV to and from control registers: the 2 bits in the mod field are ignored.
#[test]
fn system_register_moves_ignore_mod() {
    for mode in MODES {
        for modrm in [0x18, 0x1d, 0x5c, 0x9c, 0xdc] {
            let instruction = decode(&[0x0f, 0x22, modrm], mode).unwrap();
            assert_eq!(instruction.len(), 3);
            let gpr = Gpr::from_low_bits(modrm & 7);
            assert_eq!(instruction.op(), Op::MovToCr { cr: 3, gpr });
            assert_eq!(instruction.memory(), None);
        }
    }
}

/// Intel SDM volume 2, 2.2.1.2: a REX that does not immediately precede the opcode is ignored.
#[test]
fn rex_counts_only_last() {
    let cr8 = decode(&[0x44, 0x0f, 0x20, 0xc0], CpuMode::Bits64).unwrap();
    assert_eq!(cr8.op(), Op::MovFromCr { cr: 8, gpr: Gpr::Rax });
    let cr0 = decode(&[0x44, 0x66, 0x0f, 0x20, 0xc0], CpuMode::Bits64).unwrap();
    assert_eq!(cr0.op(), Op::MovFromCr { cr: 0, gpr: Gpr::Rax });
}

#[test]
fn registers_that_do_not_exist_are_undefined() {
    for (number, opcode) in (0..8_u8).flat_map(|number| (0x20..0x24).map(move |opcode| (number, opcode))) {
        for rex in [0x40, 0x44] {
            let number_whole = if rex == 0x44 { number | 8 } else { number };
            let result = decode(&[rex, 0x0f, opcode, 0xc0 | number << 3], CpuMode::Bits64);
            let exists = match opcode {
                0x20 | 0x22 => matches!(number_whole, 0 | 2 | 3 | 4 | 8),
                _ => number_whole < 8,
            };
            assert_eq!(result.is_ok(), exists, "{opcode:#x} {number_whole}");
        }
    }
}

/// Intel SDM volume 2, 2.3.11; AMD APM volume 3, 1.1: 15 bytes at most.
#[test]
fn fifteen_bytes_are_the_most() {
    for mode in MODES {
        let mut bytes = [0x2e; 32];
        bytes[MAX_LENGTH - 1] = 0xf4;
        assert_eq!(decode(&bytes, mode).map(|instruction| instruction.len()), Ok(15));
        assert_eq!(decode(&bytes[..14], mode), Err(DecodeError::TooShort { at_least: 15 }));
        bytes[MAX_LENGTH - 1] = 0x2e;
        bytes[MAX_LENGTH] = 0xf4;
        assert_eq!(decode(&bytes, mode), Err(DecodeError::TooLong));
        assert_eq!(decode(&bytes[..15], mode), Err(DecodeError::TooLong));
        assert_eq!(decode(&[], mode), Err(DecodeError::TooShort { at_least: 1 }));
    }
}

/// Intel SDM volume 2, CALL, Jcc: in 64-bit mode a near displacement has 32 bits whatever the prefix. (AMD's
/// processors take 16 with 66; such a branch never exits.)
#[test]
fn near_branches_keep_their_displacement_in_64_bit_mode() {
    let call = [0x66, 0xe8, 0, 0, 0, 0];
    assert_eq!(decode(&call, CpuMode::Bits64).map(|instruction| instruction.len()), Ok(6));
    assert_eq!(decode(&call, CpuMode::Bits32).map(|instruction| instruction.len()), Ok(4));
    let jump = [0x66, 0x0f, 0x84, 0, 0, 0, 0];
    assert_eq!(decode(&jump, CpuMode::Bits64).map(|instruction| instruction.len()), Ok(7));
    assert_eq!(decode(&jump, CpuMode::Bits32).map(|instruction| instruction.len()), Ok(5));
}

/// Intel SDM volume 2, 2.1.1: LOCK before anything but a locked read-modify-write of memory raises #UD.
#[test]
fn lock_before_a_move_is_undefined() {
    for code in [&[0xf0, 0x8b, 0x03][..], &[0xf0, 0x89, 0x03], &[0xf0, 0x01, 0xc3], &[0xf0, 0x0f, 0xa2]] {
        assert_eq!(decode(code, CpuMode::Bits64), Err(DecodeError::Invalid));
    }
    let or = decode(&[0xf0, 0x83, 0x0b, 0x01], CpuMode::Bits64).unwrap();
    assert!(or.is_locked());
}

/// AMD APM volume 2, 4.5.3: in 64-bit mode the bases of ES, CS, SS and DS count as zero; FS and GS keep theirs.
/// Outside it linear addresses have 32 bits.
#[test]
fn segments_count_by_mode() {
    struct Based;
    impl Registers for Based {
        fn gpr(&self, _: Gpr) -> u64 {
            0xffff_fff0
        }
        fn set_gpr(&mut self, _: Gpr, _: u64) {}
        fn rip(&self) -> u64 {
            0
        }
        fn rflags(&self) -> u64 {
            2
        }
        fn set_rflags(&mut self, _: u64) {}
        fn segment_base(&self, segment: Segment) -> u64 {
            0x100 + segment as u64
        }
    }
    let address = |code: &[u8], mode| decode(code, mode).unwrap().effective_address(&Based).unwrap();
    assert_eq!(address(&[0x8b, 0x03], CpuMode::Bits64), 0xffff_fff0); // [rbx]
    assert_eq!(address(&[0x36, 0x8b, 0x03], CpuMode::Bits64), 0xffff_fff0);
    assert_eq!(address(&[0x65, 0x8b, 0x03], CpuMode::Bits64), 0x1_0000_00f5);
    assert_eq!(address(&[0x65, 0x3e, 0x8b, 0x03], CpuMode::Bits64), 0x1_0000_00f5); // DS changes nothing
    assert_eq!(address(&[0x8b, 0x03], CpuMode::Bits32), 0xf3); // ds:[ebx]
    assert_eq!(address(&[0x8b, 0x45, 0x20], CpuMode::Bits32), 0x112); // ss:[ebp+0x20]
    assert_eq!(address(&[0x67, 0x8b, 0x07], CpuMode::Bits32), 0x1_00f3 & 0xffff | 0x1_0000); // ds:[bx]
    assert_eq!(address(&[0x8b, 0x05, 0x10, 0, 0, 0], CpuMode::Bits64), 0x16); // [rip+0x10]
    assert_eq!(address(&[0x67, 0x8b, 0x05, 0xf0, 0xff, 0xff, 0xff], CpuMode::Bits64), 0xffff_fff7); // [eip-0x10]
}

#[test]
fn the_last_repeat_prefix_counts() {
    let code = [0xf3, 0xf2, 0xa4];
    assert_eq!(decode(&code, CpuMode::Bits32).unwrap().repeat(), Repeat::Repne);
    let code = [0xf2, 0xf3, 0xa4];
    assert_eq!(decode(&code, CpuMode::Bits32).unwrap().repeat(), Repeat::Rep);
}

#[test]
fn the_next_instruction_wraps_by_mode() {
    let nop = |mode| decode(&[0x90], mode).unwrap();
    assert_eq!(nop(CpuMode::Bits64).next_rip(0xffff_ffff), 0x1_0000_0000);
    assert_eq!(nop(CpuMode::Bits64).next_rip(u64::MAX), 0);
    assert_eq!(nop(CpuMode::Bits32).next_rip(0xffff_ffff), 0);
    assert_eq!(nop(CpuMode::Bits16).next_rip(0xffff), 0x1_0000);
}

#[test]
fn the_mode_follows_the_code_segment() {
    assert_eq!(CpuMode::new(true, true, false), CpuMode::Bits64);
    assert_eq!(CpuMode::new(true, false, true), CpuMode::Bits32);
    assert_eq!(CpuMode::new(false, true, true), CpuMode::Bits32, "L means nothing outside long mode");
    assert_eq!(CpuMode::new(false, false, false), CpuMode::Bits16);
}

/// Intel SDM volume 2, 2.3.2 to 2.3.4 and 2.7.11: no LOCK, 66, F2, F3 or REX before a VEX or EVEX prefix, and the
/// fixed bits of EVEX as they must be.
#[test]
fn vector_prefixes_stand_alone() {
    let vex = [0xc5, 0xf8, 0x28, 0xc1]; // vmovaps xmm0, xmm1
    let evex = [0x62, 0xf1, 0x7c, 0x08, 0x28, 0xc1]; // the same
    for code in [&vex[..], &evex] {
        for mode in MODES {
            let instruction = decode(code, mode).unwrap();
            assert_eq!((usize::from(instruction.len()), instruction.op()), (code.len(), Op::Other));
        }
        for prefix in [0x66, 0xf0, 0xf2, 0xf3, 0x48] {
            let with_prefix = [&[prefix], code].concat();
            assert_eq!(decode(&with_prefix, CpuMode::Bits64), Err(DecodeError::Invalid), "{prefix:#x}");
        }
    }
    for (at, bit) in [(1, 0x08), (2, 0x04)] {
        let mut wrong = evex;
        wrong[at] ^= bit;
        assert_eq!(decode(&wrong, CpuMode::Bits64), Err(DecodeError::Invalid), "{wrong:02x?}");
    }
    // Without the top bits that LES, LDS and BOUND cannot have, outside 64-bit mode they are those.
    assert_eq!(decode(&[0xc5, 0x38], CpuMode::Bits32).map(|instruction| instruction.len()), Ok(2));
    assert_eq!(decode(&[0x62, 0x31], CpuMode::Bits32).map(|instruction| instruction.len()), Ok(2));
}
