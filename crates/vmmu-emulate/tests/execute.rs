//! Instructions carried out: what changes in registers, flags and memory, in which order, and what does not
//! change when the bus refuses.

mod common;

use common::{Access, Cpu, Memory, Refused, run};
use vmmu_emulate::{Completion, CpuMode, ExecuteError, Gpr, Registers, Width};

const B: u64 = Memory::BASE;

/// RBX, RSI at the memory's start, RDI in its middle, the others filled with a pattern.
fn cpu() -> Cpu {
    let mut cpu = Cpu { rip: 0x1000, rflags: 0x8d7, ..Cpu::default() };
    for gpr in Gpr::ALL {
        cpu.set_gpr(gpr, 0xf1f2_f3f4_f5f6_f700 | u64::from(gpr.number()));
    }
    cpu.set_gpr(Gpr::Rbx, B);
    cpu.set_gpr(Gpr::Rsi, B);
    cpu.set_gpr(Gpr::Rdi, B + 32);
    cpu
}

#[test]
fn loads_follow_the_rules_of_partial_registers() {
    // Memory holds 80 81 82 83 ...; the destination holds f1f2f3f4f5f6f7xx.
    let cases: [(&[u8], Gpr, u64); 16] = [
        (&[0x8a, 0x03], Gpr::Rax, 0xf1f2_f3f4_f5f6_f780), // mov al, [rbx]
        (&[0x8a, 0x23], Gpr::Rax, 0xf1f2_f3f4_f5f6_8000), // mov ah, [rbx]
        (&[0x40, 0x8a, 0x23], Gpr::Rsp, 0xf1f2_f3f4_f5f6_f780), // mov spl, [rbx]
        (&[0x44, 0x8a, 0x23], Gpr::R12, 0xf1f2_f3f4_f5f6_f780), // mov r12b, [rbx]
        (&[0x66, 0x8b, 0x03], Gpr::Rax, 0xf1f2_f3f4_f5f6_8180), // mov ax, [rbx]
        (&[0x8b, 0x03], Gpr::Rax, 0x8382_8180),           // mov eax, [rbx]
        (&[0x48, 0x8b, 0x03], Gpr::Rax, 0x8786_8584_8382_8180), // mov rax, [rbx]
        (&[0x0f, 0xb6, 0x0b], Gpr::Rcx, 0x80),            // movzx ecx, byte [rbx]
        (&[0x66, 0x0f, 0xb6, 0x0b], Gpr::Rcx, 0xf1f2_f3f4_f5f6_0080), // movzx cx, byte [rbx]
        (&[0x0f, 0xb7, 0x0b], Gpr::Rcx, 0x8180),          // movzx ecx, word [rbx]
        (&[0x0f, 0xbe, 0x0b], Gpr::Rcx, 0xffff_ff80),     // movsx ecx, byte [rbx]
        (&[0x66, 0x0f, 0xbe, 0x0b], Gpr::Rcx, 0xf1f2_f3f4_f5f6_ff80), // movsx cx, byte [rbx]
        (&[0x48, 0x0f, 0xbe, 0x0b], Gpr::Rcx, 0xffff_ffff_ffff_ff80), // movsx rcx, byte [rbx]
        (&[0x48, 0x0f, 0xbf, 0x0b], Gpr::Rcx, 0xffff_ffff_ffff_8180), // movsx rcx, word [rbx]
        (&[0x48, 0x63, 0x0b], Gpr::Rcx, 0xffff_ffff_8382_8180), // movsxd rcx, dword [rbx]
        (&[0x63, 0x0b], Gpr::Rcx, 0x8382_8180),           // movsxd ecx, dword [rbx]
    ];
    for (code, gpr, value) in cases {
        let (mut after, mut memory) = (cpu(), Memory::new());
        assert_eq!(run(code, CpuMode::Bits64, &mut after, &mut memory), Ok(Completion::Done));
        let mut expected = cpu();
        expected.set_gpr(gpr, value);
        assert_eq!(after, expected, "{code:02x?}: one register, no flag, no RIP");
        assert_eq!(memory.bytes, Memory::new().bytes);
        assert_eq!(memory.log.len(), 1);
    }
}

#[test]
fn stores_write_their_width_and_nothing_else() {
    let cases: [(&[u8], Width, u64); 12] = [
        (&[0x88, 0x0b], Width::Byte, 0x01),                         // mov [rbx], cl
        (&[0x88, 0x2b], Width::Byte, 0xf7),                         // mov [rbx], ch
        (&[0x40, 0x88, 0x2b], Width::Byte, 0x05),                   // mov [rbx], bpl
        (&[0x66, 0x89, 0x0b], Width::Word, 0xf701),                 // mov [rbx], cx
        (&[0x89, 0x0b], Width::Dword, 0xf5f6_f701),                 // mov [rbx], ecx
        (&[0x48, 0x89, 0x0b], Width::Qword, 0xf1f2_f3f4_f5f6_f701), // mov [rbx], rcx
        (&[0xc6, 0x03, 0xfe], Width::Byte, 0xfe),                   // mov byte [rbx], -2
        (&[0x66, 0xc7, 0x03, 0xfe, 0xff], Width::Word, 0xfffe),     // mov word [rbx], -2
        (&[0xc7, 0x03, 0xfe, 0xff, 0xff, 0xff], Width::Dword, 0xffff_fffe), // mov dword [rbx], -2
        (&[0x48, 0xc7, 0x03, 0xfe, 0xff, 0xff, 0xff], Width::Qword, u64::MAX - 1), // mov qword [rbx], -2
        (&[0x0f, 0xc3, 0x0b], Width::Dword, 0xf5f6_f701),           // movnti [rbx], ecx
        (&[0xa3, 0x00, 0x80, 0, 0, 0, 0, 0, 0], Width::Dword, 0xf5f6_f700), // mov [0x8000], eax
    ];
    for (code, width, value) in cases {
        let (mut after, mut memory) = (cpu(), Memory::new());
        assert_eq!(run(code, CpuMode::Bits64, &mut after, &mut memory), Ok(Completion::Done));
        assert_eq!(after, cpu(), "{code:02x?}");
        assert_eq!(memory.log, [Access::Write(B, width, value)], "{code:02x?}");
    }
}

#[test]
fn direct_offsets_have_the_address_size() {
    let cases: [(&[u8], CpuMode); 4] = [
        (&[0xa0, 0x04, 0x80], CpuMode::Bits16),
        (&[0xa0, 0x04, 0x80, 0, 0], CpuMode::Bits32),
        (&[0x67, 0xa0, 0x04, 0x80], CpuMode::Bits32),
        (&[0x67, 0xa0, 0x04, 0x80, 0, 0], CpuMode::Bits64),
    ];
    for (code, mode) in cases {
        let (mut after, mut memory) = (cpu(), Memory::new());
        assert_eq!(run(code, mode, &mut after, &mut memory), Ok(Completion::Done));
        assert_eq!(memory.log, [Access::Read(B + 4, Width::Byte)]);
        assert_eq!(after.gpr(Gpr::Rax), 0xf1f2_f3f4_f5f6_f784);
    }
}

#[test]
fn exchange_reads_then_writes() {
    let (mut after, mut memory) = (cpu(), Memory::new());
    assert_eq!(run(&[0x87, 0x0b], CpuMode::Bits64, &mut after, &mut memory), Ok(Completion::Done));
    assert_eq!(after.gpr(Gpr::Rcx), 0x8382_8180);
    assert_eq!(after.rflags, cpu().rflags);
    let log = [Access::Read(B, Width::Dword), Access::Write(B, Width::Dword, 0xf5f6_f701)];
    assert_eq!(memory.log, log);
}

#[test]
fn comparisons_do_not_write() {
    let codes: [&[u8]; 4] = [
        &[0x39, 0x0b],                         // cmp [rbx], ecx
        &[0x85, 0x0b],                         // test [rbx], ecx
        &[0xf7, 0x03, 0x00, 0x00, 0x00, 0x80], // test dword [rbx], 0x80000000
        &[0x83, 0x3b, 0x7f],                   // cmp dword [rbx], 0x7f
    ];
    for code in codes {
        let (mut after, mut memory) = (cpu(), Memory::new());
        assert_eq!(run(code, CpuMode::Bits64, &mut after, &mut memory), Ok(Completion::Done));
        assert_eq!(memory.log, [Access::Read(B, Width::Dword)]);
        assert_eq!(after.gprs, cpu().gprs);
        assert_ne!(after.rflags, cpu().rflags);
    }
}

#[test]
fn a_refusal_changes_no_register() {
    let codes: [&[u8]; 12] = [
        &[0x8b, 0x03],             // mov eax, [rbx]
        &[0x89, 0x0b],             // mov [rbx], ecx
        &[0x87, 0x0b],             // xchg [rbx], ecx
        &[0x01, 0x0b],             // add [rbx], ecx
        &[0x03, 0x0b],             // add ecx, [rbx]
        &[0xf7, 0x1b],             // neg dword [rbx]
        &[0xff, 0x03],             // inc dword [rbx]
        &[0xa4],                   // movsb
        &[0xf3, 0x48, 0xa5],       // rep movsq
        &[0xac],                   // lodsb
        &[0xaa],                   // stosb
        &[0xf0, 0x83, 0x0b, 0x01], // lock or dword [rbx], 1
    ];
    for code in codes {
        let mut accesses = 0;
        loop {
            let (mut after, mut memory) = (cpu(), Memory::new());
            memory.accesses_left = accesses;
            match run(code, CpuMode::Bits64, &mut after, &mut memory) {
                Err(ExecuteError::Bus(Refused(linear))) => {
                    assert!((B..B + 64).contains(&linear));
                    assert_eq!(after, cpu(), "{code:02x?} after {accesses} accesses");
                }
                Ok(_) => break,
                Err(ExecuteError::Unsupported(op)) => panic!("{op:?}"),
                Err(other) => panic!("{other:?}"),
            }
            accesses += 1;
        }
        assert!(accesses >= 1, "{code:02x?}");
    }
}

#[test]
fn what_is_not_carried_out_says_so() {
    let codes: [&[u8]; 4] = [&[0x0f, 0xa2], &[0x0f, 0x01, 0x3b], &[0x8d, 0x03], &[0xa6]];
    for code in codes {
        let (mut after, mut memory) = (cpu(), Memory::new());
        let result = run(code, CpuMode::Bits64, &mut after, &mut memory);
        assert!(matches!(result, Err(ExecuteError::Unsupported(_))), "{code:02x?}: {result:?}");
        assert_eq!((after, memory.log.len()), (cpu(), 0));
    }
}

#[test]
fn repeated_moves_copy_forwards_and_stop() {
    let (mut after, mut memory) = (cpu(), Memory::new());
    after.rflags = 2;
    after.set_gpr(Gpr::Rcx, 3);
    let code = [0xf3, 0xa5]; // rep movsd
    assert_eq!(run(&code, CpuMode::Bits64, &mut after, &mut memory), Ok(Completion::Repeat));
    assert_eq!(run(&code, CpuMode::Bits64, &mut after, &mut memory), Ok(Completion::Repeat));
    assert_eq!(run(&code, CpuMode::Bits64, &mut after, &mut memory), Ok(Completion::Done));
    let registers = [Gpr::Rcx, Gpr::Rsi, Gpr::Rdi].map(|gpr| after.gpr(gpr));
    assert_eq!(registers, [0, B + 12, B + 44]);
    assert_eq!(memory.bytes[32..44], Memory::new().bytes[..12]);
    assert_eq!(memory.bytes[44..], Memory::new().bytes[44..]);

    let accesses = memory.log.len();
    assert_eq!(run(&code, CpuMode::Bits64, &mut after, &mut memory), Ok(Completion::Done));
    assert_eq!(memory.log.len(), accesses, "a count of zero moves nothing");
}

#[test]
fn string_registers_move_by_direction_and_address_size() {
    // std; with 16-bit addresses only the low words change, and wrap there.
    let (mut after, mut memory) = (cpu(), Memory::new());
    after.rflags = 1 << 10;
    after.set_gpr(Gpr::Rdi, 0xffff_0000_0000_8000);
    after.set_gpr(Gpr::Rcx, 0xffff_ffff_ffff_0001);
    let code = [0xf3, 0x67, 0xab]; // rep stosd, 16-bit addresses
    assert_eq!(run(&code, CpuMode::Bits32, &mut after, &mut memory), Ok(Completion::Done));
    assert_eq!(memory.log, [Access::Write(B, Width::Dword, 0xf5f6_f700)]);
    assert_eq!(after.gpr(Gpr::Rdi), 0xffff_0000_0000_7ffc);
    assert_eq!(after.gpr(Gpr::Rcx), 0xffff_ffff_ffff_0000);
    assert_eq!(after.gpr(Gpr::Rsi), B, "STOS reads no memory");

    let (mut after, mut memory) = (cpu(), Memory::new());
    after.rflags = 2;
    assert_eq!(run(&[0x48, 0xad], CpuMode::Bits64, &mut after, &mut memory), Ok(Completion::Done)); // lodsq
    assert_eq!(after.gpr(Gpr::Rax), 0x8786_8584_8382_8180);
    assert_eq!((after.gpr(Gpr::Rsi), after.gpr(Gpr::Rdi)), (B + 8, B + 32));
}
