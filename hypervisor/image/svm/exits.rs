//! What each exit means, and what is done about it.
//!
//! Invariant: a handler either completes the instruction (and moves past it), injects a fault, or leaves the
//! guest to try again; everything it cannot do is an end with a name, never a guess.

use super::processor::vector;
use super::run::{Exit, Machine};
use super::ticks;
use super::vmcb::exit;
use crate::guest::End;
use crate::guest::devices::{BusError, DeviceBus};
use crate::guest::ports::Output;
use crate::machine::cpu;
use hypervisor::cpuid::{self, Answer};
use hypervisor::registers::{GeneralProtection, cr4, efer};
use vmmu::{Fault, FetchError, Gpa, Gva, InstructionBytes, MmioAccess, Outcome, WalkError};
use vmmu_emulate::{
    Bus, Completion, CpuMode, DecodeError, ExecuteError, Gpr, Instruction, Known, Op, Register, Width,
    decode, execute, length_of_known,
};

/// What RAX holds after a hypercall that nobody knows: -ENOSYS.
const UNKNOWN_CALL: u64 = (-38i64).cast_unsigned();
/// Nested faults at one place without progress, after which the run ends.
const STORM: u32 = 100_000;

/// Why a handler did not complete the instruction.
pub(super) enum Stop {
    /// The guest goes on as it is now: with a fault injected, or to try again.
    Enter,
    /// The run is over.
    End(End),
}

impl From<End> for Stop {
    fn from(end: End) -> Self {
        Self::End(end)
    }
}

impl From<vmmu::Error> for Stop {
    #[cold]
    fn from(error: vmmu::Error) -> Self {
        Self::End(End::error(error))
    }
}

pub(super) type Handled = Result<(), Stop>;

/// Counts nested faults that repeat.
#[derive(Default)]
pub(crate) struct Storm {
    rip: u64,
    gpa: u64,
    times: u32,
}

impl Storm {
    #[inline(always)]
    fn note(&mut self, rip: u64, gpa: u64) -> Result<(), End> {
        if self.rip != rip || self.gpa != gpa {
            *self = Self { rip, gpa, times: 0 };
            return Ok(());
        }
        self.times += 1;
        if self.times < STORM { Ok(()) } else { Err(self.end()) }
    }

    #[cold]
    fn end(&self) -> End {
        End::error(format_args!(
            "the guest faults for ever: rip {:#x} cannot reach guest-physical {:#x}",
            self.rip, self.gpa
        ))
    }
}

/// Handles `exit`, which has just happened.
#[inline(always)]
pub(crate) fn handle(machine: &mut Machine, exit: Exit) -> Result<(), End> {
    let handled = match exit.code {
        exit::NESTED_FAULT => nested_fault(machine, exit),
        exit::VMMCALL => hypercall(machine),
        exit::CPUID => identify(machine),
        exit::PORT => port(machine, exit),
        exit::MSR => msr(machine, exit),
        exit::VMRUN
        | exit::VMLOAD
        | exit::VMSAVE
        | exit::STGI
        | exit::CLGI
        | exit::SKINIT
        | exit::INVLPGA => {
            machine.processor.inject(vector::INVALID_OPCODE, None);
            return Ok(());
        }
        _ => rare(machine, exit),
    };
    match handled {
        Ok(()) | Err(Stop::Enter) => Ok(()),
        Err(Stop::End(end)) => Err(end),
    }
}

#[inline(never)]
fn rare(machine: &mut Machine, exit: Exit) -> Handled {
    match exit.code {
        exit::CR4_WRITE => write_cr4(machine, exit),
        exit::XSETBV => write_xcr0(machine),
        exit::INVD => {
            // What the guest would throw away is not its own alone.
            cpu::write_back_caches();
            let instruction = fetch_and_decode(machine)?;
            complete(machine, &instruction);
            Ok(())
        }
        exit::SHUTDOWN => Err(End::TripleFault.into()),
        exit::INIT => Err(End::Reset("INIT signal").into()),
        exit::NMI => ticks::nmi(machine),
        exit::HLT => ticks::halt(machine),
        exit::INTERRUPT => {
            ticks::interrupt(machine);
            Ok(())
        }
        #[allow(clippy::cast_possible_truncation)] // an emulator may store the low half alone
        code if code as u32 == exit::INVALID => {
            Err(End::error("the processor refuses the guest's state (VMEXIT_INVALID)").into())
        }
        code => Err(End::error(format_args!("unknown exit {code:#x}")).into()),
    }
}

/// #GP(0) at the current instruction.
#[cold]
fn general_protection(machine: &mut Machine) -> Stop {
    machine.processor.inject(vector::GENERAL_PROTECTION, Some(0));
    Stop::Enter
}

/// What a failed translation means for the guest.
#[cold]
fn translation_failed(machine: &mut Machine, error: WalkError) -> Stop {
    match error {
        WalkError::Guest(fault) => {
            machine.processor.inject_page_fault(fault.gva.raw(), fault.error_code.bits());
            Stop::Enter
        }
        WalkError::NonCanonical(_) => general_protection(machine),
        other => Stop::End(End::error(format_args!("the guest's address cannot be translated: {other}"))),
    }
}

/// The bytes at the current instruction.
#[inline]
fn fetch(machine: &mut Machine) -> Result<InstructionBytes, Stop> {
    machine.processor.refresh(machine.vcpu.paging_mut());
    let at = Gva::new(machine.processor.linear_rip());
    machine.vcpu.fetch_instruction(at).map_err(|error| fetch_failed(machine, error))
}

/// What a failed fetch means for the guest.
#[cold]
fn fetch_failed(machine: &mut Machine, error: FetchError) -> Stop {
    match error {
        FetchError::Walk(error) => translation_failed(machine, error),
        error => Stop::End(End::error(error)),
    }
}

/// The current instruction.
#[inline(never)]
fn fetch_and_decode(machine: &mut Machine) -> Result<Instruction, Stop> {
    let bytes = fetch(machine)?;
    decode(&bytes, machine.processor.mode()).map_err(|error| undecodable(machine, error, &bytes))
}

/// What an instruction that does not decode means.
#[cold]
fn undecodable(machine: &mut Machine, error: DecodeError, bytes: &[u8]) -> Stop {
    match error {
        DecodeError::TooLong => general_protection(machine),
        // The guest replaced its code after the exit: it runs what is there now.
        DecodeError::Unexpected => Stop::Enter,
        error => Stop::End(End::error(format_args!("cannot decode {bytes:02x?}: {error}"))),
    }
}

/// Moves past the current instruction, which the exit named.
#[inline(always)]
fn skip(machine: &mut Machine, known: Known) -> Handled {
    let next = next_instruction(machine, known)?;
    machine.processor.complete(next);
    Ok(())
}

/// Where the instruction after the current one starts, which the exit named.
#[inline(always)]
pub(super) fn next_instruction(machine: &mut Machine, known: Known) -> Result<u64, Stop> {
    Ok(if machine.processor.capabilities.next_rip {
        machine.processor.vmcb.control.next_rip
    } else {
        let length = length(machine, known)?;
        let next = machine.processor.vmcb.save.rip.wrapping_add(length.into());
        if machine.processor.mode() == CpuMode::Bits64 { next } else { next & u64::from(u32::MAX) }
    })
}

/// The length of the current instruction, which the exit named.
#[inline]
fn length(machine: &mut Machine, known: Known) -> Result<u8, Stop> {
    let bytes = fetch(machine)?;
    length_of_known(&bytes, machine.processor.mode(), known)
        .map_err(|error| undecodable(machine, error, &bytes))
}

/// Moves past an instruction that was decoded.
fn complete(machine: &mut Machine, instruction: &Instruction) {
    let next = instruction.next_rip(machine.processor.vmcb.save.rip);
    machine.processor.complete(next);
}

/// VMMCALL: no call is known.
#[inline(always)]
fn hypercall(machine: &mut Machine) -> Handled {
    skip(machine, Known::Vmmcall)?;
    machine.processor.vmcb.save.rax = UNKNOWN_CALL;
    Ok(())
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation)] // the operands are the low halves
fn identify(machine: &mut Machine) -> Handled {
    skip(machine, Known::Cpuid)?;
    let processor = &mut machine.processor;
    let (leaf, subleaf) = (processor.vmcb.save.rax as u32, processor.general(Gpr::Rcx) as u32);
    let raw = cpu::cpuid(leaf, subleaf);
    let raw = Answer { eax: raw.eax, ebx: raw.ebx, ecx: raw.ecx, edx: raw.edx };
    let answer = cpuid::filter(leaf, subleaf, processor.vmcb.save.cr4, raw);
    processor.vmcb.save.rax = answer.eax.into();
    processor.set_general(Gpr::Rbx, answer.ebx.into());
    processor.set_general(Gpr::Rcx, answer.ecx.into());
    processor.set_general(Gpr::Rdx, answer.edx.into());
    Ok(())
}

/// IN, OUT, INS, OUTS. The exit tells the port and the width, and where the next instruction starts.
#[inline(always)]
fn port(machine: &mut Machine, exit: Exit) -> Handled {
    const INPUT: u64 = 1 << 0;
    const STRING: u64 = 1 << 2;
    if exit.info_1 & STRING != 0 {
        return string_port(machine, exit);
    }
    // One of bits 4, 5 and 6: the width in bytes.
    #[allow(clippy::cast_possible_truncation)] // a field of three bits; a field of sixteen
    let (width, port) = ((exit.info_1 >> 4 & 7) as u8, (exit.info_1 >> 16) as u16);
    let rax = machine.processor.vmcb.save.rax;
    if exit.info_1 & INPUT != 0 {
        let value = u64::from(machine.ports.input(port, width));
        machine.processor.vmcb.save.rax = match width {
            1 => rax & !0xFF | value,
            2 => rax & !0xFFFF | value,
            _ => value,
        };
    } else {
        #[allow(clippy::cast_possible_truncation)] // the low bytes are what is written
        let value = rax as u32 & u32::MAX >> (32 - 8 * u32::from(width));
        if let Output::Service(number) = machine.ports.output(port, width, value)? {
            machine.ports.status = machine.services.serve(number, &mut machine.vcpu)?;
        }
    }
    machine.processor.complete(exit.info_2);
    Ok(())
}

/// One repetition of INS or OUTS; the guest is entered again for the next.
#[cold]
fn string_port(machine: &mut Machine, exit: Exit) -> Handled {
    let instruction = fetch_and_decode(machine)?;
    #[allow(clippy::cast_possible_truncation)] // a field of sixteen bits
    let port = (exit.info_1 >> 16) as u16;
    let count = Register::low(Gpr::Rcx, instruction.address_width());
    let repeats = exit.info_1 >> 3 & 1 != 0;
    if repeats && count.read(&machine.processor) == 0 {
        complete(machine, &instruction);
        return Ok(());
    }
    let bus = &mut DeviceBus { vcpu: &mut machine.vcpu, devices: &machine.devices };
    let (index, width) = match instruction.op() {
        Op::Ins(width) => {
            let to = instruction.string_destination(&machine.processor);
            // Reading a port takes something away, so it comes after everything that can be refused.
            let written = bus.probe_write(to, width).and_then(|()| {
                let value = machine.ports.input(port, width.bytes());
                bus.write(to, width, value.into())
            });
            written.map_err(|error| access_failed(machine, error))?;
            (Gpr::Rdi, width)
        }
        Op::Outs(width) => {
            let from = instruction.string_source(&machine.processor);
            let value = bus.read(from, width).map_err(|error| access_failed(machine, error))?;
            #[allow(clippy::cast_possible_truncation)] // ports are at most 32 bits wide
            if let Output::Service(number) = machine.ports.output(port, width.bytes(), value as u32)? {
                machine.ports.status = machine.services.serve(number, &mut machine.vcpu)?;
            }
            (Gpr::Rsi, width)
        }
        // The guest replaced its code after the exit: it runs what is there now.
        _ => return Err(Stop::Enter),
    };
    let downwards = machine.processor.vmcb.save.rflags >> 10 & 1 != 0;
    let step = u64::from(width.bytes());
    let step = if downwards { step.wrapping_neg() } else { step };
    let index = Register::low(index, instruction.address_width());
    let next = index.read(&machine.processor).wrapping_add(step);
    index.write(&mut machine.processor, next);
    if repeats {
        let left = count.read(&machine.processor).wrapping_sub(1);
        count.write(&mut machine.processor, left);
        if left != 0 {
            return Ok(());
        }
    }
    complete(machine, &instruction);
    Ok(())
}

/// RDMSR and WRMSR of what is hidden, and of registers outside the permission map.
#[inline(never)]
#[allow(clippy::cast_possible_truncation)] // the operands are the low halves
fn msr(machine: &mut Machine, exit: Exit) -> Handled {
    let register = machine.processor.general(Gpr::Rcx) as u32;
    if register != cpu::MSR_EFER {
        return Err(general_protection(machine));
    }
    let save = &machine.processor.vmcb.save;
    if exit.info_1 & 1 == 0 {
        let value = save.efer & !efer::SVME;
        skip(machine, Known::Rdmsr)?;
        machine.processor.vmcb.save.rax = value & u64::from(u32::MAX);
        machine.processor.set_general(Gpr::Rdx, value >> 32);
        return Ok(());
    }
    let low = save.rax & u64::from(u32::MAX);
    let wanted = machine.processor.general(Gpr::Rdx) << 32 | low;
    match machine.processor.allowed.check_efer(machine.processor.paging(), wanted) {
        Ok(value) => {
            skip(machine, Known::Wrmsr)?;
            machine.processor.vmcb.save.efer = value | efer::SVME;
            machine.processor.flush_translations();
            Ok(())
        }
        Err(GeneralProtection) => Err(general_protection(machine)),
    }
}

/// MOV CR4.
fn write_cr4(machine: &mut Machine, exit: Exit) -> Handled {
    // With decode assists, bit 63 says that bits 3:0 are the register of a MOV.
    let assisted = machine.processor.capabilities.decode_assists && exit.info_1 >> 63 != 0;
    let (source, next) = if assisted && machine.processor.capabilities.next_rip {
        (Gpr::ALL[(exit.info_1 & 15) as usize], machine.processor.vmcb.control.next_rip)
    } else {
        let instruction = fetch_and_decode(machine)?;
        let Op::MovToCr { cr: 4, gpr } = instruction.op() else { return Err(Stop::Enter) };
        (gpr, instruction.next_rip(machine.processor.vmcb.save.rip))
    };
    let value = machine.processor.general(source);
    let wanted =
        if machine.processor.mode() == CpuMode::Bits64 { value } else { Width::Dword.truncate(value) };
    let state = machine.processor.paging();
    match machine.processor.allowed.check_cr4(state, wanted) {
        Ok(()) => {
            machine.processor.vmcb.save.cr4 = wanted;
            if (state.cr4 ^ wanted) & cr4::PAGING != 0 {
                machine.processor.flush_translations();
            }
            machine.processor.complete(next);
            Ok(())
        }
        Err(GeneralProtection) => Err(general_protection(machine)),
    }
}

/// XSETBV.
#[allow(clippy::cast_possible_truncation)] // the operands are the low halves
fn write_xcr0(machine: &mut Machine) -> Handled {
    let processor = &machine.processor;
    let (low, high) = (processor.vmcb.save.rax as u32, processor.general(Gpr::Rdx) as u32);
    let wanted = u64::from(high) << 32 | u64::from(low);
    let refused = processor.general(Gpr::Rcx) as u32 != 0
        || processor.vmcb.save.cpl != 0
        || processor.allowed.check_xcr0(wanted).is_err();
    if refused {
        return Err(general_protection(machine));
    }
    skip(machine, Known::Xsetbv)?;
    // SAFETY: the processor has XSAVE, or nothing but a refusal would have come of it, and the host enabled
    // it; the value was checked against the processor's own mask.
    unsafe { cpu::set_xcr0(wanted) };
    Ok(())
}

/// #NPF: memory that is not mapped yet, or not memory.
#[inline(always)]
fn nested_fault(machine: &mut Machine, exit: Exit) -> Handled {
    let gpa = Gpa::new(exit.info_2);
    match machine.vcpu.handle_fault(Fault::npf(gpa, exit.info_1))? {
        Outcome::Resume => Ok(machine.storm.note(exit.rip, exit.info_2)?),
        outcome => not_memory(machine, &outcome),
    }
}

#[inline(never)]
fn not_memory(machine: &mut Machine, outcome: &Outcome) -> Handled {
    match outcome {
        Outcome::Mmio(access) | Outcome::ReadOnlyWrite(access) => device(machine, *access),
        Outcome::MemoryFault(fault) => {
            Err(End::error(format_args!("no memory behind the guest: {fault:?}")).into())
        }
        other => Err(End::error(format_args!("no way to handle {other:?}")).into()),
    }
}

/// An access to a device: the instruction is carried out here.
fn device(machine: &mut Machine, access: MmioAccess) -> Handled {
    if access.fetch {
        return Err(
            End::error(format_args!("the guest runs code at {}, where no memory is", access.gpa)).into()
        );
    }
    let instruction = fetch_and_decode(machine)?;
    let bus = &mut DeviceBus { vcpu: &mut machine.vcpu, devices: &machine.devices };
    match execute(&instruction, &mut machine.processor, bus) {
        Ok(Completion::Done) => {
            complete(machine, &instruction);
            Ok(())
        }
        Ok(Completion::Repeat) => Ok(()),
        Err(ExecuteError::Bus(error)) => Err(access_failed(machine, error)),
        Err(_) => Err(not_emulated(machine, access)),
    }
}

/// An instruction that accesses a device in a way that is not carried out here.
#[cold]
fn not_emulated(machine: &mut Machine, access: MmioAccess) -> Stop {
    match fetch(machine) {
        Ok(bytes) => {
            let bytes = &*bytes;
            Stop::End(End::error(format_args!("no emulation of {bytes:02x?}, which accesses {}", access.gpa)))
        }
        Err(stop) => stop,
    }
}

/// What a failed access of an emulated instruction means for the guest.
#[cold]
fn access_failed(machine: &mut Machine, error: BusError) -> Stop {
    match error {
        BusError::Walk(error) => translation_failed(machine, error),
        BusError::Memory(error) => error.into(),
    }
}
