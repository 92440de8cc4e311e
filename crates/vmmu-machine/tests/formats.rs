//! What single entries mean, against tables copied by hand from the manuals' figures.

mod common;
use common::*;
use vmmu_machine::{Entry, Features, Format, PageSize, Quirks, Registers, registers};

fn format(registers: Registers, features: Features) -> Format {
    Format::ordinary(&registers.paging(), &features, &Quirks::NONE).expect("paging is on")
}

#[derive(Debug, PartialEq)]
enum Is {
    Absent,
    Bad,
    Table(u64),
    Page(u64, PageSize),
}

fn is(format: &Format, level: u8, raw: u64) -> Is {
    match format.decode(level, raw) {
        Entry::NotPresent => Is::Absent,
        Entry::Reserved => Is::Bad,
        Entry::Table { at, .. } => Is::Table(at),
        Entry::Page(leaf) => Is::Page(leaf.at, leaf.size),
    }
}

/// Which bits, set alone in `good`, make it reserved.
fn reserved_bits(format: &Format, level: u8, good: u64) -> Vec<u32> {
    (0..64).filter(|&bit| good >> bit & 1 == 0 && is(format, level, good | 1 << bit) == Is::Bad).collect()
}

#[test]
fn entries_of_32_bit_paging() {
    let legacy = format(Registers::legacy(0), Features::intel(36));
    assert_eq!(is(&legacy, 2, 0xffff_fffe), Is::Absent);
    assert_eq!(is(&legacy, 2, 0x1234_5fe7 & !PS), Is::Table(0x1234_5000));
    assert_eq!(is(&legacy, 1, 0xffff_ffff), Is::Page(0xffff_f000, PageSize::Size4K));
    assert_eq!(is(&legacy, 2, 0xffc0_0000 | PS | P), Is::Page(0xffc0_0000, PageSize::Size4M));
    // PSE-36 with 36 address bits: bits 16:13 are 35:32, bits 21:17 reserved.
    assert_eq!(is(&legacy, 2, 0x0040_0000 | 0xf << 13 | PS | P), Is::Page(0xf_0040_0000, PageSize::Size4M));
    assert_eq!(reserved_bits(&legacy, 2, PS | P), [17, 18, 19, 20, 21]);
    // 40 bits or more: bits 20:13, and 21 is always reserved.
    let wide = format(Registers::legacy(0), Features::amd(48));
    assert_eq!(reserved_bits(&wide, 2, PS | P), [21]);
    assert_eq!(is(&wide, 2, 0xff << 13 | PS | P), Is::Page(0xff << 32, PageSize::Size4M));
    // Without PSE-36 bits 21:13 are all reserved; bit 12 is PAT.
    let mut features = Features::intel(36);
    features.pse36 = false;
    assert_eq!(
        reserved_bits(&format(Registers::legacy(0), features), 2, PS | P),
        (13..=21).collect::<Vec<_>>()
    );
    // Without CR4.PSE the PS bit is ignored.
    let mut registers = Registers::legacy(0);
    registers.cr4 &= !registers::CR4_PSE;
    assert_eq!(is(&format(registers, features), 2, 0x003f_f000 | PS | P), Is::Table(0x003f_f000));
}

#[test]
fn entries_of_pae_paging() {
    let pae = format(Registers::pae(0), Features::intel(40));
    let high: Vec<u32> = (40..63).collect();
    let with = |low: &[u32], tail: &[u32]| [low, &high, tail].concat();
    // PDPTE: 2:1, 8:5, 62:40, and 63 whatever EFER.NXE.
    assert_eq!(reserved_bits(&pae, 3, P), with(&[1, 2, 5, 6, 7, 8], &[63]));
    assert_eq!(reserved_bits(&pae, 2, P), with(&[], &[]));
    assert_eq!(reserved_bits(&pae, 2, P | PS), with(&(13..=20).collect::<Vec<_>>(), &[]));
    assert_eq!(reserved_bits(&pae, 1, P), with(&[], &[]));
    assert_eq!(is(&pae, 2, 0xff_ffe0_0000 | PS | P | NX), Is::Page(0xff_ffe0_0000, PageSize::Size2M));
    let mut no_nx = Registers::pae(0);
    no_nx.efer = 0;
    assert_eq!(reserved_bits(&format(no_nx, Features::intel(40)), 1, P), with(&[], &[63]));
}

#[test]
fn entries_of_long_paging() {
    let high: Vec<u32> = (46..52).collect();
    let with = |low: &[u32]| [low, &high].concat();
    let intel = format(Registers::long_mode(0), Features::intel(46));
    let amd = format(Registers::long_mode(0), Features::amd(46));
    assert_eq!(reserved_bits(&intel, 4, P), with(&[7]));
    assert_eq!(reserved_bits(&amd, 4, P), with(&[7, 8]));
    assert_eq!(reserved_bits(&intel, 3, P), with(&[]));
    assert_eq!(reserved_bits(&intel, 3, P | PS), with(&(13..=29).collect::<Vec<_>>()));
    assert_eq!(reserved_bits(&amd, 2, P | PS), with(&(13..=20).collect::<Vec<_>>()));
    assert_eq!(reserved_bits(&amd, 1, P | PS), with(&[]));
    assert_eq!(is(&amd, 3, 0x40_4000_0000 | PS | P), Is::Page(0x40_4000_0000, PageSize::Size1G));
    // Without 1 GiB pages PS is reserved at level 3.
    let mut small = Features::intel(46);
    small.pages_1g = false;
    assert_eq!(reserved_bits(&format(Registers::long_mode(0), small), 3, P), with(&[7]));
    // Without NXE bit 63 is.
    let mut registers = Registers::long_mode(0);
    registers.efer &= !registers::EFER_NXE;
    assert_eq!(reserved_bits(&format(registers, Features::intel(52)), 1, P), [63]);
    registers.cr4 |= registers::CR4_LA57;
    assert_eq!(reserved_bits(&format(registers, Features::amd(52)), 5, P), [7, 8, 63]);
}

#[test]
fn entries_of_ept() {
    let ept = Format::ept(false, true, &Features::intel(46), &Quirks::NONE);
    let high: Vec<u32> = (46..52).collect();
    let with = |low: &[u32]| [low, &high].concat();
    // Nothing counts in an entry without R, W and X.
    assert_eq!(is(&ept, 4, !7), Is::Absent);
    assert_eq!(reserved_bits(&ept, 4, RWX), with(&[3, 4, 5, 6, 7]));
    assert_eq!(reserved_bits(&ept, 3, RWX), with(&[3, 4, 5, 6]));
    assert_eq!(reserved_bits(&ept, 2, RWX), with(&[3, 4, 5, 6]));
    // Leaves: address bits below the page, and memory types. From WB (6) bit 3 makes 7.
    assert_eq!(
        reserved_bits(&ept, 3, RWX | WB | PS),
        with(&[3].into_iter().chain(12..=29).collect::<Vec<_>>())
    );
    assert_eq!(
        reserved_bits(&ept, 2, RWX | WB | PS),
        with(&[3].into_iter().chain(12..=20).collect::<Vec<_>>())
    );
    assert_eq!(reserved_bits(&ept, 1, RWX | WB), with(&[3]));
    for (memory_type, good) in [true, true, false, false, true, true, true, false].into_iter().enumerate() {
        let raw = 0x5000 | (memory_type as u64) << 3 | RWX;
        assert_eq!(is(&ept, 1, raw) != Is::Bad, good, "memory type {memory_type}");
    }
    // The eight settings of bits 2:0.
    let settings = [
        (0, Is::Absent),
        (1, Is::Page(0, PageSize::Size4K)),
        (2, Is::Bad),
        (3, Is::Page(0, PageSize::Size4K)),
        (4, Is::Page(0, PageSize::Size4K)),
        (5, Is::Page(0, PageSize::Size4K)),
        (6, Is::Bad),
        (7, Is::Page(0, PageSize::Size4K)),
    ];
    for (bits, meaning) in settings {
        assert_eq!(is(&ept, 1, WB | bits), meaning, "bits {bits:03b}");
    }
    let mut plain = Features::intel(46);
    plain.ept_execute_only = false;
    plain.ept_2m = false;
    plain.ept_1g = false;
    let plain = Format::ept(false, false, &plain, &Quirks::NONE);
    assert_eq!(is(&plain, 1, WB | X), Is::Bad);
    assert_eq!(is(&plain, 2, WB | PS | RWX), Is::Bad);
    assert_eq!(is(&plain, 3, WB | PS | RWX), Is::Bad);
}

#[test]
fn quirks_change_what_they_name() {
    let bochs = Format::ept(false, true, &Features::intel(40), &Quirks::BOCHS_2_7);
    let leaf = RWX | WB | PS;
    assert!(!reserved_bits(&bochs, 2, leaf).contains(&12));
    assert!(reserved_bits(&bochs, 2, leaf).contains(&13));
    let paging = Registers::long_mode(0).paging();
    let qemu = Format::ordinary(&paging, &Features::amd(40), &Quirks::QEMU_7_2).expect("paging is on");
    assert!(!reserved_bits(&qemu, 4, P).contains(&8));
    assert_eq!(Quirks::NONE.named().count(), 0);
    for quirk in Quirks::QEMU_7_2.named() {
        let fewer = Quirks::QEMU_7_2.without(quirk);
        assert_eq!(fewer.named().count() + 1, Quirks::QEMU_7_2.named().count());
        assert!(fewer.named().all(|other| other.name() != quirk.name()));
    }
}
