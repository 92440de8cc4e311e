//! Running other programs: to their end, with what they said in the error when they fail.

use anyhow::{Context, Result, anyhow, bail};
use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Lines of a failed program's output that go into the error.
const TAIL: usize = 30;
/// How often a program with a limit is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// Where `program` lies in the folders of `PATH`, and in those of the system's administrator.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|folder: PathBuf| folder.join(program))
        .find(|file| is_executable(file))
}

fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

/// A command that is killed when xtask dies, however it dies (util-linux's `setpriv`, where the machine has it).
/// Only for a child that the starting thread outlives: the kernel goes by that thread.
pub(crate) fn mortal(program: &Path) -> Command {
    match find("setpriv") {
        Some(setpriv) => {
            let mut command = Command::new(setpriv);
            command.args(["--pdeathsig", "KILL", "--"]).arg(program);
            command
        }
        None => Command::new(program),
    }
}

/// Runs `command` and returns what it wrote to its standard output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let name = describe(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        bail!("{name}: {}\n{}", output.status, tail(&output.stderr));
    }
    String::from_utf8(output.stdout).with_context(|| format!("{name} did not answer in UTF-8"))
}

/// Runs `command`, its output going where ours goes.
pub(crate) fn status(command: &mut Command) -> Result<()> {
    let name = describe(command);
    let status = command.status().with_context(|| format!("cannot run {name}"))?;
    if !status.success() {
        bail!("{name}: {status}");
    }
    Ok(())
}

/// Runs `command`, all of its output going to our standard error: ours may be for programs.
pub(crate) fn status_aside(command: &mut Command) -> Result<()> {
    let aside = std::io::stderr().as_fd().try_clone_to_owned().context("no standard error")?;
    status(command.stdout(aside))
}

/// Runs `command` for at most `limit`; `None` if it had to be killed.
pub(crate) fn status_within(command: &mut Command, limit: Duration) -> Result<Option<ExitStatus>> {
    let started = Instant::now();
    let mut child = command.spawn().with_context(|| format!("cannot run {}", describe(command)))?;
    ends_within(&mut child, started + limit)
}

/// The same with what it wrote to its standard output.
pub(crate) fn output_within(command: &mut Command, limit: Duration) -> Result<Option<(ExitStatus, String)>> {
    let started = Instant::now();
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run {}", describe(command)))?;
    let mut said = child.stdout.take().context("a child without output")?;
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let mut bytes = Vec::new();
            said.read_to_end(&mut bytes).map(|_| bytes)
        });
        let status = ends_within(&mut child, started + limit)?;
        let bytes = reader.join().map_err(|_| anyhow!("a thread that reads panicked"))??;
        Ok(status.map(|status| (status, String::from_utf8_lossy(&bytes).into_owned())))
    })
}

/// Waits for a child to end until `then`; `None` if it had to be killed.
fn ends_within(child: &mut Child, then: Instant) -> Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= then {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(LOOK);
    }
}

/// The command as one would type it.
pub(crate) fn describe(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text += &argument.to_string_lossy();
    }
    text
}

/// The last lines of what a program said.
pub(crate) fn tail(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_says_what_was_run_and_what_it_said() {
        let error =
            output(Command::new("sh").args(["-c", "echo reason >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("sh -c") && error.contains('3') && error.contains("reason"), "{error}");
        assert_eq!(output(Command::new("echo").arg("x")).unwrap(), "x\n");
    }

    #[test]
    fn a_program_that_takes_too_long_is_killed() {
        let mut sleep = Command::new("sleep");
        assert_eq!(status_within(sleep.arg("60"), Duration::from_millis(30)).unwrap(), None);
        let ended = status_within(&mut Command::new("false"), Duration::from_mins(1)).unwrap();
        assert_eq!(ended.and_then(|status| status.code()), Some(1));
        let mut sleep = Command::new("sleep");
        assert_eq!(output_within(sleep.arg("60"), Duration::from_millis(30)).unwrap(), None);
        // More than a pipe holds.
        let mut long = Command::new("seq");
        let (status, said) = output_within(long.arg("100000"), Duration::from_mins(1)).unwrap().unwrap();
        assert!(status.success() && said.ends_with("\n100000\n"));
    }

    #[test]
    fn programs_are_found_by_name() {
        assert!(find("sh").is_some_and(|path| path.ends_with("sh")));
        assert_eq!(find("no-such-program-anywhere"), None);
    }

    #[test]
    fn only_the_end_of_a_long_output_is_kept() {
        let text: String = (0..100).fold(String::new(), |text, line| text + &format!("{line}\n"));
        let kept = tail(text.as_bytes());
        assert!(kept.starts_with("70\n") && kept.ends_with("99"), "{kept}");
    }
}
