//! `cargo xtask lint`: formatting, lints and documentation, without a warning.

use crate::artifacts;
use crate::host::{folders, run};
use crate::screen;
use anyhow::Result;
use std::process::Command;

/// Runs every check whose output is warnings, each to its end; fails at the first that has any.
pub(crate) fn command() -> Result<u8> {
    let cargo = |words: &str| {
        let mut command = Command::new("cargo");
        command.args(words.split(' ')).current_dir(folders::root());
        command
    };
    let mut image = artifacts::image_command("clippy");
    image.args(["--locked", "--", "-Dwarnings"]);
    let mut documentation = cargo("doc --workspace --no-deps --document-private-items --locked");
    documentation.env("RUSTDOCFLAGS", "-Dwarnings");
    let checks = [
        ("formatting", cargo("fmt --all --check")),
        ("lints", cargo("clippy --workspace --all-targets --locked -- -Dwarnings")),
        ("lints without std", cargo("clippy --package vmmu --no-default-features --locked -- -Dwarnings")),
        ("lints of the bare-metal image", image),
        ("documentation", documentation),
    ];
    for (name, mut command) in checks {
        screen::note(name);
        run::status(&mut command)?;
    }
    Ok(0)
}
