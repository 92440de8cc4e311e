//! The host's own page tables: all memory at its physical address, with the rights that each part needs.
//!
//! The image's code can be run and not written, its constants neither, everything else can be written and not
//! run. Page 0 and the page below the stack are not mapped, so that a null pointer and a stack that overflows
//! end the run with a named error. The boot code's tables serve until [`load`].

use super::{boot_stack_guard, cpu, image, rodata_end, section, text_end};
use core::fmt;
use core::ops::Range;
use hypervisor::frame_map::FrameMap;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const PAGE: u64 = 4096;
const TWO_MIB: u64 = 2 << 20;
const GIB: u64 = 1 << 30;
/// With 1 GiB pages, tables for this much cost 8 pages: devices may lie anywhere below.
const FAR: u64 = 1 << 42;

/// Memory for the tables has run out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OutOfMemory;

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("out of memory for the host's page tables")
    }
}

impl core::error::Error for OutOfMemory {}

struct Builder<'a> {
    frames: &'a mut FrameMap,
    root: u64,
    levels: u32,
}

impl Builder<'_> {
    /// A table page of zeros.
    fn table(frames: &mut FrameMap) -> Result<u64, OutOfMemory> {
        let at = frames.take_block(0, Some(1 << 20)).ok_or(OutOfMemory)? * PAGE;
        // SAFETY: the frame was free, lies below 4 GiB and so is mapped one to one by the boot code.
        unsafe { core::ptr::write_bytes(at as *mut u8, 0, 4096) };
        Ok(at)
    }

    /// Writes the entry at `level` (1 to 3) that covers `address`, with tables above it as needed.
    fn map(&mut self, address: u64, level: u32, flags: u64) -> Result<(), OutOfMemory> {
        let mut table = self.root;
        let slot =
            |table: u64, level: u32| (table + (address >> (12 + 9 * (level - 1)) & 511) * 8) as *mut u64;
        for above in (level + 1..=self.levels).rev() {
            let entry = slot(table, above);
            // SAFETY: `table` is a page of this builder, and the index is below 512.
            table = match unsafe { entry.read() } & !(PAGE - 1) {
                0 => {
                    let fresh = Self::table(self.frames)?;
                    // SAFETY: as above.
                    unsafe { entry.write(fresh | PRESENT | WRITABLE) };
                    fresh
                }
                table => table,
            };
        }
        // SAFETY: as above.
        unsafe { slot(table, level).write(address | flags) };
        Ok(())
    }
}

/// The rights of the 4 KiB page at `address`; `None` where it is not to be mapped.
fn rights(address: u64) -> Option<u64> {
    let (text, constants) = (section(&raw const text_end), section(&raw const rodata_end));
    if address == 0 || address == section(&raw const boot_stack_guard) {
        None
    } else if (image().start..text).contains(&address) {
        Some(PRESENT)
    } else if (text..constants).contains(&address) {
        Some(PRESENT | NO_EXECUTE)
    } else {
        Some(PRESENT | WRITABLE | NO_EXECUTE)
    }
}

/// Builds tables for everything up to `end` (host-physical) at least, loads them, and returns where what they
/// map ends. `levels` is how many the processor walks, 4 or 5.
pub(crate) fn load(frames: &mut FrameMap, end: u64, levels: u32) -> Result<u64, OutOfMemory> {
    let extended = cpu::cpuid(0x8000_0001, 0);
    let physical = 1u64 << (cpu::cpuid(0x8000_0008, 0).eax & 0xFF).clamp(32, 52);
    let gigabyte_pages = extended.edx >> 26 & 1 != 0;
    let wanted = if gigabyte_pages { FAR.min(physical) } else { 4 * GIB };
    let end = wanted.max(end).next_multiple_of(GIB).min(physical);
    let root = Builder::table(frames)?;
    let mut builder = Builder { frames, root, levels };
    let small: Range<u64> = 0..image().end.next_multiple_of(TWO_MIB);
    for address in (0..small.end).step_by(4096) {
        if let Some(rights) = rights(address) {
            builder.map(address, 1, rights)?;
        }
    }
    let mut address = small.end;
    while address < end {
        let (level, bytes) =
            if gigabyte_pages && address.is_multiple_of(GIB) { (3, GIB) } else { (2, TWO_MIB) };
        builder.map(address, level, PRESENT | WRITABLE | LARGE | NO_EXECUTE)?;
        address += bytes;
    }
    // SAFETY: everything the boot code mapped is mapped at the same place, but for the two pages that nobody
    // uses.
    unsafe { cpu::set_cr3(builder.root) };
    Ok(end)
}
