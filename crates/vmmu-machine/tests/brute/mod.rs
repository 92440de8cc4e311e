//! A second implementation of walks and permissions, as slow and plain as can be, for comparison.
//!
//! Written from the manuals' tables of entries without looking at the crate: reserved bits are lists of bit
//! numbers, rights are lists of what each entry says, and the rules are the manuals' sentences one by one.
//! No caches.

#![allow(dead_code, reason = "each test file uses its part")]

pub(crate) mod nested;

use vmmu_machine::{Hpa, Memory};

#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Mode {
    Bits32 { pse: bool, pse36: bool },
    Pae,
    Long { levels: u32 },
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) mode: Mode,
    pub(crate) amd: bool,
    pub(crate) maxphyaddr: u32,
    pub(crate) gigabyte: bool,
    pub(crate) nxe: bool,
    pub(crate) wp: bool,
    pub(crate) smep: bool,
    pub(crate) smap: bool,
    pub(crate) pke: bool,
    pub(crate) pkru: u32,
    pub(crate) cr3: u64,
    pub(crate) pdptes: [u64; 4],
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum What {
    Read,
    Write,
    Fetch,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Who {
    User,
    Supervisor,
    SupervisorWithAc,
    Implicit,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum End {
    Reached(u64),
    Fault(u32),
}

fn bit(value: u64, n: u32) -> bool {
    value >> n & 1 == 1
}

/// Whether an entry at a level maps a page.
fn maps_page(setup: &Setup, level: u32, entry: u64) -> bool {
    match (setup.mode, level) {
        (_, 1) => true,
        (Mode::Bits32 { pse, .. }, 2) => pse && bit(entry, 7),
        (Mode::Pae, 2) => bit(entry, 7),
        (Mode::Long { .. }, 2 | 3) => bit(entry, 7),
        _ => false,
    }
}

/// The numbers of the bits that must be zero in a present entry.
fn zero_bits(setup: &Setup, level: u32, entry: u64) -> Vec<u32> {
    let page = maps_page(setup, level, entry);
    let mut bits: Vec<u32> = Vec::new();
    match setup.mode {
        Mode::Bits32 { pse36, .. } => {
            if level == 2 && page {
                // SDM table 4-4.
                if pse36 {
                    let m = setup.maxphyaddr.min(40);
                    bits.extend(m - 19..=21);
                } else {
                    bits.extend(13..=21);
                }
            }
            return bits;
        }
        Mode::Pae => {
            bits.extend(setup.maxphyaddr..=62);
            if level == 3 {
                bits.extend([1, 2, 5, 6, 7, 8, 63]);
            } else if page && level == 2 {
                bits.extend(13..=20);
            }
        }
        Mode::Long { .. } => {
            bits.extend(setup.maxphyaddr..=51);
            match level {
                4 | 5 => {
                    bits.push(7);
                    if setup.amd {
                        bits.push(8);
                    }
                }
                3 if page && !setup.gigabyte => bits.push(7),
                3 if page => bits.extend(13..=29),
                2 if page => bits.extend(13..=20),
                _ => {}
            }
        }
    }
    if !setup.nxe {
        bits.push(63);
    }
    bits
}

/// The rights of a page by the entries that lead to it: `entries` from the top.
fn violation(setup: &Setup, entries: &[u64], key: u32, what: What, who: Who) -> Option<bool> {
    let every = |n| entries.iter().all(|&entry| bit(entry, n));
    let user_mode_address = every(2);
    let read_write = every(1);
    let disabled = setup.nxe && entries.iter().any(|&entry| bit(entry, 63));
    let user_mode_access = who == Who::User;
    let mut denied = false;
    if user_mode_access && !user_mode_address {
        denied = true;
    }
    if user_mode_access && what == What::Write && !read_write {
        denied = true;
    }
    if !user_mode_access && what == What::Write && setup.wp && !read_write {
        denied = true;
    }
    if what == What::Fetch && disabled {
        denied = true;
    }
    if what == What::Fetch && !user_mode_access && user_mode_address && setup.smep {
        denied = true;
    }
    if what != What::Fetch
        && !user_mode_access
        && user_mode_address
        && setup.smap
        && who != Who::SupervisorWithAc
    {
        denied = true;
    }
    let mut by_key = false;
    if setup.pke && matches!(setup.mode, Mode::Long { .. }) && user_mode_address && what != What::Fetch {
        if bit(setup.pkru.into(), 2 * key) {
            by_key = true;
        }
        if bit(setup.pkru.into(), 2 * key + 1) && what == What::Write && (user_mode_access || setup.wp) {
            by_key = true;
        }
    }
    (denied || by_key).then_some(by_key)
}

/// Likewise, as the bits of an error code, with the key of the last entry.
fn violation_of(setup: &Setup, entries: &[u64], what: What, who: Who) -> End {
    let key = entries.last().map_or(0, |&entry| (entry >> 59) as u32 & 15);
    match violation(setup, entries, key, what, who) {
        Some(by_key) => End::Fault(1 + if by_key { 32 } else { 0 }),
        None => End::Reached(0),
    }
}

/// The outcome of one access, from memory alone.
pub(crate) fn walk(memory: &Memory, setup: &Setup, gva: u64, what: What, who: Who) -> End {
    let mut code = 0;
    if what == What::Write {
        code += 2;
    }
    if who == Who::User {
        code += 4;
    }
    let pae_or_long = !matches!(setup.mode, Mode::Bits32 { .. });
    if what == What::Fetch && (setup.smep || pae_or_long && setup.nxe) {
        code += 16;
    }
    let (gva, mut level) = match setup.mode {
        Mode::Bits32 { .. } => (gva % (1 << 32), 2),
        Mode::Pae => (gva % (1 << 32), 3),
        Mode::Long { levels } => (gva, levels),
    };
    let mut entries = Vec::new();
    let mut table = match setup.mode {
        Mode::Bits32 { .. } => setup.cr3 & 0xffff_f000,
        Mode::Pae => 0,
        Mode::Long { .. } => setup.cr3 & 0x000f_ffff_ffff_f000,
    };
    loop {
        let entry = match setup.mode {
            Mode::Bits32 { .. } => {
                let index = if level == 2 { gva >> 22 } else { gva >> 12 & 1023 };
                u64::from(memory.read32(Hpa::new(table + 4 * index)))
            }
            Mode::Pae if level == 3 => setup.pdptes[(gva >> 30) as usize],
            Mode::Pae | Mode::Long { .. } => {
                memory.read64(Hpa::new(table + 8 * (gva >> (9 * level + 3) & 511)))
            }
        };
        if !bit(entry, 0) {
            return End::Fault(code);
        }
        if zero_bits(setup, level, entry).iter().any(|&n| bit(entry, n)) {
            return End::Fault(code | 9);
        }
        if !(setup.mode == Mode::Pae && level == 3) {
            entries.push(entry);
        }
        if maps_page(setup, level, entry) {
            if let End::Fault(violation) = violation_of(setup, &entries, what, who) {
                return End::Fault(code | violation);
            }
            return End::Reached(match (setup.mode, level) {
                (Mode::Bits32 { .. }, 2) => {
                    (entry >> 13 & 0xff) << 32 | entry & 0xffc0_0000 | gva & 0x3f_ffff
                }
                (Mode::Bits32 { .. }, _) => entry & 0xffff_f000 | gva & 0xfff,
                (_, level) => {
                    let size = 1 << (9 * level + 3);
                    entry % (1 << 52) / size * size + gva % size
                }
            });
        }
        table = match setup.mode {
            Mode::Bits32 { .. } => entry & 0xffff_f000,
            _ => entry & 0x000f_ffff_ffff_f000,
        };
        level -= 1;
    }
}
