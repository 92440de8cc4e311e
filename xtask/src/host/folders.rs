//! Where the project and what is built of it lie.

use super::run;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Folders of earlier runs that are kept for a look at their logs.
const RUNS_KEPT: usize = 20;

/// The project's root. `cargo run` names the package's folder; a binary started by hand remembers it.
pub(crate) fn root() -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let package = PathBuf::from(package);
    package.parent().map_or_else(|| package.clone(), Path::to_path_buf)
}

/// What cargo builds into: `target/`, unless the user configured another.
pub(crate) fn target() -> Result<PathBuf> {
    static TARGET: OnceLock<PathBuf> = OnceLock::new();
    if let Some(target) = TARGET.get() {
        return Ok(target.clone());
    }
    let mut command = Command::new("cargo");
    command.args(["metadata", "--no-deps", "--format-version", "1"]).current_dir(root());
    let metadata: serde_json::Value = serde_json::from_str(&run::output(&mut command)?)?;
    let target = metadata["target_directory"].as_str().context("cargo metadata names no target directory")?;
    Ok(TARGET.get_or_init(|| target.into()).clone())
}

/// A folder of xtask's own under the target folder, made when it is not there.
pub(crate) fn own(name: &str) -> Result<PathBuf> {
    let path = target()?.join("xtask").join(name);
    fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
    Ok(path)
}

/// A fresh, empty folder for one run of a machine. Folders of old runs are removed.
pub(crate) fn fresh_run() -> Result<PathBuf> {
    let runs = own("runs")?;
    let mut numbers: Vec<u64> =
        fs::read_dir(&runs)?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    numbers.sort_unstable();
    if let Some(old) = numbers.len().checked_sub(RUNS_KEPT) {
        for number in &numbers[..old] {
            // Another xtask may be removing it too.
            let _ = fs::remove_dir_all(runs.join(number.to_string()));
        }
    }
    let mut number = numbers.last().map_or(1, |last| last + 1);
    loop {
        let path = runs.join(number.to_string());
        match fs::create_dir(&path) {
            Ok(()) => return Ok(path),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
            Err(error) => return Err(error).with_context(|| format!("cannot make {}", path.display())),
        }
    }
}
