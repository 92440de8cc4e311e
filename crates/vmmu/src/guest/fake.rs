//! Guest memory for tests: pages made on first write, reads of the rest fail; each read is logged.

use super::{ByteMemory, ReadError, TableMemory};
use crate::addr::{Gpa, PAGE_BYTES};
use core::cell::RefCell;
use std::collections::BTreeMap;
use std::vec::Vec;

const PAGE: usize = 4096;

#[derive(Default)]
pub(super) struct FakeMemory {
    pages: BTreeMap<u64, [u8; PAGE]>,
    /// The entries that were read: address and bytes.
    pub(super) log: RefCell<Vec<(u64, u8)>>,
}

impl FakeMemory {
    /// Makes the page at `gpa` exist, filled with zeros.
    pub(super) fn add_page(&mut self, gpa: u64) {
        self.pages.entry(gpa / PAGE_BYTES).or_insert([0; PAGE]);
    }

    /// Writes `bytes`, within one page, which is made if it is missing.
    pub(super) fn write(&mut self, gpa: u64, bytes: &[u8]) {
        self.add_page(gpa);
        let page = self.pages.get_mut(&(gpa / PAGE_BYTES)).expect("just added");
        let offset = usize::try_from(gpa % PAGE_BYTES).expect("below a page");
        page[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn write_u32(&mut self, gpa: u64, entry: u32) {
        self.write(gpa, &entry.to_le_bytes());
    }

    pub(super) fn write_u64(&mut self, gpa: u64, entry: u64) {
        self.write(gpa, &entry.to_le_bytes());
    }

    fn get<const N: usize>(&self, gpa: Gpa) -> Result<[u8; N], ReadError> {
        assert_eq!(gpa.raw() % N as u64, 0, "an entry of {N} bytes at {gpa}");
        let mut bytes = [0; N];
        self.read_bytes(gpa, &mut bytes)?;
        self.log.borrow_mut().push((gpa.raw(), u8::try_from(N).expect("4 or 8")));
        Ok(bytes)
    }
}

impl TableMemory for FakeMemory {
    fn read_u32(&self, gpa: Gpa) -> Result<u32, ReadError> {
        self.get(gpa).map(u32::from_le_bytes)
    }
    fn read_u64(&self, gpa: Gpa) -> Result<u64, ReadError> {
        self.get(gpa).map(u64::from_le_bytes)
    }
}

impl ByteMemory for FakeMemory {
    fn read_bytes(&self, gpa: Gpa, into: &mut [u8]) -> Result<(), ReadError> {
        let page = self.pages.get(&gpa.gfn().raw()).ok_or(ReadError::Absent)?;
        let offset = usize::try_from(gpa.page_offset()).expect("below a page");
        into.copy_from_slice(&page[offset..offset + into.len()]);
        Ok(())
    }
}
