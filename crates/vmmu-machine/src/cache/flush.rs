//! Removal: by tag, and by address within tags. Which instruction removes what is `processor`'s matter.
//!
//! Invariant: nothing is removed that was not asked for.

use super::store::{Caches, ItemId};
use super::{PhysicalTag, Tag};

impl Caches {
    fn remove_all(&mut self, ids: Vec<ItemId>) {
        for id in ids {
            self.remove(id);
        }
    }

    /// Everything of the tags that `wanted` accepts.
    pub(crate) fn clear(&mut self, wanted: impl Fn(Tag) -> bool) {
        for store in self.stores_where(wanted) {
            // From the end: then nothing has to move up.
            while let Some(&last) = self.store_mut(store).pages.last() {
                self.remove(last);
            }
            while let Some(&last) = self.store_mut(store).tables.last() {
                self.remove(last);
            }
        }
    }

    /// The translations of `at`, and of all the page that `at` was found in, under the tags that `wanted`
    /// accepts.
    pub(crate) fn clear_page(&mut self, at: u64, wanted: impl Fn(Tag) -> bool) {
        for store in self.stores_where(wanted) {
            let ids = self.pages_and_pieces(store, at);
            self.remove_all(ids);
        }
    }

    /// The paging-structure entries that would be used for `at`, under the tags that `wanted` accepts.
    pub(crate) fn clear_path(&mut self, at: u64, wanted: impl Fn(Tag) -> bool) {
        for store in self.stores_where(wanted) {
            let ids = self.tables_on_path(store, at);
            self.remove_all(ids);
        }
    }

    /// All paging-structure entries under the tags that `wanted` accepts.
    pub(crate) fn clear_tables(&mut self, wanted: impl Fn(Tag) -> bool) {
        for store in self.stores_where(wanted) {
            while let Some(&last) = self.store_mut(store).tables.last() {
                self.remove(last);
            }
        }
    }

    /// What a guest-physical fault removes of its own address: translations and the way to them.
    pub(crate) fn clear_physical(&mut self, gpa: u64, tag: PhysicalTag) {
        let wanted = |other| other == Tag::Physical(tag);
        self.clear_page(gpa, wanted);
        self.clear_path(gpa, wanted);
    }
}
