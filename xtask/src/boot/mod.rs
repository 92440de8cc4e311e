//! `cargo xtask boot`: a guest under the hypervisor, from files to a verdict.

pub(crate) mod kernel;
pub(crate) mod listener;
pub(crate) mod options;
pub(crate) mod outcome;
mod postmortem;
pub(crate) mod record;
mod summary;

use crate::artifacts;
use crate::host::apt::Apt;
use crate::host::folders;
use crate::host::programs::{self, Consent};
use crate::initrd::{self, Task};
use crate::qemu::command::{self, Machine};
use crate::qemu::machine::{Running, Stop};
use crate::screen;
use crate::units;
use anyhow::{Context, Result, ensure};
use listener::Ears;
use options::Options;
use outcome::Outcome;
use record::{Churn, Record};
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The command line that every Linux guest gets: console on the first serial port, a panic restarts the machine at
/// once, addresses are the same in every run.
const LINUX_LINE: &str = "console=ttyS0 panic=-1 nokaslr";
/// Memory of the machine that is not the guest's, whatever its size: the hypervisor's image, firmware, and room
/// between the frames that a scattered layout picks.
const OVERHEAD: u64 = 128 << 20;
/// What the hypervisor's heap and tables may take, as a part of the guest's memory.
const OVERHEAD_PART: u64 = 16;
/// How long the hypervisor may take to write its record when it is asked to.
const RECORD_PATIENCE: Duration = Duration::from_secs(5);

/// All that is known about a run.
#[derive(Debug)]
pub(crate) struct Report {
    /// How it ended.
    pub(crate) outcome: Outcome,
    /// The hypervisor's record, if it came to write one.
    pub(crate) record: Option<Record>,
    /// Lines that the guest wrote to port 0xE9.
    pub(crate) texts: Vec<String>,
    /// When user space was reached, from the emulator's start.
    pub(crate) user_space: Option<Duration>,
    /// How long the emulator ran.
    pub(crate) wall: Duration,
    /// What the monitor showed of guest and host when the run had to be stopped.
    pub(crate) registers: Option<String>,
    /// The last exits, oldest first, where they are known and of interest.
    pub(crate) last_exits: Vec<record::Exit>,
    /// What was booted, in words.
    pub(crate) guest: String,
    /// The emulator's version.
    pub(crate) emulator: String,
    /// Where the logs are.
    pub(crate) folder: PathBuf,
}

/// Runs the command and returns xtask's exit status.
pub(crate) fn command(options: &Options) -> Result<u8> {
    let report =
        if options.json { run(options, std::io::stderr())? } else { run(options, std::io::stdout())? };
    summary::print(&report, options);
    if options.json {
        println!("{}", report.to_json(options));
    }
    Ok(report.outcome.status())
}

/// Boots what the options say and follows it to its end. What the guest says goes to `console` as it comes.
pub(crate) fn run(options: &Options, console: impl Write) -> Result<Report> {
    let consent = Consent::new(options.yes);
    let (emulator, version) = programs::emulator(consent)?;
    screen::note(format_args!("QEMU {version}"));
    let image = if let Some(file) = &options.image {
        fs::canonicalize(file).with_context(|| format!("cannot find {}", file.display()))?
    } else {
        programs::require(&[programs::GCC, programs::BINUTILS], consent)?;
        artifacts::hypervisor(options.churn_fault.is_some())?
    };
    let folder = folders::fresh_run()?;
    let (guest, modules) = prepare_guest(options, consent, &folder)?;
    // A copy: while this runs, another image may be built in its place.
    fs::copy(&image, folder.join(command::IMAGE))
        .with_context(|| format!("cannot read {}", image.display()))?;
    let machine = Machine {
        cpu: options.cpu_model(),
        memory_mib: machine_memory_mib(options.memory, &folder)?,
        icount: options.icount,
        timer: options.churn.is_some(),
        line: options.hypervisor_line(),
        modules,
        extra: command::split_words(&options.qemu).map_err(anyhow::Error::msg)?,
    };
    screen::note(format_args!(
        "{guest}, {} of memory, {}, {}",
        units::size(options.memory),
        options.layout.word(),
        options.cpu_model()
    ));

    let mut ears = Ears::new(console, options.expect.as_deref());
    let mut running = Running::start(&emulator, &machine, &folder)?;
    let stop = running.follow(options.timeout, &mut ears)?;
    let wall = running.elapsed();
    let mut found = None;
    if matches!(stop, Stop::TimeUp | Stop::Interrupted) {
        found = Some(postmortem::look(&mut running, ears.state.as_ref()));
    }
    if !matches!(stop, Stop::Ended(_))
        && postmortem::ask_for_record(&mut running, ears.state.as_ref()).is_ok()
    {
        running.follow(running.elapsed() + RECORD_PATIENCE, &mut ears)?;
    }
    let said = running.said();
    let cause = running.end();
    ears.finish_line();
    let outcome = judge(stop, options, ears.record.as_ref(), cause.as_deref(), &said);
    let (registers, found_exits) = found.map(|found| (found.registers, found.last_exits)).unzip();
    // The record names the exits; the ring that the monitor reads has codes alone.
    let last_exits = ears.record.as_ref().map(Record::last_exits).filter(|exits| !exits.is_empty());
    let last_exits = last_exits.or(found_exits).unwrap_or_default();
    Ok(Report {
        outcome,
        record: ears.record,
        texts: ears.texts,
        user_space: ears.user_space,
        wall,
        registers,
        last_exits,
        guest,
        emulator: version,
        folder,
    })
}

/// What the end of the emulator means.
fn judge(stop: Stop, options: &Options, record: Option<&Record>, cause: Option<&str>, said: &str) -> Outcome {
    let status = match stop {
        Stop::Heard => return Outcome::Seen(options.expect.clone().unwrap_or_default()),
        Stop::TimeUp => return Outcome::Timeout(options.timeout),
        Stop::Interrupted => return Outcome::Interrupted,
        Stop::Ended(status) => status,
    };
    match record.and_then(Record::outcome) {
        Some(Outcome::Value(value)) if options.expect.is_some() => Outcome::NotSeen(value),
        Some(Outcome::Value(0)) => match record.and_then(Churn::of).filter(|churn| !churn.kept_its_rate()) {
            Some(churn) => Outcome::Slow(churn.reached, churn.wanted),
            None => Outcome::Value(0),
        },
        Some(outcome) => outcome,
        None => {
            let why = match cause {
                Some("guest-reset") => {
                    "the machine was reset without the hypervisor's doing (a triple fault of its own?)"
                }
                Some("guest-shutdown") => "the machine was switched off without the hypervisor's doing",
                _ => "the hypervisor left no record",
            };
            Outcome::Emulator(format!("{why}; {status} {said}").trim_end().to_owned())
        }
    }
}

/// Puts the guest's files into the run's folder. Returns what it is and the modules' command lines.
fn prepare_guest(options: &Options, consent: Consent, folder: &Path) -> Result<(String, Vec<String>)> {
    let [guest, initrd] = command::MODULES.map(|name| folder.join(name));
    if let Some(file) = &options.guest {
        place(file, &guest)?;
        let mut modules = vec![options.append.clone()];
        if let Some(file) = options.initrd.as_ref().filter(|_| !options.no_initrd()) {
            place(file, &initrd)?;
            modules.push(String::new());
        }
        return Ok((format!("multiboot image {}", file.display()), modules));
    }
    let own_initrd = options.initrd.is_none();
    let mut apt = if own_initrd || options.kernel.is_none() { Some(Apt::open()?) } else { None };
    let name = match (&options.kernel, &mut apt) {
        (None, Some(apt)) => {
            let (file, name) = kernel::fetch(apt)?;
            place(&file, &guest)?;
            name
        }
        (file, _) => {
            let file = file.as_ref().context("no kernel")?;
            place(file, &guest)?;
            format!("kernel {}", file.display())
        }
    };
    let mut modules = vec![format!("{LINUX_LINE} {}", options.append).trim_end().to_owned()];
    match (&options.initrd, &mut apt) {
        (None, Some(apt)) => {
            let task = match &options.run {
                Some(command) => Task::Run(command.clone()),
                None => Task::File { bytes: options.memory / 4, seed: options.seed },
            };
            initrd::build(apt, &options.with, &task, consent, &initrd)?;
            modules.push(String::new());
        }
        (Some(file), _) if !options.no_initrd() => {
            place(file, &initrd)?;
            modules.push(String::new());
        }
        _ => {}
    }
    Ok((name, modules))
}

/// Makes `file` available under a name that needs no escaping.
fn place(file: &Path, name: &Path) -> Result<()> {
    let file = fs::canonicalize(file).with_context(|| format!("cannot find {}", file.display()))?;
    ensure!(file.is_file(), "{} is no file", file.display());
    fs::File::open(&file).with_context(|| format!("cannot read {}", file.display()))?;
    std::os::unix::fs::symlink(&file, name).with_context(|| format!("cannot make {}", name.display()))
}

/// Memory of a machine that holds the guest, the modules as the loader leaves them, and the hypervisor.
fn machine_memory_mib(guest: u64, folder: &Path) -> Result<u64> {
    let mut bytes = guest.saturating_add(guest / OVERHEAD_PART).saturating_add(OVERHEAD);
    for name in command::MODULES {
        let file = folder.join(name);
        if file.exists() {
            bytes = bytes.saturating_add(file.metadata()?.len());
        }
    }
    Ok(bytes.div_ceil(1 << 20))
}

impl Report {
    /// The report as one object for programs.
    pub(crate) fn to_json(&self, options: &Options) -> Value {
        json!({
            "end": self.outcome.name(),
            "message": self.outcome.to_string(),
            "status": self.outcome.status(),
            "guest": self.guest,
            "mode": options.mode.word(),
            "memory": options.memory,
            "layout": options.layout.word(),
            "seed": options.seed,
            "cpu": options.cpu_model(),
            "icount": options.icount,
            "churn": self.record.as_ref().and_then(Churn::of).map(Churn::to_json),
            "emulator": self.emulator,
            "wall_seconds": self.wall.as_secs_f64(),
            "user_space_seconds": self.user_space.map(|time| time.as_secs_f64()),
            "record": self.record.as_ref().map(Record::raw),
            "registers": self.registers,
            "folder": self.folder,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn options(words: &[&str]) -> Options {
        Line::try_parse_from([&["boot"], words].concat()).unwrap().options
    }

    fn ended() -> Stop {
        Stop::Ended(ExitStatus::from_raw(0x100))
    }

    #[test]
    fn the_record_decides_and_its_absence_is_a_failure() {
        let zero = Record::new(json!({ "end": "value", "value": 0 }));
        let plain = options(&[]);
        assert_eq!(judge(ended(), &plain, Some(&zero), None, ""), Outcome::Value(0));
        assert!(matches!(judge(ended(), &plain, None, Some("guest-reset"), ""), Outcome::Emulator(_)));
        assert!(matches!(judge(ended(), &plain, None, None, ""), Outcome::Emulator(_)));
        assert_eq!(judge(Stop::TimeUp, &plain, Some(&zero), None, ""), Outcome::Timeout(plain.timeout));
        assert_eq!(judge(Stop::Interrupted, &plain, None, None, ""), Outcome::Interrupted);
    }

    #[test]
    fn a_rate_that_was_not_kept_is_a_failure() {
        let churn = |reached| {
            let churn = json!({ "wanted": 1000, "reached": reached, "moves": 1, "pages": 1, "blocks": 0,
                                "broken_up": 0, "mistakes": 0 });
            Record::new(json!({ "end": "value", "value": 0, "churn": churn }))
        };
        let plain = options(&[]);
        assert_eq!(judge(ended(), &plain, Some(&churn(899)), None, ""), Outcome::Slow(899, 1000));
        assert_eq!(judge(ended(), &plain, Some(&churn(900)), None, ""), Outcome::Value(0));
    }

    #[test]
    fn where_a_text_is_expected_only_the_text_is_success() {
        let zero = Record::new(json!({ "end": "value", "value": 0 }));
        let expecting = options(&["--expect", "ready"]);
        assert_eq!(judge(Stop::Heard, &expecting, None, None, ""), Outcome::Seen("ready".into()));
        assert_eq!(judge(ended(), &expecting, Some(&zero), None, ""), Outcome::NotSeen(0));
    }
}
