//! What an access may come to.
//!
//! Pure values.

use crate::access::Rights;
use crate::addr::{Gpa, Gva, Hpa, PageSize};
use crate::fault::{EptViolation, NestedPageFault, PageFault};
use std::fmt;

/// One way in which an access may end.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// It reaches memory.
    Translated(Translation),
    /// #PF in the world that made the access.
    PageFault(PageFault),
    /// #VMEXIT(NPF).
    NestedPageFault(NestedPageFault),
    /// VM exit 48.
    EptViolation(EptViolation),
    /// VM exit 49, with the guest-physical address.
    EptMisconfiguration(Gpa),
    /// #GP or #SS: the linear address is not canonical (SDM vol. 1, 3.3.7.1), and no table is looked at.
    NotCanonical(Gva),
}

impl Outcome {
    /// The translation, if it is one.
    pub const fn translation(&self) -> Option<&Translation> {
        match self {
            Self::Translated(translation) => Some(translation),
            _ => None,
        }
    }
}

/// Where an access goes, and what its translation grants.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Translation {
    /// The byte in host memory.
    pub hpa: Hpa,
    /// Its guest-physical address; without a second stage, `None`.
    pub gpa: Option<Gpa>,
    /// The size of the translation: the smaller of the two stages', or the piece of it that was held.
    pub size: PageSize,
    /// What the first stage grants; everything without paging.
    pub rights: Rights,
    /// What the second stage grants; everything without one.
    pub nested: Rights,
    /// The protection key.
    pub key: u8,
    /// [`crate::format::Leaf::caching`] of the first stage.
    pub caching: u8,
    /// Likewise, of the second stage.
    pub nested_caching: u8,
}

impl fmt::Debug for Translation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, {}", self.hpa, self.size, self.rights)?;
        if let Some(gpa) = self.gpa {
            write!(f, ", second stage {} at {gpa}", self.nested)?;
        }
        f.write_str(")")
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Translated(translation) => write!(f, "reaches {translation:?}"),
            Self::PageFault(fault) => write!(f, "#PF at {} with code {:#x}", fault.address, fault.code),
            Self::NestedPageFault(fault) => {
                write!(f, "nested page fault at {} with EXITINFO1 {:#x}", fault.gpa, fault.info1)
            }
            Self::EptViolation(exit) => {
                write!(f, "EPT violation at {} with qualification {:#x}", exit.gpa, exit.qualification)
            }
            Self::EptMisconfiguration(gpa) => write!(f, "EPT misconfiguration at {gpa}"),
            Self::NotCanonical(gva) => write!(f, "{gva} is not canonical"),
        }
    }
}
