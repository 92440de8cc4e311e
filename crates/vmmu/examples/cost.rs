//! One operation, many times, for an instruction counter around the process:
//!
//! ```text
//! valgrind --tool=callgrind target/release/examples/cost touch4k 10000
//! ```
//!
//! What one operation costs is the difference between two counts of rounds, divided: set-up falls out.

use std::alloc::{Layout, alloc_zeroed};
use std::ptr::NonNull;
use std::sync::Arc;
use vmmu::{
    Access, Config, Contiguous, Fault, Gfn, Gpa, Gva, Host, Hpa, PagingState, Pfn, PhysCpu, Region, SlotId,
    TableFormat, TagSet, VcpuId, Vm,
};

/// Table memory is one large allocation, so that no allocator is measured; it is never given back.
struct Arena(NonNull<u8>, std::sync::atomic::AtomicU64);

const TABLES: u64 = 16 << 20;
const BASE: u64 = 1 << 30;

// SAFETY: the memory is reached through the library alone, block by block.
unsafe impl Sync for Arena {}
// SAFETY: as above.
unsafe impl Send for Arena {}

fn layout(bytes: u64) -> Layout {
    Layout::from_size_align(usize::try_from(bytes).expect("64-bit"), 1 << 21).expect("a power of two")
}

// SAFETY: each block is a fresh part of one aligned allocation that lives as long as the process; frames are
// those of the one backing, another such allocation.
unsafe impl Host for Arena {
    fn alloc_tables(&self, order: u8, _: bool) -> Option<Hpa> {
        let at = self.1.fetch_add(4096 << order, std::sync::atomic::Ordering::Relaxed);
        (at + (4096 << order) <= TABLES).then(|| Hpa::new(BASE + at))
    }
    fn free_tables(&self, _: Hpa, _: u8) {}
    fn table_ptr(&self, at: Hpa) -> NonNull<u8> {
        // SAFETY: the library asks only for blocks that it was given, all inside the allocation.
        unsafe { self.0.add(usize::try_from(at.raw() - BASE).expect("64-bit")) }
    }
    fn frame_ptr(&self, pfn: Pfn) -> Option<NonNull<u8>> {
        NonNull::new(pfn.hpa().raw() as *mut u8)
    }
    fn kick(&self, _: VcpuId) {}
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let usage = "cost touch4k|touch2m|spurious|enter|fetch ROUNDS";
    let (Some(what), Some(rounds)) = (arguments.next(), arguments.next().and_then(|n| n.parse::<u64>().ok()))
    else {
        panic!("{usage}");
    };
    // SAFETY: neither layout is empty.
    let (tables, memory) = unsafe { (alloc_zeroed(layout(TABLES)), alloc_zeroed(layout(1 << 21))) };
    let host = Arena(NonNull::new(tables).expect("memory"), std::sync::atomic::AtomicU64::new(0));
    let vm = Vm::new(host, Config::new(TableFormat::Npt4, 48)).expect("legal");
    // Memory that the guest's own tables and code are read from, and memory that is only mapped.
    // SAFETY: the memory is the guest's for as long as the process lasts.
    let own = unsafe { Contiguous::new(Hpa::new(memory as u64).pfn(), 512) };
    let size = if what == "touch2m" { vmmu::PageSize::Size2M } else { vmmu::PageSize::Size4K };
    // SAFETY: no guest runs, and nobody reads or writes through these frames.
    let mapped = unsafe { Contiguous::new(Pfn::new(1 << 20), 1 << 24) }.max_size(size);
    let region = |gfn, pages, backing| Region::new(Gfn::new(gfn), pages, Arc::new(backing));
    vm.set_region(SlotId::new(0), region(0, 512, own)).expect("valid");
    vm.set_region(SlotId::new(1), region(1 << 18, 1 << 24, mapped)).expect("valid");
    let mut vcpu = vm.vcpu().expect("alive");
    let mut cpu = PhysCpu::new(TagSet::asids(16, true));
    // Four levels of guest tables that map the first 2 MiB, by 4 KiB pages.
    for level in 0..3u64 {
        vcpu.write(Gpa::new((1 + level) << 12), &((2 + level) << 12 | 0x63).to_le_bytes()).expect("backed");
    }
    for page in 0..512u64 {
        vcpu.write(Gpa::new((4 << 12) + 8 * page), &(page << 12 | 0x63).to_le_bytes()).expect("backed");
    }
    vcpu.prepare().expect("memory");
    let start = 1u64 << 30;
    match &*what {
        "touch4k" | "touch2m" => {
            let step = size.bytes();
            for n in 0..rounds {
                let outcome = vcpu.handle_fault(Fault::npf(Gpa::new(start + n * step), 0x1_0000_0006));
                assert_eq!(outcome, Ok(vmmu::Outcome::Resume));
            }
        }
        "spurious" => {
            for _ in 0..=rounds {
                let outcome = vcpu.handle_fault(Fault::npf(Gpa::new(start), 0x1_0000_0006));
                assert_eq!(outcome, Ok(vmmu::Outcome::Resume));
            }
        }
        "enter" => {
            for _ in 0..rounds {
                vcpu.enter(&mut cpu).expect("nothing came up").ran();
            }
        }
        "fetch" => {
            vcpu.set_paging(PagingState::new(0x8001_0001, 0x1000, 0x20, 0xD00, 48));
            assert!(vcpu.translate(Gva::new(0x10_0000), Access::FETCH).is_ok());
            for n in 0..rounds {
                let bytes = vcpu.fetch_instruction(Gva::new(0x10_0000 + n % 64)).expect("mapped");
                assert_eq!(bytes.len(), 16);
            }
        }
        _ => panic!("{usage}"),
    }
}
