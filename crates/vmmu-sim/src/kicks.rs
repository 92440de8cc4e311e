//! Kicks that somebody asks for: each makes its vCPU leave the guest, or prepare before it enters.
//!
//! Invariant: a vCPU that prepared before a kick began, and accesses memory after the kick has returned, is on its way
//! out: the library had the host kick it. Otherwise the request was lost.

use crate::history::Stage;
use crate::random::Random;
use crate::story::Violation;
use std::cell::Cell;
use vmmu::VcpuId;

/// vCPUs that are kept account of.
const VCPUS: usize = 64;

/// What each vCPU was kicked for, in ticks of a clock of its own.
pub(crate) struct Kicks {
    clock: Cell<u64>,
    /// When the last kick of it began that has returned.
    kicked: [Cell<u64>; VCPUS],
    /// When it was last prepared.
    prepared: [Cell<u64>; VCPUS],
}

impl Default for Kicks {
    fn default() -> Self {
        let never = || std::array::from_fn(|_| Cell::new(0));
        Self { clock: Cell::new(0), kicked: never(), prepared: never() }
    }
}

impl Kicks {
    fn tick(&self) -> u64 {
        self.clock.set(self.clock.get() + 1);
        self.clock.get()
    }
    /// A vCPU has been prepared: what it was kicked for until now is served, or will turn its entry away.
    pub(crate) fn prepared(&self, vcpu: VcpuId) {
        self.prepared[vcpu.number() as usize].set(self.tick());
    }
    /// Whether a vCPU has to be on its way out of the guest.
    pub(crate) fn owed(&self, vcpu: VcpuId) -> bool {
        let vcpu = vcpu.number() as usize;
        self.kicked[vcpu].get() > self.prepared[vcpu].get()
    }
    fn returned(&self, began: u64, vcpu: VcpuId) {
        self.kicked[vcpu.number() as usize].set(began);
    }
}

/// Kicks one vCPU, or all of them, now and then.
pub(crate) fn kicker(stage: &Stage, mut random: Random) {
    while !stage.over() {
        stage.boundary();
        if !random.one_in(stage.rates.kicks) || !stage.begin(&mut random) {
            continue;
        }
        let vcpus = stage.rates.vcpus as u32;
        let one = random.one_in(2).then(|| VcpuId::new(random.below(u64::from(vcpus)) as u32));
        let began = stage.kicks.tick();
        match one {
            Some(vcpu) => stage.vm.kick(vcpu),
            None => stage.vm.kick_all(),
        }
        stage.tell("kicker", || {
            format!("kicked {}", one.map_or("all".to_owned(), |vcpu| format!("{vcpu:?}")))
        });
        for number in 0..vcpus {
            let vcpu = VcpuId::new(number);
            if one.is_none_or(|one| one == vcpu) {
                stage.kicks.returned(began, vcpu);
            }
        }
    }
}

/// Judges a vCPU that is about to access memory in the guest.
pub(crate) fn judge(stage: &Stage, vcpu: VcpuId) -> Result<(), Violation> {
    if stage.kicks.owed(vcpu) && !stage.host.is_kicked(vcpu) {
        let what = format!("vcpu {} is in the guest, and the kick that it was owed is lost", vcpu.number());
        return Err(Violation::new(what));
    }
    Ok(())
}
