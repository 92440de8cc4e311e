//! `walks FILE`: compares what the payload in `guests/walks` reported with what `vmmu-machine` says of the same
//! walks.
//!
//! Prints one JSON object; disagreements go to standard error, as stories. Status: 0 none, 1 some or a report that
//! breaks off, 2 a bad line. `cargo xtask walks` runs the payload, then this.
#![forbid(unsafe_code)]

mod compare;
mod draw;
mod model;
mod random;
mod report;
mod run;
mod story;

use clap::{Parser, ValueEnum};
use compare::{Tally, Verdict};
use model::Model;
use report::Report;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use vmmu_machine::Quirks;

/// Stories of disagreements that are told.
const STORIES: u64 = 5;

/// Compares a report of random walks with the model.
#[derive(Parser)]
#[command(name = "walks")]
struct Line {
    /// What the emulator wrote to port 0xE9
    file: PathBuf,
    /// The mode that was walked
    #[arg(long, value_name = "NUMBER")]
    mode: u32,
    /// What the walks were drawn from
    #[arg(long, value_name = "S")]
    seed: u64,
    /// The first walk
    #[arg(long, value_name = "I")]
    first: u64,
    /// How many there were
    #[arg(long, value_name = "N")]
    count: u64,
    /// Whose known departures from the manuals are excused
    #[arg(long, value_enum, default_value = "none")]
    quirks: Known,
    /// Tell the story of every walk
    #[arg(long)]
    all: bool,
    /// The command that walks again, but for the walk's number at its end; told with each disagreement
    #[arg(long, value_name = "COMMAND")]
    replay: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Debug)]
enum Known {
    None,
    Qemu,
    Bochs,
}

impl Known {
    const fn quirks(self) -> Quirks {
        match self {
            Self::None => Quirks::NONE,
            Self::Qemu => Quirks::QEMU_7_2,
            Self::Bochs => Quirks::BOCHS_2_7,
        }
    }
}

fn main() -> ExitCode {
    match compare(&Line::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether there was no disagreement.
fn compare(line: &Line) -> Result<bool, Box<dyn Error>> {
    let bytes = std::fs::read(&line.file)?;
    let mut report = Report::find(&bytes)?;
    let run = report.run;
    // A payload that took its line for another one has shown nothing; one whose processor lacks the mode says 0.
    let made = (run.mode.0, run.seed, run.first);
    let asked = (line.mode, line.seed, line.first);
    if made != asked || run.count != 0 && run.count != line.count {
        return Err(format!("the report is of other walks than were asked for: {run:?}").into());
    }
    let model = Model::new();
    let known = line.quirks.quirks();
    let mut tallies: BTreeMap<&str, Tally> = BTreeMap::new();
    let mut disagreed = 0;
    for index in (run.first..).take(usize::try_from(run.count)?) {
        let walk = draw::draw(&run, index);
        let record = report.record(index, walk.first.len() + walk.second.len())?;
        if record.checksum != walk.checksum() {
            return Err(format!("walk {index} was not drawn alike: the two generators differ").into());
        }
        model.lay(&run, &walk, false);
        let verdict = compare::judge(&model, &run, &walk, &record, known)?;
        if let Verdict::Disagreed(answer) = &verdict {
            disagreed += 1;
            if disagreed <= STORIES {
                eprint!("{}", story::tell(&run, &walk, answer, &record));
                if let Some(replay) = &line.replay {
                    eprintln!("  again      {replay} {index}");
                }
            }
        } else if line.all {
            let answer = model.ask(&run, &walk, Quirks::NONE)?;
            eprintln!("{}  verdict    {verdict:?}", story::tell(&run, &walk, &answer, &record));
        }
        model.lay(&run, &walk, true);
        tallies.entry(compare::walker(&run, &walk)).or_default().count(&record, &verdict);
    }
    report.end()?;
    println!("{}", summary(&run, &tallies, known));
    Ok(disagreed == 0)
}

fn summary(run: &run::Run, tallies: &BTreeMap<&str, Tally>, known: Quirks) -> Value {
    let quirks: Map<String, Value> =
        known.named().map(|quirk| (quirk.name().to_owned(), quirk.section().into())).collect();
    let walkers: Map<String, Value> = tallies
        .iter()
        .map(|(&name, tally)| {
            let object = json!({
                "walks": tally.walks,
                "reached": tally.reached,
                "agreed": tally.agreed,
                "excused": tally.excused,
                "excused_by": tally.excused_by,
                "disagreed": tally.disagreed,
            });
            (name.to_owned(), object)
        })
        .collect();
    json!({
        "mode": run.mode.0,
        "seed": run.seed,
        "offered": run.count != 0,
        "physical_bits": run.phys_bits,
        "walkers": walkers,
        "quirks": quirks,
    })
}
