//! From files to what lies in the guest's memory when it starts, and how it is entered.
//!
//! The kind of guest is read from the kernel file itself: a Linux bzImage or a multiboot 1 image.

use crate::guest_map::GuestMap;
use crate::linux::{self, LinuxError};
use crate::multiboot::{self, MultibootError};
use alloc::borrow::Cow;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

/// Bytes for one place of the guest's memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part<'a> {
    /// Guest-physical address of the first byte.
    pub at: u64,
    /// What goes there.
    pub bytes: Cow<'a, [u8]>,
    /// How many zero bytes follow.
    pub zeros: u64,
}

/// The processor's state at the guest's first instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    /// 64-bit mode, paging on: Linux's 64-bit boot protocol.
    Long {
        /// First instruction.
        rip: u64,
        /// RSI: the zero page.
        rsi: u64,
        /// CR3: tables that map the first 4 GiB one to one.
        cr3: u64,
        /// The descriptor table: code at 0x10, data at 0x18.
        gdt: u64,
    },
    /// 32-bit protected mode with flat segments, paging off: the multiboot 1 machine state.
    Protected {
        /// First instruction.
        eip: u32,
        /// EAX: the loader's magic number.
        eax: u32,
        /// EBX: the loader's information.
        ebx: u32,
    },
}

/// A guest ready to be copied into its memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Image<'a> {
    /// What kind of guest it is, for people.
    pub kind: &'static str,
    /// What goes where.
    pub parts: Vec<Part<'a>>,
    /// How it starts.
    pub entry: Entry,
}

/// What there is to load.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a> {
    /// The kernel file.
    pub kernel: &'a [u8],
    /// The kernel's command line.
    pub line: &'a str,
    /// The initial RAM disk, or a multiboot guest's module.
    pub initrd: Option<&'a [u8]>,
}

/// Why a guest cannot be loaded.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ImageError {
    /// The file is neither a bzImage nor a multiboot 1 image.
    NotAKernel,
    /// The file is a bzImage that cannot be loaded.
    Linux(LinuxError),
    /// The file is a multiboot image that cannot be loaded.
    Multiboot(MultibootError),
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAKernel => {
                write!(f, "not a kernel: the file is neither a bzImage nor a multiboot 1 image")
            }
            Self::Linux(error) => write!(f, "bzImage: {error}"),
            Self::Multiboot(error) => write!(f, "multiboot image: {error}"),
        }
    }
}

impl core::error::Error for ImageError {}

impl<'a> Image<'a> {
    /// Plans a guest: `rsdp` is where firmware's root pointer of ACPI lies, if it was found.
    pub fn plan(files: Files<'a>, map: &GuestMap, rsdp: Option<u64>) -> Result<Self, ImageError> {
        if linux::is_bzimage(files.kernel) {
            linux::plan(files, map, rsdp).map_err(ImageError::Linux)
        } else if let Some(header) = multiboot::find(files.kernel) {
            multiboot::plan(files, &header, map).map_err(ImageError::Multiboot)
        } else {
            Err(ImageError::NotAKernel)
        }
    }
}

/// Whether all of `range` (guest-physical) is RAM of the guest.
pub(crate) fn is_ram(map: &GuestMap, range: &Range<u64>) -> bool {
    map.ram_end(range.start).is_some_and(|end| range.end <= end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory_map::{Entry as MapEntry, Kind, MemoryMap};

    #[test]
    fn a_file_that_is_no_kernel_is_named() {
        let machine = MemoryMap::new([MapEntry { range: 0..1 << 30, kind: Kind::Ram }]);
        let map = GuestMap::plan(&machine, 1 << 29, None).unwrap();
        for kernel in [&b""[..], b"#!/bin/sh\n", &alloc::vec![0; 70_000]] {
            let files = Files { kernel, line: "", initrd: None };
            assert_eq!(Image::plan(files, &map, None), Err(ImageError::NotAKernel));
        }
    }
}
