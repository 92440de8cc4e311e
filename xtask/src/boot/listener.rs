//! What a run says while it goes: the guest's console, live, and the hypervisor's own lines.

use super::record::Record;
use crate::qemu::machine::Listener;
use crate::screen;
use console::style;
use serde_json::Value;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Bytes of a line that are kept: a guest may never end one.
const LINE_MAX: usize = 64 << 10;
/// What Linux says as it starts the first process, whatever its initrd.
const INIT_STARTS: &str = " as init process";
/// What our initrd says.
const INIT_SAYS: &str = "init: user space reached";

/// Collects and shows.
pub(crate) struct Ears<'a> {
    started: Instant,
    out: Box<dyn Write + 'a>,
    expect: Option<&'a str>,
    console: Lines,
    channel: Lines,
    /// Whether the cursor stands behind an unfinished line of the guest's.
    mid_line: bool,
    /// Lines that the guest has written to port 0xE9.
    pub(crate) texts: Vec<String>,
    /// When user space was reached.
    pub(crate) user_space: Option<Duration>,
    /// What the hypervisor said about where its state lies.
    pub(crate) state: Option<Value>,
    /// The hypervisor's record of the run.
    pub(crate) record: Option<Record>,
}

impl<'a> Ears<'a> {
    /// Listens for a run that starts now; what the guest says goes to `out`.
    pub(crate) fn new(out: impl Write + 'a, expect: Option<&'a str>) -> Self {
        Self {
            started: Instant::now(),
            out: Box::new(out),
            expect,
            console: Lines::default(),
            channel: Lines::default(),
            mid_line: false,
            texts: Vec::new(),
            user_space: None,
            state: None,
            record: None,
        }
    }

    /// Shows the guest's bytes as they come.
    fn show(&mut self, bytes: &[u8]) {
        // A reader that went away must not end the run: its outcome is the exit status.
        let _ = self.out.write_all(bytes).and_then(|()| self.out.flush());
        self.mid_line = bytes.last().is_some_and(|&byte| byte != b'\n');
    }

    /// Ends an unfinished line of the guest's on the terminal, before something else is written.
    pub(crate) fn finish_line(&mut self) {
        if self.mid_line && std::io::stderr().is_terminal() {
            self.show(b"\n");
        }
    }

    fn channel_line(&mut self, line: &str) {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match (word, serde_json::from_str::<Value>(rest)) {
            ("@text", _) => {
                self.finish_line();
                self.show(format!("{rest}\n").as_bytes());
                self.texts.push(rest.to_owned());
            }
            ("@record", Ok(value)) => self.record = Some(Record::new(value)),
            ("@state", Ok(value)) => self.state = Some(value),
            _ => {
                self.finish_line();
                screen::say(format_args!(
                    "{} {}",
                    style("│").magenta().for_stderr(),
                    style(line).dim().for_stderr()
                ));
            }
        }
    }
}

impl Listener for Ears<'_> {
    fn console(&mut self, bytes: &[u8]) -> bool {
        self.show(bytes);
        let mut seen = false;
        for line in self.console.take(bytes) {
            seen |= self.expect.is_some_and(|text| line.contains(text));
            if self.user_space.is_none() && (line.contains(INIT_STARTS) || line.contains(INIT_SAYS)) {
                self.user_space = Some(self.started.elapsed());
            }
        }
        // A prompt has no end of line.
        seen |= self.expect.is_some_and(|text| self.console.unfinished().contains(text));
        if seen {
            self.expect = None;
        }
        seen
    }

    fn channel(&mut self, bytes: &[u8]) {
        for line in self.channel.take(bytes) {
            self.channel_line(&line);
        }
    }
}

/// Bytes to lines, without their ends.
#[derive(Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    /// The lines that end in `bytes`.
    fn take(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.rest.extend_from_slice(piece);
            if piece.ends_with(b"\n") || self.rest.len() > LINE_MAX {
                lines.push(self.unfinished().trim_end_matches(['\r', '\n']).to_owned());
                self.rest.clear();
            }
        }
        lines
    }

    fn unfinished(&self) -> String {
        String::from_utf8_lossy(&self.rest).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::sink;

    #[test]
    fn lines_are_put_together_from_pieces() {
        let mut lines = Lines::default();
        assert!(lines.take(b"ab").is_empty());
        assert_eq!(lines.take(b"c\r\nd\n\ne"), ["abc", "d", ""]);
        assert_eq!(lines.unfinished(), "e");
        assert_eq!(lines.take(&vec![b'x'; LINE_MAX]).len(), 1);
        assert_eq!(lines.unfinished(), "");
    }

    #[test]
    fn the_expected_text_is_heard_in_a_line_and_in_a_prompt() {
        let mut ears = Ears::new(sink(), Some("login:"));
        assert!(!ears.console(b"log"));
        assert!(ears.console(b"in: "));
        assert!(!ears.console(b"again\n"), "heard twice");
        let mut ears = Ears::new(sink(), Some("done"));
        assert!(ears.console(b"all done now\nmore\n"));
        let mut ears = Ears::new(sink(), None);
        assert!(!ears.console(b"anything\n"));
    }

    #[test]
    fn the_expected_text_counts_on_the_console_alone() {
        let mut ears = Ears::new(sink(), Some("ready"));
        ears.channel(b"@text ready\nhypervisor: ready\n");
        assert!(!ears.console(b"\n"));
        assert_eq!(ears.texts, ["ready"]);
    }

    #[test]
    fn user_space_is_noticed_once() {
        let mut ears = Ears::new(sink(), None);
        ears.console(b"[    1.0] Run /init as init process\r\n");
        let first = ears.user_space;
        assert!(first.is_some());
        ears.console(b"init: user space reached\n");
        assert_eq!(ears.user_space, first);
    }

    #[test]
    fn the_guest_s_bytes_are_shown_as_they_are() {
        let mut shown = Vec::new();
        let mut ears = Ears::new(&mut shown, None);
        ears.console(b"a\xFFb");
        ears.console(b"\r\n");
        drop(ears);
        assert_eq!(shown, b"a\xFFb\r\n");
    }

    #[test]
    fn the_record_is_told_from_other_lines() {
        let mut ears = Ears::new(sink(), None);
        ears.channel(b"hello\r\n@record {\"end\":\"reset\"}\r\n@record {broken\r\n");
        assert!(ears.record.is_some());
    }
}
