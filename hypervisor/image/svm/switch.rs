//! The world switch: from the host's registers to the guest's and back, in as few instructions as it takes.
//!
//! VMRUN and #VMEXIT switch what the control block's save area holds first; VMLOAD and VMSAVE the rest of the
//! segments and the system-call registers; the code here the other general registers and the x87 and SSE
//! state. The host's code uses no wider registers than SSE's, so whatever lies above them, and XCR0, stays
//! the guest's untouched; so do the debug registers' addresses, since the processor disarms them at #VMEXIT.

use super::vmcb::Vmcb;
use core::arch::asm;
use core::mem::offset_of;

/// The x87 and SSE state, as FXSAVE stores it.
#[repr(C, align(16))]
pub(crate) struct Extended([u8; 512]);

/// The guest's registers that no control block holds.
#[repr(C)]
pub(crate) struct Registers {
    extended: Extended,
    /// In the order of their encoding. RAX and RSP (0 and 4) live in the control block; their places are
    /// unused.
    pub(crate) general: [u64; 16],
}

impl Registers {
    /// Zeros, and the x87 and SSE state of a processor that ran FNINIT after its reset.
    pub(crate) fn initial() -> Self {
        let mut extended = [0; 512];
        extended[..2].copy_from_slice(&0x037Fu16.to_le_bytes());
        extended[24..28].copy_from_slice(&MXCSR.to_le_bytes());
        Self { extended: Extended(extended), general: [0; 16] }
    }
}

/// The host's MXCSR: every exception masked, so that whatever the guest left pending stays the guest's.
static MXCSR: u32 = 0x1F80;

const fn general(number: usize) -> usize {
    offset_of!(Registers, general) + number * 8
}

/// Runs the guest until its next exit.
///
/// # Safety
/// SVM is on and the host-save area is set; interrupts are off and GIF is clear. `guest` is a control block
/// whose state is legal and whose maps and nested tables live, `host` one that holds this processor's VMSAVE
/// set; both at their physical addresses. What the guest's tables let it reach is the guest's.
#[inline(always)]
pub(crate) unsafe fn run(registers: &mut Registers, guest: &mut Vmcb, host: &Vmcb) {
    // SAFETY: the caller's promises. The block saves RBX and RBP itself, names every other register that the
    // guest overwrites, and leaves the stack as it was. Memory is not declared untouched: registers and both
    // control blocks are read and written.
    unsafe {
        asm!(
            "push rbp",
            "push rbx",
            "push rsi",
            "push rdi",
            "fxrstor64 [rdi + {extended}]",
            "mov rcx, [rdi + {rcx}]",
            "mov rdx, [rdi + {rdx}]",
            "mov rbx, [rdi + {rbx}]",
            "mov rbp, [rdi + {rbp}]",
            "mov rsi, [rdi + {rsi}]",
            "mov r8, [rdi + {r8}]",
            "mov r9, [rdi + {r9}]",
            "mov r10, [rdi + {r10}]",
            "mov r11, [rdi + {r11}]",
            "mov r12, [rdi + {r12}]",
            "mov r13, [rdi + {r13}]",
            "mov r14, [rdi + {r14}]",
            "mov r15, [rdi + {r15}]",
            "mov rdi, [rdi + {rdi}]",
            "vmload rax",
            "vmrun rax",
            "vmsave rax",
            "pop rax",
            "mov [rax + {rdi}], rdi",
            "mov [rax + {rcx}], rcx",
            "mov [rax + {rdx}], rdx",
            "mov [rax + {rbx}], rbx",
            "mov [rax + {rbp}], rbp",
            "mov [rax + {rsi}], rsi",
            "mov [rax + {r8}], r8",
            "mov [rax + {r9}], r9",
            "mov [rax + {r10}], r10",
            "mov [rax + {r11}], r11",
            "mov [rax + {r12}], r12",
            "mov [rax + {r13}], r13",
            "mov [rax + {r14}], r14",
            "mov [rax + {r15}], r15",
            "fxsave64 [rax + {extended}]",
            "ldmxcsr [rip + {mxcsr}]",
            "pop rax",
            "vmload rax",
            "pop rbx",
            "pop rbp",
            extended = const offset_of!(Registers, extended),
            rcx = const general(1),
            rdx = const general(2),
            rbx = const general(3),
            rbp = const general(5),
            rsi = const general(6),
            rdi = const general(7),
            r8 = const general(8),
            r9 = const general(9),
            r10 = const general(10),
            r11 = const general(11),
            r12 = const general(12),
            r13 = const general(13),
            r14 = const general(14),
            r15 = const general(15),
            mxcsr = sym MXCSR,
            inout("rax") core::ptr::from_mut(guest) => _,
            inout("rdi") core::ptr::from_mut(registers) => _,
            inout("rsi") core::ptr::from_ref(host) => _,
            out("r12") _,
            out("r13") _,
            out("r14") _,
            out("r15") _,
            clobber_abi("sysv64"),
        );
    }
}

/// Stores this processor's VMSAVE set into `host`.
///
/// # Safety
/// SVM is on, and `host` lies at its physical address.
pub(crate) unsafe fn save_host(host: &mut Vmcb) {
    // SAFETY: the caller's promises.
    unsafe { asm!("vmsave rax", in("rax") core::ptr::from_mut(host), options(nostack, preserves_flags)) };
}

/// Takes an NMI that waits: sets GIF for one instruction. Interrupts stay off; the NMI's handler does nothing.
///
/// # Safety
/// SVM is on, interrupts are off, and the host's exceptions are as [`crate::machine::descriptors::load`] made them.
pub(crate) unsafe fn take_nmi() {
    // SAFETY: the caller's promises: the handler runs on a stack of its own and comes back. GIF is clear again
    // afterwards.
    unsafe { asm!("stgi", "nop", "clgi", options(nomem, nostack, preserves_flags)) };
}

/// Clears GIF: from here on nothing interrupts the host, not even an NMI.
///
/// # Safety
/// SVM is on.
pub(crate) unsafe fn close() {
    // SAFETY: the caller's promise.
    unsafe { asm!("clgi", options(nomem, nostack, preserves_flags)) };
}
