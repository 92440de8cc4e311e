//! Where mappings are held: one slab, a map by (tag, size, number), a list for each tag, an index by frame.
//!
//! Every operation costs what it touches: a lookup a few hashes, an insertion and a removal a few more, a
//! flush what it removes. Invariants: an item is in the slab, in its bucket, in its tag's list and in the
//! frame index, or in none of them; equal mappings of one tag are held once, with the older provenance.

use super::{Held, Mapping, Page, Table, Tag};
use crate::addr::{PageSize, Pfn};
use crate::hash::Map;
use crate::provenance::Provenance;
use std::sync::Arc;

/// A held mapping's place in the slab.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct ItemId(u32);

/// A tag's place in the list of tags.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct StoreId(u32);

/// What numbers of one map mean: pages of a size, or what tables cover.
type Class = u8;
const CLASSES: usize = 9;
const FIRST_TABLE_CLASS: Class = PageSize::ALL.len() as Class;
/// What cached tables cover, as shifts: 9 bits a level, and 22 of 32-bit paging.
const TABLE_SHIFTS: [u32; CLASSES - PageSize::ALL.len()] = [21, 22, 30, 39, 48];

const fn page_class(size: PageSize) -> Class {
    size as Class
}

fn table_class(shift: u32) -> Class {
    let place = TABLE_SHIFTS.iter().position(|&s| s == shift);
    FIRST_TABLE_CLASS + place.expect("tables cover 2 MiB to 256 TiB") as Class
}

const fn class_shift(class: Class) -> u32 {
    if class < FIRST_TABLE_CLASS {
        PageSize::ALL[class as usize].shift()
    } else {
        TABLE_SHIFTS[(class - FIRST_TABLE_CLASS) as usize]
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Key {
    store: StoreId,
    class: Class,
    number: u64,
}

impl Key {
    fn of(store: StoreId, mapping: &Mapping) -> Self {
        let (class, at) = match mapping {
            Mapping::Page(page) => (page_class(page.size), page.at),
            Mapping::Table(table) => (table_class(table.shift), table.at),
        };
        Self { store, class, number: at >> class_shift(class) }
    }
}

#[derive(Debug)]
struct Item {
    held: Held,
    store: StoreId,
    /// Its place in the tag's list of pages or of tables.
    place: usize,
}

/// What one tag holds.
#[derive(Debug)]
pub(super) struct Store {
    pub(super) tag: Tag,
    pub(super) pages: Vec<ItemId>,
    pub(super) tables: Vec<ItemId>,
    /// Items of each class: what is zero need not be looked up.
    count: [u32; CLASSES],
}

/// Everything that one processor holds.
#[derive(Debug, Default)]
pub(crate) struct Caches {
    items: Vec<Option<Item>>,
    free: Vec<ItemId>,
    buckets: Map<Key, Vec<ItemId>>,
    /// The pieces of a large page, by the page's own size and number.
    pieces: Map<Key, Vec<ItemId>>,
    /// By (class, frame number): pages by their size, tables as 4 KiB.
    frames: Map<(Class, u64), Vec<ItemId>>,
    pub(super) stores: Vec<Store>,
    tags: Map<Tag, StoreId>,
}

const TABLE_FRAMES: Class = FIRST_TABLE_CLASS;

fn frame_key(mapping: &Mapping) -> (Class, u64) {
    match mapping {
        Mapping::Page(page) => (page_class(page.size), page.frame.raw() >> page.size.shift()),
        Mapping::Table(table) => (TABLE_FRAMES, table.table.raw() >> 12),
    }
}

fn piece_key(store: StoreId, mapping: &Mapping) -> Option<Key> {
    match mapping {
        Mapping::Page(page) if page.origin > page.size => {
            let class = page_class(page.origin);
            Some(Key { store, class, number: page.at >> class_shift(class) })
        }
        _ => None,
    }
}

fn take_out<K: std::hash::Hash + Eq>(map: &mut Map<K, Vec<ItemId>>, key: K, id: ItemId) {
    if let std::collections::hash_map::Entry::Occupied(mut entry) = map.entry(key) {
        entry.get_mut().retain(|&other| other != id);
        if entry.get().is_empty() {
            entry.remove();
        }
    }
}

impl Caches {
    fn item(&self, id: ItemId) -> &Item {
        self.items[id.0 as usize].as_ref().expect("an id is used while its item is held")
    }

    /// The mapping behind `id`, which is held.
    pub(crate) fn held(&self, id: ItemId) -> &Held {
        &self.item(id).held
    }

    /// The tag's list, if it ever had one.
    pub(crate) fn store(&self, tag: Tag) -> Option<StoreId> {
        self.tags.get(&tag).copied()
    }

    /// Everything held, in no particular but a repeatable order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Held> {
        self.items.iter().flatten().map(|item| &item.held)
    }

    /// Everything held under `tag`.
    pub(crate) fn of_tag(&self, tag: Tag) -> impl Iterator<Item = &Held> {
        let store = self.store(tag).map(|id| &self.stores[id.0 as usize]);
        store.into_iter().flat_map(|s| s.pages.iter().chain(&s.tables)).map(|&id| self.held(id))
    }

    /// Everything that leads to `pfn`: translations of a page that holds it, and tables in it.
    pub(crate) fn of_frame(&self, pfn: Pfn) -> impl Iterator<Item = &Held> {
        let at = pfn.hpa().raw();
        let pages = PageSize::ALL.iter().map(move |&size| (page_class(size), at >> size.shift()));
        let keys = pages.chain([(TABLE_FRAMES, pfn.raw())]);
        keys.filter_map(|key| self.frames.get(&key)).flatten().map(|&id| self.held(id))
    }

    fn bucket(&self, store: Option<StoreId>, class: Class, at: u64) -> &[ItemId] {
        let Some(store) = store else { return &[] };
        if self.stores[store.0 as usize].count[class as usize] == 0 {
            return &[];
        }
        let key = Key { store, class, number: at >> class_shift(class) };
        self.buckets.get(&key).map_or(&[], |bucket| bucket)
    }

    /// The translations of `at` under the tag.
    pub(crate) fn pages(&self, store: Option<StoreId>, at: u64) -> impl Iterator<Item = (ItemId, &Page)> {
        let classes = 0..PageSize::ALL.len() as Class;
        classes.flat_map(move |class| self.bucket(store, class, at)).filter_map(|&id| {
            match &self.held(id).mapping {
                Mapping::Page(page) => Some((id, page)),
                Mapping::Table(_) => None,
            }
        })
    }

    /// The cached tables for `at` that cover `1 << shift` bytes.
    pub(crate) fn tables(
        &self,
        store: Option<StoreId>,
        shift: u32,
        at: u64,
    ) -> impl Iterator<Item = (ItemId, &Table)> {
        self.bucket(store, table_class(shift), at).iter().filter_map(|&id| match &self.held(id).mapping {
            Mapping::Table(table) => Some((id, table)),
            Mapping::Page(_) => None,
        })
    }

    /// The cached tables of every size for `at`.
    pub(super) fn tables_on_path(&self, store: StoreId, at: u64) -> Vec<ItemId> {
        let classes = FIRST_TABLE_CLASS..CLASSES as Class;
        classes.flat_map(|class| self.bucket(Some(store), class, at)).copied().collect()
    }

    /// The translations of `at`, and all pieces of the large pages that `at` is known to lie in.
    pub(super) fn pages_and_pieces(&self, store: StoreId, at: u64) -> Vec<ItemId> {
        let mut out: Vec<ItemId> = self.pages(Some(store), at).map(|(id, _)| id).collect();
        if self.pieces.is_empty() {
            return out;
        }
        for origin in PageSize::ALL {
            let class = page_class(origin);
            let key = Key { store, class, number: at >> class_shift(class) };
            out.extend(self.pieces.get(&key).into_iter().flatten());
        }
        out.sort_unstable_by_key(|id| id.0);
        out.dedup();
        out
    }

    /// Holds `mapping` under `tag`, unless it does already.
    pub(crate) fn insert(&mut self, tag: Tag, mapping: Mapping, provenance: &Arc<Provenance>) {
        let next = StoreId(self.stores.len() as u32);
        let store = *self.tags.entry(tag).or_insert(next);
        if store == next {
            self.stores.push(Store { tag, pages: Vec::new(), tables: Vec::new(), count: [0; CLASSES] });
        }
        let key = Key::of(store, &mapping);
        let bucket = self.buckets.entry(key).or_default();
        let same =
            |id: &ItemId| self.items[id.0 as usize].as_ref().is_some_and(|item| item.held.mapping == mapping);
        if bucket.iter().any(same) {
            return;
        }
        let id = self.free.pop().unwrap_or_else(|| {
            self.items.push(None);
            ItemId(self.items.len() as u32 - 1)
        });
        bucket.push(id);
        self.frames.entry(frame_key(&mapping)).or_default().push(id);
        if let Some(key) = piece_key(store, &mapping) {
            self.pieces.entry(key).or_default().push(id);
        }
        let of_tag = &mut self.stores[store.0 as usize];
        of_tag.count[key.class as usize] += 1;
        let list = match mapping {
            Mapping::Page(_) => &mut of_tag.pages,
            Mapping::Table(_) => &mut of_tag.tables,
        };
        list.push(id);
        let place = list.len() - 1;
        let held = Held { tag, mapping, provenance: Arc::clone(provenance) };
        self.items[id.0 as usize] = Some(Item { held, store, place });
    }

    /// Forgets one mapping, which is held.
    pub(super) fn remove(&mut self, id: ItemId) {
        let item = self.items[id.0 as usize].take().expect("an id is used while its item is held");
        self.free.push(id);
        let mapping = &item.held.mapping;
        let key = Key::of(item.store, mapping);
        take_out(&mut self.buckets, key, id);
        take_out(&mut self.frames, frame_key(mapping), id);
        if let Some(key) = piece_key(item.store, mapping) {
            take_out(&mut self.pieces, key, id);
        }
        let of_tag = &mut self.stores[item.store.0 as usize];
        of_tag.count[key.class as usize] -= 1;
        let list = match mapping {
            Mapping::Page(_) => &mut of_tag.pages,
            Mapping::Table(_) => &mut of_tag.tables,
        };
        list.swap_remove(item.place);
        if let Some(&moved) = list.get(item.place)
            && let Some(moved) = &mut self.items[moved.0 as usize]
        {
            moved.place = item.place;
        }
    }

    /// The ids of stores whose tag `wanted` accepts and that hold anything.
    pub(super) fn stores_where(&self, wanted: impl Fn(Tag) -> bool) -> Vec<StoreId> {
        (0..)
            .zip(&self.stores)
            .filter(|(_, store)| !(store.pages.is_empty() && store.tables.is_empty()) && wanted(store.tag))
            .map(|(id, _)| StoreId(id))
            .collect()
    }

    pub(super) fn store_mut(&mut self, id: StoreId) -> &mut Store {
        &mut self.stores[id.0 as usize]
    }

    /// How much is held: translations and tables.
    pub(crate) fn len(&self) -> usize {
        self.items.len() - self.free.len()
    }
}
