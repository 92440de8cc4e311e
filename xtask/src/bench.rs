//! `cargo xtask bench`: the payload's figures beside KVM's and the budgets.
//!
//! The payload measures from inside the guest; under `--icount` its unit is executed instructions, hypervisor
//! included, so a figure does not depend on the machine that runs the emulator.

use crate::artifacts;
use crate::boot::options::{Layout, Mode, Options};
use crate::boot::{self, Report};
use crate::host::folders;
use crate::host::programs::Consent;
use crate::screen::{self, Side};
use crate::units::parse_seconds;
use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand};
use console::style;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs;
use std::io::sink;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What can be measured.
#[derive(Subcommand, Clone, Debug)]
pub(crate) enum Bench {
    Payload(Payload),
}

/// Runs the benchmark payload as a guest and prints its figures beside KVM's and the budgets.
#[derive(Args, Clone, Debug)]
pub(crate) struct Payload {
    /// How guest memory is virtualised
    #[arg(long, value_enum, default_value_t = Mode::Npt)]
    pub(crate) mode: Mode,
    /// CPU model of the emulator; KVM's figures are for the default
    #[arg(long, value_name = "MODEL", default_value = "EPYC")]
    pub(crate) cpu: String,
    /// How the guest's memory lies in the machine's
    #[arg(long, value_enum, default_value_t = Layout::Scattered)]
    pub(crate) layout: Layout,
    /// Hypervisor image to measure [default: built from this tree]
    #[arg(long, value_name = "FILE")]
    pub(crate) image: Option<PathBuf>,
    /// More words for the hypervisor's command line
    #[arg(long, value_name = "WORDS", default_value = "", hide_default_value = true)]
    pub(crate) hypervisor: String,
    /// Run twice and demand identical results
    #[arg(long)]
    pub(crate) repeat: bool,
    /// Seconds after which a run is given up
    #[arg(long, value_name = "S", default_value = "900", value_parser = parse_seconds)]
    pub(crate) timeout: Duration,
    /// Print one JSON object instead of the table
    #[arg(long)]
    pub(crate) json: bool,
    /// Install missing packages without asking
    #[arg(long)]
    pub(crate) yes: bool,
}

/// Memory that the payload uses in full.
const MEMORY: u64 = 1152 << 20;
/// KVM's results.
const KVM_RESULTS: &str = "bench/kvm/results-6.12.tsv";
/// Lines of the payload that need a service this hypervisor does not offer yet begin with one of these.
const SERVICES_TO_COME: [&str; 4] = ["log_", "dirty_", "harvest_", "discard_"];

/// Runs the command and returns xtask's exit status.
pub(crate) fn command(bench: &Bench) -> Result<u8> {
    let Bench::Payload(payload) = bench;
    let report = run(payload)?;
    if !report.outcome.is_success() {
        screen::say(format_args!("{}; logs: {}", report.outcome, report.folder.display()));
        return Ok(report.outcome.status());
    }
    let rows = rows(payload.mode, &report.texts, &folders::root())?;
    let mut status = 0;
    let mut identical = None;
    if payload.repeat {
        let again = run(payload)?;
        identical = Some(again.texts == report.texts);
        if again.texts == report.texts {
            screen::note("the second run is identical");
        } else {
            let pairs = report.texts.iter().zip(&again.texts);
            let first = pairs
                .filter(|(one, other)| one != other)
                .map(|(one, other)| format!("{one} | {other}"))
                .next();
            screen::warn(format_args!(
                "the second run differs: {}",
                first.unwrap_or_else(|| "in length".into())
            ));
            status = 1;
        }
    }
    if payload.json {
        let object = serde_json::json!({
            "mode": payload.mode.word(), "cpu": payload.cpu, "emulator": report.emulator, "identical": identical,
            "lines": rows,
        });
        println!("{object}");
    } else {
        print!("{}", table(&rows));
    }
    Ok(status)
}

/// Boots the payload once.
pub(crate) fn run(payload: &Payload) -> Result<Report> {
    let options = Options {
        mode: payload.mode,
        guest: Some(artifacts::payload(Consent::new(payload.yes))?),
        memory: MEMORY,
        layout: payload.layout,
        cpu: payload.cpu.clone(),
        icount: true,
        image: payload.image.clone(),
        hypervisor: payload.hypervisor.clone(),
        timeout: payload.timeout,
        yes: payload.yes,
        ..Options::default()
    };
    screen::note("the payload runs");
    boot::run(&options, sink())
}

/// A figure: median, and mean; the median is 0 where only a total or mean was measured.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub(crate) struct Figure {
    /// Median.
    pub(crate) p50: u64,
    /// Mean, or total.
    pub(crate) mean: f64,
}

impl Figure {
    /// The figure to compare: the median where there is one.
    pub(crate) fn value(self) -> f64 {
        #[allow(clippy::cast_precision_loss)] // instruction counts of one operation
        if self.p50 == 0 { self.mean } else { self.p50 as f64 }
    }
}

/// One of the payload's lines with everything it is held against.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(crate) struct Row {
    /// The line's name.
    pub(crate) name: String,
    /// Our figure.
    pub(crate) ours: Figure,
    /// The better of KVM's engines for the mode.
    pub(crate) kvm: Option<Figure>,
    /// At most so much.
    pub(crate) budget: Option<f64>,
    /// Full fences on the path.
    pub(crate) fences: Option<u64>,
    /// Locked operations on the path.
    pub(crate) locked: Option<u64>,
}

/// The payload's lines in its order, each with KVM's figure, budget and ordering from the tables in `bench/`.
pub(crate) fn rows(mode: Mode, texts: &[String], root: &Path) -> Result<Vec<Row>> {
    let read =
        |file: &str| fs::read_to_string(root.join(file)).with_context(|| format!("cannot read {file}"));
    let kvm = kvm(&read(KVM_RESULTS)?, mode)?;
    let budgets = lookup(&read("bench/budgets.tsv")?, mode);
    let paths = lookup(&read("bench/paths.tsv")?, mode);
    let fences = fences(&read("crates/vmmu/fences.tsv")?)?;
    let figures = figures(texts.iter().map(String::as_str))?;
    ensure!(!figures.is_empty(), "the payload has printed no figures");
    let row = |(name, _, ours): (String, String, Figure)| {
        let budget = budgets.get(&name).and_then(|words| words.first()).map(|word| word.parse::<f64>());
        let budget = budget.transpose().with_context(|| format!("bench/budgets.tsv: {name}"))?;
        let path =
            paths.get(&name).and_then(|words| words.first()).map(|operations| cost(operations, &fences));
        let path = path.transpose().with_context(|| format!("bench/paths.tsv: {name}"))?;
        let (fences, locked) = (path.map(|path| path.0), path.map(|path| path.1));
        Ok(Row { kvm: kvm.get(&name).copied(), budget, fences, locked, name, ours })
    };
    figures.into_iter().map(row).collect()
}

/// The names of the lines that the payload must print in `mode`: KVM's, but for those that need a service to come.
pub(crate) fn expected_lines(mode: Mode, root: &Path) -> Result<Vec<String>> {
    let text =
        fs::read_to_string(root.join(KVM_RESULTS)).with_context(|| format!("cannot read {KVM_RESULTS}"))?;
    let names = kvm(&text, mode)?.into_keys();
    Ok(names.filter(|name| !SERVICES_TO_COME.iter().any(|start| name.starts_with(start))).collect())
}

/// Reads `name mode p50 mean count` lines; others are comments.
fn figures<'a>(lines: impl Iterator<Item = &'a str>) -> Result<Vec<(String, String, Figure)>> {
    let mut figures = Vec::new();
    for line in lines.filter(|line| !line.starts_with('#') && !line.trim().is_empty()) {
        let words: Vec<&str> = line.split('\t').collect();
        let &[name, mode, p50, mean, _] = &words[..] else { bail!("`{line}` is no line of results") };
        let wrong = || format!("`{line}` holds no figure");
        let figure = Figure {
            p50: p50.trim().parse().with_context(wrong)?,
            mean: mean.trim().parse().with_context(wrong)?,
        };
        figures.push((name.to_owned(), mode.to_owned(), figure));
    }
    Ok(figures)
}

/// KVM's better figure for each line in a mode.
fn kvm(results: &str, mode: Mode) -> Result<BTreeMap<String, Figure>> {
    let engines = match mode {
        Mode::Npt => ["npt", "npt-legacy"],
    };
    let mut best: BTreeMap<String, Figure> = BTreeMap::new();
    for (name, engine, figure) in figures(results.lines())? {
        if engines.contains(&engine.as_str()) {
            let known = best.entry(name).or_insert(figure);
            if figure.value() < known.value() {
                *known = figure;
            }
        }
    }
    Ok(best)
}

/// Reads `mode line word…` lines, `#` begins a comment: the words by line.
fn lookup(text: &str, mode: Mode) -> BTreeMap<String, Vec<String>> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let fields = lines.map(|line| line.split('\t').map(str::to_owned).collect::<Vec<_>>());
    fields
        .filter(|words| words.len() > 2 && words[0] == mode.word())
        .map(|words| (words[1].clone(), words[2..].to_vec()))
        .collect()
}

/// Reads `operation fences locked` lines.
fn fences(text: &str) -> Result<BTreeMap<String, (u64, u64)>> {
    let row = |line: &str| {
        let mut words = line.split('\t');
        let name = words.next()?.to_owned();
        Some((name, (words.next()?.parse().ok()?, words.next()?.parse().ok()?)))
    };
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    lines.map(|line| row(line).with_context(|| format!("`{line}` counts no fences"))).collect()
}

/// Fences and locked operations of a path: the sums over its operations.
fn cost(operations: &str, fences: &BTreeMap<String, (u64, u64)>) -> Result<(u64, u64)> {
    operations.split('+').try_fold((0, 0), |sum, name| {
        let found = fences.get(name).with_context(|| format!("nobody has counted the fences of `{name}`"))?;
        Ok((sum.0 + found.0, sum.1 + found.1))
    })
}

/// A number as short as it can be said.
fn number(value: f64) -> String {
    if value.fract().abs() < 0.05 || value >= 1000.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

/// The rows for people.
fn table(rows: &[Row]) -> String {
    let dash = || "—".to_owned();
    let heading = ["line", "p50", "mean", "KVM p50", "KVM mean", "KVM/ours", "budget", "fences", "locked"];
    let mut cells = vec![heading.map(str::to_owned).to_vec()];
    for row in rows {
        let p50 = |figure: Figure| if figure.p50 == 0 { dash() } else { figure.p50.to_string() };
        let budget = row.budget.map_or_else(dash, |budget| {
            let kept = row.ours.value() <= budget;
            let text = style(number(budget));
            if kept { text.green() } else { text.red() }.to_string()
        });
        let ratio = row.kvm.filter(|_| row.ours.value() > 0.0);
        cells.push(vec![
            row.name.clone(),
            p50(row.ours),
            number(row.ours.mean),
            row.kvm.map_or_else(dash, p50),
            row.kvm.map_or_else(dash, |kvm| number(kvm.mean)),
            ratio.map_or_else(dash, |kvm| format!("{:.1}", kvm.value() / row.ours.value())),
            budget,
            row.fences.map_or_else(dash, |number| number.to_string()),
            row.locked.map_or_else(dash, |number| number.to_string()),
        ]);
    }
    let mut sides = [Side::Right; 9];
    sides[0] = Side::Left;
    screen::table(&sides, &cells)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KVM: &str = "# no hypervisor\nx\tbare\t4\t4.0\t9\n# kernel\nx\tnpt\t900\t901.5\t9\ny\tnpt\t0\t7.5\t1\n\
                       x\tnpt-legacy\t908\t900.0\t9\ny\tnpt-legacy\t0\t3.5\t1\nx\tshadow\t1\t1.0\t9\n";

    #[test]
    fn kvm_is_the_better_of_its_engines_for_the_mode() {
        let best = kvm(KVM, Mode::Npt).unwrap();
        assert_eq!(best["x"], Figure { p50: 900, mean: 901.5 });
        assert_eq!(best["y"], Figure { p50: 0, mean: 3.5 });
    }

    #[test]
    fn tables_are_looked_up_by_mode_and_line() {
        let text = "# comment\nnpt\tx\t350\tnote\nshadow\tx\t7\n\nnpt\ty\t0.02\t\n";
        let found = lookup(text, Mode::Npt);
        assert_eq!(found["x"][0], "350");
        assert_eq!(found["y"][0], "0.02");
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn lines_that_are_no_results_are_errors() {
        assert!(figures(["x\tnpt\tfast\t1\t1"].into_iter()).is_err());
        assert!(figures(["x npt 1 1 1"].into_iter()).is_err());
        assert!(figures(["# end", ""].into_iter()).unwrap().is_empty());
    }

    #[test]
    fn the_committed_tables_can_be_read() {
        let texts = [
            "exit_hypercall\tvmmu-npt\t300\t301.0\t9".to_owned(),
            "new_line\tvmmu-npt\t1\t1.0\t9".to_owned(),
        ];
        let rows = rows(Mode::Npt, &texts, &folders::root()).unwrap();
        assert_eq!(rows[0].budget, Some(350.0));
        assert_eq!(rows[0].kvm.unwrap().p50, 3011);
        assert!(rows[1].kvm.is_none() && rows[1].budget.is_none());
        let text = console::strip_ansi_codes(&table(&rows)).into_owned();
        assert!(text.contains("exit_hypercall  300   301     3011"), "{text}");
        let names = expected_lines(Mode::Npt, &folders::root()).unwrap();
        assert!(
            names.iter().any(|name| name == "touch4k_fault")
                && !names.iter().any(|name| name == "dirty_fault")
        );
    }

    #[test]
    fn a_path_costs_what_its_operations_cost() {
        let fences = fences("# comment\na touch\t2\t1\nentry\t1\t0\n").unwrap();
        assert_eq!(cost("a touch+entry", &fences).unwrap(), (3, 1));
        assert!(cost("a touch+other", &fences).is_err());
        assert!(super::fences("a\tb\t1").is_err());
    }

    #[test]
    fn every_budget_is_a_number_and_its_line_exists() {
        let text = fs::read_to_string(folders::root().join("bench/budgets.tsv")).unwrap();
        let lines = kvm(&fs::read_to_string(folders::root().join(KVM_RESULTS)).unwrap(), Mode::Npt).unwrap();
        for (name, words) in lookup(&text, Mode::Npt) {
            assert!(words[0].parse::<f64>().is_ok_and(|budget| budget > 0.0), "{name}");
            assert!(lines.contains_key(&name), "{name}");
        }
    }
}
