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
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
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

/// How a process has to end.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Wanted {
    /// Nothing is wrong.
    Passes,
    /// The simulation comes to a violation.
    Violates,
    /// The test of this name fails.
    Fails(String),
}

impl Wanted {
    /// Whether a process that ended so, having said this, ended as it should. One without a status crashed, as a broken
    /// rule may well have it do; a line that was not understood, or a program that failed otherwise, noticed nothing.
    fn is_met(&self, status: ExitStatus, said: &str) -> bool {
        match self {
            Self::Passes => status.success(),
            Self::Violates => match status.code() {
                Some(code) => code == 1 && said.lines().any(|line| line.starts_with("replay: ")),
                None => true,
            },
            Self::Fails(test) => match status.code() {
                Some(code) => {
                    code == 101 && said.lines().any(|line| line == format!("test {test} ... FAILED"))
                }
                None => true,
            },
        }
    }
}

/// One process that has to end as it should.
struct Job {
    what: String,
    wanted: Wanted,
    command: Command,
}

impl Job {
    /// Says whether it ended as it should, in time.
    fn run(&mut self, limit: Duration) -> Result<bool> {
        self.command.stderr(Stdio::null());
        let ended = run::output_within(&mut self.command, limit)?;
        Ok(ended.is_some_and(|(status, said)| self.wanted.is_met(status, &said)))
    }
}

/// A test of the library by its whole name: nothing else runs.
fn test_command(program: &Path, test: &str) -> Command {
    let mut command = run::mortal(program);
    // Where cargo runs tests: theirs is the package's folder.
    command.args(["--exact", test]).current_dir(folders::root().join("crates/vmmu"));
    command
}

/// The program of each test that rows name: the only one that has it.
fn programs_of(rows: &[&Row]) -> Result<BTreeMap<String, PathBuf>> {
    let mut wanted = BTreeSet::new();
    for witness in rows.iter().flat_map(|row| &row.witnesses) {
        if let Witness::Test(test) = witness {
            wanted.insert(test.clone());
        }
    }
    let mut found = BTreeMap::new();
    if wanted.is_empty() {
        return Ok(found);
    }
    for program in artifacts::library_tests()? {
        let said = run::output(Command::new(&program).args(["--list", "--format", "terse"]))?;
        for test in said.lines().filter_map(|line| line.strip_suffix(": test")) {
            if wanted.contains(test) {
                let twice = found.insert(test.to_owned(), program.clone()).is_some();
                ensure!(!twice, "two tests are named {test}");
            }
        }
    }
    for test in wanted {
        ensure!(found.contains_key(&test), "no test is named {test}");
    }
    Ok(found)
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
    let programs = programs_of(&rows)?;
    let limit = Duration::from_secs(options.limit);
    let jobs = jobs(&program, &programs, &rows, options.seeds);
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

/// Every run: each seed of each scenario without a mutant, each test without one, and each
/// witness of each mutant.
fn jobs(program: &Path, programs: &BTreeMap<String, PathBuf>, rows: &[&Row], seeds: u64) -> Vec<Job> {
    let simulate = |scenario: &str, seed: u64| {
        let mut command = run::mortal(program);
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
                        Job { what: what.clone(), wanted: Wanted::Violates, command }
                    }));
                }
                Witness::Test(test) => {
                    let mut command = test_command(&programs[test], test);
                    command.env("VMMU_MUTANT", &row.mutant);
                    let what = format!("{} in {test}", row.mutant);
                    jobs.push(Job { what, wanted: Wanted::Fails(test.clone()), command });
                }
                Witness::Loom(_) => {}
            }
        }
    }
    for scenario in scenarios {
        jobs.extend((0..seeds).map(|seed| Job {
            what: format!("no mutant in {scenario}"),
            wanted: Wanted::Passes,
            command: simulate(scenario, seed),
        }));
    }
    // A test that fails anyway notices nothing.
    for (test, program) in programs {
        let command = test_command(program, test);
        jobs.push(Job { what: "no mutant in tests".to_owned(), wanted: Wanted::Passes, command });
    }
    jobs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_otherwise_has_noticed_nothing() {
        let ended = |line: &str| Command::new("sh").args(["-c", line]).status().expect("a shell");
        let story = "wrong: x\nreplay: cargo run\n";
        let (crashed, one, many) = (ended("kill -SEGV $$"), ended("exit 1"), ended("exit 101"));
        assert!(Wanted::Violates.is_met(one, story) && Wanted::Violates.is_met(crashed, ""));
        assert!(!Wanted::Violates.is_met(one, "") && !Wanted::Violates.is_met(many, story));
        assert!(
            !Wanted::Violates.is_met(ended("exit 2"), story)
                && !Wanted::Violates.is_met(ended("true"), story)
        );
        let fails = Wanted::Fails("a::b".to_owned());
        assert!(fails.is_met(many, "test a::b ... FAILED\n") && fails.is_met(crashed, ""));
        assert!(
            !fails.is_met(many, "test a::b2 ... FAILED\n") && !fails.is_met(one, "test a::b ... FAILED\n")
        );
        assert!(Wanted::Passes.is_met(ended("true"), "") && !Wanted::Passes.is_met(crashed, ""));
    }

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
