//! Instructions by the guest's own tables: every slot low enough holds tables of 32-bit paging in its first two pages,
//! by which every address leads to one of the two pages after them.
//!
//! Movers copy what pages hold, so tables stay tables. Invariants: whatever else a fetch comes to while memory goes and
//! comes, it never reads a frame that was given back; while nothing does, it comes to what the tables say.

use crate::faults::no_answer;
use crate::history::{Accesses, Stage};
use crate::host::{POISON, SimHost, WORDS};
use crate::random::Random;
use crate::story::Violation;
use vmmu::{AddressSpace, Error, FetchError, Gpa, Gva, PagingState, Vcpu, WalkError};

/// CR0 with paging and protection.
const CR0: u64 = 0x8000_0011;
/// Present, writable, for users.
const ENTRY: u64 = 7;
/// Guest frames that entries of 32-bit paging can name.
const REACH: u64 = 1 << 20;

/// The two entries that fill page `page` of a slot at `gfn`, if it is a table.
pub(crate) fn table(gfn: u64, page: u64) -> Option<u64> {
    let entry = |page: u64| (gfn + page) << 12 | ENTRY;
    match page {
        _ if gfn + 4 > REACH => None,
        0 => Some(entry(1) | entry(1) << 32),
        1 => Some(entry(2) | entry(3) << 32),
        _ => None,
    }
}

/// Fetches an instruction, mostly where one was fetched before.
pub(crate) fn fetch(
    stage: &Stage,
    vcpu: &mut Vcpu<SimHost>,
    space: AddressSpace,
    who: &str,
    random: &mut Random,
) {
    if vcpu.paging_mut().cr0 == 0 || random.one_in(16) {
        let world = stage.world.borrow();
        let Some(slot) = world.some_slot(space, random) else { return };
        if slot.gfn + 4 > REACH {
            return;
        }
        vcpu.set_paging(PagingState::new(CR0, slot.gfn << 12, 0, 0, 46));
    }
    if random.one_in(stage.rates.edits) {
        // The guest's system changes a bit of the second table that no walk looks at.
        let table = vcpu.paging_mut().cr3 >> 12;
        if let Some(words) = self::table(table, 1) {
            let bit = if random.one_in(2) { 1 << 9 | 1 << 41 } else { 0 };
            stage.tell(who, || format!("changes its table at {:#x}", table + 1));
            let _open = stage.writes.begin();
            let _ = vcpu.write(Gpa::new((table + 1) << 12), &(words | bit).to_le_bytes());
        }
    }
    let gva = Gva::new(random.below(4) << 12 | random.below(WORDS as u64 - 1) << 3);
    stage.tell(who, || format!("fetches at {gva}"));
    let before = Moment::now(stage, space, vcpu.paging_mut().cr3, gva);
    match vcpu.fetch_instruction(gva) {
        Ok(bytes) => {
            let counted = stage.accesses.get();
            stage.accesses.set(Accesses { fetched: counted.fetched + 1, ..counted });
            if bytes.chunks_exact(8).any(|word| word == POISON.to_le_bytes()) {
                let what = format!("{who}: a fetch at {gva} read a frame that nobody has");
                return stage.violate(Violation::new(what));
            }
            let walk = before.stands(stage);
            if walk.as_ref().is_some_and(|walk| !walk.may_read(&bytes)) {
                let what = format!("{who}: a fetch at {gva} read {:x?}, where {walk:x?} stands", &*bytes);
                stage.violate(Violation::new(what));
            }
        }
        Err(error) => {
            let may = match error {
                FetchError::Walk(WalkError::Guest(_)) | FetchError::Unreadable(_) => {
                    before.stands(stage).is_none_or(|walk| walk.may_end())
                }
                FetchError::Walk(WalkError::Host { at, why }) => match why {
                    Error::Backing { why: refused, .. } => {
                        let (changed, world) = (before.changed(stage), stage.world.borrow());
                        changed || no_answer(stage, why) || world.may_refuse(space, at.gfn().raw(), refused)
                    }
                    _ => false,
                },
                _ => false,
            };
            if !may {
                let walk = before.stands(stage);
                let what = format!("{who}: a fetch at {gva}, where {walk:x?} stands: {error}");
                stage.violate(Violation::new(what));
            }
        }
    }
}

/// What a walk of the guest's tables comes to, as far as the model knows.
#[derive(PartialEq, Eq, Debug)]
enum Walk {
    /// A page is being made, moved or taken away.
    Unknown,
    /// An entry is not present, or where one or the page would be no memory is.
    Ends,
    /// These words.
    Reads([u64; 2]),
}

impl Walk {
    /// What a processor would come to that walks now, from a table of 32-bit paging.
    fn now(stage: &Stage, space: AddressSpace, cr3: u64, gva: Gva) -> Self {
        Self::to_the_end(stage, space, cr3, gva).map_or_else(|before| before, Self::Reads)
    }
    /// The words at the end of it, or how it ends before.
    fn to_the_end(stage: &Stage, space: AddressSpace, cr3: u64, gva: Gva) -> Result<[u64; 2], Self> {
        let word = |gpa: u64| {
            let gfn = gpa >> 12;
            let world = stage.world.borrow();
            let settled = world.at(space, gfn).all(|slot| slot.settled && slot.is_here(gfn));
            match stage.words(space, gfn, gpa % 4096 / 8)[..] {
                _ if !settled || world.is_open(gfn) => Err(Self::Unknown),
                [] => Err(Self::Ends),
                [word] => Ok(word),
                _ => Err(Self::Unknown),
            }
        };
        let entry = |table: u64, index: u64| {
            let entry = word(table + 4 * index)? >> (32 * (index % 2)) & 0xFFFF_FFFF;
            if entry & 1 == 0 { Err(Self::Ends) } else { Ok(entry & !0xFFF) }
        };
        let table = entry(cr3 & !0xFFF, gva.raw() >> 22)?;
        let page = entry(table, gva.raw() >> 12 & 0x3FF)?;
        let at = page + gva.raw() % 4096;
        Ok([word(at)?, word(at + 8)?])
    }
    fn may_read(&self, bytes: &[u8]) -> bool {
        match self {
            Self::Unknown => true,
            Self::Ends => false,
            Self::Reads(words) => {
                bytes.len() == 16
                    && bytes.chunks_exact(8).zip(words).all(|(is, word)| is == word.to_le_bytes())
            }
        }
    }
    fn may_end(&self) -> bool {
        !matches!(self, Self::Reads(_))
    }
}

/// The world before a fetch, to be compared with the one after it.
struct Moment {
    world: (u64, u64),
    writes: Option<u64>,
    space: AddressSpace,
    cr3: u64,
    gva: Gva,
}

impl Moment {
    fn now(stage: &Stage, space: AddressSpace, cr3: u64, gva: Gva) -> Self {
        let (world, writes) = (stage.world.borrow().moment(), stage.writes.quiet());
        Self { world, writes, space, cr3, gva }
    }
    fn changed(&self, stage: &Stage) -> bool {
        stage.world.borrow().moment() != self.world
    }
    /// The walk that was right all the time since; `None` where something changed.
    fn stands(&self, stage: &Stage) -> Option<Walk> {
        let same = !self.changed(stage) && self.writes.is_some() && stage.writes.quiet() == self.writes;
        same.then(|| Walk::now(stage, self.space, self.cr3, self.gva))
    }
}
