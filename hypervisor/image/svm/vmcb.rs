//! The virtual machine control block (AMD64 manual, volume 2, appendix B) and the names in it.
//!
//! Layout only. The processor reads it at VMRUN and writes it at #VMEXIT; in between it is ordinary memory of
//! the processor that runs the guest.

use core::mem::offset_of;

/// A segment register as the block holds it.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Segment {
    pub(crate) selector: u16,
    /// Bits 55:52 and 47:40 of a descriptor, packed into twelve.
    pub(crate) attributes: u16,
    pub(crate) limit: u32,
    pub(crate) base: u64,
}

impl Segment {
    /// L: 64-bit code.
    pub(crate) const LONG: u16 = 1 << 9;
    /// D: 32-bit operands by default.
    pub(crate) const DEFAULT_32: u16 = 1 << 10;
}

/// What is intercepted, how translations are made, and why the guest exited.
#[repr(C)]
pub(crate) struct Control {
    pub(crate) intercept_cr_reads: u16,
    pub(crate) intercept_cr_writes: u16,
    pub(crate) intercept_dr_reads: u16,
    pub(crate) intercept_dr_writes: u16,
    pub(crate) intercept_exceptions: u32,
    pub(crate) intercept_instructions: u32,
    pub(crate) intercept_instructions_2: u32,
    pub(crate) intercept_instructions_3: u32,
    reserved_1: [u8; 0x24],
    pub(crate) pause_filter: u32,
    pub(crate) io_map: u64,
    pub(crate) msr_map: u64,
    pub(crate) tsc_offset: u64,
    pub(crate) asid: u32,
    /// What VMRUN flushes: see [`flush`].
    pub(crate) flush: u32,
    pub(crate) virtual_interrupt: u64,
    /// Bit 0: the instruction before was STI, MOV SS or the like.
    pub(crate) interrupt_shadow: u64,
    pub(crate) exit_code: u64,
    pub(crate) exit_info_1: u64,
    pub(crate) exit_info_2: u64,
    /// The event whose delivery the exit cut short.
    pub(crate) exit_interrupt_info: u64,
    /// Bit 0: nested paging.
    pub(crate) nested_paging: u64,
    reserved_2: [u64; 2],
    pub(crate) event_injection: u64,
    pub(crate) nested_cr3: u64,
    pub(crate) virtual_extensions: u64,
    /// Bits of state that the processor may have cached: none, ever.
    pub(crate) clean: u64,
    pub(crate) next_rip: u64,
    pub(crate) fetched: u8,
    pub(crate) instruction_bytes: [u8; 15],
    reserved_3: [u8; 0x320],
}

/// The guest's state, as far as VMRUN, #VMEXIT, VMLOAD and VMSAVE switch it.
#[repr(C)]
pub(crate) struct Save {
    pub(crate) es: Segment,
    pub(crate) cs: Segment,
    pub(crate) ss: Segment,
    pub(crate) ds: Segment,
    pub(crate) fs: Segment,
    pub(crate) gs: Segment,
    pub(crate) gdtr: Segment,
    pub(crate) ldtr: Segment,
    pub(crate) idtr: Segment,
    pub(crate) tr: Segment,
    reserved_1: [u8; 0x2B],
    pub(crate) cpl: u8,
    reserved_2: u32,
    pub(crate) efer: u64,
    reserved_3: [u64; 14],
    pub(crate) cr4: u64,
    pub(crate) cr3: u64,
    pub(crate) cr0: u64,
    pub(crate) dr7: u64,
    pub(crate) dr6: u64,
    pub(crate) rflags: u64,
    pub(crate) rip: u64,
    reserved_4: [u64; 11],
    pub(crate) rsp: u64,
    reserved_5: [u64; 3],
    pub(crate) rax: u64,
    pub(crate) star: u64,
    pub(crate) lstar: u64,
    pub(crate) cstar: u64,
    pub(crate) sfmask: u64,
    pub(crate) kernel_gs_base: u64,
    pub(crate) sysenter_cs: u64,
    pub(crate) sysenter_esp: u64,
    pub(crate) sysenter_eip: u64,
    pub(crate) cr2: u64,
    reserved_6: [u64; 4],
    pub(crate) pat: u64,
    pub(crate) debug_control: u64,
    reserved_7: [u8; 0x988],
}

/// The whole block: one page.
#[repr(C, align(4096))]
pub(crate) struct Vmcb {
    pub(crate) control: Control,
    pub(crate) save: Save,
}

const _: () = {
    assert!(size_of::<Vmcb>() == 4096);
    assert!(offset_of!(Vmcb, save) == 0x400);
    assert!(offset_of!(Control, io_map) == 0x40);
    assert!(offset_of!(Control, exit_code) == 0x70);
    assert!(offset_of!(Control, nested_paging) == 0x90);
    assert!(offset_of!(Control, event_injection) == 0xA8);
    assert!(offset_of!(Control, next_rip) == 0xC8);
    assert!(offset_of!(Control, fetched) == 0xD0);
    assert!(offset_of!(Save, cpl) == 0xCB);
    assert!(offset_of!(Save, efer) == 0xD0);
    assert!(offset_of!(Save, cr4) == 0x148);
    assert!(offset_of!(Save, rip) == 0x178);
    assert!(offset_of!(Save, rsp) == 0x1D8);
    assert!(offset_of!(Save, rax) == 0x1F8);
    assert!(offset_of!(Save, cr2) == 0x240);
    assert!(offset_of!(Save, pat) == 0x268);
};

impl Vmcb {
    /// A block of zeros.
    pub(crate) fn zeroed() -> alloc::boxed::Box<Self> {
        // SAFETY: every field is an integer or made of integers, for which zero bits are a value.
        unsafe { alloc::boxed::Box::new_zeroed().assume_init() }
    }
}

/// Values of [`Control::flush`].
pub(crate) mod flush {
    pub(crate) const NOTHING: u32 = 0;
    pub(crate) const EVERYTHING: u32 = 1;
    pub(crate) const THIS_ASID: u32 = 3;
}

/// Bits of [`Control::intercept_instructions`].
pub(crate) mod intercept {
    /// Interrupts, while the guest would take them.
    pub(crate) const INTERRUPT: u32 = 1 << 0;
    pub(crate) const NMI: u32 = 1 << 1;
    pub(crate) const INIT: u32 = 1 << 3;
    pub(crate) const CPUID: u32 = 1 << 18;
    pub(crate) const INVD: u32 = 1 << 22;
    pub(crate) const HLT: u32 = 1 << 24;
    pub(crate) const INVLPGA: u32 = 1 << 26;
    pub(crate) const PORTS: u32 = 1 << 27;
    pub(crate) const MSRS: u32 = 1 << 28;
    pub(crate) const SHUTDOWN: u32 = 1 << 31;
}

/// Bits of [`Control::intercept_instructions_2`].
pub(crate) mod intercept_2 {
    pub(crate) const VMRUN: u32 = 1 << 0;
    pub(crate) const VMMCALL: u32 = 1 << 1;
    pub(crate) const VMLOAD: u32 = 1 << 2;
    pub(crate) const VMSAVE: u32 = 1 << 3;
    pub(crate) const STGI: u32 = 1 << 4;
    pub(crate) const CLGI: u32 = 1 << 5;
    pub(crate) const SKINIT: u32 = 1 << 6;
    pub(crate) const XSETBV: u32 = 1 << 13;
}

/// Values of [`Control::exit_code`] that are handled.
pub(crate) mod exit {
    pub(crate) const CR4_WRITE: u64 = 0x14;
    pub(crate) const INTERRUPT: u64 = 0x60;
    pub(crate) const NMI: u64 = 0x61;
    pub(crate) const INIT: u64 = 0x63;
    pub(crate) const CPUID: u64 = 0x72;
    pub(crate) const INVD: u64 = 0x76;
    pub(crate) const HLT: u64 = 0x78;
    pub(crate) const INVLPGA: u64 = 0x7A;
    pub(crate) const PORT: u64 = 0x7B;
    pub(crate) const MSR: u64 = 0x7C;
    pub(crate) const SHUTDOWN: u64 = 0x7F;
    pub(crate) const VMRUN: u64 = 0x80;
    pub(crate) const VMMCALL: u64 = 0x81;
    pub(crate) const VMLOAD: u64 = 0x82;
    pub(crate) const VMSAVE: u64 = 0x83;
    pub(crate) const STGI: u64 = 0x84;
    pub(crate) const CLGI: u64 = 0x85;
    pub(crate) const SKINIT: u64 = 0x86;
    pub(crate) const XSETBV: u64 = 0x8D;
    pub(crate) const NESTED_FAULT: u64 = 0x400;
    /// The guest's state is not one that a processor can be in. Emulators may store the low half only.
    pub(crate) const INVALID: u32 = u32::MAX;

    /// The name of an exit, for people; `None` for those that nothing here asks for.
    pub(crate) fn name(code: u64) -> Option<&'static str> {
        Some(match code {
            CR4_WRITE => "cr4_write",
            INTERRUPT => "interrupt",
            NMI => "nmi",
            INIT => "init",
            CPUID => "cpuid",
            INVD => "invd",
            HLT => "hlt",
            INVLPGA => "invlpga",
            PORT => "port",
            MSR => "msr",
            SHUTDOWN => "shutdown",
            VMRUN => "vmrun",
            VMMCALL => "vmmcall",
            VMLOAD => "vmload",
            VMSAVE => "vmsave",
            STGI => "stgi",
            CLGI => "clgi",
            SKINIT => "skinit",
            XSETBV => "xsetbv",
            NESTED_FAULT => "nested_fault",
            _ => return None,
        })
    }
}

/// An event in [`Control::event_injection`] and [`Control::exit_interrupt_info`].
pub(crate) mod event {
    pub(crate) const INTERRUPT: u64 = 0;
    pub(crate) const NMI: u64 = 2;
    pub(crate) const EXCEPTION: u64 = 3;
    pub(crate) const SOFTWARE: u64 = 4;
    pub(crate) const VALID: u64 = 1 << 31;
    pub(crate) const HAS_CODE: u64 = 1 << 11;

    /// An exception with or without an error code.
    pub(crate) const fn exception(vector: u8, code: Option<u32>) -> u64 {
        let event = vector as u64 | EXCEPTION << 8 | VALID;
        match code {
            Some(code) => event | HAS_CODE | (code as u64) << 32,
            None => event,
        }
    }
}
