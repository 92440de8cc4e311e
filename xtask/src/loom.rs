//! `cargo xtask loom`: the models over the shipped source, explored by loom (`crates/vmmu/src/models`).
//!
//! The library's unit tests are built with `--cfg loom`, in a folder of their own so that no other build is touched,
//! and each model and each mutation runs in a process of its own. Invariants: a test counts as passed only where its
//! process says that it ran; the last line is what came of all.

use crate::host::{folders, run};
use crate::screen::{self, Progress};
use crate::units::{duration, parse_seconds};
use anyhow::{Context, Result, ensure};
use clap::Args;
use console::style;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Explores the models over the library's source with loom.
#[derive(Args, Clone, Debug)]
pub(crate) struct Loom {
    /// Only tests whose name holds one of these texts [default: every test]
    #[arg(value_name = "TEXT")]
    only: Vec<String>,
    /// Seconds after which a test is given up
    #[arg(long, value_name = "S", default_value = "300", value_parser = parse_seconds)]
    limit: Duration,
    /// Tests at the same time [default: one for each processor]
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
}

/// Where the tests of models are.
const MODELS: &str = "models::";

/// Runs the command and returns xtask's exit status.
pub(crate) fn command(options: &Loom) -> Result<u8> {
    let progress = Progress::start("building the models for loom", None);
    let program = build()?;
    drop(progress);
    let tests = tests(&run::output(Command::new(&program).arg("--list"))?);
    let wanted = |test: &&String| {
        options.only.is_empty() || options.only.iter().any(|text| test.contains(text.as_str()))
    };
    let tests: Vec<&String> = tests.iter().filter(wanted).collect();
    ensure!(!tests.is_empty(), "there is no such test");
    let jobs = options.jobs.unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from));
    let started = Instant::now();
    let failed = run_all(&program, &tests, options.limit, jobs.max(1))?;
    screen::note(format_args!("explored in {}", duration(started.elapsed())));
    println!("{} passed, {failed} failed", tests.len() - failed);
    Ok(u8::from(failed > 0))
}

/// Has cargo build for loom, in a folder of its own.
pub(crate) fn for_loom(cargo: &mut Command) -> Result<()> {
    let mut flags = std::env::var_os("RUSTFLAGS").unwrap_or_default();
    flags.push(" --cfg loom");
    cargo.env("RUSTFLAGS", flags).env_remove("CARGO_ENCODED_RUSTFLAGS");
    cargo.env("CARGO_TARGET_DIR", folders::target()?.join("loom"));
    Ok(())
}

/// Builds the library's unit tests for loom and returns the program.
fn build() -> Result<PathBuf> {
    let mut cargo = Command::new("cargo");
    let words = "test --quiet --profile loom --package vmmu --lib --features mutants --locked --no-run";
    cargo.args(words.split(' ')).args(["--message-format", "json-render-diagnostics"]);
    cargo.current_dir(folders::root());
    for_loom(&mut cargo)?;
    let said = run::output(&mut cargo)?;
    said.lines().find_map(executable).context("cargo has built no program of tests")
}

/// The program that one line of cargo's messages names.
fn executable(line: &str) -> Option<PathBuf> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    message["executable"].as_str().map(PathBuf::from)
}

/// The tests of models that a program of tests lists.
fn tests(list: &str) -> Vec<String> {
    let names = list.lines().filter_map(|line| line.strip_suffix(": test"));
    names.filter(|name| name.starts_with(MODELS)).map(str::to_owned).collect()
}

/// Runs the tests, `jobs` at a time, and returns how many failed.
fn run_all(program: &Path, tests: &[&String], limit: Duration, jobs: usize) -> Result<usize> {
    let folder = folders::own("loom")?;
    let (next, failed, error) = (AtomicUsize::new(0), AtomicUsize::new(0), Mutex::new(None));
    thread::scope(|scope| {
        for _ in 0..jobs.min(tests.len()) {
            scope.spawn(|| {
                while let Some(test) = tests.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let log = folder.join(format!("{}.log", test.replace("::", ".")));
                    match explore(program, test, limit, &log) {
                        Ok((line, passed)) => {
                            failed.fetch_add(usize::from(!passed), Ordering::Relaxed);
                            println!("{line}");
                        }
                        Err(problem) => {
                            // The first one is told; the others stop at the next test.
                            next.store(tests.len(), Ordering::Relaxed);
                            let mut error = error.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                            error.get_or_insert(problem);
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

/// Runs one test; the line that tells of it, and whether it passed.
fn explore(program: &Path, test: &str, limit: Duration, log: &Path) -> Result<(String, bool)> {
    let file = File::create(log).with_context(|| format!("cannot make {}", log.display()))?;
    let started = Instant::now();
    let mut child = Command::new(program);
    child.args(["--exact", test, "--nocapture"]).env("RUST_BACKTRACE", "0");
    child.stdout(file.try_clone()?).stderr(file);
    let status = run::status_within(&mut child, limit)?;
    let said = fs::read(log).with_context(|| format!("cannot read {}", log.display()))?;
    let text = String::from_utf8_lossy(&said);
    let passed = status.is_some_and(|status| status.success()) && text.contains("1 passed");
    let name = test.strip_prefix(MODELS).unwrap_or(test);
    let time = duration(started.elapsed());
    if passed {
        let count = executions(&text).context("a model does not say how far it was explored")?;
        return Ok((format!("{} {name:<60} {count} executions, {time}", style("ok    ").green()), true));
    }
    let why = if status.is_none() { "given up".into() } else { run::tail(&said) };
    Ok((format!("{} {name}, {time}\n{why}\n{}", style("FAILED").red().bold(), log.display()), false))
}

/// How many executions a test says there were.
fn executions(said: &str) -> Option<&str> {
    said.lines().find_map(|line| line.strip_suffix(" executions"))?.split_whitespace().last()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_models_of_a_list_are_chosen() {
        let list = "addr::tests::a: test\nmodels::grace::holds: test\nmodels::grace: bench\n\n2 tests\n";
        assert_eq!(tests(list), ["models::grace::holds"]);
    }

    #[test]
    fn what_a_program_says_is_understood() {
        assert_eq!(executions("running 1 test\ntest models::x ... 31 executions\nok\n"), Some("31"));
        assert_eq!(executions("no executions at all"), None);
        assert_eq!(executable(r#"{"reason":"build-finished","success":true}"#), None);
        let artifact = r#"{"reason":"compiler-artifact","executable":"/target/vmmu-1"}"#;
        assert_eq!(executable(artifact), Some(PathBuf::from("/target/vmmu-1")));
    }
}
