//! What happened last, so that a failure can be read: a ring of what the tasks did, and what is wrong.
//!
//! Invariant: the first violation stays; nothing after it is told.

use std::collections::VecDeque;
use std::fmt::Write;

/// Lines that are kept.
const LINES: usize = 60;

/// What is wrong.
#[derive(Clone, Debug)]
pub(crate) struct Violation {
    /// In one sentence.
    pub(crate) what: String,
    /// Where it comes from: a line each.
    pub(crate) why: Vec<String>,
}

impl Violation {
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), why: Vec::new() }
    }
}

/// The story of one history.
#[derive(Debug, Default)]
pub(crate) struct Story {
    lines: VecDeque<(u64, String, String)>,
    pub(crate) violation: Option<Violation>,
}

impl Story {
    pub(crate) fn new() -> Self {
        Self::default()
    }
    pub(crate) fn tell(&mut self, step: u64, who: &str, what: String) {
        if self.violation.is_none() {
            if self.lines.len() == LINES {
                self.lines.pop_front();
            }
            self.lines.push_back((step, who.to_owned(), what));
        }
    }
    pub(crate) fn violate(&mut self, violation: Violation) {
        self.violation.get_or_insert(violation);
    }
    /// The violation with the last lines, if there is one.
    pub(crate) fn told(&self) -> Option<String> {
        let violation = self.violation.as_ref()?;
        let mut text = String::new();
        for (step, who, what) in &self.lines {
            let _ = writeln!(text, "{step:>6}  {who:<9} {what}");
        }
        let _ = writeln!(text, "wrong: {}", violation.what);
        for line in &violation.why {
            let _ = writeln!(text, "       {line}");
        }
        Some(text)
    }
}
