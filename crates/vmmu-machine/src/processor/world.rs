//! Entering a guest and leaving it, and what that flushes: VMRUN and #VMEXIT, VM entries and VM exits.
//!
//! The contexts hold what of a VMCB or a VMCS matters to translation. Invariant: what a world switch must
//! not flush stays (APM 15.16; SDM "Operations that Need Not Invalidate Cached Mappings").

use super::Processor;
use crate::addr::Hpa;
use crate::cache::{PhysicalTag, Tag};
use crate::features::{Features, Quirks, Vendor};
use crate::format::Format;
use crate::regime::{Regime, Second, SecondKind};
use crate::registers::{Registers, UnsupportedRegisters};
use std::fmt;

/// The `TLB_CONTROL` field of a VMCB (APM 15.16.1).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum TlbControl {
    /// 0: nothing.
    #[default]
    Nothing,
    /// 1: everything, of all ASIDs.
    Everything,
    /// 3: everything of this guest's ASID.
    Guest,
    /// 7: this guest's, but for global translations.
    GuestNonGlobal,
}

impl TlbControl {
    /// The field's value.
    pub const fn from_raw(raw: u8) -> Option<Self> {
        match raw {
            0 => Some(Self::Nothing),
            1 => Some(Self::Everything),
            3 => Some(Self::Guest),
            7 => Some(Self::GuestNonGlobal),
            _ => None,
        }
    }
}

/// Nested tables: the host's format at VMRUN (APM 15.25.3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NestedTables {
    /// nCR3.
    pub root: Hpa,
    /// The host runs with five levels; else with four.
    pub five_levels: bool,
    /// The host's EFER.NXE.
    pub nx: bool,
}

/// A guest under SVM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NptContext {
    /// The guest's registers. PAE's page-directory-pointer entries are used only without nested paging.
    pub registers: Registers,
    /// Its ASID; not 0, which is the host's.
    pub asid: u16,
    /// What VMRUN flushes.
    pub tlb_control: TlbControl,
    /// Its nested tables. `None` is a guest under shadow paging: CR3 is the host's, and linear mappings are
    /// tagged by the ASID.
    pub nested: Option<NestedTables>,
}

/// A guest under VMX.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EptContext {
    /// The guest's registers.
    pub registers: Registers,
    /// Its VPID, not 0; `None` where "enable VPID" is off.
    pub vpid: Option<u16>,
    /// The EPT pointer; `None` where "enable EPT" is off.
    pub eptp: Option<u64>,
}

/// A guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Guest {
    /// Under SVM.
    Svm(NptContext),
    /// Under VMX.
    Vmx(EptContext),
}

impl From<NptContext> for Guest {
    fn from(context: NptContext) -> Self {
        Self::Svm(context)
    }
}

impl From<EptContext> for Guest {
    fn from(context: EptContext) -> Self {
        Self::Vmx(context)
    }
}

/// Why a guest was not entered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum EntryRefused {
    /// Already in a guest.
    InGuest,
    /// A context of the other vendor.
    WrongVendor,
    /// ASID 0 (APM 15.5.1: `VMEXIT_INVALID`).
    HostAsid,
    /// VPID 0 (SDM "VM-Execution Control Fields": the VM entry fails).
    ZeroVpid,
    /// An EPT pointer that the VM entry refuses.
    BadEptp(u64),
    /// Five-level nested tables without the feature.
    NoFiveLevels,
    /// Registers that the model does not run.
    Registers(UnsupportedRegisters),
}

impl fmt::Display for EntryRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InGuest => f.write_str("the processor is in a guest already"),
            Self::WrongVendor => f.write_str("the context is for another vendor's processor"),
            Self::HostAsid => f.write_str("ASID 0 is the host's"),
            Self::ZeroVpid => f.write_str("VPID 0 is not a guest's"),
            Self::BadEptp(eptp) => write!(f, "the EPT pointer {eptp:#x} is not valid"),
            Self::NoFiveLevels => f.write_str("the processor has no five-level paging"),
            Self::Registers(why) => why.fmt(f),
        }
    }
}

impl std::error::Error for EntryRefused {}

impl From<UnsupportedRegisters> for EntryRefused {
    fn from(why: UnsupportedRegisters) -> Self {
        Self::Registers(why)
    }
}

/// Bits 51:12 of an EPT pointer: what mappings are tagged by.
pub(super) const fn ept_root(eptp: u64) -> Hpa {
    Hpa::new(eptp & crate::format::ADDRESS)
}

/// Whether a VM entry or INVEPT takes `eptp` (SDM "Extended-Page-Table Pointer (EPTP)" and the checks on
/// VM-execution control fields): memory type UC or WB, 4 or 5 levels, flags that the processor has, no
/// other bits.
pub(super) const fn eptp_is_valid(eptp: u64, features: &Features) -> bool {
    let levels = match eptp >> 3 & 7 {
        3 => true,
        4 => features.ept_5_levels,
        _ => false,
    };
    let memory_type = matches!(eptp & 7, 0 | 6);
    let flags = eptp & 1 << 6 == 0 || features.ept_accessed_dirty;
    let reserved = 0xf80 | 0xfff << 52 | features.beyond_physical();
    levels && memory_type && flags && eptp & reserved == 0
}

impl Guest {
    /// The regime in this guest, or why the processor does not enter it.
    pub(crate) fn regime(&self, features: &Features, quirks: Quirks) -> Result<Regime, EntryRefused> {
        let vendor = match self {
            Self::Svm(_) => Vendor::Amd,
            Self::Vmx(_) => Vendor::Intel,
        };
        if features.vendor != vendor {
            return Err(EntryRefused::WrongVendor);
        }
        self.registers().check(features)?;
        let (space, second) = match self {
            Self::Svm(context) => {
                if context.asid == 0 {
                    return Err(EntryRefused::HostAsid);
                }
                if context.nested.is_some_and(|nested| nested.five_levels && !features.la57) {
                    return Err(EntryRefused::NoFiveLevels);
                }
                let second = context.nested.map(|nested| Second {
                    format: Format::nested(nested.five_levels, nested.nx, features, &quirks),
                    root: ept_root(nested.root.raw()),
                    tag: PhysicalTag::Asid(context.asid),
                    kind: SecondKind::Npt,
                });
                (context.asid, second)
            }
            Self::Vmx(context) => {
                if context.vpid == Some(0) {
                    return Err(EntryRefused::ZeroVpid);
                }
                let second = match context.eptp {
                    None => None,
                    Some(eptp) if !eptp_is_valid(eptp, features) => {
                        return Err(EntryRefused::BadEptp(eptp));
                    }
                    Some(eptp) => {
                        let accessed_dirty = eptp & 1 << 6 != 0;
                        Some(Second {
                            format: Format::ept(eptp >> 3 & 7 == 4, accessed_dirty, features, &quirks),
                            root: ept_root(eptp),
                            tag: PhysicalTag::EptRoot(ept_root(eptp)),
                            kind: SecondKind::Ept { accessed_dirty },
                        })
                    }
                };
                // Without "enable VPID" the current VPID is 0000H.
                (context.vpid.unwrap_or(0), second)
            }
        };
        Ok(Regime::new(*self.registers(), second, space, features, quirks))
    }

    /// Its registers.
    pub const fn registers(&self) -> &Registers {
        match self {
            Self::Svm(context) => &context.registers,
            Self::Vmx(context) => &context.registers,
        }
    }

    pub(super) const fn registers_mut(&mut self) -> &mut Registers {
        match self {
            Self::Svm(context) => &mut context.registers,
            Self::Vmx(context) => &mut context.registers,
        }
    }
}

impl Processor {
    /// Gives the host registers without running any instruction: what an embedder or a test starts from.
    /// Nothing is flushed.
    ///
    /// The processor must be in the host.
    pub fn load_host(&mut self, registers: Registers) -> Result<(), EntryRefused> {
        if self.guest.is_some() {
            return Err(EntryRefused::InGuest);
        }
        registers.check(&self.features)?;
        self.changes += 1;
        self.host = registers;
        self.regime = Regime::new(registers, None, 0, &self.features, self.quirks);
        Ok(())
    }

    /// VMRUN, or VM entry.
    pub fn enter(&mut self, guest: impl Into<Guest>) -> Result<(), EntryRefused> {
        let guest = guest.into();
        if self.guest.is_some() {
            return Err(EntryRefused::InGuest);
        }
        let regime = guest.regime(&self.features, self.quirks)?;
        self.changes += 1;
        match guest {
            Guest::Svm(context) => self.tlb_control(context.asid, context.tlb_control),
            Guest::Vmx(context) => self.vmx_transition(&context),
        }
        self.quirk_flush();
        self.regime = regime;
        self.guest = Some(guest);
        Ok(())
    }

    /// #VMEXIT, or VM exit: back to the host, with the guest as it is now. `None` if there is no guest.
    ///
    /// #VMEXIT flushes nothing (APM 15.16).
    pub fn exit(&mut self) -> Option<Guest> {
        let guest = self.guest.take()?;
        self.changes += 1;
        if let Guest::Vmx(context) = guest {
            self.vmx_transition(&context);
        }
        self.quirk_flush();
        self.regime = Regime::new(self.host, None, 0, &self.features, self.quirks);
        Some(guest)
    }

    fn tlb_control(&mut self, asid: u16, control: TlbControl) {
        let mine = Tag::Physical(PhysicalTag::Asid(asid));
        match control {
            TlbControl::Nothing => {}
            TlbControl::Everything => self.caches.clear(|_| true),
            TlbControl::Guest => self.caches.clear(|tag| tag.space() == Some(asid) || tag == mine),
            TlbControl::GuestNonGlobal => self.caches.clear(|tag| match tag {
                Tag::Linear { space, .. } => space == asid,
                Tag::Global { .. } => false,
                Tag::Physical(_) => tag == mine,
            }),
        }
    }

    /// Without "enable VPID", VM entries and exits invalidate the linear and combined mappings of VPID
    /// 0000H, of all PCIDs and EPT roots (SDM "Operations that Invalidate Cached Mappings").
    fn vmx_transition(&mut self, context: &EptContext) {
        if context.vpid.is_none() {
            self.caches.clear(|tag| tag.space() == Some(0));
        }
    }

    fn quirk_flush(&mut self) {
        if self.quirks.world_switch_flushes {
            self.caches.clear(|_| true);
        }
    }
}
