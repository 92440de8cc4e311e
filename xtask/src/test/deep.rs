//! The steps that take long: each of the project's claims at its full figure, and all models.

use super::boots::{boot, churned, good, ruined, sound, verifying, words};
use super::{Log, Step, quick};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Seconds within which Linux must have run to its end.
const BOOT_LIMIT: f64 = 60.0;
/// Lines of the payload that must cost less than a third of KVM's.
const UNDER_A_THIRD: [&str; 3] = ["exit_hypercall", "touch4k_fault", "touch2m_fault"];

/// The steps, in the order of the claims.
pub(crate) fn steps() -> Vec<Step> {
    let mut steps: Vec<Step> = (1..=5)
        .map(|number| {
            Step::new(format!("deep: Linux to user space in under 60 s, {number} of 5"), |log: &mut Log| {
                let ended = good(log, "")?;
                let seconds = ended.wall_seconds();
                ensure!(seconds < BOOT_LIMIT, "it took {seconds:.1} s");
                Ok(())
            })
        })
        .collect();
    for (name, line) in [
        ("deep: Linux with 256 MiB", "--memory 256M"),
        ("deep: Linux with 2 GiB", "--memory 2G"),
        ("deep: Linux in contiguous memory", "--layout contiguous"),
        ("deep: Linux, five-level host tables, 1 GiB", "--cpu max"),
        ("deep: Linux, four-level host tables on a processor with five", "--cpu max --hypervisor levels=4"),
        ("deep: Linux, another seed", "--seed 20260101"),
    ] {
        steps.push(Step::new(name, move |log| good(log, line).map(drop)));
    }
    steps.push(Step::new("deep: stress-ng verifies its memory", |log| {
        let run = "stress-ng --vm 2 --vm-bytes 60% --verify --timeout 20s";
        let words = [&words("--with stress-ng --timeout 600 --run")[..], &[run.to_owned()]].concat();
        sound(boot(log, &words, 0)?).map(drop)
    }));
    steps.push(Step::new("deep: churn, 1 GiB verified while 2000 pages a second move", |log| {
        churned(log, &churn("1G", 1, ""))
    }));
    for seed in 1..=5 {
        let name = format!("deep: churn, memory verified while 2000 pages a second move, seed {seed}");
        steps.push(Step::new(name, move |log: &mut Log| churned(log, &churn("256M", seed, ""))));
    }
    let faults = [("skip", "one invalidation in a hundred skipped"), ("early-copy", "copied one exit early")];
    for (fault, what) in faults {
        for seed in 1..=5 {
            let more = format!("--churn-fault {fault}");
            let name = format!("deep: churn, {what}: noticed, seed {seed}");
            steps.push(Step::new(name, move |log: &mut Log| ruined(log, &churn("256M", seed, &more))));
        }
    }
    steps.push(Step::new("deep: a Linux guest that prints panic text is healthy", |log| {
        let run = "echo 'Kernel panic - not syncing: Attempted to kill init!'";
        boot(log, &[&words("--memory 256M --run")[..], &[run.to_owned()]].concat(), 0).map(drop)
    }));
    steps.push(Step::new("deep: a Linux guest's status is the boot's", |log| {
        boot(log, &[&words("--memory 256M --run")[..], &["exit 42".to_owned()]].concat(), 42).map(drop)
    }));
    steps.push(Step::new("deep: the payload twice, identical, under a third of KVM", |log| {
        let object = quick::payload(log, "bench payload --repeat --json --yes")?;
        ensure!(object["identical"] == true, "the second run differs");
        quick::all_lines(&object)?;
        UNDER_A_THIRD.iter().try_for_each(|name| under_a_third(&object, name))
    }));
    steps.push(Step::xtask(
        "deep: ten million simulated steps over ten thousand seeds, everything covered a thousand times",
        "sim --floor 1000",
    ));
    steps.push(Step::xtask(
        "deep: walks: the model agrees with QEMU's processor, a million times",
        "walks --walks 1000000 --seed 2 --yes",
    ));
    steps.push(Step::xtask(
        "deep: walks: the model agrees with Bochs' processors, a hundred thousand times",
        "walks --engine bochs --walks 100000 --seed 2 --yes",
    ));
    steps.push(Step::cargo(
        "deep: ten thousand rounds against the library, optimised",
        "test --release --package vmmu --test history --locked",
    ));
    steps.push(Step::cargo(
        "deep: the library's tests without std",
        "test --package vmmu --no-default-features --lib --tests --locked",
    ));
    steps.push(Step::xtask("deep: formatting, lints and documentation", "lint"));
    steps.push(Step::xtask("deep: each rule broken, on each of ten seeds", "mutants"));
    steps.push(Step::xtask("deep: every model of the protocols", "models all --yes"));
    steps
}

/// The words that boot Linux with memory that is written and verified while pages move. A kernel that finds itself
/// damaged ends at once, and so does the first check that fails.
fn churn(memory: &str, seed: u64, more: &str) -> Vec<String> {
    verifying(memory, seed, 40, more)
}

/// Demands that a line's figure is less than a third of KVM's.
fn under_a_third(object: &Value, name: &str) -> Result<()> {
    let lines = object["lines"].as_array().into_iter().flatten();
    let line =
        lines.into_iter().find(|line| line["name"] == name).with_context(|| format!("no line {name}"))?;
    let figure = |side: &str| line[side]["p50"].as_u64().with_context(|| format!("{name} has no median"));
    let (ours, kvm) = (figure("ours")?, figure("kvm")?);
    ensure!(ours * 3 < kvm, "{name}: {ours} is not under a third of {kvm}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_third_is_a_third() {
        let object =
            |ours: u64| json!({ "lines": [{ "name": "x", "ours": { "p50": ours }, "kvm": { "p50": 900 } }] });
        assert!(under_a_third(&object(299), "x").is_ok());
        assert!(under_a_third(&object(300), "x").is_err());
        assert!(under_a_third(&object(1), "y").is_err());
    }
}
