//! What a change of an entry owes: one pure function, the only judge (T148).
//!
//! Pure. Invariant: every change of an entry that was present, in a table that a processor can reach, is judged
//! here, and the answer is carried as a [`crate::tlb::shootdown::FlushDebt`] or excused by the context. What
//! becomes of an entry that was not present owes nothing, by the table's first row.

use crate::addr::{Gfn, Level};
use crate::arch::entry::{Entry, Leaf, Writable};

/// When a flush must have happened.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) enum Flush {
    /// Never: what a processor may still hold is right, or only faults again.
    None,
    /// Before the operation reports to its user (T148d, T148e).
    BeforeReport,
    /// Before the lock is released, the range is reused or the section ends (T148c, T148g, T148h, T148k).
    BeforeUnlock,
}

/// A change that no operation makes (T86, T91, T93): it betrays a missed invalidation or a broken table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Illegal;

/// Judges the change from `old` to `new`. `root_is_valid` is false where the root was invalidated and that
/// shootdown has ended: then processors cannot reach the entry (T148j).
#[inline(always)]
pub(crate) fn judge(old: Entry, new: Entry, root_is_valid: bool) -> Result<Flush, Illegal> {
    let flush = match (old, new) {
        // A leaf or a link that takes the place of the other, or of nothing.
        (Entry::Empty | Entry::Mmio(_) | Entry::Frozen, _) => Flush::None, // T148a
        (Entry::Leaf(old), Entry::Leaf(new)) => leaf_to_leaf(old, new)?,
        (Entry::Leaf(_), Entry::Link(_)) => Flush::None, // T148i: a split agrees with the leaf
        (Entry::Leaf(_), Entry::Empty | Entry::Frozen) => Flush::BeforeUnlock, // T148g
        (Entry::Link(_), Entry::Leaf(_) | Entry::Empty | Entry::Frozen) => Flush::BeforeUnlock, // T148h
        (Entry::Link(old), Entry::Link(new)) if old == new => Flush::None,
        // T93: a link never changes its table without passing through non-present; an MMIO entry replaces
        // only what is not present (PROTOCOLS 5).
        (Entry::Link(_), Entry::Link(_)) | (Entry::Leaf(_) | Entry::Link(_), Entry::Mmio(_)) => {
            return Err(Illegal);
        }
    };
    Ok(if root_is_valid { flush } else { Flush::None }) // T148j
}

/// Tells whoever watches the library that the entry for `gfn` at `level`, in a table that walks can reach, was changed:
/// nothing in builds without instruments.
#[inline(always)]
#[cfg_attr(not(feature = "instrument"), allow(unused_variables))]
pub(crate) fn changed(gfn: Gfn, level: Level, old: Entry, new: Entry) {
    crate::coverage::transition(level, old, new);
    #[cfg(feature = "instrument")]
    crate::instrument::changed(gfn, level, old, new);
}

#[inline]
fn leaf_to_leaf(old: Leaf, new: Leaf) -> Result<Flush, Illegal> {
    if old.pfn != new.pfn {
        return Err(Illegal); // T86
    }
    let tracked = |leaf: Leaf| leaf.writable < Writable::Logged;
    // T148c, also where W was clear already; T148k.
    let before_unlock = (tracked(new) && !tracked(old)) || (old.executable && !new.executable);
    // T148d, T148e.
    let before_report =
        (old.writable == Writable::Yes && new.writable != Writable::Yes) || (old.dirty && !new.dirty);
    let flush = match (before_unlock, before_report) {
        (true, _) => Flush::BeforeUnlock,
        (false, true) => Flush::BeforeReport,
        (false, false) => Flush::None, // T148b, T148f
    };
    Ok(flush)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{Hpa, Pfn};
    use crate::arch::entry::Mmio;
    use std::vec::Vec;

    const WRITABLE: [Writable; 4] = [Writable::No, Writable::Tracked, Writable::Logged, Writable::Yes];

    fn leaves() -> Vec<Leaf> {
        let mut all = Vec::new();
        for pfn in [1, 2] {
            for writable in WRITABLE {
                for bits in 0..8u8 {
                    all.push(Leaf {
                        pfn: Pfn::new(pfn),
                        writable,
                        executable: bits & 1 != 0,
                        accessed: bits & 2 != 0,
                        dirty: bits & 4 != 0,
                    });
                }
            }
        }
        all
    }
    fn entries() -> Vec<Entry> {
        let mut all: Vec<Entry> = leaves().into_iter().map(Entry::Leaf).collect();
        all.extend([
            Entry::Empty,
            Entry::Frozen,
            Entry::Link(Hpa::new(0x1000)),
            Entry::Link(Hpa::new(0x2000)),
        ]);
        all.push(Entry::Mmio(Mmio { gfn: Gfn::new(1), write: false, generation: 3 }));
        all
    }

    /// T148a–T148k, written down a second time as the table reads: for each pair, the row that demands most.
    fn table(old: Entry, new: Entry) -> Result<Flush, Illegal> {
        let mut demanded = Vec::new();
        if let (Entry::Leaf(o), Entry::Leaf(n)) = (old, new) {
            if o.pfn != n.pfn {
                return Err(Illegal);
            }
            let mmu = |w: Writable| matches!(w, Writable::Logged | Writable::Yes);
            let w = |w: Writable| w == Writable::Yes;
            if mmu(o.writable) && !mmu(n.writable) {
                demanded.push(Flush::BeforeUnlock); // c
            }
            if w(o.writable) && !w(n.writable) && mmu(n.writable) {
                demanded.push(Flush::BeforeReport); // d
            }
            if o.dirty && !n.dirty {
                demanded.push(Flush::BeforeReport); // e
            }
            if o.executable && !n.executable {
                demanded.push(Flush::BeforeUnlock); // k
            }
        }
        if old.is_present() {
            match (old, new) {
                (_, Entry::Mmio(_)) => return Err(Illegal),
                (Entry::Link(a), Entry::Link(b)) if a != b => return Err(Illegal),
                (_, Entry::Empty | Entry::Frozen) => demanded.push(Flush::BeforeUnlock), // g, h
                (Entry::Link(_), Entry::Leaf(_)) => demanded.push(Flush::BeforeUnlock),  // h
                _ => {}
            }
        }
        Ok(demanded.into_iter().max().unwrap_or(Flush::None))
    }

    #[test]
    fn every_pair_agrees_with_the_table() {
        for old in entries() {
            for new in entries() {
                assert_eq!(judge(old, new, true), table(old, new), "{old:?} -> {new:?}");
                let excused = judge(old, new, false);
                assert_eq!(
                    excused,
                    table(old, new).map(|_| Flush::None),
                    "{old:?} -> {new:?} in an invalid root"
                );
            }
        }
    }
}
