//! The oracles: whether what a processor could use is what the model allows.
//!
//! - At each guest access, every translation that the processor could use for that address is judged: by the frame
//!   (isolation) and by the right to write. At each entry, all that is held under the tag.
//! - When an invalidation has returned, no processor in the guest leads to a frame that was taken away; when
//!   everything was zapped, none holds anything from before.
//!
//! Invariant: an oracle changes nothing.

use crate::history::Stage;
use crate::story::Violation;
use crate::world::World;
use vmmu::{AddressSpace, Gfn, GfnRange, PageSize, Pfn};
use vmmu_machine::{Gpa, Held, Mapping, PhysicalTag, Processor, Rights, Tag};

/// Judges every translation of `gfn` that `processor`, which runs a guest in `space`, could use now.
pub(crate) fn one(
    stage: &Stage,
    processor: &Processor,
    space: AddressSpace,
    gfn: u64,
) -> Result<(), Violation> {
    let queries = processor.queries(&stage.memory);
    let gpa = Gpa::new(gfn << 12);
    for translation in queries.physical_translations(gpa) {
        let (frame, write) = (translation.hpa.raw() >> 12, translation.nested.has(Rights::WRITE));
        judge(stage, space, gfn, frame, 1, write).map_err(|what| {
            let tag = queries.physical_tag();
            let held = tag.into_iter().flat_map(|tag| processor.held_of_physical(tag, gpa));
            explained(what, held)
        })?;
    }
    Ok(())
}

/// Judges all that `processor` holds under `tag`, with which a guest is entered in `space`.
pub(crate) fn entered(
    stage: &Stage,
    processor: &Processor,
    tag: PhysicalTag,
    space: AddressSpace,
) -> Result<(), Violation> {
    none_older(processor, tag, stage.zapped.get())?;
    for held in processor.held_by(Tag::Physical(tag)) {
        if let Mapping::Page(page) = held.mapping {
            let (gfn, frame, pages) = (page.at >> 12, page.frame.raw() >> 12, page.size.bytes() >> 12);
            judge(stage, space, gfn, frame, pages, page.nested.has(Rights::WRITE))
                .map_err(|what| explained(what, [held]))?;
        }
    }
    Ok(())
}

/// Judges that no processor that is in the guest leads to frames that were taken away.
pub(crate) fn gone(stage: &Stage, size: PageSize, frame: Pfn) -> Result<(), Violation> {
    for (number, physical) in stage.processors.iter().enumerate() {
        let Some(tag) = physical.guest.get() else { continue };
        let taken = frame.raw()..frame.raw() + size.pages();
        let reaches = |held: &&Held| match held.mapping {
            Mapping::Page(page) => {
                let first = page.frame.raw() >> 12;
                first < taken.end && taken.start < first + (page.size.bytes() >> 12)
            }
            Mapping::Table(_) => false,
        };
        if let Some(held) = physical.model.borrow().held_by(Tag::Physical(tag)).find(reaches) {
            let what =
                format!("processor {number}, in the guest, reaches a frame that was taken away: {taken:#x?}");
            return Err(explained(what, [held]));
        }
    }
    Ok(())
}

/// Judges that no processor that is in the guest holds anything from before everything was zapped.
pub(crate) fn zapped(stage: &Stage) -> Result<(), Violation> {
    for physical in &stage.processors {
        if let Some(tag) = physical.guest.get() {
            none_older(&physical.model.borrow(), tag, stage.zapped.get())?;
        }
    }
    Ok(())
}

fn none_older(processor: &Processor, tag: PhysicalTag, zapped: u64) -> Result<(), Violation> {
    let old = |held: &&Held| held.provenance.step < zapped;
    match processor.held_by(Tag::Physical(tag)).find(old) {
        None => Ok(()),
        Some(held) => {
            let what = format!("in the guest, from before step {zapped}, when everything was zapped");
            Err(explained(what, [held]))
        }
    }
}

/// A violation with what is held, and where that comes from.
fn explained<'a>(what: String, held: impl IntoIterator<Item = &'a Held>) -> Violation {
    let mut violation = Violation::new(what);
    for Held { tag, mapping, provenance } in held {
        violation.why.push(match mapping {
            Mapping::Page(page) => {
                let (at, frame) = (page.at >> 12, page.frame.raw() >> 12);
                format!("held under {tag:?}: guest frame {at:#x} to host frame {frame:#x}, {:?}", page.size)
            }
            Mapping::Table(table) => {
                format!("held under {tag:?}: the table at {} for {:#x}", table.table, table.at >> 12)
            }
        });
        violation.why.extend(provenance.to_string().lines().map(|line| format!("  {line}")));
    }
    violation
}

/// Judges that a guest in `space` may reach `pages` host frames from `frame` on for guest frames from `gfn` on.
pub(crate) fn judge(
    stage: &Stage,
    space: AddressSpace,
    gfn: u64,
    frame: u64,
    pages: u64,
    write: bool,
) -> Result<(), String> {
    let world = stage.world.borrow();
    let all = GfnRange::with_len(Gfn::new(gfn), pages).unwrap_or(GfnRange::EMPTY);
    if world.open.iter().any(|range| range.overlaps(all)) {
        return Err(format!("{all:?} reaches host frames from {frame:#x} on while it is taken away"));
    }
    if world.at(space, gfn).any(|slot| slot.holds(gfn, frame, pages, write)) {
        return Ok(());
    }
    // Not of one slot as a whole: page by page.
    (0..pages).try_for_each(|page| judge_page(&world, space, gfn + page, frame + page, write))
}

fn judge_page(world: &World, space: AddressSpace, gfn: u64, frame: u64, write: bool) -> Result<(), String> {
    let mut frames = 0;
    for (pfn, writable) in world.allowed(space, gfn) {
        frames += 1;
        if pfn.raw() == frame && (writable || !write) {
            return Ok(());
        }
        if pfn.raw() == frame {
            return Err(format!("guest frame {gfn:#x} is writable, its slot or backing is not"));
        }
    }
    Err(match frames {
        0 => format!("guest frame {gfn:#x} reaches host frame {frame:#x}, and no slot is there"),
        _ => format!("guest frame {gfn:#x} reaches host frame {frame:#x}, which is not its own any more"),
    })
}
