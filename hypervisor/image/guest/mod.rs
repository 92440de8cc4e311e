//! The guest as its own world sees it: loaded files, ports and devices, the services of the benchmark
//! payload, and the ways in which a run ends. Nothing here knows which virtualisation extension runs it.

pub(crate) mod devices;
pub(crate) mod load;
pub(crate) mod ports;
pub(crate) mod services;

use alloc::string::String;
use core::fmt;

/// How a run ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum End {
    /// The guest said so, with this value.
    Value(u32),
    /// The guest reset the machine; by what.
    Reset(&'static str),
    /// The guest put the machine to sleep or switched it off; the value is its sleep type.
    Shutdown(u8),
    /// The guest's processor shut down: a fault while it handled a double fault.
    TripleFault,
    /// Someone outside asked for the record, by an NMI.
    Asked,
    /// The hypervisor cannot go on.
    Error(String),
}

impl End {
    /// The end for programs.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Value(_) => "value",
            Self::Reset(_) => "reset",
            Self::Shutdown(_) => "shutdown",
            Self::TripleFault => "triple-fault",
            Self::Asked => "asked",
            Self::Error(_) => "error",
        }
    }

    /// An error from anything that can be shown.
    #[cold]
    pub(crate) fn error(text: impl fmt::Display) -> Self {
        Self::Error(alloc::format!("{text}"))
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Value(value) => write!(f, "the guest ended with value {value}"),
            Self::Reset(how) => write!(f, "the guest reset the machine: {how}"),
            Self::Shutdown(kind) => write!(f, "the guest switched the machine off: sleep type {kind}"),
            Self::TripleFault => write!(f, "triple fault: the guest's processor shut down"),
            Self::Asked => write!(f, "asked for the record by an NMI"),
            Self::Error(text) => f.write_str(text),
        }
    }
}
