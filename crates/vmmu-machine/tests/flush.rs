//! One test for each flush instruction, and for each write and world switch that flushes: what must go, and
//! what must survive, since a model that forgets too much finds no missing flush.
//!
//! Every test fills the caches with mappings of all tags, does one thing, and compares what is left with a
//! list.

mod common;
use common::*;
use vmmu_machine::registers::{
    CR0_PG, CR3_KEEP, CR4_PAE, CR4_PCIDE, CR4_PGE, CR4_PSE, CR4_SMEP, EFER_LMA, EFER_TCE,
};
use vmmu_machine::{
    EptContext, Features, Gva, Hpa, InvalidationRefused, Invept, Invpcid, Invvpid, Mapping, Memory,
    NestedTables, NptContext, Outcome, PhysicalTag, Processor, Quirks, Registers, Tag, TlbControl,
};

/// Two ordinary pages in different 2 MiB blocks, and a global one.
const NEAR: u64 = 0x40_0000;
const FAR: u64 = 0x8060_0000;
const GLOBAL: u64 = 0x4000_0000;

/// What a processor holds: `<tag> <page or t level>` for each mapping.
fn held(processor: &Processor) -> Vec<String> {
    let mut all: Vec<String> = processor
        .held()
        .map(|held| {
            let tag = match held.tag {
                Tag::Linear { space, root, pcid } => {
                    format!("s{space} p{pcid}{}", root.map_or(String::new(), |r| format!(" e{r}")))
                }
                Tag::Global { space, root } => {
                    format!("s{space} global{}", root.map_or(String::new(), |r| format!(" e{r}")))
                }
                Tag::Physical(PhysicalTag::Asid(asid)) => format!("gpa a{asid}"),
                Tag::Physical(PhysicalTag::EptRoot(root)) => format!("gpa e{root}"),
            };
            match held.mapping {
                Mapping::Page(page) => format!("{tag} page {:#x}", page.at),
                Mapping::Table(table) => format!("{tag} t{} {:#x}", table.level, table.at),
            }
        })
        .collect();
    all.sort();
    all.dedup();
    all
}

/// What `act` removed, and what it left.
fn removed(processor: &mut Processor, act: impl FnOnce(&mut Processor)) -> (Vec<String>, Vec<String>) {
    let before = held(processor);
    act(processor);
    let after = held(processor);
    assert!(after.iter().all(|item| before.contains(item)), "a flush adds nothing");
    (before.into_iter().filter(|item| !after.contains(item)).collect(), after)
}

/// Asserts that exactly the mappings that `wanted` accepts were removed, that there were some, and that
/// others stayed.
fn removes(processor: &mut Processor, act: impl FnOnce(&mut Processor), wanted: impl Fn(&str) -> bool) {
    let (gone, left) = removed(processor, act);
    assert!(!gone.is_empty(), "nothing was removed from {left:#?}");
    for item in &gone {
        assert!(wanted(item), "{item} must survive");
    }
    for item in &left {
        assert!(!wanted(item), "{item} must go");
    }
}

fn keeps_all(processor: &mut Processor, act: impl FnOnce(&mut Processor)) {
    let (gone, left) = removed(processor, act);
    assert!(gone.is_empty() && !left.is_empty(), "{gone:?} must survive");
}

/// First-stage tables that map [`NEAR`], [`FAR`] and, globally, [`GLOBAL`].
fn tables(memory: &Memory, builder: &mut Builder, base: u64) -> u64 {
    let root = builder.page();
    for (va, flags) in [(NEAR, 0), (FAR, 0), (GLOBAL, G)] {
        builder.map(memory, (root, 4, base), va, 1, (P | W | U, 0x5000 | P | W | U | flags));
    }
    root
}

fn touch_all(processor: &mut Processor, memory: &Memory) {
    for va in [NEAR, FAR, GLOBAL] {
        let outcome = processor.touch(memory, gva(va), READ, 0);
        assert!(outcome.translation().is_some(), "{outcome}");
    }
}

fn with_pcids(root: u64, pcid: u64) -> Registers {
    let mut registers = Registers::long_mode(root | pcid);
    registers.cr4 |= CR4_PCIDE;
    registers
}

/// A host with three PCIDs' mappings; the current one is 1.
fn host(features: Features) -> (Memory, Processor, u64) {
    let memory = Memory::new();
    let root = tables(&memory, &mut Builder::new(0x10_0000), 0);
    let mut processor = Processor::new(features, Quirks::NONE);
    for pcid in [0, 2, 1] {
        processor.load_host(with_pcids(root, pcid)).expect("runs");
        // Globals of another PCID would be hits: walk all the same.
        touch_all(&mut processor, &memory);
    }
    (memory, processor, root)
}

/// A first stage in guest-physical memory at 4 GiB, mapped one to one by 2 MiB pages of an EPT or NPT.
fn second_stage(memory: &Memory, builder: &mut Builder, upper: u64, leaf: u64) -> u64 {
    let root = builder.page();
    for block in (0..8).map(|i| i << 21).chain((0..8).map(|i| 0x1_0000_0000 + (i << 21))) {
        builder.map(memory, (root, 4, 0), block, 2, (upper, block | leaf | PS));
    }
    root
}

struct Vmx {
    memory: Memory,
    processor: Processor,
    guest_root: u64,
    roots: [u64; 2],
}

impl Vmx {
    fn context(&self, vpid: Option<u16>, root: usize, pcid: u64) -> EptContext {
        let registers = with_pcids(self.guest_root, pcid);
        EptContext { registers, vpid, eptp: Some(self.roots[root] | 0x1e) }
    }

    /// Host mappings, and those of VPIDs 1 and 2 under two roots, PCIDs 0 and 3.
    fn new() -> Self {
        let memory = Memory::new();
        let mut builder = Builder::new(0x10_0000);
        let host_root = tables(&memory, &mut builder, 0);
        let guest_root = tables(&memory, &mut Builder::new(0x1_0000_0000), 0);
        let roots = [0, 1].map(|_| second_stage(&memory, &mut builder, RWX, RWX | WB));
        let mut processor = Processor::new(Features::intel(46), Quirks::NONE);
        processor.load_host(Registers::long_mode(host_root)).expect("runs");
        touch_all(&mut processor, &memory);
        let mut all = Self { memory, processor, guest_root, roots };
        for vpid in [1, 2] {
            for root in [0, 1] {
                for pcid in [0, 3] {
                    all.processor.enter(all.context(Some(vpid), root, pcid)).expect("valid");
                    touch_all(&mut all.processor, &all.memory);
                    all.processor.exit();
                }
            }
        }
        all
    }
}

struct Svm {
    memory: Memory,
    processor: Processor,
    guest_root: u64,
    nested_root: u64,
}

impl Svm {
    fn context(&self, asid: u16, tlb_control: TlbControl) -> NptContext {
        let nested = NestedTables { root: Hpa::new(self.nested_root), five_levels: false, nx: true };
        let registers = with_pcids(self.guest_root, 0);
        NptContext { registers, asid, tlb_control, nested: Some(nested) }
    }

    /// Host mappings, and those of ASIDs 1 and 2.
    fn new() -> Self {
        let memory = Memory::new();
        let mut builder = Builder::new(0x10_0000);
        let host_root = tables(&memory, &mut builder, 0);
        let guest_root = tables(&memory, &mut Builder::new(0x1_0000_0000), 0);
        let nested_root = second_stage(&memory, &mut builder, P | W | U, P | W | U);
        let mut processor = Processor::new(Features::amd(46), Quirks::NONE);
        processor.load_host(Registers::long_mode(host_root)).expect("runs");
        touch_all(&mut processor, &memory);
        let mut all = Self { memory, processor, guest_root, nested_root };
        for asid in [1, 2] {
            all.processor.enter(all.context(asid, TlbControl::Nothing)).expect("valid");
            touch_all(&mut all.processor, &all.memory);
            all.processor.exit();
        }
        all
    }
}

/// The cached tables on the way to an address: level 3, 2 and 1, each once.
fn on_the_way(item: &str, va: u64) -> bool {
    [(3, 39), (2, 30), (1, 21)]
        .iter()
        .any(|&(level, shift)| item.ends_with(&format!(" t{level} {:#x}", va >> shift << shift)))
}

#[test]
fn mov_cr3_without_pcids_keeps_globals() {
    let memory = Memory::new();
    let root = tables(&memory, &mut Builder::new(0x10_0000), 0);
    let mut processor = Processor::new(Features::amd(46), Quirks::NONE);
    processor.load_host(Registers::long_mode(root)).expect("runs");
    touch_all(&mut processor, &memory);
    removes(
        &mut processor,
        |p| p.mov_cr3(&memory, root, 0).expect("good"),
        |item| item.starts_with("s0 p0 "),
    );
    assert_eq!(held(&processor), [format!("s0 global page {GLOBAL:#x}")]);
}

#[test]
fn mov_cr3_with_pcids_flushes_the_new_one_or_nothing() {
    let (memory, mut processor, root) = host(Features::intel(46));
    keeps_all(&mut processor, |p| p.mov_cr3(&memory, root | 2 | CR3_KEEP, 0).expect("good"));
    assert_eq!(processor.registers().pcid(), 2);
    removes(
        &mut processor,
        |p| p.mov_cr3(&memory, root | 1, 0).expect("good"),
        |item| item.starts_with("s0 p1 "),
    );
}

#[test]
fn mov_cr0_off_flushes_everything_of_the_space_and_on_only_on_amd() {
    let mut vmx = Vmx::new();
    let context = vmx.context(Some(1), 0, 0);
    vmx.processor.enter(context).expect("valid");
    let memory = &vmx.memory;
    // Long mode must be left together with paging: here through the registers at once.
    let off = context.registers.cr0 & !CR0_PG;
    removes(&mut vmx.processor, |p| p.mov_cr0(memory, off, 0).expect("good"), |item| item.starts_with("s1 "));
    keeps_all(&mut vmx.processor, |p| p.mov_cr0(memory, off | CR0_PG, 0).expect("good"));

    let mut svm = Svm::new();
    let mut context = svm.context(1, TlbControl::Nothing);
    context.registers.cr0 &= !CR0_PG;
    svm.processor.enter(context).expect("valid");
    let on = context.registers.cr0 | CR0_PG;
    removes(
        &mut svm.processor,
        |p| p.mov_cr0(&svm.memory, on, 0).expect("good"),
        |item| item.starts_with("s1 "),
    );
}

#[test]
fn mov_cr4_flushes_by_bit() {
    let of_space = |item: &str| item.starts_with("s0 ");
    for features in [Features::intel(46), Features::amd(46)] {
        let (memory, mut processor, _) = host(features);
        let cr4 = processor.registers().cr4;
        processor.mov_cr4(&memory, cr4 ^ CR4_PGE, 0).expect("good");
        assert!(held(&processor).is_empty());
        let (memory, mut processor, _) = host(features);
        processor.mov_cr4(&memory, cr4 & !CR4_PCIDE, 0).expect("good");
        assert!(held(&processor).iter().all(|item| !of_space(item)));
    }
    let (memory, mut processor, _) = host(Features::intel(46));
    let cr4 = processor.registers().cr4;
    keeps_all(&mut processor, |p| p.mov_cr4(&memory, cr4 | CR4_PSE, 0).expect("good"));
    let not_global = |item: &str| item.starts_with("s0 p1 ");
    removes(&mut processor, |p| p.mov_cr4(&memory, cr4 | CR4_SMEP, 0).expect("good"), not_global);
    let (memory, mut processor, _) = host(Features::amd(46));
    keeps_all(&mut processor, |p| p.mov_cr4(&memory, cr4 | CR4_SMEP, 0).expect("good"));
    processor.mov_cr4(&memory, cr4 | CR4_PSE | CR4_SMEP, 0).expect("good");
    assert!(held(&processor).is_empty());
    // PAE, outside long mode: Intel, the current PCID; global translations survive.
    let memory = Memory::new();
    // Past the first 32 bytes, which become the (absent) page-directory-pointer entries.
    memory.write32(Hpa::new(0x1020), (0x0040_0000 | P | PS | G) as u32);
    memory.write32(Hpa::new(0x1024), (0x0080_0000 | P | PS) as u32);
    let mut processor = Processor::new(Features::intel(46), Quirks::NONE);
    processor.load_host(Registers::legacy(0x1000)).expect("runs");
    processor.touch(&memory, gva(0x200_0000), READ, 1);
    processor.touch(&memory, gva(0x240_0000), READ, 1);
    let cr4 = processor.registers().cr4 | CR4_PAE;
    removes(&mut processor, |p| p.mov_cr4(&memory, cr4, 0).expect("good"), |item| item.contains("s0 p0 "));
    assert_eq!(processor.registers().efer & EFER_LMA, 0);
}

#[test]
fn invlpg_takes_the_page_and_all_upper_entries_of_its_pcid() {
    let (_, mut processor, _) = host(Features::intel(46));
    removes(
        &mut processor,
        |p| p.invlpg(gva(NEAR | 0xabc)),
        |item| item.starts_with("s0 p1 t") || item == format!("s0 p1 page {NEAR:#x}"),
    );
    removes(&mut processor, |p| p.invlpg(gva(GLOBAL)), |item| item == format!("s0 global page {GLOBAL:#x}"));
}

#[test]
fn invlpg_with_tce_takes_only_the_entries_on_the_way() {
    let (_, mut processor, root) = host(Features::amd(46));
    let mut registers = with_pcids(root, 1);
    registers.efer |= EFER_TCE;
    processor.load_host(registers).expect("runs");
    removes(
        &mut processor,
        |p| p.invlpg(gva(NEAR)),
        |item| {
            item == format!("s0 p1 page {NEAR:#x}") || item.starts_with("s0 p1 t") && on_the_way(item, NEAR)
        },
    );
}

#[test]
fn invlpg_in_a_guest_acts_on_its_vpid_under_all_ept_roots() {
    let mut vmx = Vmx::new();
    vmx.processor.enter(vmx.context(Some(1), 0, 3)).expect("valid");
    removes(
        &mut vmx.processor,
        |p| p.invlpg(gva(NEAR)),
        |item| {
            item.starts_with("s1 p3 ") && (item.contains(" t") || item.ends_with(&format!("page {NEAR:#x}")))
        },
    );
}

#[test]
fn invpcid_by_type() {
    let (_, mut processor, _) = host(Features::intel(46));
    removes(
        &mut processor,
        |p| p.invpcid(Invpcid::Address { pcid: 2, gva: gva(NEAR) }).expect("good"),
        |item| {
            item == format!("s0 p2 page {NEAR:#x}") || item.starts_with("s0 p2 t") && on_the_way(item, NEAR)
        },
    );
    keeps_all(&mut processor, |p| {
        p.invpcid(Invpcid::Address { pcid: 2, gva: gva(GLOBAL + 0x1000_0000_0000) }).expect("good");
    });
    removes(
        &mut processor,
        |p| p.invpcid(Invpcid::Context { pcid: 0 }).expect("good"),
        |item| item.starts_with("s0 p0 "),
    );
    removes(&mut processor, |p| p.invpcid(Invpcid::All).expect("good"), |item| !item.contains("global"));
    processor.invpcid(Invpcid::AllWithGlobals).expect("good");
    assert!(held(&processor).is_empty());
    assert_eq!(
        processor.invpcid(Invpcid::Context { pcid: 0x1000 }),
        Err(InvalidationRefused::BadPcid(0x1000))
    );
}

#[test]
fn invept_takes_guest_physical_and_combined_mappings_of_a_root() {
    let mut vmx = Vmx::new();
    let root = format!("e{:#x}", vmx.roots[0]);
    let eptp = vmx.roots[0] | 0x1e;
    removes(
        &mut vmx.processor,
        |p| p.invept(Invept::Context { eptp }).expect("good"),
        |item| item.contains(&root),
    );
    let other = format!("e{:#x}", vmx.roots[1]);
    removes(&mut vmx.processor, |p| p.invept(Invept::All).expect("good"), |item| item.contains(&other));
    assert!(
        held(&vmx.processor).iter().all(|item| item.starts_with("s0 ")),
        "the host's linear mappings stay"
    );
    assert_eq!(vmx.processor.invept(Invept::Context { eptp: 0 }), Err(InvalidationRefused::BadEptp(0)));
}

#[test]
fn invvpid_by_type() {
    let mut vmx = Vmx::new();
    removes(
        &mut vmx.processor,
        |p| p.invvpid(Invvpid::Address { vpid: 1, gva: gva(GLOBAL) }).expect("good"),
        |item| {
            item.starts_with("s1 ")
                && (item.ends_with(&format!("page {GLOBAL:#x}")) || on_the_way(item, GLOBAL))
        },
    );
    let mut vmx = Vmx::new();
    removes(
        &mut vmx.processor,
        |p| p.invvpid(Invvpid::ContextKeepingGlobals { vpid: 1 }).expect("good"),
        |item| item.starts_with("s1 p"),
    );
    removes(
        &mut vmx.processor,
        |p| p.invvpid(Invvpid::Context { vpid: 1 }).expect("good"),
        |item| item.starts_with("s1 "),
    );
    let mut vmx = Vmx::new();
    removes(
        &mut vmx.processor,
        |p| p.invvpid(Invvpid::All).expect("good"),
        |item| item.starts_with("s1 ") || item.starts_with("s2 "),
    );
    assert_eq!(vmx.processor.invvpid(Invvpid::Context { vpid: 0 }), Err(InvalidationRefused::ZeroVpid));
}

#[test]
fn vmx_transitions_flush_vpid_0_and_only_without_a_vpid() {
    let mut vmx = Vmx::new();
    let with = vmx.context(Some(2), 1, 0);
    keeps_all(&mut vmx.processor, |p| {
        p.enter(with).expect("valid");
        p.exit();
    });
    let without = vmx.context(None, 0, 0);
    removes(&mut vmx.processor, |p| p.enter(without).expect("valid"), |item| item.starts_with("s0 "));
    touch_all(&mut vmx.processor, &vmx.memory);
    removes(&mut vmx.processor, |p| assert!(p.exit().is_some()), |item| item.starts_with("s0 "));
}

#[test]
fn a_guests_mov_cr3_leaves_guest_physical_mappings_and_other_vpids() {
    let mut vmx = Vmx::new();
    vmx.processor.enter(vmx.context(Some(1), 0, 0)).expect("valid");
    let root = vmx.guest_root;
    removes(
        &mut vmx.processor,
        |p| p.mov_cr3(&vmx.memory, root | 3, 0).expect("good"),
        |item| item.starts_with("s1 p3 "),
    );
}

#[test]
fn tlb_control_by_value() {
    let run = |control: TlbControl| {
        let mut svm = Svm::new();
        let context = svm.context(1, control);
        let result = removed(&mut svm.processor, |p| p.enter(context).expect("valid"));
        svm.processor.exit();
        result
    };
    assert!(run(TlbControl::Nothing).0.is_empty());
    assert!(run(TlbControl::Everything).1.is_empty());
    let (gone, left) = run(TlbControl::Guest);
    let mine = |item: &&String| item.starts_with("s1 ") || item.starts_with("gpa a1");
    assert!(gone.iter().all(|item| mine(&item)) && !left.iter().any(|item| mine(&item)));
    assert!(left.iter().any(|item| item.starts_with("gpa a2")));
    let (gone, left) = run(TlbControl::GuestNonGlobal);
    assert!(gone.iter().all(|item| mine(&item) && !item.contains("global")));
    let kept: Vec<&String> = left.iter().filter(mine).collect();
    assert_eq!(kept, [&format!("s1 global page {GLOBAL:#x}")]);
}

#[test]
fn a_world_switch_on_amd_flushes_nothing_and_nor_does_another_nested_root() {
    let mut svm = Svm::new();
    let context = svm.context(1, TlbControl::Nothing);
    keeps_all(&mut svm.processor, |p| {
        p.enter(context).expect("valid");
        p.exit();
    });
    // The same ASID with an empty nested root: what was held is used (APM 15.16).
    let mut changed = context;
    changed.nested = Some(NestedTables { root: Hpa::new(0x7f_0000), five_levels: false, nx: true });
    svm.processor.enter(changed).expect("valid");
    assert_eq!(reaches(&svm.processor, &svm.memory, NEAR, READ), [0x5000]);
}

#[test]
fn quirky_world_switches_flush_everything() {
    let svm = Svm::new();
    let mut processor = Processor::new(Features::amd(46), Quirks::QEMU_7_2);
    processor.enter(svm.context(1, TlbControl::Nothing)).expect("valid");
    touch_all(&mut processor, &svm.memory);
    assert_ne!(processor.held_count(), 0);
    processor.exit();
    assert_eq!(processor.held_count(), 0);
}

#[test]
fn invlpga_takes_one_page_of_one_asid() {
    let mut svm = Svm::new();
    removes(
        &mut svm.processor,
        |p| p.invlpga(gva(GLOBAL), 2).expect("good"),
        |item| {
            item.starts_with("s2 ")
                && (item.ends_with(&format!("page {GLOBAL:#x}")) || on_the_way(item, GLOBAL))
        },
    );
    svm.processor.enter(svm.context(1, TlbControl::Nothing)).expect("valid");
    assert_eq!(svm.processor.invlpga(gva(0), 1), Err(InvalidationRefused::InGuest));
}

#[test]
fn each_vendor_has_its_own_instructions() {
    let mut amd = Processor::new(Features::amd(46), Quirks::NONE);
    assert_eq!(amd.invept(Invept::All), Err(InvalidationRefused::WrongVendor));
    assert_eq!(amd.invvpid(Invvpid::All), Err(InvalidationRefused::WrongVendor));
    let mut intel = Processor::new(Features::intel(46), Quirks::NONE);
    assert_eq!(intel.invlpga(Gva::new(0), 1), Err(InvalidationRefused::WrongVendor));
}

#[test]
fn a_page_fault_removes_its_own_address_and_nothing_else() {
    let cases = [(NEAR, "s0 p1 page"), (GLOBAL, "s0 global page")];
    for (features, (va, page_of)) in
        [Features::intel(46), Features::amd(46)].into_iter().flat_map(|f| cases.map(|case| (f, case)))
    {
        let (memory, mut processor, _) = host(features);
        // The page becomes the supervisor's, behind the processor's back; a user's access faults.
        let leaf = processor.held().find_map(|held| match held.mapping {
            Mapping::Page(page) if page.at == va => held.provenance.entries().first().copied(),
            _ => None,
        });
        let leaf = leaf.expect("the page is held").at;
        memory.write64(leaf, memory.read64(leaf) & !U);
        let fault = processor
            .access(&memory, gva(va), USER_READ)
            .iter()
            .find(|outcome| matches!(outcome, Outcome::PageFault(_)))
            .copied()
            .expect("a fresh walk faults");
        removes(
            &mut processor,
            |p| {
                let outcomes = p.access(&memory, gva(va), USER_READ);
                outcomes.choose_this(p, &memory, &fault, 1).expect("nothing changed");
            },
            |item| {
                item == format!("{page_of} {va:#x}") || item.starts_with("s0 p1 t") && on_the_way(item, va)
            },
        );
    }
}

#[test]
fn an_ept_violation_removes_its_own_addresses_and_a_misconfiguration_nothing() {
    for misconfigured in [false, true] {
        let mut vmx = Vmx::new();
        vmx.processor.enter(vmx.context(Some(1), 0, 0)).expect("valid");
        // The 2 MiB page at guest-physical 0, which holds the data but no guest table.
        let table = vmx.memory.read64(Hpa::new(vmx.memory.read64(Hpa::new(vmx.roots[0])) & !0xfff)) & !0xfff;
        vmx.memory.write64(Hpa::new(table), if misconfigured { W } else { 0 });
        let found = vmx
            .processor
            .access(&vmx.memory, gva(NEAR), READ)
            .iter()
            .find(|outcome| matches!(outcome, Outcome::EptViolation(_) | Outcome::EptMisconfiguration(_)))
            .copied()
            .expect("a fresh walk fails");
        let act = |p: &mut Processor| {
            let outcomes = p.access(&vmx.memory, gva(NEAR), READ);
            outcomes.choose_this(p, &vmx.memory, &found, 1).expect("nothing changed");
        };
        if misconfigured {
            keeps_all(&mut vmx.processor, act);
            continue;
        }
        let root = format!("e{:#x}", vmx.roots[0]);
        removes(&mut vmx.processor, act, |item| {
            let combined = item.starts_with("s1 p0 ") && item.contains(&root);
            let way = item.ends_with(&format!("page {NEAR:#x}")) || on_the_way(item, NEAR);
            let physical = item.starts_with(&format!("gpa {root}"));
            combined && way
                || physical
                    && (item.ends_with("page 0x0")
                        || [" t3 0x0", " t2 0x0"].iter().any(|t| item.ends_with(t)))
        });
    }
}
