//! The guest's first stage as its registers define it: paging mode, permissions, fault codes.
//!
//! Pure and stateless: register values in, answers out; no memory, no entries (those are in [`super::legacy`]).
//! Invariant: everything that a walk needs to know of control registers goes through [`CpuRole`], which masks
//! what the mode makes meaningless (S3, S4).

use crate::addr::Gva;
use bitflags::bitflags;
use core::fmt;

const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const CR4_PKE: u64 = 1 << 22;
const EFER_LMA: u64 = 1 << 10;
const EFER_NX: u64 = 1 << 11;
const RFLAGS_AC: u64 = 1 << 18;

/// The registers and processor features that decide what a guest-virtual address means at this moment.
///
/// Made by [`PagingState::new`], then filled in field by field.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct PagingState {
    /// CR0, as the guest sees it.
    pub cr0: u64,
    /// CR3, as the guest sees it.
    pub cr3: u64,
    /// CR4, as the guest sees it.
    pub cr4: u64,
    /// EFER, as the guest sees it; LMA must be what the processor made it.
    pub efer: u64,
    /// The page-directory-pointer entries that the processor loaded; used in PAE mode only (S22).
    pub pdptrs: [u64; 4],
    /// Whether the page-directory-pointer entries are read from memory at every walk instead: so do AMD
    /// processors under nested paging (AMD64 manual volume 2, 15.25.10).
    pub pdptrs_in_memory: bool,
    /// The current privilege level, 0 to 3; 3 in virtual-8086 mode.
    pub cpl: u8,
    /// RFLAGS, of which AC is looked at.
    pub rflags: u64,
    /// The rights of user pages by protection key.
    pub pkru: u32,
    /// Physical address bits that the guest was told (CPUID leaf `0x8000_0008`, EAX 7:0), less those that
    /// memory encryption takes. More than 52 count as 52.
    pub max_phys_bits: u8,
    /// Whether the guest was told of 1 GiB pages (CPUID leaf `0x8000_0001`, EDX bit 26).
    pub has_1g_pages: bool,
    /// Whether the guest was told of an AMD-compatible processor: bit 8 of entries at levels 4 and 5 is
    /// reserved there and ignored elsewhere (S30).
    pub amd_compatible: bool,
}

impl PagingState {
    /// The state under these control registers, of a supervisor, on a processor with `max_phys_bits` address
    /// bits and 1 GiB pages; all else is zero.
    pub const fn new(cr0: u64, cr3: u64, cr4: u64, efer: u64, max_phys_bits: u8) -> Self {
        Self {
            cr0,
            cr3,
            cr4,
            efer,
            pdptrs: [0; 4],
            pdptrs_in_memory: false,
            cpl: 0,
            rflags: 0,
            pkru: 0,
            max_phys_bits,
            has_1g_pages: true,
            amd_compatible: false,
        }
    }

    /// What of the control registers matters for paging (S2–S4).
    #[inline]
    pub const fn role(&self) -> CpuRole {
        if self.cr0 & CR0_PG == 0 {
            return CpuRole::OFF;
        }
        let pae = self.cr4 & CR4_PAE != 0;
        let long = self.efer & EFER_LMA != 0 && pae;
        let mode = match (long, pae) {
            (true, _) if self.cr4 & CR4_LA57 != 0 => PagingMode::Levels5,
            (true, _) => PagingMode::Levels4,
            (false, true) => PagingMode::Pae,
            (false, false) => PagingMode::Bits32,
        };
        CpuRole {
            mode,
            pse: self.cr4 & CR4_PSE != 0,
            nx: self.efer & EFER_NX != 0,
            wp: self.cr0 & CR0_WP != 0,
            smep: self.cr4 & CR4_SMEP != 0,
            smap: self.cr4 & CR4_SMAP != 0,
            pke: long && self.cr4 & CR4_PKE != 0,
        }
    }

    /// Whether the registers claim long mode without PAE, which no processor reaches: whoever filled them in is
    /// mistaken. [`PagingState::role`] takes LMA as clear then (S4).
    pub const fn is_impossible(&self) -> bool {
        self.cr0 & CR0_PG != 0 && self.efer & EFER_LMA != 0 && self.cr4 & CR4_PAE == 0
    }

    /// The request that `access` makes at the current privilege level (S26, S54).
    #[inline]
    pub const fn request(&self, access: Access) -> Request {
        Request {
            kind: access.kind,
            user: self.cpl == 3 && !access.implicit,
            smap_applies: access.implicit || self.rflags & RFLAGS_AC == 0,
        }
    }
}

/// Paging off, on a processor for which no address bit and no page size is out of reach.
impl Default for PagingState {
    fn default() -> Self {
        Self::new(0, 0, 0, 0, 52)
    }
}

/// How a guest-virtual address is translated.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PagingMode {
    /// Not at all: CR0.PG is clear (S20).
    Off,
    /// Two levels of 4-byte entries (S21).
    Bits32,
    /// Four page-directory-pointer entries and two levels of 8-byte entries (S22).
    Pae,
    /// Four levels (S23).
    Levels4,
    /// Five levels (S23).
    Levels5,
}

impl PagingMode {
    /// Whether instructions can produce this linear address: canonical in long mode, below 4 GiB elsewhere.
    #[inline]
    pub const fn is_canonical(self, gva: Gva) -> bool {
        let bits = match self {
            Self::Off | Self::Bits32 | Self::Pae => return gva.raw() >> 32 == 0,
            Self::Levels4 => 48,
            Self::Levels5 => 57,
        };
        let unused = 64 - bits;
        ((gva.raw() << unused).cast_signed() >> unused).cast_unsigned() == gva.raw()
    }

    /// The linear address `bytes` after `gva`, as consecutive instruction bytes and operands have it: outside
    /// long mode 4 GiB wraps to zero.
    #[inline]
    pub const fn advance(self, gva: Gva, bytes: u64) -> Gva {
        let sum = gva.raw().wrapping_add(bytes);
        match self {
            Self::Off | Self::Bits32 | Self::Pae => Gva::new(sum & 0xFFFF_FFFF),
            Self::Levels4 | Self::Levels5 => Gva::new(sum),
        }
    }
}

/// The guest's paging configuration: the part of its control registers by which translations differ, with all
/// that the mode makes meaningless cleared (S2–S5).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub struct CpuRole {
    /// The mode.
    pub mode: PagingMode,
    /// CR4.PSE: 4 MiB pages, in [`PagingMode::Bits32`] only.
    pub pse: bool,
    /// EFER.NX: bit 63 of 8-byte entries forbids execution, and is reserved where this is false.
    pub nx: bool,
    /// CR0.WP: supervisors obey read-only entries.
    pub wp: bool,
    /// CR4.SMEP: supervisors do not execute user pages.
    pub smep: bool,
    /// CR4.SMAP: supervisors do not access user pages by accident.
    pub smap: bool,
    /// CR4.PKE in long mode: user pages obey protection keys.
    pub pke: bool,
}

impl CpuRole {
    /// Paging off, whatever the other registers hold (S3).
    const OFF: Self = Self {
        mode: PagingMode::Off,
        pse: false,
        nx: false,
        wp: false,
        smep: false,
        smap: false,
        pke: false,
    };

    /// Which rights do not suffice for `request`: bit *n* stands for the [`Rights`] whose bits are *n* (S25, S26).
    #[inline]
    pub const fn denied(&self, request: Request) -> u8 {
        /// Bit *n* for every *n* that has the right.
        const WITH: [u8; 3] = [0b1010_1010, 0b1100_1100, 0b1111_0000];
        let [execute, write, user] = WITH;
        let mut denied = 0;
        if matches!(request.kind, AccessKind::Write) && (request.user || self.wp) {
            denied |= !write;
        }
        if matches!(request.kind, AccessKind::Fetch) {
            if self.nx {
                denied |= !execute;
            }
            if self.smep && !request.user {
                denied |= user;
            }
        } else if self.smap && !request.user && request.smap_applies {
            denied |= user;
        }
        if request.user {
            denied |= !user;
        }
        denied
    }

    /// Whether the protection key `key` of a page with `rights` forbids `request` (S28).
    #[inline]
    pub const fn key_denies(&self, request: Request, rights: Rights, key: u8, pkru: u32) -> bool {
        if !self.pke || !rights.contains(Rights::USER) || matches!(request.kind, AccessKind::Fetch) {
            return false;
        }
        let bits = pkru >> (2 * (key & 15));
        let access_disabled = bits & 1 != 0;
        let write_disabled = bits & 2 != 0;
        access_disabled
            || (write_disabled && matches!(request.kind, AccessKind::Write) && (request.user || self.wp))
    }

    /// Judges `request` against the accumulated `rights` and the leaf's protection `key`; `Err` is the error code
    /// of the page fault (S27, S47).
    #[inline]
    pub const fn check(
        &self,
        request: Request,
        rights: Rights,
        key: u8,
        pkru: u32,
    ) -> Result<(), PageFaultCode> {
        let normal = self.denied(request) >> rights.bits() & 1 != 0;
        let by_key = self.key_denies(request, rights, key, pkru);
        if !normal && !by_key {
            return Ok(());
        }
        let code = self.fault_code(request).union(PageFaultCode::PRESENT);
        Err(if by_key { code.union(PageFaultCode::PROTECTION_KEY) } else { code })
    }

    /// The error code of a fault of `request` on an entry that is not present: what the access was, and nothing
    /// else (S47). A fetch is named as one only where the processor could forbid fetches: with NX, which needs
    /// 8-byte entries, or SMEP (Intel SDM volume 3, 4.7).
    #[inline]
    pub const fn fault_code(&self, request: Request) -> PageFaultCode {
        let mut code = PageFaultCode::empty();
        match request.kind {
            AccessKind::Read => {}
            AccessKind::Write => code = PageFaultCode::WRITE,
            AccessKind::Fetch => {
                let nx = self.nx && !matches!(self.mode, PagingMode::Bits32);
                if nx || self.smep {
                    code = PageFaultCode::FETCH;
                }
            }
        }
        if request.user { code.union(PageFaultCode::USER) } else { code }
    }
}

bitflags! {
    /// What a guest's entries grant; over a walk, the intersection of all levels (S38).
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
    pub struct Rights: u8 {
        /// Instructions may be fetched.
        const EXECUTE = 1 << 0;
        /// Data may be written.
        const WRITE = 1 << 1;
        /// User code may.
        const USER = 1 << 2;
    }
}

/// What is done with a guest-virtual address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum AccessKind {
    /// A load of data.
    Read,
    /// A store.
    Write,
    /// A fetch of an instruction.
    Fetch,
}

/// An access to a guest-virtual address, by the code that runs at the current privilege level or, implicitly,
/// by the processor for it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Access {
    kind: AccessKind,
    implicit: bool,
}

impl Access {
    /// A load: a user's at CPL 3, else a supervisor's.
    pub const READ: Self = Self { kind: AccessKind::Read, implicit: false };
    /// A store.
    pub const WRITE: Self = Self { kind: AccessKind::Write, implicit: false };
    /// An instruction fetch.
    pub const FETCH: Self = Self { kind: AccessKind::Fetch, implicit: false };

    /// The same made by the processor itself, as to descriptor tables and task state: a supervisor's access at
    /// any CPL, to which RFLAGS.AC does not matter (S26).
    #[must_use]
    pub const fn implicit(self) -> Self {
        Self { implicit: true, ..self }
    }

    /// What is done.
    pub const fn kind(self) -> AccessKind {
        self.kind
    }
}

/// An access with all that permission depends on resolved: see [`PagingState::request`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub struct Request {
    /// What is done.
    pub kind: AccessKind,
    /// By user code; else by a supervisor.
    pub user: bool,
    /// Whether SMAP, where it is on, forbids a supervisor's access to user pages: always but for explicit
    /// accesses with RFLAGS.AC set. Means nothing for users and fetches.
    pub smap_applies: bool,
}

bitflags! {
    /// The error code of a page fault (Intel SDM volume 3, 4.7; AMD64 manual volume 2, 8.4.2).
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
    pub struct PageFaultCode: u32 {
        /// Every entry was present: rights or reserved bits are at fault.
        const PRESENT = 1 << 0;
        /// The access wrote.
        const WRITE = 1 << 1;
        /// The access was a user's.
        const USER = 1 << 2;
        /// An entry had a reserved bit set.
        const RESERVED = 1 << 3;
        /// The access fetched an instruction.
        const FETCH = 1 << 4;
        /// The page's protection key forbade it.
        const PROTECTION_KEY = 1 << 5;
    }
}

/// A page fault (vector 14) that the guest's own tables cause.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub struct GuestFault {
    /// What the exception pushes.
    pub error_code: PageFaultCode,
    /// What goes to CR2.
    pub gva: Gva,
}

impl fmt::Display for GuestFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page fault at {}, error code {:#x}", self.gva, self.error_code.bits())
    }
}

impl core::error::Error for GuestFault {}

#[cfg(test)]
mod tests;
