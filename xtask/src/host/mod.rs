//! The machine that xtask runs on: its programs, its package archive, its folders.
//!
//! The only room that installs or downloads anything.

pub(crate) mod apt;
pub(crate) mod folders;
pub(crate) mod libraries;
pub(crate) mod needs;
pub(crate) mod programs;
pub(crate) mod run;
