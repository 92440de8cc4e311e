//! Everything that a contributor or CI does with vmmu, as one program: `cargo xtask COMMAND`.
//!
//! `boot` runs a guest under the hypervisor, `bench` measures, `test` proves, `models` checks the protocols. Each
//! needs nothing prepared: what is missing is built, downloaded under the target folder, or named with the command
//! that installs it.
#![forbid(unsafe_code)]

mod artifacts;
mod boot;
mod cpio;
mod host;
mod initrd;
mod qemu;
mod screen;
mod units;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Boots, benchmarks and tests vmmu.
#[derive(Parser)]
#[command(name = "cargo xtask", disable_help_subcommand = true)]
struct Line {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Boot(boot::options::Options),
}

fn main() -> ExitCode {
    let line = Line::parse();
    let result = qemu::machine::end_on_signals().and_then(|()| match &line.command {
        Command::Boot(options) => boot::command(options),
    });
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("{} {error:#}", console::style("error:").red().bold().for_stderr());
            ExitCode::FAILURE
        }
    }
}
