//! What a boot is made of and what is built for it: the hypervisor's image, the guests written in C and assembly,
//! and the static program for the initrd.

use crate::host::programs::{self, Consent};
use crate::host::{folders, run};
use crate::screen::Progress;
use anyhow::{Context, Result};
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// The one target of everything that runs inside the machine. Named, so that flags do not reach build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Compiler switches of the bare-metal image: no relocation, no red zone (exceptions use the stack), no unwinding.
const IMAGE_FLAGS: [&str; 3] = ["-Crelocation-model=static", "-Cno-redzone=yes", "-Cpanic=abort"];
/// The linker's: nothing of the host's, laid out by the package's own script.
const IMAGE_LINK: [&str; 5] = [
    "-nostartfiles",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-Wl,--build-id=none,-z,max-page-size=4096,--gc-sections",
];

/// Switches of the payload, the same as for every hypervisor it is measured under (`bench/kvm/run.sh`).
const PAYLOAD_FLAGS: &str = "-m64 -O2 -Wall -Wextra -ffreestanding -nostdlib -static -fno-pic -no-pie -mcmodel=small \
    -mno-red-zone -mgeneral-regs-only -fno-stack-protector -fcf-protection=none -fno-asynchronous-unwind-tables \
    -fno-tree-loop-distribute-patterns \
    -Wl,-z,max-page-size=4096,--build-id=none,-z,noexecstack,--no-warn-rwx-segments";
/// Switches of the walking payload, in both of its widths.
const WALKS_FLAGS: &str = "-O2 -Wall -Wextra -ffreestanding -nostdlib -static -fno-pic -no-pie -mno-red-zone \
    -mgeneral-regs-only -fno-stack-protector -fcf-protection=none -fno-asynchronous-unwind-tables \
    -fno-tree-loop-distribute-patterns \
    -Wl,-z,max-page-size=4096,--build-id=none,-z,noexecstack,--no-warn-rwx-segments";
/// Switches of the small guests: flat files for 1 MiB.
const END_FLAGS: &str =
    "-m32 -nostdlib -static -Wl,-Ttext=0x100000,--oformat=binary,--build-id=none,-e,start";

/// The words after `cargo build` or `cargo clippy` that name the image.
const IMAGE_WORDS: [&str; 8] =
    ["--package", "hypervisor", "--bin", "hypervisor", "--features", "bare-metal", "--profile", "bare"];
/// The words that have an image make the mistakes that it is asked for.
const FAULT_WORDS: [&str; 2] = ["--features", "churn-faults"];

/// The compiler's flags for the image.
fn image_flags() -> Vec<String> {
    let mut flags: Vec<String> = IMAGE_FLAGS.iter().map(ToString::to_string).collect();
    flags.extend(IMAGE_LINK.iter().map(|word| format!("-Clink-arg={word}")));
    // Relative to the workspace's root, where cargo starts the compiler.
    flags.push("-Clink-arg=-Wl,-T,hypervisor/link.ld".to_owned());
    flags
}

/// The hypervisor's image; one that can make mistakes only where some are wanted.
pub(crate) fn hypervisor(faults: bool) -> Result<PathBuf> {
    let more: &[&str] = if faults { &FAULT_WORDS } else { &[] };
    cargo_build("the hypervisor", &[&IMAGE_WORDS, more].concat(), &image_flags())
}

/// A cargo command, such as clippy, on the image.
pub(crate) fn image_command(command: &str) -> Command {
    let mut cargo = Command::new("cargo");
    cargo.args([command, "--target", TARGET]).args(IMAGE_WORDS).current_dir(folders::root());
    cargo.env("CARGO_ENCODED_RUSTFLAGS", image_flags().join("\x1f"));
    cargo
}

/// The program that makes seeded files, linked statically: it runs on the host and in the guest.
pub(crate) fn seedfile() -> Result<PathBuf> {
    let flags = ["-Ctarget-feature=+crt-static", "-Cstrip=symbols"].map(str::to_owned);
    cargo_build("seedfile", &["--package", "seedfile", "--release"], &flags)
}

/// Builds one program and returns where cargo put it.
fn cargo_build(name: &str, words: &[&str], flags: &[String]) -> Result<PathBuf> {
    let mut command = Command::new("cargo");
    command
        .args(["build", "--quiet", "--target", TARGET, "--message-format=json-render-diagnostics"])
        .args(words);
    // The strongest of the ways to give flags: whatever the environment sets is meant for the host.
    command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    command.current_dir(folders::root()).stdin(Stdio::null()).stderr(Stdio::inherit());
    let _progress = Progress::start(&format!("building {name}"), None);
    let output = command.output().context("cannot run cargo")?;
    anyhow::ensure!(output.status.success(), "{name} does not build ({})", output.status);
    executable(&String::from_utf8_lossy(&output.stdout))
        .with_context(|| format!("cargo names no program for {name}"))
}

/// The last program that cargo's messages name.
fn executable(messages: &str) -> Option<PathBuf> {
    executables(messages).pop()
}

/// The programs that cargo's messages name.
fn executables(messages: &str) -> Vec<PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    messages.filter_map(|message| Some(PathBuf::from(message["executable"].as_str()?))).collect()
}

/// The payload: a multiboot ELF64.
pub(crate) fn payload(consent: Consent) -> Result<PathBuf> {
    programs::require(&[programs::GCC, programs::BINUTILS], consent)?;
    let source = folders::root().join("guests/payload");
    let out = folders::own("guests")?.join("payload.elf");
    let mut command = Command::new("gcc");
    command.args(PAYLOAD_FLAGS.split_whitespace()).arg("-T").arg(source.join("guest.ld"));
    command.arg("-o").arg(&out).arg(source.join("guest.c"));
    run::output(&mut command)?;
    Ok(out)
}

/// How wide the code of the walking payload is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Width {
    /// For processors without long mode, and its 32-bit modes.
    Bits32,
    /// For long mode.
    Bits64,
}

/// The payload that walks random page tables: a multiboot ELF.
pub(crate) fn walking_payload(width: Width, consent: Consent) -> Result<PathBuf> {
    programs::require(&[programs::GCC, programs::BINUTILS], consent)?;
    let source = folders::root().join("guests/walks");
    let (switches, own, name) = match width {
        Width::Bits32 => (["-m32", "-march=i586"], "own32.c", "walks32.elf"),
        Width::Bits64 => (["-m64", "-mcmodel=small"], "own64.c", "walks64.elf"),
    };
    let out = folders::own("guests")?.join(name);
    let mut command = Command::new("gcc");
    command.args(switches).args(WALKS_FLAGS.split_whitespace()).arg("-T").arg(source.join("walks.ld"));
    command.arg("-o").arg(&out).args(["main.c", "draw.c", own, "entry.S"].map(|file| source.join(file)));
    run::output(&mut command)?;
    Ok(out)
}

/// The program that compares what the walking payload reports with the model.
pub(crate) fn walks() -> Result<PathBuf> {
    program("walks", "walks")
}

/// The program that simulates.
pub(crate) fn simulator() -> Result<PathBuf> {
    program("vmmu-cli", "vmmu")
}

/// The library's test programs, with rules that `VMMU_MUTANT` breaks.
pub(crate) fn library_tests() -> Result<Vec<PathBuf>> {
    let mut command = Command::new("cargo");
    command.args(["test", "--no-run", "--quiet", "--message-format=json-render-diagnostics", "--locked"]);
    command.args(["--package", "vmmu", "--features", "instrument,mutants", "--lib", "--tests"]);
    command.current_dir(folders::root()).stdin(Stdio::null()).stderr(Stdio::inherit());
    let _progress = Progress::start("building the library's tests", None);
    let output = command.output().context("cannot run cargo")?;
    anyhow::ensure!(output.status.success(), "the library's tests do not build ({})", output.status);
    Ok(executables(&String::from_utf8_lossy(&output.stdout)))
}

/// A program of the workspace, for the host and optimised.
fn program(package: &str, name: &str) -> Result<PathBuf> {
    let mut command = Command::new("cargo");
    command.args(["build", "--quiet", "--release", "--package", package, "--locked"]);
    command.current_dir(folders::root()).stdin(Stdio::null());
    let _progress = Progress::start(&format!("building {name}"), None);
    run::status(&mut command)?;
    Ok(folders::target()?.join("release").join(name))
}

/// The program by which the initrd's `init` ends the run: static, without a library.
pub(crate) fn finish(consent: Consent) -> Result<PathBuf> {
    programs::require(&[programs::GCC, programs::BINUTILS], consent)?;
    let out = folders::own("guests")?.join("finish");
    let mut command = Command::new("gcc");
    command.args(["-nostdlib", "-static", "-Wl,--build-id=none", "-s", "-o"]).arg(&out);
    command.arg(folders::root().join("guests/init/finish.s"));
    run::output(&mut command)?;
    Ok(out)
}

/// One of the small guests in `guests/ends/`: a flat multiboot image.
pub(crate) fn end(name: &str, consent: Consent) -> Result<PathBuf> {
    programs::require(&[programs::GCC, programs::BINUTILS], consent)?;
    let source = folders::root().join("guests/ends");
    let out = folders::own("guests")?.join(format!("{name}.bin"));
    let mut command = Command::new("gcc");
    command.args(END_FLAGS.split_whitespace()).arg("-I").arg(&source);
    command.arg("-o").arg(&out).arg(source.join(format!("{name}.s")));
    run::output(&mut command)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_the_last_one_named() {
        let messages = "{\"reason\":\"compiler-artifact\",\"executable\":null}\nnoise\n\
                        {\"reason\":\"compiler-artifact\",\"executable\":\"/t/a b\"}\n{\"reason\":\"build-finished\"}\n";
        assert_eq!(executable(messages), Some("/t/a b".into()));
        assert_eq!(executable(""), None);
        let two = "{\"executable\":\"/a\"}\n{\"executable\":\"/b\"}\n";
        assert_eq!(executables(two), [PathBuf::from("/a"), "/b".into()]);
    }
}
