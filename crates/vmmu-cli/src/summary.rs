//! What a simulation came to, for people and for programs.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;
use vmmu_sim::{Accesses, Coverage, Ended, Group, Item};

/// Sums over histories.
#[derive(Default)]
pub(crate) struct Totals {
    /// Histories.
    pub(crate) seeds: u64,
    steps: u64,
    accesses: Accesses,
    coverage: Coverage,
    /// The library's counters; those that say how much there is now, as their maximum.
    counters: BTreeMap<&'static str, u64>,
}

/// Guest accesses that must reach memory where there is a floor, in per cent.
const LEAST_HITS: u64 = 50;

/// Something that happened too rarely.
pub(crate) struct Below {
    pub(crate) what: String,
    pub(crate) count: u64,
    pub(crate) least: u64,
}

/// Statistics that say how much there is, not how often something happened.
const LEVELS: [&str; 10] = [
    "table_bytes",
    "table_pages",
    "table_pages_cached",
    "table_pages_retired",
    "roots",
    "invalidations_open",
    "invalidation_age",
    "entry_age",
    "pages_4k",
    "pages_2m",
];

impl Totals {
    pub(crate) fn add(&mut self, ended: &Ended) {
        self.seeds += 1;
        self.steps += ended.steps;
        self.accesses = self.accesses + ended.accesses;
        self.coverage.add(&ended.coverage);
        for (name, value) in ended.stats.iter() {
            let total = self.counters.entry(name).or_default();
            *total = if LEVELS.contains(&name) { value.max(*total) } else { *total + value };
        }
    }

    /// Steps a second.
    fn rate(&self, elapsed: Duration) -> u128 {
        u128::from(self.steps) * 1000 / elapsed.as_millis().max(1)
    }

    /// Guest accesses that reached memory, in per cent.
    fn hits(&self) -> u64 {
        self.accesses.translated * 100 / (self.accesses.translated + self.accesses.faulted).max(1)
    }

    /// One line while it works.
    pub(crate) fn line(&self, elapsed: Duration) -> String {
        format!("{} seeds, {} steps, {} a second", self.seeds, self.steps, self.rate(elapsed))
    }

    /// What is below a floor: for each thing its name, its count and the least that it must have.
    pub(crate) fn below(&self, floor: u64) -> Vec<Below> {
        let items = Item::all().filter(|item| item.out_of_reach().is_none()).map(|item| Below {
            what: format!("{}: {}", item.group().name(), item.name()),
            count: item.count(&self.coverage),
            least: item.floor(floor),
        });
        let hits = Below {
            what: "guest accesses that reach memory, in per cent".to_owned(),
            count: self.hits(),
            least: if floor == 0 { 0 } else { LEAST_HITS },
        };
        items.chain([hits]).filter(|below| below.count < below.least).collect()
    }

    fn counter(&self, name: &str) -> u64 {
        self.counters.get(name).copied().unwrap_or(0)
    }
}

/// The summary that people read.
pub(crate) fn table(totals: &Totals, elapsed: Duration) -> String {
    let Accesses { translated, faulted, resumed, devices, read_only, refused, software, fetched } =
        totals.accesses;
    let mut text = String::new();
    let mut row = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:<22}{value}");
    };
    row("histories", format!("{}", totals.seeds));
    row(
        "steps",
        format!("{}, {} a second in {:.1} s", totals.steps, totals.rate(elapsed), elapsed.as_secs_f64()),
    );
    row("guest accesses", format!("{translated} reached memory ({} %), {faulted} faulted", totals.hits()));
    row(
        "faults came to",
        format!("{resumed} resumed, {devices} device, {read_only} read-only, {refused} refused"),
    );
    row("software", format!("{software} reads and writes, {fetched} fetches"));
    let count = |name| totals.counter(name);
    row("pages mapped", format!("{} of 4 KiB, {} of 2 MiB", count("pf_fixed_4k"), count("pf_fixed_2m")));
    row("tables zapped", count("mmu_shadow_zapped").to_string());
    row(
        "flushes",
        format!("{} shootdowns, {} at entry", count("remote_tlb_flush_requests"), count("tlb_flush")),
    );
    text
}

/// How often each thing happened, for people: group by group.
pub(crate) fn coverage(totals: &Totals, floor: Option<u64>) -> String {
    let mut text = String::new();
    for group in Group::ALL {
        let _ = writeln!(text, "\n{}", console::style(group.name()).bold());
        for item in Item::all().filter(|item| item.group() == group) {
            let count = item.count(&totals.coverage);
            let line = format!("  {count:>12}  {}", item.name());
            let _ = match item.out_of_reach() {
                Some(why) => {
                    writeln!(text, "{}", console::style(format!("{line}: out of reach, {why}")).dim())
                }
                None if count < item.floor(floor.unwrap_or(1)) => {
                    writeln!(text, "{}", console::style(line).red())
                }
                None => writeln!(text, "{line}"),
            };
        }
    }
    text
}

/// The summary that programs read.
pub(crate) fn object(
    totals: &Totals,
    elapsed: Duration,
    floor: Option<u64>,
    failure: Option<(&str, &str)>,
) -> Value {
    let group = |group: Group| {
        let items = Item::all().filter(|item| item.group() == group);
        let counts = items.map(|item| (item.name(), json!(item.count(&totals.coverage))));
        (group.name().to_owned(), Value::Object(counts.collect()))
    };
    let below = totals.below(floor.unwrap_or(0)).into_iter();
    let Accesses { translated, faulted, resumed, devices, read_only, refused, software, fetched } =
        totals.accesses;
    json!({
        "seeds": totals.seeds,
        "steps": totals.steps,
        "seconds": elapsed.as_secs_f64(),
        "steps_per_second": u64::try_from(totals.rate(elapsed)).unwrap_or(u64::MAX),
        "accesses": {
            "translated": translated, "faulted": faulted, "hit_percent": totals.hits(),
            "resumed": resumed, "devices": devices, "read_only": read_only,
            "refused": refused, "software": software, "fetched": fetched,
        },
        "coverage": Value::Object(Group::ALL.map(group).into_iter().collect()),
        "out_of_reach": Value::Object(
            Item::all().filter_map(|item| Some((item.name(), json!(item.out_of_reach()?)))).collect()
        ),
        "floor": floor,
        "below_floor": below.map(|b| json!({ "what": b.what, "count": b.count, "least": b.least })).collect::<Value>(),
        "statistics": totals.counters,
        "violation": failure.map(|(story, replay)| json!({ "story": story, "replay": replay })),
    })
}
