//! Exits that report a fault at the second stage, decoded once into one vendor-neutral value (T26–T30).
//!
//! Pure. Invariant: nobody else tests bits of an error code.

use super::entry::NestedAccess;
use crate::addr::Gpa;
use bitflags::bitflags;

bitflags! {
    /// The normalised error code (T26). NPT delivers it in this layout in EXITINFO1 (AMD64 manual volume 2,
    /// section 15.25.6).
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
    pub struct ErrorCode: u64 {
        /// Some permission existed: the entry was present.
        const PRESENT = 1 << 0;
        /// The access wrote.
        const WRITE = 1 << 1;
        /// A user access; under nested paging every access is one.
        const USER = 1 << 2;
        /// A reserved bit was set in an entry.
        const RESERVED = 1 << 3;
        /// The access fetched an instruction.
        const FETCH = 1 << 4;
        /// The final guest-physical address of a translation was accessed.
        const FINAL = 1 << 32;
        /// A guest page table was accessed during its walk.
        const TABLE = 1 << 33;
    }
}

/// A fault at the second stage.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    gpa: Gpa,
    code: ErrorCode,
}

impl Fault {
    /// The fault of an SVM exit 0x400 (#NPF): EXITINFO2 is the guest-physical address, EXITINFO1 the error code.
    /// Bits that the library does not know are ignored (T26, T30).
    #[inline]
    pub const fn npf(gpa: Gpa, exitinfo1: u64) -> Self {
        Self { gpa, code: ErrorCode::from_bits_truncate(exitinfo1) }
    }
    /// Where.
    #[inline(always)]
    pub const fn gpa(&self) -> Gpa {
        self.gpa
    }
    /// Why.
    #[inline(always)]
    pub const fn code(&self) -> ErrorCode {
        self.code
    }
    /// What the access wanted.
    #[inline(always)]
    pub const fn access(&self) -> NestedAccess {
        NestedAccess {
            write: self.code.contains(ErrorCode::WRITE),
            fetch: self.code.contains(ErrorCode::FETCH),
        }
    }
    /// Whether the hardware met a reserved bit, as it does in an MMIO entry. Some processors report such a
    /// fault without the present bit, so that is not asked for.
    #[inline(always)]
    pub const fn is_reserved(&self) -> bool {
        self.code.contains(ErrorCode::RESERVED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// T26, T30: the manual's bit positions.
    #[test]
    fn npf_bits() {
        let fault = Fault::npf(Gpa::new(0x1234), 0x1_0000_0006);
        assert_eq!(fault.access(), NestedAccess::WRITE);
        assert!(fault.code().contains(ErrorCode::FINAL | ErrorCode::USER));
        assert!(!fault.is_reserved());
        assert!(Fault::npf(Gpa::new(0), 0x1_0000_000D).is_reserved());
        assert_eq!(Fault::npf(Gpa::new(0), 1 << 4).access(), NestedAccess::FETCH);
        assert_eq!(Fault::npf(Gpa::new(0), 1 << 48).code(), ErrorCode::empty());
    }
}
