//! The bare-metal image of the reference hypervisor: boots on a machine with AMD's SVM and nested paging,
//! gives one guest its memory through `vmmu`, and runs it to its end.
//!
//! A multiboot 1 loader starts it (QEMU's `-kernel`, GRUB) with one or two modules: the guest's kernel, whose
//! arguments are the guest's command line, and an initrd. The kernel is a Linux bzImage or a multiboot 1
//! image. The guest owns the machine's devices and its first serial port; the hypervisor speaks on the
//! second.
//!
//! The command line holds words of these, see [`hypervisor::options`]: `mode=npt`,
//! `layout=scattered|contiguous`, `seed=N`, `memory=N[K|M|G]`, `levels=4`, `no-next-rip`,
//! `no-decode-assists`, `no-flush-by-asid`, `churn=N`, `churn-fault=skip|early-copy`.
#![no_std]
#![no_main]

extern crate alloc;

mod churn;
mod guest;
mod machine;
mod memory;
mod report;
mod svm;

use alloc::sync::Arc;
use alloc::vec::Vec;
use churn::{Churn, Motion};
use core::convert::Infallible;
use core::ops::Range;
use core::panic::PanicInfo;
use guest::devices::Devices;
use guest::ports::Ports;
use guest::services::{REGION, Services};
use guest::{End, load};
use hypervisor::acpi::Acpi;
use hypervisor::boot_info::{BootInfo, Module};
use hypervisor::frame_map::FrameMap;
use hypervisor::guest_image::{Entry, Files, Image};
use hypervisor::guest_map::GuestMap;
use hypervisor::layout::{self, Placed};
use hypervisor::memory_map::{Kind, MemoryMap, Physical, subtract};
use hypervisor::moving::MovingFrames;
use hypervisor::options::Options;
use hypervisor::registers::cr4;
use machine::hpet::Hpet;
use machine::physical::IdentityMapped;
use machine::{cpu, descriptors, heap, paging, serial};
use memory::{MachineHost, Memory, Moving, WholeBlocks};
use report::{Setting, say};
use svm::processor::Processor;
use svm::run::Machine;
use svm::ticks::Ticks;
use vmmu::addr::PAGE_BYTES;
use vmmu::{
    Backing, Config, Contiguous, Gfn, Pfn, PhysCpu, Region, RegionFlags, SlotId, TableFormat, TagSet, Vm,
};

/// Memory below this is firmware's and the loader's; nothing of ours or the guest's is taken from it.
const LOW: u64 = 1 << 20;
/// The boot code maps this much.
const BOOT_MAPPED: u64 = 1 << 32;

/// Where the boot code enters, on a stack of 64 KiB, with interrupts off.
#[unsafe(no_mangle)]
extern "C" fn image_main(magic: u32, information: u32) -> ! {
    heap::initialise();
    serial::initialise();
    descriptors::load();
    let Err(end) = run(magic, information.into());
    report::fatal(format_args!("{end}"))
}

/// Everything: the machine, the guest's memory, the guest. Comes back only with an error.
fn run(magic: u32, information: u64) -> Result<Infallible, End> {
    // SAFETY: the boot code maps the first 4 GiB, and nothing changes what the loader and firmware left while
    // it is read here.
    let physical = unsafe { IdentityMapped::below(BOOT_MAPPED) };
    let boot = BootInfo::read(magic, information, &physical).map_err(End::error)?;
    let options = Options::parse(&boot.line).map_err(End::error)?;
    if options.churn_fault.is_some() && !churn::MISTAKES {
        return Err(End::error("this image is built without the mistakes of `churn-fault`"));
    }
    let levels = if cpu::cr4() & cr4::LA57 != 0 { 5 } else { 4 };
    let acpi = Acpi::find(&physical);
    if acpi.processors > 1 {
        let count = acpi.processors;
        return Err(End::error(format_args!(
            "the machine has {count} processors; this hypervisor drives one"
        )));
    }

    // What firmware says of it must not be taken for more than it can be.
    let timer = acpi.hpet.filter(|&at| !boot.map.touches_ram(&(at..at.saturating_add(PAGE_BYTES))));
    let guest_map = GuestMap::plan(&boot.map, options.memory, timer).map_err(End::error)?;
    let mut free = free_frames(&boot);
    let mapped = paging::load(&mut free, boot.map.ram_end(), levels).map_err(End::error)?;
    let timer = timer.filter(|&at| at < mapped);
    grow_heap(&mut free, options.memory)?;
    let capabilities = svm::enable(&options).map_err(End::error)?;
    enable_extended_state();

    let files = files(&boot.modules, &physical)?;
    let image = Image::plan(files, &guest_map, acpi.rsdp).map_err(End::error)?;
    let plan = MemoryPlan::new(&options, &guest_map, image.entry, &mut free)?;
    say!(
        "hypervisor: {}, {} MiB, {levels}-level nested tables, {capabilities}",
        image.kind,
        options.memory >> 20
    );

    let (heap_before, free_before) = (heap::used(), free.free_frames());
    let memory = Memory::new(free, readable(&boot.map));
    let format = if levels == 5 { TableFormat::Npt5 } else { TableFormat::Npt4 };
    let config = Config::new(format, capabilities.physical_bits);
    let vm = Vm::new(MachineHost(memory.clone()), config).map_err(End::error)?;
    let (region, motion) = plan.install(&vm, &guest_map).map_err(End::error)?;
    load::load(&vm, &image).map_err(End::error)?;
    let Image { kind: guest, entry, .. } = image;
    // Nothing reads the modules any more.
    for module in &boot.modules {
        memory.frames(|frames| frames.add(module.range.start.max(LOW)..module.range.end));
    }
    let vcpu = vm.vcpu().map_err(End::error)?;
    let frames_taken = free_before.saturating_sub(memory.frames(|frames| frames.free_frames()));
    let set_up = heap::used().saturating_sub(heap_before) + frames_taken * PAGE_BYTES;

    let mut machine = Machine::new(
        Processor::new(capabilities, entry),
        vcpu,
        PhysCpu::new(TagSet::asids(capabilities.asids, capabilities.flush_by_asid)),
        Ports::new(acpi),
        Devices::new(boot.map, mapped),
        Services::new(vm.clone(), options.memory, region, set_up),
    );
    if let Some((rate, motion)) = options.churn.zip(motion) {
        // SAFETY: the guest has nothing at the timer's page, so it is the hypervisor's; the NMI's handler does
        // nothing and comes back; the machine has one processor.
        let clock = unsafe { Hpet::start(timer, churn::TICK) }.map_err(End::error)?;
        machine.tick(Ticks::new(Churn::new(vm.clone(), motion, rate, options.churn_fault, clock)));
    }
    let end = machine.run();
    let ram = guest_map.ram.iter().map(|range| range.start / PAGE_BYTES..range.end / PAGE_BYTES);
    let setting = Setting { options: &options, levels, guest, ram: &ram.collect::<Vec<_>>() };
    report::finish(&end, &machine, &vm, &setting)
}

/// The machine's frames that nobody uses: RAM above 1 MiB without the image and the modules.
fn free_frames(boot: &BootInfo) -> FrameMap {
    let mut free = FrameMap::new(boot.map.ram_end());
    for range in boot.map.ram() {
        free.add(range.start.max(LOW)..range.end);
    }
    free.remove(machine::image());
    for module in &boot.modules {
        free.remove(module.range.clone());
    }
    free
}

/// Gives the heap what bookkeeping for a guest with `memory` bytes takes: lists with a word for each page, a
/// few times over while they are made.
fn grow_heap(free: &mut FrameMap, memory: u64) -> Result<(), End> {
    let bytes = (8 << 20) + (memory / 64).next_multiple_of(PAGE_BYTES);
    let frames = bytes / PAGE_BYTES;
    let Some(first) = free.take_run(frames, 1, 0) else {
        let free = free.free_frames();
        return Err(End::error(layout::OutOfFrames { wanted: frames, free }));
    };
    // SAFETY: the run was free and now belongs to the heap alone.
    unsafe { heap::extend(first * PAGE_BYTES, bytes) };
    Ok(())
}

/// Has XSETBV and RDPKRU work for the host, which does the one for the guest and asks the other about it.
fn enable_extended_state() {
    let mut bits = 0;
    if cpu::cpuid(1, 0).ecx >> 26 & 1 != 0 {
        bits |= cr4::OSXSAVE;
    }
    if cpu::cpuid(0, 0).eax >= 7 && cpu::cpuid(7, 0).ecx >> 3 & 1 != 0 {
        bits |= cr4::PKE;
    }
    // SAFETY: the processor has both. Protection keys say nothing of pages that are not the user's, and the
    // host has no others.
    unsafe { cpu::set_cr4(cpu::cr4() | bits) };
}

/// The guest's files among the loader's modules.
fn files<'a>(modules: &'a [Module], physical: &'a impl Physical) -> Result<Files<'a>, End> {
    let bytes = |module: &Module| {
        let (start, len) = (module.range.start, module.range.end - module.range.start);
        let unreadable = || End::error(format_args!("the module at {start:#x} lies where it cannot be read"));
        if len == 0 { Ok(&[][..]) } else { physical.bytes(start, len).ok_or_else(unreadable) }
    };
    match modules {
        [] => Err(End::error("no kernel: the loader gave no module")),
        [kernel, rest @ ..] if rest.len() <= 1 => Ok(Files {
            kernel: bytes(kernel)?,
            // The file's name comes first.
            line: kernel.line.trim_start().split_once(' ').map_or("", |(_, line)| line),
            initrd: rest.first().map(bytes).transpose()?,
        }),
        _ => Err(End::error("more than two modules: a kernel and an initrd are all that is used")),
    }
}

/// What software may read like memory: RAM, the ROM area below 1 MiB, ACPI's ranges. The largest first.
#[allow(clippy::single_range_in_vec_init)] // it is one range
fn readable(map: &MemoryMap) -> Vec<Range<u64>> {
    let memory =
        map.entries().iter().filter(|entry| entry.kind != Kind::Reserved && entry.kind != Kind::Unusable);
    let mut ranges: Vec<Range<u64>> =
        memory.map(|entry| entry.range.clone()).chain([0xC_0000..LOW]).collect();
    ranges.sort_by_key(|range| core::cmp::Reverse(range.end - range.start));
    ranges
}

/// The test region's slot with the blocks behind it, and what moves, where there are such.
type Installed = (Option<(SlotId, Vec<u64>)>, Option<Motion>);

/// Which frames stand behind the guest's RAM.
struct MemoryPlan {
    placed: Vec<Placed>,
    /// The same frames where they move, part by part, and how.
    moving: Option<(Vec<Arc<MovingFrames>>, Motion)>,
    /// Whole blocks behind the payload's test region, where a guest can use it.
    region: Option<Vec<u64>>,
}

impl MemoryPlan {
    /// Takes frames for all of `map`'s RAM. A multiboot guest that has all of the payload's test region gets
    /// a slot of whole blocks for it.
    fn new(options: &Options, map: &GuestMap, entry: Entry, free: &mut FrameMap) -> Result<Self, End> {
        let (kind, seed) = (options.layout, options.seed);
        let has_region = matches!(entry, Entry::Protected { .. })
            && map.ram_end(REGION.start).is_some_and(|end| REGION.end <= end);
        let holes = if has_region { &[REGION][..] } else { &[] };
        let region = has_region
            .then(|| {
                layout::place_whole(kind, seed, &(REGION.start / PAGE_BYTES..REGION.end / PAGE_BYTES), free)
            })
            .transpose()
            .map_err(End::error)?;
        let ram: Vec<Range<u64>> = map.ram.iter().flat_map(|range| subtract(range.clone(), holes)).collect();
        let placed = layout::place(kind, seed, &ram, free).map_err(End::error)?;
        let moving = options.churn.map(|_| {
            let ranges: Vec<_> = placed.iter().map(|part| Arc::new(MovingFrames::new(part))).collect();
            let motion = Motion::new(ranges.clone(), seed, free);
            (ranges, motion)
        });
        Ok(Self { placed, moving, region })
    }

    /// Makes the slots: RAM, firmware's ranges, the page of a device that is not there, the test region; returns
    /// the latter, and what moves.
    fn install(self, vm: &Vm<MachineHost>, map: &GuestMap) -> Result<Installed, vmmu::Error> {
        let mut slots = 0;
        let mut add = |region: Region| -> Result<SlotId, vmmu::Error> {
            let id = SlotId::new(slots);
            slots += 1;
            vm.set_region(id, region)?;
            Ok(id)
        };
        let (ranges, motion) = self.moving.unzip();
        for (index, placed) in self.placed.iter().enumerate() {
            let (gfn, pages) = (Gfn::new(placed.gfns.start), placed.gfns.end - placed.gfns.start);
            let backing: Arc<dyn Backing> = match &ranges {
                Some(ranges) => Arc::new(Moving(ranges[index].clone())),
                None => memory::backing(&placed.frames, pages),
            };
            add(Region::new(gfn, pages, backing))?;
        }
        for identity in &map.identity {
            let first = identity.range.start / PAGE_BYTES;
            let pages = identity.range.end / PAGE_BYTES - first;
            let flags = if identity.writable { RegionFlags::empty() } else { RegionFlags::READ_ONLY };
            // SAFETY: firmware ranges and device pages, which the machine's map gives to nobody; the guest has the
            // machine's devices.
            let backing = Arc::new(unsafe { Contiguous::new(Pfn::new(first), pages) });
            add(Region::new(Gfn::new(first), pages, backing).flags(flags))?;
        }
        if let Some(page) = &map.absent {
            let gfn = Gfn::new(page.start / PAGE_BYTES);
            add(Region::new(gfn, 1, memory::absent_device()).flags(RegionFlags::READ_ONLY))?;
        }
        let Some(blocks) = self.region else { return Ok((None, motion)) };
        let (gfn, pages) = (Gfn::new(REGION.start / PAGE_BYTES), (REGION.end - REGION.start) / PAGE_BYTES);
        let id = add(Region::new(gfn, pages, Arc::new(WholeBlocks(blocks.clone()))))?;
        Ok((Some((id, blocks)), motion))
    }
}

/// A panic is a bug of the hypervisor: a named end like any other.
#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    report::fatal(format_args!("{info}"))
}
