//! The emulator's monitor: requests in JSON over a socket (QEMU Machine Protocol).
//!
//! Events are not waited for: they are read when the emulator has ended. Every read has a limit of time.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// A connection to a running emulator.
#[derive(Debug)]
pub(crate) struct Monitor {
    stream: UnixStream,
    unread: Vec<u8>,
    events: Vec<Value>,
}

impl Monitor {
    /// Connects to the socket `name` in `folder`. Fails while the emulator has not made it yet.
    pub(crate) fn connect(folder: &Path, name: &str) -> std::io::Result<Self> {
        // A socket's path may have 107 bytes, a project's folder more: go by the open folder.
        let folder = File::open(folder)?;
        let path = format!("/proc/self/fd/{}/{name}", folder.as_raw_fd());
        let stream = UnixStream::connect(path)?;
        Ok(Self { stream, unread: Vec::new(), events: Vec::new() })
    }

    /// Ends the negotiation that the protocol begins with.
    pub(crate) fn greet(&mut self) -> Result<()> {
        let greeting = self.next(Instant::now() + PATIENCE)?;
        if greeting.get("QMP").is_none() {
            bail!("the monitor greets with {greeting}");
        }
        self.execute("qmp_capabilities", &json!({})).map(drop)
    }

    /// Executes a command and returns its answer.
    pub(crate) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.stream
            .write_all(format!("{request}\n").as_bytes())
            .context("the monitor does not take requests")?;
        let limit = Instant::now() + PATIENCE;
        loop {
            let mut message = self.next(limit)?;
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
            if let Some(error) = message.get("error") {
                bail!("the monitor refuses {command}: {}", error["desc"]);
            }
            self.events.push(message);
        }
    }

    /// Executes a command of the monitor's form for people and returns its text.
    pub(crate) fn human(&mut self, line: &str) -> Result<String> {
        let answer = self.execute("human-monitor-command", &json!({ "command-line": line }))?;
        Ok(answer.as_str().unwrap_or_default().replace('\r', ""))
    }

    /// Why the emulator said it would end, if it did: a name of QEMU's `ShutdownCause`. For after its end.
    pub(crate) fn cause(mut self) -> Option<String> {
        while let Ok(message) = self.next(Instant::now() + PATIENCE) {
            self.events.push(message);
        }
        let shutdown = self.events.iter().rev().find(|event| event["event"] == "SHUTDOWN")?;
        Some(shutdown["data"]["reason"].as_str()?.to_owned())
    }

    /// The next message: a line that holds one object.
    fn next(&mut self, limit: Instant) -> Result<Value> {
        loop {
            if let Some(end) = self.unread.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                return serde_json::from_slice(&line).context("the monitor does not speak JSON");
            }
            let left = limit.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("the monitor does not answer");
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => bail!("the monitor has closed the connection"),
                Ok(bytes) => self.unread.extend_from_slice(&buffer[..bytes]),
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                    ) => {}
                Err(error) => return Err(error).context("cannot read from the monitor"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn monitor(said: &str) -> (Monitor, UnixStream) {
        let (stream, mut other) = UnixStream::pair().unwrap();
        other.write_all(said.as_bytes()).unwrap();
        (Monitor { stream, unread: Vec::new(), events: Vec::new() }, other)
    }

    #[test]
    fn answers_are_told_from_events() {
        let (mut monitor, _other) = monitor(
            "{\"QMP\":{}}\r\n{\"return\":{}}\r\n{\"event\":\"STOP\"}\r\n{\"return\":\"RIP=0\\r\\n\"}\r\n",
        );
        monitor.greet().unwrap();
        assert_eq!(monitor.human("info registers").unwrap(), "RIP=0\n");
        assert_eq!(monitor.events.len(), 1);
    }

    #[test]
    fn errors_are_errors() {
        let (mut monitor, _other) = monitor("{\"error\":{\"desc\":\"no such command\"}}\n");
        assert!(monitor.execute("x", &json!({})).unwrap_err().to_string().contains("no such command"));
    }

    #[test]
    fn the_cause_is_the_last_one_said_and_a_closed_end_is_none() {
        let (first, other) = monitor(
            "{\"event\":\"SHUTDOWN\",\"data\":{\"guest\":true,\"reason\":\"guest-reset\"}}\n{\"event\":\"STOP\"}\n",
        );
        drop(other);
        assert_eq!(first.cause().as_deref(), Some("guest-reset"));
        let (second, other) = monitor("");
        drop(other);
        assert_eq!(second.cause(), None);
    }
}
