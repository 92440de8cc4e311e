//! One run of the emulator, from its start to its end.
//!
//! Invariant: the emulator does not outlive the [`Running`] that started it, nor xtask, whichever way either ends.

use super::command::{self, Machine};
use super::monitor::Monitor;
use crate::host::run;
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How often the serial lines are looked at.
const LOOK: Duration = Duration::from_millis(10);
/// How long the emulator may take to open its monitor.
const START: Duration = Duration::from_secs(20);

/// Set when the user has asked xtask to end.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// Emulators that run.
static RUNNING: AtomicUsize = AtomicUsize::new(0);

/// Makes Ctrl-C and a request to terminate end the running emulators with a report, or xtask at once without any.
pub(crate) fn end_on_signals() -> Result<()> {
    ctrlc::set_handler(|| {
        let again = INTERRUPTED.swap(true, Ordering::SeqCst);
        if again || RUNNING.load(Ordering::SeqCst) == 0 {
            std::process::exit(130);
        }
    })
    .context("cannot take over Ctrl-C")
}

/// What a run tells while it goes.
pub(crate) trait Listener {
    /// Bytes of the first serial line. `true` asks for the run's end.
    fn console(&mut self, bytes: &[u8]) -> bool;
    /// Bytes of the second serial line.
    fn channel(&mut self, bytes: &[u8]);
}

/// Why the emulator is no longer waited for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stop {
    /// It has ended by itself.
    Ended(ExitStatus),
    /// The listener has heard what it waited for.
    Heard,
    /// Time is up.
    TimeUp,
    /// The user has had enough.
    Interrupted,
}

/// A running emulator.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    folder: PathBuf,
    monitor: Option<Monitor>,
    console: Follower,
    channel: Follower,
    started: Instant,
    /// Whether the user's wish to end has been told.
    interrupted: bool,
}

impl Running {
    /// Starts `machine` in `folder`, where the image and the modules lie under their names.
    pub(crate) fn start(emulator: &Path, machine: &Machine, folder: &Path) -> Result<Self> {
        let said = File::create(folder.join("qemu.log"))?;
        let mut command = run::mortal(emulator);
        command.args(machine.arguments()).current_dir(folder);
        // A group of its own: the terminal's Ctrl-C is ours to act on.
        command.stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said).process_group(0);
        std::fs::write(folder.join("command"), run::describe(&command) + "\n")?;
        let started = Instant::now();
        RUNNING.fetch_add(1, Ordering::SeqCst);
        let child = match command.spawn() {
            Ok(child) => child,
            Err(error) => {
                RUNNING.fetch_sub(1, Ordering::SeqCst);
                return Err(error).with_context(|| format!("cannot run {}", emulator.display()));
            }
        };
        let mut running = Self {
            child,
            folder: folder.to_owned(),
            monitor: None,
            console: Follower::new(folder.join(command::CONSOLE)),
            channel: Follower::new(folder.join(command::CHANNEL)),
            started,
            interrupted: false,
        };
        running.monitor = Some(running.connect()?);
        Ok(running)
    }

    /// Waits until the emulator has opened its monitor. The machine starts then.
    fn connect(&mut self) -> Result<Monitor> {
        while self.started.elapsed() < START {
            // An emulator that dislikes its command line may have opened the monitor before it ends.
            if let Ok(mut monitor) = Monitor::connect(&self.folder, command::MONITOR)
                && monitor.greet().is_ok()
            {
                return Ok(monitor);
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("the emulator does not start ({status}): {}", self.said());
            }
            std::thread::sleep(LOOK);
        }
        bail!("the emulator has not opened its monitor after {} s: {}", START.as_secs(), self.said())
    }

    /// What the emulator itself has written.
    pub(crate) fn said(&self) -> String {
        let said = run::tail(&std::fs::read(self.folder.join("qemu.log")).unwrap_or_default());
        said.lines()
            .filter(|line| !line.contains("QEMU waiting for connection"))
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// Time since the start.
    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// The monitor.
    pub(crate) fn monitor(&mut self) -> Result<&mut Monitor> {
        self.monitor.as_mut().context("the monitor is closed")
    }

    /// Follows the run until it ends, `limit` after its start at the latest. That the user has had enough is told
    /// once: a run that is followed again goes on until its limit.
    pub(crate) fn follow(&mut self, limit: Duration, listener: &mut dyn Listener) -> Result<Stop> {
        loop {
            // Its end first: what it wrote before is then read whole.
            let ended = self.child.try_wait()?;
            let mut heard = false;
            self.console.read(&mut |bytes| heard |= listener.console(bytes))?;
            self.channel.read(&mut |bytes| listener.channel(bytes))?;
            if heard {
                return Ok(Stop::Heard);
            }
            if let Some(status) = ended {
                return Ok(Stop::Ended(status));
            }
            if !self.interrupted && INTERRUPTED.load(Ordering::SeqCst) {
                self.interrupted = true;
                return Ok(Stop::Interrupted);
            }
            if self.elapsed() >= limit {
                return Ok(Stop::TimeUp);
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Ends the emulator if it still runs; answers with the cause that it gave for ending by itself.
    pub(crate) fn end(mut self) -> Option<String> {
        self.kill();
        self.monitor.take()?.cause()
    }

    fn kill(&mut self) {
        // Both fail only on a child that has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
        RUNNING.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Reads what is appended to a file.
#[derive(Debug)]
struct Follower {
    path: PathBuf,
    file: Option<File>,
}

impl Follower {
    fn new(path: PathBuf) -> Self {
        Self { path, file: None }
    }

    /// Hands over everything that has come since the last time.
    fn read(&mut self, take: &mut dyn FnMut(&[u8])) -> Result<()> {
        if self.file.is_none() {
            self.file = File::open(&self.path).ok();
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        let mut buffer = [0; 16 << 10];
        loop {
            match file.read(&mut buffer).with_context(|| format!("cannot read {}", self.path.display()))? {
                0 => return Ok(()),
                bytes => take(&buffer[..bytes]),
            }
        }
    }
}
