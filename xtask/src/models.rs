//! `cargo xtask models`: the exhaustive checks of the protocols' models with Spin.
//!
//! A row of `models/checks.tsv` names a model, its set, the verdict that is expected, and the runs, parted by `|`:
//! each a list of Spin switches. Invariant: a run that finds no error but was cut short counts as failed.

use crate::host::programs::{self, Consent};
use crate::host::{folders, run};
use crate::units::{duration, parse_seconds};
use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use console::style;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Checks the protocols' models exhaustively with Debian's spin.
#[derive(Args, Clone, Debug)]
pub(crate) struct Models {
    /// Which runs
    #[arg(value_enum, default_value_t = Set::Quick)]
    set: Set,
    /// Only these models [default: every model]
    #[arg(value_name = "MODEL")]
    only: Vec<String>,
    /// Seconds after which a run is given up
    #[arg(long, value_name = "S", default_value = "900", value_parser = parse_seconds)]
    limit: Duration,
    /// Runs at the same time [default: one for each processor]
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// Install missing packages without asking
    #[arg(long)]
    yes: bool,
}

/// Which runs.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum Set {
    /// The small ones
    Quick,
    /// The large ones
    Deep,
    /// Both
    All,
}

/// What a run says about its model.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Verdict {
    /// Every reachable state was looked at, none is wrong.
    Pass,
    /// A wrong state was found.
    Fail,
    /// None was found, but not every state was looked at, or the checker did not come to an end.
    Unfinished(String),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pass => f.write_str("pass"),
            Self::Fail => f.write_str("fail"),
            Self::Unfinished(why) => f.write_str(why),
        }
    }
}

/// One run of the checker.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Check {
    model: String,
    set: Set,
    expected: Verdict,
    /// Preprocessor symbols, without `-D`.
    switches: Vec<String>,
}

/// Runs the command and returns xtask's exit status.
pub(crate) fn command(options: &Models) -> Result<u8> {
    programs::require(
        &[programs::SPIN, programs::GCC, programs::BINUTILS, programs::LIBC],
        Consent::new(options.yes),
    )?;
    let folder = folders::root().join("models");
    let table = folder.join("checks.tsv");
    let text = fs::read_to_string(&table).with_context(|| format!("cannot read {}", table.display()))?;
    let checks = parse(&text)?;
    for name in &options.only {
        ensure!(checks.iter().any(|check| check.model == *name), "there is no model `{name}`");
    }
    let wanted = |check: &&Check| {
        (options.set == Set::All || options.set == check.set)
            && (options.only.is_empty() || options.only.contains(&check.model))
    };
    let checks: Vec<&Check> = checks.iter().filter(wanted).collect();
    let jobs = options.jobs.unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from)).max(1);
    let work = folders::own("models")?.join(std::process::id().to_string());
    let failed = run_all(&checks, &folder, &work, options.limit, jobs);
    let _ = fs::remove_dir_all(&work);
    let failed = failed?;
    println!("{} passed, {failed} failed", checks.len() - failed);
    Ok(u8::from(failed > 0 || checks.is_empty()))
}

/// Runs the checks, `jobs` at a time, and returns how many did not come out as expected.
fn run_all(checks: &[&Check], folder: &Path, work: &Path, limit: Duration, jobs: usize) -> Result<usize> {
    let next = AtomicUsize::new(0);
    let failed = AtomicUsize::new(0);
    let error = Mutex::new(None);
    thread::scope(|scope| {
        for _ in 0..jobs.min(checks.len()) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(check) = checks.get(number) else { return };
                    let started = Instant::now();
                    match check.run(folder, &work.join(number.to_string()), limit) {
                        Ok((verdict, states)) => {
                            let good = verdict == check.expected;
                            failed.fetch_add(usize::from(!good), Ordering::Relaxed);
                            let word =
                                if good { style("ok    ").green() } else { style("FAILED").red().bold() };
                            println!(
                                "{word} {:<24} {:<42} {verdict}, expected {} ({states} states, {})",
                                check.model,
                                check.switches.join(" "),
                                check.expected,
                                duration(started.elapsed())
                            );
                        }
                        Err(failure) => {
                            // The first one is told; the others stop at the next check.
                            next.store(checks.len(), Ordering::Relaxed);
                            error
                                .lock()
                                .unwrap_or_else(std::sync::PoisonError::into_inner)
                                .get_or_insert(failure);
                        }
                    }
                }
            });
        }
    });
    match error.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(failed.into_inner()),
    }
}

impl Check {
    /// Generates, compiles and runs the checker in `work`. Returns the verdict and the number of states.
    fn run(&self, folder: &Path, work: &Path, limit: Duration) -> Result<(Verdict, String)> {
        fs::create_dir_all(work).with_context(|| format!("cannot make {}", work.display()))?;
        let model: PathBuf = folder.join(format!("{}.pml", self.model));
        let mut spin = Command::new("spin");
        spin.arg("-a")
            .args(self.switches.iter().map(|switch| format!("-D{switch}")))
            .arg(model)
            .current_dir(work);
        run::output(&mut spin)?;
        let (compile, check) = self.modes();
        run::output(
            Command::new("gcc").arg("-O2").args(compile).args(["-w", "-o", "pan", "pan.c"]).current_dir(work),
        )?;
        let log = work.join("log");
        let mut checker = run::mortal(&work.join("pan"));
        checker
            .args(check)
            .current_dir(work)
            .stdin(Stdio::null())
            .stdout(File::create(&log)?)
            .stderr(Stdio::null());
        let status = run::status_within(&mut checker, limit)?;
        let said = fs::read_to_string(&log)?;
        fs::remove_dir_all(work)?;
        Ok((judge(status, &said), states(&said)))
    }

    /// How the checker is compiled and started. A depth-first search keeps its stack in memory, which the models
    /// with long histories would exhaust: they are searched breadth first.
    fn modes(&self) -> (&'static [&'static str], &'static [&'static str]) {
        if ["lazy-", "dirty-", "slots-"].iter().any(|start| self.model.starts_with(start)) {
            (&["-DSAFETY", "-DBFS"], &["-w24"])
        } else {
            (&["-DSAFETY", "-DCOLLAPSE"], &["-m1000000", "-w24"])
        }
    }
}

/// Reads the table of checks.
fn parse(table: &str) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    for line in table.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let fields: Vec<&str> = line.split('\t').collect();
        let &[model, set, expected, runs] = &fields[..] else { bail!("`{line}` is no row of checks") };
        let set = match set {
            "quick" => Set::Quick,
            "deep" => Set::Deep,
            _ => bail!("`{set}` is no set: {line}"),
        };
        let expected = match expected {
            "pass" => Verdict::Pass,
            "fail" => Verdict::Fail,
            _ => bail!("`{expected}` is no verdict: {line}"),
        };
        for switches in runs.split('|') {
            let switches = switches.split_whitespace().map(str::to_owned).collect();
            checks.push(Check { model: model.to_owned(), set, expected: expected.clone(), switches });
        }
    }
    Ok(checks)
}

/// The verdict from the checker's end (`None`: it was given up) and what it wrote.
fn judge(status: Option<ExitStatus>, said: &str) -> Verdict {
    let errors = said.split_once("errors: ").and_then(|(_, rest)| {
        let end = rest.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(rest.len());
        rest[..end].parse::<u64>().ok()
    });
    let cut_short =
        ["Search not completed", "max search depth too small"].iter().any(|text| said.contains(text));
    match (status, errors) {
        (_, Some(1..)) => Verdict::Fail,
        (None, _) => Verdict::Unfinished("given up".to_owned()),
        (Some(status), _) if !status.success() => Verdict::Unfinished(format!("stopped ({status})")),
        (_, Some(0)) if cut_short => Verdict::Unfinished("cut short".to_owned()),
        (_, Some(0)) => Verdict::Pass,
        (_, None) => Verdict::Unfinished("no verdict".to_owned()),
    }
}

/// How many states the checker says it stored.
fn states(said: &str) -> String {
    let line = said.lines().find(|line| line.contains(" states, stored"));
    line.and_then(|line| line.split_whitespace().next()).unwrap_or("no").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    const CLEAN: &str = "State-vector 44 byte, depth reached 12, errors: 0\n     1234 states, stored\n";

    fn exit(code: i32) -> ExitStatus {
        ExitStatus::from_raw(code << 8)
    }

    #[test]
    fn rows_become_runs() {
        let checks = parse("# model\tset\n\na\tquick\tpass\t\nb\tdeep\tfail\tX Y=2|Z\n").unwrap();
        assert_eq!(checks.len(), 3);
        assert!(checks[0].switches.is_empty() && checks[0].expected == Verdict::Pass);
        assert_eq!(checks[1].switches, ["X", "Y=2"]);
        assert_eq!((checks[2].set, &checks[2].expected), (Set::Deep, &Verdict::Fail));
        for row in ["a\tquick\tpass", "a\tslow\tpass\t", "a\tquick\tmaybe\t"] {
            assert!(parse(row).is_err(), "{row}");
        }
    }

    #[test]
    fn the_committed_table_has_a_model_for_every_row() {
        let folder = folders::root().join("models");
        let checks = parse(&fs::read_to_string(folder.join("checks.tsv")).unwrap()).unwrap();
        assert!(
            checks.iter().any(|check| check.set == Set::Quick)
                && checks.iter().any(|check| check.set == Set::Deep)
        );
        for check in checks {
            assert!(folder.join(format!("{}.pml", check.model)).is_file(), "{}", check.model);
        }
    }

    #[test]
    fn only_a_finished_search_without_errors_passes() {
        assert_eq!(judge(Some(exit(0)), CLEAN), Verdict::Pass);
        assert_eq!(states(CLEAN), "1234");
        assert_eq!(judge(Some(exit(0)), "errors: 3\n"), Verdict::Fail);
        assert_eq!(judge(None, "errors: 1\n"), Verdict::Fail);
        for (status, said) in [
            (Some(exit(0)), "Warning: Search not completed\nerrors: 0\n"),
            (Some(exit(0)), "error: max search depth too small\nerrors: 0\n"),
            (Some(exit(1)), CLEAN),
            (Some(ExitStatus::from_raw(9)), CLEAN),
            (None, CLEAN),
            (Some(exit(0)), ""),
        ] {
            assert!(matches!(judge(status, said), Verdict::Unfinished(_)), "{said}");
        }
    }
}
