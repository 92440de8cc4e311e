//! How a run ended, and the exit status for it.
//!
//! Only two ends are success: the guest's own 0 on port 0xF4, or, where a text is expected, that text on its
//! console. Nothing else that a guest prints counts.

use crate::units;
use std::fmt;
use std::time::Duration;

/// The end of a run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    /// The guest wrote this value to port 0xF4.
    Value(u64),
    /// The guest's console showed the expected text.
    Seen(String),
    /// The guest wrote this value to port 0xF4 before its console showed the expected text.
    NotSeen(u64),
    /// The guest switched the machine off, and how.
    Shutdown(String),
    /// The guest reset the machine, and how.
    Reset(String),
    /// The guest met an exception while it could deliver none.
    TripleFault,
    /// The hypervisor gave up, and why: a guest it cannot start, or an error of its own.
    Hypervisor(String),
    /// The emulator ended by itself, and what is known about it.
    Emulator(String),
    /// The guest had not ended after this time.
    Timeout(Duration),
    /// The guest ended well, but pages moved less often than was asked for: moves a second that were reached, and
    /// wanted.
    Slow(u64, u64),
    /// The user ended the run.
    Interrupted,
}

/// The exit statuses, for the help text.
pub(crate) const STATUS_HELP: &str = "Exit status:
    0   the guest wrote 0 to port 0xF4, or its console showed the text of --expect
    N   the guest wrote N there (255 if it is larger)
    1   the boot could not be tried: something is missing or does not build
    2   the command line is wrong
  110   the guest switched the machine off
  111   the guest reset the machine
  112   triple fault
  113   the hypervisor refused the guest or met an error
  114   the emulator ended by itself
  115   the guest ended before its console showed the text of --expect
  116   the guest ended well, but pages moved at less than nine tenths of the rate of --churn
  124   time was up
  130   interrupted";

impl Outcome {
    /// xtask's exit status.
    pub(crate) fn status(&self) -> u8 {
        match self {
            Self::Value(value) => u8::try_from(*value).unwrap_or(255),
            Self::Seen(_) => 0,
            Self::Shutdown(_) => 110,
            Self::Reset(_) => 111,
            Self::TripleFault => 112,
            Self::Hypervisor(_) => 113,
            Self::Emulator(_) => 114,
            Self::NotSeen(_) => 115,
            Self::Slow(..) => 116,
            Self::Timeout(_) => 124,
            Self::Interrupted => 130,
        }
    }

    /// Whether this is what the user wanted.
    pub(crate) fn is_success(&self) -> bool {
        self.status() == 0
    }

    /// One word for programs.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Value(_) => "value",
            Self::Seen(_) => "seen",
            Self::NotSeen(_) => "not seen",
            Self::Shutdown(_) => "shutdown",
            Self::Reset(_) => "reset",
            Self::TripleFault => "triple fault",
            Self::Hypervisor(_) => "hypervisor",
            Self::Emulator(_) => "emulator",
            Self::Slow(..) => "slow",
            Self::Timeout(_) => "timeout",
            Self::Interrupted => "interrupted",
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Value(0) => write!(f, "success: the guest wrote 0 to port 0xF4"),
            Self::Value(value) => write!(f, "failure: the guest wrote {value} to port 0xF4"),
            Self::Seen(text) => write!(f, "success: the guest's console showed `{text}`"),
            Self::NotSeen(value) => {
                write!(f, "failure: the guest wrote {value} to port 0xF4 before the expected text was seen")
            }
            Self::Shutdown(how) => write!(f, "failure: shutdown, {how}"),
            Self::Reset(how) => write!(f, "failure: reset, {how}"),
            Self::TripleFault => write!(f, "failure: triple fault, the guest's processor shut down"),
            Self::Hypervisor(why) => write!(f, "failure: the hypervisor ended the run: {why}"),
            Self::Emulator(why) => write!(f, "failure: the emulator ended by itself: {why}"),
            Self::Slow(reached, wanted) => {
                write!(f, "failure: {reached} moves a second were reached, {wanted} were wanted")
            }
            Self::Timeout(after) => write!(f, "failure: timeout, no end after {}", units::duration(*after)),
            Self::Interrupted => write!(f, "failure: interrupted"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_guest_s_zero_and_the_expected_text_are_success() {
        let text = String::new;
        for outcome in [
            Outcome::Value(1),
            Outcome::Value(256),
            Outcome::Value(u64::MAX),
            Outcome::NotSeen(0),
            Outcome::Shutdown(text()),
            Outcome::Reset(text()),
            Outcome::TripleFault,
            Outcome::Hypervisor(text()),
            Outcome::Emulator(text()),
            Outcome::Slow(1, 2),
            Outcome::Timeout(Duration::ZERO),
            Outcome::Interrupted,
        ] {
            assert!(!outcome.is_success(), "{outcome:?}");
            assert!(outcome.to_string().starts_with("failure"), "{outcome}");
        }
        assert!(Outcome::Value(0).is_success() && Outcome::Seen(text()).is_success());
    }

    #[test]
    fn values_are_statuses_up_to_255() {
        let statuses = [7, 255, 256, 300].map(|value| Outcome::Value(value).status());
        assert_eq!(statuses, [7, 255, 255, 255]);
    }

    #[test]
    fn every_status_is_explained() {
        let text = String::new;
        for outcome in [
            Outcome::Shutdown(text()),
            Outcome::Reset(text()),
            Outcome::TripleFault,
            Outcome::Hypervisor(text()),
            Outcome::Emulator(text()),
            Outcome::NotSeen(0),
            Outcome::Slow(1, 2),
            Outcome::Timeout(Duration::ZERO),
            Outcome::Interrupted,
        ] {
            assert!(STATUS_HELP.contains(&format!("\n  {}   ", outcome.status())), "{outcome:?}");
        }
    }
}
