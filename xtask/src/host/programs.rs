//! The programs that a task needs, and the Debian packages they come in.
//!
//! Nothing is installed without consent: a yes on a terminal, `--yes`, or `CI` in the environment.

use super::run;
use crate::screen;
use anyhow::{Context, Result, bail};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Something that must be there, and the package that brings it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Need {
    /// A program's name, or the absolute path of a file.
    pub(crate) what: &'static str,
    /// The Debian package.
    pub(crate) package: &'static str,
}

/// The emulator.
pub(crate) const QEMU: Need = Need { what: "qemu-system-x86_64", package: "qemu-system-x86" };
/// The C compiler, which also drives assembler and linker.
pub(crate) const GCC: Need = Need { what: "gcc", package: "gcc" };
/// The linker and its kind.
pub(crate) const BINUTILS: Need = Need { what: "ld", package: "binutils" };
/// Headers and libraries of C, the static ones included.
pub(crate) const LIBC: Need = Need { what: "/usr/include/stdlib.h", package: "libc6-dev" };
/// The other emulator, and the firmware that it starts.
pub(crate) const BOCHS: [Need; 3] = [
    Need { what: "bochs", package: "bochs" },
    Need { what: "/usr/share/bochs/BIOS-bochs-latest", package: "bochsbios" },
    Need { what: "/usr/share/bochs/VGABIOS-lgpl-latest", package: "vgabios" },
];
/// What makes an image that boots by GRUB.
pub(crate) const GRUB: [Need; 4] = [
    Need { what: "grub-mkrescue", package: "grub-common" },
    Need { what: "/usr/lib/grub/i386-pc/boot.img", package: "grub-pc-bin" },
    Need { what: "xorriso", package: "xorriso" },
    Need { what: "mformat", package: "mtools" },
];
/// The model checker.
pub(crate) const SPIN: Need = Need { what: "spin", package: "spin" };

/// The oldest emulator whose behaviour is known.
const QEMU_MINIMUM: (u32, u32) = (7, 2);

/// Whether missing packages may be installed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Consent {
    /// They may.
    Given,
    /// Ask on the terminal; without one, no.
    Ask,
}

impl Consent {
    /// From `--yes` and the environment's `CI`, which counts when it is set to anything but nothing, 0 or false.
    pub(crate) fn new(yes: bool) -> Self {
        let ci = std::env::var("CI").unwrap_or_default();
        if yes || !matches!(ci.as_str(), "" | "0" | "false") { Self::Given } else { Self::Ask }
    }
}

fn is_there(need: &Need) -> bool {
    if need.what.starts_with('/') { Path::new(need.what).exists() } else { run::find(need.what).is_some() }
}

/// Makes sure that everything in `needs` is there, or says how to get it.
pub(crate) fn require(needs: &[Need], consent: Consent) -> Result<()> {
    let missing: Vec<&Need> = needs.iter().filter(|need| !is_there(need)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|need| need.what).collect();
    let names = names.join(", ");
    if run::find("apt-get").is_none() {
        bail!("{names} not found; this machine has no apt-get: install them with its own package manager");
    }
    let install = install_command(&missing)?;
    screen::warn(format_args!("{names} not found; to install:\n    {}", run::describe(&install)));
    if consent == Consent::Ask && !ask("Install now? [y/N] ")? {
        bail!("{names} not found");
    }
    if run::status_aside(&mut administrator(&["apt-get", "update"])?).is_err() {
        screen::warn("apt-get update failed; trying with the lists that are there");
    }
    run::status_aside(&mut install_command(&missing)?)?;
    match missing.iter().find(|need| !is_there(need)) {
        Some(need) => bail!("{} is still not there after installing {}", need.what, need.package),
        None => Ok(()),
    }
}

fn install_command(missing: &[&Need]) -> Result<Command> {
    let mut words = vec!["apt-get", "install", "-y", "--no-install-recommends"];
    words.extend(missing.iter().map(|need| need.package));
    administrator(&words)
}

/// A command that runs as root: as it is for root, else through sudo.
fn administrator(words: &[&str]) -> Result<Command> {
    let root = run::output(Command::new("id").arg("-u"))?.trim() == "0";
    let mut command = if root {
        let mut command = Command::new("env");
        command.arg("DEBIAN_FRONTEND=noninteractive");
        command
    } else {
        let mut command = Command::new("sudo");
        command.args(["env", "DEBIAN_FRONTEND=noninteractive"]);
        command
    };
    command.args(words);
    Ok(command)
}

/// Asks on the terminal; no terminal is a no.
fn ask(question: &str) -> Result<bool> {
    if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        screen::note("no terminal to ask on; --yes installs without asking");
        return Ok(false);
    }
    eprint!("{question}");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// The emulator's path and version, installed when missing and checked against the oldest that is known to work.
pub(crate) fn emulator(consent: Consent) -> Result<(PathBuf, String)> {
    require(&[QEMU], consent)?;
    let path = run::find(QEMU.what).context("qemu-system-x86_64 not found")?;
    let text = run::output(Command::new(&path).arg("--version"))?;
    let version = qemu_version(&text).with_context(|| {
        format!("{} --version says `{}`", path.display(), text.lines().next().unwrap_or(""))
    })?;
    let (major, minor) = QEMU_MINIMUM;
    if (version.0, version.1) < QEMU_MINIMUM {
        bail!(
            "{} is version {}.{}; {major}.{minor} is the oldest that works",
            path.display(),
            version.0,
            version.1
        );
    }
    Ok((path, version.2))
}

/// Major and minor version, and the whole version word, from `qemu-system-x86_64 --version`.
fn qemu_version(text: &str) -> Option<(u32, u32, String)> {
    let word = text.split_whitespace().skip_while(|&word| word != "version").nth(1)?;
    let mut numbers = word.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?, word.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_emulator_s_version_is_read() {
        let text =
            "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) 2003-2022\n";
        assert_eq!(qemu_version(text), Some((7, 2, "7.2.22".to_owned())));
        assert_eq!(qemu_version("QEMU emulator version 10.0.2"), Some((10, 0, "10.0.2".to_owned())));
        assert_eq!(qemu_version("something else"), None);
    }

    #[test]
    fn needs_are_programs_or_files() {
        assert!(is_there(&Need { what: "sh", package: "dash" }));
        assert!(is_there(&Need { what: "/", package: "base-files" }));
        assert!(!is_there(&Need { what: "/no/such/file", package: "none" }));
    }

    #[test]
    fn the_install_command_is_one_line_that_can_be_typed() {
        let command = install_command(&[&QEMU, &SPIN]).unwrap();
        let text = run::describe(&command);
        assert!(text.ends_with("apt-get install -y --no-install-recommends qemu-system-x86 spin"), "{text}");
    }
}
