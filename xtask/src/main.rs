//! Everything that a contributor or CI does with vmmu, as one program: `cargo xtask COMMAND`.
//!
//! `boot` runs a guest under the hypervisor, `bench` measures, `test` proves, `models` checks the protocols, `loom`
//! the code that follows them, `sim` simulates, `mutants` breaks rules to see them noticed, `walks` compares the model
//! of the processor with others'. Each needs nothing prepared: what is missing is built, downloaded under the target
//! folder, or named with the command that installs it.
#![forbid(unsafe_code)]

mod artifacts;
mod bench;
mod boot;
mod cpio;
mod host;
mod initrd;
mod lint;
mod loom;
mod models;
mod mutants;
mod qemu;
mod screen;
mod sim;
mod test;
mod units;
mod walks;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Boots, benchmarks and tests vmmu.
#[derive(Parser)]
#[command(name = "xtask", bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Line {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Boot(Box<boot::options::Options>),
    /// Measures the hypervisor
    #[command(subcommand)]
    Bench(bench::Bench),
    Test(test::Test),
    Models(models::Models),
    Sim(sim::Sim),
    Loom(loom::Loom),
    Mutants(mutants::Mutants),
    Walks(walks::Walks),
    /// Checks formatting, lints and documentation
    Lint,
}

fn main() -> ExitCode {
    let line = Line::parse();
    let result = qemu::machine::end_on_signals().and_then(|()| match &line.command {
        Command::Boot(options) => boot::command(options),
        Command::Bench(bench) => bench::command(bench),
        Command::Test(test) => test::command(test),
        Command::Lint => lint::command(),
        Command::Models(models) => models::command(models),
        Command::Sim(sim) => sim::command(sim),
        Command::Loom(loom) => loom::command(loom),
        Command::Mutants(mutants) => mutants::command(mutants),
        Command::Walks(walks) => walks::command(walks),
    });
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            screen::say(format_args!("{} {error:#}", console::style("error:").red().bold().for_stderr()));
            ExitCode::FAILURE
        }
    }
}
