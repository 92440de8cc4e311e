//! Multiboot 1 guests with address fields (Multiboot Specification 0.6.96).
//!
//! The image says itself where it lies; no executable format is understood or needed. The loader's
//! information goes into one page below 1 MiB, modules behind the image.

use crate::boot_info::LOADER_MAGIC;
use crate::bytes::{put, u32_at};
use crate::guest_image::{Entry, Files, Image, Part, is_ram};
use crate::guest_map::GuestMap;
use alloc::borrow::Cow;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// Where the loader's information lies, guest-physical: structure, module, map, texts, in that order.
const INFORMATION: u64 = 0x1_0000;
/// Bytes kept for it: a page for the tables and names, 4 KiB for the command line.
const INFORMATION_BYTES: u64 = 2 * PAGE;
const HEADER_MAGIC: u32 = 0x1BAD_B002;
/// The header lies within this many bytes of the file.
const SEARCHED: usize = 8192;
/// Flags 0 to 15 must be understood; these are: modules on page boundaries, memory information.
const UNDERSTOOD: u32 = 0x0003;
const ADDRESS_FIELDS: u32 = 1 << 16;

/// A multiboot header and where it lies in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    offset: u64,
    flags: u32,
    place: u32,
    load: u32,
    load_end: u32,
    bss_end: u32,
    entry: u32,
}

/// Why a multiboot image cannot be loaded.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum MultibootError {
    /// The header demands what this loader does not do; the value is its flags.
    Flags(u32),
    /// The header has no address fields; the value is its flags.
    NoAddresses(u32),
    /// The header's addresses contradict each other.
    Addresses(Header),
    /// The file ends before the image does.
    Truncated {
        /// Bytes that the header promises.
        wanted: u64,
        /// Bytes of the file.
        has: u64,
    },
    /// The image does not fit into the guest's memory.
    Memory {
        /// Where it wants to lie, guest-physical.
        at: u64,
        /// Bytes that it needs.
        bytes: u64,
    },
    /// The module does not fit behind the image.
    Module {
        /// Bytes of the module.
        bytes: u64,
        /// Bytes that there is room for.
        room: u64,
    },
    /// The command line is too long; the value is its length in bytes.
    CommandLine(usize),
    /// The memory map has more entries than there is room for; the value is their number.
    MapEntries(usize),
}

impl fmt::Display for MultibootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flags(flags) => {
                write!(f, "the header demands what no flag below {UNDERSTOOD:#x} is: {flags:#x}")
            }
            Self::NoAddresses(flags) => write!(f, "the header has no address fields: flags {flags:#x}"),
            Self::Addresses(header) => write!(f, "the header's addresses contradict each other: {header:x?}"),
            Self::Truncated { wanted, has } => write!(f, "truncated: the file has {has} bytes of {wanted}"),
            Self::Memory { at, bytes } => {
                write!(f, "memory too small: the image needs {bytes} bytes at {at:#x}")
            }
            Self::Module { bytes, room } => {
                write!(f, "initrd too large: it has {bytes} bytes, memory has room for {room}")
            }
            Self::CommandLine(bytes) => write!(f, "a command line of {bytes} bytes is too long"),
            Self::MapEntries(entries) => write!(f, "a memory map of {entries} entries is too long"),
        }
    }
}

impl core::error::Error for MultibootError {}

/// The multiboot header of `file`, if it has one.
pub fn find(file: &[u8]) -> Option<Header> {
    (0..SEARCHED.min(file.len())).step_by(4).find_map(|offset| {
        let word = |index: usize| u32_at(file, offset + index * 4);
        let (magic, flags, checksum) = (word(0)?, word(1)?, word(2)?);
        if magic != HEADER_MAGIC || magic.wrapping_add(flags).wrapping_add(checksum) != 0 {
            return None;
        }
        // A file that ends within the fields has zeros there: the addresses contradict each other, and are
        // named.
        let field = |index| word(index).unwrap_or(0);
        Some(Header {
            offset: offset as u64,
            flags,
            place: field(3),
            load: field(4),
            load_end: field(5),
            bss_end: field(6),
            entry: field(7),
        })
    })
}

/// Plans the guest that `files`, whose kernel has this `header`, make in the memory of `map`.
#[allow(clippy::cast_possible_truncation)] // offsets in the file, and addresses checked to be below 4 GiB
pub(crate) fn plan<'a>(
    files: Files<'a>,
    header: &Header,
    map: &GuestMap,
) -> Result<Image<'a>, MultibootError> {
    if header.flags & 0xFFFF & !UNDERSTOOD != 0 {
        return Err(MultibootError::Flags(header.flags));
    }
    if header.flags & ADDRESS_FIELDS == 0 {
        return Err(MultibootError::NoAddresses(header.flags));
    }
    let contradiction = MultibootError::Addresses(*header);
    let has = files.kernel.len() as u64;
    let before = u64::from(header.place.checked_sub(header.load).ok_or(contradiction.clone())?);
    let start = header.offset.checked_sub(before).ok_or(contradiction.clone())?;
    let bytes = match header.load_end {
        0 => has - start,
        end => u64::from(end.checked_sub(header.load).ok_or(contradiction.clone())?),
    };
    if start + bytes > has {
        return Err(MultibootError::Truncated { wanted: start + bytes, has });
    }
    let at = u64::from(header.load);
    let end = match header.bss_end {
        0 => at + bytes,
        end if u64::from(end) < at + bytes => return Err(contradiction),
        end => u64::from(end),
    };
    if !(at..end).contains(&u64::from(header.entry)) {
        return Err(contradiction);
    }
    let information = INFORMATION..INFORMATION + INFORMATION_BYTES;
    let overlaps = at < information.end && information.start < end;
    if !is_ram(map, &(at..end)) || !is_ram(map, &information) || overlaps {
        return Err(MultibootError::Memory { at, bytes: end - at });
    }

    let mut parts = vec![Part {
        at,
        bytes: Cow::Borrowed(&files.kernel[start as usize..(start + bytes) as usize]),
        zeros: end - at - bytes,
    }];
    let mut module = None;
    if let Some(initrd) = files.initrd {
        let (place, size) = (end.next_multiple_of(PAGE).max(MIB), initrd.len() as u64);
        let room = map.ram_end(place).map_or(0, |end| end.min(1 << 32) - place);
        if size > room {
            return Err(MultibootError::Module { bytes: size, room });
        }
        module = Some(place as u32..(place + size) as u32);
        parts.push(Part { at: place, bytes: Cow::Borrowed(initrd), zeros: 0 });
    }
    parts.push(Part {
        at: INFORMATION,
        bytes: Cow::Owned(self::information(files.line, module, map)?),
        zeros: 0,
    });
    let entry = Entry::Protected { eip: header.entry, eax: LOADER_MAGIC, ebx: INFORMATION as u32 };
    Ok(Image { kind: "multiboot 1 image", parts, entry })
}

/// The loader's information, for [`INFORMATION`].
#[allow(clippy::cast_possible_truncation)] // lengths and addresses below 1 MiB
fn information(line: &str, module: Option<Range<u32>>, map: &GuestMap) -> Result<Vec<u8>, MultibootError> {
    const MODULE: usize = 0x80;
    const NAME: usize = 0xA0;
    const MAP: usize = 0x100;
    const LINE: usize = PAGE as usize;
    const ENTRY: usize = 24;
    let mut bytes = vec![0; INFORMATION_BYTES as usize];
    let address = |offset: usize| (INFORMATION as u32 + offset as u32).to_le_bytes();
    let entries = map.map.entries();
    if entries.len() > (LINE - MAP) / ENTRY {
        return Err(MultibootError::MapEntries(entries.len()));
    }
    if line.len() >= bytes.len() - LINE {
        return Err(MultibootError::CommandLine(line.len()));
    }
    // Flags: memory sizes, command line, modules, memory map, loader's name.
    put(&mut bytes, 0, &(1u32 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9).to_le_bytes());
    let kib = |bytes: u64| ((bytes / 1024).min(u64::from(u32::MAX)) as u32).to_le_bytes();
    put(&mut bytes, 4, &kib(map.ram_end(0).unwrap_or(0)));
    put(&mut bytes, 8, &kib(map.ram_end(MIB).map_or(0, |end| end - MIB)));
    put(&mut bytes, 16, &address(LINE));
    put(&mut bytes, LINE, line.as_bytes());
    if let Some(range) = module {
        put(&mut bytes, 20, &1u32.to_le_bytes());
        put(&mut bytes, 24, &address(MODULE));
        put(&mut bytes, MODULE, &range.start.to_le_bytes());
        put(&mut bytes, MODULE + 4, &range.end.to_le_bytes());
        put(&mut bytes, MODULE + 8, &address(NAME + 8));
    }
    put(&mut bytes, 64, &address(NAME));
    put(&mut bytes, NAME, b"vmmu\0");
    put(&mut bytes, 44, &((entries.len() * ENTRY) as u32).to_le_bytes());
    put(&mut bytes, 48, &address(MAP));
    for (index, entry) in entries.iter().enumerate() {
        let place = MAP + index * ENTRY;
        put(&mut bytes, place, &20u32.to_le_bytes());
        put(&mut bytes, place + 4, &entry.range.start.to_le_bytes());
        put(&mut bytes, place + 12, &(entry.range.end - entry.range.start).to_le_bytes());
        put(&mut bytes, place + 20, &entry.kind.number().to_le_bytes());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot_info::BootInfo;
    use crate::memory_map::{Entry as MapEntry, Kind, MemoryMap, Physical};

    fn map() -> GuestMap {
        let machine = MemoryMap::new([
            MapEntry { range: 0..0x9_FC00, kind: Kind::Ram },
            MapEntry { range: MIB..64 * MIB, kind: Kind::Ram },
        ]);
        GuestMap::plan(&machine, 32 * MIB, None).unwrap()
    }

    /// A file with 0x40 bytes of something else before the image, whose header lies 8 bytes into it.
    fn file(load_end: u32, bss_end: u32, entry: u32) -> Vec<u8> {
        let mut file = vec![0x90; 0x1040];
        let flags = 0x0001_0002u32;
        let words = [
            HEADER_MAGIC,
            flags,
            0u32.wrapping_sub(HEADER_MAGIC + flags),
            0x10_0008,
            0x10_0000,
            load_end,
            bss_end,
            entry,
        ];
        for (index, word) in words.iter().enumerate() {
            put(&mut file, 0x48 + index * 4, &word.to_le_bytes());
        }
        file
    }

    fn plan_of<'a>(kernel: &'a [u8], initrd: Option<&'a [u8]>) -> Result<Image<'a>, MultibootError> {
        let header = find(kernel).unwrap();
        plan(Files { kernel, line: "a b", initrd }, &header, &map())
    }

    #[test]
    fn the_image_goes_where_its_header_says() {
        let file = file(0x10_1000, 0x10_3000, 0x10_0100);
        let image = plan_of(&file, None).unwrap();
        assert_eq!(image.parts[0].at, 0x10_0000);
        assert_eq!(*image.parts[0].bytes, file[0x40..]);
        assert_eq!(image.parts[0].zeros, 0x2000);
        assert_eq!(image.entry, Entry::Protected { eip: 0x10_0100, eax: LOADER_MAGIC, ebx: 0x1_0000 });
    }

    #[test]
    fn the_information_reads_back_as_a_loaders() {
        struct Loaded<'a>(Image<'a>);
        impl Physical for Loaded<'_> {
            fn bytes(&self, at: u64, len: u64) -> Option<&[u8]> {
                let part = self.0.parts.iter().find(|part| part.at == INFORMATION)?;
                let start = usize::try_from(at.checked_sub(INFORMATION)?).ok()?;
                part.bytes.get(start..start + usize::try_from(len).ok()?)
            }
        }
        let file = file(0, 0, 0x10_0100);
        let module = [5; 777];
        let loaded = Loaded(plan_of(&file, Some(&module)).unwrap());
        let info = BootInfo::read(LOADER_MAGIC, INFORMATION, &loaded).unwrap();
        assert_eq!(info.line, "a b");
        assert_eq!(info.map, map().map);
        assert_eq!(info.modules[0].range, 0x10_1000..0x10_1000 + 777);
        assert!(loaded.0.parts.iter().any(|part| part.at == 0x10_1000 && *part.bytes == module));
    }

    #[test]
    fn what_cannot_be_loaded_is_named() {
        assert_eq!(
            plan_of(&file(0x10_1001, 0, 0x10_0100), None),
            Err(MultibootError::Truncated { wanted: 0x1041, has: 0x1040 })
        );
        for (load_end, bss_end, entry) in
            [(0xF_FFFF, 0, 0x10_0000), (0, 0x10_0FFF, 0x10_0000), (0, 0, 0x10_1000)]
        {
            assert!(matches!(
                plan_of(&file(load_end, bss_end, entry), None),
                Err(MultibootError::Addresses(_))
            ));
        }
        assert_eq!(
            plan_of(&file(0, 33 << 20, 0x10_0000), None),
            Err(MultibootError::Memory { at: MIB, bytes: 32 * MIB })
        );
        let module = vec![0; 31 << 20];
        assert_eq!(
            plan_of(&file(0, 0, 0x10_0000), Some(&module)),
            Err(MultibootError::Module { bytes: 31 * MIB, room: 31 * MIB - PAGE })
        );
        let mut unknown = file(0, 0, 0x10_0000);
        put(&mut unknown, 0x4C, &0x0001_0004u32.to_le_bytes());
        assert_eq!(find(&unknown), None, "the checksum no longer holds");
        put(&mut unknown, 0x50, &0u32.wrapping_sub(HEADER_MAGIC + 0x0001_0004).to_le_bytes());
        assert_eq!(plan_of(&unknown, None), Err(MultibootError::Flags(0x0001_0004)));
        put(&mut unknown, 0x4C, &2u32.to_le_bytes());
        put(&mut unknown, 0x50, &0u32.wrapping_sub(HEADER_MAGIC + 2).to_le_bytes());
        assert_eq!(plan_of(&unknown, None), Err(MultibootError::NoAddresses(2)));
    }
}
