//! `vmmu`: the library on a software machine, for people. `cargo run --release` alone simulates for a minute.
//!
//! Results go to standard output, progress to standard error. Status: 0 nothing wrong, 1 a violation or too
//! little done for a floor, 2 a bad line.
#![forbid(unsafe_code)]

mod simulate;
mod summary;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Guest memory on a software machine whose caches forget nothing.
#[derive(Parser)]
#[command(name = "vmmu", disable_help_subcommand = true)]
struct Line {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    Sim(simulate::Options),
    /// Names the rules that --mutant can break
    Mutants,
    /// Names the scenes that --scenario can set
    Scenarios,
}

fn main() -> ExitCode {
    match Line::parse().command {
        None => simulate::command(&simulate::Options::a_minute()),
        Some(Command::Sim(options)) => simulate::command(&options),
        Some(Command::Mutants) => {
            for mutant in vmmu_sim::Mutant::ALL {
                println!("{:<26}{}", mutant.name(), mutant.rule().trim());
            }
            ExitCode::SUCCESS
        }
        Some(Command::Scenarios) => {
            for scenario in vmmu_sim::Scenario::ALL {
                println!("{:<26}{}", scenario.name(), scenario.about().trim());
            }
            ExitCode::SUCCESS
        }
    }
}
