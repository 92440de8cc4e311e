//! What the runs came to: a line for each walker, and one for each quirk that excused a walk.
//!
//! Pure.

use super::Compared;
use crate::screen::{self, Side};
use crate::units;
use serde_json::Value;

/// The tables, for people.
pub(crate) fn table(runs: &[Compared]) -> String {
    let heads = ["walker", "processor", "walks", "reached memory", "agreed", "excused", "disagreed"];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    let mut excuses: Vec<(String, u64, String)> = Vec::new();
    for run in runs {
        for (walker, tally) in run.object["walkers"].as_object().into_iter().flatten() {
            let number = |name: &str| units::count(tally[name].as_u64().unwrap_or(0));
            let mut row = vec![walker.clone(), run.plan.cpu.to_owned()];
            row.extend(["walks", "reached", "agreed", "excused", "disagreed"].map(number));
            rows.push(row);
            for (quirk, count) in tally["excused_by"].as_object().into_iter().flatten() {
                let count = count.as_u64().unwrap_or(0);
                match excuses.iter_mut().find(|excuse| excuse.0 == *quirk) {
                    Some(excuse) => excuse.1 += count,
                    None => excuses.push((quirk.clone(), count, section(&run.object, quirk))),
                }
            }
        }
    }
    let sides = [&[Side::Left; 2][..], &[Side::Right; 5]].concat();
    let mut text = screen::table(&sides, &rows);
    if !excuses.is_empty() {
        let head = ["excused by", "walks", "against"].map(str::to_owned).to_vec();
        let row = |(quirk, count, section): (String, u64, String)| vec![quirk, units::count(count), section];
        let rows: Vec<_> = std::iter::once(head).chain(excuses.into_iter().map(row)).collect();
        text += "\n";
        text += &screen::table(&[Side::Left, Side::Right, Side::Left], &rows);
    }
    text
}

fn section(object: &Value, quirk: &str) -> String {
    object["quirks"][quirk].as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::super::engine::Engine;
    use super::*;
    use serde_json::json;
    use std::time::Duration;

    #[test]
    fn walkers_and_quirks_have_a_line_each() {
        let object = json!({
            "walkers": { "PAE": {
                "walks": 1000, "reached": 500, "agreed": 990, "excused": 10, "disagreed": 0,
                "excused_by": { "a_quirk": 10 },
            } },
            "quirks": { "a_quirk": "a section" },
        });
        let plan = &Engine::Qemu.plans()[0];
        let run = || Compared { plan, object: object.clone(), time: Duration::from_secs(1) };
        let text = table(&[run(), run()]);
        assert!(
            text.contains("PAE     max        1,000             500     990       10          0\n"),
            "{text}"
        );
        assert!(text.contains("a_quirk        20  a section\n"), "{text}");
    }
}
