//! One virtual processor as SVM keeps it: control block, registers, permission maps.
//!
//! Everything that handlers do to the guest's state goes through here: reading and writing registers, moving
//! to the next instruction, injecting exceptions, asking for a flush. Invariant: EFER.SVME stays set in the
//! control block, where VMRUN demands it, and out of the guest's sight.

use super::Capabilities;
use super::permissions::{MsrMap, PortMap};
use super::switch::{self, Registers};
use super::vmcb::{Segment, Vmcb, event, flush, intercept, intercept_2};
use crate::machine::cpu;
use alloc::boxed::Box;
use hypervisor::guest_image::Entry;
use hypervisor::linux::DESCRIPTOR_LIMIT;
use hypervisor::registers::{Allowed, Features, Paging, cr0, cr4, efer};
use vmmu::{EntryFlush, PagingState};
use vmmu_emulate::{CpuMode, Gpr};

/// RFLAGS bits.
const RFLAGS_FIXED: u64 = 1 << 1;
const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_RF: u64 = 1 << 16;
/// DR6 after reset, and its single-step bit.
const DR6_RESET: u64 = 0xFFFF_0FF0;
const DR6_BS: u64 = 1 << 14;
/// PAT after reset.
const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// Vectors of exceptions that are injected.
pub(crate) mod vector {
    pub(crate) const DEBUG: u8 = 1;
    pub(crate) const INVALID_OPCODE: u8 = 6;
    pub(crate) const GENERAL_PROTECTION: u8 = 13;
    pub(crate) const PAGE_FAULT: u8 = 14;
}

/// A virtual processor.
pub(crate) struct Processor {
    pub(crate) vmcb: Box<Vmcb>,
    host: Box<Vmcb>,
    pub(crate) registers: Box<Registers>,
    pub(crate) ports: Box<PortMap>,
    msrs: Box<MsrMap>,
    pub(crate) capabilities: Capabilities,
    pub(crate) allowed: Allowed,
    /// What flushes one identifier: itself alone, or everything where that cannot be.
    flush_one: u32,
    /// What the next entry flushes because the guest changed what its translations mean.
    flush_wanted: u32,
}

impl Processor {
    /// A virtual processor about to enter a guest at `entry`.
    pub(crate) fn new(capabilities: Capabilities, entry: Entry) -> Self {
        let mut msrs = MsrMap::open();
        msrs.intercept(cpu::MSR_EFER..=cpu::MSR_EFER);
        // VM_CR, IGNNE, SMM_CTL, VM_HSAVE_PA, the keys: what belongs to a hypervisor.
        msrs.intercept(0xC001_0114..=0xC001_011F);
        let mut host = Vmcb::zeroed();
        // SAFETY: `svm::enable` gave the capabilities, so SVM is on; the heap is mapped one to one.
        unsafe { switch::save_host(&mut host) };
        let mut processor = Self {
            vmcb: Vmcb::zeroed(),
            host,
            registers: Box::new(Registers::initial()),
            ports: PortMap::open(),
            msrs,
            capabilities,
            allowed: Allowed::new(&features()),
            flush_one: if capabilities.flush_by_asid { flush::THIS_ASID } else { flush::EVERYTHING },
            flush_wanted: flush::NOTHING,
        };
        processor.control();
        processor.state(entry);
        processor
    }

    /// What exits, and how memory is reached.
    fn control(&mut self) {
        let control = &mut self.vmcb.control;
        control.intercept_cr_writes = 1 << 4;
        control.intercept_instructions = intercept::NMI
            | intercept::INIT
            | intercept::CPUID
            | intercept::INVD
            | intercept::INVLPGA
            | intercept::PORTS
            | intercept::MSRS
            | intercept::SHUTDOWN;
        control.intercept_instructions_2 = intercept_2::VMRUN
            | intercept_2::VMMCALL
            | intercept_2::VMLOAD
            | intercept_2::VMSAVE
            | intercept_2::STGI
            | intercept_2::CLGI
            | intercept_2::SKINIT
            | intercept_2::XSETBV;
        control.nested_paging = 1;
        control.io_map = core::ptr::from_ref(&*self.ports) as u64;
        control.msr_map = core::ptr::from_ref(&*self.msrs) as u64;
    }

    /// Has the guest's HLT exit, or, where it is let through, the interrupt that ends it.
    pub(crate) fn watch_halts(&mut self, instruction: bool) {
        let intercepts = &mut self.vmcb.control.intercept_instructions;
        let (on, off) = if instruction {
            (intercept::HLT, intercept::INTERRUPT)
        } else {
            (intercept::INTERRUPT, intercept::HLT)
        };
        *intercepts = *intercepts & !off | on;
    }

    /// The architectural state at the guest's first instruction.
    fn state(&mut self, entry: Entry) {
        let save = &mut self.vmcb.save;
        // Present, accessed, writable data with a 4 GiB limit; task and local table as after a reset.
        let data = Segment { selector: 0x18, attributes: 0xC93, limit: u32::MAX, base: 0 };
        let code = Segment { selector: 0x10, attributes: 0xC9B, ..data };
        [save.es, save.ss, save.ds, save.fs, save.gs] = [data; 5];
        save.tr = Segment { selector: 0, attributes: 0x8B, limit: 0xFFFF, base: 0 };
        save.ldtr = Segment { selector: 0, attributes: 0x82, limit: 0xFFFF, base: 0 };
        save.idtr = Segment { limit: 0, ..Segment::default() };
        save.efer = efer::SVME;
        save.rflags = RFLAGS_FIXED;
        save.dr6 = DR6_RESET;
        save.dr7 = 0x400;
        save.pat = PAT_RESET;
        match entry {
            Entry::Long { rip, rsi, cr3, gdt } => {
                save.cs = Segment { attributes: 0xA9B, ..code };
                save.gdtr = Segment { limit: DESCRIPTOR_LIMIT, base: gdt, ..Segment::default() };
                save.efer |= efer::LME | efer::LMA;
                // Paging, extension type (always 1), protection.
                save.cr0 = cr0::PG | 1 << 4 | cr0::PE;
                save.cr3 = cr3;
                save.cr4 = cr4::PAE;
                save.rip = rip;
                self.set_general(Gpr::Rsi, rsi);
            }
            Entry::Protected { eip, eax, ebx } => {
                save.cs = code;
                save.cr0 = 1 << 4 | cr0::PE;
                save.rip = eip.into();
                save.rax = eax.into();
                self.set_general(Gpr::Rbx, ebx.into());
            }
        }
    }

    /// Enters the guest with this root, identifier and flush, and returns at its exit.
    ///
    /// # Safety
    /// The tables at `root` give the guest nothing but what is its own, and stay as they are promised to be
    /// until this returns.
    #[inline(always)]
    pub(crate) unsafe fn enter(&mut self, root: u64, asid: u32, owed: EntryFlush) {
        let control = &mut self.vmcb.control;
        control.nested_cr3 = root;
        control.asid = asid;
        control.flush = match owed {
            EntryFlush::None => self.flush_wanted,
            EntryFlush::Tag => self.flush_one,
            EntryFlush::All => flush::EVERYTHING,
        };
        self.flush_wanted = flush::NOTHING;
        // SAFETY: SVM is on with GIF clear since `svm::enable`; both blocks were made by `new`, the maps live
        // as long as this; the caller answers for the tables.
        unsafe { switch::run(&mut self.registers, &mut self.vmcb, &self.host) };
        self.vmcb.control.event_injection = 0;
        if self.vmcb.control.exit_interrupt_info & event::VALID != 0 {
            self.redeliver();
        }
    }

    /// Has the event delivered again whose delivery the exit cut short. Software interrupts are executed
    /// again instead: the exit left the instruction pointer at them.
    #[cold]
    fn redeliver(&mut self) {
        let info = self.vmcb.control.exit_interrupt_info;
        let (vector, kind) = (info & 0xFF, info >> 8 & 7);
        let again = match (kind, vector) {
            // INT3 and INTO arrive as exceptions.
            (event::SOFTWARE, _) | (event::EXCEPTION, 3 | 4) => return,
            // An emulator reports external interrupts, and NMIs, as exceptions.
            (event::EXCEPTION, 2) => vector | event::NMI << 8,
            (event::EXCEPTION, 32..) => vector | event::INTERRUPT << 8,
            _ => info,
        };
        self.vmcb.control.event_injection = again | event::VALID;
    }

    /// Has the next entry flush what the guest's own translations have left behind.
    pub(crate) fn flush_translations(&mut self) {
        self.flush_wanted = self.flush_one;
    }

    /// How the current instruction is read.
    #[inline]
    pub(crate) fn mode(&self) -> CpuMode {
        let save = &self.vmcb.save;
        CpuMode::new(
            save.efer & efer::LMA != 0,
            save.cs.attributes & Segment::LONG != 0,
            save.cs.attributes & Segment::DEFAULT_32 != 0,
        )
    }

    /// The linear address of the current instruction.
    #[inline]
    pub(crate) fn linear_rip(&self) -> u64 {
        match self.mode() {
            CpuMode::Bits64 => self.vmcb.save.rip,
            CpuMode::Bits32 | CpuMode::Bits16 => {
                self.vmcb.save.cs.base.wrapping_add(self.vmcb.save.rip) & u64::from(u32::MAX)
            }
        }
    }

    /// Moves to the instruction at `next`: what an instruction does when it completes.
    #[inline]
    pub(crate) fn complete(&mut self, next: u64) {
        self.vmcb.save.rip = next;
        self.vmcb.control.interrupt_shadow = 0;
        if self.vmcb.save.rflags & (RFLAGS_TF | RFLAGS_RF) != 0 {
            self.complete_traced();
        }
    }

    #[cold]
    fn complete_traced(&mut self) {
        self.vmcb.save.rflags &= !RFLAGS_RF;
        if self.vmcb.save.rflags & RFLAGS_TF != 0 {
            self.vmcb.save.dr6 |= DR6_BS;
            self.inject(vector::DEBUG, None);
        }
    }

    /// Has the guest take an exception at its current instruction.
    #[inline]
    pub(crate) fn inject(&mut self, vector: u8, code: Option<u32>) {
        self.vmcb.control.event_injection = event::exception(vector, code);
    }

    /// Has the guest take a page fault at `address`.
    pub(crate) fn inject_page_fault(&mut self, address: u64, code: u32) {
        self.vmcb.save.cr2 = address;
        self.inject(vector::PAGE_FAULT, Some(code));
    }

    /// A general register, all 64 bits.
    #[inline]
    pub(crate) fn general(&self, gpr: Gpr) -> u64 {
        match gpr {
            Gpr::Rax => self.vmcb.save.rax,
            Gpr::Rsp => self.vmcb.save.rsp,
            _ => self.registers.general[gpr.number() as usize],
        }
    }

    /// Replaces a general register.
    #[inline]
    pub(crate) fn set_general(&mut self, gpr: Gpr, value: u64) {
        match gpr {
            Gpr::Rax => self.vmcb.save.rax = value,
            Gpr::Rsp => self.vmcb.save.rsp = value,
            _ => self.registers.general[gpr.number() as usize] = value,
        }
    }

    /// Control registers as the rules of [`hypervisor::registers`] want them.
    pub(crate) fn paging(&self) -> Paging {
        let save = &self.vmcb.save;
        Paging { cr0: save.cr0, cr3: save.cr3, cr4: save.cr4, efer: save.efer & !efer::SVME }
    }

    /// The state on which translations depend.
    pub(crate) fn paging_state(&self) -> PagingState {
        let mut state = PagingState::new(0, 0, 0, 0, self.capabilities.physical_bits);
        // Under nested paging the processor reads the top entries of three-level tables as it walks.
        state.pdptrs_in_memory = true;
        state.has_1g_pages = self.capabilities.gigabyte_pages;
        state.amd_compatible = true;
        self.refresh(&mut state);
        state
    }

    /// Brings a state of this processor's up to date.
    #[inline]
    pub(crate) fn refresh(&self, state: &mut PagingState) {
        let save = &self.vmcb.save;
        state.cr0 = save.cr0;
        state.cr3 = save.cr3;
        state.cr4 = save.cr4;
        state.efer = save.efer;
        state.cpl = save.cpl;
        state.rflags = save.rflags;
        if save.cr4 & cr4::PKE != 0 {
            // SAFETY: a guest can set the bit only where the processor has protection keys, and then the host
            // has enabled them too.
            state.pkru = unsafe { cpu::protection_keys() };
        }
    }
}

impl vmmu_emulate::Registers for Processor {
    fn gpr(&self, gpr: Gpr) -> u64 {
        self.general(gpr)
    }
    fn set_gpr(&mut self, gpr: Gpr, value: u64) {
        self.set_general(gpr, value);
    }
    fn rip(&self) -> u64 {
        self.vmcb.save.rip
    }
    fn rflags(&self) -> u64 {
        self.vmcb.save.rflags
    }
    fn set_rflags(&mut self, value: u64) {
        self.vmcb.save.rflags = value;
    }
    fn segment_base(&self, segment: vmmu_emulate::Segment) -> u64 {
        let save = &self.vmcb.save;
        match segment {
            vmmu_emulate::Segment::Es => save.es.base,
            vmmu_emulate::Segment::Cs => save.cs.base,
            vmmu_emulate::Segment::Ss => save.ss.base,
            vmmu_emulate::Segment::Ds => save.ds.base,
            vmmu_emulate::Segment::Fs => save.fs.base,
            vmmu_emulate::Segment::Gs => save.gs.base,
        }
    }
}

/// The words of CPUID that say which register bits there are.
fn features() -> Features {
    let basic = cpu::cpuid(0, 0).eax;
    let extended = cpu::cpuid(0x8000_0000, 0).eax;
    let leaf = |leaf: u32, most: u32| if leaf <= most { Some(cpu::cpuid(leaf, 0)) } else { None };
    let one = cpu::cpuid(1, 0);
    let seven = leaf(7, basic);
    let extended_1 = cpu::cpuid(0x8000_0001, 0);
    Features {
        leaf_1_ecx: one.ecx,
        leaf_1_edx: one.edx,
        leaf_7_ebx: seven.map_or(0, |leaf| leaf.ebx),
        leaf_7_ecx: seven.map_or(0, |leaf| leaf.ecx),
        leaf_d: leaf(0xD, basic).map_or(0, |leaf| u64::from(leaf.edx) << 32 | u64::from(leaf.eax)),
        extended_1_ecx: extended_1.ecx,
        extended_1_edx: extended_1.edx,
        extended_21_eax: leaf(0x8000_0021, extended).map_or(0, |leaf| leaf.eax),
    }
}
