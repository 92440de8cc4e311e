//! The emulator: its command line, its monitor, one run from start to end.
//!
//! Knows nothing of hypervisors or guests: files go in, bytes of two serial lines and an exit come out.

pub(crate) mod command;
pub(crate) mod machine;
pub(crate) mod monitor;
