//! Linux bzImages by the 64-bit boot protocol (Linux kernel documentation, "The Linux/x86 Boot Protocol").
//!
//! Below 1 MiB lie, in this order: the zero page, page tables that map the first 4 GiB one to one, a
//! descriptor table, the command line. The kernel goes to the address it prefers, the initrd as high as it
//! may.

use crate::bytes::{put, u8_at, u16_at, u32_at, u64_at};
use crate::guest_image::{Entry, Files, Image, Part, is_ram};
use crate::guest_map::GuestMap;
use alloc::borrow::Cow;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

const PAGE: u64 = 4096;
const ZERO_PAGE: u64 = 0x1_0000;
const TABLES: u64 = 0x1_1000;
const DESCRIPTORS: u64 = 0x1_7000;
const COMMAND_LINE: u64 = 0x2_0000;

/// Offsets in the file and, for the setup header, in the zero page alike.
mod offset {
    pub(super) const ACPI_RSDP: usize = 0x070;
    pub(super) const EXT_RAMDISK_IMAGE: usize = 0x0C0;
    pub(super) const EXT_RAMDISK_SIZE: usize = 0x0C4;
    pub(super) const E820_ENTRIES: usize = 0x1E8;
    pub(super) const SETUP_SECTS: usize = 0x1F1;
    pub(super) const BOOT_FLAG: usize = 0x1FE;
    pub(super) const JUMP_LENGTH: usize = 0x201;
    pub(super) const HEADER: usize = 0x202;
    pub(super) const VERSION: usize = 0x206;
    pub(super) const TYPE_OF_LOADER: usize = 0x210;
    pub(super) const LOADFLAGS: usize = 0x211;
    pub(super) const RAMDISK_IMAGE: usize = 0x218;
    pub(super) const RAMDISK_SIZE: usize = 0x21C;
    pub(super) const CMD_LINE_PTR: usize = 0x228;
    pub(super) const INITRD_ADDR_MAX: usize = 0x22C;
    pub(super) const XLOADFLAGS: usize = 0x236;
    pub(super) const CMDLINE_SIZE: usize = 0x238;
    pub(super) const PREF_ADDRESS: usize = 0x258;
    pub(super) const INIT_SIZE: usize = 0x260;
    pub(super) const E820_TABLE: usize = 0x2D0;
}

/// Entries that the zero page has room for.
const E820_MAX: usize = 128;
/// Protocol 2.12, the first with a 64-bit entry point that is announced.
const OLDEST: u16 = 0x020C;

/// Why a bzImage cannot be loaded.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum LinuxError {
    /// The file ends before its header or its kernel does.
    Truncated {
        /// Bytes that the header promises at least.
        wanted: u64,
        /// Bytes of the file.
        has: u64,
    },
    /// The boot protocol is older than 2.12; the value is its version.
    Version(u16),
    /// The kernel has no 64-bit entry point.
    No64BitEntry,
    /// The kernel does not fit into the guest's memory.
    Memory {
        /// Where it wants to lie, guest-physical.
        at: u64,
        /// Bytes that it needs to start.
        bytes: u64,
    },
    /// The initrd does not fit between the kernel and the end of the guest's memory.
    Initrd {
        /// Bytes of the initrd.
        bytes: u64,
        /// Bytes that there is room for.
        room: u64,
    },
    /// The command line is longer than the kernel takes.
    CommandLine {
        /// Bytes of the line.
        bytes: u64,
        /// Bytes that the kernel takes.
        most: u64,
    },
    /// The memory map has more entries than the zero page has room for; the value is their number.
    MapEntries(usize),
}

impl fmt::Display for LinuxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Truncated { wanted, has } => {
                write!(f, "truncated: the file has {has} bytes of at least {wanted}")
            }
            Self::Version(version) => {
                write!(f, "boot protocol {}.{:02} is older than 2.12", version >> 8, version & 0xFF)
            }
            Self::No64BitEntry => write!(f, "the kernel has no 64-bit entry point"),
            Self::Memory { at, bytes } => {
                write!(f, "memory too small: the kernel needs {bytes} bytes at {at:#x}")
            }
            Self::Initrd { bytes, room } => {
                write!(f, "initrd too large: it has {bytes} bytes, memory has room for {room}")
            }
            Self::CommandLine { bytes, most } => {
                write!(f, "the command line has {bytes} bytes, the kernel takes {most}")
            }
            Self::MapEntries(entries) => {
                write!(f, "the memory map has {entries} entries, more than {E820_MAX}")
            }
        }
    }
}

impl core::error::Error for LinuxError {}

/// Whether `file` begins like a bzImage.
pub fn is_bzimage(file: &[u8]) -> bool {
    u16_at(file, offset::BOOT_FLAG) == Some(0xAA55)
        && file.get(offset::HEADER..offset::HEADER + 4) == Some(b"HdrS")
}

/// The fields of the setup header that loading needs.
struct Header {
    /// Where the header ends in the file.
    end: usize,
    /// Where the protected-mode kernel begins in the file.
    kernel: usize,
    initrd_max: u64,
    line_max: u64,
    preferred: u64,
    init_size: u64,
}

impl Header {
    fn read(file: &[u8]) -> Result<Self, LinuxError> {
        let has = file.len() as u64;
        let truncated = |wanted: usize| LinuxError::Truncated { wanted: wanted as u64, has };
        let whole = truncated(offset::INIT_SIZE + 4);
        let version = u16_at(file, offset::VERSION).ok_or(whole.clone())?;
        if version < OLDEST {
            return Err(LinuxError::Version(version));
        }
        let word = |at| u32_at(file, at).map(u64::from).ok_or(whole.clone());
        if u16_at(file, offset::XLOADFLAGS).ok_or(whole.clone())? & 1 == 0 {
            return Err(LinuxError::No64BitEntry);
        }
        // Zero sectors mean four, for kernels older than this protocol.
        let sectors = match u8_at(file, offset::SETUP_SECTS).ok_or(whole.clone())? {
            0 => 4,
            sectors => usize::from(sectors),
        };
        let kernel = (sectors + 1) * 512;
        // The size in 16-byte units, at 0x1F4.
        let size = word(0x1F4)?.saturating_mul(16);
        let end = offset::HEADER + usize::from(u8_at(file, offset::JUMP_LENGTH).ok_or(whole.clone())?);
        let wanted = (kernel as u64).saturating_add(size).max(end as u64);
        if has < wanted {
            return Err(LinuxError::Truncated { wanted, has });
        }
        Ok(Self {
            end: end.min(offset::E820_TABLE),
            kernel,
            initrd_max: word(offset::INITRD_ADDR_MAX)?,
            line_max: word(offset::CMDLINE_SIZE)?,
            preferred: u64_at(file, offset::PREF_ADDRESS).ok_or(whole.clone())?,
            init_size: word(offset::INIT_SIZE)?,
        })
    }
}

/// Plans the guest that `files` make in the memory of `map`.
#[allow(clippy::cast_possible_truncation)] // addresses below 4 GiB, and the upper halves are given too
pub(crate) fn plan<'a>(files: Files<'a>, map: &GuestMap, rsdp: Option<u64>) -> Result<Image<'a>, LinuxError> {
    let header = Header::read(files.kernel)?;
    let kernel = &files.kernel[header.kernel..];
    let bytes = header.init_size.max(kernel.len() as u64);
    let at = header.preferred;
    let end = at.saturating_add(bytes);
    let ram_end = match map.ram_end(at) {
        Some(ram_end) if end <= ram_end && is_ram(map, &(0..COMMAND_LINE + PAGE)) => ram_end,
        _ => return Err(LinuxError::Memory { at, bytes }),
    };
    let line = files.line.as_bytes();
    if line.len() as u64 > header.line_max
        || !is_ram(map, &(COMMAND_LINE..COMMAND_LINE + line.len() as u64 + 1))
    {
        return Err(LinuxError::CommandLine { bytes: line.len() as u64, most: header.line_max });
    }

    let mut page = vec![0; PAGE as usize];
    put(&mut page, offset::SETUP_SECTS, &files.kernel[offset::SETUP_SECTS..header.end]);
    put(&mut page, offset::TYPE_OF_LOADER, &[0xFF]);
    page[offset::LOADFLAGS] |= 1;
    put(&mut page, offset::CMD_LINE_PTR, &(COMMAND_LINE as u32).to_le_bytes());
    put(&mut page, offset::ACPI_RSDP, &rsdp.unwrap_or(0).to_le_bytes());
    let entries = map.map.entries();
    if entries.len() > E820_MAX {
        return Err(LinuxError::MapEntries(entries.len()));
    }
    page[offset::E820_ENTRIES] = entries.len() as u8;
    for (index, entry) in entries.iter().enumerate() {
        let place = offset::E820_TABLE + index * 20;
        put(&mut page, place, &entry.range.start.to_le_bytes());
        put(&mut page, place + 8, &(entry.range.end - entry.range.start).to_le_bytes());
        put(&mut page, place + 16, &entry.kind.number().to_le_bytes());
    }

    let mut parts = vec![];
    if let Some(initrd) = files.initrd {
        let size = initrd.len() as u64;
        let top = ram_end.min(header.initrd_max + 1);
        let room = top.saturating_sub(end.next_multiple_of(PAGE));
        if size > room {
            return Err(LinuxError::Initrd { bytes: size, room });
        }
        let place = (top - size) & !(PAGE - 1);
        put(&mut page, offset::RAMDISK_IMAGE, &(place as u32).to_le_bytes());
        put(&mut page, offset::EXT_RAMDISK_IMAGE, &((place >> 32) as u32).to_le_bytes());
        put(&mut page, offset::RAMDISK_SIZE, &(size as u32).to_le_bytes());
        put(&mut page, offset::EXT_RAMDISK_SIZE, &((size >> 32) as u32).to_le_bytes());
        parts.push(Part { at: place, bytes: Cow::Borrowed(initrd), zeros: 0 });
    }
    parts.push(Part { at, bytes: Cow::Borrowed(kernel), zeros: 0 });
    parts.push(Part { at: ZERO_PAGE, bytes: Cow::Owned(page), zeros: 0 });
    parts.push(Part { at: TABLES, bytes: Cow::Owned(identity_tables()), zeros: 0 });
    parts.push(Part { at: DESCRIPTORS, bytes: Cow::Owned(descriptors()), zeros: 0 });
    parts.push(Part { at: COMMAND_LINE, bytes: Cow::Borrowed(line), zeros: 1 });
    let entry = Entry::Long { rip: at + 0x200, rsi: ZERO_PAGE, cr3: TABLES, gdt: DESCRIPTORS };
    Ok(Image { kind: "Linux bzImage, 64-bit entry", parts, entry })
}

/// Six table pages for [`TABLES`]: one at level 4, one at level 3, four at level 2 with 2 MiB pages.
fn identity_tables() -> Vec<u8> {
    let upper = |entries: &[u64]| {
        let mut table = vec![0; 512];
        table[..entries.len()].copy_from_slice(entries);
        table
    };
    let directory = |index: u64| TABLES + (2 + index) * PAGE + 3;
    let level_4 = upper(&[TABLES + PAGE + 3]);
    let level_3 = upper(&[directory(0), directory(1), directory(2), directory(3)]);
    let pages = (0..4 * 512u64).map(|index| index << 21 | 0x83);
    level_4.into_iter().chain(level_3).chain(pages).flat_map(u64::to_le_bytes).collect()
}

/// The descriptor table: code at 0x10, data at 0x18, both flat.
fn descriptors() -> Vec<u8> {
    [0u64, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF].into_iter().flat_map(u64::to_le_bytes).collect()
}

/// Bytes of the descriptor table, less one: its limit.
pub const DESCRIPTOR_LIMIT: u32 = 31;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory_map::{Entry as MapEntry, Kind, MemoryMap};

    const MIB: u64 = 1 << 20;

    fn map(memory: u64) -> GuestMap {
        let machine = MemoryMap::new([
            MapEntry { range: 0..0x9_FC00, kind: Kind::Ram },
            MapEntry { range: MIB..1 << 30, kind: Kind::Ram },
            MapEntry { range: 1 << 30..(1 << 30) + MIB, kind: Kind::AcpiTables },
        ]);
        GuestMap::plan(&machine, memory, None).unwrap()
    }

    fn kernel() -> Vec<u8> {
        let mut file = vec![0xCC; 5 * 512 + 0x1000];
        put(&mut file, offset::SETUP_SECTS, &[4]);
        put(&mut file, 0x1F4, &0x100u32.to_le_bytes());
        put(&mut file, offset::BOOT_FLAG, &0xAA55u16.to_le_bytes());
        put(&mut file, 0x200, &[0xEB, 0x6A]);
        put(&mut file, offset::HEADER, b"HdrS");
        put(&mut file, offset::VERSION, &0x020Fu16.to_le_bytes());
        put(&mut file, offset::XLOADFLAGS, &3u16.to_le_bytes());
        put(&mut file, offset::INITRD_ADDR_MAX, &0x7FFF_FFFFu32.to_le_bytes());
        put(&mut file, offset::CMDLINE_SIZE, &2047u32.to_le_bytes());
        put(&mut file, offset::PREF_ADDRESS, &(16 * MIB).to_le_bytes());
        put(&mut file, offset::INIT_SIZE, &0x20_0000u32.to_le_bytes());
        file
    }

    fn plan_of<'a>(kernel: &'a [u8], initrd: Option<&'a [u8]>, memory: u64) -> Result<Image<'a>, LinuxError> {
        assert!(is_bzimage(kernel));
        plan(Files { kernel, line: "console=ttyS0", initrd }, &map(memory), Some(0xF_1234))
    }

    #[test]
    fn the_zero_page_says_where_everything_is() {
        let file = kernel();
        let initrd = [7; 5000];
        let image = plan_of(&file, Some(&initrd), 64 * MIB).unwrap();
        let page = &image.parts.iter().find(|part| part.at == ZERO_PAGE).unwrap().bytes;
        assert_eq!(u32_at(page, offset::HEADER), Some(u32::from_le_bytes(*b"HdrS")));
        assert_eq!(page[offset::TYPE_OF_LOADER], 0xFF);
        assert_eq!(u64_at(page, offset::ACPI_RSDP), Some(0xF_1234));
        let place = u64::from(u32_at(page, offset::RAMDISK_IMAGE).unwrap());
        assert_eq!(place, 64 * MIB - 0x2000);
        assert_eq!(u32_at(page, offset::RAMDISK_SIZE), Some(5000));
        assert!(image.parts.iter().any(|part| part.at == place && *part.bytes == initrd));
        let line = u64::from(u32_at(page, offset::CMD_LINE_PTR).unwrap());
        assert!(image.parts.iter().any(|part| part.at == line && *part.bytes == *b"console=ttyS0"));
        assert_eq!(usize::from(page[offset::E820_ENTRIES]), map(64 * MIB).map.entries().len());
        // The last entry: the machine's ACPI tables, as they are.
        let last = offset::E820_TABLE + (usize::from(page[offset::E820_ENTRIES]) - 1) * 20;
        assert_eq!((u64_at(page, last), u32_at(page, last + 16)), (Some(1 << 30), Some(3)));
        assert_eq!(
            image.entry,
            Entry::Long { rip: 16 * MIB + 0x200, rsi: ZERO_PAGE, cr3: TABLES, gdt: DESCRIPTORS }
        );
        // Nothing of the kernel's own part beyond its header reaches the zero page.
        assert_eq!(page[offset::HEADER + 0x6A], 0);
    }

    #[test]
    fn parts_do_not_overlap_and_lie_in_ram() {
        let file = kernel();
        let initrd = vec![1; 45 << 20];
        let image = plan_of(&file, Some(&initrd), 64 * MIB).unwrap();
        let mut ranges: Vec<_> =
            image.parts.iter().map(|part| part.at..part.at + part.bytes.len() as u64 + part.zeros).collect();
        ranges.sort_by_key(|range| range.start);
        assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
        assert!(ranges.iter().all(|range| is_ram(&map(64 * MIB), range)));
    }

    #[test]
    fn the_tables_map_one_to_one() {
        let tables = identity_tables();
        assert_eq!(tables.len(), 6 * 4096);
        let entry = |table: u64, index: usize| {
            u64_at(&tables, usize::try_from(table - TABLES).unwrap() + index * 8).unwrap()
        };
        for address in [0u64, 0x20_0000, 0x7FE0_0000, 0xFFE0_0000] {
            let index = |level: u32| (address >> (12 + 9 * (level - 1)) & 511) as usize;
            let level_3 = entry(TABLES, index(4)) & !0xFFF;
            let level_2 = entry(level_3, index(3)) & !0xFFF;
            assert_eq!(entry(level_2, index(2)), address | 0x83);
        }
    }

    #[test]
    fn what_cannot_be_loaded_is_named() {
        let initrd = vec![1; (46 << 20) + 1];
        let file = kernel();
        let room = 46 * MIB;
        assert_eq!(
            plan_of(&file, Some(&initrd), 64 * MIB),
            Err(LinuxError::Initrd { bytes: room + 1, room })
        );
        assert_eq!(
            plan_of(&file, None, 16 * MIB),
            Err(LinuxError::Memory { at: 16 * MIB, bytes: 0x20_0000 })
        );
        let wanted = file.len() as u64;
        assert_eq!(
            plan_of(&file[..file.len() - 1], None, 64 * MIB),
            Err(LinuxError::Truncated { wanted, has: wanted - 1 })
        );
        assert!(matches!(plan_of(&file[..0x230], None, 64 * MIB), Err(LinuxError::Truncated { .. })));
        let mut old = file.clone();
        put(&mut old, offset::VERSION, &0x0207u16.to_le_bytes());
        assert_eq!(plan_of(&old, None, 64 * MIB), Err(LinuxError::Version(0x0207)));
        let mut narrow = file.clone();
        put(&mut narrow, offset::XLOADFLAGS, &2u16.to_le_bytes());
        assert_eq!(plan_of(&narrow, None, 64 * MIB), Err(LinuxError::No64BitEntry));
        let mut short = file;
        put(&mut short, offset::CMDLINE_SIZE, &12u32.to_le_bytes());
        assert_eq!(plan_of(&short, None, 64 * MIB), Err(LinuxError::CommandLine { bytes: 13, most: 12 }));
    }
}
