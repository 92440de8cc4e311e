//! What the guest sees of the processor: the machine's own answers, less what the guest does not have.

use crate::registers::cr4;

/// The answer to CPUID: EAX, EBX, ECX, EDX.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Answer {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// The leaf where a hypervisor names itself.
const HYPERVISOR: u32 = 0x4000_0000;
/// Where its range of leaves ends.
const HYPERVISOR_END: u32 = 0x4001_0000;

/// The answer for a guest that asks for `leaf` while its CR4 holds `guest_cr4`; `machine` is the processor's
/// own.
///
/// Hidden: SVM and memory encryption (leaves 0x80000001, 0x8000000A, 0x8000001F), VMX and SMX, control-flow
/// enforcement (its state is not switched), what needs bits of EFER that a guest may not set, INVLPGB (it
/// needs leave of the control block), and the leaves of any hypervisor below this one, whose guests' memory
/// this is not.
#[inline]
#[must_use]
pub fn filter(leaf: u32, subleaf: u32, guest_cr4: u64, machine: Answer) -> Answer {
    let mut answer = machine;
    match leaf {
        1 => {
            answer.ecx &= !(1 << 5 | 1 << 6); // VMX, SMX
            answer.ecx |= 1 << 31; // under a hypervisor
            answer.ecx = mirror(answer.ecx, 27, guest_cr4 & cr4::OSXSAVE != 0);
        }
        7 if subleaf == 0 => {
            answer.ecx &= !(1 << 7); // shadow stacks
            answer.edx &= !(1 << 20); // indirect branch tracking
            answer.ecx = mirror(answer.ecx, 4, guest_cr4 & cr4::PKE != 0);
        }
        0xD if subleaf == 1 => answer.ecx &= !(0b11 << 11), // state of control-flow enforcement
        0x8000_0001 => answer.ecx &= !(1 << 2 | 1 << 12),   // SVM, SKINIT
        0x8000_0008 => {
            answer.ebx &= !(1 << 3 | 1 << 8 | 1 << 13); // INVLPGB, MCOMMIT, interruptible WBINVD
            answer.ebx |= 1 << 20; // no long-mode segment limits
        }
        0x8000_0021 => answer.eax &= !(1 << 7), // upper address ignore
        0x8000_000A | 0x8000_001F => answer = Answer::default(),
        HYPERVISOR => answer = Answer { eax: HYPERVISOR, ebx: name(0), ecx: name(1), edx: name(2) },
        leaf if HYPERVISOR < leaf && leaf < HYPERVISOR_END => answer = Answer::default(),
        _ => {}
    }
    answer
}

/// `value` with bit `bit` as `set` says.
fn mirror(value: u32, bit: u32, set: bool) -> u32 {
    value & !(1 << bit) | u32::from(set) << bit
}

/// The signature, four bytes at a time.
const fn name(part: usize) -> u32 {
    let name = b"vmmuvmmuvmmu";
    u32::from_le_bytes([name[part * 4], name[part * 4 + 1], name[part * 4 + 2], name[part * 4 + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Answer = Answer { eax: !0, ebx: !0, ecx: !0, edx: !0 };

    #[test]
    fn virtualisation_is_hidden() {
        assert_eq!(filter(0x8000_0001, 0, 0, ALL).ecx, !(1 << 2 | 1 << 12));
        assert_eq!(filter(0x8000_000A, 0, 0, ALL), Answer::default());
        assert_eq!(filter(0x8000_001F, 0, 0, ALL), Answer::default());
        assert_eq!(filter(1, 0, cr4::OSXSAVE, ALL).ecx, !(1 << 5 | 1 << 6));
    }

    #[test]
    fn what_cannot_be_enabled_is_not_announced() {
        assert_eq!(filter(0x8000_0008, 0, 0, ALL).ebx, !(1 << 3 | 1 << 8 | 1 << 13));
        assert_eq!(filter(0x8000_0008, 0, 0, Answer::default()).ebx, 1 << 20);
        assert_eq!(filter(0x8000_0021, 0, 0, ALL).eax, !(1 << 7));
        assert_eq!(filter(7, 0, 0, ALL).edx, !(1 << 20));
        assert_eq!(filter(7, 0, 0, ALL).ecx >> 7 & 1, 0);
        assert_eq!(filter(0xD, 1, 0, ALL).ecx, !(0b11 << 11));
        assert_eq!(filter(0xD, 0, 0, ALL), ALL);
    }

    #[test]
    fn enabled_features_follow_the_guest() {
        assert_eq!(filter(1, 0, 0, ALL).ecx >> 27 & 1, 0);
        assert_eq!(filter(1, 0, cr4::OSXSAVE, Answer::default()).ecx, 1 << 27 | 1 << 31);
        assert_eq!(filter(7, 0, 0, ALL).ecx >> 4 & 1, 0);
        assert_eq!(filter(7, 0, cr4::PKE, Answer::default()).ecx, 1 << 4);
        assert_eq!(filter(7, 1, 0, ALL), ALL);
    }

    #[test]
    fn nobody_elses_paravirtual_leaves_shine_through() {
        assert_eq!(filter(HYPERVISOR, 0, 0, ALL).ebx.to_le_bytes(), *b"vmmu");
        assert_eq!(filter(HYPERVISOR, 0, 0, ALL).eax, HYPERVISOR);
        assert_eq!(filter(0x4000_0001, 0, 0, ALL), Answer::default());
        assert_eq!(filter(0x4000_0100, 0, 0, ALL), Answer::default());
        assert_eq!(filter(0x8000_0002, 0, 0, ALL), ALL);
    }
}
