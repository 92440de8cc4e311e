//! Steps that boot: `cargo xtask boot` as a user runs it, judged by its exit status and its JSON object.

use super::{Log, Step, this_program};
use crate::artifacts;
use crate::boot::record::{Churn, Record};
use crate::host::folders;
use crate::host::programs::Consent;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs::{self, File};
use std::io::Write;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};

/// The object that a boot ends with.
pub(crate) struct Ended {
    value: Value,
}

impl Ended {
    /// How the run ended, in one word.
    fn end(&self) -> &str {
        self.value["end"].as_str().unwrap_or("")
    }

    /// The whole sentence about it.
    fn message(&self) -> &str {
        self.value["message"].as_str().unwrap_or("")
    }

    /// The hypervisor's record.
    pub(crate) fn record(&self) -> Record {
        Record::new(self.value["record"].clone())
    }

    /// How long the emulator ran, in seconds.
    pub(crate) fn wall_seconds(&self) -> f64 {
        self.value["wall_seconds"].as_f64().unwrap_or(f64::INFINITY)
    }

    /// The registers that the monitor showed.
    fn registers(&self) -> &str {
        self.value["registers"].as_str().unwrap_or("")
    }
}

/// Boots with these words and demands this exit status.
pub(crate) fn boot(log: &mut Log, words: &[String], status: i32) -> Result<Ended> {
    let (ended, found) = boot_to_any_end(log, words)?;
    ensure!(found.code() == Some(status), "{found} instead of status {status}: {}", ended.message());
    Ok(ended)
}

/// Boots with these words; the object that it ends with, and its exit status.
fn boot_to_any_end(log: &mut Log, words: &[String]) -> Result<(Ended, ExitStatus)> {
    let mut command = Command::new(this_program()?);
    command.args(["boot", "--json", "--yes"]).args(words);
    log.start(&mut command)?.stdout(Stdio::piped());
    let output = command.spawn()?.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    writeln!(log.file, "{text}")?;
    let value: Value = serde_json::from_str(&text).context("the boot has printed no object")?;
    Ok((Ended { value }, output.status))
}

/// The words of a command line that holds no quotes.
pub(crate) fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

/// Boots with the words of a line; it must succeed and be sound.
pub(crate) fn good(log: &mut Log, line: &str) -> Result<Ended> {
    sound(boot(log, &words(line), 0)?)
}

/// What every good boot must show: a clean audit, and, where memory is scattered, no RAM frame whose number is that
/// of its guest page.
pub(crate) fn sound(ended: Ended) -> Result<Ended> {
    let record = ended.record();
    ensure!(record.audit_is_clean() == Some(true), "the audit is not clean: {}", record.raw()["audit"]);
    ensure!(
        record.number(&["ram", "frames_moved"]).is_some_and(|frames| frames > 0),
        "no RAM frame is mapped"
    );
    if record.text(&["layout"]) == Some("scattered") {
        let in_place = record.number(&["ram", "frames_in_place"]);
        ensure!(in_place == Some(0), "RAM frames with pfn = gfn: {in_place:?}");
    }
    Ok(ended)
}

/// The words of a boot that verifies half of its memory for so many seconds while 2000 pages a second move.
pub(crate) fn verifying(memory: &str, seed: u64, seconds: u32, more: &str) -> Vec<String> {
    let run = format!("stress-ng --vm 2 --vm-bytes 50% --verify --abort --timeout {seconds}s");
    let timeout = 60 + 6 * seconds;
    let line =
        format!("--churn 2000 --memory {memory} --seed {seed} --with stress-ng --timeout {timeout} {more}");
    let last = ["--append", "oops=panic softlockup_panic=1", "--run", &run].map(str::to_owned);
    [&words(&line)[..], &last].concat()
}

/// Boots with these words while pages move; it must succeed, be sound, and have kept its rate.
pub(crate) fn churned(log: &mut Log, words: &[String]) -> Result<()> {
    let ended = sound(boot(log, words, 0)?)?;
    let churn = Churn::of(&ended.record()).context("the record says nothing of pages that moved")?;
    ensure!(
        churn.kept_its_rate(),
        "{} moves a second were reached, {} were wanted",
        churn.reached,
        churn.wanted
    );
    ensure!(churn.mistakes == 0, "{} moves were made wrongly", churn.mistakes);
    Ok(())
}

/// stress-ng's status where a stressor has failed: found other memory than it wrote.
const STRESSOR_FAILED: u64 = 2;
/// A shell's statuses of programs that a signal ended: 128 and its number, of which there are 64.
const CRASHED: RangeInclusive<u64> = 129..=192;

/// Boots with these words while pages move wrongly. The guest must come to grief: a check of its memory that fails, a
/// crash of its own, or a standstill: without mistakes the same words end in a fifth of the time. What ends in any other
/// way has shown nothing.
pub(crate) fn ruined(log: &mut Log, words: &[String]) -> Result<()> {
    let (ended, _) = boot_to_any_end(log, words)?;
    ensure!(
        is_grief(ended.end(), ended.value["status"].as_u64(), ended.message()),
        "the guest has not noticed: {}",
        ended.message()
    );
    let churn = Churn::of(&ended.record()).context("the record says nothing of pages that moved")?;
    ensure!(churn.mistakes > 0, "no move was made wrongly: {}", ended.message());
    Ok(())
}

/// Whether a guest ends so because its memory was not what it should have been.
fn is_grief(end: &str, status: Option<u64>, message: &str) -> bool {
    match end {
        "value" => status.is_some_and(|status| status == STRESSOR_FAILED || CRASHED.contains(&status)),
        // A panic of Linux resets the machine.
        "reset" | "triple fault" | "timeout" => true,
        "hypervisor" => message.contains("interrupts off"),
        _ => false,
    }
}

/// A boot that must fail with this status, this word for its end, and a sentence that holds this text.
struct Bad {
    name: &'static str,
    words: fn() -> Result<Vec<String>>,
    status: i32,
    end: &'static str,
    says: &'static str,
}

/// The boots that must come to a clear end other than success, and the one that only looks like such.
pub(crate) fn ends() -> Vec<Step> {
    let bad = [
        Bad {
            name: "ends: a kernel without an initrd resets",
            words: || Ok(words("--initrd none --memory 256M")),
            status: 111,
            end: "reset",
            says: "reset",
        },
        Bad {
            name: "ends: a file that is no kernel",
            words: || {
                let file = file("no-kernel", |file| file.write_all(&[0x5A; 10_000]))?;
                Ok([&words("--initrd none --memory 64M")[..], &["--kernel".into(), file]].concat())
            },
            status: 113,
            end: "hypervisor",
            says: "not a kernel",
        },
        Bad {
            name: "ends: an initrd too large for the guest",
            words: || {
                let file = file("large-initrd", |file| file.set_len(200 << 20))?;
                Ok([&words("--memory 128M")[..], &["--initrd".into(), file]].concat())
            },
            status: 113,
            end: "hypervisor",
            says: "initrd too large",
        },
        Bad {
            name: "ends: 16 MiB of memory",
            words: || Ok(words("--memory 16M")),
            status: 113,
            end: "hypervisor",
            says: "memory too small",
        },
        Bad {
            name: "ends: a truncated ELF",
            words: || {
                let whole = fs::read(artifacts::payload(Consent::Ask)?)?;
                let file = file("truncated.elf", |file| file.write_all(&whole[..9000]))?;
                Ok([&words("--memory 64M")[..], &["--guest".into(), file]].concat())
            },
            status: 113,
            end: "hypervisor",
            says: "truncated",
        },
        Bad {
            name: "ends: triple fault",
            words: || guest("triple-fault", ""),
            status: 112,
            end: "triple fault",
            says: "triple fault",
        },
        Bad {
            name: "ends: a guest that halts for ever while pages move",
            words: || guest("halted", "--churn 1"),
            status: 113,
            end: "hypervisor",
            says: "interrupts off",
        },
        Bad {
            name: "ends: shutdown",
            words: || guest("shutdown", ""),
            status: 110,
            end: "shutdown",
            says: "shutdown",
        },
        Bad { name: "ends: reset", words: || guest("reset", ""), status: 111, end: "reset", says: "0xCF9" },
        Bad {
            name: "ends: a value beyond 255",
            words: || guest("value", ""),
            status: 255,
            end: "value",
            says: "300",
        },
        Bad {
            name: "ends: a value when a text is expected",
            words: || guest("panic-text", "--expect nobody-says-this"),
            status: 115,
            end: "not seen",
            says: "expected text",
        },
    ];
    let mut steps: Vec<Step> = bad.into_iter().map(Bad::step).collect();
    steps.push(Step::new("ends: a guest that never ends", |log| {
        let ended = boot(log, &guest("endless", "--timeout 5")?, 124)?;
        ensure!(ended.end() == "timeout", "the end is `{}`", ended.end());
        ensure!(ended.registers().contains("EIP=00100020"), "the guest's registers are not shown");
        ensure!(ended.registers().contains("hypervisor, at its last entry"), "nor are the hypervisor's");
        let exits = ended.record().last_exits();
        ensure!(
            exits.iter().any(|exit| exit.name == "nested_fault"),
            "the last exits are not shown: {exits:?}"
        );
        Ok(())
    }));
    steps.push(Step::new("ends: panic text of a healthy guest is a success", |log| {
        let ended = boot(log, &guest("panic-text", "")?, 0)?;
        ensure!(ended.end() == "value", "the end is `{}`", ended.end());
        Ok(())
    }));
    steps.push(Step::new("ends: an expected text is a success", |log| {
        let ended = boot(log, &guest("panic-text", "--expect not-syncing:")?, 115);
        ended.context("a text that is not there was seen")?;
        let words = [&guest("panic-text", "")?[..], &["--expect".into(), "not syncing: VFS".into()]].concat();
        let ended = boot(log, &words, 0)?;
        ensure!(ended.end() == "seen", "the end is `{}`", ended.end());
        Ok(())
    }));
    steps
}

impl Bad {
    fn step(self) -> Step {
        Step::new(self.name, move |log| {
            let ended = boot(log, &(self.words)()?, self.status)?;
            ensure!(ended.end() == self.end, "the end is `{}`, not `{}`", ended.end(), self.end);
            ensure!(ended.message().contains(self.says), "`{}` does not say {}", ended.message(), self.says);
            Ok(())
        })
    }
}

/// A guest that halts while the hypervisor's timer ticks ten times as often as its own.
pub(crate) fn halts(log: &mut Log) -> Result<()> {
    churned(log, &guest("halts", "--churn 2000")?)
        .context("a HLT has ended without an interrupt, or a page moved late")
}

/// A guest that never ends, under a timer whose NMIs must not be taken for the one that asks for the record.
pub(crate) fn endless(log: &mut Log) -> Result<()> {
    let ended = boot(log, &guest("endless", "--churn 100 --timeout 3")?, 124)?;
    ensure!(Churn::of(&ended.record()).is_some(), "the record was not to be had");
    Ok(())
}

/// The words that boot one of the small guests.
fn guest(name: &str, more: &str) -> Result<Vec<String>> {
    let file = artifacts::end(name, Consent::Ask)?;
    let file = file.to_str().context("the target folder's path is no UTF-8")?.to_owned();
    Ok([&words("--memory 32M")[..], &words(more), &["--guest".into(), file]].concat())
}

/// A file for a test; its path.
fn file(name: &str, fill: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<String> {
    let path: PathBuf = folders::own("guests")?.join(name);
    fill(&mut File::create(&path)?).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path.to_str().context("the target folder's path is no UTF-8")?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_ruined_memory_does_is_grief() {
        assert!(is_grief("reset", Some(111), "") && is_grief("triple fault", Some(112), ""));
        assert!(is_grief("timeout", Some(124), ""));
        assert!(is_grief("value", Some(2), "") && is_grief("value", Some(139), ""));
        assert!(is_grief("hypervisor", Some(113), "the guest halts with interrupts off"));
        for (end, status, message) in [
            ("value", 0, ""),
            ("value", 1, ""),
            ("value", 7, ""),
            ("value", 255, ""),
            ("hypervisor", 113, "memory too small"),
            ("emulator", 114, ""),
            ("slow", 116, ""),
            ("shutdown", 110, ""),
        ] {
            assert!(!is_grief(end, Some(status), message), "{end} {status}");
        }
        assert!(!is_grief("value", None, ""));
    }
}
