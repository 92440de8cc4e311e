//! `cargo xtask mutants`: rules of the library broken one at a time, each to be noticed by what its row names.
//!
//! The rows are those of `docs/mutants.md`. One build; the mutant is chosen at run time, in a process of its own,
//! since a broken rule may end in a crash. Invariants: every mutant of the library has a row and every row a mutant;
//! no row is without a word on who notices.

use crate::host::{folders, run};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use console::style;
use std::fs;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

/// Breaks the library's rules one at a time, and fails where nobody notices.
#[derive(Args, Clone, Debug)]
pub(crate) struct Mutants {
    /// Only mutants whose name holds this text
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Seconds after which a run is given up, and counts as missed
    #[arg(long, value_name = "S", default_value_t = 180)]
    limit: u64,
}

/// Seeds, at most, until the simulation has to notice.
const SEEDS: &str = "1500";

/// Who notices.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Witness {
    /// The simulation's histories.
    Histories,
    /// A test of the library, by its name.
    Test(String),
    /// Something else, or nothing yet: said, not run.
    Said(String),
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Row {
    mutant: String,
    witness: Witness,
}

fn parse(text: &str) -> Result<Vec<Row>> {
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.map(|line| {
        let cells: Vec<&str> = line.trim_end_matches('|').split(" | ").map(str::trim).collect();
        let [mutant, .., witness] = cells[..] else { bail!("a row without cells: {line}") };
        ensure!(!witness.is_empty(), "{mutant}: nobody is named who notices");
        let witness = match (witness, witness.strip_prefix("test `").and_then(|w| w.strip_suffix('`'))) {
            ("histories", _) => Witness::Histories,
            (_, Some(test)) => Witness::Test(test.to_owned()),
            _ => Witness::Said(witness.to_owned()),
        };
        Ok(Row { mutant: mutant.trim_end_matches('`').to_owned(), witness })
    })
    .collect()
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
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--quiet", "--release", "--package", "vmmu-cli", "--locked"]);
    run::status(cargo.current_dir(folders::root()))?;
    let program = folders::target()?.join("release/vmmu");
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
    // Tests that fail anyway notice nothing.
    let mut tests: Vec<&str> = Vec::new();
    for row in &rows {
        if let Witness::Test(test) = &row.witness {
            tests.push(test);
        }
    }
    if !tests.is_empty() {
        let said = run::output(library_tests().arg("--").args(&tests))?;
        for test in tests {
            let passed = said
                .lines()
                .any(|line| line.starts_with("test ") && line.ends_with("... ok") && line.contains(test));
            ensure!(passed, "no test {test} passes without a mutant");
        }
    }
    let (next, failed, ran, error) =
        (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0), Mutex::new(None));
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(row) = rows.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let mut child = match &row.witness {
                        Witness::Histories => {
                            let mut child = Command::new(&program);
                            child.args(["sim", "--as-found", "--threads", "1", "--seeds", SEEDS]);
                            child.args(["--mutant", &row.mutant]);
                            child
                        }
                        Witness::Test(test) => {
                            let mut child = library_tests();
                            child.arg(test).env("VMMU_MUTANT", &row.mutant);
                            child
                        }
                        Witness::Said(_) => continue,
                    };
                    child.stdout(Stdio::null()).stderr(Stdio::null());
                    match run::status_within(&mut child, Duration::from_secs(options.limit)) {
                        Ok(status) => {
                            let noticed = status.is_some_and(|status| !status.success());
                            ran.fetch_add(1, Ordering::Relaxed);
                            failed.fetch_add(usize::from(!noticed), Ordering::Relaxed);
                            let word =
                                if noticed { style("noticed").green() } else { style("missed ").red() };
                            println!("{word} {}", row.mutant);
                        }
                        Err(problem) => {
                            if let Ok(mut first) = error.lock() {
                                first.get_or_insert(problem);
                            }
                        }
                    }
                }
            });
        }
    });
    if let Some(problem) = error.into_inner().ok().flatten() {
        return Err(problem);
    }
    for row in &rows {
        if let Witness::Said(said) = &row.witness {
            println!("{} {}: {said}", style("not run").dim(), row.mutant);
        }
    }
    let (ran, failed) = (ran.into_inner(), failed.into_inner());
    println!("{} passed, {failed} failed, {} not run", ran - failed, rows.len() - ran);
    Ok(u8::from(failed > 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_name_who_notices() {
        let text = "# x\n| mutant | rule | by |\n|---|---|---|\n| `A` | one | histories |\n| `B` | two | no, since |\n";
        let rows = parse(text).expect("two rows");
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[0], Row { mutant: "A".to_owned(), witness: Witness::Histories });
        assert_eq!(rows[1].witness, Witness::Said("no, since".to_owned()));
        assert!(parse("| `A` | one |  |").is_err());
    }
}
