//! A machine: memory, and the processors that share it.
//!
//! Invariant: none beyond its parts'. Whoever needs memory while a processor is borrowed takes the two
//! fields apart.

use crate::access::Access;
use crate::addr::Gva;
use crate::features::{Features, Quirks};
use crate::memory::Memory;
use crate::outcome::Outcome;
use crate::processor::Processor;

/// See the module.
#[derive(Debug)]
pub struct Machine {
    /// Physical memory.
    pub memory: Memory,
    /// The physical processors.
    pub processors: Vec<Processor>,
}

impl Machine {
    /// `count` processors of one kind, with paging off, and memory full of zeroes.
    pub fn new(count: usize, features: Features, quirks: Quirks) -> Self {
        let processors = (0..count).map(|_| Processor::new(features, quirks)).collect();
        Self { memory: Memory::new(), processors }
    }

    /// Makes an access on one processor; see [`Processor::touch`].
    ///
    /// # Panics
    /// If there is no such processor.
    pub fn touch(&mut self, processor: usize, gva: Gva, access: Access, seed: u64) -> Outcome {
        self.processors[processor].touch(&self.memory, gva, access, seed)
    }

    /// Sets the time of all processors, for provenance.
    pub fn set_step(&mut self, step: u64) {
        for processor in &mut self.processors {
            processor.set_step(step);
        }
    }
}
