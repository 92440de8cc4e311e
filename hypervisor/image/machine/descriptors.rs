//! Segment descriptors, the task-state segment and the host's exceptions.
//!
//! Every exception runs on a stack of its own (IST): the precompiled `core` uses a red zone, and an exception
//! on the interrupted stack would overwrite it. All but the NMI end the run with a named error. Interrupts
//! stay off.

use super::cpu;
use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::mem::size_of;

global_asm!(include_str!("exceptions.s"), options(att_syntax, raw));

unsafe extern "C" {
    /// Where each of the 32 exceptions enters.
    static exception_entries: [u64; 32];
}

const CODE: u16 = 0x08;
const TASK: u16 = 0x18;
const EXCEPTION_STACK: usize = 16 << 10;

/// AMD64 manual, volume 2, section 12.2.5.
#[repr(C, packed)]
struct TaskState {
    reserved: u32,
    stacks: [u64; 3],
    reserved_2: u64,
    interrupt_stacks: [u64; 7],
    reserved_3: [u16; 5],
    io_map: u16,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Gate {
    low: u64,
    high: u64,
}

#[repr(C, align(16))]
struct Tables {
    stacks: [[u8; EXCEPTION_STACK]; 3],
    gates: [Gate; 32],
    segments: [u64; 5],
    task: TaskState,
}

struct Holder(UnsafeCell<Tables>);
// SAFETY: written by `load` alone, once, before anything else can look; the processor reads it afterwards.
unsafe impl Sync for Holder {}

static TABLES: Holder = Holder(UnsafeCell::new(Tables {
    stacks: [[0; EXCEPTION_STACK]; 3],
    gates: [Gate { low: 0, high: 0 }; 32],
    segments: [0; 5],
    task: TaskState {
        reserved: 0,
        stacks: [0; 3],
        reserved_2: 0,
        interrupt_stacks: [0; 7],
        reserved_3: [0; 5],
        io_map: 0,
    },
}));

/// What the entry code and the processor pushed.
#[derive(Debug)]
#[repr(C)]
struct Frame {
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

/// An interrupt gate, present, ring 0, on interrupt stack `stack` (1 to 7).
fn gate(entry: u64, stack: u64) -> Gate {
    let low =
        entry & 0xFFFF | u64::from(CODE) << 16 | stack << 32 | 0x8E00 << 32 | (entry >> 16 & 0xFFFF) << 48;
    Gate { low, high: entry >> 32 }
}

#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

/// Loads segments, task register and exception table.
#[allow(clippy::cast_possible_truncation)] // sizes of the tables above
pub(crate) fn load() {
    let tables = TABLES.0.get();
    // SAFETY: called once, with interrupts off, before the processor knows of the tables: the reference is
    // the only access. The selectors loaded below name descriptors written here.
    unsafe {
        let tables = &mut *tables;
        let top = |stack: &[u8; EXCEPTION_STACK]| stack.as_ptr_range().end as u64;
        // 1: NMI; 2: double fault and machine check; 3: everything else.
        tables.task.interrupt_stacks =
            [top(&tables.stacks[0]), top(&tables.stacks[1]), top(&tables.stacks[2]), 0, 0, 0, 0];
        tables.task.io_map = size_of::<TaskState>() as u16;
        for (vector, slot) in tables.gates.iter_mut().enumerate() {
            let stack = match vector {
                2 => 1,
                8 | 18 => 2,
                _ => 3,
            };
            *slot = gate(exception_entries[vector], stack);
        }
        let task = &raw const tables.task as u64;
        let limit = size_of::<TaskState>() as u64 - 1;
        tables.segments = [
            0,
            0x00AF_9B00_0000_FFFF,
            0x00CF_9300_0000_FFFF,
            limit | (task & 0xFF_FFFF) << 16 | 0x89 << 40 | (task >> 24 & 0xFF) << 56,
            task >> 32,
        ];
        let segments = Pointer { limit: 39, base: tables.segments.as_ptr() as u64 };
        let gates = Pointer { limit: 32 * 16 - 1, base: tables.gates.as_ptr() as u64 };
        asm!("lgdt [{}]", in(reg) &raw const segments, options(readonly, nostack, preserves_flags));
        asm!("lidt [{}]", in(reg) &raw const gates, options(readonly, nostack, preserves_flags));
        asm!("ltr {0:x}", in(reg) TASK, options(nostack, preserves_flags));
    }
}

/// The end of every exception of the host.
#[unsafe(no_mangle)]
extern "C" fn host_exception(frame: &Frame) -> ! {
    crate::report::fatal(format_args!(
        "exception {} of the hypervisor: error {:#x} rip {:#x} rsp {:#x} rflags {:#x} cr2 {:#x}",
        frame.vector,
        frame.error,
        frame.rip,
        frame.rsp,
        frame.rflags,
        cpu::cr2()
    ))
}
