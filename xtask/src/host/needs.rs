//! What an ELF file needs to run: its interpreter and its shared libraries.
//!
//! Pure (System V ABI, chapter 5 "Dynamic Linking").

use elf::ElfBytes;
use elf::abi::{DT_NEEDED, EM_X86_64, ET_DYN, ET_EXEC, PT_INTERP};
use elf::endian::LittleEndian;

/// What the file names.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(crate) struct Needs {
    /// The program that loads it: an absolute path. Libraries have none.
    pub(crate) interpreter: Option<String>,
    /// Names of shared libraries, in the file's order.
    pub(crate) libraries: Vec<String>,
}

/// What `bytes` needs, if it is a program or shared library for x86-64. Whatever cannot be read needs nothing: no
/// loader would get further.
pub(crate) fn of(bytes: &[u8]) -> Option<Needs> {
    let file = ElfBytes::<LittleEndian>::minimal_parse(bytes).ok()?;
    if file.ehdr.e_machine != EM_X86_64 || !matches!(file.ehdr.e_type, ET_EXEC | ET_DYN) {
        return None;
    }
    let mut needs = Needs::default();
    for segment in file.segments().into_iter().flatten() {
        if segment.p_type == PT_INTERP {
            let data = file.segment_data(&segment).ok()?;
            let text = data.split(|&byte| byte == 0).next().unwrap_or_default();
            needs.interpreter = Some(String::from_utf8(text.to_vec()).ok()?);
        }
    }
    let common = file.find_common_data().ok()?;
    if let (Some(dynamic), Some(strings)) = (common.dynamic, common.dynsyms_strs) {
        for entry in dynamic.iter().filter(|entry| entry.d_tag == DT_NEEDED) {
            let name = strings.get(usize::try_from(entry.d_val()).ok()?).ok()?;
            needs.libraries.push(name.to_owned());
        }
    }
    Some(needs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_very_program_needs_an_interpreter_and_the_c_library() {
        let path = std::env::current_exe().unwrap();
        let needs = of(&std::fs::read(path).unwrap()).unwrap();
        assert!(needs.interpreter.is_some_and(|path| path.starts_with("/lib")));
        assert!(needs.libraries.iter().any(|name| name.starts_with("libc.so")), "{:?}", needs.libraries);
    }

    #[test]
    fn anything_else_needs_nothing() {
        assert_eq!(of(b""), None);
        assert_eq!(of(b"#!/bin/sh\n"), None);
        assert_eq!(of(b"\x7fELF\x02\x01\x01"), None);
        // A valid header of another machine (AArch64, 183).
        let mut bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        bytes[18] = 183;
        assert_eq!(of(&bytes), None);
        bytes.truncate(100);
        assert_eq!(of(&bytes), None);
    }
}
