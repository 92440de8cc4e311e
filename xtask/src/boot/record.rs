//! The hypervisor's record of a run: one JSON object on its own serial line.
//!
//! Read with patience: a field that is not there is simply not shown, so that a record written in distress, or by
//! another image, is still of use. What it must say to count as an end is how the run ended.

use super::outcome::Outcome;
use serde_json::{Map, Value};

/// The record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Record {
    value: Value,
}

/// One of the last exits.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Exit {
    /// What kind of exit, with its code where it has no name.
    pub(crate) name: String,
    /// Where the guest was.
    pub(crate) rip: String,
    /// The exit's two words of information.
    pub(crate) info: [String; 2],
}

/// What became of the rate at which pages were to move.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Churn {
    /// Moves a second that were wanted.
    pub(crate) wanted: u64,
    /// Moves a second that were reached, by the machine's clock.
    pub(crate) reached: u64,
    /// Moves in all.
    pub(crate) moves: u64,
    /// Pages that moved, those of whole blocks among them.
    pub(crate) pages: u64,
    /// Blocks of 2 MiB that moved whole.
    pub(crate) blocks: u64,
    /// Blocks of 2 MiB that were broken up.
    pub(crate) broken_up: u64,
    /// Moves that were made wrongly, as it was asked for.
    pub(crate) mistakes: u64,
}

impl Churn {
    /// From a run's record, if pages moved in it.
    pub(crate) fn of(record: &Record) -> Option<Self> {
        let number = |name| record.number(&["churn", name]);
        Some(Self {
            wanted: number("wanted")?,
            reached: number("reached")?,
            moves: number("moves")?,
            pages: number("pages")?,
            blocks: number("blocks")?,
            broken_up: number("broken_up")?,
            mistakes: number("mistakes")?,
        })
    }

    /// Whether the rate was kept: nine tenths of it at least.
    pub(crate) fn kept_its_rate(&self) -> bool {
        u128::from(self.reached) * 10 >= u128::from(self.wanted) * 9
    }

    /// For programs.
    pub(crate) fn to_json(self) -> Value {
        serde_json::json!({
            "wanted": self.wanted,
            "reached": self.reached,
            "kept_its_rate": self.kept_its_rate(),
            "moves": self.moves,
            "pages": self.pages,
            "blocks": self.blocks,
            "broken_up": self.broken_up,
            "mistakes": self.mistakes,
        })
    }
}

impl Record {
    /// From what the hypervisor wrote.
    pub(crate) fn new(value: Value) -> Self {
        Self { value }
    }

    /// The object as it is.
    pub(crate) fn raw(&self) -> &Value {
        &self.value
    }

    fn at(&self, path: &[&str]) -> Option<&Value> {
        path.iter().try_fold(&self.value, |value, name| value.get(name))
    }

    /// A number at a path of names.
    pub(crate) fn number(&self, path: &[&str]) -> Option<u64> {
        self.at(path)?.as_u64()
    }

    /// A text at a path of names.
    pub(crate) fn text(&self, path: &[&str]) -> Option<&str> {
        self.at(path)?.as_str()
    }

    /// Whether the audit found the library's structures sound.
    pub(crate) fn audit_is_clean(&self) -> Option<bool> {
        self.at(&["audit", "clean"])?.as_bool()
    }

    /// The numbers of the object at `name`, the largest first.
    pub(crate) fn ranking(&self, name: &str) -> Vec<(&str, u64)> {
        let object = self.at(&[name]).and_then(Value::as_object).into_iter().flat_map(Map::iter);
        let mut numbers: Vec<_> =
            object.filter_map(|(name, value)| Some((name.as_str(), value.as_u64()?))).collect();
        numbers.sort_by_key(|&(name, number)| (std::cmp::Reverse(number), name));
        numbers
    }

    /// The guest's registers, as the hypervisor wrote them.
    pub(crate) fn registers(&self) -> Vec<(&str, &str)> {
        let object = self.at(&["registers"]).and_then(Value::as_object).into_iter().flat_map(Map::iter);
        object.filter_map(|(name, value)| Some((name.as_str(), value.as_str()?))).collect()
    }

    /// The last exits, oldest first.
    pub(crate) fn last_exits(&self) -> Vec<Exit> {
        let list = self.at(&["last_exits"]).and_then(Value::as_array).into_iter().flatten();
        list.map(|item| {
            let text = |name: &str| item[name].as_str().unwrap_or("?").to_owned();
            let name = match text("name").as_str() {
                "unknown" | "?" => format!("code {}", text("code")),
                name => name.to_owned(),
            };
            Exit { name, rip: text("rip"), info: [text("info_1"), text("info_2")] }
        })
        .collect()
    }

    /// How the run ended; `None` if the record does not say, or not in words known here.
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        let text = self.text(&["text"]).unwrap_or("no reason given").to_owned();
        match self.text(&["end"])? {
            "value" => Some(Outcome::Value(self.number(&["value"])?)),
            "reset" => Some(Outcome::Reset(text)),
            "shutdown" => Some(Outcome::Shutdown(text)),
            "triple-fault" => Some(Outcome::TripleFault),
            "error" => Some(Outcome::Hypervisor(text)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn outcome(value: Value) -> Option<Outcome> {
        Record::new(value).outcome()
    }

    #[test]
    fn every_end_has_its_outcome() {
        assert_eq!(outcome(json!({ "end": "value", "value": 300 })), Some(Outcome::Value(300)));
        assert_eq!(
            outcome(json!({ "end": "reset", "text": "by 0x64" })),
            Some(Outcome::Reset("by 0x64".into()))
        );
        assert_eq!(outcome(json!({ "end": "triple-fault" })), Some(Outcome::TripleFault));
        assert_eq!(outcome(json!({ "end": "error", "text": "x" })), Some(Outcome::Hypervisor("x".into())));
        assert!(matches!(outcome(json!({ "end": "shutdown" })), Some(Outcome::Shutdown(_))));
    }

    #[test]
    fn nine_tenths_of_a_rate_keep_it() {
        let churn = |reached: u64| {
            let numbers = json!({
                "wanted": 2000, "reached": reached, "moves": 9, "pages": 9, "blocks": 0, "broken_up": 0, "mistakes": 0,
            });
            Churn::of(&Record::new(json!({ "churn": numbers }))).unwrap()
        };
        assert!(churn(1800).kept_its_rate() && !churn(1799).kept_its_rate());
        assert_eq!(churn(1799).to_json()["kept_its_rate"], false);
        assert_eq!(Churn::of(&Record::new(json!({ "churn": { "wanted": 1 } }))), None);
    }

    #[test]
    fn what_does_not_say_how_it_ended_is_no_success() {
        for value in [
            json!({}),
            json!(0),
            json!({ "end": "value" }),
            json!({ "end": "value", "value": "0" }),
            json!({ "end": 0 }),
            json!({ "end": "fine" }),
        ] {
            assert_eq!(outcome(value.clone()), None, "{value}");
        }
    }

    #[test]
    fn fields_that_are_missing_or_odd_are_left_out() {
        let record =
            Record::new(json!({ "exits": { "io": 3, "npf": 9, "msr": 3, "odd": "x" }, "audit": {} }));
        assert_eq!(record.ranking("exits"), [("npf", 9), ("io", 3), ("msr", 3)]);
        assert!(record.ranking("none").is_empty());
        assert_eq!(record.audit_is_clean(), None);
        assert!(record.last_exits().is_empty() && record.registers().is_empty());
    }

    #[test]
    fn exits_without_a_name_show_their_code() {
        let record = Record::new(json!({ "last_exits": [
            { "code": "0x7b", "name": "ioio", "rip": "0x10", "info_1": "0x1", "info_2": "0x2" },
            { "code": "0x99", "name": "unknown", "rip": "0x20" },
        ]}));
        let names: Vec<_> =
            record.last_exits().into_iter().map(|exit| (exit.name, exit.info[0].clone())).collect();
        assert_eq!(names, [("ioio".to_owned(), "0x1".to_owned()), ("code 0x99".to_owned(), "?".to_owned())]);
    }
}
