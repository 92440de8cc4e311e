//! `cargo xtask test`: everything that a contributor or CI needs, boots included.
//!
//! A step is one thing that must hold, with a name. Every step runs, whatever happened before it, and what one says
//! is kept in a log of its own. Nothing is skipped in silence: what cannot be run has failed.

mod boots;
mod deep;
mod quick;

use crate::host::programs::{self, Consent};
use crate::host::{folders, run};
use crate::screen::{self, Progress};
use crate::units::duration;
use anyhow::{Context, Result, ensure};
use clap::Args;
use console::style;
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

/// Runs the tests: the library's, and guests under the hypervisor.
#[derive(Args, Clone, Debug)]
pub(crate) struct Test {
    /// Also everything that takes long: each claim of the project at its full figure, all models
    #[arg(long)]
    deep: bool,
    /// Only steps whose name holds this text
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Print the steps' names and run none
    #[arg(long)]
    list: bool,
    /// Install missing packages without asking
    #[arg(long)]
    yes: bool,
}

/// What a step does.
type Action = Box<dyn FnOnce(&mut Log) -> Result<()>>;

/// One thing that must hold.
pub(crate) struct Step {
    name: String,
    run: Action,
    /// Whether it may ask something on the terminal, which nothing else must draw on meanwhile.
    asks: bool,
}

impl Step {
    fn new(name: impl Into<String>, run: impl FnOnce(&mut Log) -> Result<()> + 'static) -> Self {
        Self { name: name.into(), run: Box::new(run), asks: false }
    }

    /// A cargo command that must succeed.
    fn cargo(name: &str, words: impl Into<String>) -> Self {
        let words = words.into();
        Self::new(name, move |log| log.run(Command::new("cargo").args(words.split(' '))))
    }

    /// This program, run with other words, must succeed.
    fn xtask(name: &str, words: &'static str) -> Self {
        Self::new(name, move |log| log.run(Command::new(this_program()?).args(words.split(' '))))
    }
}

/// Where a step's output goes.
pub(crate) struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// Runs a command in the project's root, its output going into the log, and demands success.
    fn run(&mut self, command: &mut Command) -> Result<()> {
        let status = self.start(command)?.status()?;
        ensure!(status.success(), "{}: {status}", run::describe(command));
        Ok(())
    }

    /// Has a command write into the log.
    fn start<'a>(&mut self, command: &'a mut Command) -> Result<&'a mut Command> {
        writeln!(self.file, "$ {}", run::describe(command))?;
        command.current_dir(folders::root()).stdin(Stdio::null());
        Ok(command.stdout(self.file.try_clone()?).stderr(self.file.try_clone()?))
    }
}

/// The file of this very program.
fn this_program() -> Result<PathBuf> {
    std::env::current_exe().context("cannot find this program's own file")
}

/// Runs the command and returns xtask's exit status.
pub(crate) fn command(options: &Test) -> Result<u8> {
    let mut steps = vec![preparation(options)];
    steps.extend(quick::steps());
    if options.deep {
        steps.extend(deep::steps());
    }
    if let Some(text) = &options.only {
        steps.retain(|step| step.name.contains(text.as_str()));
        ensure!(!steps.is_empty(), "no step's name holds `{text}`");
    }
    if options.list {
        for step in &steps {
            println!("{}", step.name);
        }
        return Ok(0);
    }
    let folder = folders::own("test")?;
    let started = Instant::now();
    let (mut passed, mut failed) = (0, Vec::new());
    let total = steps.len();
    for (number, step) in (1..).zip(steps) {
        let name = step.name.clone();
        if execute(&format!("[{number}/{total}] {name}"), step, folder.join(format!("{number}.log")))? {
            passed += 1;
        } else {
            failed.push(name);
        }
    }
    screen::note(format_args!("{} in all; logs in {}", duration(started.elapsed()), folder.display()));
    for name in &failed {
        screen::warn(format_args!("failed: {name}"));
    }
    println!("{passed} passed, {} failed", failed.len());
    Ok(u8::from(!failed.is_empty()))
}

/// The step on which most others depend: the programs that they need, installed where the user agrees.
fn preparation(options: &Test) -> Step {
    let (deep, consent) = (options.deep, Consent::new(options.yes));
    let step = Step::new("what the tests need is installed", move |_| {
        let mut needs = vec![programs::QEMU, programs::GCC, programs::BINUTILS, programs::LIBC];
        if deep {
            needs.push(programs::SPIN);
            needs.extend(programs::BOCHS);
            needs.extend(programs::GRUB);
        }
        programs::require(&needs, consent)?;
        programs::emulator(consent).map(drop)
    });
    Step { asks: true, ..step }
}

/// Runs one step and tells how it went.
fn execute(title: &str, step: Step, path: PathBuf) -> Result<bool> {
    let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    let mut log = Log { path, file };
    let started = Instant::now();
    let progress = (!step.asks).then(|| Progress::start(title, None));
    let result = (step.run)(&mut log);
    drop(progress);
    let time = duration(started.elapsed());
    match result {
        Ok(()) => {
            screen::say(format_args!(
                "{} {title}  {}",
                style("ok    ").green().for_stderr(),
                style(time).dim().for_stderr()
            ));
            Ok(true)
        }
        Err(error) => {
            screen::say(format_args!(
                "{} {title}  {time}\n{error:#}",
                style("FAILED").red().bold().for_stderr()
            ));
            let said = fs::read(&log.path)?;
            if !said.is_empty() {
                screen::say(format_args!(
                    "{}\n{}",
                    style(run::tail(&said)).dim().for_stderr(),
                    log.path.display()
                ));
            }
            Ok(false)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;

    #[test]
    fn a_step_that_fails_is_a_failure_and_its_output_is_kept() {
        let path = std::env::temp_dir().join(format!("xtask-step-{}", std::process::id()));
        let good = Step::new("x", |log: &mut Log| log.run(Command::new("echo").arg("said")));
        assert!(execute("x", good, path.clone()).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "$ echo said\nsaid\n");
        assert!(
            !execute("x", Step::new("x", |log: &mut Log| log.run(&mut Command::new("false"))), path.clone())
                .unwrap()
        );
        assert!(!execute("x", Step::new("x", |_: &mut Log| bail!("no")), path.clone()).unwrap());
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn names_of_steps_tell_them_apart() {
        let names: Vec<String> =
            quick::steps().into_iter().chain(deep::steps()).map(|step| step.name).collect();
        let distinct: std::collections::BTreeSet<&String> = names.iter().collect();
        assert_eq!(distinct.len(), names.len(), "{names:?}");
    }
}
