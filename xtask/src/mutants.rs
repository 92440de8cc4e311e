//! `cargo xtask mutants`: rules of the library broken one at a time, each to be noticed by what its row names.
//!
//! The rows are those of `docs/mutants.md`. One build; the mutant is chosen at run time, in a process of its own,
//! since a broken rule may end in a crash. Invariants: every mutant of the library has a row and every row a mutant;
//! no row is without a word on who notices.

use crate::artifacts;
use crate::host::{folders, run};
use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Args;
use console::style;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

/// Breaks the library's rules one at a time, and fails where nobody notices.
#[derive(Args, Clone, Debug)]
pub(crate) struct Mutants {
    /// Only mutants whose name holds this text
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Seeds of each scenario, every one of which has to notice
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// Seconds after which a run is given up, and counts as missed
    #[arg(long, value_name = "S", default_value_t = 180)]
    limit: u64,
}

/// Steps, at most, until a scenario's seed has to notice; the same seed passes as many without a mutant.
const STEPS: &str = "400000";

/// Who notices.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Witness {
    /// A scenario of the simulation, on each of its seeds.
    Scenario(String),
    /// A test of the library, by its name.
    Test(String),
    /// A room of models that `cargo xtask loom` explores with the mutant.
    Loom(String),
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Row {
    mutant: String,
    witnesses: Vec<Witness>,
}

fn parse(text: &str) -> Result<Vec<Row>> {
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.map(|line| {
        let cells: Vec<&str> = line.trim_end_matches('|').split(" | ").map(str::trim).collect();
        let [mutant, .., witnesses] = cells[..] else { bail!("a row without cells: {line}") };
        let mutant = mutant.trim_end_matches('`').to_owned();
        let witness = |text: &str| {
            let (kind, name) =
                text.split_once(" `").and_then(|(kind, name)| Some((kind, name.strip_suffix('`')?)))?;
            match kind {
                "scenario" => Some(Witness::Scenario(name.to_owned())),
                "test" => Some(Witness::Test(name.to_owned())),
                "loom" => Some(Witness::Loom(name.to_owned())),
                _ => None,
            }
        };
        let witnesses: Option<Vec<_>> = witnesses.split("; ").map(witness).collect();
        let witnesses = witnesses.with_context(|| format!("{mutant}: nobody is named who notices"))?;
        Ok(Row { mutant, witnesses })
    })
    .collect()
}

/// One process that has to end as it should.
struct Job {
    what: String,
    /// Whether it has to fail.
    notices: bool,
    command: Command,
}

impl Job {
    /// Says whether it ended as it should.
    fn run(&mut self, limit: Duration) -> Result<bool> {
        self.command.stdout(Stdio::null()).stderr(Stdio::null());
        let status = run::status_within(&mut self.command, limit)?;
        // What does not end has not failed; a line that was not understood has not begun. Without a status it crashed,
        // as a broken rule may well have it do.
        let noticed = |status: ExitStatus| status.code().is_none_or(|code| code == 1 || code == 101);
        Ok(status.is_some_and(|status| if self.notices { noticed(status) } else { status.success() }))
    }
}

/// The library's tests, with mutants that `VMMU_MUTANT` chooses.
fn library_tests() -> Command {
    let mut cargo = Command::new("cargo");
    cargo.args([
        "test",
        "--package",
        "vmmu",
        "--features",
        "instrument,mutants",
        "--locked",
        "--lib",
        "--tests",
    ]);
    cargo.current_dir(folders::root());
    cargo
}

/// Runs the command and returns xtask's exit status.
pub(crate) fn command(options: &Mutants) -> Result<u8> {
    let table = folders::root().join("docs/mutants.md");
    let text = fs::read_to_string(&table).with_context(|| format!("cannot read {}", table.display()))?;
    let rows = parse(&text)?;
    let program = artifacts::simulator()?;
    let known = run::output(Command::new(&program).arg("mutants"))?;
    let known: Vec<&str> = known.lines().filter_map(|line| line.split(' ').next()).collect();
    for row in &rows {
        ensure!(known.contains(&row.mutant.as_str()), "{}: no such mutant", row.mutant);
    }
    for name in &known {
        ensure!(rows.iter().any(|row| row.mutant == *name), "{name} has no row in docs/mutants.md");
    }
    let wanted = |row: &&Row| options.only.as_ref().is_none_or(|text| row.mutant.contains(text));
    let rows: Vec<&Row> = rows.iter().filter(wanted).collect();
    ensure!(!rows.is_empty(), "no mutant has such a name");
    rows.iter().try_for_each(|row| models_catch(row))?;
    tests_pass(&rows)?;
    let limit = Duration::from_secs(options.limit);
    let jobs = jobs(&program, &rows, options.seeds);
    let (count, jobs) = (jobs.len(), Mutex::new(jobs.into_iter()));
    let outcomes = Mutex::new((Vec::new(), Ok(())));
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(mut job) = jobs.lock().ok().and_then(|mut jobs| jobs.next()) {
                    let ended = job.run(limit);
                    let Ok(mut outcomes) = outcomes.lock() else { return };
                    match ended {
                        Ok(well) => outcomes.0.push((job.what, well)),
                        Err(problem) => outcomes.1 = Err(problem),
                    }
                }
            });
        }
    });
    let (outcomes, problem) =
        outcomes.into_inner().map_err(|_| anyhow!("a thread of this command panicked"))?;
    problem?;
    ensure!(outcomes.len() == count, "{} of {count} runs did not take place", count - outcomes.len());
    let (mut passed, mut failed) = (0, 0);
    let mut names: Vec<&str> = outcomes.iter().map(|(what, _)| what.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        let of = || outcomes.iter().filter(|(what, _)| what == name);
        let (all, well) = (of().count(), of().filter(|(_, well)| *well).count());
        let word = if all == well { style("ok    ").green() } else { style("FAILED").red() };
        println!("{word} {name}: {well} of {all}");
        *(if all == well { &mut passed } else { &mut failed }) += 1;
    }
    println!("{passed} passed, {failed} failed");
    Ok(u8::from(failed > 0))
}

/// Makes sure that the tests that rows name pass without a mutant: one that fails anyway notices nothing.
fn tests_pass(rows: &[&Row]) -> Result<()> {
    let mut tests: Vec<&str> = Vec::new();
    for witness in rows.iter().flat_map(|row| &row.witnesses) {
        if let Witness::Test(test) = witness {
            tests.push(test);
        }
    }
    if tests.is_empty() {
        return Ok(());
    }
    let said = run::output(library_tests().arg("--").args(&tests))?;
    for test in tests {
        let passed = said
            .lines()
            .any(|line| line.starts_with("test ") && line.ends_with("... ok") && line.contains(test));
        ensure!(passed, "no test {test} passes without a mutant");
    }
    Ok(())
}

/// Makes sure that the rooms of models that a row names catch its mutant: `cargo xtask loom` has them do so.
fn models_catch(row: &Row) -> Result<()> {
    for witness in &row.witnesses {
        if let Witness::Loom(room) = witness {
            let file = folders::root().join("crates/vmmu/src/models").join(room).with_extension("rs");
            let text = fs::read_to_string(&file).with_context(|| format!("no room of models is {room}"))?;
            let named = text.contains(&format!(": {} =>", row.mutant));
            ensure!(named, "{room}: no model there catches {}", row.mutant);
        }
    }
    Ok(())
}

/// Every run: each seed of each scenario without a mutant, and each witness of each mutant.
fn jobs(program: &Path, rows: &[&Row], seeds: u64) -> Vec<Job> {
    let simulate = |scenario: &str, seed: u64| {
        let mut command = Command::new(program);
        command.args(["sim", "--as-found", "--threads", "1", "--steps", STEPS, "--scenario", scenario]);
        command.args(["--seed", &seed.to_string()]);
        command
    };
    let mut jobs = Vec::new();
    let mut scenarios = BTreeSet::new();
    for row in rows {
        for witness in &row.witnesses {
            match witness {
                Witness::Scenario(scenario) => {
                    scenarios.insert(scenario);
                    let what = format!("{} in {scenario}", row.mutant);
                    jobs.extend((0..seeds).map(|seed| {
                        let mut command = simulate(scenario, seed);
                        command.args(["--mutant", &row.mutant]);
                        Job { what: what.clone(), notices: true, command }
                    }));
                }
                Witness::Test(test) => {
                    let mut command = library_tests();
                    command.arg(test).env("VMMU_MUTANT", &row.mutant);
                    jobs.push(Job { what: format!("{} in {test}", row.mutant), notices: true, command });
                }
                Witness::Loom(_) => {}
            }
        }
    }
    for scenario in scenarios {
        jobs.extend((0..seeds).map(|seed| Job {
            what: format!("no mutant in {scenario}"),
            notices: false,
            command: simulate(scenario, seed),
        }));
    }
    jobs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_name_who_notices() {
        let text = "# x\n| mutant | rule | by |\n|---|---|---|\n| `A` | one | scenario `s` |\n\
                    | `B` | two | test `a::b`; loom `m` |\n| T1 | not a mutant | – |\n";
        let rows = parse(text).expect("two rows");
        assert_eq!(rows.len(), 2);
        let row = Row { mutant: "A".to_owned(), witnesses: vec![Witness::Scenario("s".to_owned())] };
        assert_eq!(rows[0], row);
        let both = [Witness::Test("a::b".to_owned()), Witness::Loom("m".to_owned())];
        assert_eq!(rows[1].witnesses, both);
        assert!(parse("| `A` | one |  |").is_err());
        assert!(parse("| `A` | one | somebody |").is_err());
    }
}
