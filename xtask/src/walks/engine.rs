//! The emulators, what each is asked to walk, and one run of the payload on one of them.
//!
//! QEMU loads the payload itself; Bochs boots it by GRUB. On both the report goes through port 0xE9 into a file.

use crate::artifacts::Width;
use crate::host::programs::{self, Consent};
use crate::host::run;
use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// The file in a run's folder with what came out of port 0xE9.
pub(crate) const REPORT: &str = "report";

/// Whose processor.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Debug)]
pub(crate) enum Engine {
    /// QEMU's TCG
    Qemu,
    /// Bochs
    Bochs,
}

/// One mode of one processor.
#[derive(Debug)]
pub(crate) struct Plan {
    /// As `--mode` takes it.
    pub(crate) mode: &'static str,
    /// As the payload takes it: the levels; those of nested tables in bits 7:4.
    pub(crate) number: u32,
    pub(crate) width: Width,
    /// The emulator's name of the processor.
    pub(crate) cpu: &'static str,
    /// Whether its addresses reach past 4 GiB.
    wide: bool,
}

const fn plan(mode: &'static str, number: u32, width: Width, cpu: &'static str) -> Plan {
    Plan { mode, number, width, cpu, wide: true }
}

/// On QEMU. `pentium` has large pages and not PSE-36.
const QEMU: [Plan; 10] = [
    plan("32-bit", 2, Width::Bits32, "max"),
    Plan { wide: false, ..plan("pse", 2, Width::Bits32, "pentium") },
    plan("pae", 3, Width::Bits32, "max"),
    plan("4-level", 4, Width::Bits64, "max"),
    plan("5-level", 5, Width::Bits64, "max"),
    plan("npt-4-level", 0x44, Width::Bits64, "max"),
    plan("npt-5-level", 0x54, Width::Bits64, "max"),
    plan("npt-5-level-both", 0x55, Width::Bits64, "max"),
    plan("npt-pae", 0x43, Width::Bits64, "max"),
    plan("npt-32-bit", 0x42, Width::Bits64, "max"),
];

/// On Bochs: no model of version 2.7 has five levels, or lacks PSE-36. Ice Lake is the one with protection keys
/// that is known best, Ryzen the one with nested paging.
const BOCHS: [Plan; 7] = [
    plan("32-bit", 2, Width::Bits32, "corei7_icelake_u"),
    plan("pae", 3, Width::Bits32, "corei7_icelake_u"),
    plan("4-level", 4, Width::Bits64, "corei7_icelake_u"),
    plan("4-level-amd", 4, Width::Bits64, "ryzen"),
    plan("npt-4-level", 0x44, Width::Bits64, "ryzen"),
    plan("npt-pae", 0x43, Width::Bits64, "ryzen"),
    plan("npt-32-bit", 0x42, Width::Bits64, "ryzen"),
];

impl Engine {
    /// As `--engine` takes it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Bochs => "bochs",
        }
    }

    /// The version that its quirks are listed for.
    pub(crate) const fn listed(self) -> &'static str {
        match self {
            Self::Qemu => "QEMU 7.2",
            Self::Bochs => "Bochs 2.7",
        }
    }

    /// What it is asked for.
    pub(crate) const fn plans(self) -> &'static [Plan] {
        match self {
            Self::Qemu => &QEMU,
            Self::Bochs => &BOCHS,
        }
    }
}

impl Plan {
    /// The payload's command line; its numbers are hexadecimal.
    pub(crate) fn line(&self, seed: u64, first: u64, count: u64) -> String {
        let regions = if self.wide { 20 } else { 12 };
        let five = if self.number == 5 || self.number >> 4 == 5 { " la57" } else { "" };
        let number = self.number;
        format!("mode={number:x} seed={seed:x} first={first:x} count={count:x} regions={regions:x}{five}")
    }
}

/// An emulator that is there.
#[derive(Debug)]
pub(crate) struct Emulator {
    engine: Engine,
    path: PathBuf,
    version: String,
}

impl Emulator {
    /// Finds it, installed where the user agrees.
    pub(crate) fn find(engine: Engine, consent: Consent) -> Result<Self> {
        let (path, version) = match engine {
            Engine::Qemu => programs::emulator(consent)?,
            Engine::Bochs => {
                programs::require(&programs::BOCHS, consent)?;
                programs::require(&programs::GRUB, consent)?;
                let path = run::find("bochs").context("bochs not found")?;
                // It tells its version with whatever else it is asked.
                let text = run::output(Command::new(&path).args(["-help", "cpu"]))?;
                let version = version_of_bochs(&text).context("bochs does not tell its version")?;
                (path, version.to_owned())
            }
        };
        Ok(Self { engine, path, version })
    }

    /// Its name and version.
    pub(crate) fn version(&self) -> String {
        format!("{} {}", self.engine.name(), self.version)
    }

    /// Runs the payload in `folder`, for at most `limit`.
    pub(crate) fn run(
        &self,
        plan: &Plan,
        image: &Path,
        line: &str,
        folder: &Path,
        limit: Duration,
    ) -> Result<()> {
        let mut command = run::mortal(&self.path);
        command.current_dir(folder).stdin(Stdio::null()).process_group(0);
        match self.engine {
            Engine::Qemu => {
                command.args(qemu_words(plan).split(' ')).arg("-kernel").arg(image).args(["-append", line]);
                let said = File::create(folder.join("qemu.log"))?;
                command.stdout(said.try_clone()?).stderr(said);
            }
            Engine::Bochs => {
                grub_image(image, line, folder)?;
                fs::write(folder.join("bochsrc"), bochs_configuration(plan))?;
                // Its debugger is what the payload ends it by.
                fs::write(folder.join("commands"), "c\nq\n")?;
                command.args(["-q", "-f", "bochsrc", "-rc", "commands"]);
                command.stdout(File::create(folder.join(REPORT))?);
                command.stderr(File::create(folder.join("bochs.err"))?);
            }
        }
        let ended = run::status_within(&mut command, limit)?;
        ensure!(
            ended.is_some(),
            "{} on {} has not ended after {} s; its folder is {}",
            plan.mode,
            plan.cpu,
            limit.as_secs(),
            folder.display()
        );
        Ok(())
    }
}

fn version_of_bochs(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.trim().strip_prefix("Bochs x86 Emulator ")).map(str::trim)
}

/// QEMU's words but for the image and its line. Memory reaches past 4 GiB and costs what is touched of it.
fn qemu_words(plan: &Plan) -> String {
    let cpu = plan.cpu;
    format!(
        "-accel tcg -machine pc,smm=off,memory-backend=ram -object memory-backend-ram,id=ram,size=5G,reserve=off \
         -m 5G -smp 1 -cpu {cpu} -nodefaults -display none -no-reboot -seed 1 \
         -chardev file,id=report,path={REPORT} -device isa-debugcon,iobase=0xe9,chardev=report \
         -device isa-debug-exit,iobase=0xf4,iosize=4"
    )
}

/// A disc that boots the payload.
fn grub_image(image: &Path, line: &str, folder: &Path) -> Result<()> {
    let boot = folder.join("disc/boot");
    fs::create_dir_all(boot.join("grub"))?;
    fs::copy(image, boot.join("walks"))?;
    let menu = format!("set timeout=0\nmenuentry walks {{ multiboot /boot/walks {line}\nboot }}\n");
    fs::write(boot.join("grub/grub.cfg"), menu)?;
    let mut command = Command::new("grub-mkrescue");
    command.args(["-o", "disc.iso", "disc"]).current_dir(folder);
    run::output(&mut command).map(drop)
}

/// Bochs' configuration: no screen, no sound, files in the run's folder. Memory past 256 MiB lies in a file of
/// Bochs' own, and only what is touched of it.
fn bochs_configuration(plan: &Plan) -> String {
    let cpu = plan.cpu;
    let lines = [
        "config_interface: textconfig",
        "display_library: rfb, options=\"timeout=0\"",
        "romimage: file=/usr/share/bochs/BIOS-bochs-latest, options=fastboot",
        "vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest",
        "memory: guest=6144, host=256",
        &format!("cpu: model={cpu}, ips=50000000, reset_on_triple_fault=0"),
        "clock: sync=none, time0=946684800",
        "boot: cdrom",
        "sound: waveoutdrv=dummy, waveout=none, waveindrv=dummy, wavein=none, midioutdrv=dummy, midiout=none",
        "ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14",
        "ata0-master: type=cdrom, path=disc.iso, status=inserted",
        "port_e9_hack: enabled=1",
        "log: bochs.log",
        "panic: action=fatal",
        "error: action=ignore",
        "info: action=report",
        "debug: action=ignore",
    ];
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_s_numbers_are_hexadecimal() {
        let five = QEMU.iter().find(|plan| plan.mode == "npt-5-level").unwrap();
        assert_eq!(five.line(16, 0, 1000), "mode=54 seed=10 first=0 count=3e8 regions=14 la57");
        let narrow = QEMU.iter().find(|plan| plan.mode == "pse").unwrap();
        assert_eq!(narrow.line(1, 255, 1), "mode=2 seed=1 first=ff count=1 regions=c");
    }

    #[test]
    fn bochs_tells_its_version_in_its_banner() {
        let text = "====\n                        Bochs x86 Emulator 2.7\n              Built from\n";
        assert_eq!(version_of_bochs(text), Some("2.7"));
        assert_eq!(version_of_bochs("bochs"), None);
    }

    #[test]
    fn modes_have_names_of_their_own() {
        for engine in [Engine::Qemu, Engine::Bochs] {
            let mut names: Vec<&str> = engine.plans().iter().map(|plan| plan.mode).collect();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), engine.plans().len());
        }
    }
}
