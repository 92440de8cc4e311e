//! What is said at the end of a run, for people, on standard error.

use super::Report;
use super::options::Options;
use super::outcome::Outcome;
use super::record::{Churn, Exit, Record};
use crate::screen::{self, Side};
use crate::units::{count, duration, size};
use console::style;

/// Prints the summary.
pub(crate) fn print(report: &Report, options: &Options) {
    let text = report.outcome.to_string();
    let (head, rest) = text.split_once(':').unwrap_or((&text, ""));
    let head = if report.outcome.is_success() { style(head).green() } else { style(head).red() };
    screen::say(format_args!("\n{}:{rest}\n", head.bold().for_stderr()));

    let mut rows = vec![("time", times(report))];
    if let Some(record) = &report.record {
        rows.extend(figures(record, options.icount));
    }
    rows.push(("logs", report.folder.display().to_string()));
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, value) in rows {
        screen::say(format_args!("  {}  {value}", style(format!("{name:width$}")).cyan().for_stderr()));
    }
    if matches!(
        report.outcome,
        Outcome::Value(_) | Outcome::NotSeen(_) | Outcome::Seen(_) | Outcome::Slow(..)
    ) {
        // The guest has ended as it wanted to: where it stood then is of no interest.
        return;
    }
    if let Some(registers) = &report.registers {
        screen::say(format_args!("\n{registers}"));
    } else if let Some(record) = &report.record {
        let registers: Vec<String> =
            record.registers().iter().map(|(name, value)| format!("{name}={value}")).collect();
        if !registers.is_empty() {
            screen::say(format_args!("\nguest, at its last exit:\n{}", wrap(&registers, 100)));
        }
    }
    if !report.last_exits.is_empty() {
        screen::say(format_args!("\nlast exits, oldest first:\n{}", exits_table(&report.last_exits)));
    }
}

fn times(report: &Report) -> String {
    let end = duration(report.wall);
    match report.user_space {
        Some(time) => format!("user space after {}, end after {end}", duration(time)),
        None => format!("end after {end}"),
    }
}

/// The record's figures, as far as they are there.
fn figures(record: &Record, icount: bool) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    if let Some(total) = record.number(&["exits_total"]) {
        rows.push(("exits", format!("{}{}", count(total), listing(&record.ranking("exits")))));
    }
    if let Some(churn) = Churn::of(record) {
        rows.push(("churn", moves(&churn)));
    }
    let stat = |name| record.number(&["stats", name]);
    if let Some(taken) = stat("pf_taken") {
        let sizes = [("pf_fixed_4k", "of 4 KiB"), ("pf_fixed_2m", "of 2 MiB"), ("pf_fixed_1g", "of 1 GiB")];
        let others = [("pf_mmio_hit", "on devices"), ("pf_spurious", "spurious"), ("pf_retry", "retried")];
        let parts: Vec<_> = sizes
            .iter()
            .chain(others.iter())
            .filter_map(|&(name, words)| Some((words, stat(name)?)))
            .filter(|&(_, number)| number > 0)
            .map(|(words, number)| format!("{} {words}", count(number)))
            .collect();
        let parts = if parts.is_empty() { String::new() } else { format!(": {}", parts.join(", ")) };
        rows.push(("faults", format!("{}{parts}", count(taken))));
    }
    if let (Some(pages), Some(bytes)) = (stat("table_pages"), stat("table_bytes")) {
        rows.push(("tables", format!("{} pages, {} taken from the machine", count(pages), size(bytes))));
    }
    if let (Some(moved), Some(in_place)) =
        (record.number(&["ram", "frames_moved"]), record.number(&["ram", "frames_in_place"]))
    {
        let place = if in_place == 0 { "none".to_owned() } else { count(in_place) };
        rows.push(("frames", format!("{} with pfn ≠ gfn, {place} with pfn = gfn", count(moved))));
    }
    match record.audit_is_clean() {
        Some(true) => {
            let part = |name, words: &str| {
                let number = record.number(&["audit", name])?;
                // The singular of the first two, where it is due.
                let words = if number == 1 { words.strip_suffix("(s)") } else { None }.unwrap_or(words);
                Some(format!("{} {}", count(number), words.replace("(s)", "s")))
            };
            let parts = [
                part("roots", "root(s)"),
                part("tables", "table(s)"),
                part("leaves_4k", "leaves of 4 KiB"),
                part("leaves_2m", "of 2 MiB"),
                part("leaves_1g", "of 1 GiB"),
                part("mmio", "for devices"),
            ];
            let parts: Vec<_> = parts.into_iter().flatten().collect();
            rows.push(("audit", format!("clean: {}", parts.join(", "))));
        }
        Some(false) => {
            let text = record.text(&["audit", "text"]).unwrap_or("no reason given");
            rows.push(("audit", style(format!("VIOLATED: {text}")).red().bold().for_stderr().to_string()));
        }
        None => {}
    }
    if let (Some(inside), Some(outside)) = (record.number(&["tsc_guest"]), record.number(&["tsc_hypervisor"]))
    {
        rows.push(("hypervisor", share(outside, inside, icount)));
    }
    rows
}

/// What became of the rate at which pages were to move.
fn moves(churn: &Churn) -> String {
    let rate = format!("{} of {} moves a second", count(churn.reached), count(churn.wanted));
    let rate = if churn.kept_its_rate() {
        rate
    } else {
        style(format!("SHORT OF ITS RATE: {rate}")).red().bold().for_stderr().to_string()
    };
    let whole = if churn.blocks == 1 { "block whole" } else { "blocks whole" };
    let blocks = [(churn.blocks, whole), (churn.broken_up, "broken up"), (churn.mistakes, "WRONGLY")];
    let mut parts = vec![format!("{} pages", count(churn.pages))];
    parts.extend(blocks.iter().filter(|part| part.0 > 0).map(|part| format!("{} {}", count(part.0), part.1)));
    format!("{rate}; {} in all: {}", count(churn.moves), parts.join(", "))
}

/// The hypervisor's share of the processor. Under `--icount` the clock counts instructions.
fn share(hypervisor: u64, guest: u64, icount: bool) -> String {
    let unit = if icount { "instructions" } else { "ticks of the clock (--icount counts instructions)" };
    // Per mille of at most 100 %: the product stays far below 2^128.
    let total = u128::from(hypervisor) + u128::from(guest);
    let per_mille = u128::from(hypervisor) * 1000 / total.max(1);
    let (percent, tenth) = (per_mille / 10, per_mille % 10);
    let total = u64::try_from(total).unwrap_or(u64::MAX);
    format!("{} of {} {unit}, {percent}.{tenth} %", count(hypervisor), count(total))
}

fn listing(numbers: &[(&str, u64)]) -> String {
    let parts: Vec<_> = numbers
        .iter()
        .map(|(name, number)| format!("{} {}", name.replace('_', " "), count(*number)))
        .collect();
    if parts.is_empty() { String::new() } else { format!(": {}", parts.join(", ")) }
}

fn exits_table(exits: &[Exit]) -> String {
    let mut rows = vec![["exit", "rip", "information", ""].map(str::to_owned).to_vec()];
    for exit in exits {
        let [first, second] = exit.info.clone();
        rows.push(vec![exit.name.clone(), exit.rip.clone(), first, second]);
    }
    screen::table(&[Side::Left, Side::Right, Side::Right, Side::Right], &rows)
}

/// Joins words with spaces into lines of at most `width` characters.
fn wrap(words: &[String], width: usize) -> String {
    let mut lines: Vec<String> = Vec::new();
    for word in words {
        match lines.last_mut() {
            Some(line) if line.len() + 1 + word.len() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.clone()),
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(rows: &[(&'static str, String)], name: &str) -> Option<String> {
        rows.iter().find(|row| row.0 == name).map(|row| row.1.clone())
    }

    #[test]
    fn the_record_becomes_lines() {
        let record = Record::new(json!({
            "exits_total": 1234, "exits": { "nested_fault": 1000, "port": 234 },
            "stats": { "pf_taken": 1000, "pf_fixed_4k": 900, "pf_fixed_2m": 100, "table_pages": 9, "table_bytes": 131_072 },
            "ram": { "frames_moved": 52_100, "frames_in_place": 0 },
            "audit": { "clean": true, "roots": 1, "tables": 9 },
            "churn": {
                "wanted": 2000, "reached": 1999, "moves": 12_000, "pages": 17_110, "blocks": 10, "broken_up": 9,
                "mistakes": 0,
            },
            "tsc_guest": 9_000, "tsc_hypervisor": 1_000,
        }));
        let rows = figures(&record, true);
        assert_eq!(row(&rows, "exits").unwrap(), "1,234: nested fault 1,000, port 234");
        assert_eq!(row(&rows, "faults").unwrap(), "1,000: 900 of 4 KiB, 100 of 2 MiB");
        assert_eq!(row(&rows, "tables").unwrap(), "9 pages, 128 KiB taken from the machine");
        assert_eq!(row(&rows, "frames").unwrap(), "52,100 with pfn ≠ gfn, none with pfn = gfn");
        assert_eq!(row(&rows, "audit").unwrap(), "clean: 1 root, 9 tables");
        assert_eq!(
            row(&rows, "churn").unwrap(),
            "1,999 of 2,000 moves a second; 12,000 in all: 17,110 pages, 10 blocks whole, 9 broken up"
        );
        assert_eq!(row(&rows, "hypervisor").unwrap(), "1,000 of 10,000 instructions, 10.0 %");
    }

    #[test]
    fn a_broken_audit_cannot_be_overlooked() {
        let rows = figures(&Record::new(json!({ "audit": { "clean": false, "text": "leaf" } })), false);
        assert!(row(&rows, "audit").unwrap().contains("VIOLATED: leaf"));
    }

    #[test]
    fn a_record_written_in_distress_has_no_figures() {
        assert!(figures(&Record::new(json!({ "end": "error" })), false).is_empty());
    }

    #[test]
    fn long_lists_are_wrapped() {
        let words = ["aaaa", "bbbb", "cccc"].map(str::to_owned);
        assert_eq!(wrap(&words, 9), "aaaa bbbb\ncccc");
        assert_eq!(wrap(&[], 9), "");
    }
}
