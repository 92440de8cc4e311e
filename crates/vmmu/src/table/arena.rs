//! The arena: table pages in naturally aligned blocks from the host, the first page of a block holding the
//! records of the others.
//!
//! From a page's address its record is one mask away, and nothing per page is asked of the host. It counts
//! what the VM has and enforces the VM's limit. Invariants: a page is in exactly one place (its block's free
//! list, somebody's hand, a live table, the reclaim queue); a block is given back to the host when all its
//! pages are free and another block has free pages too, or when the VM ends.

use crate::addr::{Gfn, Hpa, Level, PAGE_BYTES};
use crate::coverage::{Point, hit};
use crate::error::Error;
use crate::host::Host;
use crate::sync::{AtomicU64, Mutex, Ordering, Rank};
use crate::tlb::reclaim::{PageList, Records};
use Ordering::Relaxed;
use core::fmt;
use core::marker::PhantomData;

/// log2 of the pages in a block: 256 KiB, 63 tables and their records.
pub(crate) const BLOCK_ORDER: u8 = 6;
/// Pages in a block.
const BLOCK_PAGES: u64 = 1 << BLOCK_ORDER;
/// Bytes in a block.
pub(crate) const BLOCK_BYTES: u64 = BLOCK_PAGES * PAGE_BYTES;
/// Table pages in a block: all but the one with the records.
pub(crate) const BLOCK_TABLES: u64 = BLOCK_PAGES - 1;

/// What is known of a table page beside its entries. The record of a block's first page is the block's own.
#[repr(C, align(64))]
pub(crate) struct Record {
    /// The link of whichever list holds the page.
    next: AtomicU64,
    /// The generation of its retirement; for a block, its free pages.
    generation: AtomicU64,
    /// The first guest frame it covers; for a block, the previous block.
    gfn: AtomicU64,
    /// Its level, and whether it is live; for a block, the next block.
    level: AtomicU64,
    /// For a block, the first of its free pages.
    free: AtomicU64,
    /// The arena that it belongs to.
    owner: AtomicU64,
    _room: [u64; 2],
}

const _: () = assert!(size_of::<Record>() as u64 * BLOCK_PAGES == PAGE_BYTES);

/// A table page that the caller owns and nobody else can reach. Its content is arbitrary.
#[must_use]
pub(crate) struct FreePage(Hpa);

impl FreePage {
    pub(crate) fn at(&self) -> Hpa {
        self.0
    }
    /// Gives the page to whatever entry or list names it from now on.
    pub(crate) fn hand_over(self) -> Hpa {
        self.0
    }
}

impl fmt::Debug for FreePage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FreePage({})", self.0)
    }
}

/// The tables of one VM.
pub(crate) struct Arena<H> {
    pool: Mutex<Pool>,
    /// Held by whoever asks the host for a block, so that two do not take one shortage for two.
    growing: Mutex<()>,
    limit: u64,
    identity: u64,
    below_4g: bool,
    blocks: AtomicU64,
    _host: PhantomData<fn(&H)>,
}

/// Blocks in a doubly linked list through their records: those with free pages first.
#[derive(Debug)]
struct Pool {
    first: u64,
    last: u64,
    free_pages: u64,
}

/// A view of the arena with the host that maps its memory.
pub(crate) struct Tables<'a, H> {
    pub(crate) arena: &'a Arena<H>,
    pub(crate) host: &'a H,
}

/// The block in which a page lies.
#[inline(always)]
pub(crate) fn block_of(page: Hpa) -> Hpa {
    Hpa::new(page.raw() & !(BLOCK_BYTES - 1))
}

impl<H> Clone for Tables<'_, H> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<H> Copy for Tables<'_, H> {}

impl<H: Host> Arena<H> {
    /// An arena without blocks, of at most `limit` bytes.
    pub(crate) fn new(limit: u64, identity: u64, below_4g: bool) -> Self {
        Self {
            pool: Mutex::new(Rank::Leaf, Pool { first: 0, last: 0, free_pages: 0 }),
            growing: Mutex::new(Rank::Growth, ()),
            limit,
            identity,
            below_4g,
            blocks: AtomicU64::new(0),
            _host: PhantomData,
        }
    }
    /// Bytes that the host has handed out.
    pub(crate) fn bytes(&self) -> u64 {
        self.blocks.load(Relaxed) * BLOCK_BYTES
    }
}

impl<'a, H: Host> Tables<'a, H> {
    /// The record of a page of this arena.
    #[inline(always)]
    fn record(&self, page: Hpa) -> &'a Record {
        let block = block_of(page).raw();
        let index = (page.raw() & (BLOCK_BYTES - 1)) / PAGE_BYTES;
        let at = self.host.table_ptr(Hpa::new(block + index * size_of::<Record>() as u64));
        // SAFETY: pages come from entries, lists and `alloc`, so `page` lies in a block of this arena, whose
        // first page holds initialised records (written in `grow`) for as long as the block is not given
        // back; `table_ptr` maps it (contract of `Host`). Records consist of atomics, so sharing is sound.
        unsafe { at.cast::<Record>().as_ref() }
    }

    /// Whether `page` is a table page of this arena, by its record. Only for pages that some entry names.
    pub(crate) fn owns(&self, page: Hpa) -> bool {
        page.is_page_aligned()
            && block_of(page) != page
            && self.record(block_of(page)).owner.load(Relaxed) == self.arena.identity
    }

    /// Takes a page, asking the host for a block where none is free. Called with nothing held.
    pub(crate) fn alloc(&self) -> Result<FreePage, Error> {
        if let Some(page) = self.alloc_free() {
            return Ok(page);
        }
        let _growing = self.arena.growing.lock();
        loop {
            // Whoever grew before this one may have left enough.
            if let Some(page) = self.alloc_free() {
                return Ok(page);
            }
            self.grow()?;
        }
    }

    /// Takes a page that is free already.
    pub(crate) fn alloc_free(&self) -> Option<FreePage> {
        let mut pool = self.arena.pool.lock();
        self.take_free(&mut pool)
    }

    fn take_free(&self, pool: &mut Pool) -> Option<FreePage> {
        if pool.free_pages == 0 {
            return None;
        }
        let mut block = pool.first;
        while block != 0 {
            let record = self.record(Hpa::new(block));
            let page = record.free.load(Relaxed);
            if page != 0 {
                record.free.store(self.record(Hpa::new(page)).next.load(Relaxed), Relaxed);
                let left = record.generation.load(Relaxed) - 1;
                record.generation.store(left, Relaxed);
                pool.free_pages -= 1;
                if left == 0 {
                    // A block without free pages goes to the back, so that the first one has some.
                    self.unlink(pool, block);
                    self.push_back(pool, block);
                }
                #[cfg(feature = "instrument")]
                if self.record(Hpa::new(page)).generation.load(Relaxed) != 0 {
                    // The generation of an earlier retirement.
                    hit(Point::TableReused);
                }
                return Some(FreePage(Hpa::new(page)));
            }
            block = record.level.load(Relaxed);
        }
        None
    }

    /// Gives a page back. Takes leaf locks only; may give a block back to the host afterwards.
    pub(crate) fn free(&self, page: FreePage) {
        let block = block_of(page.0).raw();
        let whole = {
            let mut pool = self.arena.pool.lock();
            let record = self.record(Hpa::new(block));
            self.record(page.0).next.store(record.free.load(Relaxed), Relaxed);
            record.free.store(page.0.raw(), Relaxed);
            let free = record.generation.load(Relaxed) + 1;
            record.generation.store(free, Relaxed);
            pool.free_pages += 1;
            if free == 1 {
                self.unlink(&mut pool, block);
                self.push_front(&mut pool, block);
            }
            let spare = pool.free_pages > BLOCK_TABLES;
            if free == BLOCK_TABLES && spare {
                self.unlink(&mut pool, block);
                pool.free_pages -= BLOCK_TABLES;
                true
            } else {
                false
            }
        };
        if whole {
            hit(Point::BlockGivenBack);
            self.arena.blocks.fetch_sub(1, Relaxed);
            self.host.free_tables(Hpa::new(block), BLOCK_ORDER);
        }
    }

    /// Frees all pages of a list.
    pub(crate) fn free_list(&self, mut pages: PageList) {
        while let Some(page) = pages.pop(self) {
            self.free(FreePage(page));
        }
    }

    /// Asks the host for one more block.
    fn grow(&self) -> Result<(), Error> {
        let arena = self.arena;
        let used = arena.blocks.fetch_add(1, Relaxed) * BLOCK_BYTES;
        if used + BLOCK_BYTES > arena.limit {
            arena.blocks.fetch_sub(1, Relaxed);
            return Err(Error::MemoryLimit { limit: arena.limit, used });
        }
        let Some(block) = self.host.alloc_tables(BLOCK_ORDER, arena.below_4g) else {
            arena.blocks.fetch_sub(1, Relaxed);
            return Err(Error::OutOfMemory);
        };
        assert!(
            block.raw().is_multiple_of(BLOCK_BYTES) && block.raw() != 0,
            "the host's block of tables at {block} is not aligned to {BLOCK_BYTES:#x}"
        );
        hit(Point::BlockTaken);
        let records = self.host.table_ptr(block).cast::<Record>();
        for index in 0..BLOCK_PAGES {
            let next =
                if index == 0 || index == BLOCK_TABLES { 0 } else { block.raw() + (index + 1) * PAGE_BYTES };
            let own = index == 0;
            let record = Record {
                next: AtomicU64::new(next),
                generation: AtomicU64::new(if own { BLOCK_TABLES } else { 0 }),
                gfn: AtomicU64::new(0),
                level: AtomicU64::new(0),
                free: AtomicU64::new(if own { block.raw() + PAGE_BYTES } else { 0 }),
                owner: AtomicU64::new(arena.identity),
                _room: [0; 2],
            };
            // SAFETY: the block was just handed out, so nobody else uses its first page, which has room for 64
            // records of 64 bytes and is aligned for them.
            unsafe {
                records.add(index as usize).write(record);
            }
        }
        let mut pool = arena.pool.lock();
        pool.free_pages += BLOCK_TABLES;
        self.push_front(&mut pool, block.raw());
        Ok(())
    }

    fn push_front(&self, pool: &mut Pool, block: u64) {
        let record = self.record(Hpa::new(block));
        record.gfn.store(0, Relaxed);
        record.level.store(pool.first, Relaxed);
        match pool.first {
            0 => pool.last = block,
            first => self.record(Hpa::new(first)).gfn.store(block, Relaxed),
        }
        pool.first = block;
    }

    fn push_back(&self, pool: &mut Pool, block: u64) {
        let record = self.record(Hpa::new(block));
        record.gfn.store(pool.last, Relaxed);
        record.level.store(0, Relaxed);
        match pool.last {
            0 => pool.first = block,
            last => self.record(Hpa::new(last)).level.store(block, Relaxed),
        }
        pool.last = block;
    }

    fn unlink(&self, pool: &mut Pool, block: u64) {
        let record = self.record(Hpa::new(block));
        let (previous, next) = (record.gfn.load(Relaxed), record.level.load(Relaxed));
        match previous {
            0 => pool.first = next,
            previous => self.record(Hpa::new(previous)).level.store(next, Relaxed),
        }
        match next {
            0 => pool.last = previous,
            next => self.record(Hpa::new(next)).gfn.store(previous, Relaxed),
        }
    }

    /// Notes what a page is about to be: a table of `level` whose first guest frame is `gfn`.
    #[inline]
    pub(crate) fn describe(&self, page: Hpa, gfn: Gfn, level: Level) {
        let record = self.record(page);
        record.gfn.store(gfn.raw(), Relaxed);
        record.level.store(u64::from(level.number()), Relaxed);
    }

    /// What [`Tables::describe`] noted.
    pub(crate) fn description(&self, page: Hpa) -> (Gfn, Option<Level>) {
        let record = self.record(page);
        let level = Level::new(record.level.load(Relaxed) as u8);
        (Gfn::new(record.gfn.load(Relaxed)), level)
    }

    /// Every block and its free pages, counted one by one: for the audit.
    pub(crate) fn count_free(&self, mut show: impl FnMut(Hpa)) -> u64 {
        let pool = self.arena.pool.lock();
        let mut free = 0;
        let mut block = pool.first;
        while block != 0 {
            show(Hpa::new(block));
            let record = self.record(Hpa::new(block));
            let mut page = record.free.load(Relaxed);
            while page != 0 {
                free += 1;
                page = self.record(Hpa::new(page)).next.load(Relaxed);
            }
            block = record.level.load(Relaxed);
        }
        free
    }

    /// Every block, and the free pages as the books have them: for an audit that looks at no list of pages.
    #[cfg(feature = "instrument")]
    pub(crate) fn blocks(&self, mut show: impl FnMut(Hpa)) -> u64 {
        let pool = self.arena.pool.lock();
        let mut block = pool.first;
        while block != 0 {
            show(Hpa::new(block));
            block = self.record(Hpa::new(block)).level.load(Relaxed);
        }
        pool.free_pages
    }

    /// Gives every block back to the host: for the end of the VM, when no page is in use. Returns the pages that
    /// somebody lost.
    pub(crate) fn release_all(&self) -> u64 {
        let mut lost = 0;
        loop {
            let block = {
                let mut pool = self.arena.pool.lock();
                let block = pool.first;
                if block == 0 {
                    pool.free_pages = 0;
                    return lost;
                }
                self.unlink(&mut pool, block);
                block
            };
            lost += BLOCK_TABLES - self.record(Hpa::new(block)).generation.load(Relaxed);
            self.arena.blocks.fetch_sub(1, Relaxed);
            self.host.free_tables(Hpa::new(block), BLOCK_ORDER);
        }
    }
}

impl<H: Host> Records for Tables<'_, H> {
    fn next(&self, page: Hpa) -> &AtomicU64 {
        &self.record(page).next
    }
    fn generation(&self, page: Hpa) -> &AtomicU64 {
        &self.record(page).generation
    }
}

impl<H> fmt::Debug for Arena<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arena")
            .field("limit", &self.limit)
            .field("bytes", &self.blocks)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::QuietHost;
    use std::collections::BTreeSet;
    use std::vec::Vec;

    #[test]
    fn pages_are_distinct_and_blocks_go_back() {
        let host = QuietHost::new();
        let arena = Arena::new(1 << 30, 7, false);
        let tables = Tables { arena: &arena, host: &host };
        let pages: Vec<FreePage> = (0..200).map(|_| tables.alloc().expect("memory")).collect();
        let distinct: BTreeSet<u64> = pages.iter().map(|p| p.at().raw()).collect();
        assert_eq!(distinct.len(), 200);
        assert_eq!(arena.bytes(), 4 * BLOCK_BYTES);
        assert!(pages.iter().all(|p| tables.owns(p.at())));
        for page in pages {
            tables.free(page);
        }
        let mut blocks = 0;
        let free = tables.count_free(|_| blocks += 1);
        assert!(blocks <= 2 && free == blocks * BLOCK_TABLES, "{blocks} blocks with {free} free pages");
        assert_eq!(tables.release_all(), 0);
        assert_eq!((arena.bytes(), host.blocks_out()), (0, 0));
    }

    #[test]
    fn the_limit_is_an_error_that_names_it() {
        let host = QuietHost::new();
        let arena = Arena::new(BLOCK_BYTES, 7, false);
        let tables = Tables { arena: &arena, host: &host };
        let pages: Vec<FreePage> = (0..BLOCK_TABLES).map(|_| tables.alloc().expect("memory")).collect();
        let error = tables.alloc().expect_err("the limit");
        assert_eq!(error, Error::MemoryLimit { limit: BLOCK_BYTES, used: BLOCK_BYTES });
        for page in pages {
            tables.free(page);
        }
        let again = tables.alloc().expect("a page was freed");
        tables.free(again);
        assert_eq!(tables.release_all(), 0);
        assert_eq!(host.blocks_out(), 0);
    }
}
