//! What people see while xtask works: notes, progress bars, tables.
//!
//! All of it goes to standard error but what is asked for as a result; standard output stays the guest's console
//! (or, with `--json`, one object). Bars draw themselves only on a terminal; elsewhere a line is printed instead.

use console::style;
use indicatif::{ProgressBar, ProgressStyle};
use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::time::Duration;

/// Lines on standard error. A reader that has gone away changes nothing about the work, nor about its result.
pub(crate) fn say(text: impl Display) {
    if cfg!(test) {
        // What tests say is captured on this way alone.
        eprintln!("{text}");
    } else {
        let _ = writeln!(std::io::stderr(), "{text}");
    }
}

/// One line of news.
pub(crate) fn note(text: impl Display) {
    say(format_args!("{} {text}", style("·").cyan().for_stderr()));
}

/// One line of news that matters.
pub(crate) fn warn(text: impl Display) {
    say(format_args!("{} {text}", style("!").yellow().bold().for_stderr()));
}

/// A line about something that takes its time; disappears on drop.
pub(crate) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// Starts a spinner, or a bar of `bytes` bytes where the size is known.
    pub(crate) fn start(what: &str, bytes: Option<u64>) -> Self {
        if !std::io::stderr().is_terminal() {
            note(what);
        }
        let bar = bytes.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
        let template = if bytes.is_some() {
            "{spinner:.cyan} {msg} {wide_bar:.cyan/blue} {bytes}/{total_bytes}"
        } else {
            "{spinner:.cyan} {msg} {elapsed:.dim}"
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(100));
        Self { bar }
    }

    /// Moves the bar to `bytes`.
    pub(crate) fn at(&self, bytes: u64) {
        self.bar.set_position(bytes);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Which side a column's text keeps to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Side {
    Left,
    Right,
}

/// Lays out rows in columns, two spaces apart; the first row is the heading. Widths count characters.
pub(crate) fn table(sides: &[Side], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| console::measure_text_width(cell))
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..sides.len()).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for ((cell, &width), side) in row.iter().zip(&widths).zip(sides) {
            let gap = " ".repeat(width - console::measure_text_width(cell));
            let (first, second) = if *side == Side::Left { (cell, &gap) } else { (&gap, cell) };
            line.extend([first, second, "  "]);
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_have_no_tail() {
        let rows = vec![
            vec!["line".to_owned(), "ours".into(), "note".into()],
            vec!["touch4k".into(), "1,234".into(), String::new()],
            vec!["é".into(), "—".into(), "x".into()],
        ];
        let text = table(&[Side::Left, Side::Right, Side::Left], &rows);
        assert_eq!(text, "line      ours  note\ntouch4k  1,234\né            —  x\n");
    }
}
