//! `cargo xtask lint`: formatting, lints and documentation, without a warning.

use crate::artifacts;
use crate::host::{folders, run};
use crate::loom;
use crate::screen;
use anyhow::Result;
use std::process::Command;

/// The packages that build the library with its instruments; built together with others they would change what those
/// are built with.
const INSTRUMENTED: [&str; 2] = ["vmmu-sim", "vmmu-cli"];

/// The words for cargo that choose the simulation's packages alone.
pub(crate) fn simulation() -> String {
    INSTRUMENTED.map(|package| format!("--package {package}")).join(" ")
}

/// The words for cargo that leave them out.
pub(crate) fn without_simulation() -> String {
    INSTRUMENTED.map(|package| format!("--exclude {package}")).join(" ")
}

/// Runs every check whose output is warnings, each to its end; fails at the first that has any.
pub(crate) fn command() -> Result<u8> {
    let cargo = |words: &str| {
        let mut command = Command::new("cargo");
        command.args(words.split(' ')).current_dir(folders::root());
        command
    };
    let mut image = artifacts::image_command("clippy");
    image.args(["--locked", "--", "-Dwarnings"]);
    let documentation = |words: &str| {
        let mut command = cargo(&format!("doc {words} --no-deps --document-private-items --locked"));
        command.env("RUSTDOCFLAGS", "-Dwarnings");
        command
    };
    let mut models =
        cargo("clippy --package vmmu --lib --tests --profile loom --features mutants --locked -- -Dwarnings");
    loom::for_loom(&mut models)?;
    let shipped = format!("--workspace {}", without_simulation());
    let checks = [
        ("formatting", cargo("fmt --all --check")),
        ("lints", cargo(&format!("clippy {shipped} --all-targets --locked -- -Dwarnings"))),
        (
            "lints of the simulation",
            cargo(&format!("clippy {} --all-targets --locked -- -Dwarnings", simulation())),
        ),
        ("lints without std", cargo("clippy --package vmmu --no-default-features --locked -- -Dwarnings")),
        ("lints of the models for loom", models),
        ("lints of the bare-metal image", image),
        ("documentation", documentation(&shipped)),
        ("documentation of the simulation", documentation(&simulation())),
    ];
    for (name, mut command) in checks {
        screen::note(name);
        run::status(&mut command)?;
    }
    Ok(0)
}
