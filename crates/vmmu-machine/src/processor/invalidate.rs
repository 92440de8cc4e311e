//! The flush instructions, each with the least that its manual promises.
//!
//! | instruction | removes | keeps |
//! |---|---|---|
//! | INVLPG | the page, of the current PCID and global; paging-structure entries ¹ | all else |
//! | INVPCID 0 | the page and the way to it, of one PCID | globals |
//! | INVPCID 1 | one PCID | globals |
//! | INVPCID 2 | all PCIDs and globals | other spaces |
//! | INVPCID 3 | all PCIDs | globals |
//! | INVEPT 1 | guest-physical and combined mappings of one EPT root, all VPIDs | linear mappings |
//! | INVEPT 2 | likewise, all roots | linear mappings |
//! | INVVPID 0 | the page, global or not, and the way to it, of one VPID | guest-physical mappings |
//! | INVVPID 1 | one VPID | guest-physical mappings |
//! | INVVPID 2 | all VPIDs but 0 | VPID 0, guest-physical mappings |
//! | INVVPID 3 | one VPID but globals | guest-physical mappings |
//! | INVLPGA | the page of one ASID, global or not, and the way to it | nested mappings, other ASIDs |
//!
//! ¹ All of the current PCID; with AMD's EFER.TCE only those on the way to the page.
//!
//! Sections: SDM 4.10.4.1 "Operations that Invalidate TLBs and Paging-Structure Caches"; SDM "Operations
//! that Invalidate Cached Mappings"; APM 5.5.3 and 15.16; APM volume 3, INVLPGA. Executed in a guest, those
//! of the first group act on the current VPID or ASID, and on the combined mappings of all EPT roots.

use super::Processor;
use super::world::{ept_root, eptp_is_valid};
use crate::addr::Gva;
use crate::cache::Tag;
use crate::features::Vendor;
use crate::registers::{CR4_PCIDE, EFER_TCE};
use std::fmt;

/// The types of INVPCID.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Invpcid {
    /// 0: one address of one PCID.
    Address {
        /// The PCID.
        pcid: u16,
        /// The address.
        gva: Gva,
    },
    /// 1: one PCID.
    Context {
        /// The PCID.
        pcid: u16,
    },
    /// 2: all PCIDs, globals included.
    AllWithGlobals,
    /// 3: all PCIDs, but for globals.
    All,
}

/// The types of INVEPT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Invept {
    /// 1: one EPT root.
    Context {
        /// The EPT pointer.
        eptp: u64,
    },
    /// 2: all.
    All,
}

/// The types of INVVPID.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Invvpid {
    /// 0: one address of one VPID.
    Address {
        /// The VPID.
        vpid: u16,
        /// The address.
        gva: Gva,
    },
    /// 1: one VPID.
    Context {
        /// The VPID.
        vpid: u16,
    },
    /// 2: all VPIDs but 0.
    All,
    /// 3: one VPID, but for globals.
    ContextKeepingGlobals {
        /// The VPID.
        vpid: u16,
    },
}

/// Why a flush instruction did nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum InvalidationRefused {
    /// The other vendor's instruction: #UD.
    WrongVendor,
    /// A hypervisor's instruction, in a guest: it would exit.
    InGuest,
    /// VPID 0 (SDM vol. 3, INVVPID: `VMfail`).
    ZeroVpid,
    /// An EPT pointer that no VM entry takes (SDM vol. 3, INVEPT: `VMfail`).
    BadEptp(u64),
    /// A PCID other than 0 while CR4.PCIDE is clear, or past 12 bits (SDM vol. 2, INVPCID: #GP).
    BadPcid(u16),
}

impl fmt::Display for InvalidationRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WrongVendor => f.write_str("another vendor's instruction"),
            Self::InGuest => f.write_str("the instruction exits from a guest"),
            Self::ZeroVpid => f.write_str("VPID 0 is not allowed"),
            Self::BadEptp(eptp) => write!(f, "the EPT pointer {eptp:#x} is not valid"),
            Self::BadPcid(pcid) => write!(f, "the PCID {pcid:#x} is not allowed"),
        }
    }
}

impl std::error::Error for InvalidationRefused {}

impl Processor {
    /// INVLPG.
    pub fn invlpg(&mut self, gva: Gva) {
        let gva = self.regime.linear_address(gva);
        self.changes += 1;
        let (mine, current) = (self.regime.space, self.registers().pcid());
        let this = |tag: Tag| tag.is_of(mine, current);
        let global = |tag: Tag| matches!(tag, Tag::Global { space, .. } if space == mine);
        self.caches.clear_page(gva.raw(), |tag| this(tag) || global(tag));
        let tce = self.features.vendor == Vendor::Amd && self.registers().efer & EFER_TCE != 0;
        if tce {
            self.caches.clear_path(gva.raw(), this);
        } else {
            self.caches.clear_tables(this);
        }
    }

    /// INVPCID.
    pub fn invpcid(&mut self, which: Invpcid) -> Result<(), InvalidationRefused> {
        if let Invpcid::Address { pcid, .. } | Invpcid::Context { pcid } = which
            && (pcid > 0xfff || pcid != 0 && self.registers().cr4 & CR4_PCIDE == 0)
        {
            return Err(InvalidationRefused::BadPcid(pcid));
        }
        self.changes += 1;
        let mine = self.regime.space;
        match which {
            Invpcid::Address { pcid: wanted, gva } => {
                let this = |tag: Tag| tag.is_of(mine, wanted);
                self.caches.clear_page(gva.raw(), this);
                self.caches.clear_path(gva.raw(), this);
            }
            Invpcid::Context { pcid } => self.flush_pcid(pcid),
            Invpcid::AllWithGlobals => self.flush_space(),
            Invpcid::All => {
                self.caches.clear(|tag| matches!(tag, Tag::Linear { space, .. } if space == mine));
            }
        }
        Ok(())
    }

    const fn hypervisor_of(&self, vendor: Vendor) -> Result<(), InvalidationRefused> {
        match (self.features.vendor, vendor) {
            (Vendor::Amd, Vendor::Intel) | (Vendor::Intel, Vendor::Amd) => {
                Err(InvalidationRefused::WrongVendor)
            }
            _ if self.guest.is_some() => Err(InvalidationRefused::InGuest),
            _ => Ok(()),
        }
    }

    /// INVEPT.
    pub fn invept(&mut self, which: Invept) -> Result<(), InvalidationRefused> {
        self.hypervisor_of(Vendor::Intel)?;
        let root = match which {
            Invept::Context { eptp } if !eptp_is_valid(eptp, &self.features) => {
                return Err(InvalidationRefused::BadEptp(eptp));
            }
            Invept::Context { eptp } => Some(ept_root(eptp)),
            Invept::All => None,
        };
        self.changes += 1;
        // Linear mappings have no root: they stay.
        self.caches.clear(|tag| tag.ept_root().is_some() && (root.is_none() || tag.ept_root() == root));
        Ok(())
    }

    /// INVVPID.
    pub fn invvpid(&mut self, which: Invvpid) -> Result<(), InvalidationRefused> {
        self.hypervisor_of(Vendor::Intel)?;
        if let Invvpid::Address { vpid: 0, .. }
        | Invvpid::Context { vpid: 0 }
        | Invvpid::ContextKeepingGlobals { vpid: 0 } = which
        {
            return Err(InvalidationRefused::ZeroVpid);
        }
        self.changes += 1;
        match which {
            Invvpid::Address { vpid, gva } => {
                self.caches.clear_page(gva.raw(), |tag| tag.space() == Some(vpid));
                self.caches.clear_path(gva.raw(), |tag| tag.space() == Some(vpid));
            }
            Invvpid::Context { vpid } => self.caches.clear(|tag| tag.space() == Some(vpid)),
            Invvpid::All => self.caches.clear(|tag| tag.space().is_some_and(|space| space != 0)),
            Invvpid::ContextKeepingGlobals { vpid } => {
                self.caches.clear(|tag| matches!(tag, Tag::Linear { space, .. } if space == vpid));
            }
        }
        Ok(())
    }

    /// INVLPGA. The manual names no PCID: the page goes under all of them. Of upper-level entries it promises
    /// nothing beyond the page's translation being gone, which needs those on the way to go.
    pub fn invlpga(&mut self, gva: Gva, asid: u16) -> Result<(), InvalidationRefused> {
        self.hypervisor_of(Vendor::Amd)?;
        self.changes += 1;
        self.caches.clear_page(gva.raw(), |tag| tag.space() == Some(asid));
        self.caches.clear_path(gva.raw(), |tag| tag.space() == Some(asid));
        Ok(())
    }
}
