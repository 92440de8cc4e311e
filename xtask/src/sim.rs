//! `cargo xtask sim`: a campaign of the simulation, with what it covered.
//!
//! The work is the program's, `vmmu sim`, which this builds and runs. Invariant: what a campaign comes to depends on
//! its seeds alone, so shards of one add up to it.

use crate::artifacts;
use crate::host::run;
use anyhow::{Context, Result};
use clap::Args;
use std::process::Command;

/// Simulates the library on the software machine over many seeds: by default ten million steps.
#[derive(Args, Clone, Debug)]
pub(crate) struct Sim {
    /// How many seeds
    #[arg(long, default_value_t = 10_000)]
    seeds: u64,
    /// Steps of each
    #[arg(long, default_value_t = 1000)]
    steps: u64,
    /// Only seeds whose number leaves I when divided by N
    #[arg(long, value_name = "I/N")]
    shard: Option<String>,
    /// Fails where anything that the library can be made to do happened less often
    #[arg(long, value_name = "N")]
    floor: Option<u64>,
    /// Prints one JSON object
    #[arg(long)]
    json: bool,
    /// More words for `vmmu sim`, which `cargo run --release -- sim --help` explains
    #[arg(last = true)]
    more: Vec<String>,
}

/// Runs the command and returns xtask's exit status.
pub(crate) fn command(options: &Sim) -> Result<u8> {
    let mut program = Command::new(artifacts::simulator()?);
    let status = program.args(words(options)).status();
    let status = status.with_context(|| format!("cannot run {}", run::describe(&program)))?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

/// The program's words.
fn words(options: &Sim) -> Vec<String> {
    let Sim { seeds, steps, shard, floor, json, more } = options;
    let mut words = vec!["sim".to_owned(), format!("--seeds={seeds}"), format!("--steps={steps}")];
    words.extend(shard.as_ref().map(|shard| format!("--shard={shard}")));
    words.extend(floor.map(|floor| format!("--floor={floor}")));
    words.push(if *json { "--json" } else { "--coverage" }.to_owned());
    words.extend_from_slice(more);
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        sim: Sim,
    }

    fn of(line: &str) -> String {
        words(&Line::parse_from(line.split(' ')).sim).join(" ")
    }

    #[test]
    fn words_are_handed_on() {
        assert_eq!(of("sim"), "sim --seeds=10000 --steps=1000 --coverage");
        assert_eq!(
            of("sim --seeds 5 --shard 1/4 --floor 7 --json -- --threads 1"),
            "sim --seeds=5 --steps=1000 --shard=1/4 --floor=7 --json --threads 1"
        );
    }
}
