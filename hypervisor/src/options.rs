//! The hypervisor's own command line.
//!
//! Words are compared whole, never by parts: QEMU puts the image's file name first, and a path may hold
//! anything. A word that is no option is an error, but for a first word, which is that file name.

use alloc::string::{String, ToString};
use core::fmt;
use core::num::NonZeroU32;

/// How the guest's memory lies in the machine's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LayoutKind {
    /// One run of frames for each range of guest memory.
    Contiguous,
    /// A seeded mix of whole 2 MiB blocks and single pages, none where its guest address says.
    Scattered,
}

/// A mistake that churn makes on purpose, so that a test can see what becomes of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChurnFault {
    /// One page in a hundred moves without an invalidation.
    Skip,
    /// The copy is made one exit before the invalidation: what the guest writes in between is lost.
    EarlyCopy,
}

/// What the user asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
#[allow(clippy::struct_excessive_bools)] // each is a word of its own
pub struct Options {
    /// `layout=scattered|contiguous`: how guest memory lies in the machine's (default: scattered).
    pub layout: LayoutKind,
    /// `seed=N`: what the scattered layout is drawn from (default: 1).
    pub seed: u64,
    /// `memory=N[K|M|G]`: where the guest's memory below 4 GiB ends, in bytes; default 1 GiB.
    pub memory: u64,
    /// `levels=4`: four levels of paging though the processor has five. Acted on by the boot code.
    pub four_levels: bool,
    /// `no-next-rip`: lengths of instructions are decoded though the processor reports them.
    pub next_rip: bool,
    /// `no-decode-assists`: operands are decoded though the processor reports them.
    pub decode_assists: bool,
    /// `no-flush-by-asid`: whole flushes though the processor can flush one tag.
    pub flush_by_asid: bool,
    /// `churn=N`: how many of the guest's pages move to other frames in a second (default: none do).
    pub churn: Option<NonZeroU32>,
    /// `churn-fault=skip|early-copy`: how they move wrongly (default: they do not).
    pub churn_fault: Option<ChurnFault>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            layout: LayoutKind::Scattered,
            seed: 1,
            memory: 1 << 30,
            four_levels: false,
            next_rip: true,
            decode_assists: true,
            flush_by_asid: true,
            churn: None,
            churn_fault: None,
        }
    }
}

/// A word that cannot be acted on.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum OptionError {
    /// No option has this name.
    Unknown(String),
    /// The option is known and its value is not one that it takes.
    Value(String),
    /// `churn-fault` without `churn`: nothing moves, so nothing could go wrong.
    NothingMoves,
}

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(word) => write!(f, "`{word}` on the hypervisor's command line is no option"),
            Self::Value(word) => {
                write!(f, "`{word}` on the hypervisor's command line has a value it cannot have")
            }
            Self::NothingMoves => {
                write!(f, "`churn-fault` on the hypervisor's command line needs `churn` beside it")
            }
        }
    }
}

impl core::error::Error for OptionError {}

/// A decimal or `0x` number, with an optional binary suffix K, M or G.
fn number(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 10),
        b'M' => (&text[..text.len() - 1], 20),
        b'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let value = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok()?,
        None => digits.parse().ok()?,
    };
    value.checked_mul(1 << shift)
}

impl Options {
    /// Reads a command line. Later words override earlier ones.
    pub fn parse(line: &str) -> Result<Self, OptionError> {
        let mut options = Self::default();
        for (position, word) in line.split_ascii_whitespace().enumerate() {
            match options.take(word) {
                Err(OptionError::Unknown(_)) if position == 0 => {}
                result => result?,
            }
        }
        if options.churn_fault.is_some() && options.churn.is_none() {
            return Err(OptionError::NothingMoves);
        }
        Ok(options)
    }

    fn take(&mut self, word: &str) -> Result<(), OptionError> {
        let (name, value) = word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)));
        let bad_value = || OptionError::Value(word.to_string());
        match (name, value) {
            ("mode", Some("npt")) => {}
            ("layout", Some("scattered")) => self.layout = LayoutKind::Scattered,
            ("layout", Some("contiguous")) => self.layout = LayoutKind::Contiguous,
            ("seed", Some(text)) => self.seed = number(text).ok_or_else(bad_value)?,
            ("memory", Some(text)) => self.memory = number(text).ok_or_else(bad_value)?,
            ("levels", Some("4")) => self.four_levels = true,
            ("no-next-rip", None) => self.next_rip = false,
            ("no-decode-assists", None) => self.decode_assists = false,
            ("no-flush-by-asid", None) => self.flush_by_asid = false,
            ("churn", Some(text)) => {
                let rate = number(text).and_then(|rate| u32::try_from(rate).ok()).and_then(NonZeroU32::new);
                self.churn = Some(rate.ok_or_else(bad_value)?);
            }
            ("churn-fault", Some("skip")) => self.churn_fault = Some(ChurnFault::Skip),
            ("churn-fault", Some("early-copy")) => self.churn_fault = Some(ChurnFault::EarlyCopy),
            ("mode" | "layout" | "levels" | "churn-fault", Some(_)) => return Err(bad_value()),
            _ => return Err(OptionError::Unknown(word.to_string())),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_name_comes_first_and_means_nothing() {
        assert_eq!(Options::parse(""), Ok(Options::default()));
        assert_eq!(Options::parse("target/seed=7/hypervisor"), Ok(Options::default()));
        let options =
            Options::parse("/x/hypervisor layout=contiguous seed=0x10 memory=256M no-next-rip").unwrap();
        assert_eq!((options.layout, options.seed, options.memory), (LayoutKind::Contiguous, 16, 256 << 20));
        assert!(!options.next_rip && options.decode_assists && options.flush_by_asid);
    }

    #[test]
    fn a_loader_that_drops_the_file_name_is_understood() {
        assert_eq!(Options::parse("seed=3").unwrap().seed, 3);
        assert_eq!(Options::parse("seed=x"), Err(OptionError::Value("seed=x".into())));
    }

    #[test]
    fn churn_has_a_rate_and_may_have_a_fault() {
        let options = Options::parse("h churn=2000 churn-fault=early-copy").unwrap();
        assert_eq!(options.churn, NonZeroU32::new(2000));
        assert_eq!(options.churn_fault, Some(ChurnFault::EarlyCopy));
        assert_eq!(Options::parse("h churn-fault=skip churn=1").unwrap().churn_fault, Some(ChurnFault::Skip));
        assert_eq!(Options::parse("h churn-fault=skip"), Err(OptionError::NothingMoves));
        for word in ["churn=0", "churn=-1", "churn=4G", "churn-fault=both"] {
            assert_eq!(Options::parse(&alloc::format!("h {word}")), Err(OptionError::Value(word.into())));
        }
    }

    #[test]
    fn words_are_whole_and_known() {
        for word in ["xlayout=contiguous", "no-next-rip=1", "layout", "LAYOUT=contiguous", "memory"] {
            assert_eq!(Options::parse(&alloc::format!("h {word}")), Err(OptionError::Unknown(word.into())));
        }
        for word in
            ["layout=contiguouss", "memory=1T", "memory=", "seed=-1", "levels=5", "memory=99999999999G"]
        {
            assert_eq!(Options::parse(&alloc::format!("h {word}")), Err(OptionError::Value(word.into())));
        }
    }
}
