//! A vCPU's prepared table pages: taken from the arena and filled before any lock, so that nothing allocates
//! under one (T71, T72).
//!
//! Invariant: every page in the cache is full of empty entries.

use super::arena::{FreePage, Tables};
use crate::arch::entry::Format;
use crate::error::Error;
use crate::host::Host;
use arrayvec::ArrayVec;

/// Pages a cache can hold.
const CAPACITY: usize = 8;
/// The most that one fault can need: a table at each level below a 5-level root.
pub(crate) const NEEDED: usize = 4;

/// A page full of empty entries that nobody else can reach.
#[must_use]
#[derive(Debug)]
pub(crate) struct PreparedPage(FreePage);

impl PreparedPage {
    /// Fills a page with empty entries.
    pub(crate) fn new<H: Host, F: Format>(tables: &Tables<'_, H>, format: &F, page: FreePage) -> Self {
        let empty = format.empty();
        tables.fill_with(&page, |_| empty);
        Self(page)
    }
    /// Hands the page over to whoever links it, or has written to it.
    pub(crate) fn into_inner(self) -> FreePage {
        self.0
    }
    pub(crate) fn page(&self) -> &FreePage {
        &self.0
    }
}

/// The cache.
#[derive(Debug, Default)]
pub(crate) struct Cache {
    pages: ArrayVec<PreparedPage, CAPACITY>,
}

impl Cache {
    /// Pages in the cache.
    pub(crate) fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether any fault can be served without more.
    #[inline(always)]
    pub(crate) fn suffices(&self) -> bool {
        self.pages.len() >= NEEDED
    }

    /// Fills the cache up to what one fault can need, and beyond it with pages that are free already. Called with
    /// nothing held.
    pub(crate) fn top_up<H: Host, F: Format>(
        &mut self,
        tables: &Tables<'_, H>,
        format: &F,
    ) -> Result<(), Error> {
        while !self.suffices() {
            self.pages.push(PreparedPage::new(tables, format, tables.alloc()?));
        }
        while !self.pages.is_full()
            && let Some(page) = tables.alloc_free()
        {
            self.pages.push(PreparedPage::new(tables, format, page));
        }
        Ok(())
    }

    /// A prepared page; there is one while no fault took more than [`NEEDED`].
    #[inline]
    pub(crate) fn take(&mut self) -> Option<PreparedPage> {
        self.pages.pop()
    }

    /// Puts back a page that was not linked and not written to.
    #[inline]
    pub(crate) fn put_back(&mut self, page: PreparedPage) {
        // There is room: it came from here.
        self.pages.push(page);
    }

    /// Gives every page back to the arena.
    pub(crate) fn release<H: Host>(&mut self, tables: &Tables<'_, H>) {
        self.pages.drain(..).for_each(|page| tables.free(page.into_inner()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Npt;
    use crate::table::arena::{Arena, BLOCK_BYTES};
    use crate::testing::QuietHost;

    #[test]
    fn pages_are_full_of_empty_entries() {
        let host = QuietHost::new();
        let arena = Arena::new(BLOCK_BYTES, 1, false);
        let tables = Tables { arena: &arena, host: &host };
        let format = Npt::new(false, 40).expect("legal");
        let mut cache = Cache::default();
        cache.top_up(&tables, &format).expect("memory");
        assert!(cache.suffices());
        let page = cache.take().expect("a page");
        assert!(tables.page_unchecked(page.page().at()).entries().all(|e| e.load() == format.empty()));
        cache.put_back(page);
        cache.release(&tables);
        assert_eq!(tables.release_all(), 0);
        assert_eq!(host.blocks_out(), 0);
    }
}
