//! Page-table pages: where they come from, how their entries are reached and changed, how they are walked.
//!
//! | room | holds |
//! |---|---|
//! | `arena` | blocks of table pages with their records; the memory limit |
//! | `page` | a borrowed page and its atomic entries, reachable only inside a section |
//! | `cache` | a vCPU's prepared pages, filled before any lock |
//! | `transition` | the only judge of what a change of an entry owes |
//! | `cursor` | the walk over a range of guest frames |
//!
//! It may touch `tlb`, `arch`, `host` and `addr`. Invariants: a page is reached from an entry only inside a
//! section that was announced before the entry was read; every change of an entry that was
//! present is judged by `transition::judge`.

pub(crate) mod arena;
pub(crate) mod cache;
pub(crate) mod cursor;
pub(crate) mod page;
pub(crate) mod transition;
