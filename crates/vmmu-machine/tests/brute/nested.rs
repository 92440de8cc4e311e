//! The second implementation, two stages: a 64-bit guest of four levels over nested or extended tables of
//! four levels.
//!
//! With extended tables their accessed and dirty flags are on, so that every access has one outcome.

use super::{End, Setup, What, Who, bit, violation_of, zero_bits};
use vmmu_machine::{Hpa, Memory};

#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Second {
    Npt { nxe: bool },
    Ept { execute_only: bool },
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum End2 {
    Reached(u64),
    PageFault(u32),
    /// EXITINFO1, EXITINFO2.
    Npf(u64, u64),
    /// Exit qualification, address.
    Violation(u64, u64),
    Misconfigured(u64),
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum For {
    Table,
    Final(What),
}

/// EPT: read, write, execute of one entry; `None` if misconfigured, all false if not present.
fn ept_entry(setup: &Setup, execute_only: bool, level: u32, entry: u64) -> Option<[bool; 3]> {
    let rwx = [bit(entry, 0), bit(entry, 1), bit(entry, 2)];
    if rwx == [false; 3] {
        return Some(rwx);
    }
    if rwx[1] && !rwx[0] || rwx == [false, false, true] && !execute_only {
        return None;
    }
    let page = level == 1 || level < 4 && bit(entry, 7);
    let mut zero: Vec<u32> = (setup.maxphyaddr..=51).collect();
    if page {
        match level {
            3 => zero.extend(12..=29),
            2 => zero.extend(12..=20),
            _ => {}
        }
        if [2, 3, 7].contains(&(entry >> 3 & 7)) {
            return None;
        }
    } else {
        zero.extend(3..=6);
        if level == 4 {
            zero.push(7);
        }
    }
    if zero.iter().any(|&n| bit(entry, n)) { None } else { Some(rwx) }
}

fn second(memory: &Memory, setup: &Setup, kind: Second, root: u64, gpa: u64, why: For) -> Result<u64, End2> {
    let what = match why {
        For::Table => What::Write,
        For::Final(what) => what,
    };
    let fail = |present: bool, reserved: bool, granted: [bool; 3]| match kind {
        Second::Npt { .. } => {
            let mut info = 4 + u64::from(present) + 8 * u64::from(reserved);
            info += match what {
                What::Read => 0,
                What::Write => 2,
                What::Fetch => 16,
            };
            info += 1 << if why == For::Table { 33 } else { 32 };
            End2::Npf(info, gpa)
        }
        Second::Ept { .. } if reserved => End2::Misconfigured(gpa),
        Second::Ept { .. } => {
            let asked = match why {
                For::Table => 3,
                For::Final(What::Read) => 1,
                For::Final(What::Write) => 2,
                For::Final(What::Fetch) => 4,
            };
            let granted: u64 = granted.iter().zip([8, 16, 32]).map(|(&g, b)| if g { b } else { 0 }).sum();
            let place = if why == For::Table { 0x80 } else { 0x180 };
            End2::Violation(asked + granted + place, gpa)
        }
    };
    if gpa >= 1 << 48 {
        return Err(fail(false, false, [false; 3]));
    }
    let mut table = root;
    let mut granted = [true; 3];
    let mut path = Vec::new();
    for level in [4, 3, 2, 1] {
        let entry = memory.read64(Hpa::new(table + 8 * (gpa >> (9 * level + 3) & 511)));
        path.push(entry);
        match kind {
            Second::Npt { nxe } => {
                if !bit(entry, 0) {
                    return Err(fail(false, false, [false; 3]));
                }
                let host = Setup { nxe, amd: true, ..*setup };
                if zero_bits(&host, level, entry).iter().any(|&n| bit(entry, n)) {
                    return Err(fail(true, true, [false; 3]));
                }
            }
            Second::Ept { execute_only } => match ept_entry(setup, execute_only, level, entry) {
                None => return Err(fail(true, true, [false; 3])),
                Some([false, false, false]) => return Err(fail(false, false, [false; 3])),
                Some(rwx) => granted = [0, 1, 2].map(|i| granted[i] && rwx[i]),
            },
        }
        if level == 1 || level < 4 && bit(entry, 7) {
            let allowed = match (kind, what) {
                (Second::Npt { nxe }, _) => {
                    path.iter().all(|&e| bit(e, 2))
                        && match what {
                            What::Read => true,
                            What::Write => path.iter().all(|&e| bit(e, 1)),
                            What::Fetch => !(nxe && path.iter().any(|&e| bit(e, 63))),
                        }
                }
                (Second::Ept { .. }, _) if why == For::Table => granted[0] && granted[1],
                (Second::Ept { .. }, What::Read) => granted[0],
                (Second::Ept { .. }, What::Write) => granted[1],
                (Second::Ept { .. }, What::Fetch) => granted[2],
            };
            if !allowed {
                return Err(fail(true, false, granted));
            }
            let size = 1 << (9 * level + 3);
            return Ok(entry % (1 << 52) / size * size + gpa % size);
        }
        table = entry & 0x000f_ffff_ffff_f000;
    }
    unreachable!("level 1 maps pages")
}

/// The outcome of one access of the guest.
pub(crate) fn walk2(
    memory: &Memory,
    setup: &Setup,
    (kind, root): (Second, u64),
    gva: u64,
    what: What,
    who: Who,
) -> End2 {
    let mut code = u32::from(what == What::Write) * 2 + u32::from(who == Who::User) * 4;
    if what == What::Fetch && (setup.smep || setup.nxe) {
        code += 16;
    }
    let mut table = setup.cr3 & 0x000f_ffff_ffff_f000;
    let mut entries = Vec::new();
    for level in [4, 3, 2, 1] {
        let at = table + 8 * (gva >> (9 * level + 3) & 511);
        let at = match second(memory, setup, kind, root, at, For::Table) {
            Ok(at) => at,
            Err(end) => return end,
        };
        let entry = memory.read64(Hpa::new(at));
        if !bit(entry, 0) {
            return End2::PageFault(code);
        }
        if zero_bits(setup, level, entry).iter().any(|&n| bit(entry, n)) {
            return End2::PageFault(code | 9);
        }
        entries.push(entry);
        if level == 1 || level < 4 && bit(entry, 7) {
            match violation_of(setup, &entries, what, who) {
                End::Fault(violation) => return End2::PageFault(code | violation),
                End::Reached(_) => {}
            }
            let size = 1 << (9 * level + 3);
            let gpa = entry % (1 << 52) / size * size + gva % size;
            return match second(memory, setup, kind, root, gpa, For::Final(what)) {
                Ok(hpa) => End2::Reached(hpa),
                Err(end) => end,
            };
        }
        table = entry & 0x000f_ffff_ffff_f000;
    }
    unreachable!("level 1 maps pages")
}
