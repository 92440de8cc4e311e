//! `cargo xtask walks`: random page tables, walked by a processor that others wrote and by the model.
//!
//! | room | holds |
//! |---|---|
//! | here | the options, the course of the command |
//! | `engine` | the emulators, the modes that each is asked for, one run of the payload |
//! | `summary` | what all runs came to, as a table |
//!
//! The payload is `guests/walks`, the comparing program `tools/walks`. Invariant: an emulator that ended early, or
//! never, is a failure, not a smaller number.

mod engine;
mod summary;

use crate::artifacts;
use crate::host::programs::Consent;
use crate::host::{folders, run};
use crate::screen::{self, Progress};
use crate::units;
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use engine::{Emulator, Engine, Plan};
use serde_json::{Value, json};
use std::ops::Range;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Compares the model of the processor with one that others wrote, over random page tables.
#[derive(Args, Clone, Debug)]
pub(crate) struct Walks {
    /// Whose processor
    #[arg(long, value_enum, default_value = "qemu")]
    engine: Engine,
    /// Walks in all, the same number in each mode
    #[arg(long = "walks", value_name = "N", default_value_t = 20_000)]
    count: u64,
    /// What the tables are drawn from
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Only this mode, such as pae; may be given several times
    #[arg(long, value_name = "MODE")]
    mode: Vec<String>,
    /// Only this walk, with its story; wants a mode
    #[arg(long, value_name = "I", requires = "mode", conflicts_with = "count")]
    walk: Option<u64>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Install missing packages without asking
    #[arg(long)]
    yes: bool,
}

/// How long an emulator may take to come to the payload.
const START: Duration = Duration::from_mins(2);
/// Walks that any emulator makes in a second, several times over.
const SLOWEST: u64 = 250;

/// What one run came to.
#[derive(Debug)]
pub(crate) struct Compared {
    plan: &'static Plan,
    /// The comparing program's object.
    object: Value,
    time: Duration,
}

/// Runs the command and returns xtask's exit status.
pub(crate) fn command(options: &Walks) -> Result<u8> {
    let consent = Consent::new(options.yes);
    let plans = plans(options)?;
    ensure!(options.count > 0, "no walks are none");
    let emulator = Emulator::find(options.engine, consent)?;
    let program = artifacts::walks()?;
    let (first, count) = match options.walk {
        Some(walk) => (walk, 1),
        None => (0, options.count.div_ceil(plans.len() as u64)),
    };
    let mut compared = Vec::new();
    let mut bad = false;
    for plan in plans {
        let started = Instant::now();
        let image = artifacts::walking_payload(plan.width, consent)?;
        let folder = folders::fresh_run()?;
        let line = plan.line(options.seed, first, count);
        let limit = START + Duration::from_secs(count / SLOWEST);
        {
            let _progress = Progress::start(
                &format!("{}: {} walks on {}", plan.mode, units::count(count), plan.cpu),
                None,
            );
            emulator.run(plan, &image, &line, &folder, limit)?;
        }
        let (object, agrees) = compare(&program, options, plan, &folder, first..first + count)?;
        ensure!(object["offered"] == true, "{} does not offer {}", plan.cpu, plan.mode);
        let walkers = object["walkers"].as_object().into_iter().flatten();
        let walked: u64 = walkers.filter_map(|(_, tally)| tally["walks"].as_u64()).sum();
        ensure!(walked == count, "{}: {walked} walks instead of {count}", plan.mode);
        bad |= !agrees;
        compared.push(Compared { plan, object, time: started.elapsed() });
    }
    if bad {
        screen::warn(format_args!(
            "this was {}; {} is what its quirks are listed for (docs/walkers.md)",
            emulator.version(),
            options.engine.listed()
        ));
    }
    if options.json {
        let runs: Vec<Value> = compared.iter().map(Compared::json).collect();
        let engine = json!({ "engine": emulator.version(), "seed": options.seed, "runs": runs });
        println!("{engine}");
    } else {
        print!("{}", summary::table(&compared));
    }
    Ok(u8::from(bad))
}

/// The modes that were asked for, in the engine's order.
fn plans(options: &Walks) -> Result<Vec<&'static Plan>> {
    let all = options.engine.plans();
    for name in &options.mode {
        if !all.iter().any(|plan| plan.mode == *name) {
            let names: Vec<&str> = all.iter().map(|plan| plan.mode).collect();
            bail!("{} has no mode `{name}`; it has {}", options.engine.name(), names.join(", "));
        }
    }
    let wanted = |plan: &&Plan| options.mode.is_empty() || options.mode.iter().any(|name| name == plan.mode);
    Ok(all.iter().filter(wanted).collect())
}

/// Compares what the payload reported, and whether there was no disagreement.
fn compare(
    program: &Path,
    options: &Walks,
    plan: &Plan,
    folder: &Path,
    walks: Range<u64>,
) -> Result<(Value, bool)> {
    let mut command = Command::new(program);
    let (mode, count) = (plan.number, walks.end - walks.start);
    let numbers =
        [("--mode", mode.into()), ("--seed", options.seed), ("--first", walks.start), ("--count", count)];
    for (name, number) in numbers {
        command.arg(name).arg(number.to_string());
    }
    command.arg(folder.join(engine::REPORT)).args(["--quirks", options.engine.name()]);
    let replay = format!(
        "cargo xtask walks --engine {} --mode {} --seed {} --walk",
        options.engine.name(),
        plan.mode,
        options.seed
    );
    command.args(["--replay", &replay]);
    if options.walk.is_some() {
        command.arg("--all");
    }
    let output =
        command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("cannot run walks")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let Some(object) = text.lines().last().and_then(|line| serde_json::from_str(line).ok()) else {
        screen::warn(format_args!(
            "{}: what the emulator said is in {}",
            run::describe(&command),
            folder.display()
        ));
        bail!("{}: no report could be read", plan.mode);
    };
    Ok((object, output.status.success()))
}

impl Compared {
    fn json(&self) -> Value {
        let mut object = self.object.clone();
        object["mode"] = self.plan.mode.into();
        object["cpu"] = self.plan.cpu.into();
        object["seconds"] = self.time.as_secs_f64().into();
        object
    }
}
