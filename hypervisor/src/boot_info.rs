//! What a multiboot 1 loader hands to the hypervisor: command line, modules, memory map
//! (Multiboot Specification 0.6.96, section 3.3).
//!
//! Everything is copied out: the loader's own memory may be anywhere and is reused afterwards.

use crate::bytes::{u32_at, u64_at};
use crate::memory_map::{Entry, Kind, MemoryMap, Physical};
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

/// What EAX holds when a multiboot 1 loader entered the image.
pub const LOADER_MAGIC: u32 = 0x2BAD_B002;

/// Bits of the information's flags word.
const HAS_COMMAND_LINE: u32 = 1 << 2;
const HAS_MODULES: u32 = 1 << 3;
const HAS_MAP: u32 = 1 << 6;
/// Modules that are read: a kernel and an initrd are used, more are an error of the user that is worth
/// naming.
const MODULES_MAX: u32 = 64;
/// Bytes of a command line that are read.
const LINE_MAX: u64 = 4096;

/// A file that the loader put into memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Module {
    /// Where it lies, host-physical.
    pub range: Range<u64>,
    /// What the user wrote with it: the file's name, then its arguments.
    pub line: String,
}

/// The information, copied out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BootInfo {
    /// The hypervisor's command line, file name included.
    pub line: String,
    /// The modules in the order in which they were named.
    pub modules: Vec<Module>,
    /// The machine's memory.
    pub map: MemoryMap,
}

/// Why the loader's information is of no use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum BootInfoError {
    /// EAX did not hold [`LOADER_MAGIC`]; the value is what it held.
    Magic(u32),
    /// Something lies at an address that cannot be read; the value is the address.
    Unreadable(u64),
    /// The loader gave no memory map.
    NoMap,
    /// More modules than anyone needs; the value is their number.
    Modules(u32),
    /// A module's end lies before its start; the value is the start.
    Module(u32),
    /// A command line is not UTF-8 or has no end; the value is its address.
    Line(u64),
}

impl fmt::Display for BootInfoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Magic(value) => write!(f, "not started by a multiboot 1 loader: EAX is {value:#x}"),
            Self::Unreadable(at) => write!(f, "the loader's information at {at:#x} cannot be read"),
            Self::NoMap => write!(f, "the loader gave no memory map"),
            Self::Modules(count) => write!(f, "{count} modules are too many"),
            Self::Module(start) => write!(f, "the module at {start:#x} ends before it starts"),
            Self::Line(at) => write!(f, "the command line at {at:#x} is not UTF-8 or has no end"),
        }
    }
}

impl core::error::Error for BootInfoError {}

/// The text at `at` up to its NUL.
fn line(memory: &impl Physical, at: u32) -> Result<String, BootInfoError> {
    let at = u64::from(at);
    let mut text = Vec::new();
    loop {
        let byte = memory.bytes(at + text.len() as u64, 1).ok_or(BootInfoError::Unreadable(at))?[0];
        if byte == 0 {
            return String::from_utf8(text).map_err(|_| BootInfoError::Line(at));
        }
        if text.len() as u64 == LINE_MAX {
            return Err(BootInfoError::Line(at));
        }
        text.push(byte);
    }
}

impl BootInfo {
    /// Reads the information at `at` as a loader that entered with `magic` left it.
    pub fn read(magic: u32, at: u64, memory: &impl Physical) -> Result<Self, BootInfoError> {
        if magic != LOADER_MAGIC {
            return Err(BootInfoError::Magic(magic));
        }
        let unreadable = |at: u64| move || BootInfoError::Unreadable(at);
        let info = memory.bytes(at, 52).ok_or_else(unreadable(at))?;
        let field = |offset: usize| u32_at(info, offset).unwrap_or(0);
        let flags = field(0);

        let command_line =
            if flags & HAS_COMMAND_LINE == 0 { String::new() } else { line(memory, field(16))? };
        let mut modules = Vec::new();
        if flags & HAS_MODULES != 0 {
            let (count, first) = (field(20), u64::from(field(24)));
            if count > MODULES_MAX {
                return Err(BootInfoError::Modules(count));
            }
            for number in 0..u64::from(count) {
                let at = first + number * 16;
                let module = memory.bytes(at, 16).ok_or_else(unreadable(at))?;
                let field = |offset: usize| u32_at(module, offset).unwrap_or(0);
                let (start, end) = (field(0), field(4));
                if end < start {
                    return Err(BootInfoError::Module(start));
                }
                let line = if field(8) == 0 { String::new() } else { line(memory, field(8))? };
                modules.push(Module { range: u64::from(start)..u64::from(end), line });
            }
        }
        if flags & HAS_MAP == 0 {
            return Err(BootInfoError::NoMap);
        }
        Ok(Self { line: command_line, modules, map: read_map(memory, field(44), field(48))? })
    }
}

/// The memory map of `bytes` bytes at `at`: entries of any size, each preceded by it.
fn read_map(memory: &impl Physical, bytes: u32, at: u32) -> Result<MemoryMap, BootInfoError> {
    let (mut at, end) = (u64::from(at), u64::from(at) + u64::from(bytes));
    let mut report = Vec::new();
    while at < end {
        let entry = memory.bytes(at, 24).ok_or(BootInfoError::Unreadable(at))?;
        let word = |offset: usize| u64_at(entry, offset).unwrap_or(0);
        let half = |offset: usize| u32_at(entry, offset).unwrap_or(0);
        let (start, length) = (word(4), word(12));
        report.push(Entry { range: start..start.saturating_add(length), kind: Kind::from_number(half(20)) });
        at += u64::from(half(0)) + 4;
    }
    if report.is_empty() { Err(BootInfoError::NoMap) } else { Ok(MemoryMap::new(report)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::put;
    use alloc::vec;

    /// Memory that begins at 0x9000.
    struct Low(Vec<u8>);
    impl Physical for Low {
        fn bytes(&self, at: u64, len: u64) -> Option<&[u8]> {
            let start = usize::try_from(at.checked_sub(0x9000)?).ok()?;
            self.0.get(start..start + usize::try_from(len).ok()?)
        }
    }

    fn loaded() -> Low {
        let mut memory = vec![0; 0x400];
        let words = |memory: &mut [u8], at: usize, words: &[u32]| {
            for (index, word) in words.iter().enumerate() {
                put(memory, at + index * 4, &word.to_le_bytes());
            }
        };
        words(&mut memory, 0, &[0x4C, 0, 0, 0, 0x9100, 2, 0x9200]);
        words(&mut memory, 44, &[48, 0x9300]);
        put(&mut memory, 0x100, b"hypervisor levels=4\0");
        words(&mut memory, 0x200, &[0x20_0000, 0x20_1000, 0x9180, 0, 0x30_0000, 0x30_0001, 0, 0]);
        put(&mut memory, 0x180, b"vmlinuz quiet,x\0");
        words(&mut memory, 0x300, &[20, 0, 0, 0x9_FC00, 0, 1]);
        words(&mut memory, 0x318, &[20, 0x10_0000, 0, 0, 1, 1]);
        Low(memory)
    }

    #[test]
    fn everything_is_copied_out() {
        let info = BootInfo::read(LOADER_MAGIC, 0x9000, &loaded()).unwrap();
        assert_eq!(info.line, "hypervisor levels=4");
        assert_eq!(info.modules.len(), 2);
        assert_eq!(info.modules[0], Module { range: 0x20_0000..0x20_1000, line: "vmlinuz quiet,x".into() });
        assert_eq!(info.modules[1].line, "");
        assert_eq!(info.map.ram().collect::<Vec<_>>(), [0..0x9_FC00, 0x10_0000..0x1_0010_0000]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let read = |magic, memory: &Low| BootInfo::read(magic, 0x9000, memory);
        assert_eq!(read(1, &loaded()), Err(BootInfoError::Magic(1)));
        let mut memory = loaded();
        memory.0[0] = 0x0C;
        assert_eq!(read(LOADER_MAGIC, &memory), Err(BootInfoError::NoMap));
        let mut memory = loaded();
        put(&mut memory.0, 20, &65u32.to_le_bytes());
        assert_eq!(read(LOADER_MAGIC, &memory), Err(BootInfoError::Modules(65)));
        let mut memory = loaded();
        put(&mut memory.0, 0x204, &0u32.to_le_bytes());
        assert_eq!(read(LOADER_MAGIC, &memory), Err(BootInfoError::Module(0x20_0000)));
        let mut memory = loaded();
        put(&mut memory.0, 16, &0x5000u32.to_le_bytes());
        assert_eq!(read(LOADER_MAGIC, &memory), Err(BootInfoError::Unreadable(0x5000)));
        let mut memory = loaded();
        memory.0[0x100] = 0xFF;
        assert_eq!(read(LOADER_MAGIC, &memory), Err(BootInfoError::Line(0x9100)));
    }
}
