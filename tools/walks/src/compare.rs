//! Compares one record with the model's answer, and keeps count.
//!
//! Pure. A walk *agrees* if the manuals allow all that the processor did. It is *excused* if they do not, and a
//! named quirk of the processor explains it; the quirks that it takes are counted. All else is a disagreement.

use crate::draw::{Kind, Walk};
use crate::model::{Answer, Model, NOWHERE, marks_before};
use crate::report::{DONE, Record};
use crate::run::{Has, Run};
use std::collections::BTreeMap;
use vmmu_machine::{EntryRefused, Quirks, Stage};

/// The accessed flags of a record's marks.
const ACCESSED: u32 = 0x1555_5555;

/// Whether the record is one that the answer allows.
pub(crate) fn agrees(walk: &Walk, answer: &Answer, record: &Record) -> bool {
    let address = match answer.address {
        // Told only where it is not the address of the access.
        Some(address) if address == walk.gva && record.address.is_none() => true,
        Some(address) => record.address == Some(address),
        None => record.address.is_none(),
    };
    // Whoever executes what lies where nothing is ends in some exception.
    if walk.kind == Kind::Fetch && answer.vector == DONE && answer.reached == NOWHERE {
        return record.vector < 32;
    }
    let same = answer.vector == record.vector
        && answer.at_load == record.at_load
        && answer.code == record.code
        && (answer.vector != DONE || answer.reached == record.reached);
    same && address && record.changed.is_none() && marks_agree(walk, answer, record.marks)
}

/// Nothing is cleared, what must be set is, and what may be set is set from the top down.
fn marks_agree(walk: &Walk, answer: &Answer, marks: u32) -> bool {
    let before = marks_before(walk);
    let new = marks & !before;
    let may = answer.may.iter().fold(answer.must, |all, mark| all | mark.1);
    let in_order = [Stage::First, Stage::Second].into_iter().all(|stage| {
        let accessed = answer.may.iter().map(|mark| (mark.0, mark.1 & ACCESSED & !answer.must));
        let of_stage = accessed.filter(|mark| mark.0 == stage && mark.1 != 0);
        let set: Vec<bool> = of_stage.map(|mark| new & mark.1 != 0).collect();
        set.is_sorted_by(|upper, lower| upper >= lower)
    });
    before & !marks == 0 && new & answer.must == answer.must && new & !may == 0 && in_order
}

/// What became of a comparison.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    Agreed,
    /// By these quirks, all of which it takes.
    Excused(Vec<&'static str>),
    /// The manuals' answer.
    Disagreed(Answer),
}

/// Compares a record with the manuals, then with the processor's known quirks. The walk's tables are laid.
pub(crate) fn judge(
    model: &Model,
    run: &Run,
    walk: &Walk,
    record: &Record,
    known: Quirks,
) -> Result<Verdict, EntryRefused> {
    let answer = model.ask(run, walk, Quirks::NONE)?;
    if agrees(walk, &answer, record) {
        return Ok(Verdict::Agreed);
    }
    let explains = |quirks: Quirks| model.ask(run, walk, quirks).map(|answer| agrees(walk, &answer, record));
    if !explains(known)? {
        return Ok(Verdict::Disagreed(answer));
    }
    let mut needed = known;
    for quirk in known.named() {
        let fewer = needed.without(quirk);
        if explains(fewer)? {
            needed = fewer;
        }
    }
    Ok(Verdict::Excused(needed.named().map(|quirk| quirk.name()).collect()))
}

/// The walker that a walk was made by, as the documents name it.
pub(crate) const fn walker(run: &Run, walk: &Walk) -> &'static str {
    match (run.mode.nested_levels(), run.mode.levels()) {
        (5, 5) => "NPT, 5 levels, guest 5",
        (5, _) => "NPT, 5 levels, guest 4",
        (4, 4) => "NPT, 4 levels, guest 4",
        (4, 3) => "NPT, 4 levels, guest PAE",
        (4, _) => "NPT, 4 levels, guest 32-bit",
        (_, 5) => "5 levels",
        (_, 4) => "4 levels",
        (_, 3) => "PAE",
        _ if !walk.pse => "32-bit",
        _ if run.has.any(Has::PSE36) => "PSE-36",
        _ => "PSE",
    }
}

/// How many walks of one walker came to what.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(crate) struct Tally {
    pub(crate) walks: u64,
    /// Those that reached memory.
    pub(crate) reached: u64,
    pub(crate) agreed: u64,
    /// By each quirk; a walk that takes two counts for both.
    pub(crate) excused_by: BTreeMap<&'static str, u64>,
    pub(crate) excused: u64,
    pub(crate) disagreed: u64,
}

impl Tally {
    pub(crate) fn count(&mut self, record: &Record, verdict: &Verdict) {
        self.walks += 1;
        self.reached += u64::from(record.vector == DONE);
        match verdict {
            Verdict::Agreed => self.agreed += 1,
            Verdict::Excused(quirks) => {
                self.excused += 1;
                for quirk in quirks {
                    *self.excused_by.entry(quirk).or_default() += 1;
                }
            }
            Verdict::Disagreed(_) => self.disagreed += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::draw::draw;
    use crate::run::Mode;
    use vmmu_machine::Vendor;

    fn run(mode: u32) -> Run {
        Run {
            mode: Mode(mode),
            has: Has(if mode < 4 { 0xcf } else { 0x3ff }),
            phys_bits: 40,
            regions: 20,
            seed: 5,
            first: 0,
            count: 1,
            vendor: Vendor::Amd,
            stubs: [0x10_1000, 0x10_2000],
            stub_offsets: [0, 8, 16, 24],
        }
    }

    /// The record of a processor that does what the answer says, and marks all that it may.
    fn obedient(walk: &Walk, answer: &Answer) -> Record {
        let may = answer.may.iter().fold(answer.must, |all, mark| all | mark.1);
        Record {
            checksum: walk.checksum(),
            vector: answer.vector,
            at_load: answer.at_load,
            code: answer.code,
            reached: answer.reached,
            marks: marks_before(walk) | may,
            address: answer.address.filter(|&address| address != walk.gva),
            changed: None,
        }
    }

    /// Walks of every mode with the manuals' answer, their tables laid.
    fn each_walk(mut visit: impl FnMut(&Model, &Run, &Walk, &Answer)) {
        let model = Model::new();
        for mode in [2, 3, 4, 5, 0x42, 0x43, 0x44, 0x54, 0x55] {
            for index in 0..500 {
                let run = run(mode);
                let walk = draw(&run, index);
                model.lay(&run, &walk, false);
                let answer = model.ask(&run, &walk, Quirks::NONE).expect("registers that run");
                visit(&model, &run, &walk, &answer);
                model.lay(&run, &walk, true);
            }
        }
    }

    #[test]
    fn whoever_does_as_the_manuals_say_agrees_and_nobody_else() {
        let mut kinds = [0; 256];
        each_walk(|_, _, walk, answer| {
            let good = obedient(walk, answer);
            kinds[usize::from(good.vector)] += 1;
            assert!(agrees(walk, answer, &good), "{walk:?} {answer:?}");
            let wrong = |change: fn(&mut Record)| {
                let mut record = good.clone();
                change(&mut record);
                assert!(!agrees(walk, answer, &record), "{walk:?} {answer:?} {record:?}");
            };
            wrong(|record| record.vector ^= 1);
            wrong(|record| record.code ^= 1);
            wrong(|record| record.at_load ^= true);
            wrong(|record| record.address = Some(0xbad));
            wrong(|record| record.changed = Some(Vec::new()));
            wrong(|record| record.marks ^= 1 << 31);
            if good.vector == DONE {
                wrong(|record| record.reached ^= 1);
            }
            // Every flag that was there or must come is wanted, and no other is.
            for bit in 0..30 {
                let mut record = good.clone();
                record.marks ^= 1 << bit;
                let open =
                    answer.may.iter().any(|mark| mark.1 >> bit & 1 != 0) && answer.must >> bit & 1 == 0;
                assert!(open || !agrees(walk, answer, &record), "bit {bit} of {walk:?} {answer:?}");
            }
        });
        for vector in [DONE, 14, 13, crate::report::NESTED] {
            assert!(kinds[usize::from(vector)] > 10, "too few walks end with {vector:#x}");
        }
    }

    #[test]
    fn what_may_be_marked_is_marked_from_the_top_down() {
        let mut seen = 0;
        each_walk(|_, _, walk, answer| {
            let accessed: Vec<u32> = answer
                .may
                .iter()
                .filter(|mark| mark.0 == Stage::First && mark.1 & ACCESSED != 0)
                .map(|mark| mark.1 & ACCESSED)
                .collect();
            if let [first, second, ..] = accessed[..]
                && answer.must == 0
            {
                seen += 1;
                let mut record = obedient(walk, answer);
                record.marks = marks_before(walk) | first;
                assert!(agrees(walk, answer, &record));
                record.marks = marks_before(walk) | second;
                assert!(!agrees(walk, answer, &record), "{walk:?} {answer:?}");
            }
        });
        assert!(seen > 100, "{seen}");
    }

    #[test]
    fn a_quirk_is_named_only_where_it_is_needed() {
        let (mut by_one, mut by_two) = (0, 0);
        each_walk(|model, run, walk, answer| {
            let odd = model.ask(run, walk, Quirks::QEMU_7_2).expect("registers that run");
            let record = obedient(walk, &odd);
            let verdict = judge(model, run, walk, &record, Quirks::QEMU_7_2).expect("registers that run");
            match verdict {
                Verdict::Agreed => assert!(agrees(walk, answer, &record)),
                Verdict::Excused(quirks) => {
                    assert!(!agrees(walk, answer, &record));
                    assert!(!quirks.is_empty());
                    by_one += u32::from(quirks.len() == 1);
                    by_two += u32::from(quirks.len() == 2);
                    let without = judge(model, run, walk, &record, Quirks::NONE).expect("registers that run");
                    assert!(matches!(without, Verdict::Disagreed(_)));
                }
                Verdict::Disagreed(_) => panic!("{walk:?}"),
            }
        });
        assert!(by_one > 100 && by_two > 10, "{by_one} {by_two}");
    }
}
