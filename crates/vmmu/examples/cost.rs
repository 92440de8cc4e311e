//! One operation many times, for an instruction counter around the process: `cost touch4k 10000`.
//!
//! Counts are differences: run it with two numbers of rounds under `valgrind --tool=callgrind` and divide.
fn main() {}
