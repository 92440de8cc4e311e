//! Audits of the library's tables: of what changed wherever no operation is open, of everything at rest.
//!
//! Each asks the library for its own invariants, and judges what is mapped by the model. Books are kept a second time,
//! from the changes of entries that coverage counts. Invariant: an audit changes nothing; what only the audit of
//! everything finds is a bug of the other.

use crate::coverage::{Coverage, Kind, Point, Transition};
use crate::history::Stage;
use crate::oracle::judge;
use crate::story::Violation;
use vmmu::{AuditReport, Mapping, instrument};

/// Audits what changed since the last audit. No operation is open, and every store is visible.
pub(crate) fn changed(stage: &Stage) -> Result<(), Violation> {
    let mut entries = instrument::take_changed();
    let mut ranges = stage.touched.take();
    if entries.is_empty() && ranges.is_empty() {
        return Ok(());
    }
    entries.sort_unstable();
    entries.dedup();
    ranges.sort_unstable_by_key(|range| (range.start(), range.end()));
    ranges.dedup();
    let mut wrong = None;
    let show = |mapping: Mapping| judge_mapping(stage, mapping, &mut wrong);
    let report = stage.vm.audit_changed(&entries, &ranges, show);
    let report = report.map_err(|broken| Violation::new(format!("audit of what changed: {broken}")))?;
    pages_are_accounted_for(&report)?;
    let coverage = Coverage::so_far();
    books_agree(&report, &coverage)?;
    // A root that went must have left nothing behind, and only a count of what is left tells.
    let went = coverage.point(Point::RootZapped);
    if stage.roots_gone.replace(went) != went {
        whole_tables(stage)?;
    }
    wrong.map_or(Ok(()), |what| Err(Violation::new(what)))
}

/// Audits what changed, then everything. All tasks are at rest, and every store is visible.
pub(crate) fn whole(stage: &Stage) -> Result<(), Violation> {
    changed(stage)?;
    everything(stage).map_err(|mut violation| {
        violation.what = format!("the audit of what changed has missed this: {}", violation.what);
        violation
    })
}

fn everything(stage: &Stage) -> Result<(), Violation> {
    whole_tables(stage)?;
    let mut wrong = None;
    if let Err(error) = stage.vm.for_each_mapping(|mapping| judge_mapping(stage, mapping, &mut wrong)) {
        return Err(Violation::new(format!("the mappings cannot be looked at: {error}")));
    }
    wrong.map_or(Ok(()), |what| Err(Violation::new(what)))
}

/// All of the library's own invariants.
fn whole_tables(stage: &Stage) -> Result<(), Violation> {
    let report = stage.vm.audit().map_err(|broken| Violation::new(format!("audit: {broken}")))?;
    pages_are_accounted_for(&report)
}

fn judge_mapping(stage: &Stage, mapping: Mapping, wrong: &mut Option<String>) {
    if wrong.is_none() {
        let (gfn, frame, pages) = (mapping.gfn.raw(), mapping.pfn.raw(), mapping.size.pages());
        *wrong = judge(stage, mapping.space, gfn, frame, pages, mapping.writable).err();
    }
}

/// Every table page is a root, a table, free, prepared or retired.
fn pages_are_accounted_for(report: &AuditReport) -> Result<(), Violation> {
    let held = report.roots + report.tables + report.free + report.cached + report.retired;
    if held == report.pages {
        return Ok(());
    }
    Err(Violation::new(format!("{held} of {} table pages can be found: {report:?}", report.pages)))
}

/// The library's gauges are what the changes of entries add up to.
fn books_agree(report: &AuditReport, coverage: &Coverage) -> Result<(), Violation> {
    let sum = |level: Option<u8>, kinds: &[Kind]| {
        let mut sum = 0u64;
        for &change in Transition::ALL {
            let count = coverage.transition(change);
            if level.is_none_or(|level| level == change.level) {
                sum = sum.wrapping_add(count * u64::from(kinds.contains(&change.to)));
                sum = sum.wrapping_sub(count * u64::from(kinds.contains(&change.from)));
            }
        }
        sum
    };
    let check = |what: &str, counted: u64, booked: u64| {
        if counted == booked {
            return Ok(());
        }
        Err(Violation::new(format!("{what}: entries changed to {counted}, booked are {booked}")))
    };
    check("tables", sum(None, &[Kind::Table]), report.tables)?;
    for (level, booked) in (1..).zip(report.leaves) {
        let leaves = sum(Some(level), &[Kind::ReadOnly, Kind::Writable]);
        // A split makes a whole table of them.
        let split = Transition { level: level + 1, from: Kind::ReadOnly, to: Kind::Table };
        check("leaves of a size", leaves.wrapping_add(512 * coverage.transition(split)), booked)?;
    }
    Ok(())
}
