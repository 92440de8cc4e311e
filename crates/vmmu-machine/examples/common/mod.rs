//! A guest without paging of its own over a second stage of four levels, under either vendor's rules: the
//! stage on which the examples argue.

#![allow(dead_code, reason = "each example uses its part")]

use vmmu_machine::{
    Access, AccessKind, EptContext, Features, Guest, Gva, Hpa, Invept, Machine, NestedTables, NptContext,
    Outcome, Processor, Quirks, Registers, TlbControl, Vendor,
};

/// The guest-physical page that the examples are about.
pub(crate) const GPA: u64 = 0x40_0000;
/// Host frames: the guest's page, another one, and a stranger's.
pub(crate) const FRAME: u64 = 0x1_0000_0000;
pub(crate) const OTHER: u64 = 0x2_0000_0000;
pub(crate) const FOREIGN: u64 = 0x3_0000_0000;
/// The tables, from the root down.
pub(crate) const TABLES: [u64; 4] = [0x10_0000, 0x10_1000, 0x10_2000, 0x10_3000];

/// What an entry grants; translated into the vendor's bits.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Grant {
    Read,
    All,
}

pub(crate) struct Stage {
    pub(crate) machine: Machine,
    pub(crate) vendor: Vendor,
    /// What the stories count: accesses and world switches.
    step: u64,
}

impl Stage {
    /// The tables down to the last, whose entries are all absent; and the guest entered.
    pub(crate) fn new(vendor: Vendor) -> Self {
        let features = match vendor {
            Vendor::Amd => Features::amd(46),
            Vendor::Intel => Features::intel(46),
        };
        let mut stage = Self { machine: Machine::new(1, features, Quirks::NONE), vendor, step: 0 };
        for (level, next) in [(4, TABLES[1]), (3, TABLES[2]), (2, TABLES[3])] {
            stage.set(Self::entry(level), next | 7);
        }
        stage.enter(TlbControl::Nothing);
        stage
    }

    /// Where the entry of a level for [`GPA`] is.
    pub(crate) const fn entry(level: u32) -> Hpa {
        Hpa::new(TABLES[4 - level as usize] + (GPA >> (3 + 9 * level) & 511) * 8)
    }

    /// A leaf that maps `frame`; `large` for 2 MiB.
    pub(crate) fn leaf(&self, frame: u64, grant: Grant, large: bool) -> u64 {
        let ps = u64::from(large) << 7;
        match (self.vendor, grant) {
            (Vendor::Amd, Grant::Read) => frame | ps | 0b101,
            (Vendor::Amd, Grant::All) => frame | ps | 0b111,
            (Vendor::Intel, Grant::Read) => frame | ps | 6 << 3 | 0b101,
            (Vendor::Intel, Grant::All) => frame | ps | 6 << 3 | 0b111,
        }
    }

    pub(crate) fn set(&self, at: Hpa, value: u64) {
        self.machine.memory.write64(at, value);
    }

    pub(crate) fn get(&self, at: Hpa) -> u64 {
        self.machine.memory.read64(at)
    }

    /// The accessed flag of a second-stage entry.
    pub(crate) fn accessed(&self) -> u64 {
        if self.vendor == Vendor::Amd { 1 << 5 } else { 1 << 8 }
    }

    fn next_step(&mut self) {
        self.step += 1;
        self.machine.set_step(self.step);
    }

    fn processor(&mut self) -> &mut Processor {
        &mut self.machine.processors[0]
    }

    fn enter(&mut self, tlb_control: TlbControl) {
        let registers = Registers::OFF;
        let guest: Guest = match self.vendor {
            Vendor::Amd => {
                let nested = NestedTables { root: Hpa::new(TABLES[0]), five_levels: false, nx: true };
                NptContext { registers, asid: 1, tlb_control, nested: Some(nested) }.into()
            }
            Vendor::Intel => EptContext { registers, vpid: Some(1), eptp: Some(TABLES[0] | 0x5e) }.into(),
        };
        self.processor().enter(guest).expect("a valid guest");
    }

    /// Leaves the guest and enters it again, with the flush that a hypervisor owes: INVEPT, or
    /// `TLB_CONTROL` 3.
    pub(crate) fn flush(&mut self) {
        self.processor().exit();
        if self.vendor == Vendor::Intel {
            let eptp = TABLES[0] | 0x5e;
            self.processor().invept(Invept::Context { eptp }).expect("a valid pointer");
        }
        self.enter(TlbControl::Guest);
    }

    /// Leaves the guest and enters it again, without any flush.
    pub(crate) fn exit_and_enter(&mut self) {
        self.next_step();
        self.processor().exit();
        self.enter(TlbControl::Nothing);
    }

    /// Makes an access at [`GPA`] plus `offset`.
    pub(crate) fn touch(&mut self, offset: u64, kind: AccessKind, seed: u64) -> Outcome {
        self.next_step();
        let Machine { memory, processors } = &mut self.machine;
        processors[0].touch(memory, Gva::new(GPA + offset), Access::supervisor(kind), seed)
    }

    pub(crate) fn speculate(&mut self, offset: u64, seed: u64) {
        self.next_step();
        let Machine { memory, processors } = &mut self.machine;
        processors[0].speculate(memory, Gva::new(GPA + offset), seed).expect("nobody else writes");
    }

    /// The host pages that an access may reach, and whether it may fault.
    pub(crate) fn may(&self, offset: u64, kind: AccessKind) -> (Vec<u64>, bool) {
        let set = self.machine.processors[0].access(
            &self.machine.memory,
            Gva::new(GPA + offset),
            Access::supervisor(kind),
        );
        let mut pages: Vec<u64> =
            set.iter().filter_map(Outcome::translation).map(|t| t.hpa.raw() & !0xfff).collect();
        pages.sort_unstable();
        pages.dedup();
        (pages, set.iter().any(|outcome| outcome.translation().is_none()))
    }

    /// The story of each way to reach `page`.
    pub(crate) fn story(&self, offset: u64, kind: AccessKind, page: u64) -> String {
        let processor = &self.machine.processors[0];
        let set = processor.access(&self.machine.memory, Gva::new(GPA + offset), Access::supervisor(kind));
        let reaching =
            |outcome: &&Outcome| outcome.translation().is_some_and(|t| t.hpa.raw() & !0xfff == page);
        set.iter()
            .filter(reaching)
            .flat_map(|outcome| set.explain(processor, outcome))
            .map(|provenance| provenance.to_string())
            .next()
            .unwrap_or_default()
    }
}

pub(crate) const VENDORS: [Vendor; 2] = [Vendor::Amd, Vendor::Intel];
