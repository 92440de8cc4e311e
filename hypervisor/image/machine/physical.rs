//! Host-physical memory as software sees it: identity-mapped.
//!
//! The one place that turns a host-physical address into bytes. Plain slices are for memory that no guest and
//! no device writes: the loader's information, its modules, firmware tables.

use hypervisor::memory_map::Physical;

/// The machine's memory by its physical addresses, all of it mapped one to one.
pub(crate) struct IdentityMapped {
    limit: u64,
}

impl IdentityMapped {
    /// Memory below `limit` is mapped.
    ///
    /// # Safety
    /// Everything below `limit` that is asked for must be mapped and must not change while a slice of it
    /// lives.
    pub(crate) const unsafe fn below(limit: u64) -> Self {
        Self { limit }
    }
}

impl Physical for IdentityMapped {
    fn bytes(&self, at: u64, len: u64) -> Option<&[u8]> {
        if at == 0 || at.checked_add(len)? > self.limit {
            return None;
        }
        // SAFETY: mapped and unchanging by the promise of `below`; not null by the test above. The length is
        // below a limit that the host's own addresses obey.
        #[allow(clippy::cast_possible_truncation)]
        Some(unsafe { core::slice::from_raw_parts(at as *const u8, len as usize) })
    }
}
