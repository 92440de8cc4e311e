//! How a translation ends when it does not succeed: page faults, nested page faults, EPT violations and
//! misconfigurations, with the codes that the processor reports.
//!
//! Pure values. Sections: SDM 4.7 "Page-Fault Exceptions", SDM "Exit Qualification for EPT Violations" (its
//! table), APM 8.4.2 and APM 15.25.6.

use crate::access::{AccessKind, Rights};
use crate::addr::{Gpa, Gva};
use std::fmt;

/// Bits of a page-fault error code.
pub mod code {
    /// P: the fault was a violation and not a missing entry.
    pub const PRESENT: u32 = 1 << 0;
    /// W/R: the access was a write.
    pub const WRITE: u32 = 1 << 1;
    /// U/S: a user-mode access.
    pub const USER: u32 = 1 << 2;
    /// RSVD: a reserved bit was set in an entry.
    pub const RESERVED: u32 = 1 << 3;
    /// I/D: an instruction fetch.
    pub const FETCH: u32 = 1 << 4;
    /// PK: the protection key denies it.
    pub const KEY: u32 = 1 << 5;
}

/// #PF, delivered to the world whose tables are at fault.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageFault {
    /// The faulting address, for CR2.
    pub address: Gva,
    /// The error code.
    pub code: u32,
}

impl fmt::Debug for PageFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageFault {{ address: {}, code: {:#x} }}", self.address, self.code)
    }
}

/// Why a second-stage walk failed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum NestedCause {
    /// An entry is not present, or the address is wider than the tables.
    NotPresent,
    /// The entries do not grant the access.
    Rights,
    /// A reserved bit is set: for EPT, a misconfiguration.
    Reserved,
}

/// Whose access to guest-physical memory it was.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum NestedAccess {
    /// The walker, for an entry of the guest's tables, on the way to this linear address.
    Table(Gva),
    /// The access itself, to the page of this linear address.
    Final(Gva),
    /// An access that has no linear address: loading PAE's page-directory-pointer entries, for one.
    Physical,
}

/// #VMEXIT(NPF), APM 15.25.6.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct NestedPageFault {
    /// EXITINFO1: an error code in the low bits, and bit 32 (final address) or 33 (table walk).
    pub info1: u64,
    /// EXITINFO2: the guest-physical address.
    pub gpa: Gpa,
}

impl NestedPageFault {
    /// Bit 32: while translating the guest's final physical address.
    pub const FINAL: u64 = 1 << 32;
    /// Bit 33: while translating the address of an entry of the guest's tables.
    pub const TABLE: u64 = 1 << 33;

    pub(crate) fn new(
        gpa: Gpa,
        whose: NestedAccess,
        kind: AccessKind,
        cause: NestedCause,
        reserved_without_present: bool,
    ) -> Self {
        // Accesses at the nested level are user accesses; the guest's table walks are writes besides
        // (APM 15.25.5).
        let (place, kind) = match whose {
            NestedAccess::Table(_) => (Self::TABLE, AccessKind::Write),
            NestedAccess::Final(_) | NestedAccess::Physical => (Self::FINAL, kind),
        };
        let kind = match kind {
            AccessKind::Read => 0,
            AccessKind::Write => code::WRITE,
            AccessKind::Fetch => code::FETCH,
        };
        let cause = match cause {
            NestedCause::NotPresent => 0,
            NestedCause::Rights => code::PRESENT,
            NestedCause::Reserved if reserved_without_present => code::RESERVED,
            NestedCause::Reserved => code::PRESENT | code::RESERVED,
        };
        Self { info1: place | u64::from(code::USER | kind | cause), gpa }
    }
}

impl fmt::Debug for NestedPageFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NestedPageFault {{ info1: {:#x}, gpa: {} }}", self.info1, self.gpa)
    }
}

/// VM exit 48, EPT violation.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct EptViolation {
    /// The exit qualification.
    pub qualification: u64,
    /// The guest-physical address.
    pub gpa: Gpa,
    /// The guest-linear address, where the qualification says that there is one (bit 7).
    pub gva: Option<Gva>,
}

/// What the walker did to guest-physical memory, as bits 0 to 2 of the exit qualification.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct EptRequest(pub(crate) u8);

impl EptRequest {
    pub(crate) const READ: Self = Self(1);
    pub(crate) const WRITE: Self = Self(2);
    /// With accessed and dirty flags for EPT, the walker's accesses to guest entries count as writes and
    /// report both bits.
    pub(crate) const READ_WRITE: Self = Self(3);

    pub(crate) const fn of(kind: AccessKind) -> Self {
        match kind {
            AccessKind::Read => Self(1),
            AccessKind::Write => Self(2),
            AccessKind::Fetch => Self(4),
        }
    }
}

impl EptViolation {
    /// Bit 7: the guest-linear address is valid.
    pub const LINEAR_VALID: u64 = 1 << 7;
    /// Bit 8: the access was to the translation of the linear address, and not to an entry on the way.
    pub const FINAL: u64 = 1 << 8;

    /// `granted` is the AND of the entries' rights, nothing if one is not present.
    pub(crate) fn new(gpa: Gpa, whose: NestedAccess, request: EptRequest, granted: Rights) -> Self {
        let (bits, gva) = match whose {
            NestedAccess::Table(gva) => (Self::LINEAR_VALID, Some(gva)),
            NestedAccess::Final(gva) => (Self::LINEAR_VALID | Self::FINAL, Some(gva)),
            NestedAccess::Physical => (0, None),
        };
        let qualification = u64::from(request.0) | u64::from(granted.ept_bits()) << 3 | bits;
        Self { qualification, gpa, gva }
    }
}

impl fmt::Debug for EptViolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EptViolation {{ qualification: {:#x}, gpa: {}, gva: ", self.qualification, self.gpa)?;
        match self.gva {
            Some(gva) => write!(f, "{gva} }}"),
            None => f.write_str("none }"),
        }
    }
}
