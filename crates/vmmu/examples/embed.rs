//! The library embedded in a process that has no processor to give: real memory stands for the host's, and
//! faults are made up. A hypervisor does the same with its own allocator and the exits of its guests.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::Arc;
use vmmu::{
    Config, Contiguous, Fault, Gfn, Gpa, Host, Hpa, Outcome, Pfn, PhysCpu, Region, SlotId, TableFormat,
    TagSet, VcpuId, Vm,
};

/// Identity-mapped: a host-physical address is a pointer.
struct Process;

fn layout(order: u8) -> Layout {
    Layout::from_size_align(4096 << order, 4096 << order).expect("a small power of two")
}

// SAFETY: blocks are allocations of the stated size and alignment, mapped where they are; frames are pages of
// the allocation that `main` makes and keeps.
unsafe impl Host for Process {
    fn alloc_tables(&self, order: u8, _below_4g: bool) -> Option<Hpa> {
        // SAFETY: the layout is not empty.
        NonNull::new(unsafe { alloc_zeroed(layout(order)) }).map(|at| Hpa::new(at.as_ptr() as u64))
    }
    fn free_tables(&self, block: Hpa, order: u8) {
        // SAFETY: from `alloc_tables`, with the same layout.
        unsafe { dealloc(block.raw() as *mut u8, layout(order)) }
    }
    fn table_ptr(&self, at: Hpa) -> NonNull<u8> {
        NonNull::new(at.raw() as *mut u8).expect("no table lies at 0")
    }
    fn frame_ptr(&self, pfn: Pfn) -> Option<NonNull<u8>> {
        NonNull::new(pfn.hpa().raw() as *mut u8)
    }
    fn kick(&self, vcpu: VcpuId) {
        unreachable!("{vcpu:?} runs no guest code that could be interrupted");
    }
}

fn main() -> Result<(), vmmu::Error> {
    // 4 MiB of guest memory at guest-physical 0, from one host allocation.
    // SAFETY: the layout is not empty.
    let memory = unsafe { alloc_zeroed(layout(10)) } as u64;
    // SAFETY: the memory is the guest's until the VM ends.
    let backing = Arc::new(unsafe { Contiguous::new(Hpa::new(memory).pfn(), 1024) });
    let vm = Vm::new(Process, Config::new(TableFormat::Npt4, 48))?;
    vm.set_region(SlotId::new(0), Region::new(Gfn::new(0), 1024, backing))?;

    let mut vcpu = vm.vcpu()?;
    let mut cpu = PhysCpu::new(TagSet::asids(16, true));
    for gpa in [0x1000, 0x1008, 0x20_0000, 0xFEE0_0000] {
        vcpu.prepare()?;
        if let Ok(entry) = vcpu.enter(&mut cpu) {
            println!("enter: root {}, tag {}, flush {:?}", entry.root(), entry.tag(), entry.flush());
            entry.ran();
        }
        // The exit: a nested page fault, for a write of the guest's.
        match vcpu.handle_fault(Fault::npf(Gpa::new(gpa), 0x1_0000_0006))? {
            Outcome::Resume => println!("{gpa:#x}: mapped"),
            other => println!("{gpa:#x}: {other:?}"),
        }
    }
    vcpu.write(Gpa::new(0x1FFC), b"across two pages")?;
    println!("{:?}", vm.audit().expect("in order"));
    // SAFETY: the VM is not used after this, and nothing else has the memory.
    unsafe { dealloc(memory as *mut u8, layout(10)) };
    Ok(())
}
