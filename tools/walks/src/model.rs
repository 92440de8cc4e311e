//! Asks `vmmu-machine` what a walk may come to, with nothing cached.
//!
//! The only room that uses the model. Its memory holds one walk's tables at a time, at the addresses at which the
//! payload has them, and the tables by which a guest finds the instruction that makes the access.

use crate::draw::{Kind, Walk, data_word};
use crate::report::{DONE, NESTED};
use crate::run::Run;
use vmmu_machine::registers::{
    CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_PKE, CR4_PSE, CR4_SMAP, CR4_SMEP, EFER_LMA, EFER_LME, EFER_NXE,
};
use vmmu_machine::{
    Access, AccessKind, ControlFault, EntryRefused, Gva, Hpa, Mark, Memory, NestedPageFault, NestedTables,
    NptContext, Outcome, Privilege, Processor, Quirks, Registers, Stage, TlbControl,
};

/// Of a word that is no data page's.
pub(crate) const NOWHERE: u32 = u32::MAX;

/// Tables for the first 4 MiB, one to one: a guest's own, and the nested ones. Three levels each, a fourth above for
/// guests of five, and a table of 4-byte entries.
const OWN: u64 = 0x30_0000;
const OWN_NESTED: u64 = 0x31_0000;
const OWN_ABOVE: u64 = 0x32_0000;
const OWN_NARROW: u64 = 0x33_0000;
/// How far the directory lies from the start of each.
const DIRECTORY: u64 = 0x1000;
/// Present, writable, user, accessed, dirty.
const OPEN: u64 = 0x67;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;

/// What a record must say.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Answer {
    /// In words.
    pub(crate) text: String,
    pub(crate) vector: u8,
    pub(crate) at_load: bool,
    pub(crate) code: u16,
    pub(crate) reached: u32,
    /// The address that is reported with a fault.
    pub(crate) address: Option<u64>,
    /// The flags, clear before, that must be set afterwards, as a record has them.
    pub(crate) must: u32,
    /// Those that may be set besides, in the order of the walk: of each stage those down to any entry.
    pub(crate) may: Vec<(Stage, u32)>,
}

/// Where the model stands in for the processor.
#[derive(Debug)]
pub(crate) struct Model {
    memory: Memory,
}

impl Model {
    pub(crate) fn new() -> Self {
        let memory = Memory::new();
        for start in [OWN, OWN_NESTED] {
            memory.write64(Hpa::new(start), (start + DIRECTORY) | OPEN);
            for half in 0..2 {
                memory
                    .write64(Hpa::new(start + DIRECTORY + 8 * half), (start + 0x2000 + (half << 12)) | OPEN);
            }
            for page in 0..1024 {
                memory.write64(Hpa::new(start + 0x2000 + 8 * page), page << 12 | OPEN);
            }
        }
        memory.write64(Hpa::new(OWN_ABOVE), OWN | OPEN);
        for page in 0..1024 {
            memory.write32(Hpa::new(OWN_NARROW + 4 * page), (page << 12 | OPEN) as u32);
        }
        Self { memory }
    }

    /// Lays a walk's tables, or clears them away.
    pub(crate) fn lay(&self, run: &Run, walk: &Walk, clear: bool) {
        let value = |value: u64| if clear { 0 } else { value };
        for laid in &walk.first {
            if run.mode.levels() == 2 {
                self.memory.write32(Hpa::new(laid.at), value(laid.value) as u32);
            } else {
                self.memory.write64(Hpa::new(laid.at), value(laid.value));
            }
        }
        for laid in &walk.second {
            self.memory.write64(Hpa::new(laid.at), value(laid.value));
        }
        if run.mode.nested_levels() != 0 {
            let root = Hpa::new(walk.root_at);
            match run.mode.levels() {
                2 => self.memory.write32(root, value(OWN_NARROW | OPEN) as u32),
                3 => self.memory.write64(root, value((OWN + DIRECTORY) | 1)),
                4 => self.memory.write64(root, value(OWN | OPEN)),
                _ => self.memory.write64(root, value(OWN_ABOVE | OPEN)),
            }
            let (level, own) =
                if run.mode.levels() < 4 { (3, OWN_NESTED + DIRECTORY) } else { (4, OWN_NESTED) };
            if let Some(laid) = walk.second.iter().find(|laid| laid.level == level) {
                self.memory.write64(Hpa::new(laid.at & !0xfff), value(own | OPEN));
            }
        }
    }

    /// What the walk that lies there comes to on a processor with these quirks.
    pub(crate) fn ask(&self, run: &Run, walk: &Walk, quirks: Quirks) -> Result<Answer, EntryRefused> {
        let mut processor = Processor::new(run.features(), quirks);
        let mut registers = registers(run, walk);
        if run.mode.nested_levels() != 0 {
            processor.enter(NptContext {
                registers,
                asid: 1,
                tlb_control: TlbControl::Everything,
                nested: Some(NestedTables {
                    root: Hpa::new(walk.nested_root),
                    five_levels: run.mode.nested_levels() == 5,
                    nx: walk.host_nxe,
                }),
            })?;
            return Ok(self.in_guest(run, walk, &processor, access(walk, &quirks)));
        }
        // CR0.PG comes last: it is what loads PAE's page-directory-pointer entries.
        let cr0 = registers.cr0;
        if run.mode.levels() < 4 {
            registers.cr0 &= !CR0_PG;
        }
        processor.load_host(registers)?;
        match processor.mov_cr0(&self.memory, cr0, 0) {
            Ok(()) => Ok(self.answer(run, walk, &processor, walk.gva, access(walk, &quirks))),
            Err(ControlFault::Registers(why)) => Err(EntryRefused::Registers(why)),
            Err(why) => Ok(Answer {
                text: format!("#GP at the load of the registers: {why}"),
                vector: 13,
                at_load: true,
                code: 0,
                reached: 0,
                address: None,
                must: 0,
                may: Vec::new(),
            }),
        }
    }

    /// In a guest the instruction itself is fetched through the same nested tables, first.
    fn in_guest(&self, run: &Run, walk: &Walk, processor: &Processor, access: Access) -> Answer {
        let stub =
            u64::from(run.stubs[usize::from(walk.user)]) + u64::from(run.stub_offsets[walk.kind as usize]);
        // The payload's pages are open to whom they are for; which of the two it is decides nothing.
        let fetch = Access { kind: AccessKind::Fetch, privilege: Privilege::User };
        let fetched = self.answer(run, walk, processor, stub, fetch);
        if fetched.vector != DONE {
            return fetched;
        }
        let mut answer = self.answer(run, walk, processor, walk.gva, access);
        answer.must |= fetched.must;
        answer
    }

    fn answer(&self, run: &Run, walk: &Walk, processor: &Processor, gva: u64, access: Access) -> Answer {
        let set = processor.access(&self.memory, Gva::new(gva), access);
        let outcome = set.only().expect("one walk without caches has one end");
        let marks: Vec<(Stage, u32)> = set
            .marks(processor, &outcome)
            .iter()
            .map(|mark| (mark.entry.stage, bits_of(walk, mark)))
            .collect();
        let (vector, code, reached, address) = match outcome {
            Outcome::Translated(translation) => {
                let word = data_word(run, translation.hpa.raw()).unwrap_or(NOWHERE);
                let seen = if walk.kind == Kind::Implicit && word != NOWHERE { word & 0xff } else { word };
                (DONE, 0, seen, None)
            }
            Outcome::PageFault(fault) => (14, fault.code as u16, 0, Some(fault.address.raw())),
            Outcome::NestedPageFault(fault) => (NESTED, packed(&fault), 0, Some(fault.gpa.raw())),
            // With no error code but 0 (SDM vol. 2, MOV: #GP(0)).
            _ => (13, 0, 0, None),
        };
        let before = marks_before(walk);
        let marks: Vec<_> = marks.into_iter().map(|(stage, bits)| (stage, bits & !before)).collect();
        let all = marks.iter().fold(0, |all, mark| all | mark.1);
        let (must, may) = if vector == DONE { (all, Vec::new()) } else { (0, marks) };
        Answer { text: outcome.to_string(), vector, at_load: false, code, reached, address, must, may }
    }
}

/// EXITINFO1 as a record has it.
const fn packed(fault: &NestedPageFault) -> u16 {
    (fault.info1 & 0x3fff) as u16 | ((fault.info1 >> 32 & 3) as u16) << 14
}

/// A mark's flags where a record has them; none if the entry is not one of the walk's.
fn bits_of(walk: &Walk, mark: &Mark) -> u32 {
    let at = |laid: &crate::draw::Laid| laid.at == mark.entry.at.raw();
    let shift = match mark.entry.stage {
        Stage::First => walk.first.iter().position(at).map(|position| 2 * position),
        Stage::Second => walk.second.iter().position(at).map(|position| 10 + 2 * position),
    };
    let flags = u32::from(mark.flags & ACCESSED != 0) | u32::from(mark.flags & DIRTY != 0) << 1;
    shift.map_or(0, |shift| flags << shift)
}

/// The flags of all entries, as a record has them, before the walk.
pub(crate) fn marks_before(walk: &Walk) -> u32 {
    let flags = |value: u64| (value >> 5 & 3) as u32;
    let first = (0..).zip(&walk.first).fold(0, |bits, (n, laid)| bits | flags(laid.value) << (2 * n));
    (0..).zip(&walk.second).fold(first, |bits, (n, laid)| bits | flags(laid.value) << (10 + 2 * n))
}

const fn access(walk: &Walk, quirks: &Quirks) -> Access {
    let kind = match walk.kind {
        Kind::Implicit => return Access::implicit(AccessKind::Read, walk.user, walk.ac, quirks),
        Kind::Read => AccessKind::Read,
        Kind::Write => AccessKind::Write,
        Kind::Fetch => AccessKind::Fetch,
    };
    let privilege = if walk.user { Privilege::User } else { Privilege::Supervisor { ac: walk.ac } };
    Access { kind, privilege }
}

fn registers(run: &Run, walk: &Walk) -> Registers {
    let bit = |on: bool, bit: u64| if on { bit } else { 0 };
    let levels = run.mode.levels();
    let long = levels >= 4;
    Registers {
        cr0: CR0_PG | 1 | bit(walk.wp, CR0_WP),
        cr3: walk.root,
        cr4: bit(levels < 4 && walk.pse, CR4_PSE)
            | bit(levels > 2, CR4_PAE)
            | bit(levels == 5, CR4_LA57)
            | bit(walk.smep, CR4_SMEP)
            | bit(walk.smap, CR4_SMAP)
            | bit(walk.pke, CR4_PKE),
        efer: bit(long, EFER_LMA | EFER_LME) | bit(walk.nxe, EFER_NXE),
        pkru: walk.pkru,
        ..Registers::OFF
    }
}
