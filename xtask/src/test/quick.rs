//! The steps of every test run: under fifteen minutes on two processors from a fresh clone.

use super::Step;
use super::boots;
use crate::bench;
use crate::boot::options::Mode;
use crate::host::folders;
use crate::lint;
use anyhow::{Result, ensure};
use serde_json::Value;

/// What does and does not need a flush, each shown by a program on the software machine.
const ARGUMENTS: [(&str, &str); 6] = [
    ("an EPT violation needs no INVEPT", "ept_violation_needs_no_invept"),
    ("a permission upgrade needs no flush", "permission_upgrade_needs_none"),
    ("a downgrade needs a flush", "downgrade_needs_flush"),
    ("a table replaced by a large page needs a flush", "table_replaced_by_large_page_needs_flush"),
    ("clearing accessed flags needs no flush", "clearing_accessed_needs_none"),
    (
        "freeing a table that only a speculative walk read needs a flush",
        "freeing_a_table_read_by_a_speculative_walk_needs_flush",
    ),
];

/// The steps, the cheapest first.
pub(crate) fn steps() -> Vec<Step> {
    let mut steps = vec![
        Step::cargo(
            "tests of every crate, documentation's examples included",
            format!("test --workspace {} --locked", lint::without_simulation()),
        ),
        Step::cargo(
            "simulation: histories pass and repeat, broken rules are noticed",
            format!("test --release {} --locked", lint::simulation()),
        ),
        Step::xtask("each rule of the library broken once, and noticed", "mutants --seeds 1"),
        Step::xtask(
            "simulation: fifteen hundred seeds, everything covered fifty times",
            "sim --seeds 1500 --floor 50",
        ),
        Step::cargo(
            "one preemption at every atomic access of every operation",
            "test --package vmmu --features instrument,mutants --test preempted --locked",
        ),
        Step::xtask("the library's protocols, explored by loom", "loom"),
        Step::cargo("the library builds without std", "check --package vmmu --no-default-features --locked"),
        Step::cargo(
            "the example that embeds the library runs",
            "run --package vmmu --example embed --locked",
        ),
        Step::cargo(
            "the published crates can be packaged",
            "package --package vmmu --package vmmu-emulate --package vmmu-machine --no-verify --allow-dirty --locked",
        ),
        Step::new("boot: Linux, scattered memory, 1 GiB", |log| boots::good(log, "").map(drop)),
        Step::new("boot: Linux, five-level host tables", |log| {
            let record = boots::good(log, "--cpu max --memory 256M")?.record();
            ensure!(
                record.number(&["levels"]) == Some(5),
                "the tables have {:?} levels",
                record.number(&["levels"])
            );
            Ok(())
        }),
    ];
    steps.push(Step::new("churn: Linux while 2000 pages a second move", |log| {
        boots::churned(log, &boots::words("--churn 2000 --memory 256M"))
    }));
    steps.push(Step::new("churn: the timer wakes no guest that halts", boots::halts));
    steps.push(Step::new("churn: a guest that never ends is asked for its record", boots::endless));
    steps.push(Step::new("churn: one invalidation in a hundred skipped, and noticed", |log| {
        boots::ruined(log, &boots::verifying("256M", 1, 20, "--churn-fault skip"))
    }));
    steps.push(Step::xtask(
        "walks: the model agrees with QEMU's processor, twenty thousand times",
        "walks --walks 20000 --json --yes",
    ));
    steps.extend(ARGUMENTS.map(|(question, example)| {
        Step::cargo(question, format!("run --package vmmu-machine --example {example} --locked"))
    }));
    steps.extend(boots::ends());
    steps.push(Step::new("bench: the payload runs to its end", |log| {
        let lines = payload(log, "bench payload --json --yes")?;
        all_lines(&lines)
    }));
    steps
}

/// Runs the payload with these words and returns the object it ends with.
pub(crate) fn payload(log: &mut super::Log, line: &str) -> Result<Value> {
    let mut command = std::process::Command::new(super::this_program()?);
    command.args(line.split(' '));
    log.start(&mut command)?.stdout(std::process::Stdio::piped());
    let output = command.spawn()?.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    std::io::Write::write_all(&mut log.file, text.as_bytes())?;
    ensure!(output.status.success(), "the payload: {}", output.status);
    Ok(serde_json::from_str(&text)?)
}

/// Demands every line of the payload that KVM prints, but for those that need a service still to come.
pub(crate) fn all_lines(object: &Value) -> Result<()> {
    let names: Vec<&str> =
        object["lines"].as_array().into_iter().flatten().filter_map(|line| line["name"].as_str()).collect();
    for expected in bench::expected_lines(Mode::Npt, &folders::root())? {
        ensure!(names.contains(&expected.as_str()), "the payload prints no line {expected}");
    }
    Ok(())
}
