//! `cargo xtask boot`'s command line.

use crate::units::{parse_seconds, parse_size};
use clap::{Args, Parser, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;

/// What `--initrd` says for no initrd at all.
pub(crate) const NO_INITRD: &str = "none";

/// Boots a guest under the hypervisor and reports how it ended.
#[derive(Args, Clone, Debug)]
#[command(after_help = super::outcome::STATUS_HELP)]
pub(crate) struct Options {
    /// How guest memory is virtualised
    #[arg(long, value_enum, default_value_t = Mode::Npt)]
    pub(crate) mode: Mode,
    /// Linux kernel (bzImage) to boot [default: Debian's own cloud kernel, downloaded]
    #[arg(long, value_name = "FILE", conflicts_with = "guest")]
    pub(crate) kernel: Option<PathBuf>,
    /// Initrd for the kernel, or `none` [default: one that is built for the purpose]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["with", "run"])]
    pub(crate) initrd: Option<PathBuf>,
    /// Multiboot 1 image to boot in place of Linux
    #[arg(long, value_name = "FILE", conflicts_with_all = ["with", "run"])]
    pub(crate) guest: Option<PathBuf>,
    /// More words for the guest's command line
    #[arg(
        long,
        value_name = "WORDS",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    pub(crate) append: String,
    /// Put a Debian package into the initrd, with the libraries that its programs need (repeatable)
    #[arg(long, value_name = "PACKAGE")]
    pub(crate) with: Vec<String>,
    /// Command to run in the guest; its exit status is the guest's [default: check a seeded file]
    #[arg(long, value_name = "COMMAND", allow_hyphen_values = true)]
    pub(crate) run: Option<String>,
    /// The guest's memory
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_size)]
    pub(crate) memory: u64,
    /// How the guest's memory lies in the machine's
    #[arg(long, value_enum, default_value_t = Layout::Scattered)]
    pub(crate) layout: Layout,
    /// What the scattered layout and the seeded file are drawn from
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
    /// Move N random pages of the guest to other frames every second, and report the rate that was reached; less than
    /// nine tenths of it is a failure
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) churn: Option<u32>,
    /// Move them wrongly, so that the guest's memory goes to ruin
    #[arg(long, value_enum, requires = "churn")]
    pub(crate) churn_fault: Option<ChurnFault>,
    /// CPU model of the emulator; `max` gives the host's tables five levels
    #[arg(long, value_name = "MODEL", default_value = "EPYC")]
    pub(crate) cpu: String,
    /// Let time count instructions: slower, and two runs are identical
    #[arg(long)]
    pub(crate) icount: bool,
    /// Hypervisor image to boot [default: built from this tree]
    #[arg(long, value_name = "FILE")]
    pub(crate) image: Option<PathBuf>,
    /// More words for the hypervisor's own command line, such as no-next-rip or levels=4
    #[arg(long, value_name = "WORDS", default_value = "", hide_default_value = true)]
    pub(crate) hypervisor: String,
    /// More words for the emulator; it runs in a folder of its own, so name files by absolute paths
    #[arg(
        long,
        value_name = "WORDS",
        default_value = "",
        hide_default_value = true,
        allow_hyphen_values = true
    )]
    pub(crate) qemu: String,
    /// Text that a line of the guest's console must hold: seeing it is success and ends the run
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) expect: Option<String>,
    /// Seconds after which the run is given up
    #[arg(long, value_name = "S", default_value = "300", value_parser = parse_seconds)]
    pub(crate) timeout: Duration,
    /// Print one JSON object on standard output; the console goes to standard error
    #[arg(long)]
    pub(crate) json: bool,
    /// Install missing packages without asking
    #[arg(long)]
    pub(crate) yes: bool,
}

/// How guest memory is virtualised.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    /// Nested paging (AMD SVM)
    Npt,
}

impl Mode {
    /// The word on the hypervisor's command line and in tables.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Npt => "npt",
        }
    }
}

/// How the guest's memory lies in the machine's.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Layout {
    /// Half in whole blocks of 2 MiB, half in single pages, none where its guest address says
    Scattered,
    /// One run of frames
    Contiguous,
}

impl Layout {
    /// The word on the hypervisor's command line.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Scattered => "scattered",
            Self::Contiguous => "contiguous",
        }
    }
}

/// How pages move wrongly.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ChurnFault {
    /// One page in a hundred without an invalidation
    Skip,
    /// Copied one exit before the invalidation
    EarlyCopy,
}

impl ChurnFault {
    /// The word on the hypervisor's command line.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Skip => "skip",
            Self::EarlyCopy => "early-copy",
        }
    }
}

impl Default for Options {
    /// What an empty command line says.
    fn default() -> Self {
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            options: Options,
        }
        Line::parse_from(["boot"]).options
    }
}

impl Options {
    /// The emulator's CPU with the virtualisation extension switched on, unless the model says something about it.
    pub(crate) fn cpu_model(&self) -> String {
        if self.cpu.contains("svm") { self.cpu.clone() } else { format!("{},+svm,+npt", self.cpu) }
    }

    /// The hypervisor's command line.
    pub(crate) fn hypervisor_line(&self) -> String {
        let (mode, layout) = (self.mode.word(), self.layout.word());
        let kib = self.memory.div_ceil(1024);
        let mut words = vec![format!("mode={mode} layout={layout} seed={} memory={kib}K", self.seed)];
        words.extend(self.churn.map(|rate| format!("churn={rate}")));
        words.extend(self.churn_fault.map(|fault| format!("churn-fault={}", fault.word())));
        words.push(self.hypervisor.clone());
        words.join(" ").trim_end().to_owned()
    }

    /// Whether the user wants no initrd.
    pub(crate) fn no_initrd(&self) -> bool {
        self.initrd.as_ref().is_some_and(|path| path.as_os_str() == NO_INITRD)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn parse(words: &[&str]) -> Result<Options, clap::Error> {
        Line::try_parse_from([&["boot"], words].concat()).map(|line| line.options)
    }

    #[test]
    fn the_defaults_are_a_scattered_gibibyte() {
        let options = Options::default();
        assert_eq!(options.hypervisor_line(), "mode=npt layout=scattered seed=1 memory=1048576K");
        assert_eq!(options.cpu_model(), "EPYC,+svm,+npt");
        assert!(!options.no_initrd());
    }

    #[test]
    fn options_reach_the_hypervisor() {
        let words = [
            "--layout",
            "contiguous",
            "--seed",
            "7",
            "--memory",
            "256M",
            "--hypervisor",
            "no-next-rip levels=4",
        ];
        let options = parse(&words).unwrap();
        let expected = "mode=npt layout=contiguous seed=7 memory=262144K no-next-rip levels=4";
        assert_eq!(options.hypervisor_line(), expected);
    }

    #[test]
    fn churn_reaches_the_hypervisor_and_a_fault_needs_it() {
        let options = parse(&["--churn", "2000", "--churn-fault", "early-copy"]).unwrap();
        assert!(options.hypervisor_line().ends_with(" churn=2000 churn-fault=early-copy"));
        for words in
            [&["--churn-fault", "skip"][..], &["--churn", "0"], &["--churn", "1", "--churn-fault", "x"]]
        {
            assert!(parse(words).is_err(), "{words:?}");
        }
    }

    #[test]
    fn a_cpu_that_names_the_extension_is_taken_as_it_is() {
        assert_eq!(parse(&["--cpu", "max"]).unwrap().cpu_model(), "max,+svm,+npt");
        assert_eq!(parse(&["--cpu", "EPYC,-svm"]).unwrap().cpu_model(), "EPYC,-svm");
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        for words in [
            &["--guest", "a", "--kernel", "b"][..],
            &["--guest", "a", "--run", "b"],
            &["--initrd", "a", "--with", "b"],
            &["--memory", "0"],
            &["--memory", "1.5G"],
            &["--timeout", "-1"],
            &["--layout", "other"],
        ] {
            assert!(parse(words).is_err(), "{words:?}");
        }
        assert!(parse(&["--initrd", "none"]).unwrap().no_initrd());
        assert_eq!(parse(&["--append", "-x --y"]).unwrap().append, "-x --y");
    }
}
